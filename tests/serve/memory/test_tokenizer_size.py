"""Memory of tokenizers, according to the operating system."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_served import saved, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moefit.serve.memory.tokenizer_size import TOKENIZER_CACHES, tokenizer_size

MIB = 1 << 20
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def byte_pairs(size: int, longest: int) -> Tokenizer:
    """Return a byte-pair encoding with `size` tokens and a merge for each."""
    chance = random.Random(0)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    known, merges = {token: number for number, token in enumerate(tokens)}, []
    while len(tokens) < size:
        pair = chance.choice(tokens[:2000] if longest < 10 else tokens), chance.choice(tokens)
        if (joined := "".join(pair)) in known or len(joined) > longest:
            continue
        known[joined] = len(tokens)
        tokens.append(joined)
        merges.append(pair)
    made = Tokenizer(models.BPE(vocab=known, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def pieces(size: int, longest: int) -> Tokenizer:
    """Return a Unigram model with `size` pieces."""
    chance = random.Random(0)
    known: dict[str, float] = dict.fromkeys(["<unk>", *LETTERS], -5.0)
    while len(known) < size:
        length = chance.randint(3, longest)
        known["".join(chance.choices(LETTERS, k=length))] = -20 * chance.random()
    made = Tokenizer(models.Unigram(list(known.items()), unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def write(tokenizer: Tokenizer, folder: Path, kind: str | None = None) -> Path:
    """Write a tokenizer of a transformers class, if `kind` is one."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    if kind is not None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": kind}))
    return folder


READ = """
import sys
from pathlib import Path
import torch
from transformers import AutoTokenizer
from moefit.host import peak_process_bytes
from moefit.host import process_bytes
from moefit.serve.memory.held import settled_bytes
from moefit.serve.memory.release import return_freed_memory
from moefit.server.tokenizer import RequestTokenizer

cpu = torch.device("cpu")
before, settled = process_bytes(), settled_bytes(cpu)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
peak = peak_process_bytes() - before
return_freed_memory()
held, now = settled_bytes(cpu) - settled, process_bytes()
requests = RequestTokenizer(tokenizer, size=len(tokenizer), max_tokens=100)
for token in range(len(tokenizer)):
    requests.text_and_bytes(token)
    if token > 20_000:
        break
print(held, peak, process_bytes() - now, max(0, peak_process_bytes() - before - peak))
"""


@pytest.mark.parametrize(
    ("make", "size", "longest", "kind"),
    [
        pytest.param(byte_pairs, 32_000, 8, None, marks=pytest.mark.slow),
        pytest.param(pieces, 32_000, 7, "T5Tokenizer", marks=pytest.mark.slow),
        pytest.param(byte_pairs, 32_000, 24, "Qwen2Tokenizer", marks=pytest.mark.slow),
        pytest.param(pieces, 32_000, 24, None, marks=pytest.mark.slow),
        pytest.param(byte_pairs, 151_000, 24, "Qwen2Tokenizer", marks=pytest.mark.slow),
        pytest.param(byte_pairs, 256_000, 24, None, marks=pytest.mark.slow),
        pytest.param(byte_pairs, 256_000, 8, "GemmaTokenizer", marks=pytest.mark.slow),
        pytest.param(pieces, 256_000, 8, None, marks=pytest.mark.slow),
    ],
)
def test_tokenizer_size_is_estimated_from_files(
    tmp_path: Path, make, size: int, longest: int, kind: str | None
) -> None:
    write(make(size, longest), tmp_path, kind)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        check=True, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    held, peak, tables, above = map(int, done.stdout.split())
    said = tokenizer_size(tmp_path)
    assert held + tables <= said.held, "what it holds, with the tokens that were shown"
    assert held + TOKENIZER_CACHES <= said.held, "loading would refuse the described minimum"
    assert peak <= said.reading
    assert above == 0, "our own tables have no peak of their own"
    assert tables < 6 * MIB
    assert said.held < 1.6 * held + 16 * MIB, "close enough to be of use"
    assert said.reading < 1.3 * peak + 16 * MIB


def test_missing_tokenizer_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert (tokenizer_size(tmp_path).held, tokenizer_size(tmp_path).reading) == (0, 0)


def test_damaged_tokenizer_files_do_not_fail(tmp_path: Path) -> None:
    """Reading the tokenizer reports the damage."""
    (tmp_path / "tokenizer.json").write_bytes(b"\x00{" + b"\xff" * 1000)
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert 0 < tokenizer_size(tmp_path).held < 16 * MIB


GENERATE = """
import sys, torch
torch.set_num_threads(1)
from moefit.host import peak_process_bytes
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.load import load_model as load
from moefit.serve.memory.estimate import memory_budget as ledger
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton as build
from pathlib import Path

settings = LoadSettings(context=64)
memory = ledger(build(Path(sys.argv[1])), settings).min_bytes
served = load(sys.argv[1], LoadSettings(context=64, memory=memory))
text = served.tokenizer("hello there", return_tensors="pt", return_token_type_ids=False)
served.generate(**text, max_new_tokens=8, do_sample=True, top_p=0.9)
print(memory, peak_process_bytes(), served.budget.total, served.budget.fixed)
"""


@pytest.mark.parametrize(
    "size", [32_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (151_000, 256_000))]
)
def test_large_vocabulary_stays_within_minimum_budget(tmp_path: Path, size: int) -> None:
    model = tiny("Olmoe", vocab_size=size + 8, max_position_embeddings=64)
    write(byte_pairs(size, 8), saved(model, tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path)],
        check=True, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    memory, peak, _, fixed = map(int, done.stdout.split())
    assert peak <= memory
    assert fixed <= memory
