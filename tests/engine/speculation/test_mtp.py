"""The layer for multi-token prediction drafts what a written-out forward pass does.

It changes no answer.
"""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from engines import ask, greedy, paused, running, text
from levels import compiled
from safetensors.torch import load_file, save_file
from tiny_served import saved, tiny, with_slots
from torch import Tensor

from moefit.engine.api import EngineSettings, SamplingParams
from moefit.engine.engine import Engine
from moefit.engine.speculation.drafts import Draft
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.quant.format import GroupedFormat
from moefit.serve.config import LoadSettings
from moefit.serve.hf import quant_linear
from moefit.serve.hf.mtp import MtpLayer
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.serve.memory.draft import DRAFT_STEP
from moefit.serve.packed.build import pack
from moefit.serve.packed.dense import dense_matrices
from tests.engine.speculation.test_speculation import everything, result
from tests.engine.test_invariance import WIDER

LAYERS, WIDTH, CONTEXT = 3, 32, 256
FAMILIES = {
    "DeepseekV3": WIDER["DeepseekV3"],
    "Glm4Moe": {
        "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "head_dim": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "partial_rotary_factor": 0.5, "use_qk_norm": True,
    },
}  # fmt: skip


class Reference:
    """A model whose last layer predicts further tokens, written out over whole texts."""

    def __init__(self, model: Any):
        generator = torch.Generator().manual_seed(3)
        self.model, self.layer = model, model.model.layers[LAYERS]
        model.config.num_hidden_layers = LAYERS
        shapes: dict[str, tuple[int, ...]] = {
            "enorm": (WIDTH,),
            "hnorm": (WIDTH,),
            "shared_head.norm": (WIDTH,),
        }
        shapes["eh_proj"] = (WIDTH, 2 * WIDTH)
        self.tensors = {
            name: 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            for name, shape in shapes.items()
        }

    def norm(self, name: str, x_TD: Tensor) -> Tensor:
        eps = self.model.config.rms_norm_eps
        return x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + eps) * self.tensors[name]

    def outputs(self, states_TD: Tensor, ids: list[int]) -> Tensor:
        """Return the layer's outputs over a text, each with the next token."""
        embedded_TD = self.model.model.embed_tokens(torch.tensor(ids))
        both = torch.cat([self.norm("enorm", embedded_TD), self.norm("hnorm", states_TD)], -1)
        x_1TD = (both @ self.tensors["eh_proj"].T)[None]
        positions_1T = torch.arange(len(ids))[None]
        mask_11TT = torch.full((1, 1, len(ids), len(ids)), -torch.inf).triu(1)
        return self.layer(
            x_1TD,
            attention_mask=mask_11TT,
            position_embeddings=self.model.model.rotary_emb(x_1TD, positions_1T),
        )[0]

    @torch.no_grad()
    def draft(self, tokens: list[int], most: int) -> tuple[int, ...]:
        """Return the likeliest tokens after a text of which the last one has no state yet."""
        states_TD = self.model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        ids = tokens[1:]
        for _ in range(most):
            last_D = self.outputs(states_TD, ids)[-1]
            logits_V = self.model.lm_head(self.norm("shared_head.norm", last_D))
            ids = [*ids, int(logits_V.argmax())]
            states_TD = torch.cat([states_TD, last_D[None]])
        return tuple(ids[-most:])


