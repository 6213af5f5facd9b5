import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from moefit.serve.cache.host_cache import HostTable, Lease


def filled(table: HostTable, key: str, nbytes: int) -> Lease:
    lease = table.lease(key, nbytes)
    assert lease is not None and lease.fresh
    table.complete(lease)
    return lease


def put(table: HostTable, key: str, nbytes: int) -> int:
    lease = filled(table, key, nbytes)
    table.release(lease)
    return lease.place


def test_an_expert_is_filled_once_and_then_found() -> None:
    table = HostTable(100)
    place = put(table, "a", 40)
    found = table.lease("a", 40)
    assert found == Lease(key="a", place=place, fresh=False)
    assert (table.hits, table.reads, table.held) == (1, 1, 40)


def test_while_one_fills_it_others_wait_and_then_share() -> None:
    table = HostTable(100)
    lease = table.lease("a", 40)
    assert lease is not None and lease.fresh
    assert table.lease("a", 40) is None
    table.complete(lease)
    second, third = table.lease("a", 40), table.lease("a", 40)
    assert second is not None and third is not None
    assert second.place == third.place == lease.place and not second.fresh
    assert table.reads == 1


def test_the_one_asked_for_least_makes_room_and_its_memory_is_taken_over() -> None:
    table = HostTable(100)
    places = {key: put(table, key, 50) for key in "ab"}
    again = table.lease("a", 50)
    assert again is not None
    table.release(again)
    lease = table.lease("c", 50)
    assert lease == Lease(key="c", place=places["b"], fresh=True)


def test_of_those_asked_for_as_often_the_older_one_makes_room() -> None:
    table = HostTable(3)
    for key in "cab":
        put(table, key, 1)
    put(table, "d", 1)
    assert list(map(str, table._entries)) == ["a", "b", "d"]


def test_requests_of_long_ago_count_less_and_never_overflow() -> None:
    table = HostTable(2)
    for key in ("a",) * 20 + ("b", "c") * 3 + ("d",) * 60 + ("e",) * 3:
        ask(table, key)
    assert set(table._entries) == {"d", "e"}, "twenty requests, but seven half-lives ago"
    for number in range(20_000):
        ask(table, str(number % 3))
    table.check()


def test_a_returning_expert_is_judged_by_all_its_past() -> None:
    table = HostTable(2)
    for key in "aaaabc":
        ask(table, key)
    assert set(table._entries) == {"a", "c"}
    ask(table, "b")
    assert set(table._entries) == {"a", "b"}, "asked for twice, c once"


def ask(table: HostTable, key: str) -> None:
    lease = table.lease(key, 1)
    assert lease is not None
    if lease.fresh:
        table.complete(lease)
    table.release(lease)


def test_what_is_copied_from_or_being_filled_stays() -> None:
    table = HostTable(100)
    one = filled(table, "a", 50)
    other = table.lease("b", 50)
    assert other is not None
    assert table.lease("c", 50) is None
    table.abandon(other)
    assert put(table, "c", 50) == other.place
    table.release(one)
    assert put(table, "d", 50) == one.place
    assert table.lease("c", 50) is not None and table.held == 100


def test_a_failed_expert_is_nowhere_and_its_place_is_the_first_to_be_taken() -> None:
    table = HostTable(100)
    place = put(table, "a", 50)
    failed = table.lease("b", 50)
    assert failed is not None
    table.abandon(failed)
    table.check()
    again = table.lease("b", 50)
    assert again is not None and again.fresh and again.place == failed.place != place
    assert (table.reads, table.hits) == (1, 0)


def test_an_expert_of_another_size_drops_as_many_as_it_takes() -> None:
    table = HostTable(100)
    places = [put(table, key, 30) for key in "abc"]
    lease = table.lease("d", 60)
    assert lease is not None and lease.fresh and lease.place not in places
    assert lease.dropped == tuple(places[:2]) and table.held == 90
    table.complete(lease)
    table.release(lease)
    small = table.lease("e", 30)
    assert small is not None and small.place == places[2] and small.dropped == ()


def test_what_cannot_be_had_changes_nothing() -> None:
    table = HostTable(100)
    put(table, "a", 30)
    kept = filled(table, "b", 50)
    before = table.places
    assert table.lease("c", 60) is None
    assert table.places == before
    table.release(kept)
    with pytest.raises(AssertionError, match="101 bytes never fit into 100"):
        table.lease("d", 101)


class Tier(RuleBasedStateMachine):
    """Readers at random, against what the memory then would hold."""

    fresh, whole = Bundle("fresh"), Bundle("whole")

    def __init__(self):
        super().__init__()
        self.table = HostTable(10)
        self.content: dict[int, str | None] = {}  # None: half-filled
        self.used: list[int] = []

    @rule(target=fresh, key=st.sampled_from("abcdefgh"))
    def ask(self, key: str):
        lease = self.table.lease(key, 2 + ord(key) % 3)
        if lease is None:
            being_filled = key in self.table._entries
            assert being_filled or self.used, "with everything idle there is room for anything"
            return None
        for place in lease.dropped:
            assert place not in self.used
            del self.content[place]
        if lease.fresh:
            assert lease.place not in self.used, "overwritten while in use"
            self.content[lease.place] = None
        else:
            assert self.content[lease.place] == key
        self.used.append(lease.place)
        return lease

    @rule(target=whole, lease=consumes(fresh))
    def fill(self, lease: Lease | None):
        if lease is not None and lease.fresh:
            self.content[lease.place] = str(lease.key)
            self.table.complete(lease)
        return lease

    @rule(lease=consumes(fresh))
    def fail(self, lease: Lease | None) -> None:
        if lease is None:
            return
        self.used.remove(lease.place)
        if lease.fresh:
            self.table.abandon(lease)
        else:
            self.table.release(lease)

    @rule(lease=consumes(whole))
    def copied(self, lease: Lease | None) -> None:
        if lease is not None:
            assert self.content[lease.place] == lease.key
            self.table.release(lease)
            self.used.remove(lease.place)

    @invariant()
    def holds(self) -> None:
        self.table.check()
        assert self.table.places.keys() == self.content.keys()


TestTier = Tier.TestCase
