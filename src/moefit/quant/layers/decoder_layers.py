"""Consecutive decoder layers of a step as one call of the kernels.

Each layer is an attention block, a router and its experts (`attention_block.py`), a shared expert
if it has one (`shared_expert.py`), and two sums. A layer without experts has an MLP of a shared
expert's form alone. The call ends before the experts of the first
layer whose router chooses one that is not resident.
`LoadsExperts` may then load what is absent, while the resident ones are computed, and the layers go
on; otherwise that layer is left to the caller. Results are those of the calls by themselves, bit by
bit.

Shapes: L layers, T tokens, D model width, E experts, K chosen per token.
"""

from collections.abc import Sequence
from ctypes import Array, Structure, addressof, byref, c_int8, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moefit.graphs import outside_of_graphs
from moefit.moe.routing import Routing
from moefit.quant.attention import SegmentStruct
from moefit.quant.cpu_kernels import ACTIVATIONS, NATIVE_DTYPES, KernelMlp, Kernels
from moefit.quant.layers.attention_block import AttentionBlockKernel, BlockOutput, CacheRows
from moefit.quant.layers.layer_operations import RouterKernel, RouterSizes
from moefit.quant.layers.shared_expert import SharedExpertKernel


class ExpertAddresses:
    """The experts of one layer that are resident, for the kernels.

    Args:
        mlps: Each resident expert's matrices, all of one activation; at least one.
        number: E.
    """

    def __init__(self, mlps: dict[int, KernelMlp], number: int):
        self._array: Array[c_void_p] = (c_void_p * number)()
        for expert, mlp in mlps.items():
            self.set(expert, mlp)
        self.address = addressof(self._array)
        one = next(iter(mlps.values()))
        self.gated, self.activation = int(one.gated), ACTIVATIONS.index(one.activation)

    def set(self, expert: int, mlp: KernelMlp | None) -> None:
        """Change one expert, also for a call in progress; None: it is not resident any more."""
        self._array[expert] = None if mlp is None else mlp.address


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """What one layer of a call is.

    Attributes:
        block: Its attention block.
        cache: Where tokens belong in its cache.
        router: Its router; None for a layer without experts.
        experts: Its experts; None likewise.
        shared: An expert whose output is added to theirs; None for none. Without experts, the MLP.
    """

    block: AttentionBlockKernel
    cache: CacheRows
    router: RouterKernel | None
    experts: ExpertAddresses | None
    shared: SharedExpertKernel | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayersOutput:
    """What a call makes. Layers from `complete` on are undefined, and choices where no router is.

    Attributes:
        complete: Number of layers that were computed.
        x_LTD: Their outputs.
        logits_LTE: Logits of their routers, and of the layer after them.
        weights_LTK: Weights of the chosen experts, likewise.
        ids_LTK: Chosen experts.
        shares_LE: Sum over tokens of |input of the experts| * |weight| for each expert.
        pending: If not all were computed, the attention block and the choice of the next layer.
    """

    complete: int
    x_LTD: Tensor
    logits_LTE: Tensor
    weights_LTK: Tensor
    ids_LTK: Tensor
    shares_LE: Tensor
    pending: BlockOutput | None


class LoadsExperts(Protocol):
    """Loads the absent experts of one layer after the other, between calls of the kernels."""

    def begin(self, layer: int, ids: Sequence[int]) -> bool:
        """Begin to load the absent experts of a choice, without evicting any of it.

        Args:
            layer: Number of the layer in the call.
            ids: Chosen expert of each row.

        Returns:
            Whether `wait` makes all of them resident; if not, the layers end here.
        """
        ...

    def wait(self) -> None:
        """Wait until they are resident, and write them to the layer's `ExpertAddresses`."""
        ...


_NO_ROUTER = RouterSizes(0, 0, torch.float32, torch.float32)


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("block", "router", "experts", "shared")),
        ("gated", c_int64),
        ("activation", c_int64),
    )


class _Sizes(Structure):
    _fields_ = tuple(
        (name, c_int64) for name in ("D", "E", "K", "kind", "logits_kind", "weights_kind")
    )


class _Results(Structure):
    _fields_ = tuple(
        (name, c_void_p) for name in ("x", "logits", "weights", "ids", "shares", "sum", "normed")
    )


class _Rows(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("done", "outputs", "shared", "has_shared"))


