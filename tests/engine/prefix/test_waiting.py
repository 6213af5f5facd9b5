"""Requests wait for a prefix that another one is computing, and never for each other."""

from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.prefix.tree import Prefix
from moefit.engine.prefix.waiting import Reading, WaitingForPrefix

BLOCK = 2


def prefix(*tokens: int, namespace: str = "") -> Prefix:
    return Prefix(namespace=namespace, tokens=tokens)


def reading(name: str, *tokens: int, computed: int = 0, namespace: str = "") -> Reading:
    return Reading(name=name, prefix=prefix(*tokens, namespace=namespace), computed=computed)


def test_the_longest_common_prefix_is_waited_for() -> None:
    waiting, text = WaitingForPrefix(BLOCK), prefix(1, 2, 3, 4, 5, 6)
    others = [reading("short", 1, 2, 9, 9), reading("long", 1, 2, 3, 4, 7, 7)]
    assert waiting.begin("new", text, 0, others) and "new" in waiting
    assert waiting.computed("short", 4) == waiting.computed("long", 3) == []
    assert waiting.computed("long", 4) == ["new"] and "new" not in waiting
    waiting.check()


def test_nothing_is_waited_for_that_is_there_already() -> None:
    waiting, text = WaitingForPrefix(BLOCK), prefix(1, 2, 3, 4, 5)
    assert not waiting.begin("new", text, 4, [reading("one", 1, 2, 3, 4, 5)])
    assert not waiting.begin("new", text, 0, [reading("one", 1, 2, 3, 4, 5, computed=4)])
    assert not waiting.begin("new", text, 0, [reading("one", 1, 2, 3, 4, 5, namespace="other")])
    assert not waiting.begin("new", prefix(1, 2), 0, [reading("one", 1, 2)]), "one is computed"
    assert not waiting.begin("new", text, 0, [])


def test_requests_go_on_when_the_other_ends() -> None:
    waiting = WaitingForPrefix(BLOCK)
    for name in ("a", "b"):
        assert waiting.begin(name, prefix(1, 2, 3), 0, [reading("first", 1, 2)])
    assert waiting.ended("a") == [] and "a" not in waiting
    assert waiting.ended("first") == ["b"]
    assert waiting.ended("first") == []


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_everybody_is_served(texts) -> None:
    """One token of each reading request is computed at a time."""
    waiting, computed, reads = WaitingForPrefix(BLOCK), {}, {}

    def begin(name: str, cached: int) -> None:
        others = [Reading(name=n, prefix=p, computed=computed[n]) for n, p in reads.items()]
        computed[name] = cached
        if not waiting.begin(name, prefix(*texts[int(name)]), cached, others):
            reads[name] = prefix(*texts[int(name)])

    for number in range(len(texts)):
        begin(str(number), 0)
        waiting.check()
    for _ in range(200):
        for name, text in list(reads.items()):
            computed[name] += 1
            free = waiting.computed(name, computed[name])
            if computed[name] == len(text.tokens):
                del reads[name]
                free += waiting.ended(name)
            for one in free:
                begin(one, computed[one])
            waiting.check()
    assert not reads and not any(str(n) in waiting for n in range(len(texts)))
