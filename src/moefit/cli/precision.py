"""Choose the precision that a model is served in, where only `--memory` says how much it may take.

The checkpoint's own format if all experts fit in it, else the best precision in which they do
(`--precision auto`, and the dense weights encoded too if nothing else helps), else as many experts
as fit, with the others fetched. `generate`, `serve`, `chat`, `bench`, `eval` and `describe` all
choose by `choose_precision`.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from moefit.api import folder_of
from moefit.cli.app import say
from moefit.cli.options import SERVING, KvCache, MemoryOptions, ServingOptions, torch_dtype
from moefit.errors import ConfigError
from moefit.quant.encode import encode
from moefit.quant.format import GroupedFormat, parse_format
from moefit.serve.config import AUTO_PRECISION, NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.memory.budget import format_bytes
from moefit.serve.memory.estimate import (
    InitialFormats,
    initial_formats,
    memory_budget,
)
from moefit.serve.packed.store import PackedStore, open_packed

Options = TypeVar("Options", bound=MemoryOptions)
_DENSE = (NATIVE_PRECISION, "int8", "int4")
# Bits a weight, scales included, and what `auto` then costs in perplexity: the smallest and the
# largest loss of the three trained models in README's table of results.
_KNOWN_COSTS = (
    (8.0, "none was seen (-0.0% to +0.1% perplexity)"),
    (5.3, "-0.1% to +1.2% perplexity"),
    (4.0, "+0.8% to +3.2% perplexity"),
    (3.0, "+3.4% to +13.3% perplexity"),
)
_PLAIN = frozenset(("float64", "float32", "float16", "bfloat16"))
_SAMPLE = 128, 2048
"""Shape of the matrix whose encoding is timed for an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to hold a model, and the total bytes that it takes.

    Args:
        precision: Format of the experts, or `auto`.
        dense_precision: Format of all other weights.
        resident_bytes: The least total with which all experts are in memory.
        min_bytes: The least total with which the model runs.
    """

    precision: str
    dense_precision: str
    resident_bytes: int
    min_bytes: int


def choose_precision(memory: int, candidates: Iterable[Candidate]) -> Candidate:
    """Return the first candidate whose experts all fit, else one whose experts are fetched.

    Args:
        memory: The budget in bytes.
        candidates: From the best to the least good, the checkpoint's own format first. They are
            taken one by one, and none after one that fits.

    Returns:
        If none fits with all experts, the first after the checkpoint's own format that runs at all,
        else that format. If none runs, the one that needs least, whose error says how much.
    """
    tried: list[Candidate] = []
    for one in candidates:
        if one.resident_bytes <= memory:
            return one
        tried.append(one)
    for one in [*tried[1:], tried[0]]:
        if one.min_bytes <= memory:
            return one
    return min(tried, key=lambda one: one.min_bytes)


def resolve_precision(
    model: str,
    options: Options,
    **settings: Any,
) -> Options:
    """Return the options with a precision, and say in one line which was chosen and why.

    Args:
        model: As on the command line.
        options: A precision in them is left as it is. A mode leaves the precision at the
            checkpoint's own, and a plan decides it.
        settings: Further fields of `LoadSettings`, which take memory too.

    Raises:
        ConfigError: `--exact` is combined with what would change the model's numbers.
    """
    serving = options if isinstance(options, ServingOptions) else SERVING
    if options.exact:
        _refuse_inexact(options, serving)
    decided = options.exact or options.precision is not None or serving.sets_mode
    if options.memory is None or decided or serving.has_plan:
        return options
    dtype, mtp = torch_dtype(options.dtype), settings.get("mtp", False)
    skeleton = build_skeleton(folder_of(model), dtype, options.adapter, mtp=mtp)
    base = LoadSettings(**{**options.load_settings(), **settings})
    dense = _DENSE if options.dense == NATIVE_PRECISION else (options.dense,)
    total = memory_budget(skeleton, base).total
    assert total is not None
    found = choose_precision(total, _candidates(skeleton, base, dense))
    chosen = replace(
        options, precision=found.precision, dense_precision=found.dense_precision, rest=None
    )
    if total >= found.min_bytes:
        say(_sentence(skeleton, LoadSettings(**{**chosen.load_settings(), **settings})))
    return chosen


def _refuse_inexact(memory: MemoryOptions, serving: ServingOptions) -> None:
    others = {
        "--precision": memory.precision not in (None, NATIVE_PRECISION),
        "--dense-precision": memory.dense != NATIVE_PRECISION,
        "--kv-cache": memory.kv_cache is not KvCache.model,
        "--mode": serving.mode not in (None, "exact"),
        "--prefill": serving.prefill not in (None, "exact"),
        "--plan, --max-loss or --min-speed": serving.has_plan,
    }
    if odd := [name for name, is_given in others.items() if is_given]:
        raise ConfigError(
            f"--exact gives the model's own numbers, and {odd[0]} changes them; give one of the two"
        )


def _candidates(
    skeleton: Skeleton, base: LoadSettings, dense: tuple[str, ...]
) -> Iterator[Candidate]:
    yield _candidate(skeleton, replace(base, dense_precision=dense[0]))
    for name in dense:
        yield _candidate(skeleton, replace(base, precision=AUTO_PRECISION, dense_precision=name))


def _candidate(skeleton: Skeleton, settings: LoadSettings) -> Candidate:
    budget = memory_budget(skeleton, settings, probe_bytes=0)  # what is read early decides nothing
    return Candidate(
        precision=settings.precision,
        dense_precision=settings.dense_precision,
        resident_bytes=budget.all_resident_bytes,
        min_bytes=budget.min_bytes,
    )


def _sentence(skeleton: Skeleton, settings: LoadSettings) -> str:
    """Return what was chosen, what is known of its cost, and how long encoding takes."""
    packed = open_packed(skeleton, settings.formats(), [settings.dense_format()])
    budget = memory_budget(skeleton, settings, packed)
    start = initial_formats(skeleton, settings, budget, packed)
    slots, experts = sum(budget.slots()), sum(block.num_experts for block in skeleton.blocks)
    where = f"in {format_bytes(budget.total or 0)}"
    held = f"all {experts:,} experts" if slots == experts else f"{slots:,} of {experts:,} experts"
    fetched = "" if slots == experts else "; the others are fetched from storage when needed"
    if settings.precision == NATIVE_PRECISION and settings.dense_precision == NATIVE_PRECISION:
        own = _own(skeleton)
        loss = "no loss but that of the int8 KV cache" if settings.int8_cache else "no loss"
        return f"precision: {own}: {held} {where}{fetched}; {loss}"
    dense = settings.dense_precision
    others = "" if dense == NATIVE_PRECISION else f", dense weights in {dense}"
    cost = known_cost(start.bits_per_weight)
    return (
        f"precision: {settings.precision}: {held} {where} at {start.bits_per_weight:.1f} bits a "
        f"weight{others}{fetched}; cost: {cost}{_encoding(skeleton, start, packed)}; --exact gives "
        "the model's own numbers"
    )


def _own(skeleton: Skeleton) -> str:
    """Return in which formats slots hold the checkpoint's own numbers."""
    stored, dtype = skeleton.stored(), str(skeleton.dtype).removeprefix("torch.")
    decoded = "/".join(sorted({*stored.experts} - {*stored.held} - _PLAIN))
    if not stored.held:
        whose = f"decoded from the checkpoint's {decoded}" if decoded else "the checkpoint's own"
        return f"{dtype}, {whose}"
    rest = f", and {dtype}, decoded from its {decoded}" if decoded else ""
    return f"{'/'.join(stored.held)}, the checkpoint's own{rest}"


