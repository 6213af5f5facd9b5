"""A KV pool of another size holds the same keys and values, and no more memory than both need."""

import pytest
import torch

from moefit.engine import kv_pool
from moefit.engine.kv_pool import KvPool
from moefit.engine.prefix.tree import Prefix
from moefit.quant.kv_int8 import Int8Rows, write_rows

HEADS, WIDTH, LAYERS = 3, 16, 2


def filled(places: int, *, int8: bool) -> KvPool:
    """Return a pool with a request in each quarter of it, and values in all places."""
    pool = KvPool(places, int8=int8)
    torch.manual_seed(0)
    for number in range(4):
        pool.open(f"r{number}", places // 4, Prefix(namespace="", tokens=[number] * 16))
    for index in range(LAYERS):
        rows = torch.randn(1, HEADS, 1, WIDTH), torch.randn(1, HEADS, 1, WIDTH)
        for one in pool.layer(index, *rows):
            values = torch.randn(HEADS, places, WIDTH)
            if isinstance(one, Int8Rows):
                write_rows(one, torch.arange(places), values)
            else:
                one.copy_(values)
    return pool


def contents(pool: KvPool, name: str, size: int) -> list[torch.Tensor]:
    start, held = pool.places.start(name), list[torch.Tensor]()
    for index in range(LAYERS):
        for one in pool.known(index) or ():
            parts = (one.codes(), one.scales) if isinstance(one, Int8Rows) else (one,)
            held += [part[:, start : start + size].clone() for part in parts]
    assert len(held) == LAYERS * (4 if pool.int8 else 2)
    return held


def check_same(pool: KvPool, name: str, before: list[torch.Tensor], size: int) -> None:
    pool.check()
    for one, other in zip(contents(pool, name, size), before, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("int8", [False, True])
def test_requests_keep_their_keys_and_values(int8) -> None:
    pool = filled(64, int8=int8)
    before = {f"r{n}": contents(pool, f"r{n}", 16) for n in range(4)}
    size, layout = pool.nbytes, pool.layout()
    pool.resize(200)
    assert pool.places.places == 200 and pool.nbytes == size * 200 // 64
    assert pool.layout() == layout
    for name, one in before.items():
        check_same(pool, name, one, 16)
    pool.open("long", 130)
    pool.places.close("long")
    for name in ("r0", "r2"):
        pool.places.close(name)
    pool.resize(32)
    assert pool.places.places == 32 and pool.nbytes == size // 2
    for name in ("r1", "r3"):
        check_same(pool, name, before[name], 16)


def test_kept_blocks_move_with_them() -> None:
    pool = filled(64, int8=False)
    pool.places.extend("r3", [3] * 16, 16)
    (place,) = [pool.places.start("r3")]
    before = pool.copy_out([place])
    for name in ("r0", "r1", "r2", "r3"):
        pool.places.close(name)
    pool.resize(16)
    found = pool.places.locate(Prefix(namespace="", tokens=[3] * 16), 0, 16)
    assert found == [0] and pool.copy_out([0]) == before
    pool.open("other", 16)
    assert pool.places.known(Prefix(namespace="", tokens=[3] * 16)) == 0


def test_one_tensor_exists_twice_at_most(monkeypatch) -> None:
    pool, made = filled(64, int8=False), list[int]()
    zeros = kv_pool._zeros

    def counted(*arguments):
        held = pool.nbytes
        made.append(held)
        return zeros(*arguments)

    monkeypatch.setattr(kv_pool, "_zeros", counted)
    one = pool.nbytes // (2 * LAYERS)
    pool.resize(128)
    assert made == [one * (4 + number) for number in range(4)], "each is replaced at once"


def test_without_memory_it_stays_as_it_is(monkeypatch) -> None:
    pool, given, calls = filled(64, int8=False), kv_pool.host_bytes, list[int]()
    before = contents(pool, "r2", 16)

    def fails(size: int) -> torch.Tensor:
        calls.append(size)
        if len(calls) == 3:
            raise OSError("no memory")
        return given(size)

    monkeypatch.setattr(kv_pool, "host_bytes", fails)
    size = pool.nbytes
    with pytest.raises(OSError, match="no memory"):
        pool.resize(128)
    assert pool.places.places == 64 and pool.nbytes == size
    check_same(pool, "r2", before, 16)
