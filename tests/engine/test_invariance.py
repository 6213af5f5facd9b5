"""An answer depends on its request alone: bit-equal in any batch, with any chunks and threads.

Sequences of families whose operations are all covered: linear layers, experts and attention by
kernels, everything else row by row. Without kernels torch's products depend on the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from engines import logprobs, paused, running, scored, text
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import compiled
from quick import slow_but
from tiny_families import token_ids
from tiny_served import saved, tiny
from torch import Tensor

from moefit.api import load as load_by_name
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

pytestmark = compiled
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Kernels compute attention whose heads are multiples of 16 wide; those of other tests are 8.
# torch's sigmoid rounds differently past the last whole 32 elements. The latents of DeepSeek-V3 are
# wide enough for kernels to attend to them.
WIDER: dict[str, dict[str, int]] = {
    "Mixtral": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "Olmoe": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "DeepseekV3": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "kv_lora_rank": 32,
    },
}


def among(
    served: ServedModel, prompt: list[int], others: list[int], *, chunk: int, threads: int
) -> Tensor:
    """Return log-probabilities of a request that runs beside others of these lengths."""
    torch.set_num_threads(threads)
    try:
        with (
            running(served, prefill_chunk=chunk, max_concurrency=6) as engine,
            paused(engine) as go,
        ):
            crowd = [scored(engine, token_ids(n, seed=n).clamp(max=60).tolist()) for n in others]
            heard = scored(engine, prompt)
            go.set()
            found = logprobs(heard)
            for one in crowd:
                one.wait()
            return found
    finally:
        torch.set_num_threads(1)


def check(load) -> None:
    """Compare one request alone with itself among others, in chunks and with two threads."""
    prompt, others = text(40), [3, 17, 30, 1, 9]
    with load() as served:
        served.model.generation_config.eos_token_id = None
        with running(served, prefill_chunk=64) as engine:
            assert engine.invariance.covered, engine.invariance
            alone = logprobs(scored(engine, prompt))
        assert len(alone) == 45
        for chunk, threads in ((64, 1), (1, 1), (7, 2)):
            found = among(served, prompt, others, chunk=chunk, threads=threads)
            assert torch.equal(found, alone), (chunk, threads)


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], DTYPES))
@pytest.mark.parametrize("family", WIDER)
def test_families_in_their_dtype(family, dtype, tmp_path):
    folder = saved(tiny(family, **WIDER[family]), tmp_path)
    check(lambda: load_model(folder, LoadSettings(context=256, dtype=dtype)))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("int8-nearest", torch.bfloat16),
        ("int4-nearest", torch.bfloat16),
        ("int3-nearest", torch.float32),
        ("int5-nearest", torch.float16),
    ],
)
def test_quantised_experts_and_dense_weights(precision, dtype, tmp_path):
    folder = saved(tiny("Olmoe", **WIDER["Olmoe"]), tmp_path)
    settings = LoadSettings(
        context=256, dtype=dtype, precision=precision, dense_precision=precision
    )
    check(lambda: load_model(folder, settings))


@contextmanager
def reference(slots: int | None) -> Iterator[ServedModel]:
    """The shipped model in bfloat16, with all experts in memory or so many slots per block."""
    with load_by_name("reference", context=256, dtype=torch.bfloat16) as served:
        if slots:
            served.set_memory(served.budget.total_for_slots([slots] * len(served.blocks)))
        yield served


@pytest.mark.parametrize("slots", slow_but([2], [None, 2]))
def test_the_reference_model_resident_and_fetched(slots):
    check(lambda: reference(slots))


# Family, dtype, format of experts and dense weights.
CASES = (
    ("Mixtral", torch.float32, "native"),
    ("Olmoe", torch.bfloat16, "int4-nearest"),
    ("Olmoe", torch.float16, "int8-nearest"),
    ("DeepseekV3", torch.bfloat16, "native"),
    ("DeepseekV3", torch.bfloat16, "int3-nearest"),
)
Loaded = Callable[[tuple[Any, ...]], ServedModel]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Iterator[Loaded]:
    """A function that loads a case once."""
    with ExitStack() as models:

        @cache
        def load(case: tuple[Any, ...]) -> ServedModel:
            family, dtype, precision = case
            folder = saved(tiny(family, **WIDER[family]), tmp_path_factory.mktemp(family))
            how = LoadSettings(
                context=256, dtype=dtype, precision=precision, dense_precision=precision
            )
            served = models.enter_context(load_model(folder, how))
            served.model.generation_config.eos_token_id = None
            return served

        yield load


@cache
def alone(served: ServedModel, tokens: int) -> Tensor:
    """Return log-probabilities of a prompt and its answer with nothing else computed, at once."""
    with running(served, prefill_chunk=64) as engine:
        return logprobs(scored(engine, text(tokens)))


@settings(max_examples=8, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    tokens=st.sampled_from((1, 18, 40)),
    chunk=st.integers(1, 64),
    threads=st.integers(1, 3),
    company=st.lists(st.integers(1, 30), max_size=5),
)
def test_any_company_chunks_and_threads(loaded, case, tokens, chunk, threads, company) -> None:
    """Draws of everything that may not matter; `check` above has the corners."""
    served = loaded(case)
    found = among(served, text(tokens), company, chunk=chunk, threads=threads)
    wanted = alone(served, tokens)
    assert len(wanted) == tokens - 1 + 6 and torch.equal(found, wanted)