def known_cost(bits: float) -> str:
    """Return what so many bits a weight cost where it was measured.

    >>> known_cost(4.5)
    'not measured on this model; at 4 bits +0.8% to +3.2% perplexity on three small models'
    """
    for known, cost in _KNOWN_COSTS:
        if bits >= known:
            return f"not measured on this model; at {known:g} bits {cost} on three small models"
    return "not measured; below 3 bits it may be large"


def _encoding(skeleton: Skeleton, start: InitialFormats, packed: PackedStore) -> str:
    """Return how long encoding the experts takes, estimated from a sample; empty if packed."""
    per_expert = sum(block.expert_bytes * block.num_experts for block in skeleton.blocks) / sum(
        block.num_experts for block in skeleton.blocks
    )
    weights = per_expert / skeleton.dtype.itemsize
    seconds = sum(
        count * weights * _seconds_per_weight(format)
        for name, count in start.formats.items()
        if isinstance(format := parse_format(name), GroupedFormat)
        and not all(packed.has(block.name, format) for block in skeleton.blocks)
    )
    if not seconds:
        return ""
    return (
        f"; encoding takes about {_duration(seconds)} (an estimate; `moefit pack` does it once "
        "and for all)"
    )


def _seconds_per_weight(format: GroupedFormat) -> float:
    sample_RC = torch.linspace(-1, 1, _SAMPLE[0] * _SAMPLE[1]).view(_SAMPLE)
    encode(sample_RC, format.bits, format.encoder)
    began = time.perf_counter()
    encode(sample_RC, format.bits, format.encoder)
    return (time.perf_counter() - began) / sample_RC.numel()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"
