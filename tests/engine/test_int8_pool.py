"""The engine over an int8 cache: what is stored, moved and counted; the same bits in any order."""

import pytest
import torch
from engines import ask, greedy, prompts, running
from levels import compiled
from tiny_served import saved, tiny
from torch import Tensor, nn

from moefit.engine.engine import Engine
from moefit.engine.kv_pool import KvPool
from moefit.engine.runner_probe import choose_runner
from moefit.engine.runners import RunnerInput, SeparateRunner, VarlenRunner
from moefit.engine.varlen import Segment, UnpackableError, VarlenCache, varlen_attention
from moefit.quant.kv_int8 import Int8Rows, quantize_rows
from moefit.serve.config import LoadSettings
from moefit.serve.hf.attention import WindowMask
from moefit.serve.load import load_model

GROUPS, HEADS, WIDTH, PLACES = 2, 4, 32, 80
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, key and value of so many tokens, [1, H or G, T, C]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, tokens), (GROUPS, tokens), (GROUPS, tokens))
    return tuple(torch.randn(1, *shape, WIDTH, generator=generator).to(dtype) for shape in shapes)


def cache_of(**lengths: int) -> VarlenCache:
    cache = VarlenCache(KvPool(PLACES, int8=True))
    for name, length in lengths.items():
        cache.pool.open(name, length)
    return cache


class Request:
    """One request whose queries, keys and values are given to a cache step by step."""

    def __init__(self, name: str, tokens: int, seed: int, dtype: torch.dtype):
        self.name, self.past = name, 0
        self.states = states(tokens, seed, dtype)

    def take(self, cache: VarlenCache, new: int) -> tuple[Segment, list[Tensor]]:
        start = cache.pool.places.start(self.name)
        segment = Segment(start=start, past=self.past, new=new)
        parts = [one[:, :, self.past : self.past + new] for one in self.states]
        self.past += new
        return segment, parts


def step(
    cache: VarlenCache, taken: list[tuple[Segment, list[Tensor]]], window=None
) -> list[Tensor]:
    """Attend to one step's tokens; the output of each request, [T, H, C]."""
    segments = [segment for segment, _ in taken]
    plan = cache.begin(segments, sum(one.past + one.new for one in segments), CPU)
    batch = all(one.new == 1 for one in segments)
    query, key, value = (
        torch.cat(parts, dim=0 if batch else 2)
        for parts in zip(*(parts for _, parts in taken), strict=True)
    )
    pair = cache.update(key, value, 0)
    out, _ = varlen_attention(nn.Module(), query, *pair, WindowMask.of(window, CPU), segments=plan)
    rows = out.flatten(0, 1)
    return list(rows.split([one.new for one in segments]))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_neither_chunks_nor_neighbours_change_a_bit(dtype, window, chunk) -> None:
    alone = cache_of(it=30)
    expected = torch.cat(step(alone, [Request("it", 30, 0, dtype).take(alone, 30)], window))
    shared = cache_of(other=20, it=30, third=20)
    it, others = Request("it", 30, 0, dtype), [Request("other", 20, 1, dtype)]
    others.append(Request("third", 20, 2, dtype))
    outputs = []
    while it.past < 30:
        beside = [one.take(shared, 1) for one in others if one.past < 20]
        outputs.append(
            step(shared, [it.take(shared, min(chunk, 30 - it.past)), *beside], window)[0]
        )
    assert torch.equal(torch.cat(outputs), expected)


def test_the_pool_holds_rounded_rows_where_they_belong() -> None:
    cache = cache_of(first=4, second=5)
    first, second = Request("first", 5, 0, torch.float32), Request("second", 5, 1, torch.float32)
    step(cache, [first.take(cache, 4), second.take(cache, 3)])
    step(cache, [second.take(cache, 1)])
    cache.pool.check()
    for number, pool in enumerate(cache.pool._layers[0]):
        assert isinstance(pool, Int8Rows)
        wanted = quantize_rows(second.states[number + 1][0, :, :4])
        found = pool.part(slice(None), slice(4, 8))
        assert torch.equal(found.codes(), wanted.codes())
        assert torch.equal(found.scales, wanted.scales)
        assert not pool.codes()[:, 8:].any()


def test_scales_move_with_their_rows() -> None:
    cache, still = cache_of(gone=30, it=40), cache_of(it=40)
    moved, kept = (Request("it", 40, 3, torch.float32) for _ in range(2))
    step(cache, [moved.take(cache, 35)])
    step(still, [kept.take(still, 35)])
    cache.pool.places.close("gone")
    cache.pool.open("new", 35)  # the 30 places in front and 10 behind are in two pieces
    assert cache.pool.places.start("it") == 0
    after, before = step(cache, [moved.take(cache, 1)]), step(still, [kept.take(still, 1)])
    assert torch.equal(after[0], before[0])


def test_keys_that_were_changed_on_their_way_are_refused() -> None:
    cache = cache_of(it=4)
    segment, (query, key, value) = Request("it", 4, 0, torch.float32).take(cache, 4)
    plan = cache.begin([segment], 4, CPU)
    keys, values = cache.update(key, value, 0)
    for changed in ((keys[:, :, :3], values), (keys, values.clone())):
        with pytest.raises(UnpackableError, match="changes cached keys or values"):
            varlen_attention(nn.Module(), query, *changed, WindowMask.of(None, CPU), segments=plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Mixtral", "Olmoe", "GptOss"])
def test_keys_and_values_take_what_the_estimate_reserved(family, dtype, tmp_path) -> None:
    width = 8 if family == "Olmoe" else 16  # Olmoe has no setting for it
    changes = {} if family == "Olmoe" else {"head_dim": width}
    folder = saved(tiny(family, **changes).to(dtype), tmp_path)
    with load_model(folder, LoadSettings(context=50)) as plain:
        own = plain.budget.kv_cache
    with load_model(folder, LoadSettings(context=50, kv_cache="int8")) as served:
        runner = choose_runner(served, 50)
        assert isinstance(runner, VarlenRunner) and not runner.cache.gather
        assert runner.cache.pool.nbytes == served.budget.kv_cache
        assert served.budget.kv_cache * width * dtype.itemsize == own * (width + 4)
        runner.cache.pool.check()
        assert runner.cache.pool.places.free == 50


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_requests_get_what_generate_gives(family, tmp_path) -> None:
    folder = saved(tiny(family, head_dim=16), tmp_path)
    with load_model(folder, LoadSettings(context=120, kv_cache="int8")) as served:
        served.model.generation_config.eos_token_id = None
        asked = prompts()[:4]
        alone = [
            served.generate(torch.tensor([one]), max_new_tokens=8, do_sample=False)[0, len(one) :]
            for one in asked
        ]
        with running(served, prefill_chunk=6, max_concurrency=4) as engine:
            assert engine.stats().runner == "packed"
            heard = [ask(engine, one, greedy(8)) for one in asked]
            found = [one.wait().tokens for one in heard]
    assert found == [one.tolist() for one in alone]


def test_what_runs_one_by_one_has_int8_caches_too(tmp_path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = saved(tiny("Olmoe", rope_parameters=rope), tmp_path)
    with load_model(folder, LoadSettings(context=60, kv_cache="int8")) as served:
        engine = Engine(served)
        runner = engine._runner
        assert isinstance(runner, SeparateRunner)
        runner.open("one", 20)
        with torch.inference_mode():
            runner.step([RunnerInput(request="one", tokens=[5, 6, 7], past=0, num_logits=1)])
        cache = runner._caches["one"]
        assert all(isinstance(layer.keys, Int8Rows) for layer in cache.layers)
        runner.close("one")
        engine.close()
