"""Change the budget while a model decodes: is it kept, and how much slower are the steps?

    python benchmarks/budget_changes.py MODEL [--changes 200] [--save NAME]

One thread decodes greedily in exact mode, one calls `set_memory` with random totals between the
minimum and the size of all experts (every tenth below the minimum), and one samples the memory
held. Then the same tokens are decoded without changes: tokens and logits must be bit-identical. A
rejected change must have no effect. Held bytes (slots and spares, read without the lock) and the
resident set of the process are compared with the current budget; during a call that is the larger
of both.
"""

import argparse
import random
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import record
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import moefit
from moefit.cache_argument import forward_with_cache
from moefit.errors import BudgetTooSmallError
from moefit.host import process_bytes
from moefit.serve.memory.budget import format_bytes
from moefit.serve.model import ServedModel

Checked = tuple[int, int]
"""The token of a step, and the checksum of its logits."""
AFTER = 4  # steps that count as following a change
SAMPLE_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One call of `set_memory`."""

    began: float
    ended: float
    before: int
    asked: int
    refused: bool

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bytes held at one moment, and the bytes that the current budget allows."""

    at: float
    held: int
    resident: int
    total: int


@dataclass(slots=True)
class Run:
    """Records of the three threads."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    refusals_that_changed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.1, help="mean seconds between changes")
    parser.add_argument("--new-tokens", type=int, default=256, help="of one sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    with moefit.load(arguments.model, context=arguments.new_tokens + 16) as served:
        next(decode(served, 1, 8, Run()))  # warm-up
        run = Run()
        start = served.budget.all_resident_bytes
        served.set_memory(start)
        outputs = disturbed(served, arguments, run)
        budget = served.budget
        served.set_memory(None)
        undisturbed = Run()
        again = list(decode(served, len(outputs), arguments.new_tokens, undisturbed))
    samples = in_force(run, start)
    results = summary(run, samples, budget)
    results["undisturbed_step"] = spread([end - begin for begin, end in undisturbed.steps])
    results["sequences"] = len(outputs)
    results["outputs_unchanged"] = outputs == again
    Console(width=110).print(table(results))
    if arguments.save:
        notes = "seconds; bytes. A step is near a change if it overlaps the call or follows it"
        path = record.write("budget-changes", results, notes=notes, suffix=arguments.save)
        draw(run, samples, budget, path.with_suffix(".png"))
        print(path)


def disturbed(served: ServedModel, arguments: argparse.Namespace, run: Run) -> list[list[Checked]]:
    """Decode sequences until all changes have been made."""
    done = threading.Event()
    changer = threading.Thread(target=change, args=(served, arguments, run))
    watcher = threading.Thread(target=watch, args=(served, run, done))
    watcher.start()
    changer.start()
    outputs = []
    for output in decode(served, None, arguments.new_tokens, run):
        outputs.append(output)
        if not changer.is_alive():
            break
    done.set()
    watcher.join()
    return outputs


@torch.inference_mode()
def decode(served: ServedModel, sequences: int | None, new_tokens: int, run: Run) -> Any:
    """Decode random prompts greedily; `sequences` None is without end."""
    vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
    number = 0
    while sequences is None or number < sequences:
        generator = torch.Generator().manual_seed(number)
        number += 1
        ids_1T, cache = torch.randint(0, vocabulary, (1, 16), generator=generator), None
        output: list[Checked] = []
        for _ in range(new_tokens):
            began = time.perf_counter()
            step, cache = forward_with_cache(served.model, cache, input_ids=ids_1T)
            run.steps.append((began, time.perf_counter()))
            ids_1T = step.logits[:, -1:].argmax(-1)
            output.append((int(ids_1T), bits(step.logits[0, -1])))
        yield output


def bits(logits_V: Tensor) -> int:
    """Return a checksum of all bits."""
    return zlib.crc32(logits_V.contiguous().view(torch.uint8).numpy().tobytes())


def change(served: ServedModel, arguments: argparse.Namespace, run: Run) -> None:
    chance = random.Random(arguments.seed)
    budget = served.budget
    for number in range(arguments.changes):
        time.sleep(chance.expovariate(1 / arguments.pause))
        low, high = budget.min_bytes, budget.all_resident_bytes
        if number % 10 == 9:
            low, high = budget.fixed // 2, budget.min_bytes - 1
        asked, before = chance.randint(low, high), served.budget
        slots = {name: len(block.slots) for name, block in served.blocks.items()}
        began = time.perf_counter()
        try:
            served.set_memory(asked)
            refused = False
        except BudgetTooSmallError:
            refused = True
        assert before.total is not None
        run.changes.append(
            Change(
                began=began, ended=time.perf_counter(), before=before.total, asked=asked,
                refused=refused,
            )
        )  # fmt: skip
        if refused and (
            served.budget is not before
            or slots != {name: len(block.slots) for name, block in served.blocks.items()}
        ):
            run.refusals_that_changed += 1


def watch(served: ServedModel, run: Run, done: threading.Event) -> None:
    while not done.wait(SAMPLE_SECONDS):
        run.samples.append((time.perf_counter(), held_bytes(served), process_bytes()))


def held_bytes(served: ServedModel) -> int:
    """Return the bytes of slots and spares without taking the lock, so also during a change."""
    slots = [dict(block.slots) for block in served.blocks.values()]
    spares = [list(some) for some in served._shared.spares.values()]
    return sum(slot.nbytes for some in slots for slot in some.values()) + sum(
        slot.nbytes for some in spares for slot in some
    )


def in_force(run: Run, start: int) -> list[Sample]:
    """Return samples with the budget at their time."""
    samples, accepted = [], [one for one in run.changes if not one.refused]
    total, next_one = start, 0
    for at, held, resident in run.samples:
        while next_one < len(accepted) and accepted[next_one].ended <= at:
            total, next_one = accepted[next_one].asked, next_one + 1
        limit = total
        if next_one < len(accepted) and accepted[next_one].began <= at:
            limit = max(total, accepted[next_one].asked)
        samples.append(Sample(at=at, held=held, resident=resident, total=limit))
    return samples


def step_kinds(
    steps: Sequence[tuple[float, float]], changes: Sequence[Change]
) -> dict[str, list[float]]:
    """Return the seconds of steps that overlap a call, of the next few, and of all others."""
    kinds: dict[str, list[float]] = {"during": [], "after": [], "quiet": []}
    left, waiting = 0, list(changes)
    for began, ended in steps:
        overlaps = False
        while waiting and waiting[0].began < ended:
            overlaps = overlaps or waiting[0].ended > began
            if waiting[0].ended > ended:
                break
            waiting.pop(0)
        if overlaps:
            left = AFTER
            kinds["during"].append(ended - began)
        else:
            kinds["after" if left else "quiet"].append(ended - began)
            left = max(0, left - 1)
    return kinds


def spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {"count": 0}
    ordered = sorted(seconds)
    at = [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 1)]
    return {"count": len(ordered), "median": at[0], "p95": at[1], "worst": at[2]}


def summary(run: Run, samples: Sequence[Sample], budget: Any) -> dict[str, Any]:
    made = [one for one in run.changes if not one.refused]
    room = [one.total - budget.fixed + budget.staging - one.held for one in samples]
    beyond = [one.resident - one.held for one in samples]
    return {
        "steps": {name: spread(some) for name, some in step_kinds(run.steps, made).items()},
        "grow": spread([one.seconds for one in made if one.asked > one.before]),
        "shrink": spread([one.seconds for one in made if one.asked < one.before]),
        "refused": spread([one.seconds for one in run.changes if one.refused]),
        "refusals_that_changed_something": run.refusals_that_changed,
        "samples": len(samples),
        "least_room_for_slots": min(room),
        "samples_with_slots_above_budget": sum(one < 0 for one in room),
        "least_room_for_resident_set": min(one.total - one.resident for one in samples),
        "samples_with_resident_set_above_budget": sum(
            one.resident > one.total for one in samples
        ),
        "resident_set_beyond_slots": {"least": min(beyond), "most": max(beyond)},
        "budget": {**budget.as_dict(), "slot_bytes": budget.blocks[0].slot_bytes},
        "changes": [asdict(one) for one in run.changes],
    }  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    title = f"outputs unchanged: {results['outputs_unchanged']}; least room: slots " + ", ".join(
        f"{what} {format_bytes(results[key])}"
        for what, key in (
            ("", "least_room_for_slots"),
            ("resident set", "least_room_for_resident_set"),
        )
    )
    out = Table(title=title, title_justify="left")
    for name in ("milliseconds", "count", "median", "p95", "worst"):
        out.add_column(name, justify="left" if name == "milliseconds" else "right")
    rows = {f"step, {name}": some for name, some in results["steps"].items()}
    rows["step, undisturbed run"] = results["undisturbed_step"]
    rows |= {f"set_memory, {name}": results[name] for name in ("grow", "shrink", "refused")}
    for name, some in rows.items():
        values = [f"{1000 * some[key]:.1f}" for key in ("median", "p95", "worst") if key in some]
        out.add_row(name, str(some["count"]), *values)
    return out


def draw(run: Run, samples: Sequence[Sample], budget: Any, path: Path) -> None:
    figure = Figure(figsize=(9, 8), layout="constrained")
    slots, process, steps = figure.subplots(3, 1, sharex=True)
    zero = samples[0].at
    at = [one.at - zero for one in samples]
    fixed = budget.fixed - budget.staging
    slots.plot(at, [(one.total - fixed) / 2**20 for one in samples], lw=1, label="budget in force")
    slots.plot(at, [one.held / 2**20 for one in samples], lw=1, label="slots and spares held")
    slots.set_ylabel("MiB for experts")
    process.plot(at, [one.total / 2**20 for one in samples], lw=1, label="budget in force")
    process.plot(at, [one.resident / 2**20 for one in samples], lw=1, label="resident set")
    process.set_ylabel("MiB of the process")
    refused = [one.began - zero for one in run.changes if one.refused]
    process.plot(refused, [fixed / 2**20] * len(refused), "kx", ms=4, label="refused")
    steps.plot(
        [begin - zero for begin, _ in run.steps],
        [1000 * (end - begin) for begin, end in run.steps], ".", ms=2,
    )  # fmt: skip
    steps.set_yscale("log")
    steps.set_ylabel("ms a step")
    steps.set_xlabel("seconds")
    for axes in (slots, process):
        axes.legend(fontsize=8, loc="upper right")
    for axes in (slots, process, steps):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
