"""Files of prefixes: found by content, whole or not at all, within their limit."""

import logging
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.prefix.store import PrefixStore
from moefit.engine.prefix.tree import Prefix
from moefit.errors import CheckpointError, ConfigError

FINGERPRINT, CHUNK, SIZE = "ab" * 16, 4, 100
TEXT = Prefix(namespace="n", tokens=range(12))
HEAD = 80


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


@pytest.fixture
def store(tmp_path):
    store = PrefixStore(tmp_path / "cache", 10_000, FINGERPRINT)
    yield store
    store.close()


def reopened(store: PrefixStore, folder, limit: int = 10_000, fingerprint: str = FINGERPRINT):
    store.close()
    return PrefixStore(folder / "cache", limit, fingerprint)


def test_files_survive_a_restart(store, tmp_path) -> None:
    keys = store.keys(TEXT, CHUNK)
    assert len(keys) == 3 and store.known(keys) == 0
    for number, key in enumerate(keys):
        assert store.write(key, content(number))
    again = reopened(store, tmp_path)
    assert again.keys(TEXT, CHUNK) == keys and again.known(keys) == 3
    assert [again.read(key, SIZE) for key in keys] == [content(n) for n in range(3)]
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in (tmp_path / "cache").glob("*/*")} == {0o600}
    again.close()


@given(st.lists(st.integers(0, 3), max_size=14), st.lists(st.integers(0, 3), max_size=14))
def test_names_are_equal_if_texts_are(tmp_path_factory, one, other) -> None:
    store = PrefixStore(tmp_path_factory.mktemp("names"), 1, FINGERPRINT)
    store.close()
    names = [store.keys(Prefix(namespace="n", tokens=text), CHUNK) for text in (one, other)]
    for index, (a, b) in enumerate(zip(*names, strict=False), start=1):
        assert (a == b) == (one[: index * CHUNK] == other[: index * CHUNK])
    apart = store.keys(Prefix(namespace="m", tokens=one), CHUNK)
    assert not set(apart) & set(names[0])


def test_least_recently_used_files_are_removed(store, tmp_path) -> None:
    keys = store.keys(TEXT, CHUNK)
    for number, key in enumerate(keys):
        store.write(key, content(number))
    store.use(keys)  # of a text the first chunk counts as used last
    again = reopened(store, tmp_path, 2 * (SIZE + HEAD))
    assert [again.known([key]) for key in keys] == [1, 1, 0]
    (other,) = again.keys(Prefix(namespace="n", tokens=[9] * 4), CHUNK)
    assert again.write(other, content(9))
    assert [again.known([key]) for key in (*keys, other)] == [1, 0, 0, 1]
    assert not again.write(keys[2], bytes(10_000)), "larger than the limit"
    again.check()
    again.close()


def test_files_of_other_models_make_room_first(store, tmp_path) -> None:
    (key, *_) = store.keys(TEXT, CHUNK)
    store.write(key, content(1))
    other = reopened(store, tmp_path, fingerprint="cd" * 16)
    assert other.stats().files == 1 and other.known([key]) == 0
    assert not set(other.keys(TEXT, CHUNK)) & {key}
    other.close()


def damage(path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[HEAD + 5] ^= 1
    elif kind == "short":
        del data[-1:]
    elif kind == "header":
        del data[40:]
    elif kind == "version":
        data[:8] = b"moefit.0"
    elif kind == "other":
        data[8] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flipped", "short", "header", "version", "other"])
def test_damaged_files_are_not_used(tmp_path, caplog, kind) -> None:
    store = PrefixStore(tmp_path / "cache", 10_000, FINGERPRINT)
    (key, *_) = store.keys(TEXT, CHUNK)
    store.write(key, content(1))
    (path,) = (tmp_path / "cache").glob("*/*.kv")
    damage(path, kind)
    again = reopened(store, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert again.read(key, SIZE) is None
    assert "is not used" in caplog.text and not path.exists()
    assert again.known([key]) == 0 and again.stats().damaged == 1
    assert again.write(key, content(1)) and again.read(key, SIZE) == content(1)
    assert again.read(key, SIZE + 1) is None, "of another layout"
    again.check()
    again.close()


def test_foreign_files_are_left_alone(tmp_path, caplog) -> None:
    folder = tmp_path / "cache" / FINGERPRINT
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder.parent / "photo.jpg").write_text("mine")
    partial = folder / f"{'0' * 64}.partial"
    partial.write_text("cut")
    with caplog.at_level(logging.WARNING):
        store = PrefixStore(tmp_path / "cache", 10, FINGERPRINT)
    assert "2 entries that are not of moefit, such as notes.txt" in caplog.text
    assert store.stats().files == 0 and not partial.exists()
    assert (folder / "notes.txt").read_text() == "mine"
    store.close()


def put(path, kind: str, target) -> None:
    """Make an entry that is not a regular file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)


@pytest.mark.parametrize("suffix", [".kv", ".partial"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_entries_that_are_no_files(tmp_path, caplog, kind, suffix) -> None:
    path = tmp_path / "cache" / FINGERPRINT / f"{'0' * 64}{suffix}"
    put(path, kind, tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        store = PrefixStore(tmp_path / "cache", 10_000, FINGERPRINT)
    assert f"1 entries that are not of moefit, such as {path.name}" in caplog.text
    assert store.stats().files == 0 and os.path.lexists(path)
    store.close()


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_files_that_are_replaced_by_others(store, tmp_path, kind) -> None:
    (key, *_) = store.keys(TEXT, CHUNK)
    store.write(key, content(1))
    (path,) = (tmp_path / "cache").glob("*/*.kv")
    whole = path.rename(tmp_path / "elsewhere")
    put(path, kind, whole)
    assert store.read(key, SIZE) is None and store.known([key]) == 0, "and does not wait for ever"


def test_links_are_not_written_through(store, tmp_path) -> None:
    (key, *_) = store.keys(TEXT, CHUNK)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "cache" / FINGERPRINT / f"{key}.partial").symlink_to(precious)
    assert store.write(key, content(1)) and store.read(key, SIZE) == content(1)
    assert precious.read_text() == "mine"
    store.check()
    other = tmp_path / "other"
    other.mkdir()
    (other / FINGERPRINT).symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="is a link to another folder"):
        PrefixStore(other, 10_000, FINGERPRINT)


def test_folders_that_exist_keep_their_permissions(tmp_path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    PrefixStore(tmp_path / "cache", 10_000, FINGERPRINT).close()
    assert (tmp_path / "cache").stat().st_mode & 0o7777 == 0o1777
    assert (tmp_path / "cache" / FINGERPRINT).stat().st_mode & 0o7777 == 0o700


def test_one_server_at_a_time(store, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--prefix-cache-dir of its own"):
        PrefixStore(tmp_path / "cache", 10, FINGERPRINT)


def test_unusable_folder(tmp_path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CheckpointError, match="--prefix-cache-dir"):
        PrefixStore(tmp_path / "cache", 10, FINGERPRINT)


def test_full_disks_are_logged_once(store, tmp_path, caplog, monkeypatch) -> None:
    def full(*_args):
        raise OSError(28, "No space left on device")

    keys = store.keys(TEXT, CHUNK)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("pathlib.Path.replace", full)
        assert not store.write(keys[0], content(0)) and not store.write(keys[1], content(1))
    assert caplog.text.count("No space left") == 1
    assert not list((tmp_path / "cache").glob("*/*.partial"))
    assert store.write(keys[0], content(0))
    store.check()
