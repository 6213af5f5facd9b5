"""SwapMoE's own experiment in small: what a share of the experts costs an encoder-decoder.

    python benchmarks/swapmoe_experiment.py quality plain=RUN dropout=RUN TEXTS --points FILE
    python benchmarks/swapmoe_experiment.py latency plain=RUN TEXTS --points FILE [--rate 0.4GB]
    python benchmarks/swapmoe_experiment.py plans plain=RUN TEXTS --points FILE
    python benchmarks/swapmoe_experiment.py save --points FILE [--shape FILE] NAME

The runs are of `train_switch.py`, in bfloat16 here. Rouge-2 is over `--test` held-out sentences,
written greedily one after the other, with a share of each layer's experts in memory:

- `exact`: missing experts are fetched (by recent use; `on-demand`: the least recently used makes
  room); the full model's output.
- `bounded`: for models with one expert per token the same, so that it is not measured.
- `virtual`: resident experts only; with swaps, as SwapMoE has it, or the experts that a model was
  trained to keep with expert dropout (`virtual, swaps`: such a model with swaps all the same).
- `frequency`: the most used experts on other sentences, fixed. `pruned`: those of largest norm, as
  the paper prunes; `pruned, dropped`: the most used, and tokens of others get no expert.

`latency` times sentences from source to end. Storage is the page cache, `--rate` limits it. `plans`
measures the planner's plans for a third and a quarter of the experts' bytes, and those of SwapMoE's
own planner, which chooses slots per layer and the update interval.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import record
import swapmoe_planner
import torch
from sentence_task import Pair, copied, pairs, rouge_2
from slow_storage import limited_to
from swapmoe_picture import draw
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import moefit
from moefit.evaluate.baselines import fix_residents
from moefit.evaluate.passage import read_pairs
from moefit.moe.expert_dropout import dropout_record
from moefit.plan.configuration import Configuration
from moefit.plan.experiments import policy_choices
from moefit.plan.measure import MeasuredModel, fill_slots
from moefit.plan.planner import Planner
from moefit.plan.profiler import Profiler
from moefit.plan.quality import quality_samples
from moefit.plan.search import Models, PolicyOptions, allocator_points, pareto
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows

SHARES = (1.0, 0.67, 0.5, 0.33, 0.25)
CALIBRATION, CONTEXT, LONGEST, WARM, BATCH = 200, 64, 20, 3, 50
POLICIES: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "on-demand": {"mode": "exact", "eviction": "lru"},
    "bounded": {"mode": "bounded"},
    "virtual": {"mode": "virtual"},
    "virtual, swaps": {"mode": "virtual"},
    "frequency": {"mode": "virtual"},
    "pruned": {"mode": "virtual"},
    "pruned, dropped": {"mode": "virtual"},
}
FIXED = {"frequency": "frequency", "pruned": "norm", "pruned, dropped": "frequency"}
SAME = ("exact", "on-demand", "bounded")  # the full model's output: Rouge is measured once
TIMED = ("exact", "on-demand", "virtual", "frequency")


class Points:
    """Measured points in a file of JSON lines, so that a run that was stopped goes on."""

    def __init__(self, file: Path):
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def measure(self, key: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
        """Add a point unless it is there."""
        if any(key.items() <= one.items() for one in self.all):
            return
        self.all.append({**key, **measured()})
        with self._file.open("a") as file:
            file.write(json.dumps(self.all[-1]) + "\n")
        print({name: value for name, value in self.all[-1].items() if name != "scores"}, flush=True)


def main() -> None:
    arguments = parse()
    points = Points(arguments.points)
    if arguments.stage == "save":
        save(points, arguments)
        return
    *models, texts = arguments.what
    words = AutoTokenizer.from_pretrained(models[0].split("=", 1)[1]).get_vocab()
    held_out = pairs(Path(texts), words, held_out=True)
    test, calibration = held_out[: arguments.test], held_out[-CALIBRATION:]
    points.measure({"stage": "copied"}, lambda: {"rouge_2": copied(test), "sentences": len(test)})
    for name, run in (one.split("=", 1) for one in models):
        subject = Subject(name, Path(run), test, calibration)
        {"quality": quality, "latency": latency, "plans": plans}[arguments.stage](
            subject, points, arguments
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("quality", "latency", "plans", "save"))
    parser.add_argument("what", nargs="+")
    parser.add_argument("--points", type=Path, required=True)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--timed", type=int, default=20, help="sentences that are timed")
    parser.add_argument("--rate", help="bytes per second that storage gives, such as 0.4GB")
    parser.add_argument("--shape", type=Path, help="points of swapmoe_shape.py")
    return parser.parse_args()


class Subject:
    """A trained model in bfloat16 with its sentences."""

    def __init__(self, name: str, run: Path, test: list[Pair], calibration: list[Pair]):
        self.name, self.test = name, test
        self.folder = run / "bfloat16"
        if not self.folder.exists():
            model = AutoModelForSeq2SeqLM.from_pretrained(run, dtype=torch.bfloat16)
            self.keeps = dropout_record(model.config) is not None
            model.save_pretrained(self.folder)
            for file in run.glob("tokenizer*"):
                (self.folder / file.name).write_bytes(file.read_bytes())
        self.keeps = "expert_dropout" in json.loads((self.folder / "config.json").read_text())
        self.file = run / "calibration.tsv"
        self.file.write_text("".join(f"{one.source}\t{one.target}\n" for one in calibration))

    @property
    def policies(self) -> list[str]:
        """The policies that differ for this model."""
        return [name for name in POLICIES if self.keeps or name != "virtual, swaps"]

    @contextmanager
    def served(self, policy: str, share: float) -> Iterator[ServedModel]:
        """Load the model with a share of each layer's experts, ready for the policy."""
        with moefit.load(self.folder, context=BATCH * CONTEXT, **POLICIES[policy]) as served:
            counts = [max(1, round(share * one.num_experts)) for one in served.blocks.values()]
            served.set_memory(served.budget.total_for_slots(counts))
            if policy in FIXED:
                calibration = self.calibration(served)
                fix_residents(served, FIXED[policy], calibration=calibration)  # pyright: ignore
            elif policy == "virtual, swaps":
                served.set_mode("virtual", residency="manager")
            if served.policy.residency != "fixed":
                fill_slots(served)
            for one in self.test[-WARM:]:
                self.write(served, one)
            with drop_absent(served) if policy == "pruned, dropped" else nullcontext():
                yield served

    def calibration(self, served: ServedModel) -> Windows:
        """Return other sentences than are scored."""
        return read_pairs(self.file, served.tokenizer, 0, CONTEXT, None)

    def write(self, served: ServedModel, one: Pair) -> tuple[str, int]:
        """Restore a sentence; return it and the number of its tokens."""
        ids = served.tokenizer(one.source, return_tensors="pt")["input_ids"]
        made = served.generate(input_ids=ids, max_new_tokens=LONGEST, do_sample=False)
        text: Any = served.tokenizer.decode(made[0], skip_special_tokens=True)  # one sequence
        return text, made.shape[1] - 1

    def write_all(self, served: ServedModel) -> list[tuple[str, int]]:
        """Restore all test sentences, many at once."""
        found = []
        for at in range(0, len(self.test), BATCH):
            sources = [one.source for one in self.test[at : at + BATCH]]
            given = served.tokenizer(sources, padding=True, return_tensors="pt")
            given.pop("token_type_ids", None)
            made = served.generate(**given, max_new_tokens=LONGEST, do_sample=False)
            texts = served.tokenizer.batch_decode(made, skip_special_tokens=True)
            found += [(text, len(text.split()) + 1) for text in texts]
        return found

    def scored(self, served: ServedModel, *, together: bool = False) -> dict[str, Any]:
        """Restore all test sentences; return Rouge-2 and what was read.

        Args:
            served: The model.
            together: Many at once, which gives the same where residents stay the same.
        """
        served.reset()
        read = served.report()["bytes_read"]
        made = self.write_all(served) if together else [self.write(served, o) for o in self.test]
        report = served.report()
        scores = rouge_2([text for text, _ in made], [one.target for one in self.test])
        tokens = sum(count for _, count in made)
        return {
            "rouge_2": fmean(scores),
            "scores": scores,
            "tokens": tokens,
            "bytes_per_token": (report["bytes_read"] - read) / tokens,
            "hit_rate": report["hit_rate"],
            "moved": report["substituted_mass"],
            "slots": sum(report["slots"].values()),
            "experts": sum(report["experts"].values()),
        }


