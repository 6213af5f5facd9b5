"""Kimi-K2's tokenizer, a file of ranked tokens: against tiktoken's rule, written out."""

import base64
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moefit.checkpoint.gguf.tokenizer import SPLITS
from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.errors import CheckpointError

TEXTS = (
    "The CamelCase words don't SHOUT, and 1234567 is a number.",
    "  def f(x):\n\treturn x ** 2\n\n",
    "中文English混合 汉字abc 北京市 Pascal",
    "naïve Ünïcode “quotes” 🙂 é",
    "aaaaaaaaab ababababa",
)
CONFIG: dict[str, Any] = {
    "tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": {"content": "[EOS]"},
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "chat_template": "{{ messages[0]['content'] }}",
}  # fmt: skip


def ranks_of(texts: tuple[str, ...]) -> dict[bytes, int]:
    """Return tokens learnt from texts, with all bytes, by rank."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[one] for one in text): rank for text, rank in found}


def encoded(ranks: Mapping[bytes, int], text: str) -> list[int]:
    """Join the neighbours whose concatenation has the lowest rank, the first of several."""
    ids: list[int] = []
    for piece in regex.findall(SPLITS["kimi-k2"][0], text, flags=regex.V1):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while True:
            joined = [(ranks.get(a + b), n) for n, (a, b) in enumerate(pairwise(parts))]
            known = [(rank, n) for rank, n in joined if rank is not None]
            if not known:
                break
            n = min(known)[1]
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def written(folder: Path, ranks: Mapping[bytes, int], **changes: Any) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("\n".join(lines))
    special = {str(len(ranks)): {"content": "[BOS]"}, str(len(ranks) + 3): {"content": "[EOS]"}}
    config = CONFIG | {"added_tokens_decoder": special} | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokens_are_those_of_tiktoken(tmp_path: Path) -> None:
    ranks = ranks_of(TEXTS[:3])
    tokenizer = read_tokenizer(written(tmp_path, ranks))
    assert len(tokenizer) == len(ranks) + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(ranks), len(ranks) + 3)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoded(ranks, text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("[EOS]<|reserved_token_421|>")["input_ids"] == [len(ranks) + 3, 421]
    shown = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert shown == "Hi"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    template = read_tokenizer(tmp_path).apply_chat_template
    assert template([{"role": "user", "content": "Hi"}], tokenize=False) == "1"


def test_damaged_files_raise(tmp_path: Path) -> None:
    ranks = ranks_of(TEXTS[:1])
    for text, match in (("IQ== one", "line 1, is no token"), ("IQ== 0", "1 tokens, whose ranks")):
        written(tmp_path, ranks)
        (tmp_path / "tiktoken.model").write_text(text)
        with pytest.raises(CheckpointError, match=match):
            read_tokenizer(tmp_path)
    written(tmp_path, ranks, added_tokens_decoder={"5": {"content": "x"}})
    with pytest.raises(CheckpointError, match="names the token 5"):
        read_tokenizer(tmp_path)


def test_tokens_that_are_not_special_stay_in_text(tmp_path: Path) -> None:
    ranks = ranks_of(TEXTS[:1])
    first = len(ranks)
    named = {
        first: {"content": "[BOS]", "special": True}, first + 3: {"content": "[EOS]"},
        first + 5: {"content": "<|tool_call_begin|>", "special": False},
    }  # fmt: skip
    tokenizer = read_tokenizer(written(tmp_path, ranks, added_tokens_decoder=named))
    ids = tokenizer("[BOS]a<|tool_call_begin|>b[EOS]")["input_ids"]
    assert {first, first + 3, first + 5} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<|tool_call_begin|>b"


@pytest.mark.parametrize(
    ("named", "changes", "match"),
    [
        ({0: "[BOS]", 3: "[EOS]", 4: "[EOS]"}, {}, r"token \d+ '\[EOS\]', as another"),
        ({0: "[BOS]", 3: "[EOS]", 4: ""}, {}, r"token \d+ '', as another"),
        ({0: "[BOS]", 3: "[EOS]"}, {"bos_token": "[NO]"}, r"bos_token='\[NO\]'.*not among"),
    ],
)
def test_names_that_contradict_raise(
    tmp_path: Path, named: dict[int, str], changes: dict[str, Any], match: str
) -> None:
    ranks = ranks_of(TEXTS[:1])
    tokens = {str(len(ranks) + place): {"content": name} for place, name in named.items()}
    written(tmp_path, ranks, added_tokens_decoder=tokens, **changes)
    with pytest.raises(CheckpointError, match=match):
        read_tokenizer(tmp_path)


def test_other_code_is_refused(tmp_path: Path) -> None:
    """How another model splits text is in its code alone."""
    written(tmp_path, ranks_of(TEXTS[:1]), auto_map={"AutoTokenizer": ["other.Other", None]})
    with pytest.raises(CheckpointError):
        read_tokenizer(tmp_path)
