"""Blocks of earlier texts are reused by content, and never keep a request from running."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moefit.engine.prefix.cache import Opened, PrefixCache, PrefixStats
from moefit.engine.prefix.places import Move, Source, merged, usable
from moefit.engine.prefix.tree import Prefix

BLOCK, PLACES = 2, 24


def prefix(*tokens: int, namespace: str = "") -> Prefix:
    return Prefix(namespace=namespace, tokens=tokens)


def finished(cache: PrefixCache, name: str, tokens: list[int], size: int | None = None) -> Opened:
    """Run a request to its end."""
    opened = cache.open(name, size or len(tokens), Prefix(namespace="", tokens=tokens))
    cache.extend(name, tokens, len(tokens))
    cache.close(name)
    cache.check()
    return opened


def test_first_fit_without_blocks() -> None:
    cache = PrefixCache(20, BLOCK)
    for name in "abc":
        assert cache.open(name, 5).moves == ()
    cache.close("a")
    assert cache.open("small", 3).moves == ()
    assert cache.open("large", 5).moves == ()
    assert (cache.start("small"), cache.start("large")) == (0, 15)


def test_compaction_when_fragmented() -> None:
    cache = PrefixCache(20, BLOCK)
    for name in "abcd":
        cache.open(name, 5)
    cache.close("a")
    cache.close("c")
    moves = (Move(source=5, target=0, size=5), Move(source=15, target=5, size=5))
    assert cache.open("large", 10).moves == moves
    assert cache.start("large") == 10
    cache.check()


def test_a_conversation_is_taken_over_in_place() -> None:
    cache, turn = PrefixCache(PLACES, BLOCK), [1, 2, 3, 4, 5]
    assert finished(cache, "one", turn) == Opened(cached=0, moves=())
    assert finished(cache, "two", [*turn, 6, 7], size=20) == Opened(cached=4, moves=())
    assert cache.stats().hits == 4 and cache.stats().queries == 12


def test_a_conversation_moves_to_the_front_to_grow() -> None:
    cache = PrefixCache(PLACES, BLOCK)
    cache.open("first", 10)
    finished(cache, "one", [1, 2, 3, 4, 5])
    cache.close("first")
    opened = finished(cache, "two", [1, 2, 3, 4, 5], size=24)
    assert opened == Opened(cached=4, moves=(Move(source=10, target=0, size=4),))


def test_at_least_one_token_is_left_to_compute() -> None:
    cache = PrefixCache(PLACES, BLOCK)
    finished(cache, "one", [1, 2, 3, 4])
    assert finished(cache, "two", [1, 2, 3, 4]).cached == 2
    assert finished(cache, "three", [1, 2, 3, 4, 9]).cached == 4


def test_blocks_of_a_running_request_are_copied() -> None:
    cache = PrefixCache(PLACES, BLOCK)
    cache.open("runs", 8, prefix(1, 2, 3, 4, 5))
    cache.extend("runs", [1, 2, 3, 4, 5], 4)
    opened = cache.open("joins", 8, prefix(1, 2, 3, 4, 5))
    assert opened == Opened(cached=4, moves=(Move(source=0, target=8, size=4),))
    cache.close("runs")
    assert cache.stats().tokens == 0 and cache.stats().shared == 4, "the other holds them"
    cache.close("joins")
    assert cache.stats().tokens == 4
    cache.check()


def test_namespaces_share_nothing() -> None:
    cache = PrefixCache(PLACES, BLOCK)
    cache.open("one", 6, prefix(1, 2, 3, 4, 5, namespace="a"))
    cache.extend("one", [1, 2, 3, 4, 5], 5)
    cache.close("one")
    assert cache.open("two", 6, prefix(1, 2, 3, 4, 5, namespace="b")).cached == 0
    assert cache.open("three", 6, prefix(1, 2, 3, 4, 5, namespace="a")).cached == 4
    assert cache.open("four", 6).cached == 0, "without a prefix nothing is read"


def test_the_least_recently_used_blocks_are_removed() -> None:
    cache = PrefixCache(8, BLOCK)
    finished(cache, "one", [1, 1, 1, 1])
    finished(cache, "two", [2, 2, 2, 2])
    finished(cache, "again", [1, 1, 9])  # the first text: its second block is the oldest now
    finished(cache, "large", [3, 3, 3, 3])
    assert [cache.known(prefix(n, n, n, n)) for n in (1, 2, 3)] == [2, 2, 4]
    assert cache.stats().evicted == 4


def test_a_request_of_the_whole_pool_removes_all_others() -> None:
    cache = PrefixCache(8, BLOCK)
    finished(cache, "one", [1, 1, 1, 1])
    finished(cache, "two", [2, 2])
    assert finished(cache, "all", [2, 2, 5, 5, 5, 5, 5, 5]).cached == 2
    assert cache.known(prefix(1, 1)) == 0


def test_failed_requests_leave_nothing() -> None:
    cache = PrefixCache(8, BLOCK)
    cache.open("one", 4, prefix(1, 2, 3))
    cache.extend("one", [1, 2, 3], 3)
    cache.close("one", keep=False)
    assert cache.stats().tokens == cache.stats().evicted == 0
    finished(cache, "two", [1, 2, 3])
    cache.reset()
    assert cache.known(prefix(1, 2)) == 0 and cache.stats() == PrefixStats()


@pytest.mark.parametrize(
    ("start", "places", "expected"),
    [(0, (4, 6, 8), 3), (3, (4, 6, 8), 3), (5, (4, 6, 8), 1), (4, (6, 4), 1), (0, (10, 4, 2), 2)],
)
def test_blocks_are_usable_until_one_is_overwritten(start, places, expected) -> None:
    sources = [Source(place=place, idle=True) for place in places]
    assert usable(start, sources, 2) == expected
    held = [Source(place=place + 100, idle=False) for place in places]
    assert usable(start, held, 2) == len(places)


def test_moves_that_would_overwrite_their_source_are_not_merged() -> None:
    backwards = [Move(source=0, target=3, size=2), Move(source=2, target=5, size=2)]
    assert merged(backwards) == tuple(backwards)
    apart = [Move(source=0, target=8, size=2), Move(source=2, target=10, size=2)]
    assert merged(apart) == (Move(source=0, target=8, size=4),)


class Pool(RuleBasedStateMachine):
    """Contents of places follow the moves; each place holds the text up to its token."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PLACES, BLOCK)
        self.row: list[object] = [None] * PLACES
        self.texts: dict[str, tuple[str, list[int], int, int]] = {}  # namespace, text, done, size
        self.computed: dict[str, bool] = {}
        self.count = 0

    def move(self, opened: Opened) -> None:
        for move in opened.moves:
            for index in range(move.size):  # in this order: overlapping moves go to the front
                self.row[move.target + index] = self.row[move.source + index]

    def write(self, name: str, begin: int, end: int) -> None:
        namespace, text, _, _ = self.texts[name]
        start = self.cache.start(name)
        for index in range(begin, end):
            self.row[start + index] = (namespace, tuple(text[: index + 1]))

    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        reserved = sum(size for *_, size in self.texts.values())
        places = data.draw(st.integers(max(reserved, BLOCK), 2 * PLACES))
        for move in self.cache.resize(places):
            for index in range(move.size):
                self.row[move.target + index] = self.row[move.source + index]
        self.row = [*self.row, *[None] * places][:places]

    @precondition(lambda self: self.cache.free)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, self.cache.free))
        text = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=size))
        namespace = data.draw(st.sampled_from(["a", "a", "b"]))
        covered = data.draw(st.integers(0, 9)) > 0
        name = f"r{self.count}"
        self.count += 1
        given = Prefix(namespace=namespace, tokens=text) if covered else None
        known = 0 if given is None else self.cache.known(given)
        opened = self.cache.open(name, size, given)
        assert opened.cached < len(text) and opened.cached <= known
        self.move(opened)
        self.computed[name] = False
        self.texts[name] = (namespace if covered else name, text, opened.cached, size)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        namespace, text, done, size = self.texts[name]
        new = data.draw(st.integers(0, size - done))
        while len(text) < done + new:
            text.append(data.draw(st.integers(0, 1)))
        self.texts[name] = (namespace, text, done + new, size)
        self.computed[name] |= new > 0
        self.write(name, done, done + new)
        self.cache.extend(name, text, done + new)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        namespace, text, done, size = self.texts[name]
        if self.computed[name] or namespace == name:
            return
        opened = self.cache.join(name, Prefix(namespace=namespace, tokens=text))
        assert done <= opened.cached < len(text)
        self.move(opened)
        self.texts[name] = (namespace, text, opened.cached, size)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        del self.texts[name]
        self.cache.close(name, keep=data.draw(st.integers(0, 9)) > 0)

    @invariant()
    def each_request_has_its_text(self) -> None:
        self.cache.check()
        assert self.cache.free == len(self.row) - sum(size for *_, size in self.texts.values())
        for name, (namespace, text, done, _) in self.texts.items():
            start = self.cache.start(name)
            for index in range(done):
                assert self.row[start + index] == (namespace, tuple(text[: index + 1]))


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase
