import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefit.train.data.batches import Batches, BatchesByMachine, windows


@st.composite
def batches(draw: st.DrawFn) -> Batches:
    seq_len = draw(st.integers(1, 9))
    return Batches(
        tokens=np.arange(draw(st.integers(seq_len + 1, 120)), dtype=np.uint16),
        seq_len=seq_len,
        batch_size=draw(st.integers(1, 7)),
        seed=draw(st.integers(0, 2**32)),
    )


def first_tokens(data: Batches, steps: int) -> list[int]:
    return [int(start) for step in range(steps) for start in data.batch(step)[:, 0]]


@given(batches())
def test_epoch_visits_each_window_once(data: Batches) -> None:
    per_epoch = data.windows_per_epoch
    starts = first_tokens(data, 3 * per_epoch // data.batch_size + 1)
    for epoch in range(3):
        visited = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
        offset = visited[0]
        assert visited == [offset + w * data.seq_len for w in range(per_epoch)]
        assert offset < data.seq_len
        # At most one window's worth of tokens is left over, before and after the grid together.
        assert len(data.tokens) - 1 - per_epoch * data.seq_len < 2 * data.seq_len


@given(batches(), st.lists(st.integers(0, 50), max_size=8))
def test_batch_depends_only_on_step(data: Batches, steps: list[int]) -> None:
    in_order = {step: data.batch(step) for step in sorted(steps)}
    for step in steps:
        assert torch.equal(data.batch(step), in_order[step])


@given(batches(), st.integers(0, 50))
def test_batch_rows_are_consecutive_tokens(data: Batches, step: int) -> None:
    ids_BL1 = data.batch(step)
    assert ids_BL1.dtype == torch.int64
    assert ids_BL1.shape == (data.batch_size, data.seq_len + 1)
    assert bool((ids_BL1.diff(dim=1) == 1).all())  # the corpus counts upwards
    assert int(ids_BL1.max()) < len(data.tokens)


def test_epochs_differ_in_order_and_offset() -> None:
    data = Batches(tokens=np.arange(10_000), seq_len=10, batch_size=999, seed=1)
    epochs = [data.batch(step)[:, 0].tolist() for step in range(4)]
    assert data.windows_per_epoch == 999
    assert len({min(starts) for starts in epochs}) > 1
    assert len({tuple(start // 10 for start in starts) for starts in epochs}) == 4
    assert [data.epoch(step) for step in (0, 1, 2)] == [0.0, 1.0, 2.0]
    other = Batches(tokens=np.arange(10_000), seq_len=10, batch_size=999, seed=2)
    assert other.batch(0).tolist() != data.batch(0).tolist()


def test_order_is_stable() -> None:
    # A run resumed with a later version must see the batches it would have seen.
    data = Batches(tokens=np.arange(100), seq_len=9, batch_size=4, seed=0)
    assert first_tokens(data, 4) == [43, 61, 25, 70, 34, 52, 88, 7, 79, 16, 67, 13, 49, 31, 85, 40]


@given(st.integers(0, 60), st.integers(1, 20))
def test_each_token_is_target_once(count: int, seq_len: int) -> None:
    found = list(windows(np.arange(count), seq_len))
    targets = [int(token) for window in found for token in window[1:]]
    assert targets == list(range(1, count))
    assert all(2 <= len(window) <= seq_len + 1 for window in found)


@given(st.integers(2, 80), st.integers(1, 20), st.integers(1, 100))
def test_limit_selects_whole_windows(count: int, seq_len: int, limit: int):
    everything = [window.tolist() for window in windows(np.arange(count), seq_len)]
    chosen = [window.tolist() for window in windows(np.arange(count), seq_len, limit)]
    targets = sum(len(window) - 1 for window in chosen)
    assert [window for window in everything if window in chosen] == chosen  # in order, once each
    if limit >= count - 1:
        assert chosen == everything
    else:
        assert targets <= limit or len(chosen) == 1
        assert targets > limit - seq_len


def test_limited_windows_are_evenly_spread() -> None:
    starts = [int(window[0]) for window in windows(np.arange(1001), 10, limit=40)]
    assert starts == [120, 370, 620, 870]
    # Just more than the limit used to become every second window.
    assert len(list(windows(np.arange(1001), 10, limit=990))) == 99


def test_machines_read_their_own_text() -> None:
    shares = tuple(
        Batches(tokens=np.arange(40, dtype=np.uint16) + first, seq_len=4, batch_size=2, seed=0)
        for first in (0, 100)
    )
    ids_BL1 = BatchesByMachine(shares=shares).batch(3)
    assert ids_BL1.shape == (4, 5)
    assert (ids_BL1[:2] < 100).all()
    assert torch.equal(ids_BL1[2:] - 100, ids_BL1[:2])
