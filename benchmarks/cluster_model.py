"""A model, not a measurement: the time of a training step on clusters from 8 to 1,024 GPUs.

Over a throttled link, a step is a sequence: layers compute, exchange tokens, gather weights and
reduce gradients, and all of that traffic leaves a machine through one bucket of bytes, in order.
Tokens wait for their exchange and for the weights before them; of weights only the gathering in the
forward pass is waited for at once. Three constants are fitted to steps that were measured
(`locmoe.py`) at two rates, and the model is judged by what it says of the others. On a cluster a
step takes the time of its FLOPs at a range of MFU, the all-to-all of tokens, and the part of the
traffic of weights and gradients that is taken not to overlap with computing.

    python benchmarks/cluster_model.py [--record results/locmoe-traffic-2026-12-01.json] [--save]
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import record
from rich.console import Console
from rich.table import Table

from moefit.dsmoe.card import ModelCard, model_card
from moefit.dsmoe.presets import preset

# The throttled link: `tc` lets bursts of this size pass at once (tbf, burst 256kb).
BURST = 256e3
LAYERS = 3  # with two all-to-alls in each pass: there and back
FITTED = (150.0, 90.0)  # Mbit/s
EXPOSED = 0.5  # assumed: the share of weights' and gradients' traffic that a GPU waits for

PEAK = 989e12  # FLOP/s of an H100 in bf16, dense (its data sheet)
MFU = (0.35, 0.5)  # of the computing alone
NVLINK, NETWORK = 450e9, 50e9  # bytes/s per GPU and direction: NVLink 4; 400 Gbit/s per GPU
EFFICIENCY = 0.8  # of a link's rate that collectives reach
PER_MACHINE = 8
TOKENS, LENGTH = 16_384, 4096  # per GPU and step; of a sequence
WEIGHT, ACTIVATION = 4, 2  # bytes: weights and gradients travel in fp32, tokens in bf16
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
CHOSEN = 8  # of the 32 experts of the sparse twin


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians of one router at one rate of the link."""

    router: str
    mbit: float
    seconds: float
    tokens_out: float  # bytes that a machine sends: tokens, and weights with gradients
    weights_out: float

    @property
    def is_dense(self) -> bool:
        return not self.tokens_out


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Computing of sparse and dense models in seconds; how uneven an exchange is.

    Processes wait for the machine that sends most in an exchange, and that is another one in each:
    `uneven` is the most of a machine, in units of the mean.
    """

    sparse: float
    dense: float
    uneven: float


def measured(runs: dict[str, Any]) -> list[Measured]:
    found = []
    for router, run in runs.items():
        for mbit, steps in run["rates"].items():
            out = _median(steps, "bytes_out_of_a_machine")
            tokens = _median(steps, "cross_node_bytes") / 2  # of both machines
            found.append(
                Measured(
                    router=router,
                    mbit=float(mbit),
                    seconds=_median(steps, "seconds"),
                    tokens_out=tokens,
                    weights_out=out - tokens,
                )
            )
    return found


def _median(steps: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(step.get(name, 0.0) for step in steps)


class Link:
    """A bucket of bytes that refills at a rate; what is sent beyond it waits, in order.

    Args:
        rate: Bytes per second.
    """

    def __init__(self, rate: float):
        self._rate, self._bytes, self.seconds = rate, BURST, 0.0

    def compute(self, seconds: float) -> None:
        """Let time pass, in which the bucket refills, or what waits is sent."""
        self.seconds += seconds
        self._bytes = min(BURST, self._bytes + seconds * self._rate)

    def send(self, size: float) -> None:
        """Give bytes to the link."""
        self._bytes -= size

    def wait(self) -> None:
        """Let time pass until everything is sent."""
        self.compute(max(0.0, -self._bytes) / self._rate)


def throttled(point: Measured, constants: Constants) -> float:
    """Return the seconds of a step over the throttled link, the second of two."""
    link = Link(point.mbit * 1e6 / 8)
    computing = constants.dense if point.is_dense else constants.sparse
    tokens = constants.uneven * point.tokens_out / (4 * LAYERS)
    weights = point.weights_out / (3 * LAYERS)  # gathered in both passes, and gradients reduced
    began = 0.0
    for _ in range(2):
        began = link.seconds
        for backward, _ in itertools.product((False, True), range(LAYERS)):
            link.send(weights)
            if not backward:
                link.wait()
            for _ in range(2):  # there and back
                link.compute(computing / (4 * LAYERS))
                if not point.is_dense:
                    link.send(tokens)
                    link.wait()
            if backward:
                link.send(weights)
        link.wait()
    return link.seconds - began


def fit(points: Sequence[Measured]) -> Constants:
    """Return the constants with the least squares of relative errors, on a grid."""

    def error(constants: Constants, some: Sequence[Measured]) -> float:
        return sum((throttled(one, constants) / one.seconds - 1) ** 2 for one in some)

    dense = [one for one in points if one.is_dense]
    sparse = [one for one in points if not one.is_dense]
    assert dense and sparse, "the record has no dense, or no sparse model"
    seconds = [n / 100 for n in range(25, 95)]
    grid = [Constants(sparse=s, dense=s, uneven=1 + n / 20) for n in range(11) for s in seconds]
    best = min(grid, key=lambda one: error(one, sparse))
    return min(
        (Constants(sparse=best.sparse, dense=s, uneven=best.uneven) for s in seconds),
        key=lambda one: error(one, dense),
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model on a cluster. `local` is the factor on tokens that leave their machine."""

    name: str
    card: ModelCard
    width: int
    spread: bool  # experts by all-to-all, or all weights sharded
    local: float = 1.0

    def seconds(self, gpus: int, mfu: float) -> dict[str, float]:
        """Return the parts of a step: computing, tokens, and weights as far as not hidden."""
        flops = self.card.training_flops_per_token(LENGTH) * TOKENS
        computing = flops / (PEAK * mfu)
        tokens = self._tokens(gpus) if self.spread else 0.0
        weights = EXPOSED * self._weights(gpus)
        return {"computing": computing, "tokens": tokens, "weights": weights}

    def _group(self, gpus: int) -> int:
        return min(gpus, self.card.num_experts)

    def _tokens(self, gpus: int) -> float:
        """Return the seconds of all-to-all: there and back, forward and backward, each layer."""
        group = self._group(gpus)
        sent = 4 * self.card.num_layers * TOKENS * CHOSEN * self.width * ACTIVATION
        away = self.local * (1 - PER_MACHINE / group)
        own = (1 - away) * (1 - 1 / PER_MACHINE)
        return sent * (own / NVLINK + away / NETWORK) / EFFICIENCY

    def _weights(self, gpus: int) -> float:
        """Return the seconds of gathering weights twice and reducing gradients (HSDP).

        `parallel.replicate` is the number of machines, `parallel.expert` the group. Weights are
        sharded within machines, gradients summed over machines. Spread experts are not gathered;
        their gradients are summed over the groups that have the same ones.
        """
        experts = self.card.parameters.mlp_experts if self.spread else 0
        shared = self.card.total - experts
        inside = 3 * shared * (1 - 1 / PER_MACHINE) * WEIGHT / NVLINK
        machines, copies = gpus // PER_MACHINE, gpus // self._group(gpus)
        across = 2 * shared / PER_MACHINE * (1 - 1 / machines)
        across += 2 * experts / self._group(gpus) * (1 - 1 / copies)
        return (inside + across * WEIGHT / NETWORK) / EFFICIENCY

    def bytes_per_gpu(self, gpus: int) -> float:
        """Return weights, gradients and AdamW's state (16 bytes each) that a GPU holds."""
        experts = self.card.parameters.mlp_experts if self.spread else 0
        return 16 * ((self.card.total - experts) / PER_MACHINE + experts / self._group(gpus))


