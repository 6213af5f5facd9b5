"""Write a checkpoint as a GGUF file, one expert or dense tensor in memory at a time.

The header is the `gguf` package's; it fixes where each tensor lies, so that an expert is read once
and its matrices are written to their places. The file gets its name when it is complete. Needs the
package `gguf` (`pip install 'moefit[gguf]'`), which also rounds to llama.cpp's types.

Shapes: E experts, F expert width, D model width.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefit.checkpoint.config import config_from, read_config
from moefit.checkpoint.expert_map import parameter_names
from moefit.checkpoint.gguf.families import Family, expert_name
from moefit.checkpoint.quantisation import refuse_gguf
from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.dsmoe.model import register
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.gguf.families import (
    arranged,
    dense_name,
    describe,
    expert_parts,
    family_of,
    stays_float32,
)
from moefit.gguf.vocabulary import vocabulary_of
from moefit.serve.hf.skeleton import Skeleton, build_skeleton

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""Types of matrices that can be written; llama.cpp's own quantiser makes the others of these."""
_BLOCK = 32  # weights of a row that share a scale in the quantised types
Progress = Callable[[int, int], None]
"""Called with the number of bytes written, and of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor of the file: its type there, its shape, and where its bytes begin in the data."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written.

    Attributes:
        path: The file.
        architecture: llama.cpp's name of the family.
        type: Type of the matrices.
        nbytes: Size of the file.
        has_vocabulary: Whether it takes text, rather than token ids only.
    """

    path: Path
    architecture: str
    type: str
    nbytes: int
    has_vocabulary: bool


def write_gguf(
    folder: Path,
    path: Path,
    *,
    type: str = "f16",
    with_tokenizer: bool = True,
    progress: Progress = lambda done, total: None,
) -> Written:
    """Write a checkpoint as a GGUF file.

    Norms, biases and routers are stored in float32 in files of every type. Tied embeddings are
    written twice, as llama.cpp requires of some families. Quantised weights (FP8, GPTQ and others)
    are decoded, one at a time.

    Args:
        folder: A folder with safetensors of an OLMoE, Mixtral, Qwen2-MoE or Qwen3-MoE.
        path: The file to write, which must not exist.
        type: One of `TYPES`, of the matrices.
        with_tokenizer: False writes no vocabulary; the file then takes token ids only.
        progress: Called after each tensor and expert.

    Raises:
        ConfigError: The type is unknown, or `gguf` is not installed.
        CheckpointError: The checkpoint is damaged, or the file exists or cannot be written.
        UnsupportedModelError: llama.cpp computes another model or tokenises differently, or the
            type does not fit the model.
    """
    gguf, path = _package(), path.expanduser().resolve()
    _refuse_request(folder, path, type)
    register()
    family = family_of(config_from(read_config(folder), folder))
    # a weight is rounded to the file's type once, not to the model's dtype before
    skeleton = build_skeleton(folder, torch.float32)
    try:
        writer = gguf.GGUFWriter(None, family.architecture)
        _describe(writer, gguf, family, skeleton, type)
        _write_vocabulary(writer, skeleton, with_tokenizer=with_tokenizer)
        places = _places(gguf, family, skeleton, type)
        with _new_file(path, _size(gguf, places)) as partial:
            start = _write_header(writer, gguf, places, partial)
            with partial.open("r+b") as file:
                _Data(
                    gguf=gguf,
                    family=family,
                    skeleton=skeleton,
                    places=places,
                    start=start,
                    descriptor=file.fileno(),
                    progress=progress,
                ).write()
    finally:
        skeleton.checkpoint.close()
    return Written(
        path=path,
        architecture=family.architecture,
        type=type,
        nbytes=path.stat().st_size,
        has_vocabulary=with_tokenizer,
    )


def _refuse_request(folder: Path, path: Path, type: str) -> None:
    if type not in TYPES:
        raise ConfigError(f"type {type!r} cannot be written; {', '.join(TYPES)} can. {_OTHERS}")
    if path.exists():
        raise CheckpointError(f"{path} exists; give a new name, or remove it first")
    refuse_gguf(folder)


def _write_vocabulary(writer: Any, skeleton: Skeleton, *, with_tokenizer: bool) -> None:
    if with_tokenizer:
        config: Any = skeleton.model.config
        tokenizer = read_tokenizer(skeleton.checkpoint.folder)
        vocabulary_of(tokenizer, config.vocab_size).write(writer)
    else:
        writer.add_tokenizer_model("no_vocab")


_OTHERS = "For K-quants and others, write f16 or bf16 and run llama.cpp's llama-quantize on it"


def _package() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "writing GGUF needs the package gguf, which is not installed; run "
            "pip install 'moefit[gguf]'"
        ) from error


def _describe(writer: Any, gguf: Any, family: Family, skeleton: Skeleton, type: str) -> None:
    config: Any = skeleton.model.config
    if len(skeleton.blocks) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{len(skeleton.blocks)} of the model's {config.num_hidden_layers} layers have "
            "experts, but llama.cpp's graph expects them in every layer; serve the checkpoint "
            "itself with moefit"
        )
    writer.add_name(skeleton.checkpoint.folder.name)
    query = skeleton.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    describe(writer, family, config, query.shape[0])
    file_type = "ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    if type.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _dense(family: Family, skeleton: Skeleton) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield parameter, name in the file and shape there of each tensor outside the experts."""
    config = skeleton.model.config
    experts = tuple(f"{block.name}." for block in skeleton.blocks)
    for parameter, tensor in skeleton.model.state_dict().items():
        if not parameter.startswith(experts):
            name = dense_name(family, parameter)
            yield parameter, name, tuple(arranged(family, config, name, tensor).shape)


