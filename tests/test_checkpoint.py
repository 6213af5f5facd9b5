import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError
from moefit.train import checkpoint
from moefit.train.tokenizer import train_bpe


@pytest.fixture(scope="module")
def parts():
    config = DsMoeConfig(vocab_size=300, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return DsMoeForCausalLM(config), train_bpe(["some text", "more text"], 300)


def snapshot(parts, step):
    model, tokenizer = parts
    state = {"optimizer": {"x": torch.ones(3)}, "rng": torch.get_rng_state(), "seconds": 1.0}
    return checkpoint.Snapshot(step=step, model=model, tokenizer=tokenizer, state=state)


def test_keeps_the_last_ones(tmp_path, parts):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, snapshot(parts, step), keep=2)
    found = checkpoint.checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-00000002", "step-00000010"]
    state = checkpoint.load_state(found[-1])
    assert state["step"] == 10
    assert torch.equal(state["optimizer"]["x"], torch.ones(3))


def test_a_half_written_one_is_not_seen(tmp_path, parts):
    checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)
    building = tmp_path / ".step-00000002.building"
    building.mkdir()
    (building / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, snapshot(parts, 2), keep=2)
    assert not building.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_damage_is_named(tmp_path, parts, name, damage):
    folder = checkpoint.save(tmp_path, snapshot(parts, 1), keep=2)
    content = bytearray((folder / name).read_bytes())
    if damage == "gone":
        (folder / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content[:-1] if damage == "truncated" else content)
    with pytest.raises(CheckpointError, match=f"damaged: {name}"):
        checkpoint.load_state(folder)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps({"something": "else"}))
    with pytest.raises(CheckpointError, match="no checkpoint of moefit"):
        checkpoint.load_state(tmp_path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from moefit.errors import CheckpointError
sys.path.insert(0, sys.argv[2])
from test_checkpoint import checkpoint, snapshot
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.train.tokenizer import train_bpe
config = DsMoeConfig(vocab_size=300, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
parts = DsMoeForCausalLM(config), train_bpe(["some text"], 300)
out = Path(sys.argv[1])
checkpoint.save(out, snapshot(parts, 1), keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(out, snapshot(parts, 2), keep=2)
except CheckpointError as error:
    print(error)
"""


def test_no_room_loses_no_checkpoint(tmp_path):
    """The kernel refuses to write beyond 100 kB, as it would on a full disk."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write the checkpoint" in done.stdout
    assert f"the last good checkpoint is {tmp_path / 'step-00000001'}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load_state(tmp_path / "step-00000001")["step"] == 1