@contextmanager
def drop_absent(served: ServedModel) -> Iterator[None]:
    """Give no expert to tokens whose choice is not resident."""

    def hook(name: str) -> Any:
        def drop(_router: nn.Module, _inputs: Any, output: Any) -> Any:
            mask_BTE, weights, logits = output
            resident_E = torch.zeros(mask_BTE.shape[-1], dtype=mask_BTE.dtype)
            resident_E[list(served.blocks[name].slot_table.residents)] = 1
            return mask_BTE * resident_E, weights, logits

        return drop

    hooks = [
        served.model.get_submodule(name.replace(".experts", ".router")).register_forward_hook(
            hook(name)
        )
        for name in served.blocks
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def quality(subject: Subject, points: Points, arguments: argparse.Namespace) -> None:
    """Measure Rouge-2 under each policy and share."""

    def measured(policy: str, share: float) -> dict[str, Any]:
        with subject.served(policy, share) as served:
            together = share == 1 or served.policy.residency == "fixed"
            return subject.scored(served, together=together)

    for share in SHARES:
        for policy in subject.policies if share < 1 else ["exact"]:
            if share < 1 and policy in SAME:
                continue
            key = {"stage": "quality", "model": subject.name, "policy": policy, "share": share}
            points.measure(key, lambda policy=policy, share=share: measured(policy, share))


def latency(subject: Subject, points: Points, arguments: argparse.Namespace) -> None:
    """Measure seconds per sentence under each policy and share."""

    def measured(policy: str, share: float) -> dict[str, Any]:
        with subject.served(policy, share) as served, limited_to(arguments.rate):
            return timed(served, [lambda one=one: subject.write(served, one)[1] for one in some])

    some = subject.test[: arguments.timed]
    for share in SHARES:
        for policy in TIMED if share < 1 else ["exact"]:
            key = {"stage": "latency", "model": subject.name, "policy": policy, "share": share}
            key["rate"] = arguments.rate
            points.measure(key, lambda policy=policy, share=share: measured(policy, share))


def timed(served: ServedModel, requests: list[Callable[[], int]]) -> dict[str, Any]:
    """Run requests, which return their numbers of tokens; return times and bytes."""
    read, seconds, tokens = served.report()["bytes_read"], [], 0
    for request in requests:
        began = time.perf_counter()
        tokens += request()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": fmean(seconds),
        "median_seconds": median(seconds),
        "seconds_per_token": sum(seconds) / tokens,
        "tokens": tokens,
        "bytes_per_token": (served.report()["bytes_read"] - read) / tokens,
    }


