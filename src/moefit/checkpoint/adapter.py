"""Apply a LoRA adapter, as PEFT writes it, to the dense weights of a checkpoint.

An adapter holds two small matrices A and B for a weight W, which stands for W + s B A
(arXiv 2106.09685), s being alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). The
product is added when a weight is read, so that the served model has no further matrices. Adapters
of experts are refused: experts are read again and again, from their own byte ranges.

Shapes: R rows (output units) and C columns (input units) of W, r rank.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefit.checkpoint.formats.scaling import row_chunks
from moefit.checkpoint.model_folder import ADAPTER, read_json
from moefit.checkpoint.safetensors import Span, SpanReader, StoredTensor, read_header
from moefit.errors import CheckpointError, UnsupportedModelError, in_brief

WEIGHTS = "adapter_model.safetensors"
_MERGE = (
    "merge it with peft (PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained) and give that folder as the model"
)
# Settings of PEFT that change what an adapter computes, beyond a product that is added.
_OTHER_METHODS = (
    *("use_dora", "lora_bias", "layer_replication", "use_qalora", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    *("trainable_token_indices", "velora_config"),
)
# Values of `init_lora_weights` with which PEFT changes the weights that the product is added to.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "loraga", "lora-ga")
# Patterns that match in a time that grows with a high power of a name's length, or exponentially.
_SLOW = re.compile(r"\)[*+{]|([*+{][^*+{]*){4}")
_PIECE = 1 << 20  # bytes compared at once
_PREFIX = re.compile(r"^base_model\.model\.")
_MATRIX = re.compile(r"\.lora_(embedding_)?([AB])(\.default)?(\.weight)?$")
_SAVED = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedTensor:
    """A weight to which `scale * B A` is added when it is read.

    Attributes:
        base: The weight without the adapter.
        a: A, [r, C].
        b: B, [R, r].
        scale: As above.
        dtype: Of the sum.
        transposed: Whether the product is transposed first, as for embeddings.
    """

    base: StoredTensor
    a: Span
    b: Span
    scale: float
    dtype: torch.dtype
    transposed: bool = False

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    @property
    def format(self) -> str:
        """How the weight without the adapter is stored."""
        return self.base.format

    @property
    def spans(self) -> tuple[Span, ...]:
        """The byte ranges of the weight, A and B."""
        return (*self.base.spans, self.a, self.b)

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(span.nbytes for span in self.spans)

    @property
    def working_bytes(self) -> int:
        """Bytes held in memory while reading, besides the values: A and B in float32."""
        return self.base.working_bytes + 4 * (prod(self.a.shape) + prod(self.b.shape))

    def row(self, index: int) -> "AdaptedTensor":
        """Return one row of the weight."""
        assert not self.transposed
        return replace(self, base=self.base.row(index), b=self.b.row(index))

    def in_stack(self) -> "AdaptedTensor":
        """Return the weight as the only row of a first axis."""
        assert not self.transposed
        return replace(self, base=self.base.in_stack(), b=self.b.in_stack())

    def read(self, reader: SpanReader) -> Tensor:
        """Read the weight and add the product, in float32.

        Raises:
            CheckpointError: A file cannot be read, or A or B has numbers that are not finite.
        """
        a_rC, b_Rr = (_finite(one.read(reader).float(), one) for one in (self.a, self.b))
        left, right = (a_rC.T, b_Rr.T) if self.transposed else (b_Rr, a_rC)
        values = self.base.read(reader).to(self.dtype)
        for rows in row_chunks(len(values), prod(values.shape[1:])):
            values[rows] = torch.add(values[rows].float(), left[rows] @ right, alpha=self.scale)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedTensor:
    """A weight that an adapter has as a whole; it is checked when it is read.

    Attributes:
        name: Name of the weight.
        span: Its bytes in the adapter's file.
    """

    name: str
    span: Span

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.span.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.span.shape

    @property
    def format(self) -> str:
        """Name of the dtype."""
        return self.span.format

    @property
    def spans(self) -> tuple[Span, ...]:
        """Its bytes."""
        return (self.span,)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.span.nbytes

    @property
    def working_bytes(self) -> int:
        """0: bytes are read straight into place."""
        return 0

    def row(self, index: int) -> "ReplacedTensor":
        """Return one row of the weight."""
        return replace(self, span=self.span.row(index))

    def in_stack(self) -> "ReplacedTensor":
        """Return the weight as the only row of a first axis."""
        return replace(self, span=self.span.in_stack())

    def read(self, reader: SpanReader) -> Tensor:
        """Read the weight.

        Raises:
            CheckpointError: The file cannot be read, or has numbers that are not finite.
        """
        return _finite(self.span.read(reader), self.span)


def _finite(values: Tensor, span: Span) -> Tensor:
    flat = values.flatten()
    if not all(flat[some].float().isfinite().all() for some in row_chunks(len(flat), 1)):
        raise CheckpointError(
            f"{span.path}: {span.name} has numbers that are not finite; copy or download the "
            "adapter again"
        )
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's folder.

    Attributes:
        folder: The folder.
        settings: The values of adapter_config.json.
        pairs: By name of the weight in the model: A, B, and whether it is an embedding.
        whole: Weights that replace the model's (`modules_to_save`, biases, resized embeddings).
    """

    folder: Path
    settings: Mapping[str, Any]
    pairs: Mapping[str, tuple[Span, Span, bool]]
    whole: Mapping[str, Span] = field(default_factory=dict)

    def applied_to(
        self,
        dense: Mapping[str, StoredTensor],
        find: Callable[[str], str | None],
        dtype: torch.dtype,
    ) -> dict[str, StoredTensor]:
        """Return dense weights with the adapter applied.

        Args:
            dense: Dense weights by name in the checkpoint.
            find: Returns the name in the checkpoint of a dense weight of the model, or None; raises
                for experts.
            dtype: The dtype to compute in.

        Raises:
            CheckpointError: The adapter is of another model.
            UnsupportedModelError: It changes experts.
        """
        found = dict(dense)
        for weight, span in self.whole.items():
            name = self._found(weight, find)
            self._refuse_shape(weight, span.shape, dense[name].shape)
            found[name] = ReplacedTensor(name=name, span=span)
        for weight, (a, b, embeds) in self.pairs.items():
            name = self._found(weight, find)
            rows, cols = (a.shape[1], b.shape[0]) if embeds else (b.shape[0], a.shape[1])
            turned = embeds or bool(self.settings.get("fan_in_fan_out"))
            shape = (cols, rows) if turned and not embeds else (rows, cols)
            base = found[name]
            self._refuse_shape(weight, shape, base.shape)
            found[name] = AdaptedTensor(
                base=base,
                a=a,
                b=b,
                scale=self._scale(weight, a.shape[0]),
                dtype=torch.promote_types(base.dtype, dtype),
                transposed=turned,
            )
        return found

    def without_tied(self, tied: Mapping[str, str]) -> "Adapter":
        """Return the adapter without whole weights that equal those that they are tied to.

        Args:
            tied: By name of a weight of the model, the name of the one that it is tied to.

        Raises:
            UnsupportedModelError: It changes a tied weight otherwise than the one it is tied to.
        """
        both = {one: self.whole[one] for one in self.whole.keys() & tied.keys()}
        equal = [one for one, span in both.items() if _equal(span, self.whole.get(tied[one]))]
        changed = (self.whole.keys() - set(equal)) | self.pairs.keys()
        if odd := sorted(changed & tied.keys()):
            raise UnsupportedModelError(
                f"{self.folder} changes {odd[0]}, which the model has tied to {tied[odd[0]]}: they "
                "are one weight. To serve two, untie them in peft's base model "
                f"(tie_word_embeddings=False in config.json) and {_MERGE}"
            )
        return replace(self, whole={k: v for k, v in self.whole.items() if k not in equal})

    def _found(self, weight: str, find: Callable[[str], str | None]) -> str:
        if (name := find(weight)) is None:
            raise CheckpointError(
                f"{self.folder} adapts {weight}, and the model has no such dense weight; the "
                f"adapter is of {self.settings.get('base_model_name_or_path')!r}. Give that model"
            )
        return name

    def _refuse_shape(self, weight: str, found: tuple[int, ...], own: tuple[int, ...]) -> None:
        if found != own:
            raise CheckpointError(
                f"{self.folder} adapts {weight} of shape {list(found)}, but the model's is "
                f"{list(own)}; the adapter is of "
                f"{self.settings.get('base_model_name_or_path')!r}. Give that model"
            )

    def _scale(self, weight: str, rank: int) -> float:
        module = weight.removesuffix(".weight")
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (sqrt(rank) if self.settings.get("use_rslora") else rank)