class _Call:
    """The arguments and the results of calls that compute the same layers; see `compute_layers`."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[LayerCall],
        x_TD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
    ):
        self._kernels, self._number, self._tokens = kernels, len(layers), len(x_TD)
        self._inputs = x_TD, cos_TR, sin_TR
        routers = (one.router for one in layers if one.router is not None)
        self.sizes: RouterSizes = next((one.sizes for one in routers), _NO_ROUTER)
        self._structs, self._held = (_Layer * len(layers))(), list[Structure]()
        segments = list[tuple[int, ...]]()
        for one, struct in zip(layers, self._structs, strict=True):
            block, of_layer = one.block.arguments(one.cache)
            segments += of_layer
            self._held.append(block)
            struct.block = addressof(block)
            if (experts := one.experts) is not None and one.router is not None:
                struct.router, struct.experts = one.router.address, experts.address
                struct.gated, struct.activation = experts.gated, experts.activation
            struct.shared = None if one.shared is None else one.shared.address
        self._segments = (SegmentStruct * len(segments))(*segments)
        self._requests = len(segments) // len(layers)
        self._make_results()

    def _make_results(self) -> None:
        x_TD, sizes = self._inputs[0], self.sizes
        rows, chosen = (self._number, self._tokens), sizes.chosen
        self._x_LTD = x_TD.new_empty(*rows, x_TD.shape[1])
        self._logits_LTE = torch.empty(*rows, sizes.experts, dtype=sizes.logits)
        self._weights_LTK = torch.empty(*rows, chosen, dtype=sizes.weights)
        self.ids_LTK = torch.empty(*rows, chosen, dtype=torch.int64)
        self._shares_LE = torch.empty(self._number, sizes.experts, dtype=torch.float32)
        self._sum_TD, self._normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
        made = (
            self._x_LTD, self._logits_LTE, self._weights_LTK, self.ids_LTK, self._shares_LE,
            self._sum_TD, self._normed_TD,
        )  # fmt: skip
        self._results = byref(_Results(*(one.data_ptr() for one in made)))
        kinds = (NATIVE_DTYPES[dtype] for dtype in (x_TD.dtype, sizes.logits, sizes.weights))
        self._sizes = byref(_Sizes(x_TD.shape[1], sizes.experts, chosen, *kinds))

    def compute(self, first: int, rows: Any) -> int:
        """Compute layers from `first` on, whose router has run if there are `rows`.

        Returns:
            The number of complete layers.
        """
        x, cos, sin = (one.data_ptr() for one in self._inputs)
        return self._kernels.layers(
            self._structs, first, self._number, self._sizes, self._segments, self._requests, x,
            self._tokens, cos, sin, self._results, rows,
        )  # fmt: skip

    def compute_residents(self, layer: int, rows: Any) -> None:
        """Compute the resident experts of a layer whose router has run, into `rows`."""
        self._kernels.resident_rows(
            self._structs, layer, self._sizes, self._tokens, self._results, rows
        )

    def output(self, complete: int) -> LayersOutput:
        """Return what was made of so many layers, and of the next one."""
        pending = None
        if complete < self._number:
            choice = Routing(self.ids_LTK[complete], self._weights_LTK[complete])
            logits_TE = self._logits_LTE[complete]
            pending = BlockOutput(self._sum_TD, self._normed_TD, logits_TE, choice)
        return LayersOutput(
            complete, self._x_LTD, self._logits_LTE, self._weights_LTK, self.ids_LTK,
            self._shares_LE, pending,
        )  # fmt: skip


@outside_of_graphs
def compute_layers(
    kernels: Kernels,
    layers: Sequence[LayerCall],
    x_TD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    loads: LoadsExperts | None = None,
) -> LayersOutput:
    """Compute layers one after the other, until experts are missing that are not loaded.

    Args:
        kernels: The compiled library.
        layers: Layers of equal widths, requests and `RouterSizes` if they have experts, one after
            the other.
        x_TD: Hidden states, consecutive, in one of `NATIVE_DTYPES`.
        cos_TR: Cosines of each token.
        sin_TR: Sines.
        loads: Loads experts that are missing.

    Raises:
        Exception: Whatever `loads` raises.
    """
    call = _Call(kernels, layers, x_TD, cos_TR, sin_TR)
    complete = call.compute(0, None)
    made: tuple[Tensor, Tensor] | None = None
    while complete < len(layers) and loads is not None:
        if not loads.begin(complete, call.ids_LTK[complete].flatten().tolist()):
            break
        if made is None:
            y_RD = torch.empty(call.ids_LTK[0].numel(), x_TD.shape[1], dtype=torch.float32)
            made = y_RD, torch.empty_like(x_TD)
        done, has_shared = (c_int8 * call.sizes.experts)(), c_int64()
        outputs, shared = (one.data_ptr() for one in made)
        rows = byref(_Rows(addressof(done), outputs, shared, addressof(has_shared)))
        call.compute_residents(complete, rows)
        loads.wait()
        complete = call.compute(complete, rows)
    return call.output(complete)
