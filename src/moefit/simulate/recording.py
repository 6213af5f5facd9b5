"""Record which experts a model chooses on a text, in the form that `moefit simulate` reads.

Takes a served model in exact mode and windows of token ids. Gives an .npz file with the routing, as
`routing.read_recording` reads it, and beside it a file .shape.yaml with the sizes of the experts.

Shapes: T tokens, L layers, K chosen per token.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from moefit.errors import ConfigError, UnsupportedModelError
from moefit.moe.families import MoeBlock
from moefit.moe.routing import Routing
from moefit.quant.format import matrix_shape, parse_format, weights_in
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.model import ServedModel
from moefit.serve.packed.file import WRITING
from moefit.serve.windows import Windows
from moefit.simulate.costs import ExpertShape
from moefit.simulate.routing import Ids


def check_recording(path: Path, skeleton: Skeleton) -> None:
    """Raise an error if a routing cannot be recorded, before anything is computed.

    Args:
        path: The file to be written.
        skeleton: The model.

    Raises:
        ConfigError: The file cannot have this name or place.
        UnsupportedModelError: `moefit simulate` does not know such experts.
    """
    if path.suffix != ".npz":
        raise ConfigError(f"a routing is not written as {path.name!r}; give a name ending in .npz")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file's name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {path.absolute().parent} to write {path.name} into")
    if skeleton.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            "an encoder-decoder's two halves read different tokens, and a recording has the same "
            "ones in all layers; leave --routing out"
        )
    blocks = skeleton.blocks
    sizes = {(one.num_experts, weights_in(one.layout.specs)) for one in blocks}
    if len(sizes) != 1 or any(one.layout.mlp is None for one in blocks):
        raise UnsupportedModelError(
            "this model's layers have experts of several sizes or numbers, or such as are no MLP, "
            "and `moefit simulate` computes with one size; leave --routing out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The routing of a text.

    Attributes:
        ids_TLK: Chosen experts.
        ends: First token of each window, and the number of tokens.
        shape: Of the experts.
    """

    ids_TLK: Ids
    ends: Sequence[int]
    shape: ExpertShape

    def write(self, path: Path) -> Path:
        """Write the .npz file, and return the file of the shape that is written beside it.

        Raises:
            ConfigError: One of them cannot be written.
        """
        shape, fields = path.with_suffix(".shape.yaml"), self.shape.model_dump(exclude={"name"})
        try:
            with _renamed(path) as partial, partial.open("wb") as file:
                ends = np.array(self.ends, dtype=np.int64)
                np.savez_compressed(file, experts=self.ids_TLK, seq_ptr=ends)
            with _renamed(shape) as partial:
                partial.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the routing cannot be written: {error}") from error
        return shape


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file, which gets its own once it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{WRITING}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@torch.inference_mode()
def record_routing(served: ServedModel, windows: Windows, source: str) -> Recording:
    """Run windows one after the other and record what each router chooses.

    Args:
        served: The model, in exact mode; a decoder.
        windows: Token ids.
        source: What the model and the text are, for the sizes' file.

    Raises:
        ConfigError: Routers choose several numbers of experts, or none for some tokens.
    """
    blocks = list(served.blocks.values())
    recorder, ends = _Recorder(ids=[[] for _ in blocks]), [0]
    with served.watched(recorder):
        for row in range(len(windows)):
            inputs = windows.inputs(row, served.model.device)
            served.model.base_model(**inputs, use_cache=False)
            ends.append(ends[-1] + inputs["input_ids"].shape[1])
    columns = [torch.cat(one) for one in recorder.ids]
    experts = blocks[0].num_experts
    numbers = torch.cat([(one < experts).sum(1) for one in columns])
    least, most = int(numbers.min()), int(numbers.max())
    if least != most or not least:
        raise ConfigError(
            f"routers choose {least} to {most} experts per token on this text, and `moefit "
            "simulate` takes recordings with one number; give --rule top_k:K, such as "
            f"top_k:{max(1, most)}"
        )
    # Rows may have padding, which is the largest id, so chosen ones are moved to the front.
    ids_TLK = torch.stack([one.sort(1).values[:, :least] for one in columns], dim=1)
    return Recording(
        ids_TLK=ids_TLK.numpy().astype(np.uint16),
        ends=ends,
        shape=shape_of([one.block for one in blocks], chosen=least, source=source),
    )


def shape_of(blocks: Sequence[MoeBlock], *, chosen: int, source: str) -> ExpertShape:
    """Return the sizes of a model's experts.

    Args:
        blocks: MoE blocks that `check_recording` accepts.
        chosen: Experts per token.
        source: Where the sizes are from.
    """
    layout = blocks[0].layout
    assert layout.mlp is not None, "checked before"
    hidden_size, width = matrix_shape(layout.specs[layout.mlp.w_out])
    # Slots are aligned, which is much only where experts are tiny.
    bits = 8 * parse_format("native").nbytes(layout.specs) / weights_in(layout.specs)
    return ExpertShape(
        name="recorded",
        layers=len(blocks),
        experts=layout.num_experts,
        chosen=chosen,
        hidden_size=hidden_size,
        width=width,
        matrices=3 if layout.mlp.gated else 2,
        bits=min(bits, 32.0),
        source=source,
    )


@dataclass(slots=True, kw_only=True)
class _Recorder:
    """A `StepWatcher` that keeps the ids of each block's choices [T, K]."""

    ids: list[list[Tensor]]

    def chosen(self, block: int, routing: Routing) -> None:
        self.ids[block].append(routing.ids_TK.cpu().clone())

    def read(self, block: int, x_TD: Tensor) -> None:
        """Inputs are not recorded."""

    def computed(self, block: int) -> None:
        """Nothing follows the end of a block."""