def layouts(local: float) -> list[Layout]:
    dense = preset("dsmoe-6b")
    sparse = preset(
        "dsmoe-6b", training_rule=f"top_k:{CHOSEN}", inference_rule=f"top_k:{CHOSEN}",
        mlp_mi_loss_coef=0.0, load_balancing_loss_coef=0.01,
    )  # fmt: skip
    width = dense.hidden_size
    twin = model_card(sparse)
    return [
        Layout(name="dsmoe-6b, dense", card=model_card(dense), width=width, spread=False),
        Layout(name="sparse twin, top 8 of 32", card=twin, width=width, spread=True),
        Layout(name="the same, LocMoE", card=twin, width=width, spread=True, local=local),
    ]


def table(found: Sequence[Layout]) -> list[dict[str, Any]]:
    rows = []
    for layout, gpus, mfu in itertools.product(found, GPUS, MFU):
        parts = layout.seconds(gpus, mfu)
        total = sum(parts.values())
        rows.append(
            {
                "layout": layout.name,
                "gpus": gpus,
                "mfu_of_computing": mfu,
                **{f"{name}_seconds": value for name, value in parts.items()},
                "step_seconds": total,
                "tokens_per_gpu_second": TOKENS / total,
                "efficiency": parts["computing"] / total,
                "bytes_per_gpu": layout.bytes_per_gpu(gpus),
            }
        )
    return rows


