"""Pages of libraries are dropped where that is safe, and only there."""

import subprocess
import sys
from pathlib import Path

import pytest

from moefit.serve.memory.release import LIBRARY_PAGES, droppable_mappings

SMAPS = """\
1000-3000 r-xp 00000000 fe:00 11 /lib/code.so
Rss:                   8 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex mr mw me
3000-4000 r--p 00002000 fe:00 11 /lib/code.so
Rss:                   4 kB
Anonymous:             4 kB
Swap:                  0 kB
4000-5000 rw-p 00003000 fe:00 11 /lib/code.so
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
5000-6000 r--p 00000000 fe:00 12 /lib/not resident: a name.so
Rss:                   0 kB
Anonymous:             0 kB
Swap:                  0 kB
6000-7000 r--s 00000000 fe:00 13 /shared.bin
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
7000-8000 r--p 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
8000-a000 r--p 00000000 fe:00 14 /lib/data.so (deleted)
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
b000-c000 r--p 00000000 fe:00 16 /data/model.safetensors
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  0 kB
c000-d000 r-xp 00000000 fe:00 17 /lib/unknown.so.6
Rss:                   4 kB
d000-e000 r-xp 00000000 fe:00 18 /usr/bin/python3.11
Rss:                   4 kB
Anonymous:             0 kB
a000-b000 r--p 00000000 fe:00 15 /lib/swapped.so
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  4 kB
"""


def test_only_copies_of_files_are_dropped(tmp_path: Path) -> None:
    """Not relocated, writable, shared, anonymous or swapped pages, and none of other files."""
    (tmp_path / "smaps").write_text(SMAPS)
    found = [
        (one.start, one.nbytes, one.resident) for one in droppable_mappings(tmp_path / "smaps")
    ]
    assert found == [(0x1000, 0x2000, 8192), (0x8000, 0x2000, 4096), (0xD000, 0x1000, 4096)]


def test_systems_without_smaps_have_none(tmp_path: Path) -> None:
    assert not list(droppable_mappings(tmp_path / "smaps"))


DROP = """
import torch
from moefit.host import process_bytes
from moefit.serve.memory.held import settled_bytes
from moefit.serve.memory.release import drop_library_pages, droppable_bytes
from transformers import MixtralConfig, MixtralForCausalLM

torch.set_num_threads(1)
cpu = torch.device("cpu")
config = MixtralConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, vocab_size=64, num_local_experts=4,
)
torch.manual_seed(0)
model = MixtralForCausalLM(config).eval()
ids_1T = torch.arange(3, 23)[None]
with torch.inference_mode():
    first = model(ids_1T).logits
    before, expected = process_bytes(), settled_bytes(cpu)
    dropped = drop_library_pages()
    after, left = process_bytes(), droppable_bytes()
    same = torch.equal(model(ids_1T).logits, first)
    again = model.generate(ids_1T, max_new_tokens=8, do_sample=True, pad_token_id=0).shape[1]
print(before, after, dropped, left, expected, process_bytes(), int(same), again)
"""


@pytest.mark.slow  # a process of its own
def test_dropped_pages_return_as_they_are_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DROP], check=True, capture_output=True, text=True, timeout=200
    )
    before, after, dropped, left, expected, used, same, length = map(int, done.stdout.split())
    assert same and length == 28
    assert dropped > 40 << 20, "importing torch and transformers touches more"
    assert abs(before - after - dropped) < 12 << 20
    assert left < 12 << 20
    assert used <= expected <= before - dropped + LIBRARY_PAGES + (4 << 20)
