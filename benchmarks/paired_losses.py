"""Compare the training losses of runs on the same batches.

Runs with the same data, seed and batch size see the same tokens at the same step, so differences of
their training losses have far less noise than the losses. The arguments are run folders; the first
is the base. Prints and, with --save NAME, records the mean difference over each hundred steps.

    python benchmarks/paired_losses.py BASE RUN... [--save NAME]
"""

import argparse
import statistics
from pathlib import Path

import record
import yaml

from moefit.train.run_folder import read_log

ROUTERS = ("mlp_h_e", "mlp_h_e_given_x", "mlp_active", "mlp_dead")


def losses(out: Path) -> dict[int, dict]:
    return {r["step"]: r for r in read_log(out) if r["kind"] == "train"}


def differences(base: dict[int, dict], run: dict[int, dict]) -> dict[int, float]:
    """Return the mean difference in nats per token by the last step of each hundred."""
    paired: dict[int, list[float]] = {}
    for step in sorted(base.keys() & run.keys()):
        hundred = (step - 1) // 100 * 100 + 100
        paired.setdefault(hundred, []).append(run[step]["loss"] - base[step]["loss"])
    return {hundred: statistics.mean(found) for hundred, found in paired.items() if len(found) > 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--save")
    options = parser.parse_args()
    base, results = losses(options.base), {}
    for out in options.runs:
        run = losses(out)
        config = yaml.safe_load((out / "config.yaml").read_text())
        last = run[max(run)]
        results[out.name] = {
            "model": {k: v for k, v in config["model"].items() if v is not None},
            "loss": config["loss"],
            "to_base_in_nats": differences(base, run),
            "routers_at_the_end": {name: last[name] for name in ROUTERS if name in last},
            "steps": last["step"],
        }
        found = " ".join(f"{k}:{v:+.3f}" for k, v in results[out.name]["to_base_in_nats"].items())
        print(out.name, found, results[out.name]["routers_at_the_end"])
    if options.save:
        notes = f"Differences to {options.base.name} on the same batches; stopped runs included."
        print(record.write("paired-losses", results, notes=notes, suffix=options.save))


if __name__ == "__main__":
    main()