def judged(points: Sequence[Measured], constants: Constants) -> list[dict[str, Any]]:
    return [
        {
            "router": one.router,
            "mbit": one.mbit,
            "used_in_fit": one.mbit in FITTED,
            "measured_seconds": one.seconds,
            "model_seconds": throttled(one, constants),
            "error": throttled(one, constants) / one.seconds - 1,
        }
        for one in points
    ]


def share_kept(runs: dict[str, Any], router: str) -> float:
    """Return a router's tokens that leave their machine, relative to those of switch."""
    shares = [
        statistics.fmean(_median(steps, "cross_node_share") for steps in one["rates"].values())
        for one in (runs[router], runs["switch"])
    ]
    return shares[0] / shares[1]


def draw(errors: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    for used, mark in ((True, "o"), (False, "s")):
        mine = [one for one in errors if one["used_in_fit"] == used]
        label = "fitted (150, 90 Mbit/s)" if used else "predicted (250, 50 Mbit/s)"
        x, y = ([one[name] for one in mine] for name in ("measured_seconds", "model_seconds"))
        left.plot(x, y, mark, label=label, alpha=0.7)
    ends = [0.4, 1.5]
    left.plot(ends, ends, "k-", lw=0.7)
    left.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], alpha=0.15)
    left.set_xlabel("measured step over a throttled link, s")
    left.set_ylabel("model, s (band: 15%)")
    left.legend()
    for number, name in enumerate(dict.fromkeys(row["layout"] for row in rows)):
        low, high = (
            [r for r in rows if (r["layout"], r["mfu_of_computing"]) == (name, mfu)] for mfu in MFU
        )
        ends = [[r["tokens_per_gpu_second"] for r in side] for side in (low, high)]
        right.fill_between(GPUS, *ends, alpha=0.35, label=name, color=f"C{number}")
    right.set_xscale("log", base=2)
    right.set_xticks(GPUS, [str(one) for one in GPUS])
    right.set_xlabel("GPUs (8 a machine, NVLink, 400 Gbit/s each)")
    right.set_ylabel("tokens per second and GPU")
    right.set_ylim(bottom=0)
    right.set_title(f"MODEL, NOT MEASURED: MFU of computing {MFU[0]:.0%} to {MFU[1]:.0%}")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    shown = Table(*rows[0], title=title)
    for row in rows:
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=170).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "locmoe-traffic-2026-12-01.json"
    parser.add_argument("--record", type=Path, default=default)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    runs = json.loads(arguments.record.read_text())["results"]["runs"]
    points = measured(runs)
    constants = fit([one for one in points if one.mbit in FITTED])
    errors = judged(points, constants)
    rows = table(layouts(share_kept(runs, "switch + loss")))
    show(errors, f"{constants}")
    show(rows, "model, not measured")
    if arguments.save:
        notes = (
            f"a model; fitted to {arguments.record.name} at {FITTED} Mbit/s, judged at the other "
            f"rates; cluster: {PEAK:.3g} FLOP/s, {NVLINK:.3g} and {NETWORK:.3g} bytes/s per GPU at "
            f"{EFFICIENCY:.0%}, {TOKENS} tokens per GPU and step, {EXPOSED:.0%} of the traffic of "
            "weights and gradients not hidden (assumed)"
        )
        results = {"constants": vars(constants), "validation": errors, "cluster": rows}
        path = record.write("cluster-model", results, notes=notes)
        draw(errors, rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
