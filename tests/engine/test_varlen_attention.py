"""Variable-length attention against plain loops over queries and keys."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from moefit.engine.kv_pool import KvPool
from moefit.engine.varlen import (
    ATTENTION_NAME,
    Segment,
    UnpackableError,
    VarlenCache,
    register_varlen_attention,
    varlen_attention,
)
from moefit.serve.hf.attention import WindowMask

WIDTH, PLACES = 8, 64
MODULE = nn.Module()
CPU = torch.device("cpu")


def one_by_one(query_HTC, key_GLC, value_GLC, *, past, window, scaling, softcap, sinks):
    """Reference: each query of each head against the keys that it may attend to."""
    heads, new, _ = query_HTC.shape
    out = torch.zeros(heads, new, value_GLC.shape[-1])
    for head in range(heads):
        group = head // (heads // key_GLC.shape[0])
        for row in range(new):
            at = past + row
            first = 0 if window is None else max(0, at - window + 1)
            scores = [
                float(query_HTC[head, row] @ key_GLC[group, place]) * scaling
                for place in range(first, at + 1)
            ]
            scores_N = torch.tensor(scores)
            if softcap is not None:
                scores_N = torch.tanh(scores_N / softcap) * softcap
            if sinks is not None:
                scores_N = torch.cat([scores_N, sinks[head : head + 1]])
            for place, share in zip(range(first, at + 1), scores_N.softmax(0), strict=False):
                out[head, row] += share * value_GLC[group, place]
    return out


class Texts:
    """Three requests with random keys, passed to a cache in steps."""

    def __init__(self, *, heads: int = 4, groups: int = 2, gathers: bool = False):
        torch.manual_seed(0)
        self.heads, self.groups = heads, groups
        self.keys, self.values = torch.randn(2, 3, groups, 20, WIDTH)
        self.cache = VarlenCache(KvPool(PLACES))
        self.cache.gather = gathers
        self.past = [0, 0, 0]
        for number in range(3):
            self.cache.pool.open(str(number), 20)

    def step(self, new: dict[int, int], *, window: int | None = None, **how):
        """Return pairs of actual and expected output, by request."""
        extents = self.cache.pool.places
        segments = [
            Segment(start=extents.start(str(n)), past=self.past[n], new=count)
            for n, count in new.items()
        ]
        plan = self.cache.begin(segments, sum(self.past) + sum(new.values()), CPU)
        ranges = {n: slice(self.past[n], self.past[n] + count) for n, count in new.items()}
        queries = {n: torch.randn(self.heads, count, WIDTH) for n, count in new.items()}
        batch = all(count == 1 for count in new.values())

        def joined(parts):
            return torch.stack(parts) if batch else torch.cat(parts, dim=1)[None]

        key, value = self.cache.update(
            joined([self.keys[n][:, ranges[n]] for n in new]),
            joined([self.values[n][:, ranges[n]] for n in new]),
            0,
        )
        mask = WindowMask.of(window, CPU)
        query = joined(list(queries.values()))
        out, _ = varlen_attention(MODULE, query, key, value, mask, segments=plan, **how)
        rows = out if batch else out[0].split(list(new.values()))
        for (n, count), got in zip(new.items(), rows, strict=True):
            expected = one_by_one(
                queries[n],
                self.keys[n][:, : self.past[n] + count],
                self.values[n][:, : self.past[n] + count],
                past=self.past[n],
                window=window,
                scaling=how.get("scaling") or WIDTH**-0.5,
                softcap=how.get("softcap"),
                sinks=how.get("s_aux"),
            )
            self.past[n] += count
            torch.testing.assert_close(got.transpose(0, 1), expected, atol=1e-5, rtol=1e-4)


STEPS = ({0: 5}, {0: 1, 1: 7}, {0: 1, 1: 4, 2: 6}, {2: 1, 0: 1, 1: 1}, {1: 1}, {0: 1, 2: 3})


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scaling": 0.7},
        {"window": 3},
        {"window": 8},
        {"softcap": 2.0, "scaling": 0.9},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": 4},
    ],
    ids=str,
)
def test_requests_attend_to_their_own_keys(how, groups, gathers) -> None:
    texts = Texts(groups=groups, gathers=gathers)
    for new in STEPS:
        texts.step(new, **how)


def test_moved_keys_stay_valid() -> None:
    texts = Texts()
    for new in STEPS[:3]:
        texts.step(new)
    texts.cache.pool.places.close("0")
    texts.cache.pool.open("new", 22)  # 20 at the front and 4 behind: the others move together
    assert texts.cache.pool.places.start("1") == 0
    texts.cache.pool.check()
    texts.step({1: 1, 2: 1})
    texts.step({1: 2, 2: 1})


def attend(**changes):
    texts = Texts()
    plan = texts.cache.begin([Segment(start=0, past=0, new=2)], 2, CPU)
    key, value = texts.cache.update(texts.keys[:1, :, :2], texts.values[:1, :, :2], 0)
    given = {"attention_mask": WindowMask.of(None, CPU), "segments": plan} | changes
    return varlen_attention(MODULE, torch.randn(1, 4, 2, WIDTH), key, value, **given)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mask": None},
        {"attention_mask": torch.ones(1, 1, 1, 1)},
        {"attention_mask": WindowMask.of(None, CPU)[..., :1]},
        {"segments": None},
        {"sliding_window": 4},
        {"position_bias": torch.zeros(1)},
        {"is_causal": False},
    ],
    ids=str,
)
def test_unsupported_attention_raises(changes) -> None:
    attend()
    with pytest.raises(UnpackableError):
        attend(**changes)


def test_registration_is_one_call() -> None:
    register_varlen_attention()
    register_varlen_attention()
    assert AttentionInterface()[ATTENTION_NAME] is varlen_attention


def test_cache_bytes_match_extents() -> None:
    texts = Texts()
    assert texts.cache.pool.nbytes == 0
    texts.step({0: 2})
    assert texts.cache.pool.nbytes == 2 * 2 * PLACES * WIDTH * 4
