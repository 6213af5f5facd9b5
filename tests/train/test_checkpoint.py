import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError
from moefit.train import checkpoint
from moefit.train.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def parts():
    config = DsMoeConfig(vocab_size=300, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return DsMoeForCausalLM(config), train_bpe(["some text", "more text"], 300)


def snapshot(parts, step):
    model, tokenizer = parts
    state = {"optimizer": {"x": torch.ones(3)}, "rng": torch.get_rng_state(), "seconds": 1.0}
    return checkpoint.Snapshot(step=step, model=model, tokenizer=tokenizer, state=state)


def test_keeps_newest_checkpoints(tmp_path, parts):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, snapshot(parts, step), keep=2)
    found = checkpoint.checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-00000002", "step-00000010"]
    state = checkpoint.load_state(found[-1])
    assert state["step"] == 10
    assert torch.equal(state["optimizer"]["x"], torch.ones(3))


def test_incomplete_checkpoint_is_ignored(tmp_path, parts):
    checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)
    building = tmp_path / ".step-00000002.building"
    building.mkdir()
    (building / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, snapshot(parts, 2), keep=2)
    assert not building.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damaged_file_is_named(tmp_path, parts, name, damage):
    folder = checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)
    content = bytearray((folder / name).read_bytes())
    if damage == "gone":
        (folder / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content[:-1] if damage == "truncated" else content)
    with pytest.raises(CheckpointError, match=f"damaged: {name}"):
        checkpoint.load_state(folder)


def test_foreign_folder_raises(tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps({"something": "else"}))
    with pytest.raises(CheckpointError, match="not a checkpoint of moefit"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"files": []}',
        '{"files": {"trainer.pt": 5}}',
        '{"files": {"trainer.pt": {"crc32": 1}}}',
        '{"files": {"trainer.pt": {"bytes": null, "crc32": 1}}}',
    ],
)
def test_damaged_manifest_raises(tmp_path, parts, manifest):
    folder = checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)
    (folder / checkpoint.MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing, unreadable or damaged"):
        checkpoint.verify(folder)


def test_unreadable_file_raises(tmp_path, parts, monkeypatch):
    folder = checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "_crc32", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Input/output error"):
        checkpoint.verify(folder)


def test_checkpoint_is_renamed_before_deletion(tmp_path, parts, monkeypatch):
    """A process killed while deleting leaves no partial checkpoint under a valid name."""
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(parts, step), keep=2)

    def killed(folder, ignore_errors):
        if "removing" in folder.name:
            (folder / "model.safetensors").unlink()
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            checkpoint.save(tmp_path, snapshot(parts, 3), keep=2)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-00000003"]
    for path in checkpoint.checkpoints(tmp_path):
        checkpoint.verify(path)
    checkpoint.save(tmp_path, snapshot(parts, 4), keep=2)
    assert not list(tmp_path.glob(".*"))


def test_saving_same_step_replaces_checkpoint(tmp_path, parts):
    checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)
    again = snapshot(parts, 1)
    again.state["seconds"] = 9.0
    folder = checkpoint.save(tmp_path, again, keep=2)
    assert checkpoint.load_state(folder)["seconds"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_copied_checkpoint_folder_is_ignored(tmp_path, parts):
    folder = checkpoint.save(tmp_path, snapshot(parts, 1), keep=1)
    folder.rename(tmp_path / "step-00000001.bak")
    checkpoint.save(tmp_path, snapshot(parts, 2), keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002"]
    assert (tmp_path / "step-00000001.bak").is_dir()


# In the order in which they are written each is larger than those before it, so that a limit
# just below its size is one that it alone hits.
GROWING = ("model.safetensors", "tokenizer.json", "trainer.pt")

FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import torch
from moefit.errors import CheckpointError
sys.path.insert(0, sys.argv[2])
from test_checkpoint import GROWING, checkpoint, small_parts, snapshot
out = Path(sys.argv[1])
parts = small_parts()
torch.manual_seed(0)
state = {"optimizer": {"x": torch.ones(30_000)}}
first, second = (
    checkpoint.Snapshot(step=step, model=parts[0], tokenizer=parts[1], state=state)
    for step in (1, 2)
)
folder = checkpoint.save(out, first, keep=2)
sizes = [(folder / name).stat().st_size for name in GROWING]
assert sizes == sorted(sizes), sizes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
messages = []
for size in sizes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
    try:
        checkpoint.save(out, second, keep=2)
    except CheckpointError as error:
        messages.append(str(error))
    assert [path.name for path in out.iterdir()] == ["step-00000001"]
print(json.dumps(messages))
"""


def small_parts():
    config = DsMoeConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=4,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_experts=2,
    )
    return DsMoeForCausalLM(config), train_bpe([Path(__file__).read_text()], 800)


@pytest.mark.slow
def test_full_disk_keeps_checkpoints(tmp_path):
    """The kernel rejects writes beyond a size, as on a full disk, for each file."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), os.path.dirname(__file__)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert len(messages) == len(GROWING)
    for message in messages:
        assert "cannot write the checkpoint" in message
        assert f"the last good checkpoint is {tmp_path / 'step-00000001'}" in message
    assert "the tokenizer could not be saved" in messages[1]
    assert checkpoint.load_state(tmp_path / "step-00000001")["step"] == 1
