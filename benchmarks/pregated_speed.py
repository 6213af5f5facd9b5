"""Decode a model and its pre-gated forms with a third of the experts and slow storage.

They have the same weights, with the routers given what the block before is, or tokens routed by the
logits of the token before: their text is worse without a fine-tune, and with a top-k rule they read
and compute as much per token as fine-tuned ones would. `--large` is a model of random weights whose
experts have 6 MB, as those of models that are short of memory do; the shipped model's have 0.1 MB
and a threshold rule, so that its forms may also choose different numbers of experts.
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
from moefit.dsmoe.config import PREVIOUS_TOKEN, DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.decoding import Decoding
from moefit.serve.model import ServedModel

WAYS = {
    "base, least recently used": ("base", "off"),
    "base, predicted": ("base", "on"),
    "pre-gated": ("pregated", "off"),
    "by the token before": (PREVIOUS_TOKEN, "off"),
}


LARGE = {
    "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 24,
    "mlp_type": "swiglu", "inference_rule": "top_k:4:renormalize", "qk_norm": True,
    "initializer_range": 0.05,
}  # fmt: skip
COUNTED = ("hits", "fetches", "prefetches", "prefetches_used", "wait_seconds")


def decode(served: ServedModel, ids_T: torch.Tensor, new: int) -> tuple[float, dict[str, float]]:
    """Return seconds per token, and counts per token."""
    with torch.inference_mode():
        decoding = Decoding(served)
        decoding(ids_T[:16])
        before, began = served.report(), time.perf_counter()
        for at in range(16, 16 + new):
            decoding(ids_T[at : at + 1])
        took, after = time.perf_counter() - began, served.report()
    return took / new, {name: (after[name] - before[name]) / new for name in COUNTED}


def large_model(folder: Path) -> Path:
    """Write a model of random weights whose experts have 6 MB, with the shipped tokenizer."""
    config = DsMoeConfig(**LARGE)
    torch.manual_seed(0)
    DsMoeForCausalLM(config).bfloat16().save_pretrained(folder)
    for path in Path(folder_of("reference")).glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


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


def pregated_copy(base: Path, folder: Path, pregated: bool | str) -> Path:
    """Write a folder with the same weights, by links, and another `pregated`."""
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((base / "config.json").read_text()) | {"pregated": pregated}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", default=["0.1GB", "0.4GB"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--storage", default="", help="what TMPDIR is on, for the record")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    text = Path(statistics.__file__).read_text(encoding="utf-8")
    times: dict[str, list[float]] = {}
    counts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        base = large_model(own / "base") if given.large else Path(folder_of("reference"))
        folders = {
            "base": base,
            "pregated": pregated_copy(base, own / "pregated", True),
            PREVIOUS_TOKEN: pregated_copy(base, own / PREVIOUS_TOKEN, PREVIOUS_TOKEN),
        }
        for rate in (None, *given.rates):
            with limited_to(rate):
                served = load_all(folders, rate)
                ids_T = torch.tensor(next(iter(served.values())).tokenizer(text)["input_ids"])
                for number in range(given.rounds + 1):
                    for name, one in served.items():
                        took, counted = decode(one, ids_T[number * 64 :], given.tokens)
                        if number:  # the first round fills slots
                            label = f"{rate or 'all in memory'}: {name}"
                            times.setdefault(label, []).append(took)
                            total = counts.setdefault(label, dict.fromkeys(COUNTED, 0.0))
                            for key in COUNTED:
                                total[key] += counted[key] / given.rounds
                for one in served.values():
                    one.close()
    results = {
        name: {
            "tokens_per_second": 1 / statistics.median(one),
            "seconds": one,
            "per_token": counts[name],
        }
        for name, one in times.items()
    }
    for name, one in results.items():
        counted = ", ".join(f"{key} {value:.2f}" for key, value in one["per_token"].items())
        print(name, f"{one['tokens_per_second']:.1f} tokens/s; per token: {counted}")
    if given.record:
        model = "The shipped model (16 experts of 98 KB in each of 8 layers, threshold:0.7), 5"
        if given.large:
            model = "Random weights (24 experts of 6.3 MB in each of 6 layers, top 4 of 24), 8"
        storage = f"storage limited ({given.storage})" if given.storage else "storage limited"
        notes = (
            f"{model} slots a layer, {storage}; {given.rounds} rounds of {given.tokens} tokens, "
            "the ways in turn."
        )
        suffix = "-".join([*["large"] * given.large, *given.storage.split()])
        print(record.write("pregated-speed", results, notes=notes, suffix=suffix))


if __name__ == "__main__":
    main()
