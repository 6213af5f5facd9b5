"""LocMoE in small: routers whose tokens stay on their machine, over a slow link between machines.

Two network namespaces stand for two machines of two processes each, joined by a link whose rate
is limited (`tc`, root needed; latency is not added). Models of several routers are trained on the
same tokens over an open link, machine 0 on Python code and machine 1 on prose. Then single steps
are timed at each rate, models in turn, with a learning rate of 0 so that routing no longer changes.

    python benchmarks/locmoe.py [--steps 80] [--rates 400,250,150] [--repeats 5]
        [--routers "top 4;top 4 hierarchical"] [--models FOLDER] [--save]

With `--models` trained models are kept, so that a first run with `--repeats 0` trains and a second
one times, on a machine that is quiet for as long as that takes.

Baselines: switch with the balance loss; hash; loss-free bias; node-limited routing and hierarchical
all-to-all, of 4 experts a token, because of one they change nothing; a bias towards the own
machine; its experts only, the upper bound; DS-MoE's dense training, without any all-to-all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import record
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moefit.train.balancing import BalancingBias
from moefit.train.config import TrainConfig, make_config
from moefit.train.data.batches import Batches, BatchesByMachine
from moefit.train.model import build_model, loss_weights
from moefit.train.optimizer import make_optimizer
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.locality import NodeLocality
from moefit.train.parallel.parallelism import Parallelism, parallelism
from moefit.train.parallel.processes import Processes, joined_processes
from moefit.train.schedule import learning_rate, mi_scale, set_learning_rate
from moefit.train.step import HeldOutEvaluator, Stepper, make_losses

WIDTH, LAYERS, EXPERTS, BATCH, LENGTH = 128, 3, 16, 16, 192
ROUTERS: dict[str, dict[str, Any]] = {
    "switch": {},
    "hash": {"kind": "hash"},
    "GrAP": {"kind": "grap"},
    "GrAP + loss": {"kind": "grap", "mu": 1.0},
    "switch + loss": {"mu": 1.0},
    "switch + 0.1 loss": {"mu": 0.1},
    "switch + loss, late": {"mu": 1.0, "ramp": (0.5, 0.75)},
    "switch + bias 1": {"bias": 1.0},
    "loss-free bias": {"balancing_bias": 1e-3},
    "own machine only": {"limit": "own"},
    "top 4": {"k": 4},
    "top 4 hierarchical": {"k": 4, "way": "hierarchical"},
    "top 4 of one machine": {"k": 4, "limit": 1},
    "top 4 of one machine, hierarchical": {"k": 4, "limit": 1, "way": "hierarchical"},
    "DS-MoE dense": {"dense": True},
}
BASE = "switch"


def settings(router: dict[str, Any], steps: int) -> TrainConfig:
    """Return the configuration of a router's run."""
    dense = router.get("dense", False)
    chosen = router.get("k", 1)
    rule = "dense" if dense else f"top_k:{chosen}"
    kind, moved = router.get("kind", "linear"), router.get("balancing_bias", 0.0)
    return make_config(
        {
            "model": {
                "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_experts": EXPERTS,
                "intermediate_size": 512 // (EXPERTS if dense else chosen), "mlp_type": "gelu",
                "num_attention_heads": 4, "training_rule": rule, "inference_rule": rule,
                "router_type": kind,
            },
            "loss": {
                "load_balancing": 0.0 if dense or moved or kind == "hash" else 0.01,
                "balancing_bias": moved,
                "mlp_mi": 4e-4 if dense else 0.0,
                "locality": router.get("mu", 0.0),
                "locality_ramp": router.get("ramp", (0, 0)),
            },
            "parallel": {
                "experts": "data" if dense else "all_to_all",
                "node_bias": router.get("bias", 0.0),
                "node_limit": router.get("limit"),
                "all_to_all": router.get("way", "flat"),
                "reshard": False,
            },
            "optimizer": {"lr": 2e-3, "warmup_steps": min(10, steps - 1)},
            "batch_size": BATCH, "seq_len": LENGTH, "steps": steps, "precision": "fp32",
        }
    )  # fmt: skip


