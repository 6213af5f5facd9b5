"""Norms, rotary embeddings and routing of a layer, each as one call of the compiled kernels.

`NormKernel`, `RotaryKernel` and `RoutingKernel` hold what does not change between calls.
`plain_norm`, `plain_rotate` and `ScoringRule.route` are the references in torch, with the same
roundings at the same places; what is recognised as one of these forms (`serve/hf/norms.py`,
`serve/hf/rotary.py`, `serve/layer/router_kernels.py`) can be computed here.

Shapes: B sequences, T tokens, H heads, C head width, D width of a row, E experts, K chosen.
"""

from collections.abc import Sequence
from ctypes import Structure, addressof, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMatrix, Kernels, MatrixStruct


@dataclass(frozen=True, slots=True, kw_only=True)
class NormForm:
    """How x / sqrt(mean(x^2) + eps) * (weight + added) is rounded.

    Attributes:
        eps: Added to the mean of squares.
        added: Added to the weight: 0 or 1.
        round_first: Whether the normalised row is rounded to x's dtype before it is multiplied by
            the weight, as well as after it. The weight is then in x's dtype.
    """

    eps: float
    added: int = 0
    round_first: bool = False


def plain_norm(x_RD: Tensor, weight_D: Tensor | None, form: NormForm) -> Tensor:
    """Return root-mean-square normalised rows in the dtype of `x_RD`; float64 stays float64."""
    wide_RD = x_RD if x_RD.dtype == torch.float64 else x_RD.float()
    y_RD = wide_RD * torch.rsqrt(wide_RD.pow(2).mean(-1, keepdim=True) + form.eps)
    if form.round_first:
        y_RD = y_RD.to(x_RD.dtype)
    if weight_D is not None:
        factor_D = weight_D if form.round_first else weight_D.to(wide_RD.dtype)
        y_RD = y_RD * (factor_D + form.added if form.added else factor_D)
    return y_RD.to(x_RD.dtype)


class NormStruct(Structure):
    """`Norm` of csrc/levels/rows.h."""

    _fields_ = (
        ("weight", c_void_p),
        *((name, c_int64) for name in ("width", "kind", "weight_kind", "round_first")),
        ("eps", c_float),
        ("added", c_float),
    )


class NormKernel:
    """Root-mean-square norm of rows in one dtype.

    Args:
        kernels: The compiled library.
        weight_D: The weight; None for none.
        form: The form.
        dtype: The dtype of rows.
        width: D, if there is no weight.
    """

    def __init__(
        self,
        kernels: Kernels,
        weight_D: Tensor | None,
        form: NormForm,
        dtype: torch.dtype,
        width: int = 0,
    ):
        kind = NATIVE_DTYPES[dtype]
        self.dtype, self.width = dtype, width if weight_D is None else len(weight_D)
        self.weight = None if weight_D is None else weight_D.data_ptr()
        self._kernels, self._weight_D = kernels, weight_D  # keeps its memory
        self._struct = NormStruct(
            self.weight, self.width, kind,
            kind if weight_D is None else NATIVE_DTYPES[weight_D.dtype],
            form.round_first, form.eps, form.added,
        )  # fmt: skip
        self._address = addressof(self._struct)

    def fits(self, x: Tensor, weight_D: Tensor | None) -> bool:
        """Return whether rows and weight are still of the same width, dtype and memory."""
        weight = None if weight_D is None else weight_D.data_ptr()
        return weight == self.weight and x.shape[-1] == self.width and x.dtype == self.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., D]."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._kernels.norm(self._address, x, x.numel() // self.width, y)
        return y


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryForm:
    """Which elements of a head are a pair (a, b), rotated to (a cos - b sin, b cos + a sin).

    Attributes:
        pairs_in: Whether a pair is two neighbours; else it is elements i and i + width / 2.
        pairs_out: The same for the result.
        halves: Whether cosines and sines of the second elements are the second half of theirs, so
            that there are as many as rotated elements; else both use the first.
        doubled: Whether there are twice as many cosines and sines as are used.
        in_turn: Whether one tensor has the cosine and the sine of each pair in turn, in float32,
            in which products and sums are computed.
    """

    pairs_in: bool = False
    pairs_out: bool = False
    halves: bool = True
    doubled: bool = False
    in_turn: bool = False

    def rotated(self, cosines: int) -> int:
        """Return how many elements of a head are rotated by so many cosines."""
        return cosines if self.halves or self.doubled or self.in_turn else 2 * cosines