def made(family: str, folder: Path) -> Reference:
    """Save a checkpoint with one layer more than its config.json says."""
    model = tiny(
        family,
        num_hidden_layers=LAYERS + 1,
        max_position_embeddings=CONTEXT,
        **FAMILIES[family],
    )
    saved(model, folder)
    reference = Reference(model)
    more = {f"model.layers.{LAYERS}.{n}.weight": t for n, t in reference.tensors.items()}
    more[f"model.layers.{LAYERS}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for name in ("mlp_layer_types", "layer_types"):
        config.pop(name, None)
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return reference


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = made(request.param, folder)
    with load_model(folder, LoadSettings(context=CONTEXT, mtp=True)) as served:
        served.model.generation_config.eos_token_id = None
        yield served, reference, folder


SAMPLING = [
    greedy(12, logprobs=2),
    SamplingParams(max_tokens=12, temperature=1.3, seed=5, logprobs=0),
    greedy(12, repetition_penalty=1.4, logprobs=0),
]


@compiled
def test_answers_are_the_same_bits_and_drafts_those_of_the_reference(case) -> None:
    """In batches, in chunks, behind kept prefixes, and with right, wrong and omitted drafts."""
    served, reference, _ = case
    asked = [text(n) for n in (20, 3, 17)]
    sampling = [greedy(12, logprobs=2), greedy(9), greedy(12, logprobs=0)]
    plain: list[Any] = []
    for speculate in ("off", "mtp"):
        with running(served, speculate=speculate, prefill_chunk=7, prefix_cache="off") as engine:
            seen: list[tuple[list[int], Draft]] = []
            if speculate == "mtp":
                watch(engine, seen)
            with paused(engine) as go:
                pairs = zip(asked, sampling, strict=True)
                heard = [ask(engine, prompt, one) for prompt, one in pairs]
                go.set()
                answers = [result(one) for one in heard]
            plain = plain or answers
            assert answers == plain
    assert len(seen) > 9
    for tokens, draft in seen:
        assert draft.tokens == reference.draft(tokens, len(draft.tokens))


def watch(engine: Engine, seen: list[tuple[list[int], Draft]]) -> None:
    """Verify up to three tokens of each request, in two steps of three, and note the drafts."""
    drafter: Any = engine.speculation._drafter
    draft, steps = drafter.draft, iter(range(1000))

    def choose(chances, **how: Any) -> dict[str, int]:
        if next(steps) % 3 == 1:
            return {}
        return everything({name: one[:3] for name, one in chances.items()}, **how)

    def drafted(wanted):
        found = draft(wanted)
        drafter.check()
        seen.extend((list(wanted[name][0]), one) for name, one in found.items())
        return found

    engine.speculation.choose = choose
    drafter.draft = drafted


@compiled
def test_calls_of_the_layer_are_no_longer_than_memory_is_reserved_for(case, monkeypatch) -> None:
    """Many waiting states are computed in several calls, with the same drafts, also sampled."""
    served, reference, _ = case
    asked = [text(n) for n in (20, 3, 17)]
    answers: list[Any] = []
    reads: list[int] = []
    for longest in (999, 7):
        sizes = sizes_of_calls(monkeypatch)
        seen: list[tuple[list[int], Draft]] = []
        with running(served, speculate="mtp", prefix_cache="off") as engine:
            drafter, measure = cast(Any, engine.speculation._drafter), engine.speculation._measure
            assert drafter._most == min(DRAFT_STEP, served.budget.step_tokens)
            drafter._most = longest
            watch(engine, seen)

            def measured(*how: Any, measure: Any = measure) -> None:
                reads.append(how[2] - sum(how[1]))
                measure(*how)

            engine.speculation._measure = measured
            with paused(engine) as go:
                pairs = zip(asked, SAMPLING, strict=True)
                heard = [ask(engine, prompt, one) for prompt, one in pairs]
                go.set()
                answers.append([result(one) for one in heard])
        assert (max(sizes) > 7) if longest > 7 else (max(sizes) == 7)
        assert reads and not any(reads), "all that waits is computed, and measured as such"
        answers.append(sorted((tokens, draft.tokens) for tokens, draft in seen))
        for tokens, draft in seen:
            if tokens[: len(asked[0])] == list(asked[0]):  # the greedy one
                assert draft.tokens == reference.draft(tokens, len(draft.tokens))
    assert answers[:2] == answers[2:]


def sizes_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each call of the layer adds its rows."""
    sizes: list[int] = []
    hidden = MtpLayer.hidden_1TD

    def noted(self: MtpLayer, states_1TD: Tensor, *rest: Any, **how: Any) -> Tensor:
        sizes.append(states_1TD.shape[1])
        return hidden(self, states_1TD, *rest, **how)

    monkeypatch.setattr(MtpLayer, "hidden_1TD", noted)
    return sizes


@compiled
def test_kept_prefixes_have_no_states_and_the_same_answers(case) -> None:
    served, _, _ = case
    with running(served, speculate="mtp") as engine:
        engine.speculation.choose = everything
        first = ask(engine, text(40), SAMPLING[0]).wait()
        again = ask(engine, text(40), SAMPLING[0]).wait()
        assert again.end.cached_tokens > 0
        assert result(again) == result(first)
        stats = engine.stats().speculation
        assert stats is not None and stats.drafts > 5
        assert engine.speculation_coverage.describe().endswith("multi-token prediction")


@compiled
def test_experts_of_the_layer_are_fetched_in_a_small_budget(case) -> None:
    _, _, folder = case
    with load_model(folder, LoadSettings(context=CONTEXT, mtp=True)) as served:
        served.model.generation_config.eos_token_id = None
        assert f"model.layers.{LAYERS}.mlp.experts" in served.blocks
        served.set_memory(with_slots(served, 2))
        found = []
        for speculate in ("off", "mtp"):
            with running(served, speculate=speculate) as engine:
                engine.speculation.choose = everything
                heard = [ask(engine, text(9), one) for one in SAMPLING]
                found.append([result(one) for one in heard])
        assert found[0] == found[1]
        served.check()


@compiled
def test_a_growing_cache_of_which_the_drafts_have_a_part(case) -> None:
    """Requests that are longer than the drafter's own cache run without drafts, others with."""
    _, _, folder = case
    long, short = text(CONTEXT - 20), text(20)
    found = []
    for context in (CONTEXT, 48):
        settings = LoadSettings(context=context, mtp=True, memory="4GiB")
        with load_model(folder, settings) as served:
            served.model.generation_config.eos_token_id = None
            with running(served, speculate="mtp", prefix_cache="off") as engine:
                engine.speculation.choose = everything
                heard = [ask(engine, one, greedy(12, logprobs=0)) for one in (long, short, short)]
                found.append([result(one) for one in heard])
                assert engine.stats().kv_tokens >= CONTEXT - 8
                stats = engine.stats().speculation
                assert stats is not None and stats.drafts > 5
    assert found[0] == found[1]


def test_what_it_takes_is_in_the_budget(case) -> None:
    served, reference, folder = case
    with load_model(folder, LoadSettings(context=CONTEXT)) as plain:
        before, after = plain.budget, served.budget
        assert len(served.blocks) == len(plain.blocks) + 1
    layer = reference.layer
    dense = sum(p.numel() for n, p in layer.state_dict().items() if "mlp.experts" not in n)
    dense += sum(one.numel() for one in reference.tensors.values())
    assert after.weights - before.weights == 4 * dense + after.draft
    assert after.draft > after.kv_cache // LAYERS


def test_models_without_the_layer_are_refused(case, tmp_path) -> None:
    _, _, folder = case
    with pytest.raises(UnsupportedModelError, match="has no layer for multi-token prediction"):
        load_model(saved(tiny("Olmoe"), tmp_path), LoadSettings(context=64, mtp=True))
    with (
        load_model(folder, LoadSettings(context=64)) as served,
        pytest.raises(ConfigError, match=r"give mtp=True to moefit\.load"),
    ):
        Engine(served, EngineSettings(speculate="mtp"))


@pytest.mark.usefixtures("packed_cache")
def test_packed_weights_are_used_with_and_without_the_layer(tmp_path: Path, monkeypatch) -> None:
    """Only what packing does not know, the layer itself, is encoded from the checkpoint."""
    monkeypatch.setattr(quant_linear, "_MIN_WEIGHTS", 64)
    made("DeepseekV3", tmp_path)
    int4 = GroupedFormat(4)
    pack(build_skeleton(tmp_path), [int4], dense_formats=[int4])
    known = dense_matrices(build_skeleton(tmp_path))
    total = len(dense_matrices(build_skeleton(tmp_path, mtp=True)))
    how: dict[str, Any] = {"context": 64, "precision": "int4", "dense_precision": "int4"}
    for mtp in (False, True):
        with load_model(tmp_path, LoadSettings(mtp=mtp, **how)) as served:
            report = served.report()
        assert not report["packed_ignored"]
        others = f", but encoded while loading in {total - len(known)} of {total}"
        assert report["dense_from"] == "packed" + others * mtp
        assert report["experts_from"].startswith("packed")

    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1  # further training
    save_file(tensors, file, {"format": "pt"})
    with load_model(tmp_path, LoadSettings(mtp=True, **how)) as served:
        assert served.report()["dense_from"] == "encoded while loading"
