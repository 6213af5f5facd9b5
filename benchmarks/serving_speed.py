"""Measure tokens/s of a large checkpoint under a memory budget, by mode, and of rivals.

    python benchmarks/serving_speed.py FOLDER --memory 4.7GiB --save NAME
        [--policies all,on-demand,exact,bounded,virtual] [--replay TRACE.npz]
        [--rivals llama.cpp,llama.cpp-repacked,accelerate] [--gguf FILE] [--rival-python PYTHON]
        [--new-tokens 24] [--context 256] [--threads 2] [--rounds 1] [--under NAME=COMMAND]
        [--own FILE]

Policies: `all` has no budget; `on-demand` is exact with LRU eviction, the paper's baseline; the
others are moefit's modes. POLICY@FORMAT uses a format for experts and dense weights (pack it
first), POLICY@FORMAT+native for experts only. `--replay` replaces the routers' output by recorded
routing (arrays experts [tokens, layers, K] and probs), so that consecutive tokens use related
experts; without it, routing of a random model is nearly uniform. Rivals (rivals.py) cannot be
combined with it; they decode the same tokens. `moefit export` writes `--gguf`; with `--own` moefit
serves a GGUF file too, such as the same one, and FOLDER needs a configuration only. The page cache
of the checkpoint is dropped before each run. With `--rounds` policies and rivals take turns, and
results are medians; `rounds` has the speeds of each. Page cache counts in a memory cgroup: run all
in one to bound the peak, or each process in its own with `--under`, whose command is prepended to
that policy's or rival's ("*" for all) and may print lines after it.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import rivals
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig

import moefit
from moefit.engine.api import EngineSettings
from moefit.evaluate.bandwidth import measure_bandwidth
from moefit.evaluate.speed import measure_speed
from moefit.folders import cache_root
from moefit.serve.memory.budget import format_bytes, parse_bytes
from moefit.serve.model import ServedModel

POLICIES: dict[str, dict[str, Any]] = {
    "all": {"mode": "exact", "memory": None},
    "on-demand": {"mode": "exact", "eviction": "lru"},
    "exact": {"mode": "exact"},
    "bounded": {"mode": "bounded"},
    "virtual": {"mode": "virtual"},
}
SEED = 1
SPEEDS = ("tokens_per_second", "median_seconds", "prefill_tokens_per_second")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(one(arguments, arguments.one)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for name, result in one_round(arguments):
            rounds.setdefault(name, []).append(result)
    results = {name: medians(found) for name, found in rounds.items()}
    Console().print(table(results))
    if arguments.save:
        kind = "recorded routing" if arguments.replay else "random tokens, near-uniform routing"
        print(record.write("serving-speed", results, notes=f"{kind}", suffix=arguments.save))


def one_round(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in filter(None, arguments.policies.split(",")):
        command = [sys.executable, *sys.argv, "--one", name]
        yield name, in_own_process(name, command, arguments.under)
    for name in filter(None, arguments.rivals.split(",")):
        command = [arguments.rival_python, rivals.__file__, name]
        yield name, in_own_process(name, command, arguments.under, work(arguments))


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number over rounds, and each round's speeds."""
    last = rounds[-1]
    if len(rounds) == 1 or any("failed" in one for one in rounds):
        return next((one for one in rounds if "failed" in one), last)
    out = {
        name: median(one[name] for one in rounds)
        if isinstance(value, float) or name.endswith("bytes")
        else value
        for name, value in last.items()
    }
    return {**out, "rounds": {name: [one[name] for one in rounds] for name in SPEEDS}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--rivals", default="")
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--own", type=Path)
    parser.add_argument("--under", metavar="NAME=COMMAND", action="append", default=[])
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rivals and arguments.replay:
        parser.error("rivals cannot replay recorded routing; measure them without --replay")
    if "llama.cpp" in arguments.rivals and not arguments.gguf:
        parser.error("llama.cpp needs --gguf FILE (moefit export --format gguf writes it)")
    return arguments


def in_own_process(
    name: str, command: list[str], under: list[str], work: rivals.Work | None = None
) -> dict[str, Any]:
    before = dict(one.split("=", 1) for one in under)
    command = [*shlex.split(before.get(name, before.get("*", ""))), *command]
    given = json.dumps(asdict(work)) if work else ""
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        result: dict[str, Any] = {"failed": [f"exit {done.returncode}", *said, *lines]}
    else:
        start = next(number for number, line in enumerate(lines) if line.startswith("{"))
        result = json.loads(lines[start])
        if after := lines[start + 1 :]:
            result["under"] = after
    print(name, json.dumps(result), file=sys.stderr, flush=True)
    return result


def work(arguments: argparse.Namespace) -> rivals.Work:
    """Return the tokens that `measure_speed` decodes, and this machine's bandwidths."""
    config = AutoConfig.from_pretrained(arguments.folder)
    generator = torch.Generator().manual_seed(SEED)
    decoded = [
        int(torch.randint(0, vocabulary(config), (1, 1), generator=generator))
        for _ in range(arguments.warm_up + arguments.new_tokens)
    ]
    bandwidth = measure_bandwidth(arguments.own or arguments.folder, arguments.threads)
    return rivals.Work(
        folder=str(arguments.folder),
        gguf=str(arguments.gguf or ""),
        memory=parse_bytes(arguments.memory),
        context=arguments.context,
        threads=arguments.threads,
        prompt=prompt(config, arguments.prompt_tokens).tolist(),
        decode=decoded,
        warm_up=arguments.warm_up,
        storage=bandwidth.storage,
        bandwidth=bandwidth.memory,
    )


def one(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    rivals.drop_page_cache(
        [arguments.own] if arguments.own else arguments.folder.glob("*.safetensors")
    )
    rivals.drop_page_cache((cache_root() / "packed").rglob("*.safetensors"))
    bandwidth = measure_bandwidth(arguments.own or arguments.folder, arguments.threads)
    policy, _, format = name.partition("@")
    precision, _, rest = (format or "native").partition("+")
    settings = {
        "memory": arguments.memory,
        "context": arguments.context,
        "step_tokens": max(arguments.prompt_tokens, EngineSettings().step_tokens),
        "precision": precision,
        "dense_precision": rest or precision,
        **POLICIES[policy],
    }
    began = time.perf_counter()
    with moefit.load(arguments.own or arguments.folder, **settings) as served:
        loaded = time.perf_counter() - began
        if policy == "all":
            served.set_residents(
                {block: range(one.num_experts) for block, one in served.blocks.items()}
            )
        if arguments.replay:
            replay(served, arguments.replay)
        speed = measure_speed(
            served,
            bandwidth,
            prompt_T=prompt(served.model.config, arguments.prompt_tokens),
            new_tokens=arguments.new_tokens,
            warm_up=arguments.warm_up,
            seed=SEED,
        )
        report = served.report()
        return {
            **speed.as_dict(),
            "load_seconds": loaded,
            "slots": sum(report["slots"].values()),
            "experts": sum(report["experts"].values()),
            "bandwidth": {"storage": bandwidth.storage, "memory": bandwidth.memory},
        }


def prompt(config: Any, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary(config), (tokens,), generator=generator)


def vocabulary(config: Any) -> int:
    return config.get_text_config(decoder=True).vocab_size


def replay(served: ServedModel, trace: Path) -> "list[_Replayed]":
    """Replace each router's choices by recorded ones, by layer and token; return the hooks.

    A trace of top 4 of 32 becomes top 8 of 64 by using experts 2e and 2e + 1 for each recorded
    expert e, which keeps its locality at the same share of experts.
    """
    data = np.load(trace)
    experts, probs = data["experts"].astype(np.int64), data["probs"].astype(np.float32)
    hooks: list[_Replayed] = []
    for number, (name, block) in enumerate(served.blocks.items()):
        router = served.model.get_submodule(name.rpartition(".")[0]).get_submodule("gate")
        layer = number % experts.shape[1]
        ids_NK = torch.from_numpy(experts[:, layer])
        weights_NK = torch.from_numpy(probs[:, layer])
        twins = block.num_experts // 32
        ids_NK = (ids_NK.unsqueeze(-1) * twins + torch.arange(twins)).flatten(1)
        weights_NK = weights_NK.repeat_interleave(twins, dim=1) / twins
        hooks.append(_Replayed(ids_NK, weights_NK))
        hooks[-1].handle = router.register_forward_hook(hooks[-1], prepend=True)
    return hooks


class _Replayed:
    """A forward hook that replaces a router's logits, weights and ids."""

    def __init__(self, ids_NK: Tensor, weights_NK: Tensor):
        self._ids, self._weights, self._at = ids_NK, weights_NK, 0
        self.handle: RemovableHandle | None = None

    def coming(self, tokens: int) -> Tensor:
        """Return the experts of the next tokens."""
        return self._ids[(self._at + torch.arange(tokens)) % len(self._ids)]

    @property
    def position(self) -> int:
        """The next token's."""
        return self._at

    def restart(self) -> None:
        self._at = 0

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
        logits_TE, weights_TK, ids_TK = output
        rows = (self._at + torch.arange(len(logits_TE))) % len(self._ids)
        self._at += len(logits_TE)
        ids, weights = self._ids[rows], self._weights[rows]
        scores_TE = (0.1 * logits_TE.float()).softmax(-1) * (1 - weights.sum(-1, keepdim=True))
        scores_TE = scores_TE.clamp_min(1e-6).scatter(-1, ids, weights.clamp_min(1e-4))
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        chosen = scores_TE.gather(-1, ids).to(weights_TK.dtype)
        return scores_TE.log().to(logits_TE.dtype), chosen, ids.to(ids_TK.dtype)


def table(results: dict[str, Any]) -> Table:
    out = Table(title="decoding one sequence", title_justify="left")
    for name in (
        "policy",
        "slots",
        "tok/s",
        "prompt",
        "ceiling",
        "hits",
        "moved",
        "read/token",
        "peak",
    ):
        out.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for name, one in results.items():
        if "failed" in one:
            out.add_row(name, "failed")
            continue
        out.add_row(
            name,
            f"{one['slots']}/{one['experts']}" if "slots" in one else "",
            f"{one['tokens_per_second']:.2f}",
            f"{one['prefill_tokens_per_second']:.0f}",
            f"{one['ceiling']:.1f}" if "ceiling" in one else "",
            f"{one['hit_rate']:.1%}" if "hit_rate" in one else "",
            f"{one['substituted_mass']:.1%}" if "substituted_mass" in one else "",
            format_bytes(one["bytes_read_per_token"]) if "bytes_read_per_token" in one else "",
            format_bytes(one["peak_process_bytes"]),
        )
    return out


if __name__ == "__main__":
    main()
