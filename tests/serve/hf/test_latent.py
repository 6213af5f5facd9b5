"""Models with latent attention attend to cached latents, as their families do to expanded ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from levels import compiled
from quick import slow_but
from served_layers import decoded, in_a_crowd, nothing, served
from tiny_families import tiny_family
from tiny_served import saved, tokens, with_slots
from torch import Tensor, nn
from transformers import DynamicCache

from moefit.engine.runner_probe import choose_runner
from moefit.engine.runners import RunnerInput, VarlenRunner
from moefit.errors import UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.hf import latent
from moefit.serve.load import load_model

pytestmark = compiled
SIZES: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}  # fmt: skip
SETTINGS: list[tuple[dict[str, Any], float]] = [
    ({"dtype": torch.float32}, 1e-4),
    ({"dtype": torch.float32, "dense_precision": "int8"}, 1e-3),
    ({}, 0.05),
]
FAMILIES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")


def changed(model: nn.Module) -> list[nn.Module]:
    return [one for one in model.modules() if "expand_kv" in vars(one)]


@contextmanager
def expanding(model: nn.Module) -> Iterator[None]:
    """Expand all latents, as the family does, within the block."""
    kept = {one: vars(one).pop("expand_kv") for one in changed(model)}
    try:
        yield
    finally:
        for one, own in kept.items():
            vars(one)["expand_kv"] = own


def assert_close(made: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (made.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert error < tolerance


FORMS: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v2", {"q_lora_rank": None}),
    ("deepseek_v3", {}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    ("glm4_moe_lite", {}),
]
ALL = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
"""All experts are chosen: rounding to 16 bits changes no choice."""


@torch.inference_mode()
def texts(model: Any) -> list[Tensor]:
    """Return logits of prompts in chunks, tokens, and padded texts of uneven lengths."""
    ids_BT, cache, rows = tokens(2, 80), DynamicCache(), list[Tensor]()
    for part_BT in ids_BT.split([1, 30, 7, 40, 1, 1], dim=1):
        rows.append(model(part_BT, past_key_values=cache, use_cache=True).logits)
    seen_BT = torch.ones(2, 20, dtype=torch.long)
    seen_BT[1, :8] = 0
    first = model(ids_BT[:, :19], attention_mask=seen_BT[:, :19], use_cache=True)
    known = {"past_key_values": first.past_key_values, "attention_mask": seen_BT}
    last = model(ids_BT[:, 19:20], **known, use_cache=True)
    padded = torch.cat([first.logits, last.logits], dim=1)
    return [torch.cat(rows, dim=1), padded[:1], padded[1:, 8:], model(ids_BT).logits]


@pytest.mark.parametrize(
    ("name", "changes"),
    [pytest.param(*one, marks=() if one in FORMS[::3] else pytest.mark.slow) for one in FORMS],
)
def test_logits_are_those_of_transformers(name: str, changes: dict, tmp_path: Path) -> None:
    """In float32 up to rounding, in 16 bits as close to these as transformers' own."""
    sizes = {"head_dim": 16, "hidden_size": 64, **SIZES, **ALL, **changes}
    model = tiny_family(name, **sizes)
    exact = texts(model)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = model.to(dtype)
        folder = saved(model, tmp_path / str(dtype))
        with load_model(folder, LoadSettings(context=256)) as loaded:
            assert len(changed(loaded.model)) == loaded.model.config.num_hidden_layers
            for made, own, wanted in zip(texts(loaded.model), texts(model), exact, strict=True):
                if dtype == torch.float32:
                    assert_close(made, wanted, 2e-5)
                else:
                    error, others = ((one - wanted).abs().mean() for one in (made, own))
                    assert error < 1.5 * others


@pytest.mark.parametrize("name", slow_but(FAMILIES[1:2], FAMILIES))
def test_logits_are_those_of_expanded_keys(name: str, tmp_path: Path) -> None:
    """Weights in int8 round the latents that a family expands to 15 bits."""
    for number, (settings, tolerance) in enumerate(SETTINGS):
        with served(name, tmp_path / str(number), sizes=SIZES, **settings) as loaded:
            assert len(changed(loaded.model)) == loaded.model.config.num_hidden_layers
            # In 16 bits without experts, since rounding may change a router's choice.
            with nothing() if "dtype" in settings else loaded.zero_experts():
                mine = decoded(loaded.model)
                with expanding(loaded.model):
                    assert_close(mine, decoded(loaded.model), tolerance)
            if "dtype" in settings:
                packed = in_a_crowd(loaded)
                with expanding(loaded.model):
                    assert_close(packed, in_a_crowd(loaded), tolerance)
        assert not changed(loaded.model)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_answers_do_not_depend_on_chunks_and_neighbours(dtype: torch.dtype, tmp_path: Path) -> None:
    """One request's logits, in chunks of its prompt and beside others, bit by bit."""
    with served("deepseek_v3", tmp_path, sizes=SIZES, dtype=dtype) as loaded:
        ids, others = tokens(1, 40)[0].tolist(), tokens(2, 40, seed=3).tolist()
        runner = choose_runner(loaded, 200)
        assert isinstance(runner, VarlenRunner) and not runner.cache.gather

        def logits(name: str, chunks: list[int], *, beside: bool) -> Tensor:
            names = [f"{name}/{n}" for n in range(2 if beside else 0)]
            for one in (*names, name):
                runner.open(one, 40)
            rows, past = list[Tensor](), 0
            for new in chunks:
                at = slice(past, past + new)
                inputs = [
                    RunnerInput(request=one, tokens=text[at], past=past, num_logits=1)
                    for one, text in zip(names, others, strict=False)
                ]
                mine = RunnerInput(request=name, tokens=ids[at], past=past, num_logits=new)
                rows.append(runner.step([*inputs, mine])[-new:])
                past += new
            for one in (*names, name):
                runner.close(one)
            return torch.cat(rows)

        wanted = logits("whole", [40], beside=False)
        for number, chunks in enumerate(([1] * 40, [7, 7, 1, 25], [39, 1])):
            for beside in (False, True):
                made = logits(f"{number}{beside}", list(chunks), beside=beside)
                assert torch.equal(made, wanted)


