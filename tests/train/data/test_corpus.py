import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from moefit.errors import DataError
from moefit.train.data.corpus import Document, documents
from moefit.train.data.sources import parts


def read(*sources: object, text_key: str = "text", excluding: tuple[str, ...] = ()) -> dict:
    found = list(documents([str(s) for s in sources], text_key=text_key, excluding=excluding))
    assert len({d.name for d in found}) == len(found)
    return {d.name: d.text for d in found}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "novels"
    for name in ("b.txt", "a.MD", "sub/c.rst", "sub/a.py", ".git/x.txt", ".hidden.txt", "z.pdf"):
        write(folder / name, f"text of {name}\r\n")
    write(folder / "empty.txt", "")
    names = list(read(folder))
    assert names == ["novels/a.MD", "novels/b.txt", "novels/sub/a.py", "novels/sub/c.rst"]
    assert read(folder)["novels/b.txt"] == "text of b.txt\r\n"


def test_names_do_not_depend_on_spelling_of_folder(tmp_path, monkeypatch) -> None:
    write(tmp_path / "novels" / "a.txt", "x")
    monkeypatch.chdir(tmp_path / "novels")
    assert read(".") == read(tmp_path / "novels") == read("../novels/") == {"novels/a.txt": "x"}
    assert read("a.txt") == {"a.txt": "x"}


def test_linked_folder_keeps_its_name(tmp_path: Path) -> None:
    write(tmp_path / "store" / "v17" / "a.txt", "x")
    (tmp_path / "novels").symlink_to(tmp_path / "store" / "v17")
    assert read(tmp_path / "novels") == {"novels/a.txt": "x"}


def test_file_in_two_sources_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "novels"
    emma = write(folder / "emma.txt", "Emma")
    write(folder / "other.txt", "Other")
    assert list(read(folder, emma)) == ["novels/emma.txt", "novels/other.txt"]
    assert list(read(folder, excluding=(str(emma),))) == ["novels/other.txt"]