def plain_rotate(x_BHTC: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, form: RotaryForm) -> Tensor:
    """Return heads with their first elements rotated; products and sums are rounded one by one."""
    width = form.rotated(cos_BTR.shape[-1])
    half, x, rest = width // 2, x_BHTC[..., :width], x_BHTC[..., width:]
    if form.in_turn:
        x, cos_BTR, sin_BTR = x.float(), cos_BTR[..., 0::2], cos_BTR[..., 1::2]
    a, b = (x[..., 0::2], x[..., 1::2]) if form.pairs_in else (x[..., :half], x[..., half:])
    second = half if form.halves else 0
    cos_a, cos_b, sin_a, sin_b = (
        one[:, None, :, start : start + half] for one in (cos_BTR, sin_BTR) for start in (0, second)
    )
    pair = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    out = torch.stack(pair, dim=-1).flatten(-2) if form.pairs_out else torch.cat(pair, dim=-1)
    return torch.cat([out.to(x_BHTC.dtype), rest], dim=-1)


class _Heads(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("heads", "size", "x_batch", "x_head", "x_token")),
        *((name, c_int64) for name in ("y_batch", "y_head", "y_token")),
    )


class RotaryStruct(Structure):
    """`Rotary` of csrc/levels/rows.h."""

    _fields_ = tuple(
        (name, c_int64) for name in ("width", "kind", "pairs_in", "pairs_out", "second", "in_turn")
    )


def rotary_struct(form: RotaryForm, dtype: torch.dtype, cosines: int) -> RotaryStruct:
    """Return the structure for heads of a dtype, with so many cosines per token."""
    width = form.rotated(cosines)
    second = width // 2 if form.halves else 0
    kind = NATIVE_DTYPES[dtype]
    return RotaryStruct(width, kind, form.pairs_in, form.pairs_out, second, form.in_turn)


class _Rotation(Structure):
    _fields_ = (
        ("form", RotaryStruct),
        *((name, c_int64) for name in ("batch", "tokens", "angle_batch", "angle_token")),
        ("heads", _Heads * 2),
    )


class RotaryKernel:
    """Rotary embedding of queries and keys in one call.

    Args:
        kernels: The compiled library.
        form: The form.
    """

    def __init__(self, kernels: Kernels, form: RotaryForm):
        self._kernels, self._form = kernels, form
        self._known: dict[tuple[Any, ...], _Rotation | None] = {}  # by shapes, strides and dtypes

    def __call__(self, cos_BTR: Tensor, sin_BTR: Tensor, *heads: Tensor) -> list[Tensor] | None:
        """Return `plain_rotate` of one or two tensors; None if kernels do not support them.

        Args:
            cos_BTR: Cosines; B may be 1.
            sin_BTR: Sines.
            heads: Queries [B, H, T, C], and keys, whose number of heads may differ.
        """
        key = tuple([(x.dtype, x.shape, x.stride(), x.is_cpu) for x in (cos_BTR, sin_BTR, *heads)])
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._rotation(cos_BTR, sin_BTR, heads)
        rotation = self._known[key]
        if rotation is None:
            return None
        made = [torch.empty_like(x) for x in heads]
        self._kernels.rotate(rotation, cos_BTR, sin_BTR, list(zip(heads, made, strict=True)))
        return made

    def _rotation(
        self, cos_BTR: Tensor, sin_BTR: Tensor, heads: Sequence[Tensor]
    ) -> _Rotation | None:
        if not can_rotate(heads, cos_BTR, sin_BTR, self._form):
            return None
        batch, _, tokens, _ = heads[0].shape
        array = (_Heads * 2)()
        for number, x in enumerate(heads):
            y = torch.empty_like(x)
            array[number] = _Heads(x.shape[1], x.shape[3], *x.stride()[:3], *y.stride()[:3])
        return _Rotation(
            rotary_struct(self._form, heads[0].dtype, cos_BTR.shape[-1]), batch, tokens,
            cos_BTR.stride(0) if cos_BTR.shape[0] > 1 else 0, cos_BTR.stride(1), array,
        )  # fmt: skip


_MOST_KNOWN = 64  # layouts that one kernel remembers


def can_rotate(heads: Sequence[Tensor], cos_BTR: Tensor, sin_BTR: Tensor, form: RotaryForm) -> bool:
    """Return whether kernels support heads [B, H, T, C] and their cosines and sines [B, T, R]."""
    tensors = (cos_BTR, sin_BTR, *heads)
    if cos_BTR.dim() != 3 or any(one.dim() != 4 for one in heads):
        return False
    width = form.rotated(cos_BTR.shape[2])
    batch, _, tokens, _ = heads[0].shape
    dtype = heads[0].dtype
    return (
        all(x.is_cpu and x.stride(-1) == 1 for x in tensors)
        and all(x.dtype == dtype for x in heads)
        and cos_BTR.dtype == sin_BTR.dtype == (torch.float32 if form.in_turn else dtype)
        and dtype in NATIVE_DTYPES
        and (cos_BTR.shape, cos_BTR.stride()) == (sin_BTR.shape, sin_BTR.stride())
        and tuple(cos_BTR.shape[:2]) in ((batch, tokens), (1, tokens))
        and width % 2 == 0
        and all((x.shape[0], x.shape[2]) == (batch, tokens) for x in heads)
        and all(x.numel() and width <= x.shape[3] for x in heads)
        and torch.empty_like(heads[-1]).stride(-1) == 1
    )