def texts() -> list[np.ndarray]:
    """Return the bytes of Python code and of prose, from the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    code = b"".join(path.read_bytes() for path in sorted(root.glob("*.py"))[:120])
    prose = (root / "pydoc_data" / "topics.py").read_bytes()
    return [np.frombuffer(one[:3_000_000], np.uint8) for one in (code, prose)]


@dataclass
class Contestant:
    """One router's model, spread over the processes."""

    config: TrainConfig
    model: Any
    parallel: Parallelism
    nodes: NodeLocality | None
    stepper: Stepper
    balancing: BalancingBias | None

    @classmethod
    def of(cls, router: dict[str, Any], steps: int, processes: Processes) -> "Contestant":
        config, cpu = settings(router, steps), torch.device("cpu")
        model = build_model(config, vocab_size=256, eos_token_id=0).train()
        parallel = parallelism(config, processes, cpu)
        parallel.wrap(model)
        nodes = NodeLocality.of(config, model, parallel)
        losses = make_losses(
            model, loss_weights(config, model), compile=False, total=parallel.total, nodes=nodes
        )
        optimizer = make_optimizer(model, config.optimizer)
        stepper = Stepper(
            model=model, optimizer=optimizer, losses=losses, device=cpu, bf16=False,
            clip=config.optimizer.clip, parallel=parallel,
        )  # fmt: skip
        balancing = BalancingBias.of(config, model)
        return cls(config, model, parallel, nodes, stepper, balancing)

    def step(self, ids: Tensor, step: int, rate: float) -> None:
        if self.nodes is not None:
            ramp = mi_scale(step, self.config.steps, self.config.loss.locality_ramp)
            self.nodes.weight.fill_(self.config.loss.locality * ramp)
        set_learning_rate(self.stepper.optimizer, rate)
        self.stepper.step([ids], 1)
        if self.balancing is not None and rate:
            self.balancing.update(self.parallel.processes)


def transmitted(interface: str) -> int:
    """Return the bytes that this machine has sent over the link."""
    path = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(path.read_text()) if path.exists() else 0


def trained(
    one: Contestant, steps: int, batches: BatchesByMachine, held_out: list[np.ndarray], kept: Path
) -> dict[str, Any]:
    """Train a model, or load what an earlier run has kept; return its losses."""
    parts = [getattr(p, "to_local", lambda p=p: p)().detach() for p in one.model.parameters()]
    parts += one.model.buffers()
    if kept.is_file():
        found = torch.load(kept)
        if found["steps"] != steps:
            raise SystemExit(f"{kept} was trained for {found['steps']} steps, not {steps}")
        for part, stored in zip(parts, found.pop("parts"), strict=True):
            part.copy_(stored)
        return found
    began = time.perf_counter()
    for step in range(1, steps + 1):
        rate = learning_rate(step - 1, steps, one.config.optimizer)
        one.step(batches.batch(step), step, rate)
    losses = [held_out_loss(one, text) for text in held_out]
    found = {"held_out": losses, "training_seconds": time.perf_counter() - began, "steps": steps}
    torch.save({**found, "parts": parts}, kept)
    return found


