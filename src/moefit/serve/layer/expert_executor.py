"""Compute experts from slots on one device.

`ExpertExecutor` is the computation of one block's experts on one device: the device of the slots,
or the host, whose memory holds further experts. `FusedExperts` computes many experts in one kernel
call, from slots of any format; without kernels torch computes them one by one.

Shapes: T tokens, D model width, E experts, K chosen per token, R routed rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moefit.moe.families import Layout
from moefit.quant.backend import Backend, backend
from moefit.quant.cpu_kernels import NATIVE_DTYPES, KernelMlp, Kernels
from moefit.quant.format import DECODED, Format, expert_output
from moefit.quant.layers.decoder_layers import ExpertAddresses
from moefit.serve.cache.slot import Slot

MAX_ROWS = 1024  # that one kernel call computes


class FusedExperts:
    """Kernel calls for the experts of one block.

    Args:
        layout: The layout of the block's experts, which must be an MLP.
        kernels: The kernels of the device that the slots are on.
    """

    def __init__(self, layout: Layout, kernels: Backend):
        assert layout.mlp is not None
        self._layout, self._shape, self.kernels = layout, layout.mlp, kernels
        self._mlps: WeakKeyDictionary[Slot, KernelMlp] = WeakKeyDictionary()

    def one_token(self, x_1D: Tensor, slot_of_row: Mapping[int, Slot], y_KD: Tensor) -> None:
        """Write each expert's output for one token into its row of y_KD (float32)."""
        mlps = [self.mlp(slot) for slot in slot_of_row.values()]
        self.kernels.one_token(x_1D, mlps, [*slot_of_row], y_KD)

    def token(
        self, x_1D: Tensor, slots: Sequence[Slot], weights_1K: Tensor, *, energy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the weighted sum of the outputs of one token's experts, and their energies."""
        mlps = [self.mlp(slot) for slot in slots]
        return self.kernels.token(x_1D, mlps, weights_1K, energy=energy)

    def addresses(self, slots: Mapping[int, Slot], number: int) -> ExpertAddresses | None:
        """Return the addresses of experts in slots; None for kernels of another device.

        Args:
            slots: The slot of each resident expert; at least one.
            number: E.
        """
        if not isinstance(self.kernels, Kernels):
            return None
        mlps = {expert: self.mlp(slot) for expert, slot in slots.items()}
        return ExpertAddresses(mlps, number)

    def outputs(
        self, x_TD: Tensor, batch: Sequence[tuple[Slot, Tensor]], num_choices: int, y_RD: Tensor
    ) -> None:
        """Write the outputs of several experts into y_RD.

        Args:
            x_TD: Inputs.
            batch: Each expert's slot and its rows of the flattened choice.
            num_choices: K, the number of experts per token.
            y_RD: Output, one row per choice.
        """
        for part in _limit_rows(batch):
            tokens = [rows_R // num_choices for _, rows_R in part]
            mlps = [self.mlp(slot) for slot, _ in part]
            output_RD = self.kernels.experts(x_TD, mlps, tokens)
            y_RD[torch.cat([rows_R for _, rows_R in part])] = output_RD.to(y_RD.dtype)

    def mlp(self, slot: Slot) -> KernelMlp:
        """Return a slot's expert as kernels take it."""
        if (cached := self._mlps.get(slot)) is not None:
            return cached
        shape = self._shape
        self._mlps[slot] = KernelMlp(
            w_in=slot.tensors[shape.w_in],
            w_out=slot.tensors[shape.w_out],
            activation=shape.activation,
            gated=shape.gated,
            biases=self._biases(slot),
        )
        return self._mlps[slot]

    def _biases(self, slot: Slot) -> tuple[Tensor, Tensor] | None:
        if self._shape.biases is None:
            return None
        first, second = (slot.tensors[name] for name in self._shape.biases)
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        return first, second

    def computes(self, slots: Iterable[Slot]) -> bool:
        """Return whether all of these slots hold their matrices with output units in rows.

        Codes are held so in every family; values as the family has them.
        """
        shape, specs = self._shape, self._layout.specs
        turned = [name for name in (shape.w_in, shape.w_out) if specs[name].inputs_first]
        return not any(isinstance(slot.tensors[name], Tensor) for slot in slots for name in turned)

    def computes_format(self, format: Format) -> bool:
        """Return whether slots of this format hold matrices with output units in rows."""
        spec = self._layout.specs[self._shape.w_in]
        held = spec.stored is not None and format != DECODED
        return not spec.inputs_first or format.is_encoded or held


def _limit_rows(batch: Sequence[tuple[Slot, Tensor]]) -> Iterator[list[tuple[Slot, Tensor]]]:
    """Yield parts of at most `MAX_ROWS` rows, which limits the memory of hidden units."""
    part, number = list[tuple[Slot, Tensor]](), 0
    for slot, rows_R in batch:
        for some_R in rows_R.split(MAX_ROWS):
            if part and number + len(some_R) > MAX_ROWS:
                yield part
                part, number = [], 0
            part.append((slot, some_R))
            number += len(some_R)
    if part:
        yield part


def fused_experts(layout: Layout, device: torch.device) -> FusedExperts | None:
    """Return the fused experts of a layout; None if no kernels support it on this device."""
    kernels, shape = backend(device), layout.mlp
    if kernels is None or shape is None or (shape.biases and device.type != "cpu"):
        return None
    names = shape.w_in, shape.w_out, *(shape.biases or ())
    supported = all(layout.specs[name].dtype in NATIVE_DTYPES for name in names)
    return FusedExperts(layout, kernels) if supported else None


class ExpertExecutor:
    """Computes the experts of one block on one device.

    Args:
        layout: Of the block's experts.
        device: Of the slots and the inputs.
    """

    def __init__(self, layout: Layout, device: torch.device):
        self._layout, self.device = layout, device
        self._fused = fused_experts(layout, device)

    def fused(self, slots: Iterable[Slot]) -> FusedExperts | None:
        """Return the kernels if they compute these slots, else None."""
        return self._fused if self._fused is not None and self._fused.computes(slots) else None

    def output(self, slot: Slot, x_RD: Tensor) -> Tensor:
        """Return one expert's outputs [R, D], by torch."""
        return expert_output(self._layout, slot.format, slot.tensors, x_RD)

    def outputs(
        self, x_TD: Tensor, batch: Sequence[tuple[Slot, Tensor]], num_choices: int, y_RD: Tensor
    ) -> None:
        """Write the unweighted outputs of several experts into y_RD.

        Args:
            x_TD: Inputs.
            batch: Each expert's slot and its rows of the flattened choice.
            num_choices: K, the number of experts per token.
            y_RD: Output, one row per choice.
        """
        if fused := self.fused(slot for slot, _ in batch):
            fused.outputs(x_TD, batch, num_choices, y_RD)
            return
        for slot, rows_R in batch:
            y_RD[rows_R] = self.output(slot, x_TD[rows_R // num_choices]).to(y_RD.dtype)
