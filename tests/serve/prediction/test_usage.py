"""Use counts are kept for the next start of the same checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from tiny_served import saved, settled, tiny, tokens, with_slots

from moefit.errors import CheckpointError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.serve.packed.kept import entries, unneeded
from moefit.serve.prediction.usage import UsageFile, kept_usage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loaded(folder: Path, slots: int = 3) -> ServedModel:
    served = load_model(folder, LoadSettings(context=64, memory="4GiB"))
    served.set_memory(with_slots(served, slots))
    return served


@torch.inference_mode()
def run(served: ServedModel) -> None:
    served.model(input_ids=tokens(1, 40), use_cache=False)


def test_a_restart_begins_with_the_experts_used_most(folders) -> None:
    with loaded(folders("Mixtral")) as served, kept_usage(served) as remark:
        assert remark == ""
        run(served)
        counts = served.use_counts()
    best = {
        name: sorted(range(8), key=lambda one, row=row: (-row[one], one))[:3]
        for name, row in counts.items()
    }
    with loaded(folders("Mixtral")) as served, kept_usage(served) as remark:
        assert "earlier runs" in remark
        settled(served)
        with served.isolated(served.policy):  # publishes what has been loaded
            pass
        assert served.report()["resident"] == {name: sorted(one) for name, one in best.items()}
        served.check()
        run(served)
        file = UsageFile.of(served)
    found = json.loads(file.path.read_text())["counts"]
    assert found == {name: [1.5 * one for one in row] for name, row in counts.items()}
    (entry,) = entries()
    assert entry.contents == ("use counts",) and not unneeded([entry])


def test_saves_while_serving(folders) -> None:
    with loaded(folders("Mixtral")) as served, kept_usage(served, every=0.01):
        file = UsageFile.of(served)
        assert file.read(dict.fromkeys(served.blocks, 8)) is None
        run(served)
        while not file.path.is_file():
            torch.zeros(1)
        assert file.read(dict.fromkeys(served.blocks, 8)) == served.use_counts()


def test_counts_of_another_checkpoint_are_refused(folders, tmp_path: Path) -> None:
    other = saved(tiny("Mixtral", seed=5), tmp_path / "other")
    with loaded(other) as served, kept_usage(served):
        run(served)
        theirs = UsageFile.of(served).path
    with loaded(folders("Mixtral")) as served:
        mine = UsageFile.of(served)
        assert mine.path != theirs
        mine.path.parent.mkdir(parents=True)
        mine.path.write_bytes(theirs.read_bytes())
        with pytest.raises(CheckpointError, match=r"another checkpoint .*other"):
            mine.read(dict.fromkeys(served.blocks, 8))
        with kept_usage(served) as remark:
            assert "it is not used" in remark
            assert not any(served.report()["resident"].values())
            run(served)
        assert mine.read(dict.fromkeys(served.blocks, 8)) == served.use_counts()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 9}', "\xff"])
def test_damaged_files_are_not_used(folders, content: str) -> None:
    with loaded(folders("Mixtral")) as served:
        file = UsageFile.of(served)
        file.path.parent.mkdir(parents=True)
        file.path.write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError):
            file.read(dict.fromkeys(served.blocks, 8))
        good = {"version": 1, "fingerprint": file._fingerprint, "source": "x"}
        for counts in ({"a": [1.0] * 8}, {n: [1.0] * 7 for n in served.blocks}, 3):
            file.path.write_text(json.dumps(good | {"counts": counts}))
            with pytest.raises(CheckpointError, match="this model's experts"):
                file.read(dict.fromkeys(served.blocks, 8))
