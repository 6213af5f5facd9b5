"""Direct reads give a file's bytes at any offset, size and address, or give up."""

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moefit.checkpoint import direct_file
from moefit.checkpoint.direct_file import ALIGNMENT, BOUNCE, LEAST, DirectFile

SIZE = 2 * BOUNCE + 3 * ALIGNMENT + 77


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def descriptor(tmp_path: Path, content: bytes) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(content)
    found = os.open(path, os.O_RDONLY)
    yield found
    os.close(found)


def needs_direct_reads(descriptor: int) -> None:
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offset=st.one_of(
        st.integers(0, SIZE), st.integers(0, SIZE // ALIGNMENT).map(ALIGNMENT.__mul__)
    ),
    size=st.integers(0, SIZE),
    shift=st.sampled_from([0, 0, 1, 512, 4095]),
)
def test_bytes_are_those_of_the_file(
    descriptor: int, content: bytes, offset: int, size: int, shift: int
) -> None:
    memory = memoryview(mmap.mmap(-1, SIZE + ALIGNMENT))[shift : shift + size]
    with closing(DirectFile(descriptor)) as file:
        done = file.read(offset, memory)
    assert memory[:done] == content[offset : offset + done]
    assert done == 0 or size >= LEAST


def test_a_whole_span_is_read_directly_however_it_is_aligned(
    descriptor: int, content: bytes
) -> None:
    needs_direct_reads(descriptor)
    with closing(DirectFile(descriptor)) as file:
        for offset, size, shift in ((0, 2 * BOUNCE, 0), (13, 2 * BOUNCE, 7), (ALIGNMENT, LEAST, 3)):
            memory = memoryview(mmap.mmap(-1, SIZE + ALIGNMENT))[shift : shift + size]
            assert file.read(offset, memory) == size
            assert memory == content[offset : offset + size]


def test_the_end_of_the_file_ends_a_read(descriptor: int, content: bytes) -> None:
    needs_direct_reads(descriptor)
    for shift in (0, 1):
        memory = memoryview(mmap.mmap(-1, 2 * SIZE))[shift:SIZE]
        with closing(DirectFile(descriptor)) as file:
            done = file.read(SIZE - SIZE % ALIGNMENT - BOUNCE, memory)
        assert done == BOUNCE + SIZE % ALIGNMENT
        assert memory[:done] == content[-done:]


def test_small_reads_are_left_to_others(descriptor: int) -> None:
    with closing(DirectFile(descriptor)) as file:
        assert file.read(0, memoryview(bytearray(LEAST - 1))) == 0


def test_a_failure_ends_direct_reads(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(*arguments: object) -> int:
        calls.append(arguments)
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(direct_file.os, "preadv", fail)
    with closing(DirectFile(descriptor)) as file:
        assert file.read(0, memoryview(bytearray(2 * LEAST))) == 0
        assert file.read(0, memoryview(bytearray(2 * LEAST))) == 0
    assert len(calls) <= 1


def test_a_closed_file_is_not_opened_again(descriptor: int) -> None:
    file = DirectFile(descriptor)
    file.close()
    assert file.read(0, memoryview(bytearray(2 * LEAST))) == 0