class _Routing(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("experts", "chosen", "kind", "weights_kind")),
        *((name, c_int64) for name in ("score", "weighting", "by_logits", "rounded")),
        *((name, c_int64) for name in ("groups", "kept_groups", "two_of_group")),
        ("scale", c_float),
        ("bias", c_void_p),
        ("factor", c_void_p),
    )


_SCORES = ("softmax", "sigmoid", "sqrt_softplus", "given")
_WEIGHTINGS = ("kept", "normalised", "softmax")


def can_route(rule: ScoringRule, experts: int) -> bool:
    """Return whether the kernel computes a rule."""
    return rule.chosen in _WEIGHTINGS and (rule.groups is None or experts % rule.groups.number == 0)


class RoutingKernel:
    """A router's choice by a rule; among experts of equal preference, torch's.

    Args:
        kernels: The compiled library.
        rule: The rule; `can_route` must hold.
        bias_E: Added to the scores if the rule is `biased`.
        experts: E.
        chosen: K.
        dtypes: Of logits and of weights.
    """

    def __init__(
        self,
        kernels: Kernels,
        rule: ScoringRule,
        bias_E: Tensor | None,
        *,
        experts: int,
        chosen: int,
        dtypes: tuple[torch.dtype, torch.dtype],
    ):
        self._kernels, self.chosen, self.dtype = kernels, chosen, dtypes[1]
        biased = rule.biased and bias_E is not None
        self._vectors = [  # keeps their memory
            None if one is None else one.detach().float().contiguous()
            for one in (bias_E if biased else None, rule.factor_E)
        ]
        groups = rule.groups
        self.struct = _Routing(
            experts, chosen, NATIVE_DTYPES[dtypes[0]], NATIVE_DTYPES[dtypes[1]],
            _SCORES.index(rule.score), _WEIGHTINGS.index(rule.chosen), rule.by_logits, rule.rounded,
            groups.number if groups else 1, groups.kept if groups else 1,
            groups is not None and groups.score == "top_2", rule.scale,
            *(None if one is None else one.data_ptr() for one in self._vectors),
        )  # fmt: skip
        self._address = addressof(self.struct)

    def empty(self, tokens: int) -> Routing:
        """Return ids and weights [T, K] without values."""
        shape = tokens, self.chosen
        return Routing(torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=self.dtype))

    def __call__(self, logits_TE: Tensor) -> Routing:
        """Return ids and weights [T, K], in descending order of preference."""
        logits_TE, made = logits_TE.contiguous(), self.empty(len(logits_TE))
        self._kernels.route(self._address, logits_TE, made.weights_TK, made.ids_TK)
        return made


class _Router(Structure):
    _fields_ = (
        ("matrix", MatrixStruct),
        ("bias", c_void_p),
        ("product", c_int64),
        ("rule", _Routing),
    )


@dataclass(frozen=True, slots=True)
class RouterSizes:
    """Experts E, experts per token K, and the dtypes of logits and weights of a router."""

    experts: int
    chosen: int
    logits: torch.dtype
    weights: torch.dtype


class RouterKernel:
    """A router: its linear layer and its choice in one call.

    Args:
        kernels: The compiled library.
        matrix: The weight [E, D].
        bias_E: The linear layer's bias in float32; None for none.
        product: The dtype in which logits are computed, one of `NATIVE_DTYPES`.
        logits: The dtype to which they are rounded.
        routing: The choice.
    """

    def __init__(
        self,
        kernels: Kernels,
        matrix: KernelMatrix,
        bias_E: Tensor | None,
        *,
        product: torch.dtype,
        logits: torch.dtype,
        routing: RoutingKernel,
    ):
        self._kernels, self.matrix, self._bias_E, self.routing = kernels, matrix, bias_E, routing
        self._logits = logits
        bias = None if bias_E is None else bias_E.data_ptr()
        self._struct = _Router(matrix.matrix, bias, NATIVE_DTYPES[product], routing.struct)
        self.address = addressof(self._struct)
        self.sizes = RouterSizes(matrix.rows, routing.chosen, logits, routing.dtype)

    def empty(self, tokens: int) -> tuple[Tensor, Routing]:
        """Return logits [T, E] and a choice without values."""
        logits_TE = torch.empty(tokens, self.matrix.rows, dtype=self._logits)
        return logits_TE, self.routing.empty(tokens)

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        """Return logits and the choice for consecutive tokens in one of `NATIVE_DTYPES`."""
        logits_TE, made = self.empty(len(x_TD))
        self._kernels.router(self.address, x_TD.contiguous(), logits_TE, made)
        return logits_TE, made
