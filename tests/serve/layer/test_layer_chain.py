"""Several decoder layers in one call: equal to one after the other, bit by bit."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from levels import compiled
from quick import slow_but
from served_layers import begun, counts, decoded, in_a_crowd, layers_of, nothing, served
from tiny_served import tokens
from torch import Tensor, nn

from moefit.cache_argument import forward_with_cache
from moefit.errors import CheckpointError
from moefit.serve.layer import layer_chain
from moefit.serve.model import ServedModel

pytestmark = compiled
FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe")
INT8 = {"precision": "int4", "kv_cache": "int8"}


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Compute each layer by itself within the block."""
    found = layers_of(model)
    kept = [one.together for one in found]
    for one in found:
        one.together = None
    try:
        yield
    finally:
        for one, chain in zip(found, kept, strict=True):
            one.together = chain


def observed(loaded: ServedModel) -> list[Any]:
    blocks = loaded.blocks.values()
    return [*(one.counts() for one in blocks), *(one.state.number for one in blocks)]


@pytest.mark.parametrize("name", slow_but(["olmoe", "glm4_moe"], FAMILIES))
def test_equal_to_one_after_the_other(
    name: str, tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """With all experts in memory and with few, alone and among other requests."""
    half = {"dtype": torch.float16} if name == "olmoe" else {}
    for number, given_ in enumerate(({"dtype": torch.float32}, half, INT8)):
        compare_with_one_by_one(name, tmp_path / str(number), calls, given_)


def test_layers_with_different_windows(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    """Every other layer of gpt-oss attends to the last tokens only, and none drops its keys."""
    for number, given_ in enumerate(
        ({"dtype": torch.float32, "precision": "int4"}, {"precision": "int4"}, INT8)
    ):
        compare_with_one_by_one("gpt_oss", tmp_path / str(number), calls, given_)
        assert (4, 4) in calls


def compare_with_one_by_one(
    name: str, folder: Path, calls: list[tuple[int, int]], settings: dict[str, Any]
) -> None:
    with served(name, folder, memory=None, **settings) as loaded:
        for slots in (None, 3):
            if slots:
                blocks = len(loaded.blocks)
                loaded.set_memory(loaded.budget.total_for_slots([slots] * blocks))
            calls.clear()
            mine, packed = decoded(loaded.model), in_a_crowd(loaded)
            assert calls
            with one_by_one(loaded.model):
                assert torch.equal(mine, decoded(loaded.model))
                assert torch.equal(packed, in_a_crowd(loaded))


def test_other_windows_than_assumed_are_computed_alone(
    tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    with served("gpt_oss", tmp_path, memory=None, precision="int4") as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([8] * 4))
        wanted = decoded(loaded.model)
        for one in layers_of(loaded.model)[1:]:
            one.window = 8 if one.window is None else None  # as if other steps had been recorded
        calls.clear()
        assert torch.equal(decoded(loaded.model), wanted) and calls


def test_one_call_a_token(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    with served("olmoe", tmp_path, memory=None) as loaded:
        for block, experts in loaded.blocks.items():
            loaded.set_residents({block: range(experts.num_experts)})
        decoded(loaded.model)
        assert calls == [(4, 4)] * 5  # the first token makes room in the caches
        calls.clear()
        ids, cache = tokens(1, 1), begun(loaded.model, tokens(1, 5))
        assert loaded.model(input_ids=ids, past_key_values=cache) is not None
        assert not calls[1:]  # with gradients the family's own modules compute


def test_missing_experts_are_loaded_within_a_call(
    tmp_path: Path, calls: list[tuple[int, int]]
) -> None:
    """Counters, scores and residents are as without: the same experts are fetched."""
    results = []
    for alone in (False, True):
        with served("olmoe", tmp_path / str(alone), memory=None) as loaded:
            loaded.set_memory(loaded.budget.total_for_slots([5] * 4))
            with one_by_one(loaded.model) if alone else nothing():
                logits = [decoded(loaded.model) for _ in range(3)]
            residents = [sorted(one.slot_table.residents) for one in loaded.blocks.values()]
            results.append((torch.cat(logits), counts(loaded), observed(loaded), residents))
    (mine, *others), (wanted, *own) = results
    assert torch.equal(mine, wanted) and others == own
    fetches = others[0][1]
    assert fetches > 50 and all(complete == number == 4 for number, complete in calls)


def test_more_experts_than_slots_end_a_call(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    """The layer is computed by itself, in parts, and the next one begins another call."""
    with served("olmoe", tmp_path, memory=None) as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([3] * 4))
        together = in_a_crowd(loaded)
        assert any(complete < number for number, complete in calls)
        with one_by_one(loaded.model):
            assert torch.equal(together, in_a_crowd(loaded))


def test_fixed_residents_stay(tmp_path: Path, calls: list[tuple[int, int]]) -> None:
    with served("olmoe", tmp_path, memory=None) as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([5] * 4))
        loaded.set_residents({name: range(5) for name in loaded.blocks})
        loaded.set_mode("exact", residency="fixed")
        calls.clear()
        decoded(loaded.model)
        assert any(complete < number for number, complete in calls)
        assert all(set(one.slot_table.residents) == set(range(5)) for one in loaded.blocks.values())


class FailsAt:
    """A reader of experts, one of whose reads fails."""

    def __init__(self, read: Any, at: int, error: BaseException):
        self._read, self._at, self._error = read, at, error
        self.reads = 0

    def __call__(self, *given: Any) -> None:
        self.reads += 1
        if self.reads == self._at + 1:
            raise self._error
        self._read(*given)


@pytest.mark.parametrize("error", [CheckpointError("the disk is gone"), KeyboardInterrupt()])
@torch.inference_mode()
def test_a_read_that_fails_leaves_caches_and_slots_usable(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of a token's reads in turn."""
    with served("olmoe", tmp_path, memory=None) as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([3] * 4))
        model, next_11 = loaded.model, tokens(1, 1, seed=2)
        wanted, _ = forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
        source, failed = loaded._shared.transfer._source, 0
        for place in range(8):
            cache, fails = begun(model, tokens(1, 5)), FailsAt(source.read, place, error)
            with monkeypatch.context() as patched, suppress(type(error)):
                patched.setattr(source, "read", fails)
                forward_with_cache(model, cache, input_ids=next_11)
            for one in loaded.blocks.values():
                one.slot_table.check()
                assert one.slot_table.num_slots == 3 and not one.slot_table.filling
            if fails.reads > place:
                failed += 1
                assert {layer.keys.shape[2] for layer in cache.layers} == {5}
            output, _ = forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
            assert torch.equal(output.logits, wanted.logits)
        assert failed > 3


def shift(_module: nn.Module, _given: Any, output: Any) -> Any:
    return output + 1


def shift_in_place(_module: nn.Module, _given: Any, output: Any) -> None:
    output.add_(1)


@pytest.mark.parametrize("hooked", [shift, shift_in_place])
@torch.inference_mode()
def test_hooks_of_layers_are_called_and_may_change_them(hooked: Any, tmp_path: Path) -> None:
    with served("olmoe", tmp_path) as loaded:
        plain = decoded(loaded.model)
        for number in range(4):
            hook = loaded.model.model.layers[number].register_forward_hook(hooked)
            changed = decoded(loaded.model)
            with one_by_one(loaded.model):
                assert torch.equal(changed, decoded(loaded.model))
            assert not torch.equal(changed, plain)
            hook.remove()
        assert torch.equal(plain, decoded(loaded.model))


@torch.inference_mode()
def test_a_step_that_is_given_up_leaves_caches_as_they_were(tmp_path: Path) -> None:
    """What comes before the layers that were not called is undone by the next step."""
    with served("olmoe", tmp_path) as loaded:
        model, next_11 = loaded.model, tokens(1, 1, seed=2)
        loaded.set_residents({name: range(8) for name in loaded.blocks})
        wanted, _ = forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
        chain = layers_of(model)[0].together
        assert isinstance(chain, layer_chain.LayerChain)
        cache = begun(model, tokens(1, 5))

        own, seen = chain.ready, []

        def give_up(place: int, *others: Any) -> Any:
            seen.append(place)
            raise KeyboardInterrupt

        chain.__dict__["ready"] = give_up
        with pytest.raises(KeyboardInterrupt):
            loaded.model.model.layers[0].forward = layers_of(model)[0]
            forward_with_cache(model, cache, input_ids=next_11)
        chain.__dict__["ready"] = own
        assert seen
        output, _ = forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=next_11)
        assert torch.equal(output.logits, wanted.logits)
        lengths = {layer.keys.shape[2] for layer in cache.layers}
        assert len(lengths) == 1


def test_several_threads_decode_at_once(tmp_path: Path) -> None:
    with served("olmoe", tmp_path) as loaded:
        loaded.set_residents({name: range(8) for name in loaded.blocks})
        wanted, before = decoded(loaded.model), sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(4) as pool:
                texts = [pool.submit(decoded, loaded.model) for _ in range(12)]
                assert all(torch.equal(one.result(), wanted) for one in texts)
        finally:
            sys.setswitchinterval(before)


def test_evicted_slots_are_freed(tmp_path: Path) -> None:
    """The addresses of experts do not keep their memory."""
    with served("olmoe", tmp_path, memory=None) as loaded:
        loaded.set_residents({name: range(8) for name in loaded.blocks})
        decoded(loaded.model)
        slots = [ref(slot) for one in loaded.blocks.values() for slot in one.slots.values()]
        loaded.set_memory(loaded.budget.total_for_slots([2] * 4))
        assert sum(one() is not None for one in slots) == 8


def test_a_step_begins_once(tmp_path: Path) -> None:
    with served("olmoe", tmp_path, memory=None) as loaded:
        loaded.set_memory(loaded.budget.total_for_slots([3] * 4))
        begun_steps: list[int] = []
        loaded._shared.on_step = lambda: begun_steps.append(1)
        decoded(loaded.model)
        assert len(begun_steps) == 7


@torch.inference_mode()
def test_threads_of_torch_are_as_before(tmp_path: Path) -> None:
    """Also after a step that fails."""
    with served("olmoe", tmp_path) as loaded:
        model, before = loaded.model, torch.get_num_threads()
        begun(model, tokens(1, 5))
        assert torch.get_num_threads() == before
        with pytest.raises(IndexError):
            ids = torch.full((1, 1), 10**6)
            forward_with_cache(model, begun(model, tokens(1, 5)), input_ids=ids)
        assert torch.get_num_threads() == before


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["exact", "virtual"])), max_size=4)
)
def test_budgets_and_modes_between_tokens(
    steps: list[tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    results: list[Tensor] = []
    for alone in (False, True):
        with served("olmoe", tmp_path_factory.mktemp("model"), memory=None) as loaded:
            with one_by_one(loaded.model) if alone else nothing():
                made = [decoded(loaded.model)]
                for slots, mode in steps:
                    loaded.set_mode(mode)
                    loaded.set_memory(loaded.budget.total_for_slots([max(slots, 2)] * 4))
                    made.append(decoded(loaded.model))
            results.append(torch.cat(made))
    if all(mode == "exact" for _, mode in steps):  # swaps of virtual mode follow a clock
        assert torch.equal(*results)
    assert all(one.isfinite().all() for one in results)
