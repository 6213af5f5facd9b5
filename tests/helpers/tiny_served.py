"""Small random checkpoints to serve, and simulated stores and disks."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from moefit.cache_argument import forward_with_cache
from moefit.checkpoint.safetensors import Checkpoint, pread
from moefit.moe.families import MoeBlock
from moefit.moe.layouts import find_blocks
from moefit.serve.cache.slot import Slot
from moefit.serve.model import ServedModel

torch.set_num_threads(1)
logging.disable_progress_bar()

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
# Experts one by one in the checkpoint or stacked; softmax or sigmoid with bias and groups; biases,
# transposed matrices; one dense layer; keys and values of their own widths.
FAMILIES = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "GptOss": {
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 6,
    },
    "DeepseekV3": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    },
}


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any):
    """Return a model of the family with all parameters random, including biases and norms."""
    config = getattr(transformers, f"{family}Config")(
        **(COMMON | FAMILIES.get(family, {}) | changes)
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "bias" in n)):
        torch.nn.init.normal_(tensor, mean=float(tensor.dim() == 1), std=0.3)
    return model.to(dtype).eval()


@cache
def model_of(family: str) -> Any:
    """A shared model that tests must not change."""
    return tiny(family)


def saved(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids_BT: Tensor) -> Tensor:
    """Return logits of all positions at once, then of one more token with the cache."""
    first, cache = forward_with_cache(model, None, input_ids=ids_BT[:, :-1])
    last, _ = forward_with_cache(model, cache, input_ids=ids_BT[:, -1:])
    return torch.cat([first.logits, last.logits], dim=1)


def with_slots(served: ServedModel, slots: int) -> int:
    """Return the budget for `slots` in every block."""
    return served.budget.total_for_slots([slots] * len(served.blocks))


def settled(served: ServedModel) -> None:
    """Wait until all running loads have ended; the next step publishes them."""
    for experts in served.blocks.values():
        while not all(pending.done.done() for pending in experts.swaps._pending):
            time.sleep(0.001)


class Disk:
    """A `pread` that fails `failures` times, or waits while `open` is not set."""

    def __init__(self):
        self.failures = self.calls = 0
        self.open, self.waiting = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.calls += 1
        if not self.open.is_set():
            self.waiting.set()
            assert self.open.wait(30), "nobody opened the disk again"
        if self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")
        return pread(descriptor, buffer, offset)


@contextmanager
def reading_through(disk: Disk) -> Iterator[Disk]:
    """Make checkpoints opened in this context read through this disk."""
    with mock.patch("moefit.serve.hf.skeleton.Checkpoint", partial(Checkpoint, read=disk)):
        yield disk


@cache
def mixtral_block() -> tuple[MoeBlock, Any]:
    """Return a block of eight experts, and the module with their parameters."""
    model = tiny("Mixtral")
    block = find_blocks(model)[0]
    return block, model.get_submodule(block.name)


class MemoryStore:
    """An `ExpertStore` over a module's parameters that fails for the experts in `broken`."""

    def __init__(self, block: MoeBlock, module: Any):
        self._block, self._parameters = block, dict(module.named_parameters())
        self.broken: set[int] = set()
        self.error: BaseException = OSError("storage is gone")
        self.reads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, block: str, expert: int, into: Slot) -> None:
        assert block == self._block.name
        for tensor in into.tensors.values():
            tensor.fill_(torch.nan)  # half-read is not to be used
        assert self.gate.wait(30), "nobody opened the gate again"
        self.reads.append(expert)
        if expert in self.broken:
            raise self.error
        for short, tensor in into.tensors.items():
            name, row = self._block.layout.parameter(short, expert)
            value = self._parameters[name].detach()
            tensor.copy_(value if row is None else value[row])


class OverStorage(RuleBasedStateMachine):
    """Helpers around a `MemoryStore` of eight experts that can be slow or fail."""

    bench: Any  # with `store`, `check` and `close`; set by an initialize rule

    @rule(open=st.booleans())
    def storage(self, open: bool) -> None:
        (self.bench.store.gate.set if open else self.bench.store.gate.clear)()

    @rule(broken=st.sets(st.integers(0, 7), max_size=3))
    def breakage(self, broken: set[int]) -> None:
        self.bench.store.broken = broken

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "bench"):
            self.bench.check()

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.close()


def parts_of(module: Any, block: MoeBlock, expert: int) -> Mapping[str, Tensor]:
    """Return one expert's tensors from the model."""
    parameters = dict(module.named_parameters())
    found = {}
    for short in block.layout.specs:
        name, row = block.layout.parameter(short, expert)
        found[short] = parameters[name] if row is None else parameters[name][row]
    return found
