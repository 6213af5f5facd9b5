"""Ranges of the KV pool never overlap, and fit whenever enough places are free."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moefit.engine.kv_pool import Extents, Move

PLACES = 40


def test_first_fit_allocation() -> None:
    extents = Extents(20)
    for name in "abc":
        assert extents.allocate(name, 5) == ()
    extents.release("a")
    assert extents.allocate("small", 3) == ()
    assert extents.allocate("large", 5) == ()
    assert (extents.start("small"), extents.start("large")) == (0, 15)


def test_compaction_when_fragmented() -> None:
    extents = Extents(20)
    for name in "abcd":
        extents.allocate(name, 5)
    extents.release("a")
    extents.release("c")
    assert extents.allocate("large", 10) == (
        Move(name="b", source=5, target=0),
        Move(name="d", source=15, target=5),
    )
    assert extents.start("large") == 10
    extents.check()


class Places(RuleBasedStateMachine):
    """Each request's data survives every move."""

    def __init__(self) -> None:
        super().__init__()
        self.extents, self.row = Extents(PLACES), [""] * PLACES
        self.sizes: dict[str, int] = {}
        self.count = 0

    @precondition(lambda self: self.extents.free)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, self.extents.free))
        name = f"r{self.count}"
        self.count += 1
        for move in self.extents.allocate(name, size):
            held = self.row[move.source : move.source + self.sizes[move.name]]
            assert move.target < move.source
            self.row[move.target : move.target + len(held)] = held
        start = self.extents.start(name)
        self.row[start : start + size] = [name] * size
        self.sizes[name] = size

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sizes)))
        self.extents.release(name)
        del self.sizes[name]

    @invariant()
    def everybody_has_what_they_wrote(self) -> None:
        self.extents.check()
        assert self.extents.free == PLACES - sum(self.sizes.values())
        for name, size in self.sizes.items():
            start = self.extents.start(name)
            assert self.row[start : start + size] == [name] * size


Places.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPlaces = Places.TestCase
