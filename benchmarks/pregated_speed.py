"""Decode the shipped model and its pre-gated form with a third of the experts and slow storage.

The pre-gated form has the same weights, with the routers given what the block before is: its text
is worse without a fine-tune, and what it reads and computes per token is what a fine-tuned one
would.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import record
import torch
from slow_storage import limited_to

import moefit
from moefit.api import folder_of
from moefit.evaluate.decoding import Decoding
from moefit.serve.model import ServedModel

WAYS = {
    "base, least recently used": ("base", "off"),
    "base, predicted": ("base", "on"),
    "pre-gated": ("pregated", "off"),
}


def decode(served: ServedModel, ids_T: torch.Tensor, new: int) -> float:
    """Return seconds per token."""
    with torch.inference_mode():
        decoding = Decoding(served)
        decoding(ids_T[:16])
        began = time.perf_counter()
        for at in range(16, 16 + new):
            decoding(ids_T[at : at + 1])
        return (time.perf_counter() - began) / new


def load_all(folders: dict[str, Path], rate: str | None) -> dict[str, ServedModel]:
    """Return the models to compare: whole without a rate, else with a third of the experts."""
    served: dict[str, ServedModel] = {}
    for name, (which, prefetch) in WAYS.items():
        if rate is None and prefetch == "on":
            continue
        served[name] = one = moefit.load(folders[which], prefetch=prefetch, context=512)
        if rate is not None:
            counts = [experts.num_experts // 3 for experts in one.blocks.values()]
            one.set_memory(one.budget.total_for_slots(counts))
    return served


def pregated_copy(base: Path, folder: Path) -> Path:
    for path in base.iterdir():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((base / "config.json").read_text()) | {"pregated": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["0.1GB", "0.4GB"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    base = Path(folder_of("reference"))
    text = Path(statistics.__file__).read_text(encoding="utf-8")
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as other:
        folders = {"base": base, "pregated": pregated_copy(base, Path(other))}
        for rate in (None, *given.rates):
            with limited_to(rate):
                served = load_all(folders, rate)
                ids_T = torch.tensor(next(iter(served.values())).tokenizer(text)["input_ids"])
                for number in range(given.rounds + 1):
                    for name, one in served.items():
                        took = decode(one, ids_T[number * 64 :], given.tokens)
                        if number:  # the first round fills slots
                            times.setdefault(f"{rate or 'all in memory'}: {name}", []).append(took)
                for one in served.values():
                    one.close()
    results = {
        name: {"tokens_per_second": 1 / statistics.median(one), "seconds": one}
        for name, one in times.items()
    }
    for name, one in results.items():
        print(name, f"{one['tokens_per_second']:.1f} tokens/s")
    if given.record:
        notes = (
            "The shipped model (16 experts in each of 8 layers, threshold:0.7), 5 slots a layer, "
            f"storage limited; {given.rounds} rounds of {given.tokens} tokens, the ways in turn."
        )
        print(record.write("pregated-speed", results, notes=notes))


if __name__ == "__main__":
    main()
