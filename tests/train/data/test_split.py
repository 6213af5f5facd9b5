from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.errors import DataError
from moefit.train.data.split import Split, is_held_out, split
from moefit.train.settings import DataConfig


def sides(division: Split) -> tuple[dict[str, str], dict[str, str]]:
    return (
        {d.name: d.text for d in division.train()},
        {d.name: d.text for d in division.held_out()},
    )


def folder_of(tmp_path: Path, count: int, text: str = "line\n" * 10) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(count):
        (folder / f"{n:03}.txt").write_text(text)
    return folder


def test_held_out_hash_is_stable() -> None:
    # These names are held out on every machine, for ever: changing them would mix old runs'
    # training text into new runs' evaluation.
    held_out = [n for n in range(200) if is_held_out(f"stdlib/{n}.py", 0.02)]
    assert held_out == [36, 62, 73, 74, 77, 174]


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_larger_fraction_only_adds_documents(name: str, a: float, b: float) -> None:
    assert is_held_out(name, min(a, b)) <= is_held_out(name, max(a, b))


def test_held_out_fraction_is_approximate() -> None:
    held = sum(is_held_out(f"doc {n}", 0.1) for n in range(5000))
    assert 400 < held < 600


def test_whole_documents_are_held_out_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 60)
    division = split(DataConfig(sources=(str(folder),), held_out_fraction=0.2))
    train, held_out = sides(division)
    assert division.rule == "name"
    assert len(train) + len(held_out) == 60
    assert not train.keys() & held_out.keys()
    assert set(held_out.values()) == {"line\n" * 10}
    assert sides(division) == (train, held_out)  # it can be read again

    (folder / "new.txt").write_text("more")
    again_train, again_held_out = sides(division)
    assert held_out.items() <= again_held_out.items()
    assert train.items() <= again_train.items()


def test_single_file_holds_out_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    text = "".join(f"line {n}\n" for n in range(1000))
    path.write_text(text)
    division = split(DataConfig(sources=(str(path),), held_out_fraction=0.1))
    train, held_out = sides(division)
    assert division.rule == "tail"
    head, tail = train["novel.txt"], held_out["novel.txt"]
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.1 <= len(tail) / len(text) < 0.11


def test_tail_without_line_break_is_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("title\n" + "x" * 994)
    train, held_out = sides(split(DataConfig(sources=(str(path),), held_out_fraction=0.1)))
    assert len(train["novel.txt"]) == 900
    assert len(held_out["novel.txt"]) == 100


def test_only_document_is_split_by_tail(tmp_path: Path) -> None:
    name = next(f"{n}.txt" for n in range(1000) if is_held_out(f"{n}.txt", 0.02))
    (tmp_path / name).write_text("line\n" * 100)
    division = split(DataConfig(sources=(str(tmp_path / name),)))
    assert division.rule == "tail"


def test_held_out_files_are_not_trained_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    data = DataConfig(sources=(str(folder),), held_out=(str(folder / "002.txt"),))
    train, held_out = sides(split(data))
    assert list(train) == ["texts/000.txt", "texts/001.txt", "texts/003.txt"]
    assert list(held_out) == ["002.txt"]
    everything = DataConfig(sources=(str(folder),), held_out=(str(folder),))
    with pytest.raises(DataError, match=r"outside .*texts"):
        split(everything)


@pytest.mark.parametrize("rule", ["sources", "name", "tail"])
def test_max_bytes_truncates_training_text(tmp_path: Path, rule: str) -> None:
    folder = folder_of(tmp_path, 60, text="é\n" * 50)  # 150 bytes each
    (tmp_path / "other").mkdir()
    other = folder_of(tmp_path / "other", 60)
    data = DataConfig(
        sources=(str(folder),),
        held_out=(str(other),) if rule == "sources" else (),
        held_out_fraction=0.2 if rule != "tail" else 0.002,
        max_bytes=2002,
    )
    division = split(data)
    assert division.rule == rule
    train, evaluated = sides(division)
    size = sum(len(text.encode()) for text in train.values())
    if rule == "tail":
        size += sum(len(text.encode()) for text in evaluated.values())
    assert 2000 < size <= 2002
    assert sum(len(text.encode()) for text in evaluated.values()) <= 2002
    assert evaluated


def test_too_little_text_to_split_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(DataError, match="too little text to split: nothing is left to train on"):
        split(DataConfig(sources=(str(path),)))


def test_real_standard_library() -> None:
    division = split(DataConfig(max_bytes=300_000))
    train, held_out = sides(division)
    total = sum(len(text.encode()) for text in train.values())
    assert 290_000 < total <= 300_000
    assert all(name.startswith("stdlib/") for name in [*train, *held_out])
    assert held_out
