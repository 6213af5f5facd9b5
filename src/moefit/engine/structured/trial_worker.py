"""Process that compiles grammars and follows each for a while, within limits on memory and time.

Runs by path in an isolated interpreter (see `trial.py`), so it imports only the standard library
and llguidance. Reads grammars from stdin and writes a line of JSON for each: what is wrong with it.
"""

import json
import random
import resource
import sys
from typing import Any

import llguidance

_END = 256  # token id, after one token per byte
_STEPS = 64


class _Bytes:
    """A tokenizer with a token per byte."""

    tokens = (*(bytes([byte]) for byte in range(_END)), b"<|end|>")
    special_token_ids = (_END,)
    eos_token_id, bos_token_id = _END, None

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def tried(tokenizer: Any, grammar: str, limits: dict[str, Any]) -> str:
    """Return what is wrong with a grammar; empty if nothing is."""
    matcher = llguidance.LLMatcher(
        tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**limits)
    )
    if matcher.is_error():
        return matcher.get_error()
    chance = random.Random(0)
    for step in range(_STEPS):
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            return matcher.get_error()
        allowed = [id for id in range(_END) if bits[id >> 3] >> (id & 7) & 1]
        if not allowed:
            ends = bits[_END >> 3] >> (_END & 7) & 1
            return "" if step or ends else "no text matches it"
        matcher.consume_token(chance.choice(allowed))
        if matcher.is_stopped():
            break
    return ""  # what is too complex only later ends one answer


def main(memory: int, seconds: int) -> None:
    """Try grammars in their order."""
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = json.loads(sys.stdin.buffer.read())
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), slices=[])
    for grammar in asked["grammars"]:
        why = tried(tokenizer, grammar, asked["limits"])[:4000]
        sys.stdout.write(json.dumps(why) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[3]), int(sys.argv[4]))
