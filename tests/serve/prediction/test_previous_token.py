"""Models that route by the token before are served like others, with all reads of a step known."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import slow_but
from serving import check_served, differs_by, give_slots, greedy, logits, saved
from tiny_models import set_biases, tiny_model, tokens
from torch import Tensor

from moefit.cache_argument import forward_with_cache
from moefit.dsmoe.config import PREVIOUS_AND_EMBEDDING, PREVIOUS_TOKEN
from moefit.errors import UnsupportedModelError
from moefit.evaluate.prediction import measure_prediction
from moefit.moe.routing import Routing
from moefit.serve.config import LoadSettings
from moefit.serve.hf.kv_cache import ReservedLayer
from moefit.serve.load import load_model
from moefit.serve.prediction.previous_token import StepReader

EXPERTS, LAYERS = 8, 4
INPUTS = {"input_ids": tokens(1, 11)}


def model_of(rule: str = "top_k:2", form: str = PREVIOUS_AND_EMBEDDING, **changes: Any) -> Any:
    return tiny_model(
        pregated=form, num_experts=EXPERTS, num_hidden_layers=LAYERS, qk_norm=True,
        inference_rule=rule, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(model_of(), tmp_path_factory.mktemp("previous"))


@pytest.mark.parametrize("slots", slow_but([3], [1, 3, EXPERTS]))
@pytest.mark.parametrize("rule", ["top_k:2", "threshold:0.9", "dense", "top_k:2:renormalize"])
def test_served_equals_model(folder, rule: str, slots: int) -> None:
    check_served(folder, model_of(rule), rule, slots, EXPERTS)


def test_batches_with_padding(folder) -> None:
    mask_BT = torch.ones(3, 9, dtype=torch.long)
    mask_BT[1, :4] = 0
    inputs = {"input_ids": tokens(3, 9), "attention_mask": mask_BT}
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 3)
        assert differs_by(greedy(served.model, inputs), greedy(model_of(), inputs)) < 1e-5
        served.check()


class Checked(StepReader):
    """Compares each block's choice with what was known before the step, in decoding."""

    compared = 0

    def _read(self) -> None:
        self.known = [set(self.choices.choice(block)) for block in range(LAYERS)]
        super()._read()

    def chosen(self, block: int, routing: Routing) -> None:
        if len(routing.ids_TK) == 1:
            chosen = set(routing.ids_TK.flatten().tolist()) - {EXPERTS}
            assert chosen == self.known[block], "the choice is known"
            self.compared += 1


@pytest.mark.parametrize("form", [PREVIOUS_TOKEN, PREVIOUS_AND_EMBEDDING])
@pytest.mark.parametrize("rule", ["top_k:2", "threshold:0.9", "top_k:3:renormalize"])
def test_the_choice_of_all_blocks_is_known_before_a_step(tmp_path, form: str, rule: str) -> None:
    check_known(saved(model_of(form=form), tmp_path), rule)


def test_the_choice_of_routers_with_a_bias_is_known(tmp_path) -> None:
    model = model_of(training_rule="top_k:2", score_correction_bias=True)
    set_biases(model)
    check_known(saved(model, tmp_path), "top_k:2")


def check_known(folder: Path, rule: str) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 4)
        served.model.set_inference_rule(rule)
        with served.watched(None):
            expected = greedy(served.model, INPUTS)
        checked = Checked(served.model, list(served.blocks.values()), served._shared)
        with served.watched(checked):
            assert torch.equal(greedy(served.model, INPUTS), expected)
        checked.close()
        assert checked.failure == "" and checked.compared >= 7 * LAYERS
        report = served.report()
        assert report["prefetches"] == report["prefetches_used"] > 0
        assert report["prefetch_wasted_bytes"] == 0


@torch.inference_mode()
def test_a_step_requests_what_all_blocks_lack_at_once(folder, monkeypatch) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 3)
        _, cache = forward_with_cache(served.model, None, **INPUTS)
        asked: list[tuple[str, int]] = []
        transfer, absent = served._shared.transfer, set()
        reader = served.prefetching.prefetcher
        own_load, own_read = transfer.load, reader._read

        def load(block: str, expert: int, *given: Any, **named: Any) -> Any:
            asked.append((block, expert))
            return own_load(block, expert, *given, **named)

        def read() -> None:
            for number, (name, experts) in enumerate(served.blocks.items()):
                wanted = set(reader.choices.choice(number))
                absent.update((name, one) for one in wanted - set(experts.slot_table.residents))
            own_read()
            assert set(asked) == absent and len(asked) == len(absent) > 0

        monkeypatch.setattr(transfer, "load", load)
        monkeypatch.setattr(reader, "_read", read)
        forward_with_cache(served.model, cache, input_ids=tokens(1, 1))
        assert absent and reader.failure == ""


@torch.inference_mode()
def test_prediction_is_perfect_at_every_distance(folder) -> None:
    with load_model(folder, LoadSettings(context=64)) as served:
        give_slots(served, 3)
        report = measure_prediction(served, tokens(1, 30)[0])
    assert report.layers.keys() == {1, 2, 3}
    assert all(report.total(ahead).as_dict()["recall"] == 1 for ahead in report.layers)