def test_hooks_and_other_weights_are_used(tmp_path: Path) -> None:
    with served("deepseek_v3", tmp_path, sizes=SIZES, dtype=torch.float32) as loaded:
        linear, wanted = loaded.model.model.layers[1].self_attn.kv_b_proj, decoded(loaded.model)
        hook = linear.register_forward_hook(lambda _module, _given, output: 2 * output)
        doubled = decoded(loaded.model)
        with expanding(loaded.model):
            assert_close(doubled, decoded(loaded.model), 1e-4)
        assert not torch.allclose(doubled, wanted, atol=1e-2)
        hook.remove()
        weight = linear.weight
        linear.weight = nn.Parameter(-weight.detach().as_subclass(Tensor), requires_grad=False)
        negated = decoded(loaded.model)
        with expanding(loaded.model):
            assert_close(negated, decoded(loaded.model), 1e-4)
        linear.weight = weight
        assert torch.equal(decoded(loaded.model), wanted)


def test_a_part_with_other_attention_gets_expanded_keys(tmp_path: Path) -> None:
    """Its own configuration counts, as in a model of text and images."""
    with served("deepseek_v3", tmp_path, sizes=SIZES, dtype=torch.float32) as loaded:
        module = loaded.model.model.layers[1].self_attn
        width = module.kv_b_proj.in_features
        given = torch.randn(1, 1, 3, width), torch.randn(1, 1, 3, module.qk_rope_head_dim)
        with torch.inference_mode():
            assert isinstance(module.expand_kv(*given)[0], latent.LatentRows)
        vars(module).pop("expand_kv")
        wanted = module.expand_kv(*given)
        module.config = copy(module.config)
        names = ["moefit_cpu", loaded.model.config._attn_implementation]
        undo = latent.use_latent_kernels(loaded.model, torch.float32, names[1], names)
        module.config._attn_implementation = "eager"
        assert loaded.model.config._attn_implementation == names[1]
        with torch.inference_mode():
            made = module.expand_kv(*given)
        assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))
        undo()


def test_what_differs_in_a_trial_is_left_to_the_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[Any] = []
    monkeypatch.setattr(latent, "_close", lambda *given: bool(trials.append(given)))
    with served("deepseek_v3", tmp_path, sizes=SIZES) as loaded:
        assert trials and not changed(loaded.model)
        assert loaded.model.config._attn_implementation == "moefit_cpu"


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_attention_to_chosen_tokens_is_left_to_the_family(family: str, tmp_path: Path) -> None:
    """It chooses all tokens of a short text, so that results alone would not show it."""
    with served(family, tmp_path, sizes=SIZES) as loaded:
        assert not changed(loaded.model)


def test_an_int8_cache_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UnsupportedModelError, match="latent vectors"),
        served("deepseek_v3", tmp_path, sizes=SIZES, kv_cache="int8"),
    ):
        pass


def test_the_cache_takes_the_bytes_of_the_budget(tmp_path: Path) -> None:
    with served("deepseek_v3", tmp_path, sizes=SIZES) as loaded:
        runner = choose_runner(loaded, 128)
        assert isinstance(runner, VarlenRunner)
        runner.open("one", 4)
        runner.step([RunnerInput(request="one", tokens=[5, 6, 7], past=0, num_logits=1)])
        layers = loaded.model.config.num_hidden_layers
        latents = SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]
        assert runner.cache.pool.nbytes == loaded.budget.kv_cache == 128 * layers * latents * 2


def test_loading_counts_and_reads_nothing(tmp_path: Path) -> None:
    sizes = {"head_dim": 16, "hidden_size": 64, **SIZES}
    folder = saved(tiny_family("deepseek_v3", **sizes), tmp_path)
    with load_model(folder, LoadSettings(context=128)) as loaded:
        wanted, memory = decoded(loaded.model), with_slots(loaded, 3)
    for mode in ("exact", "bounded", "virtual"):
        with load_model(folder, LoadSettings(context=128, memory=memory, mode=mode)) as loaded:
            assert changed(loaded.model)
            report = loaded.report()
            assert not any(report[name] for name in ("hits", "fetches", "substituted", "swaps"))
            made = decoded(loaded.model)
            assert made.isfinite().all()
            loaded.set_mode("exact")
            assert torch.equal(decoded(loaded.model), wanted)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "drafts": {"prompt_lookup_num_tokens": 4},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("how", GENERATION.values(), ids=list(GENERATION))
def test_generation(how: dict[str, Any], tmp_path: Path) -> None:
    """Beams reorder the cache, wrong drafts are cropped, and a static one has room behind it."""
    with served("deepseek_v3", tmp_path, sizes=SIZES, dtype=torch.float32) as loaded:
        ids_1T = tokens(1, 6).repeat(1, 4)
        settings_: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, **how}
        made = loaded.generate(ids_1T, **settings_)
        with expanding(loaded.model):
            assert torch.equal(made, loaded.generate(ids_1T, **settings_))
        if "num_beams" not in how:
            one = loaded.generate(ids_1T, max_new_tokens=20, do_sample=False)
            assert torch.equal(made, one)