def plans(subject: Subject, points: Points, arguments: argparse.Namespace) -> None:
    """Measure plans for a third and a quarter of the experts' bytes."""
    measured_model = MeasuredModel(folder=subject.folder)
    with moefit.load(subject.folder) as served:
        windows = subject.calibration(served)
    profile = Profiler(measured_model, windows, text="sentences").run()
    planner = Planner(build_skeleton(subject.folder), profile, context=CONTEXT)
    shapes = profile.facts.shapes.values()
    everything = sum(one.slot_bytes["native"] * one.num_experts for one in shapes)
    errors = [
        swapmoe_planner.network_error(profile, planner.features),
        *planner.quality.comparison,
    ]
    found = {one.model: {"mean": one.mean, "median": one.median} for one in errors}
    points.measure({"stage": "models", "model": subject.name}, lambda: {"quality_models": found})

    def measured(configuration: Configuration) -> dict[str, Any]:
        with measured_model.load(configuration, context=CONTEXT) as served:
            fill_slots(served)
            for one in subject.test[-WARM:]:
                subject.write(served, one)
            return {
                "configuration": configuration.describe(),
                "slots_by_block": [one.slots for one in configuration.placement.values()],
                "predicted_loss": planner.quality.loss(configuration),
                **subject.scored(served),
            }

    for share in (0.33, 0.25):
        for name, configuration in planned(planner, round(share * everything)).items():
            key = {"stage": "plans", "model": subject.name, "plan": name, "share": share}
            points.measure(key, lambda configuration=configuration: measured(configuration))