def test_other_modes_equal_the_same_choice_among_residents(folder) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 3)
        for mode in ("virtual", "bounded", "exact"):
            served.set_mode(mode)
            assert greedy(served.model, INPUTS).isfinite().all()
            served.check()
        give_slots(served, EXPERTS)
        served.set_residents(dict.fromkeys(served.blocks, range(EXPERTS)))
        served.set_mode("virtual")
        found = greedy(served.model, INPUTS)
    assert differs_by(found, greedy(model_of(), INPUTS)) < 1e-5


def test_the_logits_that_virtual_mode_masks_are_those_that_route(folder) -> None:
    """With few residents it must choose the best of them by the token before."""
    with load_model(folder, LoadSettings()) as served:
        served.set_mode("virtual", prefill="virtual", residency="fixed")
        served.set_residents(dict.fromkeys(served.blocks, range(4)))
        allowed_LBE = torch.zeros(LAYERS, 1, EXPERTS, dtype=torch.bool)
        allowed_LBE[:, :, :4] = True
        model = model_of()
        with torch.inference_mode():
            expected = model(**INPUTS, allowed_LBE=allowed_LBE).logits
        found = logits(served.model, INPUTS)
        choice = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        assert differs_by(found, expected) < 1e-4, choice


def test_report_says_what_is_known(folder) -> None:
    with load_model(folder, LoadSettings(prefetch="off")) as served:
        give_slots(served, 2)
        report = served.report()["prefetch"]
        assert (report["setting"], report["predictor"]) == ("pregated", "previous token")
        hooks = len(served.model._forward_pre_hooks)
        served.start_prefetching(LoadSettings(prefetch="off"))
        assert len(served.model._forward_pre_hooks) == hooks
    with load_model(folder, LoadSettings(precision="auto", memory="4GiB")) as served:
        assert "precision auto" in served.prefetching.obstacle


@torch.inference_mode()
def test_logits_are_appended_in_place(folder) -> None:
    """Copying those of a long text in every step takes time, and memory beyond the budget."""
    model, text_BT = model_of(), tokens(2, 14)
    with load_model(folder, LoadSettings(context=64)) as served:
        give_slots(served, 3)
        _, cache = forward_with_cache(served.model, None, input_ids=text_BT[:, :8])
        places = list[int]()

        def add(start: int, stop: int) -> Tensor:
            nonlocal cache
            output, cache = forward_with_cache(
                served.model, cache, input_ids=text_BT[:, start:stop]
            )
            places.append(cache.layers[LAYERS + 1].keys.data_ptr())
            return output.logits

        def whole(start: int, stop: int) -> Tensor:
            return model(text_BT[:, :stop], use_cache=False).logits[:, start:]

        for start, stop in ((8, 9), (9, 10), (10, 13)):
            assert differs_by(add(start, stop), whole(start, stop)) < 1e-5
        assert len(set(places)) == 1
        assert all(isinstance(one, ReservedLayer) for one in cache.layers)
        cache.crop(-3)
        text_BT = torch.cat([text_BT[:, :10], tokens(2, 5, seed=3)], dim=1)
        assert differs_by(add(10, 12), whole(10, 12)) < 1e-5
        assert len(set(places)) == 1
        cache.reorder_cache(torch.tensor([1, 0]))
        text_BT = text_BT.flip(0)
        for start, stop in ((12, 13), (13, 14)):
            assert differs_by(add(start, stop), whole(start, stop)) < 1e-5
        assert places[-1] == places[-2] != places[0]


def test_int8_caches_are_refused(folder) -> None:
    with pytest.raises(UnsupportedModelError, match="caches router logits"):
        load_model(folder, LoadSettings(context=64, kv_cache="int8"))


def test_static_caches_are_refused(folder) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 3)
        with pytest.raises(UnsupportedModelError, match="a StaticCache has no place"):
            served.model.generate(**INPUTS, max_new_tokens=4, cache_implementation="static")


def test_the_cache_of_an_ended_text_is_freed(folder) -> None:
    with load_model(folder, LoadSettings()) as served, torch.inference_mode():
        give_slots(served, 3)
        cache: Any = None
        for ids in (tokens(1, 5), tokens(1, 1)):
            _, cache = forward_with_cache(served.model, cache, input_ids=ids)
        del cache, _
        gc.collect()
        assert served.prefetching.predictor.logits(0) is None


def test_failure_switches_reading_early_off(folder, monkeypatch) -> None:
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, 2)
        reader = served.prefetching.prefetcher
        assert isinstance(reader, StepReader)

        def fail(*_: Any) -> Tensor:
            raise ValueError("no such rule")

        monkeypatch.setattr(reader.choices, "choice", fail)
        assert differs_by(greedy(served.model, INPUTS), greedy(model_of(), INPUTS)) < 1e-5
        assert "no such rule" in served.report()["prefetch"]["obstacle"]
