"""Many experts in one call of the kernels for a device, straight from slots of any format.

Owns when that is possible and pays: for experts that are two matrices and a known activation, over
so many tokens each as the kernels are good for. Otherwise experts are computed one by one in torch.
float32 experts alone stay with torch, whose own products read memory as fast and equal
transformers' bit for bit: they are of the same rows.

Shapes: T tokens, D model width, K chosen per token, R routed rows.
"""

from collections.abc import Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moefit.formats.backend import Backend, backend
from moefit.formats.format import NativeFormat, expert_output
from moefit.formats.kernels import NATIVE_DTYPES, Mlp
from moefit.moe.families import Layout
from moefit.serve.slots import Slot


class FusedExperts:
    """The kernels' side of one block."""

    def __init__(self, layout: Layout, compiled: Backend):
        assert layout.mlp is not None
        self._layout, self._shape, self._kernels = layout, layout.mlp, compiled
        self._mlps: WeakKeyDictionary[Slot, Mlp] = WeakKeyDictionary()

    def pays(self, slots: Collection[Slot]) -> bool:
        """Whether a step over these slots is to go this way."""
        return any(map(self._quicker, slots))

    def _quicker(self, slot: Slot) -> bool:
        if not isinstance(slot.format, NativeFormat):
            return True
        return self._layout.specs[self._shape.w_in].dtype in (torch.bfloat16, torch.float16)

    def one_token(self, x_1D: Tensor, placed: Mapping[int, Slot], y_KD: Tensor) -> None:
        """Each expert's output into its row of y_KD, float32; given as row and slot."""
        self._kernels.one_token(x_1D, [self._mlp(one) for one in placed.values()], [*placed], y_KD)

    def weighted_sum(
        self, y_RD: Tensor, weights_TK: Tensor, dtype: torch.dtype, *, energy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Each token's y_TD, and if asked for what each output adds, as squares."""
        return self._kernels.weighted_sum(y_RD, weights_TK, dtype, energy=energy)

    def outputs(
        self, x_TD: Tensor, batch: Sequence[tuple[Slot, Tensor]], num_choices: int, y_RD: Tensor
    ) -> None:
        """Fill y_RD for experts given as slot and rows of the flattened choice."""
        few = [(slot, rows_R) for slot, rows_R in batch if len(rows_R) <= self._few(slot)]
        if few:
            tokens = [rows_R // num_choices for _, rows_R in few]
            made_RD = self._kernels.experts(x_TD, [self._mlp(slot) for slot, _ in few], tokens)
            y_RD[torch.cat([rows_R for _, rows_R in few])] = made_RD.to(y_RD.dtype)
        for slot, rows_R in batch:
            if len(rows_R) > self._few(slot):
                x_RD = x_TD[rows_R // num_choices]
                made_RD = expert_output(self._layout, slot.tensors, x_RD)
                y_RD[rows_R] = made_RD.to(y_RD.dtype)

    def _few(self, slot: Slot) -> int:
        native = isinstance(slot.format, NativeFormat)
        return self._kernels.few_native if native else self._kernels.few

    def _mlp(self, slot: Slot) -> Mlp:
        if (known := self._mlps.get(slot)) is not None:
            return known
        shape = self._shape
        self._mlps[slot] = Mlp(
            w_in=slot.tensors[shape.w_in],
            w_out=slot.tensors[shape.w_out],
            activation=shape.activation,
            gated=shape.gated,
        )
        return self._mlps[slot]


def fused_experts(layout: Layout, device: torch.device) -> FusedExperts | None:
    """The kernels' side of a block; None if there are no kernels, or none for such experts."""
    compiled, shape = backend(device), layout.mlp
    if compiled is None or shape is None:
        return None
    matrices = layout.specs[shape.w_in], layout.specs[shape.w_out]
    known = all(spec.dtype in NATIVE_DTYPES for spec in matrices)
    return FusedExperts(layout, compiled) if known else None
