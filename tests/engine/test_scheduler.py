"""Order of service under any sequence of events, without tensors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moefit.engine.scheduler import Limits, ScheduledTokens, Scheduler, split_evenly
from moefit.errors import QueueFullError


def limits(**changes) -> Limits:
    usual = {"tokens": 100, "max_concurrency": 3, "prefill_chunk": 10, "max_waiting": 5}
    return Limits(**(usual | changes))


def step(scheduler: Scheduler) -> tuple[ScheduledTokens, ...]:
    """Run a step in which every fully computed request gets one more token."""
    scheduler.admit()
    pieces = scheduler.plan()
    for piece in pieces:
        scheduler.advance(piece)
        if piece.last:
            scheduler.append_token(piece.request)
    scheduler.check()
    return pieces


def told(pieces: tuple[ScheduledTokens, ...]) -> dict[str, tuple[int, int, bool]]:
    return {piece.request: (piece.start, piece.stop, piece.last) for piece in pieces}


def test_prompt_is_prefilled_in_chunks() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("a", prompt=23, max_new_tokens=4)
    assert told(step(scheduler)) == {"a": (0, 10, False)}
    assert told(step(scheduler)) == {"a": (10, 20, False)}
    assert told(step(scheduler)) == {"a": (20, 23, True)}
    assert told(step(scheduler)) == {"a": (23, 24, True)}
    assert told(step(scheduler)) == {"a": (24, 25, True)}


def test_fixed_chunks_do_not_depend_on_other_requests() -> None:
    """Alone or among others, a prompt is computed in the same pieces, in the order of arrival."""
    scheduler = Scheduler(limits(fixed_chunks=True))
    scheduler.submit("first", prompt=2, max_new_tokens=20)
    step(scheduler)
    scheduler.submit("long", prompt=23, max_new_tokens=9)
    scheduler.submit("limited", prompt=9, max_new_tokens=9, max_chunk=4)
    pieces = [told(step(scheduler)) for _ in range(6)]
    assert all("first" in one for one in pieces)
    assert [one["long"] for one in pieces[:3]] == [(0, 10, False), (10, 20, False), (20, 23, True)]
    assert [one.get("limited") for one in pieces[:3]] == [None, None, None]
    assert [one["limited"] for one in pieces[3:]] == [(0, 4, False), (4, 8, False), (8, 9, True)]


def test_decoding_and_long_prefill_share_steps() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("short", prompt=2, max_new_tokens=20)
    step(scheduler)
    scheduler.submit("long", prompt=25, max_new_tokens=1)
    for number in range(3):
        pieces = told(step(scheduler))
        assert pieces["short"] == (2 + number, 3 + number, True)
        assert pieces["long"][0] == 10 * number


def test_prompts_share_step() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("long", prompt=40, max_new_tokens=1)
    scheduler.submit("short", prompt=3, max_new_tokens=1)
    assert told(step(scheduler)) == {"long": (0, 7, False), "short": (0, 3, True)}


def test_unchunked_prompts_run_one_at_a_time() -> None:
    scheduler = Scheduler(limits(whole_prompts=True))
    scheduler.submit("a", prompt=40, max_new_tokens=2)
    scheduler.submit("b", prompt=30, max_new_tokens=2)
    assert told(step(scheduler)) == {"a": (0, 40, True)}
    assert told(step(scheduler)) == {"a": (40, 41, True), "b": (0, 30, True)}


def test_smaller_chunks_share_limit() -> None:
    scheduler = Scheduler(limits(tokens=100, max_concurrency=4, prefill_chunk=12))
    for name in ("a", "b"):
        scheduler.submit(name, prompt=4, max_new_tokens=1, max_chunk=3)
    scheduler.submit("other", prompt=20, max_new_tokens=1)
    scheduler.admit()
    assert told(step(scheduler)) == {"a": (0, 3, False), "other": (0, 9, False)}
    assert told(step(scheduler))["a"] == (3, 4, True)
    assert told(scheduler.plan())["b"][:2] == (2, 4)


def test_request_with_smaller_chunks() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("a", prompt=20, max_new_tokens=1, max_chunk=3)
    scheduler.submit("b", prompt=20, max_new_tokens=1)
    assert told(step(scheduler)) == {"a": (0, 3, False), "b": (0, 7, False)}


def test_waiting_requests_keep_order() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("first", prompt=50, max_new_tokens=10)
    scheduler.submit("large", prompt=40, max_new_tokens=1)
    scheduler.submit("small", prompt=1, max_new_tokens=1)
    assert scheduler.admit() == ("first",)
    assert scheduler.waiting == ("large", "small")
    assert scheduler.remove("first")
    assert scheduler.admit() == ("large", "small")


def test_full_queue_raises() -> None:
    scheduler = Scheduler(limits(max_waiting=1))
    scheduler.submit("a", prompt=1, max_new_tokens=1)
    with pytest.raises(QueueFullError, match="1 requests are waiting"):
        scheduler.submit("b", prompt=1, max_new_tokens=1)
    scheduler.admit()
    scheduler.submit("b", prompt=1, max_new_tokens=1)


def test_request_is_removed_once() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("a", prompt=1, max_new_tokens=1)
    assert scheduler.remove("a")
    assert not scheduler.remove("a")


@given(st.integers(0, 200), st.lists(st.integers(1, 50), max_size=8))
def test_chunks_are_split_evenly(total: int, wants: list[int]) -> None:
    shares = split_evenly(total, wants)
    assert sum(shares) == min(total, sum(wants))
    assert all(0 <= share <= want for share, want in zip(shares, wants, strict=True))
    hungry = [share for share, want in zip(shares, wants, strict=True) if share < want]
    assert not hungry or max(shares) - min(hungry) <= 1  # nobody has more than one who wants more


def test_tokens_may_be_skipped_before_the_first_step() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit("one", prompt=20, max_new_tokens=2)
    scheduler.admit()
    scheduler.skip("one", 16)
    (piece,) = scheduler.plan()
    assert (piece.start, piece.last) == (16, piece.stop == 20)
    scheduler.check()


class Serving(RuleBasedStateMachine):
    """Requests are submitted, run, end and are cancelled in any order."""

    @initialize(whole=st.booleans(), tokens=st.integers(10, 60), places=st.integers(1, 4))
    def begin(self, whole: bool, tokens: int, places: int) -> None:
        self.scheduler = Scheduler(
            limits(tokens=tokens, max_concurrency=places, prefill_chunk=7, whole_prompts=whole)
        )
        self.left: dict[str, int] = {}  # tokens that the answer may still have
        self.read: dict[str, int] = {}
        self.order: list[str] = []
        self.held: set[str] = set()
        self.count = 0

    @rule(
        prompt=st.integers(1, 30),
        max_new_tokens=st.integers(1, 20),
        max_chunk=st.none() | st.integers(1, 5),
    )
    def submit(self, prompt: int, max_new_tokens: int, max_chunk: int | None) -> None:
        if prompt + max_new_tokens > self.scheduler.limits.tokens:
            return
        name = f"r{self.count}"
        self.count += 1
        try:
            self.scheduler.submit(
                name, prompt=prompt, max_new_tokens=max_new_tokens, max_chunk=max_chunk
            )
        except QueueFullError:
            assert len(self.scheduler.waiting) == self.scheduler.limits.max_waiting
            return
        self.left[name], self.read[name] = max_new_tokens, 0
        self.order.append(name)

    @rule(more=st.integers(0, 60))
    def resize(self, more: int) -> None:
        self.scheduler.resize(max(self.scheduler.limits.tokens, self.scheduler.reserved + more))
        assert not self.scheduler.allow(0), "each fits into what is there from the start"

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.left)))
        assert self.scheduler.remove(name)
        del self.left[name], self.read[name]
        self.held.discard(name)

    @precondition(lambda self: self.left and self.scheduler.running)
    @rule(data=st.data())
    def hold_or_resume(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.scheduler.running))
        (self.scheduler.resume if name in self.held else self.scheduler.hold)(name)
        self.held ^= {name}

    @rule()
    def step(self) -> None:
        has_work = self.scheduler.has_work
        admitted = self.scheduler.admit()
        assert has_work == bool(admitted or set(self.scheduler.running) - self.held)
        running = self.scheduler.running
        assert [n for n in self.order if n in admitted] == list(admitted), "who comes first"
        assert running or not self.left, "somebody could have been served"
        pieces = self.scheduler.plan()
        assert pieces == self.scheduler.plan(), "planning changes nothing"
        assert len({piece.request for piece in pieces}) == len(pieces)
        assert not {piece.request for piece in pieces} & self.held
        decoding = [piece for piece in pieces if self.left_after_reading(piece)]
        reading = [piece for piece in pieces if piece not in decoding]
        if not self.scheduler.limits.whole_prompts:
            assert sum(p.stop - p.start for p in reading) <= self.scheduler.limits.prefill_chunk
        for piece in pieces:
            assert piece.start == self.read[piece.request] < piece.stop
            self.scheduler.advance(piece)
            self.read[piece.request] = piece.stop
            if piece.last:
                self.left[piece.request] -= 1
                self.scheduler.append_token(piece.request)
                if not self.left[piece.request]:
                    self.scheduler.remove(piece.request)
                    del self.left[piece.request], self.read[piece.request]

    def left_after_reading(self, piece: ScheduledTokens) -> bool:
        return piece.last and piece.stop - piece.start == 1 and piece.start > 0

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self) -> None:
        """Check that every request finishes eventually."""
        for name in getattr(self, "held", ()):
            self.scheduler.resume(name)
        self.held = set()
        for _ in range(2000):
            if not self.left:
                return
            self.step()
        raise AssertionError(f"{sorted(self.left)} were never served")


Serving.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestServing = Serving.TestCase