def _equal(first: Span, second: Span | None) -> bool:
    """Return whether two tensors of files have equal bytes, read in pieces."""
    if second is None or (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.path.open("rb") as one, second.path.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        pieces = (min(_PIECE, first.nbytes - at) for at in range(0, first.nbytes, _PIECE))
        return all(one.read(size) == other.read(size) for size in pieces)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's configuration and headers; no weights are read.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: It is no adapter, or damaged.
        UnsupportedModelError: It is of a kind that is not applied.
    """
    try:
        settings = read_json(folder / ADAPTER)
        _refuse_odd_settings(settings)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {ADAPTER}; give the folder of an adapter that PEFT wrote (from the "
            "Hub, download it first: hf download NAME)"
        ) from error
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder / ADAPTER} cannot be read: {in_brief(error)}") from error
    kind = settings.get("peft_type", "LORA")
    methods = [name for name in _OTHER_METHODS if settings.get(name)]
    start = str(settings.get("init_lora_weights", True)).lower()
    if kind == "LORA" and start.startswith(_CHANGE_BASE):
        raise UnsupportedModelError(
            f"the adapter in {folder} has init_lora_weights {start!r}, with which the weights that "
            "it is added to are not the model's own; write it for the model's own with peft "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...), and "
            f"init_lora_weights true), or {_MERGE}"
        )
    if kind != "LORA" or methods:
        what = f"uses {', '.join(methods)}" if kind == "LORA" else f"is of the kind {kind}"
        raise UnsupportedModelError(
            f"the adapter in {folder} {what}; only LoRA, and rsLoRA, are applied. Instead, {_MERGE}"
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}; if it has adapter_model.bin, load it in peft and write it "
            "with save_pretrained, which makes safetensors"
        )
    return _sorted(folder, settings, read_header(folder / WEIGHTS)[1])


def _refuse_odd_settings(settings: Mapping[str, Any]) -> None:
    """Raise TypeError, ValueError or OverflowError for values of the wrong kind."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise TypeError(f"alpha_pattern is {patterns!r} where numbers by pattern belong")
    for value in (settings.get("lora_alpha", 8), *patterns.values()):
        if type(value) not in (int, float) or not isfinite(value):
            raise TypeError(f"{value!r} where a finite number (lora_alpha) belongs")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"alpha_pattern has {pattern!r}: {error}") from error
        if _SLOW.search(pattern):
            raise ValueError(
                f"alpha_pattern has {pattern!r}, which may take very long to match; repeat no "
                "group, and at most three characters"
            )


