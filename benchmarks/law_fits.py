"""Fit published training runs, and compare with the coefficients that were published for them.

    python benchmarks/law_fits.py CLARK.csv.gz CHINCHILLA.csv [--bootstrap 200] [--save NAME]

CLARK.csv.gz: data/curves.csv.gz of google-deepmind/scaling_laws_for_routing (CC-BY 4.0). Runs with
top-1 routing, an MoE in every other block and seed 42, with the dense ones, at their last step, by
loss on the validation set; least squares. CHINCHILLA.csv: data/svg_extracted_data.csv of
epoch-research/analyzing-chinchilla, without the five points of the highest loss, which its authors
leave out. They print the coefficients of a Huber likelihood whose threshold is a thousandth of a
fitted scale, in effect least absolute deviations; so the threshold is 1e-6 here, and 1e-3 for
comparison.
"""

import argparse
import csv
import gzip
from pathlib import Path
from typing import Any

import record
from rich.console import Console
from rich.table import Table

from moefit.advise.fitting import FitSettings, fit_law
from moefit.advise.forms import CHINCHILLA, CLARK, Form
from moefit.advise.laws import published_laws
from moefit.advise.runs import Run, Runs
from moefit.advise.shapes import Count

TOKENS = 130e9  # of all of Clark et al.'s runs
OUTLIERS = 5
# Refitted elsewhere by least squares to the same runs: router, then a, b, c, d, start, most.
REFITTED = {
    "S-Base": (-0.08303, -0.11804, 0.00992, 1.11358, 2.0746, 238.67),
    "RL-R": (-0.08273, -0.12342, 0.01123, 1.10701, 1.7219, 470.05),
    "Hash": (-0.08736, -0.13836, 0.01264, 1.15953, 4.2688, 427.32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clark", type=Path)
    parser.add_argument("chinchilla", type=Path)
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    results = {}
    for router, expected in REFITTED.items():
        runs = clark_runs(arguments.clark, router)
        reference = dict(zip(CLARK.coefficients, expected, strict=True))
        results[f"clark {router}"] = fitted(runs, CLARK, reference, 1.0, arguments.bootstrap)
    runs = chinchilla_runs(arguments.chinchilla)
    published = dict(published_laws()["besiroglu"].coefficients)
    for huber in (1e-6, 1e-3):
        name = f"chinchilla, threshold {huber:g}"
        results[name] = fitted(runs, CHINCHILLA, published, huber, arguments.bootstrap)
    Console(width=100).print(table(results))
    if arguments.save:
        notes = (
            "reference: published coefficients; difference: fitted over reference, less one; "
            "largest: errors on the 15% of runs with most compute, fitted to the others"
        )
        print(record.write("law-fits", results, notes=notes, suffix=arguments.save))


def clark_runs(path: Path, router: str) -> Runs:
    """Return the last step of each run with a router, and of dense ones."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last: dict[str, dict[str, str]] = {}
    for row in rows:
        known = last.get(row["hyper_id"])
        if known is None or int(row["step"]) > int(known["step"]):
            last[row["hyper_id"]] = row
    wanted = {"k": "1", "routing_frequency": "0.5", "seed": "42"}
    used = tuple(
        Run(
            name=f"{row['router_type']} {row['model_size_label']} E={row['num_experts']}",
            parameters=float(row["dense_parameter_count"]),
            tokens=TOKENS,
            experts=float(row["num_experts"]),
            loss=float(row["loss_validation"]),
        )
        for row in last.values()
        if row["router_type"] in (router, "Dense")
        and all(row[name] == value for name, value in wanted.items())
    )
    return Runs(used=used, left_out={}, counts=Count.active)


def chinchilla_runs(path: Path) -> Runs:
    """Return the digitised points; those with the highest losses are left out and named."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = []
    for number, row in enumerate(rows, start=1):
        size, flops = float(row["Model Size"]), float(row["Training FLOP"])
        tokens, loss = flops / 6 / size, float(row["loss"])
        name = f"point {number}: {size / 1e9:.2f} B on {tokens / 1e9:.2f} B tokens"
        runs.append(Run(name=name, parameters=size, tokens=tokens, experts=1.0, loss=loss))
    runs.sort(key=lambda one: one.loss)
    outliers = {one.name: f"loss {one.loss:.3f}" for one in runs[-OUTLIERS:]}
    used = tuple(runs[:-OUTLIERS])
    return Runs(used=used, left_out=outliers, counts=Count.active_with_embeddings)


def fitted(
    runs: Runs, form: Form, reference: dict[str, float], huber: float, bootstrap: int
) -> dict[str, Any]:
    """Return a fit with its differences from reference coefficients."""
    settings = FitSettings(bootstrap=bootstrap, hold_out_largest=True, huber=huber)
    fit = fit_law(runs, form, settings)
    values = fit.as_dict()
    for name in ("leave_out", "largest"):
        errors = values[name]["relative"]
        worst = max(errors, key=lambda run: abs(errors[run]))
        values[name] = {
            "rms_log10": values[name]["rms_log10"],
            "worst": {"run": worst, "relative": errors[worst]},
        }
    difference = {name: fit.coefficients[name] / one - 1 for name, one in reference.items()}
    return {**values, "huber": huber, "reference": reference, "difference": difference}


def table(results: dict[str, Any]) -> Table:
    out = Table(title="fits against published coefficients", title_justify="left")
    for name in ("fit", "runs", "coefficients", "largest difference", "rms", "left out", "largest"):
        out.add_column(name)
    for name, one in results.items():
        out.add_row(
            name,
            str(one["runs"]),
            " ".join(f"{value:.5g}" for value in one["coefficients"].values()),
            f"{max(map(abs, one['difference'].values())):.2%}",
            f"{one['rms_log10']:.4f}",
            f"{one['leave_out']['rms_log10']:.4f}",
            f"{one['largest']['rms_log10']:.4f}",
        )
    return out


if __name__ == "__main__":
    main()
