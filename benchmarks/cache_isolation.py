"""Whether clients with different keys can tell, by time or content, what others have asked.

    python benchmarks/cache_isolation.py [MODEL] [--memory 4GiB] [--trials 100] [--save]

Key A asks a new prompt; then key B asks the same one or another new one, in random order, and A
asks its own again, which is the control: that one is kept. Times to the first token of the two
kinds of B's requests are compared (Mann-Whitney), and so are their cached tokens, which must be 0.
With kept prefixes in memory and in files; the second half of the trials follows a restart, so that
A's prompts are in files alone. Answers of A and B to the same prompt are equal.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import record
from scipy.stats import mannwhitneyu

from moefit.server.client import Client

KEYS = {"a": "key-of-a-0123456789", "b": "key-of-b-0123456789"}
WORDS = [
    "import",
    "return",
    "class",
    "value",
    "self",
    "name",
    "for",
    "in",
    "path",
    "read",
    "write",
    "file",
    "key",
    "list",
    "text",
    "len",
]
Timed = tuple[float, int]
"""Seconds until the answer, and cached tokens."""
KINDS = ("A again", "B, A's prompt", "B, a new prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--words", type=int, default=500)
    parser.add_argument("--name", default="")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        results = {where: compared(rows) for where, rows in measured(Path(folder), given).items()}
    print(json.dumps(results, indent=1))
    if given.save:
        notes = (
            f"{given.trials} trials each, prompts of {given.words} random words, seconds until a "
            "response of one token; other processes ran on the machine."
        )
        print(record.write("cache-isolation", results, notes=notes, suffix=given.name))


def measured(folder: Path, given: argparse.Namespace) -> dict[str, dict[str, list[Timed]]]:
    """Return seconds and cached tokens of each kind, with prefixes in memory and in files."""
    chance = random.Random(0)
    found = {where: {kind: [] for kind in KINDS} for where in ("in memory", "in files")}
    prompts = [new_prompt(chance, given.words) for _ in range(given.trials)]
    with server(folder, given) as clients:
        for _ in range(given.trials):
            prompt = new_prompt(chance, given.words)
            ask(clients["a"], prompt)
            trial(clients, prompt, chance, found["in memory"])
        for prompt in prompts:
            ask(clients["a"], prompt)
    with server(folder, given) as clients:
        for prompt in prompts:
            trial(clients, prompt, chance, found["in files"])
    return found


def trial(
    clients: dict[str, Client], prompt: str, chance: random.Random, found: dict[str, list[Timed]]
) -> None:
    """Let B ask what A has asked, or something new, and A ask again."""
    same = chance.random() < 0.5
    asked = prompt if same else new_prompt(chance, len(prompt.split()))
    text, timed = ask(clients["b"], asked)
    found[KINDS[1] if same else KINDS[2]].append(timed)
    again, timed = ask(clients["a"], prompt)
    found[KINDS[0]].append(timed)
    assert not same or text == again


def ask(client: Client, prompt: str) -> tuple[str, Timed]:
    """Return the answer, and how long it took."""
    began = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    response = client.post("/v1/completions", body)
    seconds = time.perf_counter() - began
    cached = response["usage"]["prompt_tokens_details"]["cached_tokens"]
    return response["choices"][0]["text"], (seconds, cached)


def new_prompt(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def compared(rows: dict[str, list[Timed]]) -> dict[str, object]:
    """Return medians of each kind, and whether B's two kinds differ."""
    seconds = {kind: [one for one, _ in timed] for kind, timed in rows.items()}
    own, same, new = (seconds[kind] for kind in KINDS)
    return {
        **{
            kind: {
                "requests": len(timed),
                "median s": round(statistics.median(seconds[kind]), 4),
                "most cached tokens": max(cached for _, cached in timed),
            }
            for kind, timed in rows.items()
        },
        "share of pairs in which A's prompt was faster for B": faster(same, new),
        "p of B's kinds (Mann-Whitney)": round(float(mannwhitneyu(same, new).pvalue), 4),
        "share of pairs in which A's own was faster than a new one": faster(own, new),
        "p of the control": float(mannwhitneyu(own, new).pvalue),
    }


def faster(some: list[float], others: list[float]) -> float:
    """Return the share of pairs in which the first is smaller: 0.5 if they are alike."""
    return round(statistics.mean(a < b for a in some for b in others), 3)


@contextmanager
def server(folder: Path, given: argparse.Namespace) -> Iterator[dict[str, Client]]:
    """Serve the model with two keys; yield their clients."""
    keys = folder / "keys.yaml"
    lines = (f"  - {{name: {name}, key: {key}}}\n" for name, key in KEYS.items())
    keys.write_text("keys:\n" + "".join(lines))
    keys.chmod(0o600)
    command = [
        sys.executable, "-m", "moefit", "serve", given.model, "--port", "0", "--memory",
        given.memory, "--context", "8192", "--keys-file", str(keys), "--prefix-cache-dir",
        str(folder / "prefixes"), "--no-warm-start",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(line.split()[2] for line in process.stderr if line.startswith("API at "))
        yield {name: Client(url, key) for name, key in KEYS.items()}
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()


if __name__ == "__main__":
    main()
