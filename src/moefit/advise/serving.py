"""What serving a shape costs in memory: bytes resident, and bytes read per token.

Sizes come from what `moefit serve` reserves: slots of a format, dense weights, KV cache, workspace,
staging. Decoding one sequence reads every byte that a token uses once, so seconds per token follow
from bytes, the rates at which a device reads each format, and a time per layer.

Shapes: D model width, F expert width, V vocabulary.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from moefit.advise.hardware import Device
from moefit.advise.shapes import Shape
from moefit.dsmoe.config import DsMoeConfig
from moefit.errors import BudgetTooSmallError
from moefit.moe.families import TensorSpec
from moefit.quant.cpu_kernels import kernels
from moefit.quant.format import NATIVE, Format, GroupedFormat, parse_format
from moefit.quant.grouped_int import codes_bytes, meta_bytes
from moefit.serve.memory.activations import (
    FIRST_USE,
    KERNEL_FIRST_USE,
    kv_bytes_per_token,
    workspace_bytes,
)
from moefit.serve.memory.budget import BlockNeeds, MemoryBudget
from moefit.serve.memory.estimate import RUN_TO_RUN, SPARES, slot_bytes

# Increase of the loss in nats when experts are held in a format: the largest of three trained
# models, rounded up (benchmarks/results/quality-against-bytes-trained-models-2026-11-23.json).
QUANTISATION_NATS = {
    "native": 0.0, "int8": 0.0, "int6": 0.0006, "int5": 0.0012, "int4": 0.0025, "int3": 0.0146,
    "int2": 0.102,
}  # fmt: skip
PRECISIONS = tuple(QUANTISATION_NATS)
PROCESS = 374 << 20  # bytes of interpreter and libraries of a server without a model, on a CPU
CONTEXT = 2048  # tokens of the KV cache, the default of `moefit serve`
STEP_TOKENS = 144  # of one forward pass of `moefit serve`
_TOKENIZER = 700  # bytes per token of the vocabulary
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a model will be served.

    Attributes:
        memory: Bytes of one device that serving may take; None for all of the device's.
        context: Tokens that the KV cache holds.
        position: Mean number of tokens that a decoded token attends to.
        min_speed: Tokens per second of one sequence; None for any.
        storage_bandwidth: Bytes per second at which missing experts are read; None makes all
            experts resident.
    """

    memory: float | None = None
    context: int = CONTEXT
    position: float = 640.0
    min_speed: float | None = None
    storage_bandwidth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSizes:
    """Bytes of one shape in one precision.

    Attributes:
        shape: The model.
        precision: Format of experts.
        dense_precision: Format of dense weights: int8 unless experts are native.
        budget: By part, without a total.
        expert_read: Bytes of one expert that are read, without its slot's padding.
        dense_read: Bytes of dense weights that a token reads.
        kv_per_token: Bytes of keys and values of one token.
    """

    shape: Shape
    precision: str
    dense_precision: str
    budget: MemoryBudget
    expert_read: int
    dense_read: int
    kv_per_token: int

    @property
    def resident(self) -> int:
        """Bytes of the process, or of a GPU, with all experts resident."""
        return self.budget.all_resident_bytes

    @property
    def expert(self) -> int:
        """Bytes of one expert's slot."""
        return self.budget.blocks[0].slot_bytes

    @property
    def weights(self) -> int:
        """Bytes of all weights, without cache, workspace and process."""
        experts = self.expert * self.shape.num_experts * self.shape.layers
        return self.budget.weights + experts

    def expert_bytes(self, tokens: float) -> float:
        """Return the bytes of experts that a step reads, if routing is uniform.

        A layer reads E (1 - (1 - K/E)^T) of its E experts for T tokens that choose K each.
        """
        count, k = self.shape.num_experts, self.shape.top_k
        used = count * (1 - (1 - k / count) ** tokens) if k < count else count
        return used * self.expert_read * self.shape.layers