def test_byte_order_mark_is_removed(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == {"a.txt": "hello"}


def test_jsonl_rows_are_named_by_line(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "", '{"text": null}', '{"text": "fo\\nur", "id": 3}']
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    assert read(path) == {"rows.jsonl:1": "one", "rows.jsonl:4": "fo\nur"}
    assert read(write(tmp_path / "d" / "k.jsonl", '{"body": "b"}'), text_key="body") == {
        "k.jsonl:1": "b"
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": ', "is not JSON"),
        ('["text"]', "contains a JSON list, but JSONL has one object per line"),
        ('{"texts": "x", "id": 1}', "has no 'text' (data.text_key); it has texts, id; give data."),
        ("{}", "it has nothing; leave it out"),
        ('{"text": 7}', "'text' is of type int, not text"),
        ('{"text": "a\\ud800"}', "character 1 of 'text' is a lone surrogate"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}, line 2" in str(caught.value)
    assert said in str(caught.value)


def test_invalid_utf8_error_names_file_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", "caf\xe9 noir".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 3 is 0xe9.*iconv"):
        read(path)
    rows = write(tmp_path / "rows.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"line 2 is not UTF-8: byte 24 is 0xe9"):
        read(rows)


def test_missing_path_suggests_similar_names(tmp_path: Path) -> None:
    write(tmp_path / "novels" / "Austen_Emma.txt", "x")
    with pytest.raises(DataError, match=r"nearest names in .*novels are: Austen_Emma\.txt"):
        read(tmp_path / "novels" / "Austen_Ema.txt")
    with pytest.raises(DataError, match=rf"nearest names in {tmp_path} are: novels"):
        read(tmp_path / "novel" / "deeper" / "x.txt")
    with pytest.raises(DataError, match=r"does not exist; .* contains novels"):
        read(tmp_path / "qqqq")
    with pytest.raises(DataError, match="did you mean 'stdlib'"):
        read("stdlb")
    with pytest.raises(DataError, match="cannot be accessed"):
        read(tmp_path / ("x" * 5000))


def test_unsupported_files_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown extension \.pdf.*\.jsonl.*rename it to 'a\.txt'"):
        read(write(tmp_path / "a.pdf", "x"))
    with pytest.raises(DataError, match="has no extension"):
        read(write(tmp_path / "README", "x"))
    folder = tmp_path / "papers"
    write(folder / "a.pdf", "x")
    write(folder / "b.pdf", "x")
    with pytest.raises(DataError, match=r"contains 2 \.pdf, but no .* supported type \(\.txt"):
        read(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="contains nothing, but"):
        read(tmp_path / "nothing")


def test_empty_corpus_raises(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "")
    with pytest.raises(DataError, match=r"no text in .*a\.txt; give a file or folder"):
        read(path)
    full = write(tmp_path / "b.txt", "x")
    with pytest.raises(DataError, match=r"no text in .*b\.txt outside .*b\.txt"):
        read(full, excluding=(str(full),))
    with pytest.raises(DataError, match="an empty list of sources"):
        read()


def test_disappearing_file_raises(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a.txt", "x")

    def gone(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", gone)
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(Permission denied\)"):
        read(path)


def test_standard_library_source() -> None:
    (found,) = parts(["stdlib"])
    names = [part.name for part in found]
    assert names == sorted(names)
    assert "stdlib/asyncio/base_events.py" in names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    first = next(documents(["stdlib"], text_key="text"))
    assert isinstance(first, Document)
    assert first.name.startswith("stdlib/")


def test_wrongly_encoded_standard_library_files_are_skipped(tmp_path, monkeypatch) -> None:
    write(tmp_path / "good.py", "x = 1\n")
    write(tmp_path / "bad.py", b"\xff")
    write(tmp_path / "site-packages" / "p.py", "y = 1\n")
    monkeypatch.setattr("moefit.train.data.sources.sysconfig.get_path", lambda name: str(tmp_path))
    assert read("stdlib") == {"stdlib/good.py": "x = 1\n"}


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs moefit[datasets]")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), path)
    assert read(path) == {"t.parquet:1": "one", "t.parquet:3": "three"}
    with pytest.raises(DataError, match=r"has no 'txt'.*it has text, n; give data\.text_key=text"):
        read(path, text_key="txt")
    with pytest.raises(DataError, match="row 1: 'n' is of type int"):
        read(path, text_key="n")
    with pytest.raises(DataError, match="is not sound Parquet"):
        read(write(tmp_path / "broken.parquet", "not parquet at all"))


@pytest.mark.parametrize("source", ["t.parquet", "hf:some/set"])
def test_missing_extra_names_install_command(tmp_path, monkeypatch, source: str) -> None:
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    write(tmp_path / "t.parquet", "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"not installed; run `pip install 'moefit\[datasets\]'`"):
        read(source)


class FakeRows(list):
    column_names = ("text", "id")

    def select_columns(self, names: list[str]) -> list[dict]:
        return [{name: row[name] for name in names} for row in self]


def test_hub_dataset(monkeypatch) -> None:
    class DatasetsError(Exception):
        pass

    def load_dataset(path: str, name: str | None = None, *, split: str) -> FakeRows:
        if path != "org/set" or name not in (None, "v1-raw"):
            raise DatasetsError("no such dataset")
        which = f"{name} {split}" if name else split
        return FakeRows([{"text": f"{which} {n}", "id": n} for n in range(2)])

    fake = ModuleType("datasets")
    vars(fake).update(
        load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError)
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read("hf:org/set") == {"hf:org/set:train:1": "train 0", "hf:org/set:train:2": "train 1"}
    assert list(read("hf:org/set:test", "hf:org/set:test")) == [
        "hf:org/set:test:1",
        "hf:org/set:test:2",
    ]
    assert read("hf:org/set@v1-raw") == {
        "hf:org/set@v1-raw:train:1": "v1-raw train 0",
        "hf:org/set@v1-raw:train:2": "v1-raw train 1",
    }
    both = read("hf:org/set@v1-raw:test", "hf:org/set:test", excluding=("hf:org/set:test",))
    assert list(both.values()) == ["v1-raw test 0", "v1-raw test 1"]
    with pytest.raises(DataError, match="'org/set' with configuration 'v2', split 'x' cannot be"):
        read("hf:org/set@v2:x")
    with pytest.raises(DataError, match="'org/sat' with split 'train' cannot be loaded: no such"):
        read("hf:org/sat")
    with pytest.raises(DataError, match="it has text, id"):
        read("hf:org/set", text_key="body")
    with pytest.raises(DataError, match="names no dataset; write hf:DATASET"):
        read("hf:")
    with pytest.raises(DataError, match=r"names no dataset; .* hf:DATASET@CONFIG"):
        read("hf:@v1-raw")
    with pytest.raises(DataError, match="names no configuration; write hf:DATASET"):
        read("hf:org/set@:test")


def test_jsonl_round_trips(tmp_path: Path) -> None:
    texts = ["Zoë\u2028line", "\x00", "日本語\n\ttab", "<|endoftext|>"]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert list(read(path).values()) == texts
