"""Every family behind transformers' experts interface, and others, served exactly and virtually.

In float32 the logits of most families equal transformers' bitwise on the tested processors. Those
with a clamped gate function differ in the last bits, and others may on other processors, hence the
tolerance.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import transformers
from safetensors.torch import load_file, save_file
from serving import assert_same_but_for_rounding
from tiny_families import families, tiny_family, token_ids
from torch import Tensor

from moefit.cache_argument import forward_with_cache
from moefit.errors import UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

TOLERANCE = 2e-5  # of the largest logit
STEPS = 3

NOT_SERVED = {
    "inkling_multimodal": "its audio part needs scipy; its text part is served",
}
"""Families that are not, and why."""

RULE_UNKNOWN = {
    "deepseek_v4": "its first blocks route by token id, not by score",
    "longcat_flash": "its router also chooses among experts without weights",
    "inkling": "weights are normalised together with those of shared experts",
    "zaya": "a class of its router's stands for no expert",
}
"""Families that are served exactly, but in no mode that changes routing, and why."""

WITH_VISION_EXPERTS = {"dots3_note_multimodal", "ernie4_5_vl_moe"}

SERVED = {
    *("afmoe", "aria", "aria_multimodal", "axk1", "axk2", "bailing_hybrid", "beam"),
    *("cohere2_moe", "dbrx", "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("deepseek_v4", "diffusion_gemma", "dots1", "dots3_note", "dots3_note_multimodal"),
    *(
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "gemma4",
        "gemma4_multimodal",
    ),
    *("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "gpt_oss"),
    *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    *("hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling", "inkling2", "inkling2_multimodal"),
    *(
        "jamba",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lfm2_moe",
        "llama4",
        "llama4_multimodal",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
    ),
    *("minimax", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_multimodal", "mistral4"),
    *("mistral_large4", "mixtral", "muse_spark", "nemotron_h", "olmoe"),
    *("openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe"),
    *("qwen3_5_moe_multimodal", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe"),
    *("qwen4_exp", "qwen4_exp_multimodal", "solar_open", "step3p7", "unlimited_ocr", "zaya"),
}

NEW = {"hy_v4_vl", "inkling2_loop", "inkling2_loop_multimodal", "lara_mini"}
"""Families that the oldest supported version of transformers doesn't have."""

ROUNDING_GROWS = {
    *("lara_mini", "longcat_flash"),
    *("qwen3_5_moe", "qwen3_5_moe_multimodal", "qwen3_next", "qwen4_exp", "qwen4_exp_multimodal"),
}
"""Linear attention, or two attentions per layer, in which rounding grows: transformers' own logits
change as much, by up to 6e-5 of the largest, when weights change by half a unit in the last place.
"""

SHOWN = {
    *("afmoe", "dbrx", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "ernie4_5_vl_moe"),
    *(
        "gemma4_multimodal",
        "gpt_oss",
        "granitemoe",
        "jamba",
        "kolibri1",
        "llama4",
        "longcat_flash",
        "mixtral",
    ),
    *("muse_spark", "nemotron_h", "olmoe"),
    *("phimoe", "qwen3_moe", "qwen3_vl_moe", "zaya"),
}
"""What differs most: tested every time, the others among the slow tests."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and transformers' outputs for prefill and decoding."""

    family: str
    folder: Path
    logits: list[Tensor]


def _by_family(names: set[str]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in SHOWN else slow) for name in sorted(names)]


