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
    return lease.buffer


def test_an_expert_is_filled_once_and_then_found() -> None:
    table = HostTable(100)
    buffer = put(table, "a", 40)
    found = table.lease("a", 40)
    assert found == Lease(key="a", buffer=buffer, fresh=False)
    assert (table.hits, table.reads, table.held_bytes) == (1, 1, 40)


def test_others_wait_while_an_expert_is_filled_and_then_share() -> None:
    table = HostTable(100)
    lease = table.lease("a", 40)
    assert lease is not None and lease.fresh
    assert table.lease("a", 40) is None
    table.complete(lease)
    second, third = table.lease("a", 40), table.lease("a", 40)
    assert second is not None and third is not None
    assert second.buffer == third.buffer == lease.buffer and not second.fresh
    assert table.reads == 1


def test_the_least_requested_expert_is_evicted_and_its_buffer_reused() -> None:
    table = HostTable(100)
    buffers = {key: put(table, key, 50) for key in "ab"}
    again = table.lease("a", 50)
    assert again is not None
    table.release(again)
    lease = table.lease("c", 50)
    assert lease == Lease(key="c", buffer=buffers["b"], fresh=True)


def test_of_equally_requested_experts_the_older_one_is_evicted() -> None:
    table = HostTable(3)
    for key in "cab":
        put(table, key, 1)
    put(table, "d", 1)
    assert list(map(str, table._entries)) == ["a", "b", "d"]


def test_old_requests_count_less_and_never_overflow() -> None:
    table = HostTable(2)
    for key in ("a",) * 20 + ("b", "c") * 3 + ("d",) * 60 + ("e",) * 3:
        request(table, key)
    assert set(table._entries) == {"d", "e"}, "twenty requests, but seven half-lives ago"
    for number in range(20_000):
        request(table, str(number % 3))
    table.check()


def test_evicted_experts_retain_their_request_counts() -> None:
    table = HostTable(2)
    for key in "aaaabc":
        request(table, key)
    assert set(table._entries) == {"a", "c"}
    request(table, "b")
    assert set(table._entries) == {"a", "b"}, "requested twice, c once"


def request(table: HostTable, key: str) -> None:
    lease = table.lease(key, 1)
    assert lease is not None
    if lease.fresh:
        table.complete(lease)
    table.release(lease)


def test_buffers_in_use_are_not_evicted() -> None:
    table = HostTable(100)
    one = filled(table, "a", 50)
    other = table.lease("b", 50)
    assert other is not None
    assert table.lease("c", 50) is None
    table.abandon(other)
    assert put(table, "c", 50) == other.buffer
    table.release(one)
    assert put(table, "d", 50) == one.buffer
    assert table.lease("c", 50) is not None and table.held_bytes == 100


def test_a_failed_expert_is_not_found_and_its_buffer_is_reused_first() -> None:
    table = HostTable(100)
    buffer = put(table, "a", 50)
    failed = table.lease("b", 50)
    assert failed is not None
    table.abandon(failed)
    table.check()
    again = table.lease("b", 50)
    assert again is not None and again.fresh and again.buffer == failed.buffer != buffer
    assert (table.reads, table.hits) == (1, 0)


def test_an_expert_of_another_size_drops_enough_buffers() -> None:
    table = HostTable(100)
    buffers = [put(table, key, 30) for key in "abc"]
    lease = table.lease("d", 60)
    assert lease is not None and lease.fresh and lease.buffer not in buffers
    assert lease.dropped == tuple(buffers[:2]) and table.held_bytes == 90
    table.complete(lease)
    table.release(lease)
    small = table.lease("e", 30)
    assert small is not None and small.buffer == buffers[2] and small.dropped == ()


def test_a_refused_lease_changes_nothing() -> None:
    table = HostTable(100)
    put(table, "a", 30)
    kept = filled(table, "b", 50)
    before = table.buffers
    assert table.lease("c", 60) is None
    assert table.buffers == before
    table.release(kept)
    with pytest.raises(AssertionError, match="101 bytes never fit into 100"):
        table.lease("d", 101)


class CacheMachine(RuleBasedStateMachine):
    """Random readers, compared with a model of the content."""

    fresh, whole = Bundle("fresh"), Bundle("whole")

    def __init__(self):
        super().__init__()
        self.table = HostTable(10)
        self.content: dict[int, str | None] = {}  # None: half-filled
        self.used: list[int] = []

    @rule(target=fresh, key=st.sampled_from("abcdefgh"))
    def request(self, key: str):
        lease = self.table.lease(key, 2 + ord(key) % 3)
        if lease is None:
            being_filled = key in self.table._entries
            assert being_filled or self.used, "an idle cache has space for any expert"
            return None
        for buffer in lease.dropped:
            assert buffer not in self.used
            del self.content[buffer]
        if lease.fresh:
            assert lease.buffer not in self.used, "overwritten while in use"
            self.content[lease.buffer] = None
        else:
            assert self.content[lease.buffer] == key
        self.used.append(lease.buffer)
        return lease

    @rule(target=whole, lease=consumes(fresh))
    def fill(self, lease: Lease | None):
        if lease is not None and lease.fresh:
            self.content[lease.buffer] = str(lease.key)
            self.table.complete(lease)
        return lease

    @rule(lease=consumes(fresh))
    def fail(self, lease: Lease | None) -> None:
        if lease is None:
            return
        self.used.remove(lease.buffer)
        if lease.fresh:
            self.table.abandon(lease)
        else:
            self.table.release(lease)

    @rule(lease=consumes(whole))
    def copied(self, lease: Lease | None) -> None:
        if lease is not None:
            assert self.content[lease.buffer] == lease.key
            self.table.release(lease)
            self.used.remove(lease.buffer)

    @invariant()
    def holds(self) -> None:
        self.table.check()
        assert self.table.buffers.keys() == self.content.keys()


TestHostTable = CacheMachine.TestCase