def work(folder: Path, models: Path, options: argparse.Namespace, routers: list[str]) -> None:
    """Train and time all routers, as one of the processes."""
    torch.set_num_threads(1)
    with joined_processes(timeout=300) as processes:
        corpus = texts()
        held_out = [text[-len(text) // 20 :] for text in corpus]
        shares = tuple(
            Batches(tokens=t[: -len(t) // 20], seq_len=LENGTH, batch_size=BATCH // 2, seed=0)
            for t in corpus
        )
        batches = BatchesByMachine(shares=shares)
        found: dict[str, Any] = {}
        contestants = {}
        for name in routers:
            one = contestants[name] = Contestant.of(ROUTERS[name], options.steps, processes)
            kept = models / f"{name.replace(' ', '-')}-{processes.rank}.pt"
            found[name] = trained(one, options.steps, batches, held_out, kept)
            if processes.is_main:
                print(name, found[name], flush=True)
        if processes.is_main:
            print("timing", flush=True)
        rates = options.rates.split(",") if options.repeats else []
        timed = time_steps(folder, contestants, batches, rates, options.repeats, processes)
        found = {name: {**one, "rates": timed[name]} for name, one in found.items()}
        if processes.is_main:
            (folder / "results.json").write_text(json.dumps(found))


def held_out_loss(one: Contestant, tokens: np.ndarray) -> float:
    evaluator = HeldOutEvaluator(
        tokens=tokens, seq_len=LENGTH, batch_size=BATCH, limit=BATCH * LENGTH * 2, bf16=False,
        parallel=one.parallel,
    )  # fmt: skip
    loss = evaluator.loss(one.model, lambda: False)
    assert loss is not None
    return loss


def time_steps(
    folder: Path,
    contestants: dict[str, Contestant],
    batches: BatchesByMachine,
    rates: list[str],
    repeats: int,
    processes: Processes,
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return, per router and rate, the measurements of single steps, routers in turn."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in contestants}
    waiting = Clock(torch.device("cpu"))
    for one in contestants.values():
        if one.parallel.dispatch is not None:
            one.parallel.dispatch.waiting = waiting
    for rate in rates:
        if processes.is_main:
            (folder / "want").write_text(rate)
            while not (folder / f"have-{rate}").exists():
                time.sleep(0.05)
        for repeat in range(repeats + 1):  # the first is a warm-up
            for name, one in contestants.items():
                processes.most(0)  # all begin together
                sent, began = transmitted(interface), time.perf_counter()
                one.step(batches.batch(10_000 + repeat), one.config.steps, 0.0)
                seconds = processes.sums((time.perf_counter() - began,))[0] / processes.size
                per_machine = processes.sums((transmitted(interface) - sent,))[0] / processes.size
                dispatch = one.parallel.dispatch
                waited = processes.sums((waiting.seconds(),))[0] / processes.size
                moved = {} if dispatch is None else dispatch.report(1)
                if repeat:
                    row = {"seconds": seconds, "bytes_out_of_a_machine": per_machine, **moved}
                    row["waiting_seconds"] = waited
                    found[name].setdefault(rate, []).append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rates", default="400,250,150", help="Mbit/s")
    parser.add_argument("--repeats", type=int, default=5, help="0 trains only")
    parser.add_argument("--models", type=Path, help="folder in which trained models are kept")
    parser.add_argument("--routers", default=";".join(ROUTERS), help="names, with ; between")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    routers = list(dict.fromkeys([BASE, *arguments.routers.split(";")]))
    if unknown := [name for name in routers if name not in ROUTERS]:
        parser.error(f"--routers {unknown[0]!r} is none of {'; '.join(ROUTERS)}")
    if arguments.worker:
        work(arguments.worker, arguments.models or arguments.worker, arguments, routers)
        return
    if arguments.models:
        arguments.models.mkdir(parents=True, exist_ok=True)
    found = drive(sys.argv[1:])
    rows = summary(found)
    show(rows)
    if arguments.save:
        notes = (
            f"medians of {arguments.repeats} interleaved steps; all-to-all without waiting for "
            f"others, which a barrier before each measures; {WIDTH} wide, {LAYERS} layers, "
            f"{EXPERTS} experts, {BATCH} x {LENGTH} bytes of text a step, {arguments.steps} "
            "steps of training, one seed; 4 processes on the machine's cores"
        )
        path = record.write("locmoe-traffic", {"summary": rows, "runs": found}, notes=notes)
        draw(rows, path.with_suffix(".png"))


def drive(options: list[str]) -> dict[str, Any]:
    """Lay out two machines, start two processes in each, and set the rates that they ask for."""
    for node in (0, 1):
        shell(f"ip netns add moefit{node}")
    try:
        shell("ip link add mf0 netns moefit0 type veth peer name mf1 netns moefit1")
        for node in (0, 1):
            shell(f"ip -n moefit{node} addr add 10.77.0.{node + 1}/24 dev mf{node}")
            shell(f"ip -n moefit{node} link set lo up")
            shell(f"ip -n moefit{node} link set mf{node} up")
        with tempfile.TemporaryDirectory() as name:
            return follow(Path(name), options)
    finally:
        for node in (0, 1):
            for pid in shell(f"ip netns pids moefit{node}").split():
                shell(f"kill -9 {pid}")
            shell(f"ip netns del moefit{node}")


def follow(folder: Path, options: list[str]) -> dict[str, Any]:
    agents = [start(node, folder, options) for node in (0, 1)]
    while any(agent.poll() is None for agent in agents):
        want = folder / "want"
        if want.exists():
            rate = want.read_text()
            if rate and not (folder / f"have-{rate}").exists():
                for node in (0, 1):
                    limit = f"root tbf rate {rate}mbit burst 256kb latency 100ms"
                    inside = f"ip netns exec moefit{node} tc qdisc replace dev mf{node} {limit}"
                    shell(inside)
                (folder / f"have-{rate}").touch()
        time.sleep(0.05)
    return json.loads((folder / "results.json").read_text())


def start(node: int, folder: Path, options: list[str]) -> subprocess.Popen:
    interface = f"mf{node}"
    command = [
        "ip", "netns", "exec", f"moefit{node}", "env", f"GLOO_SOCKET_IFNAME={interface}",
        f"TP_SOCKET_IFNAME={interface}", "OMP_NUM_THREADS=1", sys.executable, "-m",
        "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(node),
        "--master-addr", "10.77.0.1", "--master-port", "29511", __file__, "--worker", str(folder),
        *options,
    ]  # fmt: skip
    return subprocess.Popen(command)


def shell(command: str) -> str:
    return subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout


def summary(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return medians per router and rate, and savings against the switch router."""
    rows = []
    base_loss = statistics.mean(found[BASE]["held_out"])
    for name, one in found.items():
        for rate, steps in one["rates"].items():
            base = found[BASE]["rates"][rate]
            seconds, base_seconds = median(steps, "seconds"), median(base, "seconds")
            share = median(base, "all_to_all_seconds") / base_seconds
            kept = median(steps, "cross_node_bytes") / median(base, "cross_node_bytes")
            wire = median(steps, "bytes_out_of_a_machine") * 8 / (float(rate) * 1e6)
            rows.append(
                {
                    "router": name,
                    "mbit": float(rate),
                    "step_seconds": seconds,
                    "all_to_all_seconds": median(steps, "all_to_all_seconds"),
                    "waiting_seconds": median(steps, "waiting_seconds"),
                    "wire_seconds": wire,
                    "cross_node_share": median(steps, "cross_node_share"),
                    "cross_node_bytes": median(steps, "cross_node_bytes"),
                    "cross_node_messages": median(steps, "cross_node_messages"),
                    "idle_experts": median(steps, "idle_experts"),
                    "load_cv": median(steps, "load_cv"),
                    "base_all_to_all_share": share,
                    "saving": 1 - seconds / base_seconds,
                    "ceiling": share * (1 - kept),
                    "loss_code": one["held_out"][0],
                    "loss_prose": one["held_out"][1],
                    "loss_change": statistics.mean(one["held_out"]) / base_loss - 1,
                }
            )
    return rows


def median(steps: list[dict[str, float]], name: str) -> float:
    return statistics.median(step.get(name, 0.0) for step in steps)


def show(rows: list[dict[str, Any]]) -> None:
    names = (
        "router", "mbit", "step_seconds", "all_to_all_seconds", "waiting_seconds", "wire_seconds",
        "cross_node_share", "cross_node_bytes", "cross_node_messages", "base_all_to_all_share",
        "saving", "ceiling", "loss_code", "loss_prose", "loss_change",
    )  # fmt: skip
    table = Table(*names)
    for row in rows:
        table.add_row(*(v if isinstance(v := row[n], str) else f"{v:.3f}" for n in names))
    Console(width=200).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in ROUTERS:
        mine = [row for row in rows if row["router"] == name and name != BASE]
        if not mine:
            continue
        shares = [100 * row["base_all_to_all_share"] for row in mine]
        (line,) = left.plot(shares, [100 * row["saving"] for row in mine], "o-", label=name)
        if name != "DS-MoE dense":
            ceilings = [100 * row["ceiling"] for row in mine]
            left.plot(shares, ceilings, ":", color=line.get_color())
        slow = min(mine, key=lambda row: row["mbit"])
        right.plot(100 * slow["loss_change"], 100 * slow["saving"], "o", color=line.get_color())
        right.annotate(name, (100 * slow["loss_change"], 100 * slow["saving"]), fontsize=8)
    left.set_xlabel("all-to-all, % of a step of the switch router")
    left.set_ylabel("time saved per step, %")
    left.legend(fontsize=8, title="dotted: share x bytes removed")
    right.set_xlabel("change of held-out loss, % (mean of both domains)")
    right.set_ylabel("time saved at the slowest link, %")
    for axes in (left, right):
        axes.axhline(0, color="grey", lw=0.5)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
