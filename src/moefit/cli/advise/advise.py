"""The command `advise`: what to train for a training budget and serving limits."""

import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from rich.console import Console

from moefit.advise.hardware import THIS, Device, find_device, known_devices
from moefit.advise.laws import DEFAULT, find_law
from moefit.advise.recommend import Algorithm, advise
from moefit.advise.run_config import train_config, write_config
from moefit.advise.search import Question
from moefit.advise.serving import CONTEXT, PRECISIONS, Limits
from moefit.advise.shapes import VOCABULARY
from moefit.advise.throughput import Traffic
from moefit.cli.advise.tables import check_new_file, draw_front, print_advice
from moefit.cli.app import Json, advanced, command, console, option, print_json, say
from moefit.cli.plan_tables import check_picture
from moefit.errors import ConfigError
from moefit.serve.memory.budget import parse_bytes
from moefit.train.settings import STDLIB

_AUTO = "auto"
_GPU, _MFU = "h100", 0.4
_MOST_LENGTH = 1_000_000_000  # tokens of a prompt or an answer
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


class AlgorithmName(StrEnum):
    """How the model is chosen."""

    best_quality = Algorithm.best_quality.value
    least_cost = Algorithm.least_cost.value


@command("advise")
def advise_training(
    flops: Annotated[str | None, option("Training budget in FLOPs, such as 1e21.")] = None,
    gpu_hours: Annotated[
        float | None, advanced("Training budget in hours of --gpu, instead of --flops.")
    ] = None,
    memory: Annotated[
        str | None,
        option("Memory for serving, such as 12GiB, per device. Default: all of the device's."),
    ] = None,
    min_speed: Annotated[
        float | None, option("Tokens/s that one sequence must reach when served.")
    ] = None,
    requests: Annotated[
        float | None, option("Requests per second to serve, instead of one sequence at a time.")
    ] = None,
    hardware: Annotated[
        str, option(f"What serves: {THIS}, measured; a name such as h100; or a .yaml file.")
    ] = THIS,
    law: Annotated[
        str, option("Scaling law by name, see `moefit law list`, or a fitted law's .yaml file.")
    ] = DEFAULT,
    max_loss: Annotated[
        float | None, option("Loss to reach at the least serving cost, instead of the best loss.")
    ] = None,
    write: Annotated[Path | None, option("Write the run here, for `moefit train`.")] = None,
    picture: Annotated[
        Path | None, advanced("Draw loss against serving cost, .png or .svg.")
    ] = None,
    precision: Annotated[
        str, advanced(f"Format of the served experts: auto, or of {', '.join(PRECISIONS)}.")
    ] = _AUTO,
    prompt_tokens: Annotated[
        float, advanced("Mean length of a prompt.", min=1, max=_MOST_LENGTH)
    ] = 512,
    answer_tokens: Annotated[
        float, advanced("Mean length of an answer.", min=1, max=_MOST_LENGTH)
    ] = 256,
    context: Annotated[
        int | None,
        advanced(
            f"Tokens that the KV cache holds. Default: {CONTEXT}, or prompt and answer if longer.",
            min=1,
            max=2 * _MOST_LENGTH,
        ),
    ] = None,
    devices: Annotated[int, advanced("Number of devices that serve.", min=1)] = 1,
    storage_bandwidth: Annotated[
        str | None,
        advanced("Bytes/s, such as 3GB, at which experts without memory are read. Default: none."),
    ] = None,
    max_tokens: Annotated[
        str | None, advanced("Most training tokens that there are, such as 20B.")
    ] = None,
    gpu: Annotated[str | None, advanced(f"What trains, for --gpu-hours. Default: {_GPU}.")] = None,
    mfu: Annotated[
        float | None,
        advanced(
            f"Part of the peak FLOP/s that training reaches, for --gpu-hours. Default: {_MFU}.",
            min=0.01,
            max=1,
        ),
    ] = None,
    algorithm: Annotated[
        AlgorithmName | None,
        advanced("best-quality under the limits, or least-cost for a loss (Yun et al. 2024)."),
    ] = None,
    match_experts: Annotated[
        int | None,
        advanced(
            "least-cost: match the loss-optimal model with this many experts, 1 by default.", min=1
        ),
    ] = None,
    vocab_size: Annotated[int, advanced("Size of the vocabulary.", min=257)] = VOCABULARY,
    text: Annotated[
        list[str] | None, advanced("Text for the written run; may be repeated. Default: stdlib.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print which model to train, why, and how sure that is."""
    if picture is not None:
        check_picture(picture, 1)
    if write is not None:
        check_new_file(write)
    if requests is not None and storage_bandwidth is not None:
        raise ConfigError(
            "--storage-bandwidth is for one sequence at a time, and --requests are served with all "
            "experts in memory; leave one of them out"
        )
    chosen_law = find_law(law)
    question = Question(
        law=chosen_law,
        flops=_budget(flops, gpu_hours, gpu, mfu),
        device=_measured(hardware),
        limits=Limits(
            memory=None if memory is None else parse_bytes(memory),
            context=_context(context, prompt_tokens, answer_tokens),
            position=prompt_tokens + answer_tokens / 2,
            min_speed=_positive("--min-speed", min_speed, "tokens/s, such as 10"),
            storage_bandwidth=None if storage_bandwidth is None else parse_bytes(storage_bandwidth),
        ),
        traffic=_traffic(requests, prompt_tokens, answer_tokens, devices),
        max_tokens=None if max_tokens is None else _number("--max-tokens", max_tokens),
        precisions=_precisions(precision),
        vocabulary=vocab_size,
    )
    chosen = _algorithm(algorithm, max_loss)
    if match_experts is not None and (chosen is Algorithm.best_quality or max_loss is not None):
        raise ConfigError(
            "--match-experts names the model whose loss --algorithm least-cost matches; give that "
            "algorithm and no --max-loss, or leave --match-experts out"
        )
    with console.status("searching"):
        advice = advise(question, chosen, max_loss=max_loss, match_experts=match_experts or 1)
    sources = tuple(text or (STDLIB,))
    if as_json:
        print_json({**advice.as_dict(), "config": train_config(advice.chosen, sources)})
    else:
        print_advice(Console(), advice)
    if picture is not None:
        draw_front(advice, picture)
        say(f"picture: {picture}")
    if write is not None:
        write_config(advice, write, sources)
        say(f"wrote {write}; next: moefit train {write}")


def _budget(flops: str | None, hours: float | None, gpu: str | None, mfu: float | None) -> float:
    if (flops is None) == (hours is None):
        given = "neither" if flops is None else "both"
        raise ConfigError(
            f"{given} of --flops and --gpu-hours given; give the training budget as one of them, "
            "such as --flops 1e21, or --gpu-hours 700 --gpu h100"
        )
    if flops is not None:
        for name, value in (("--gpu", gpu), ("--mfu", mfu)):
            if value is not None:
                raise ConfigError(
                    f"{name} {value} turns --gpu-hours into FLOPs, and --flops gives them; leave "
                    f"{name} out, or give --gpu-hours in place of --flops"
                )
        return _number("--flops", flops)
    gpu = gpu or _GPU
    device = known_devices().get(gpu.lower()) or find_device(gpu)
    positive = _positive("--gpu-hours", hours, "hours, such as 700")
    assert positive is not None
    budget = positive * 3600 * device.flops * (mfu or _MFU)
    if math.isinf(budget):
        raise ConfigError(
            f"--gpu-hours {positive:g} of {gpu} are more FLOPs than a number can hold; give hours, "
            "such as 700"
        )
    return budget


def _measured(hardware: str) -> Device:
    if hardware != THIS:
        return find_device(hardware)
    with console.status("measuring this machine"):
        return find_device(THIS)


def _context(given: int | None, prompt: float, answer: float) -> int:
    """Return the tokens of the KV cache, which hold at least one prompt and its answer."""
    needed = math.ceil(prompt + answer)
    if given is not None and given < needed:
        raise ConfigError(
            f"--context {given} does not hold a prompt of {prompt:g} tokens and an answer of "
            f"{answer:g}; give at least --context {needed}, or shorter --prompt-tokens or "
            "--answer-tokens"
        )
    return max(CONTEXT, needed) if given is None else given


def _traffic(requests: float | None, prompt: float, answer: float, devices: int) -> Traffic | None:
    requests = _positive("--requests", requests, "requests per second, such as 0.5")
    if requests is None:
        if devices > 1:
            raise ConfigError(
                f"--devices {devices} share requests, and none are given; give --requests, or "
                "leave --devices out for one sequence at a time"
            )
        return None
    return Traffic(requests=requests, prompt=prompt, answer=answer, devices=devices)


def _algorithm(name: AlgorithmName | None, max_loss: float | None) -> Algorithm:
    _positive("--max-loss", max_loss, "nats per token, such as 2.5")
    if name is None:
        return Algorithm.best_quality if max_loss is None else Algorithm.least_cost
    if name is AlgorithmName.best_quality and max_loss is not None:
        raise ConfigError(
            "--max-loss gives a loss to reach, but --algorithm best-quality looks for the lowest; "
            "leave one of them out"
        )
    return Algorithm(name.value)


def _precisions(name: str) -> tuple[str, ...]:
    if name == _AUTO:
        return PRECISIONS
    if name not in PRECISIONS:
        raise ConfigError(
            f"precision {name!r} is unknown here; use {_AUTO}, or one of {', '.join(PRECISIONS)}"
        )
    return (name,)


def _positive(name: str, value: float | None, wanted: str) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{name} {value:g} is not positive and finite; give {wanted}")
    return value


def _number(name: str, text: str) -> float:
    """Return a positive number such as `1e21` or `20B`."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMbBtT]?)\s*", text)
    try:
        value = float(match[1]) * _SUFFIXES[match[2].lower()] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} {text!r} is not a positive number, such as 1e21 or 20B")
    return value