@lru_cache(maxsize=4096)
def served_sizes(shape: Shape, precision: str, *, context: int, is_gpu: bool) -> ServedSizes:
    """Return the bytes of a shape.

    Args:
        shape: The model, stored in bfloat16.
        precision: Format of experts, of `PRECISIONS`.
        context: Tokens of the KV cache.
        is_gpu: Whether the budget is a GPU's.
    """
    format = parse_format(precision)
    dense = NATIVE if format is NATIVE else parse_format("int8")
    config = _config(shape, context)
    device = torch.device("cuda" if is_gpu else "cpu")
    expert = format.nbytes(_specs(shape))
    size = slot_bytes(expert, device)
    held, read = _dense_bytes(shape, dense)
    kv_per_token = kv_bytes_per_token(config, _DTYPE)
    first_use = FIRST_USE if is_gpu or kernels() is None else KERNEL_FIRST_USE
    block = BlockNeeds(name="", num_experts=shape.num_experts, slot_bytes=size, min_slots=1)
    budget = MemoryBudget(
        total=None,
        process=0 if is_gpu else PROCESS + RUN_TO_RUN,
        tokenizer=0 if is_gpu else _TOKENIZER * shape.vocabulary,
        weights=held,
        context=context,
        kv_cache=context * kv_per_token,
        workspace=workspace_bytes(
            config,
            min(STEP_TOKENS, context),
            _DTYPE,
            first_use=first_use,
            context=context,
            copies=first_use == FIRST_USE,
        ),
        first_use=first_use,
        staging=SPARES * size,
        blocks=(block,) * shape.layers,
    )
    return ServedSizes(
        shape=shape,
        precision=precision,
        dense_precision=dense.name,
        budget=budget,
        expert_read=expert,
        dense_read=read,
        kv_per_token=kv_per_token,
    )


@lru_cache(maxsize=4096)
def _config(shape: Shape, context: int) -> DsMoeConfig:
    return DsMoeConfig(vocab_size=shape.vocabulary, **shape.model_fields(context))


def _specs(shape: Shape) -> dict[str, TensorSpec]:
    width, expert = shape.width, shape.expert_width
    return {
        "w_in": TensorSpec((2 * expert, width), _DTYPE),
        "w_out": TensorSpec((width, expert), _DTYPE),
    }


def _dense_bytes(shape: Shape, format: Format) -> tuple[int, int]:
    """Return the bytes of dense weights, and those that a token reads.

    A token reads one row of the embedding, which is neglected.
    """
    width = shape.width
    attention = 4 * _matrix_bytes(width, width, format) * shape.layers
    head = _matrix_bytes(shape.vocabulary, width, format)
    router = width * shape.num_experts if shape.num_experts > 1 else 0
    norms = (2 * shape.layers + 1) * width
    small = (router * shape.layers + norms) * _DTYPE.itemsize
    return attention + 2 * head + small, attention + head + small


def _matrix_bytes(rows: int, cols: int, format: Format) -> int:
    if not isinstance(format, GroupedFormat):
        return rows * cols * _DTYPE.itemsize
    return codes_bytes(rows, cols, format.bits) + meta_bytes(rows, cols, format.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCost:
    """What decoding one sequence costs, bound by memory.

    Attributes:
        resident: Bytes that the model takes within its budget.
        read: Bytes that a token reads from memory.
        fetched: Bytes that a token reads from storage, on average.
        seconds: Per token.
    """

    resident: int
    read: float
    fetched: float
    seconds: float


def memory_cost(sizes: ServedSizes, device: Device, limits: Limits) -> MemoryCost | None:
    """Return the cost of decoding one sequence; None if the model does not fit.

    Experts that have no slot are read from storage whenever a token uses them: K (1 - S/E) per
    layer, since a routing that is not known yet is taken as uniform.

    Args:
        sizes: Of the model.
        device: That serves it.
        limits: Memory and storage.
    """
    total = int(limits.memory or device.memory)
    fetched = 0.0
    resident = sizes.resident
    if resident > total:
        if limits.storage_bandwidth is None:
            return None
        try:
            slots = sizes.budget.with_total(total).slots()
        except BudgetTooSmallError:
            return None
        shape = sizes.shape
        missing = sum(shape.top_k * (1 - count / shape.num_experts) for count in slots)
        fetched, resident = missing * sizes.expert_read, sizes.budget.total_for_slots(slots)
    experts = sizes.expert_bytes(1)
    cache = limits.position * sizes.kv_per_token
    seconds = (
        sizes.dense_read / device.rate(sizes.dense_precision)
        + experts / device.rate(sizes.precision)
        + cache / device.rate(NATIVE.name)
        + sizes.shape.layers * device.layer_seconds
    )
    if limits.storage_bandwidth is not None:
        seconds += fetched / limits.storage_bandwidth
    read = sizes.dense_read + experts + cache
    return MemoryCost(resident=resident, read=read, fetched=fetched, seconds=seconds)