def _sorted(folder: Path, settings: Mapping[str, Any], spans: list[Span]) -> Adapter:
    """Sort an adapter's tensors by the weights that they are for."""
    halves: dict[str, dict[str, tuple[Span, bool]]] = {}
    whole: dict[str, Span] = {}
    if not spans:
        raise CheckpointError(f"{folder / WEIGHTS} has no tensors; copy or download it again")
    for span in spans:
        stem = _PREFIX.sub("", span.name)
        if (found := _MATRIX.search(stem)) is not None:
            half = halves.setdefault(f"{stem[: found.start()]}.weight", {})
            _refuse_second(folder, span, half.get(found[2], (None,))[0])
            half[found[2]] = span, found[1] is not None
        elif stem.endswith((".weight", ".bias")) and "lora_" not in stem:
            weight = _SAVED.sub("", stem)
            _refuse_second(folder, span, whole.get(weight))
            whole[weight] = span
        else:
            raise UnsupportedModelError(
                f"{folder} has the tensor {span.name}, which is no matrix of LoRA; {_MERGE}"
            )
        if not span.dtype.is_floating_point:
            raise CheckpointError(
                f"{folder} has {span.name} in {span.format}, where floating-point numbers belong; "
                f"{_MERGE}"
            )
    return Adapter(
        folder=folder, settings=settings, pairs=dict(_pairs(folder, halves)), whole=whole
    )


def _refuse_second(folder: Path, span: Span, first: Span | None) -> None:
    if first is not None:
        raise CheckpointError(
            f"{folder} has two tensors for one weight, {first.name} and {span.name}; save the "
            "adapter again with peft's save_pretrained"
        )


def _pairs(
    folder: Path, halves: Mapping[str, Mapping[str, tuple[Span, bool]]]
) -> Iterator[tuple[str, tuple[Span, Span, bool]]]:
    for weight, found in halves.items():
        if set(found) != {"A", "B"}:
            raise CheckpointError(
                f"{folder} has only one of the two matrices for {weight}; copy or download it again"
            )
        (a, embeds), (b, _) = found["A"], found["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise CheckpointError(
                f"{folder} has A {list(a.shape)} and B {list(b.shape)} for {weight}, which do not "
                "multiply; copy or download it again"
            )
        yield weight, (a, b, embeds)
