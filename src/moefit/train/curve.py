"""The picture of a run: losses and what the routers learnt.

Takes log records, gives a PNG. Knows nothing of training.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss, and below them the MLP routers' state if there are any.

    Raises OSError if it cannot be written; what stood at `path` is then untouched.
    """
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "eval"]
    routed = [record for record in train if "mlp_mi" in record]
    figure = Figure(figsize=(8, 7 if routed else 4), layout="constrained")
    axes = figure.subplots(2 if routed else 1, 1, squeeze=False, sharex=True)[:, 0]
    _draw_losses(axes[0], train, held_out)
    if routed:
        _draw_routers(axes[1], routed)
    axes[-1].set_xlabel("optimizer step")
    beside = path.with_name(f".writing-{path.name}")  # the ending says which format to write
    try:
        figure.savefig(beside, dpi=120)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _draw_losses(axes: Any, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], label="training", lw=1)
    if held_out:
        steps, losses = [r["step"] for r in held_out], [r["loss"] for r in held_out]
        axes.plot(steps, losses, "o-", label="held out", ms=3)
    axes.set_ylabel("cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_routers(axes: Any, routed: list[dict[str, Any]]) -> None:
    labels = {
        "mlp_h_e": "H(e) / ln E: balance over the batch",
        "mlp_h_e_given_x": "H(e|x) / ln E: indecision per token",
        "mlp_active": "active share at the log's epsilon",
        "mlp_dead": "dead share",
    }
    steps = [record["step"] for record in routed]
    for name, label in labels.items():
        axes.plot(steps, [record[name] for record in routed], label=label, lw=1)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("MLP routers, mean over layers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
