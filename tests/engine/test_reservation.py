"""When the KV cache changes its size, and that its bookkeeping agrees whatever happens."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moefit.engine.context.reservation import GIVE_BACK_AFTER, ReservationRule
from moefit.engine.prefix.cache import PrefixCache
from moefit.engine.prefix.tree import Prefix
from moefit.engine.scheduler import Limits, Scheduler

BASE, MOST = 128, 1024


def test_it_grows_at_once_by_a_quarter_at_least() -> None:
    growing = ReservationRule(BASE)
    assert growing.next(0.0, present=BASE, needed=BASE, most=MOST) is None
    assert growing.next(0.0, present=BASE, needed=129, most=MOST) == 160
    assert growing.next(0.0, present=BASE, needed=700, most=MOST) == 704
    assert growing.next(0.0, present=BASE, needed=700, most=700) == 700
    assert growing.next(0.0, present=BASE, needed=129, most=140) == 140
    assert growing.next(0.0, present=BASE, needed=129, most=BASE) is None, "there is no room"


def test_it_gives_back_what_was_unused_for_a_while() -> None:
    giving = ReservationRule(BASE)

    def after(seconds: float, needed: int) -> int | None:
        return giving.next(seconds, present=800, needed=needed, most=MOST)

    assert giving.wait(0.0, BASE) is None and giving.wait(0.0, 800) == 1.0
    assert after(0.0, 700) is None and giving.wait(0.0, 800) == 1.0, "in use"
    assert after(10.0, 300) is None and giving.wait(20.0, 800) == GIVE_BACK_AFTER - 10
    assert after(9.0 + GIVE_BACK_AFTER, 100) is None
    assert after(10.0 + GIVE_BACK_AFTER, 0) == 304, "the most that was needed meanwhile"
    assert after(11.0 + GIVE_BACK_AFTER, 0) is None
    assert after(12.0 + GIVE_BACK_AFTER, 700) is None, "used again"
    assert after(13.0 + GIVE_BACK_AFTER, 0) is None
    assert after(12.9 + 2 * GIVE_BACK_AFTER, 0) is None
    assert after(13.0 + 2 * GIVE_BACK_AFTER, 0) == BASE


class Sizes(RuleBasedStateMachine):
    """Requests of any size come and go, and the room for the cache changes meanwhile."""

    @initialize(concurrency=st.integers(1, 4))
    def begin(self, concurrency: int) -> None:
        limits = Limits(tokens=BASE, max_concurrency=concurrency, prefill_chunk=64, max_waiting=9)
        self.scheduler, self.cache = Scheduler(limits), PrefixCache(BASE)
        self.rule, self.room, self.now, self.count = ReservationRule(BASE), MOST, 0.0, 0
        self.sizes: dict[str, int] = {}
        self.unused_since = 0.0

    @rule(tokens=st.integers(2, MOST + 64))
    def submit(self, tokens: int) -> None:
        if tokens > max(self.room, self.scheduler.tokens) or len(self.scheduler.waiting) == 9:
            return
        self.count += 1
        self.sizes[f"r{self.count}"] = tokens
        self.scheduler.submit(f"r{self.count}", prompt=tokens - 1, max_new_tokens=1)

    @rule(room=st.integers(BASE, MOST))
    def change_room(self, room: int) -> None:
        self.room = room

    @rule(seconds=st.sampled_from([0.1, 5.0, 70.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sizes)))
        if name in self.scheduler.running:
            self.cache.close(name)
        self.scheduler.remove(name)
        del self.sizes[name]

    @rule()
    def step(self) -> None:
        """As `KvGrowth.adjust`, and what the engine does afterwards."""
        present, most = self.scheduler.tokens, max(self.scheduler.tokens, self.room)
        excessive = self.scheduler.allow(self.room)
        assert all(self.sizes[name] > most for name in excessive)
        wanted = self.scheduler.wanted()
        assert self.scheduler.reserved <= wanted <= most
        tokens = self.rule.next(self.now, present=present, needed=wanted, most=self.room)
        assert tokens is not None or wanted <= present, "what may run gets its room"
        if tokens is not None:
            assert max(BASE, wanted) <= tokens
            assert tokens <= max(self.room, present) and tokens != present
            self.cache.resize(tokens)
            self.scheduler.resize(tokens)
        for name in excessive:
            self.scheduler.remove(name)
            del self.sizes[name]
        for name in self.scheduler.admit():
            size = self.sizes[name]
            text = [self.count % 3] * (size - 1)
            self.cache.open(name, size, Prefix(namespace="", tokens=text))
            self.cache.extend(name, text, size - 1)
        assert self.scheduler.running or not self.sizes, "somebody could have been served"

    @invariant()
    def it_agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        self.scheduler.check()
        assert self.cache.places == self.scheduler.tokens >= BASE
        assert self.cache.places - self.cache.free == self.scheduler.reserved

    def teardown(self) -> None:
        """Once nothing runs, all is given back after a while."""
        if not hasattr(self, "cache"):
            return
        for name in list(self.sizes):
            self.cache.close(name)
            self.scheduler.remove(name)
            del self.sizes[name]
        for _ in range(5):  # at first what was needed meanwhile stays, then the next minute begins
            self.step()
            self.now += GIVE_BACK_AFTER + 1
        assert self.scheduler.tokens == BASE


Sizes.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSizes = Sizes.TestCase
