"""The parts of gpu.sh: decode in several ways, train, and write a record of all parts."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record
import torch
from transformers import AutoModelForCausalLM

import moefit
from moefit.api import folder_of
from moefit.dsmoe.model import register
from moefit.serve.hybrid.rules import RULES, check_host_compute
from moefit.serve.model import ServedModel
from moefit.train.config import make_config
from moefit.train.display import NoDisplay
from moefit.train.loop import train

PROMPT, NEW = 32, 48
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"preset": "dsmoe-tiny"},
    "300m": {
        "hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_experts": 16, "qk_norm": True,
        "training_rule": "top_k:4", "inference_rule": "top_k:4",
    },
}  # fmt: skip


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def decode(model: Any, device: str) -> dict[str, float]:
    """Return tokens per second of the prompt and of decoding, after a warm-up."""
    vocabulary = model.config.vocab_size
    ids_BT = torch.randint(3, vocabulary, (1, PROMPT), device=device)
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    times: list[float] = []
    for number in (1, 1, NEW):
        wait(device)
        began = time.perf_counter()
        model.generate(ids_BT, max_new_tokens=number, min_new_tokens=number, **how)
        wait(device)
        times.append(time.perf_counter() - began)
    return {"prompt": PROMPT / times[1], "decoding": (NEW - 1) / (times[2] - times[1])}


def measured(served: ServedModel, device: str) -> dict[str, Any]:
    found: dict[str, Any] = decode(served.model, device)
    report = served.report()
    names = ("hits", "fetches", "computed_on_host", "hybrid", "peak_process_bytes", "host_hits")
    return found | {name: report.get(name) for name in names}


def third(served: ServedModel) -> int:
    """Return the budget in which a third of the experts have slots."""
    counts = [max(1, one.num_experts // 3) for one in served.blocks.values()]
    return served.budget.total_for_slots(counts)


def served_with(given: Any, **how: Any) -> ServedModel:
    if given.device == "cpu":  # the dry run: on a CPU there is no host tier
        check_host_compute(how.pop("host_compute", "auto"), on_cpu=False)
        how.pop("host_memory", None)
    return moefit.load(given.model, device=given.device, context=256, **how)


def memory(given: Any) -> Any:
    """Decode with all experts on the device, in two precisions."""
    results = {}
    for precision in ("native", "int4"):
        with served_with(given, precision=precision) as served:
            results[precision] = measured(served, given.device)
    return results


def offloaded(given: Any) -> Any:
    """Decode with a third of the experts on the device, all of them in host memory."""
    with served_with(given, host_memory="64GiB") as served:
        served.set_memory(third(served))
        return measured(served, given.device)


def rules(given: Any) -> Any:
    """Decode a third by each rule that divides misses."""
    results = {}
    for rule in RULES:
        with served_with(given, host_memory="64GiB", host_compute=rule) as served:
            served.set_memory(third(served))
            results[rule] = measured(served, given.device)
    return results


def host(given: Any) -> Any:
    """Decode a third with host memory for few, half and all experts."""
    results = {}
    for size in ("256MiB", "1GiB", "64GiB"):
        with served_with(given, host_memory=size, host_compute="fetch-all") as served:
            served.set_memory(third(served))
            results[size] = measured(served, given.device)
    return results


def transformers(given: Any) -> Any:
    """Decode with transformers' own model, wholly on the device."""
    register()
    model = AutoModelForCausalLM.from_pretrained(folder_of(given.model), dtype=torch.bfloat16)
    return decode(model.to(given.device).eval(), given.device)


def rivals(given: Any) -> Any:
    """Decode with vLLM or llama.cpp where they are installed."""
    found: dict[str, Any] = {}
    folder = str(folder_of(given.model))
    if find_spec("vllm") is not None and given.device != "cpu":
        code = (
            "import sys, time; from vllm import LLM, SamplingParams as P\n"
            f"llm = LLM(sys.argv[1], max_model_len=256, gpu_memory_utilization=0.5)\n"
            f"p = {{'prompt_token_ids': list(range(3, 3 + {PROMPT}))}}\n"
            f"q = P(max_tokens={NEW}, ignore_eos=True, temperature=0)\n"
            "llm.generate([p], q); b = time.perf_counter(); llm.generate([p], q)\n"
            f"print('TOKENS', {NEW} / (time.perf_counter() - b))"
        )
        made = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
        )
        lines = [one for one in made.stdout.splitlines() if one.startswith("TOKENS")]
        found["vllm"] = float(lines[-1].split()[1]) if lines else made.stderr[-500:]
    bench = shutil.which("llama-bench")
    if bench is not None:
        gguf = given.out / "model.gguf"
        write = [sys.executable, "-m", "moefit", "export", folder, str(gguf), "--format", "gguf"]
        subprocess.run(write, check=False)
        made = subprocess.run(
            [bench, "-m", str(gguf), "-ngl", "99", "-p", str(PROMPT), "-n", str(NEW), "-o", "json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found["llama.cpp"] = json.loads(made.stdout) if made.returncode == 0 else made.stderr[-500:]
    return found or "neither vLLM nor llama.cpp is installed"


def training(given: Any) -> Any:
    """Train a few steps."""
    tiny = given.size == "tiny"
    tree = {
        "out": str(given.out / "run"),
        "model": SIZES[given.size],
        "data": {"max_bytes": 300_000 if tiny else 8_000_000, "cache_dir": str(given.out / "data")},
        "steps": 2 if tiny else 20,
        "seq_len": 64 if tiny else 512,
        "batch_size": 2 if tiny else 16,
        "device": given.device,
        "log": {"every": 1, "eval_every": 1000, "eval_tokens": 256},
        "checkpoint": {"every": 1000},
    }
    train(make_config(tree), NoDisplay())
    lines = map(json.loads, (given.out / "run" / "log.jsonl").read_text().splitlines())
    steps = [one for one in lines if one["kind"] == "train"]
    last = steps[len(steps) // 2 :]
    return {
        "tokens_per_second": sum(one["tokens_per_second"] for one in last) / len(last),
        "mfu": sum(one["mfu"] for one in last) / len(last),
        "losses": [one["loss"] for one in steps],
    }


PARTS = {
    one.__name__: one for one in (memory, offloaded, rules, host, transformers, rivals, training)
}


def write_record(given: Any) -> None:
    ended = [line.split() for line in (given.out / "parts.txt").read_text().splitlines()]
    results: dict[str, Any] = {
        name: {"exit": int(code), "seconds": int(seconds)} for name, code, seconds in ended
    }
    for name, one in results.items():
        if (path := given.out / f"{name}.json").exists():
            one["found"] = json.loads(path.read_text())
        elif one["exit"] or name in ("tests", "kernels"):
            one["log"] = (given.out / f"{name}.log").read_text()[-4000:]
    notes = (
        "OLMoE's shape with 4 layers, random weights, a prompt of "
        f"{PROMPT} tokens and {NEW} new ones; exit 124: the part's time was over."
    )
    print(record.write("gpu", results, notes=notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "record"])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="300m")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.part == "record":
        write_record(given)
        return
    found = PARTS[given.part](given)
    (given.out / f"{given.part}.json").write_text(json.dumps(found))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