def _shapes(family: Family, skeleton: Skeleton) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor of the file, in its order."""
    yield from ((name, shape) for _, name, shape in _dense(family, skeleton))
    for layer, block in enumerate(skeleton.blocks):
        specs = block.layout.specs
        one = {name: torch.empty(spec.shape, device="meta") for name, spec in specs.items()}
        for part, tensor in expert_parts(one).items():
            yield expert_name(layer, part), (block.num_experts, *tensor.shape)


def _places(gguf: Any, family: Family, skeleton: Skeleton, type: str) -> dict[str, Place]:
    places: dict[str, Place] = {}
    offset = 0
    for name, shape in _shapes(family, skeleton):
        own = "f32" if stays_float32(name, shape) else type
        if own.startswith("q") and shape[-1] % _BLOCK:
            raise UnsupportedModelError(
                f"{name} has rows of {shape[-1]} weights, which do not divide into blocks of "
                f"{_BLOCK} as {type} has them; use f16 or bf16"
            )
        number = gguf.GGMLQuantizationType[own.upper()]
        weights, size = gguf.GGML_QUANT_SIZES[number]
        nbytes = math.prod(shape) // weights * size
        places[name] = Place(name=name, type=own, shape=shape, nbytes=nbytes, offset=offset)
        offset += gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)
    return places


def _size(gguf: Any, places: dict[str, Place]) -> int:
    """Return the bytes of all tensors, padding included."""
    last = max(places.values(), key=lambda place: place.offset)
    return int(gguf.GGUFWriter.ggml_pad(last.offset + last.nbytes, gguf.GGUF_DEFAULT_ALIGNMENT))


def _write_header(writer: Any, gguf: Any, places: dict[str, Place], path: Path) -> int:
    """Write everything before the data; return where the data begins."""
    for place in places.values():
        number = gguf.GGMLQuantizationType[place.type.upper()]
        # with a raw dtype, the writer expects the shape in elements
        writer.add_tensor_info(place.name, place.shape, np.dtype("f4"), place.nbytes, number)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return int(gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT))


@dataclass(kw_only=True)
class _Data:
    """Writes the tensors into a file whose header is complete."""

    gguf: Any
    family: Family
    skeleton: Skeleton
    places: dict[str, Place]
    start: int
    descriptor: int
    progress: Progress
    done: int = 0

    def write(self) -> None:
        """Write all tensors, each padded to the alignment."""
        os.truncate(self.descriptor, self.start + _size(self.gguf, self.places))
        self._write_dense()
        self._write_experts()

    def _write_dense(self) -> None:
        checkpoint, model = self.skeleton.checkpoint, self.skeleton.model
        dense = self.skeleton.map.dense_weights
        stored = {target: dense[name] for name, target in parameter_names(model, dense).items()}
        for parameter, name, _ in _dense(self.family, self.skeleton):
            source = model.all_tied_weights_keys.get(parameter, parameter)
            if (found := stored.get(parameter, stored.get(source))) is None:
                raise CheckpointError(
                    f"{checkpoint.folder} lacks {parameter}; copy or download it again"
                )
            tensor = checkpoint.tensor(found)
            self._put(self.places[name], 0, arranged(self.family, model.config, name, tensor))

    def _write_experts(self) -> None:
        for layer, block in enumerate(self.skeleton.blocks):
            specs = block.layout.specs
            one = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
            for expert, source in enumerate(self.skeleton.map.experts[block.name]):
                source.read_into(self.skeleton.checkpoint, one)
                for part, tensor in expert_parts(one).items():
                    place = self.places[expert_name(layer, part)]
                    self._put(place, expert * place.nbytes // block.num_experts, tensor)

    def _put(self, place: Place, offset: int, tensor: Tensor) -> None:
        """Round a tensor to the type of its place, and write it `offset` bytes into it."""
        number = self.gguf.GGMLQuantizationType[place.type.upper()]
        values: Any = tensor.float().contiguous().numpy()
        with np.errstate(over="ignore"):
            data = self.gguf.quantize(values, number)
        if place.type == "f16" and not np.isfinite(data).all() and np.isfinite(values).all():
            raise UnsupportedModelError(
                f"{place.name} has the weight {np.abs(values).max():.4g}, beyond f16's 65,504; "
                "use bf16 or f32"
            )
        view = memoryview(data).cast("B")
        position = self.start + place.offset + offset
        while view:
            written = os.pwrite(self.descriptor, view, position)
            view, position = view[written:], position + written
        self.done += data.nbytes
        self.progress(self.done, sum(place.nbytes for place in self.places.values()))


@contextmanager
def _new_file(path: Path, data_bytes: int) -> Iterator[Path]:
    """Give a name beside `path`, and rename it to `path` when the context ends without error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < data_bytes:
            raise CheckpointError(
                f"{path} takes {data_bytes:,} bytes, but {path.parent} has {free:,} left; make "
                "room, or choose a smaller type"
            )
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
