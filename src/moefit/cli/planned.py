"""Serve by a plan: `--plan`, `--max-loss`, `--min-speed`.

Where a plan must be made first, `moefit plan` runs in a process of its own, so that its memory does
not count against the budget.
"""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefit.api import folder_of
from moefit.cli.app import error_of, say
from moefit.cli.options import ServingOptions
from moefit.device import planned_device
from moefit.errors import ConfigError
from moefit.plan.configuration import Lengths
from moefit.plan.plan_file import Plan, Target, check_checkpoint, read_plan
from moefit.quant.kv_int8 import MODEL_CACHE
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.budget import format_bytes
from moefit.serve.memory.held import settled_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProcess:
    """A run of `moefit plan` in a process of its own.

    Args:
        model: As on the command line.
        memory: The budget.
        context: Tokens of the KV cache.
        device: Of the model.
        process: Bytes of the process that will serve.
        target: To plan for.
        concurrency: Of a server, how many requests run at once.
        dtype: That the model is loaded in already, if it is.
        dense_precision: That dense weights are loaded in already, if they are.
        lengths: Of an encoder-decoder's requests; None for the profile's.
        kv_cache: What the KV cache holds.
        step_tokens: Tokens of one forward pass; None for prompts as long as the context.
        prefetch: That it is served with; None where `process` has the probes' bytes already.
        prefetch_horizon: Likewise.
    """

    model: str
    memory: str | int
    context: int
    device: str
    process: int
    target: Target
    concurrency: int | None = None
    dtype: str | None = None
    dense_precision: str | None = None
    lengths: Lengths | None = None
    kv_cache: str = MODEL_CACHE
    step_tokens: int | None = None
    prefetch: str | None = None
    prefetch_horizon: int | None = None

    def arguments(self, save: Path) -> list[str]:
        """Return the arguments of the command `moefit`."""
        options = {
            "memory": self.memory,
            "context": self.context,
            "kv-cache": self.kv_cache,
            "prefetch": self.prefetch,
            "prefetch-horizon": self.prefetch_horizon,
            "device": self.device,
            "process-bytes": self.process,
            "max-loss": None if self.target.max_loss is None else f"{100 * self.target.max_loss}%",
            "min-speed": self.target.min_speed,
            "max-concurrency": self.concurrency,
            "step-tokens": self.step_tokens,
            "dtype": self.dtype,
            "dense-precision": self.dense_precision,
            "source-tokens": self.lengths and self.lengths.source,
            "target-tokens": self.lengths and self.lengths.target,
            "budgets": 0,
            "save": save,
        }
        given = [
            word
            for name, value in options.items()
            if value is not None
            for word in (f"--{name}", str(value))
        ]
        return ["plan", self.model, *given, "--json"]

    def run(self) -> Plan:
        """Return the plan. Raises the error that the process ends with."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.json"
            done = subprocess.run(
                [sys.executable, "-m", "moefit", *self.arguments(file)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise error_of(done.stdout) or ConfigError(
                    f"planning ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}"
                )
            return read_plan(file)


def plan_for(
    model: str,
    options: ServingOptions,
    concurrency: int | None = None,
    helpers: int = 0,
    step_tokens: int | None = None,
) -> Plan:
    """Return the plan in the given file, or make one from the model's profile.

    Args:
        model: As on the command line.
        options: With a plan file, or a target and a memory budget.
        concurrency: Of a server, how many requests run at once.
        helpers: As in `LoadSettings`.
        step_tokens: As in `LoadSettings`.

    Raises:
        ConfigError: The plan is of another checkpoint, or options contradict each other.
        MoefitError: As planning does.
    """
    if options.plan is not None:
        if not (options.max_loss is options.min_speed is None):
            raise ConfigError(
                "--plan says all; --max-loss and --min-speed make a plan: give one of the two"
            )
        plan = read_plan(options.plan)
        check_checkpoint(plan, build_skeleton(folder_of(model)), options.plan)
        if options.context != plan.context:
            say(f"note: the plan reserves {plan.context:,} tokens; --context is not used")
        if step_tokens is not None and plan.step_tokens is None and step_tokens < plan.context:
            say(
                "note: the plan reserves activations of prompts as long as its context; made again "
                f"with `moefit plan --step-tokens {step_tokens}`, it has more room for experts"
            )
        return plan
    if options.memory is None:
        raise ConfigError("--max-loss and --min-speed plan for a budget; give --memory too")
    return PlanProcess(
        model=model,
        memory=options.memory,
        context=options.context,
        kv_cache=options.kv_cache.value,
        device=options.device,
        process=settled_bytes(planned_device(options.device)) + helpers,
        target=target_of(options.max_loss, options.min_speed),
        concurrency=concurrency,
        step_tokens=step_tokens,
        prefetch=options.prefetch.value,
        prefetch_horizon=options.prefetch_horizon,
    ).run()


def target_of(max_loss: str | None, min_speed: float | None) -> Target:
    """Return the target that options describe. Raises ConfigError for an invalid share or speed.

    >>> target_of("3%", None).max_loss
    0.03
    """
    share = None if max_loss is None else _share(max_loss)
    target = Target(max_loss=share, min_speed=min_speed)
    target.check()
    return target


def _share(text: str) -> float:
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise ConfigError(
            f"--max-loss {text!r} is no share of perplexity; give one such as 3% or 0.03"
        ) from None
    if share >= 1 and not percent:
        raise ConfigError(
            f"--max-loss {text} is {share:.0%} of perplexity; give {number}% if that is meant, or "
            f"{share:.0%} if it is not a slip"
        )
    return share


def forbid_with_plan(**given: Any) -> None:
    """Raise ConfigError if something is given that a plan decides; None is not given."""
    if odd := [f"--{name}" for name, value in given.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(odd)}: a plan decides this; leave it out, or --plan, --max-loss and "
            "--min-speed"
        )


def in_a_line(plan: Plan) -> str:
    """Return what a plan predicts, in one line."""
    one = plan.predicted
    return (
        f"{plan.configuration.describe()}: perplexity {one.loss:+.2%} (± "
        f"{one.margin:.2%}), {one.speed:.2f} tokens/s, {format_bytes(one.expert_bytes)} of experts"
    )


def say_packing(plan: Plan, model: str) -> None:
    """Say how to make fetching faster, if experts are fetched."""
    formats = {name for one in plan.configuration.placement.values() for name in one.formats}
    if plan.predicted.misses and (some := sorted(formats - {"native"})):
        say(
            "note: speed is predicted for packed experts: "
            f"moefit pack {shlex.quote(model)} --formats {','.join(some)}"
        )
