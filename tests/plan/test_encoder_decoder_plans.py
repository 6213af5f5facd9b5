"""Encoder-decoders are profiled on pairs and planned for lengths of sources and outputs."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import EXPERTS, walk
from planned import profile as invented_profile
from tiny_served import saved, tiny, tokens
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import moefit
from moefit.errors import ConfigError
from moefit.plan.configuration import Configuration, Lengths, uniform
from moefit.plan.measure import MeasuredModel, fill_slots
from moefit.plan.plan_file import read_plan, write_plan
from moefit.plan.planner import Planner
from moefit.plan.profile import Profile
from moefit.plan.profiler import Profiler, encoder_blocks
from moefit.plan.reference import (
    Reference,
    Steps,
    make_reference,
    measure_steps,
    measure_windows,
    read_reference,
)
from moefit.plan.trace import (
    Routes,
    make_source_curves,
    read_curves,
    read_source_curves,
    replay_exact,
)
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.windows import PADDING, Windows, padded

CONFIG = SwitchTransformersConfig(
    vocab_size=61, d_model=32, d_ff=24, num_layers=4, num_decoder_layers=4, num_heads=4, d_kv=8,
    num_experts=6, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
    decoder_start_token_id=0, initializer_factor=1.0, router_jitter_noise=0.0,
)  # fmt: skip


def pairs(count: int = 6) -> Windows:
    """Random pairs of several lengths."""
    sources = [tokens(1, 5 + 3 * n, seed=n)[0] for n in range(count)]
    targets = [tokens(1, 14 - 2 * n, seed=100 + n)[0] for n in range(count)]
    return Windows(padded(targets), padded(sources))


@cache
def folder() -> Path:
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(CONFIG).eval()
    return saved(model, Path(mkdtemp()) / "switch")


@cache
def native(slots: int = 6) -> Configuration:
    experts = {block.name: block.num_experts for block in build_skeleton(folder()).blocks}
    return uniform(experts, "native", dict.fromkeys(experts, slots))


def test_rows_are_read_without_padding() -> None:
    windows = pairs()
    assert windows.targets == sum(13 - 2 * n for n in range(6))
    assert windows.source_tokens == sum(5 + 3 * n for n in range(6)) / 6
    assert windows.context == 20
    part = windows[1:3]
    given = part.inputs(1, torch.device("cpu"))
    assert given["input_ids"].shape == (1, 11) and given["decoder_input_ids"].shape == (1, 9)
    assert all((ids != PADDING).all() for ids in given.values())
    assert windows.digest != Windows(windows.ids_BT, windows.sources_BS.flip(0)).digest  # pyright: ignore


def test_reference_equals_transformers(tmp_path: Path) -> None:
    windows = pairs()
    with MeasuredModel(folder=folder()).load(native(), context=64) as served, torch.no_grad():
        made = make_reference(served, windows)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder()).eval()
    for row in range(len(windows)):
        ids_T, source_S = windows.ids(row), windows.source(row)
        assert source_S is not None
        with torch.no_grad():
            logits = model(input_ids=source_S[None], decoder_input_ids=ids_T[None, :-1]).logits
        theirs_T = -logits[0].log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]
        assert torch.allclose(made.nll_BT[row, : len(theirs_T)], theirs_T, atol=1e-3)
    made.save(tmp_path / "reference.npz")
    kept = read_reference(tmp_path / "reference.npz")
    assert isinstance(kept, Reference) and kept.windows.digest == windows.digest


@pytest.mark.parametrize("slots", [1, 6])
def test_steps_equal_whole_windows(slots: int) -> None:
    """Token by token with a cache, all pairs have the full model's loss in exact mode."""
    windows, configuration = pairs(), native(slots)
    with MeasuredModel(folder=folder()).load(configuration, context=64) as served:
        reference = make_reference(served, windows)
        fill_slots(served)
        whole = measure_windows(served, configuration, reference)
        steps = Steps(windows=len(windows), prompt=0, tokens=64)
        decoded = measure_steps(served, configuration, reference, steps)
    for one in (whole, decoded):
        assert one.tokens == windows.targets
        assert one.divergence == pytest.approx(0, abs=1e-5)
        assert one.loss == pytest.approx(one.full_loss, abs=1e-4)
    assert decoded.seconds is not None and decoded.seconds > 0
    assert (decoded.misses == 0) == (slots == 6)


def test_encoder_blocks_are_known() -> None:
    skeleton = build_skeleton(folder())
    assert [name in encoder_blocks(skeleton) for name in (b.name for b in skeleton.blocks)] == [
        True, True, False, False,
    ]  # fmt: skip
    decoder = build_skeleton(saved(tiny("Mixtral"), Path(mkdtemp()) / "model"))
    assert encoder_blocks(decoder) == set()


