"""Deterministic answers: bit-equal alone and among others, also where torch computes.

Families whose answers may otherwise depend on the batch: experts with biases, state-space layers,
attention that the kernels do not know. Which operations these are is asserted too.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from engines import logprobs, paused, running, scored, text
from levels import compiled
from tiny_families import tiny_family
from tiny_served import saved, tiny
from torch.nn import functional as F

import moefit
from moefit.engine.api import EngineSettings
from moefit.engine.engine import Engine
from moefit.engine.invariance import Invariance, Uncovered
from moefit.errors import ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from tests.serve.test_encoder_decoder_serving import switch

FAMILIES = ("gpt_oss", "jamba", "nemotron_h", "qwen3_next", "DeepseekV3", "Mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory):
    name = request.param
    model = tiny(name) if name[0].isupper() else tiny_family(name)
    folder = saved(model, tmp_path_factory.mktemp(name))
    with load_model(folder, LoadSettings(context=256)) as served:
        served.model.generation_config.eos_token_id = None
        yield served


def test_answers_are_the_same_alone_and_among_others(served: ServedModel) -> None:
    """With pieces of 7 tokens; a crowd arrives before, at the same time and later."""
    settings = {"prefill_chunk": 7, "max_concurrency": 6, "deterministic": True}
    prompt = text(40)
    with running(served, **settings) as engine:
        assert engine.invariance.deterministic and not engine.invariance.covered
        alone = logprobs(scored(engine, prompt))
    assert len(alone) == 45
    with running(served, **settings) as engine:
        with paused(engine) as go:
            crowd = [scored(engine, text(length)) for length in (3, 17, 30)]
            first = scored(engine, prompt)
            crowd += [scored(engine, text(length)) for length in (9, 1)]
            go.set()
            assert torch.equal(logprobs(first), alone)
        second = scored(engine, prompt)
        crowd.append(scored(engine, text(21)))
        assert torch.equal(logprobs(second), alone)
        for one in crowd:
            one.wait()


def test_answers_of_a_crowd_equal_their_own_alone(served: ServedModel) -> None:
    lengths = (5, 13, 20, 9, 16)
    with running(served, prefill_chunk=4, deterministic=True) as engine:
        alone = [logprobs(scored(engine, text(length))) for length in lengths]
        with paused(engine) as go:
            heard = [scored(engine, text(length)) for length in lengths]
            go.set()
        for one, wanted in zip(heard, alone, strict=True):
            assert torch.equal(logprobs(one), wanted)


@compiled
def test_reasons_name_modules(tmp_path: Path) -> None:
    def found(model) -> set[str]:
        folder = saved(model, tmp_path / type(model).__name__)
        with load_model(folder, LoadSettings(context=64)) as served:
            listed = Engine(served).invariance.not_covered
        return {f"{one.module}: {one.reason}" for one in listed}

    gpt_oss = found(tiny("GptOss"))
    assert any(one.startswith("model.layers.*.mlp.experts: experts computed") for one in gpt_oss)
    assert any("layers.*.self_attn: a matrix product" in one for one in gpt_oss), gpt_oss
    jamba = found(tiny_family("jamba"))
    assert {"model.layers.*.mamba: a convolution computed by torch"} <= jamba
    assert any(one.startswith("model.layers.*.self_attn: attention") for one in jamba), jamba
    encoder_decoder = found(switch())
    for part in ("encoder", "decoder"):
        attention = f"{part}.block.*.layer.*.SelfAttention: a matrix product"
        assert any(one.startswith(attention) for one in encoder_decoder), encoder_decoder
    wide = found(tiny("Olmoe", num_attention_heads=2, num_key_value_heads=2))
    assert not wide


@compiled
@pytest.mark.parametrize(
    ("function", "width", "covered"),
    [("gelu", 40, False), ("gelu", 64, True), ("silu", 40, True)],
)
def test_functions_that_round_by_place_are_found(function, width, covered, tmp_path: Path) -> None:
    """A gelu of 40 elements leaves some that fill no vector; a silu is a kernel."""
    wide = {"moe_intermediate_size": 64, "intermediate_size": width, "v_head_dim": 16}
    wide["hidden_act"] = function
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    model = tiny("DeepseekV3", **wide, **heads)
    with load_model(saved(model, tmp_path), LoadSettings(context=64)) as served:
        known = Engine(served).invariance
    found = [one for one in known.not_covered if one.reason.startswith("gelu of 40 in")]
    rounds = _gelu_rounds_by_place()
    assert bool(found) == (not covered and rounds)
    assert known.covered == (covered or not rounds)


def _gelu_rounds_by_place() -> bool:
    x = torch.randn(160, generator=torch.Generator().manual_seed(0)) * 2
    return not torch.equal(F.gelu(x), torch.cat([F.gelu(one) for one in x.split(1)]))


@compiled
def test_covered_models_are_computed_as_without_the_flag(tmp_path: Path) -> None:
    folder = saved(tiny("Olmoe", num_attention_heads=2, num_key_value_heads=2), tmp_path)
    with load_model(folder, LoadSettings(context=64)) as served:
        one, other = Engine(served), Engine(served, EngineSettings(deterministic=True))
        assert one.stats().runner == other.stats().runner == "packed"
        assert other._scheduler.limits == one._scheduler.limits
        assert other.invariance == Invariance(not_covered=(), deterministic=True)


def test_without_kernels_nothing_is_covered(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("moefit.engine.invariance.kernels", lambda: None)
    with load_model(folder, LoadSettings(context=64)) as served:
        (one,) = Engine(served).invariance.not_covered
    assert one.module == "all" and one.reason.startswith("no compiled kernels")


def test_modes_that_depend_on_residents_are_refused(folder: Path) -> None:
    with load_model(folder, LoadSettings(context=64)) as served:
        engine = Engine(served, EngineSettings(deterministic=True))
        for mode in ("virtual", "bounded"):
            with pytest.raises(ConfigError, match=rf"mode {mode} answers depend"):
                engine.set_mode(mode)
        with pytest.raises(ConfigError, match="mode bounded answers depend"):
            engine.set_mode("exact", prefill="bounded")
        assert served.policy.mode == "exact"
    with load_model(folder, LoadSettings(context=64, mode="virtual")) as served:
        plain = Engine(served).invariance
        assert Uncovered("experts", "mode virtual depends on which experts are in memory") in (
            plain.not_covered
        )
        with pytest.raises(ConfigError, match="mode virtual answers depend"):
            Engine(served, EngineSettings(deterministic=True))


def formats(served: ServedModel) -> Counter[str]:
    return sum((Counter(one) for one in served.report()["formats"].values()), Counter())


def test_auto_precision_is_settled_and_does_not_follow_use(tmp_path: Path, packed_cache) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 128}
    folder = saved(tiny("Mixtral", dtype=torch.bfloat16, **wide), tmp_path)
    adapting = Uncovered("experts", "precision auto changes formats while requests run")
    with moefit.load(folder, precision="auto", memory="4GiB", context=64) as served:
        some = (served.budget.all_resident_bytes + served.budget.max_bytes) // 2
        served.set_memory(some)
        assert adapting in Engine(served).invariance.not_covered
        with running(served, deterministic=True) as engine:
            assert adapting not in engine.invariance.not_covered
            before = served.report()["formats"]
            alone = logprobs(scored(engine, text(12)))
            for seed in range(8):  # two of the intervals in which plans are made
                logprobs(scored(engine, text(20 + seed)))
            assert served.report()["formats"] == before
            assert torch.equal(logprobs(scored(engine, text(12))), alone)
            engine.set_memory(served.budget.all_resident_bytes)
            assert set(formats(served)) == {"int2"}
            engine.set_memory(some)
            assert served.report()["formats"] == before, "all at once, whatever was asked before"
            assert torch.equal(logprobs(scored(engine, text(12))), alone)


def test_descriptions() -> None:
    one = Uncovered("model.layers.*.mamba", "a convolution computed by torch")
    assert "do not depend" in Invariance(not_covered=()).describe()
    said = Invariance(not_covered=(one, one)).describe()
    assert said.startswith("note: ") and "mamba: a convolution" in said and "and 1 more" in said
    assert "one by one" in Invariance(not_covered=(one,), deterministic=True).describe()