@pytest.fixture(scope="module", params=_by_family(SERVED | (NEW & set(families()))))
def saved(request, tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_family(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return Saved(request.param, folder, logits_of(type(model).from_pretrained(folder).eval()))


@torch.inference_mode()
def logits_of(model: Any) -> list[Tensor]:
    """Return logits of two sequences of nine tokens, then of more tokens with the cache."""
    ids = token_ids(2, 9)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        return [model(input_ids=ids, decoder_input_ids=token_ids(2, 9, seed=2)).logits]
    if not model.can_generate():  # it labels tokens
        return [model(ids).logits]
    out, cache = forward_with_cache(model, None, input_ids=ids)
    logits = [out.logits]
    for step in range(STEPS):
        more = token_ids(2, 1, seed=10 + step)
        out, cache = forward_with_cache(model, cache, input_ids=more)
        logits.append(out.logits)
    return logits


def assert_same(logits: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    assert len(logits) == len(expected)
    scale = float(torch.cat([one.flatten() for one in expected]).abs().max())
    assert scale > 0
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def hold(served: ServedModel, count: int) -> None:
    """Serve with `count` slots per block, filled with the first experts."""
    counts = [min(count, block.num_experts) for block in served.budget.blocks]
    served.set_memory(served.budget.total_for_slots(counts))
    served.set_residents({name: range(count) for name in served.blocks})
    assert all(
        set(experts.slot_table.residents) == set(range(min(count, experts.num_experts)))
        for experts in served.blocks.values()
    )


def test_every_family_is_listed():
    """New families of transformers must be added to SERVED or NOT_SERVED."""
    assert set(families()) - NEW == SERVED | set(NOT_SERVED)
    assert not (SERVED | NEW) & set(NOT_SERVED) and not SERVED & NEW
    assert set(RULE_UNKNOWN) | SHOWN <= SERVED


def test_routing_differs_by_token():
    """Otherwise the tests below would show little."""
    model = tiny_family("mixtral")
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2]))
    logits_of(model)
    assert all(len(ids_TK.unique()) >= 4 for ids_TK in chosen[: len(model.model.layers)])


def test_exact_at_minimum_budget(saved):
    with load_model(saved.folder, LoadSettings(context=64)) as served:
        served.set_memory(served.budget.min_bytes)
        assert all(experts.slot_table.num_slots == 1 for experts in served.blocks.values())
        tolerance = 1e-4 if saved.family in ROUNDING_GROWS else TOLERANCE
        assert_same(logits_of(served.model), saved.logits, tolerance)
        served.check()


def test_routing_rule(saved):
    """The rule is identified where expected and equals the family's router."""
    with load_model(saved.folder, LoadSettings(context=64)) as served:
        # Blocks of a vision part don't run on text; they may stay unknown.
        used = [experts for experts in served.blocks.values() if experts.reachable]
        known = all(experts.scoring is not None for experts in used)
        assert len(used) == len(served.blocks) or saved.family in WITH_VISION_EXPERTS
        assert known == (saved.family not in RULE_UNKNOWN)
        if not known:
            with pytest.raises(UnsupportedModelError, match="mode exact works"):
                served.set_mode("virtual")
            return
        hold(served, tiny_families.EXPERTS)
        served.set_mode("virtual", residency="fixed")
        served.reset()
        assert_same(logits_of(served.model), saved.logits, tolerance=1e-4)
        assert served.report()["fetches"] == 0
        served.check()


def test_virtual_with_half_of_the_experts(saved):
    """Nothing is fetched, so no absent expert was chosen."""
    if saved.family in RULE_UNKNOWN:
        pytest.skip(RULE_UNKNOWN[saved.family])
    with load_model(saved.folder, LoadSettings(context=64)) as served:
        hold(served, tiny_families.EXPERTS // 2)
        served.set_mode("virtual", residency="fixed")
        served.reset()
        logits = logits_of(served.model)
        assert all(torch.isfinite(one).all() for one in logits)
        assert served.report()["fetches"] == 0
        assert served.report()["hits"] > 0
        served.check()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "lfm2_moe", "mixtral", "phimoe"])
def test_bfloat16(family, tmp_path):
    """Routers in float32 and bfloat16, with and without ties, and biases."""
    model = tiny_family(family).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model = type(model).from_pretrained(tmp_path).eval()
    with load_model(tmp_path, LoadSettings(context=64)) as served:
        assert all(experts.scoring is not None for experts in served.blocks.values())
        served.set_memory(served.budget.min_bytes)
        assert_same_but_for_rounding(served, model, {"input_ids": token_ids(2, 9)})


def test_experts_without_weights_need_none(tmp_path):
    """On the Hub, LongCat-Flash has no weights for its zero experts; transformers writes some."""
    model = tiny_family("longcat_flash")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    zeros = re.compile(rf"\.experts\.({'|'.join(map(str, range(tiny_families.EXPERTS, 12)))})\.")
    kept = {name: one for name, one in stored.items() if not zeros.search(name)}
    assert len(kept) < len(stored)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with load_model(tmp_path, LoadSettings(context=64)) as served:
        assert_same(logits_of(served.model), logits_of(model), tolerance=1e-4)


@pytest.mark.skipif(transformers.utils.is_scipy_available(), reason="scipy is installed")
def test_inkling_without_scipy_raises():
    with pytest.raises(ModuleNotFoundError, match="scipy"):
        tiny_family("inkling_multimodal")