def routes(seed: int) -> Routes:
    steps = walk(tokens=128, seed=seed)
    return Routes(steps=steps, mass_E=[], output_energy_E=[], experts=2.0)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 20), st.integers(2, EXPERTS - 1))
def test_sources_of_one_token_are_tokens(seed: int, slots: int) -> None:
    """The curves of an encoder's block for sources and outputs of one token are a decoder's."""
    recorded = routes(seed)
    made = make_source_curves(recorded, EXPERTS, 1)
    curves = read_source_curves(made, EXPERTS, Lengths(source=1, target=1))
    exact = replay_exact(recorded.steps, EXPERTS, slots)
    known = curves["exact"]
    if slots in known:
        assert known[slots].misses == pytest.approx(exact.misses)


def test_curves_between_lengths_and_per_token() -> None:
    made = make_source_curves(routes(1), EXPERTS, 8)
    assert list(made) == ["2", "4", "8", "16", "32"]
    short, long = (
        read_source_curves(made, EXPERTS, Lengths(source=n, target=1))["exact"][2].misses
        for n in (8, 16)
    )
    between = read_source_curves(made, EXPERTS, Lengths(source=12, target=10))["exact"][2].misses
    assert between == pytest.approx((short + long) / 2 / 10)
    beyond = read_source_curves(made, EXPERTS, Lengths(source=1000, target=1))
    assert beyond["exact"][2] == read_curves(made["32"], EXPERTS)["exact"][2]
    virtual = beyond["virtual:1"][2]
    assert 0 < virtual.moved < 1 and virtual.misses < short


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Profiler(MeasuredModel(folder=folder()), pairs(), text="pairs").run()


@pytest.mark.slow
def test_profile_of_pairs_is_complete(profile: Profile) -> None:
    assert not profile.missing
    assert profile.facts.lengths == Lengths(source=12.5, target=8)
    for name, one in {**profile.those("quality/"), **profile.those("steps/")}.items():
        assert math.isfinite(one["divergence"]) and one["divergence"] > -1e-6, name
    exact = profile.items["steps/0-exact-native-1"]
    assert exact["divergence"] < 1e-6 and exact["misses"] == 0
    assert profile.items["rest/native"]["source_token_seconds"] > 0


@pytest.mark.slow
def test_plans_depend_on_lengths(profile: Profile, tmp_path: Path) -> None:
    skeleton = build_skeleton(folder())
    own, long = (
        Planner(skeleton, profile, context=64, lengths=lengths)
        for lengths in (None, Lengths(source=400, target=4))
    )
    few = native(2)
    assert long.latency.times.dense["native"] > own.latency.times.dense["native"]
    assert long.latency.times.encoder_block["int4"] > own.latency.times.encoder_block["int4"]
    assert long.latency.times.block == own.latency.times.block
    assert sum(long.latency.features.misses(few)) > sum(own.latency.features.misses(few))
    assert long.quality.loss(few) == own.quality.loss(few)
    memory = own.slot_budgets.all_resident_bytes
    plan, front = own.plan(memory)
    assert front and plan.lengths == profile.facts.lengths
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    with moefit.load(folder(), **{**plan.settings(), "memory": None}) as served:
        assert served.policy.prefill == plan.configuration.prefill
        made = served.generate(tokens(1, 9), max_new_tokens=3)
        assert made.shape[0] == 1


@pytest.mark.slow
def test_virtual_plans_never_wait_for_sources(profile: Profile) -> None:
    planner = Planner(build_skeleton(folder()), profile, context=64)
    virtual = replace(native(2), mode="virtual", prefill="virtual")
    waits, never = (planner.features.misses(one) for one in (native(2), virtual))
    assert all(few < many for few, many in zip(never, waits, strict=True))
    assert all(one > 0 for one in planner.features.moved(virtual))
    for policy in planner.models.by_policy:
        assert policy.policy.prefill == ("virtual" if policy.policy.mode == "virtual" else "exact")


def test_lengths_of_decoders_are_refused() -> None:
    decoder = invented_profile()
    with pytest.raises(ConfigError, match="are for encoder-decoders"):
        Planner(build_skeleton(folder()), decoder, lengths=Lengths(source=4, target=4))
    pairs_too = replace(decoder, facts=replace(decoder.facts, source_tokens=12.5))
    with pytest.raises(ConfigError, match="1 or more"):
        Planner(build_skeleton(folder()), pairs_too, lengths=Lengths(source=0.5, target=4))
