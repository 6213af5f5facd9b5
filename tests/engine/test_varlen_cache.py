import pytest
import torch

from moefit.engine.kv_pool import KvPool
from moefit.engine.varlen import Segment, UnpackableError, VarlenCache

GROUPS, WIDTH, PLACES = 2, 4, 16
CPU = torch.device("cpu")


def cache_of(*requests: int, gathers: bool = False) -> VarlenCache:
    """Return a cache over a pool with requests of these lengths."""
    cache = VarlenCache(KvPool(PLACES))
    cache.gather = gathers
    for number, length in enumerate(requests):
        cache.pool.open(str(number), length)
    return cache


def segment(cache: VarlenCache, request: int, *, past: int, new: int) -> Segment:
    return Segment(start=cache.pool.places.start(str(request)), past=past, new=new)


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 1, GROUPS, tokens, WIDTH, generator=generator)
    return key, value


@pytest.mark.parametrize("gathers", [False, True])
def test_new_keys_follow_their_request(gathers: bool) -> None:
    cache = cache_of(4, 5, gathers=gathers)
    (key, value), (more_key, more_value) = states(5, 0), states(2, 1)
    cache.begin([segment(cache, 0, past=0, new=2), segment(cache, 1, past=0, new=3)], 5, CPU)
    cache.update(key, value, 0)
    step = [segment(cache, 0, past=2, new=1), segment(cache, 1, past=3, new=1)]
    plan = cache.begin(step, 7, CPU)
    given = cache.update(more_key, more_value, 0)
    for states_, new, old in zip(given, (more_key, more_value), (key, value), strict=True):
        for row, places in enumerate(plan.rows):
            first = 2 * row
            expected = torch.cat([old[0, :, first : first + 2 + row], new[0, :, row : row + 1]], 1)
            assert torch.equal(states_[0, :, places.start : places.end], expected)
    assert cache.tokens_held() == 7


def test_one_token_per_request_is_batch() -> None:
    cache = cache_of(3, 3)
    key, value = torch.randn(2, 2, GROUPS, 1, WIDTH)
    step = [segment(cache, 0, past=0, new=1), segment(cache, 1, past=0, new=1)]
    plan = cache.begin(step, 2, CPU)
    found_key, found_value = cache.update(key, value, 0)
    for row, places in enumerate(plan.rows):
        assert torch.equal(found_key[0, :, places.start], key[row, :, 0])
        assert torch.equal(found_value[0, :, places.start], value[row, :, 0])


def test_gathered_keys_are_those_of_step() -> None:
    cache = cache_of(4, 5, gathers=True)
    plan = cache.begin([segment(cache, 1, past=0, new=3)], 3, CPU)
    key, value = states(3, 0)
    found_key, _ = cache.update(key, value, 0)
    assert torch.equal(found_key, key)
    assert plan.rows == (Segment(start=0, past=0, new=3),)


def test_model_that_uses_cache_length_raises() -> None:
    with pytest.raises(UnpackableError, match="positions"):
        cache_of(3).get_seq_length()
    assert cache_of(3).get_max_length() == PLACES
