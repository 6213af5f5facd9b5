import json
import os
from pathlib import Path
from typing import Any

import pytest

from moefit.errors import ConfigError
from moefit.plan.profile import RecordKind

KIND = RecordKind(
    name="card",
    version=3,
    version_at=("facts", "version"),
    make="draw one",
    again="draw it again",
    elsewhere="write elsewhere",
)
VALUES: dict[str, Any] = {"facts": {"version": 3}, "points": [1, 2]}


def points(values: Any) -> list[int]:
    return [int(one) for one in values["points"]]


def test_record_file_round_trips(tmp_path: Path) -> None:
    file = tmp_path / "a" / "card.json"
    KIND.write(VALUES, file)
    assert KIND.read(file, points) == [1, 2]
    KIND.write({**VALUES, "points": [5]}, file)
    assert KIND.read(file, points) == [5]
    assert [path.name for path in file.parent.iterdir()] == ["card.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not a card .*; draw it again"),
        (b"\xff\xfe", "is not a card"),
        (b"[" * 100_000, "is not a card"),
        (b"[]", "version None"),
        (b'{"facts": 3}', "version None"),
        (b'{"facts": {"version": 2}}', "version 2, and this moefit reads version 3; draw it"),
        (b'{"facts": {"version": 3}}', "a damaged card .*points"),
        (b'{"facts": {"version": 3}, "points": 3}', "a damaged card"),
        (b'{"facts": {"version": 3}, "points": ["x"]}', "a damaged card"),
    ],
)
def test_invalid_record_raises(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "card.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        KIND.read(file, points)


def test_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no card .*; draw one"):
        KIND.read(tmp_path / "none.json", points)


def test_failed_write_keeps_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "card.json"
    KIND.write(VALUES, file)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="No space left on device; write elsewhere"):
        KIND.write({}, file)
    assert json.loads(file.read_bytes()) == VALUES
    assert os.listdir(tmp_path) == ["card.json"]
