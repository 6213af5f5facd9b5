"""What is saved of a text when files have room for a part of it."""

from contextlib import contextmanager
from dataclasses import replace

from moefit.engine.prefix.disk import PrefixDisk
from moefit.engine.prefix.store import PrefixStore, file_size
from moefit.engine.prefix.tree import Prefix

CHUNK, SIZE = 4, 100


class Pool:
    """Has keys and values of all texts."""

    def copy_out(self, prefix: Prefix, start: int, stop: int) -> bytearray:
        return bytearray(SIZE)

    def copy_in(self, request: str, start: int, content: bytearray) -> bool:
        return True

    def loaded(self, request: str) -> None:
        pass


def text(chunks: int, first: int = 0) -> Prefix:
    return Prefix(namespace="n", tokens=range(first, first + chunks * CHUNK), durable=True)


@contextmanager
def started(folder, files: int):
    store = PrefixStore(folder, files * file_size(SIZE), "ab" * 16)
    disk = PrefixDisk(store, CHUNK, SIZE, Pool(), lambda act: act())
    disk.start()

    def save(prefix: Prefix) -> int:
        disk.save(prefix)
        assert disk.settle(10)
        return disk.stats().written // CHUNK

    yield lambda prefix: store.known(store.keys(prefix, CHUNK)), save
    store.check()
    disk.close(10)


def test_a_long_text_is_saved_from_its_beginning(tmp_path) -> None:
    with started(tmp_path, files=5) as (known, save):
        assert save(text(10)) == 5 and known(text(10)) == 5
        assert save(text(10)) == 5, "nothing is written again"


def test_texts_that_wait_are_bounded_by_their_tokens(tmp_path) -> None:
    store = PrefixStore(tmp_path, 10 * file_size(SIZE), "ab" * 16)
    disk = PrefixDisk(store, CHUNK, SIZE, Pool(), lambda act: act())
    long = [replace(text(1), tokens=range(n, n + 600_000)) for n in range(3)]
    for one in long:
        disk.save(one)
    assert list(disk._saves) == long[2:], "the thread is not running"
    disk.close(0)


def test_a_continued_text_makes_room_with_others(tmp_path) -> None:
    with started(tmp_path, files=5) as (known, save):
        save(text(3))
        save(text(2, first=1000))
        assert save(text(4)) == 6
        assert known(text(4)) == 4 and known(text(2, first=1000)) == 1
