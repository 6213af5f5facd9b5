"""Use counts are kept for the next start of the same checkpoint."""

import json
import os
import time
from pathlib import Path
from unittest import mock

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


def test_without_counts_no_slot_stays_empty(folders) -> None:
    with loaded(folders("Mixtral")) as served, kept_usage(served) as remark:
        assert remark == ""
        settled(served)
        with served.isolated(served.policy):  # publishes what has been loaded
            pass
        assert all(len(one) == 3 for one in served.report()["resident"].values())
        assert not any(map(sum, served.use_counts().values()))
        served.check()


def test_saves_while_serving(folders) -> None:
    with loaded(folders("Mixtral")) as served, kept_usage(served, every=0.01):
        file = UsageFile.of(served)
        assert file.read(dict.fromkeys(served.blocks, 8)) is None
        run(served)
        deadline = time.monotonic() + 30  # the first save may fall into the pass
        while file.read(dict.fromkeys(served.blocks, 8)) != served.use_counts():
            assert time.monotonic() < deadline, "the counts were not saved"
            time.sleep(0.01)


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
        every = (10**400, -1, True, float("inf"), float("nan"), 1e300, "1", None)
        for counts in (
            {"a": [1.0] * 8},
            {n: [1.0] * 7 for n in served.blocks},
            3,
            *({n: [value] * 8 for n in served.blocks} for value in every),
        ):
            file.path.write_text(json.dumps(good | {"counts": counts}))
            with pytest.raises(CheckpointError, match="this model's experts"):
                file.read(dict.fromkeys(served.blocks, 8))
            with kept_usage(served) as remark:
                assert "it is not used" in remark


def test_a_file_that_cannot_be_used_stops_no_server(folders, monkeypatch, caplog) -> None:
    with loaded(folders("Mixtral")) as served:
        path = UsageFile.of(served).path
        path.mkdir(parents=True)  # a folder in its place
        with kept_usage(served) as remark:
            assert "cannot be read" in remark
            run(served)
        assert os.listdir(path.parent) == [path.name]
        assert "use counts are not kept" in caplog.text
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home folder")))
        with kept_usage(served) as remark:
            assert "use counts are not kept: RuntimeError: no home folder" in remark
            run(served)


def test_present_use_prevails_over_counts_of_earlier_runs(folders) -> None:
    """However many tokens the counts are of, others that are chosen now replace them soon."""
    with load_model(
        folders("Mixtral"), LoadSettings(context=64, memory="4GiB", mode="virtual")
    ) as served:
        served.set_memory(with_slots(served, 3))
        experts = next(iter(served.blocks.values()))
        served.warm_start({name: [0.0] * 5 + [1e9, 2e9, 3e9] for name in served.blocks})
        settled(served)
        experts.swaps.publish()
        assert sorted(experts.slot_table.residents) == [5, 6, 7]
        run(served)
        for _ in range(6):
            settled(served)
            with torch.inference_mode():
                served.model(input_ids=tokens(1, 1), use_cache=False)
        scores = experts.importance.scores()
        best = max(range(8), key=scores.__getitem__)
        assert best not in (5, 6, 7) and best in experts.slot_table.residents