def planned(planner: Planner, room: int) -> dict[str, Configuration]:
    """Return each planner's configuration for so many bytes of slots, fetching nothing."""
    found = {}
    if some := swapmoe_planner.front_for_slots(planner, room, fetching=False):
        found["ours"] = min(some, key=lambda one: one.loss).configuration
    virtual = [one for one in policy_choices(encoder=True) if one.mode == "virtual"]
    models = native_only(Models(planner.quality, planner.latency, virtual))
    some = pareto(allocator_points(models, {"native": room}))
    found["ours, native experts"] = min(some, key=lambda one: one.loss).configuration
    network = swapmoe_planner.fit_network(quality_samples(planner.profile), planner.features)
    if swapmoe_planner.available():
        some = swapmoe_planner.search(models, {"native": room}, network.loss)
        found["SwapMoE's"] = min(some, key=lambda one: one.loss).configuration
    return found


def native_only(models: Models) -> Models:
    """Leave only experts in the checkpoint's own format, as in the paper."""

    def limited(one: PolicyOptions) -> PolicyOptions:
        return PolicyOptions(
            policy=one.policy,
            options={
                name: [option for option in some if option.placement.formats == ("native",)]
                for name, some in one.options.items()
            },
        )

    made = copy.copy(models)
    made.by_policy = [limited(one) for one in models.by_policy]
    made.fully_resident = made.by_policy[0]
    return made


def save(points: Points, arguments: argparse.Namespace) -> None:
    """Write the record and the picture."""
    full = {
        one["model"]: one["scores"]
        for one in points.all
        if one["stage"] == "quality" and one["share"] == 1
    }
    found: dict[str, Any] = {}
    for one in points.all:
        if "scores" in one:
            changes = [a - b for a, b in zip(one.pop("scores"), full[one["model"]], strict=True)]
            one["change"] = fmean(changes)
            one["error"] = stdev(changes) / len(changes) ** 0.5
        found.setdefault(one.pop("stage"), []).append(one)
    if arguments.shape:
        found["shape"] = Points(arguments.shape).all
    notes = (
        "rouge_2: mean over held-out sentences; change: to the same model with all experts, and "
        "error: its standard error over sentences; copied: Rouge-2 of the sources; "
        "bytes_per_token: read per token of the output; moved: router weight given to other "
        "experts than the router's choice; rate: bytes per second of storage, null for the page "
        "cache; seconds: per sentence, with the encoder; on-demand and bounded give the full "
        "model's output and so the same Rouge-2 as exact; shape: random weights in the shape of "
        "google/switch-base-16, whose routers choose as the trained model's do"
    )
    path = record.write("swapmoe-experiment", found, notes=notes, suffix=arguments.what[0])
    if {"quality", "latency"} <= found.keys():
        draw(found, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
