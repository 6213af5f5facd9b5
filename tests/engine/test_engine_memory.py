"""The engine's steps fit what the budget reserves for activations."""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from quick import slow_but
from tiny_served import saved, tiny
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moefit.advise.serving import STEP_TOKENS
from moefit.dsmoe.config import DsMoeConfig
from moefit.engine.api import EngineSettings, Event, FinishedEvent, SamplingParams
from moefit.engine.engine import Engine
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.serve.memory.activations import needs_whole_prompts
from moefit.serve.memory.estimate import MIN_STEP_TOKENS, memory_budget

CONTEXT, MIB = 1024, 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = tiny("Mixtral", hidden_size=128, intermediate_size=2048, num_hidden_layers=3,
                 max_position_embeddings=CONTEXT, num_local_experts=8)  # fmt: skip
    return saved(model, tmp_path_factory.mktemp("steps"))


def settings(step_tokens: int | None, memory: int | str | None = None) -> LoadSettings:
    return LoadSettings(context=CONTEXT, step_tokens=step_tokens, memory=memory)


def finished(engine: Engine, prompt: list[int]) -> FinishedEvent:
    events: SimpleQueue[Event] = SimpleQueue()
    engine.submit(prompt, SamplingParams(max_tokens=3, temperature=0.0), events.put)
    while not isinstance(event := events.get(timeout=60), FinishedEvent):
        pass
    return event


def test_short_steps_reserve_less(folder: Path) -> None:
    skeleton = build_skeleton(folder)
    whole, short = (memory_budget(skeleton, settings(one)) for one in (None, 128))
    assert (whole.step_tokens, short.step_tokens) == (CONTEXT, 128)
    assert whole.workspace - short.workspace > (CONTEXT - 128) * 16 * 128 * 4
    assert memory_budget(skeleton, settings(1)).step_tokens == MIN_STEP_TOKENS
    assert EngineSettings().step_tokens == STEP_TOKENS  # what `moefit advise` counts


def test_prompts_longer_than_a_step_are_computed_in_parts(folder: Path) -> None:
    sizes = EngineSettings(max_concurrency=2, prefill_chunk=100)
    least = memory_budget(build_skeleton(folder), settings(sizes.step_tokens)).min_bytes
    with load_model(folder, settings(sizes.step_tokens, least + 16 * MIB)) as served:
        with pytest.raises(ConfigError, match="step_tokens=103 or more"):
            served.model(torch.arange(3, 106)[None] % 60)
        engine = Engine(served, sizes)
        engine.start()
        try:
            assert finished(engine, [3 + n % 50 for n in range(950)]).reason == "length"
        finally:
            engine.close()
        assert served.budget.step_tokens == 102


@pytest.mark.parametrize(
    "how", slow_but([{"num_beams": 2}], [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 3}])
)
def test_generate_computes_long_prompts_in_parts(folder: Path, how: dict[str, Any]) -> None:
    ids_BT = torch.arange(3, 403).view(2, 200) % 60
    least = memory_budget(build_skeleton(folder), settings(100)).min_bytes
    outputs: list[torch.Tensor] = []
    for step_tokens, memory in ((100, least + 16 * MIB), (None, "8GiB")):
        with load_model(folder, settings(step_tokens, memory)) as served:
            torch.manual_seed(0)
            outputs.append(served.generate(ids_BT, max_new_tokens=4, pad_token_id=0, **how))
            served.check()
    assert torch.equal(*outputs)


def test_engine_with_longer_steps_takes_the_memory_from_slots(folder: Path) -> None:
    with load_model(folder, settings(64, 8 << 30)) as served:
        total = served.set_memory(served.budget.all_resident_bytes).total
        before = sum(served.report()["slots"].values())
        Engine(served, EngineSettings(max_concurrency=1, prefill_chunk=CONTEXT)).close()
        assert (served.budget.step_tokens, served.budget.total) == (CONTEXT, total)
        assert sum(served.report()["slots"].values()) < before
        served.check()
        served.set_memory(None)
        assert sum(served.report()["slots"].values()) == before
        assert served.placement_budget.settings.step_tokens == CONTEXT


def test_longer_steps_that_do_not_fit_are_refused(folder: Path) -> None:
    with load_model(folder, settings(64, 8 << 30)) as served:
        served.set_memory(served.budget.min_bytes + MIB)
        with pytest.raises(BudgetTooSmallError, match="shorter context"):
            served.reserve_steps(CONTEXT)
        assert served.budget.step_tokens == 64


def test_encoders_compute_their_text_at_once(tmp_path: Path) -> None:
    config = SwitchTransformersConfig(
        vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2,
    )  # fmt: skip
    skeleton = build_skeleton(saved(SwitchTransformersForConditionalGeneration(config), tmp_path))
    budget = memory_budget(skeleton, LoadSettings(context=256, step_tokens=64))
    assert budget.step_tokens == 256


def test_rules_over_a_batch_reserve_whole_prompts(tmp_path: Path) -> None:
    config = DsMoeConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, inference_rule="threshold_top_k:0.3"
    )
    assert needs_whole_prompts(config)
    config.inference_rule = "top_k:2"
    assert not needs_whole_prompts(config)


def test_generate_without_a_cache_or_with_short_prompts_is_as_before(folder: Path) -> None:
    ids_BT = torch.arange(3, 23)[None]
    with load_model(folder, settings(64, 8 << 30)) as served:
        plain = served.model.generate(ids_BT, max_new_tokens=4, do_sample=False)
        for how in ({}, {"use_cache": False}):
            made = served.generate(ids_BT, max_new_tokens=4, do_sample=False, **how)
            assert torch.equal(made, plain)


@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_step_tokens_that_are_no_number_of_tokens(value) -> None:
    with pytest.raises(ConfigError, match="step_tokens"):
        LoadSettings(step_tokens=value).check()
