"""Runs from CSV files: what is left out, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from moefit.advise.runs import read_runs
from moefit.errors import ConfigError, DataError


def table(folder: Path, *rows: str, header: str = "name,parameters,tokens,experts,loss") -> Path:
    path = folder / "runs.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_nan_and_diverged_runs_are_left_out_by_name(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "good,1e6,1e8,4,3.5,",
        "nan,1e6,1e8,4,nan,",
        "infinite,1e6,1e8,4,inf,",
        "missing,1e6,1e8,4,,",
        "blown-up,1e6,1e8,4,9.5,true",
        header="name,parameters,tokens,experts,loss,diverged",
    )
    runs = read_runs([path])
    assert [one.name for one in runs.used] == ["good"]
    assert runs.left_out == {
        "nan": "its loss is nan",
        "infinite": "its loss is inf",
        "missing": "its loss is missing",
        "blown-up": "it diverged",
    }


def test_runs_of_one_name_are_told_apart_by_line(tmp_path: Path) -> None:
    path = table(tmp_path, "a,1e6,1e8,4,3.5", "a,2e6,1e8,4,nan", "a,3e6,1e8,4,3.2", "b,1e6,1e8,4,3")
    runs = read_runs([path], drop=["a, line 4"])
    assert [one.name for one in runs.used] == ["a, line 2", "b"]
    assert list(runs.left_out) == ["a, line 3", "a, line 4"]
    with pytest.raises(ConfigError, match="no such run; names are such as a, line 2, a, line 3"):
        read_runs([path], drop=["a"])


def test_files_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbfparameters,tokens,loss\n1e6,1e8,3.5\n")
    assert read_runs([path]).used[0].loss == 3.5


def test_columns_may_have_other_names_and_files_may_be_compressed(tmp_path: Path) -> None:
    text = "N,D,L\n1e6,1e8,3.5\n2e6,1e8,3.25\n"
    path = tmp_path / "runs.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    columns = {"parameters": "N", "tokens": "D", "loss": "L"}
    runs = read_runs([path], columns=columns, drop=["line 3"])
    assert [(one.parameters, one.experts, one.loss) for one in runs.used] == [(1e6, 1.0, 3.5)]
    assert list(runs.left_out) == ["line 3"]
    assert runs.points.tokens.tolist() == [1e8]
    with pytest.raises(ConfigError, match="there is no such run; names are such as line 2, line 3"):
        read_runs([path], columns=columns, drop=["line 9"])


@pytest.mark.parametrize("quantity", ["tokenizer", "data"])
def test_runs_of_different_tokenizers_or_texts_are_refused(quantity: str, tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "a,1e6,1e8,4,3.5,gpt2",
        "b,2e6,1e8,4,3.4,llama",
        "c,2e6,2e8,4,3.3,gpt2",
        header=f"name,parameters,tokens,experts,loss,{quantity}",
    )
    with pytest.raises(DataError, match=rf"differ in {quantity}: gpt2 \(2 runs.*llama \(1 runs"):
        read_runs([path])


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        (["a,1e6,1e8"], "name,parameters,tokens", "no column 'loss' for loss; it has name"),
        (["a,many,1e8,1,3"], None, "line 2: parameters is 'many', not a number"),
        (["a,1e6,-1,1,3"], None, "line 2: tokens is -1; it must be positive"),
        (["a,1e6,1e8,0,3"], None, "line 2: experts is 0; the least is 1"),
        ([], None, "has no runs"),
        (["1e6,1e8,3,4"], "parameters,tokens,loss,loss", "has 2 columns 'loss'"),
    ],
)
def test_tables_that_are_no_runs(
    rows: list[str], header: str | None, words: str, tmp_path: Path
) -> None:
    path = table(tmp_path, *rows, header=header or "name,parameters,tokens,experts,loss")
    with pytest.raises(DataError, match=words):
        read_runs([path])


def test_paths_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_runs([tmp_path / "none.csv"])
    damaged = bytearray(gzip.compress(b"parameters,tokens,loss\n" * 9))
    damaged[12:16] = b"\xff" * 4
    (tmp_path / "damaged.csv.gz").write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_runs([tmp_path / "damaged.csv.gz"])
    with pytest.raises(DataError, match="is given 2 times"):
        read_runs([tmp_path, tmp_path])
    with pytest.raises(DataError, match="is not a finished run of `moefit train`"):
        read_runs([tmp_path])


def test_a_run_without_a_checkpoint_is_left_out(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 10\n")
    runs = read_runs([run])
    assert not runs.used
    assert runs.left_out == {str(run): "it has no checkpoint yet"}


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([3.0, 3.2], "it has no checkpoint yet"),
        ([3.0, 9.0], "it diverged: its loss rose from 3.000 to 9.000 nats"),
        ([3.0, float("nan")], "it diverged: its held-out loss is not finite"),
        ([None], "it diverged: its held-out loss is not finite"),
    ],
)
def test_a_run_that_diverged_before_its_first_checkpoint(
    tmp_path: Path, losses: list, reason: str
) -> None:
    (tmp_path / "config.yaml").write_text("steps: 10\n")
    lines = [
        json.dumps({"kind": "eval", "step": step, "loss": loss}) for step, loss in enumerate(losses)
    ]
    half = '{"kind": "train", "st'  # as a live run may have written
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, half]))
    assert read_runs([tmp_path]).left_out == {str(tmp_path): reason}


def test_a_run_that_says_that_it_diverged(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 10\n")
    last = {"kind": "diverged", "step": 3, "reason": "loss nan"}
    (tmp_path / "log.jsonl").write_text(json.dumps(last) + "\n")
    assert read_runs([tmp_path]).left_out == {str(tmp_path): "it diverged at step 3: loss nan"}


def test_unreadable_files_of_a_run_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: [10\n")
    with pytest.raises(DataError, match=r"is not a finished run .*it is not YAML"):
        read_runs([tmp_path])
    (tmp_path / "config.yaml").write_text("steps: 10\n")
    (tmp_path / "log.jsonl").write_text('{"kind": \n{"kind": "train", "step": 1}\n')
    with pytest.raises(DataError, match="is not a finished run"):
        read_runs([tmp_path])


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("steps: 10\n")
    with pytest.raises(DataError, match=r"it contains 2, such as .*: give .*/config\.yaml"):
        read_runs([tmp_path])
