"""Served models of a few layers, and what they compute."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_families import tiny_family
from tiny_served import saved, tokens
from torch import Tensor, nn

from moefit.cache_argument import forward_with_cache
from moefit.engine.runner_probe import choose_runner
from moefit.engine.runners import RunnerInput, VarlenRunner
from moefit.serve.config import LoadSettings
from moefit.serve.layer.decoder_layer import LayerForward
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel


@contextmanager
def own_modules(model: nn.Module) -> Iterator[None]:
    """Compute layers by the family's own modules within the block."""
    kept = {
        module: vars(module).pop("forward")
        for module in model.modules()
        if isinstance(vars(module).get("forward"), LayerForward)
    }
    try:
        yield
    finally:
        for module, forward in kept.items():
            vars(module)["forward"] = forward


def layers_of(model: nn.Module) -> list[LayerForward]:
    found = (vars(module).get("forward") for module in model.modules())
    return [one for one in found if isinstance(one, LayerForward)]


@torch.inference_mode()
def decoded(model: Any, *, after: Callable[[], object] | None = None, **named: Any) -> Tensor:
    """Return logits of a prompt of 7 tokens, then of 6 tokens one by one, each `after` a call."""
    ids_1T = tokens(1, 13)
    output, cache = forward_with_cache(model, None, input_ids=ids_1T[:, :7])
    rows = [output.logits]
    for at in range(7, 13):
        if after is not None:
            after()
        output, cache = forward_with_cache(model, cache, input_ids=ids_1T[:, at : at + 1], **named)
        rows.append(output.logits)
    return torch.cat(rows, dim=1)


@contextmanager
def served(
    name: str, folder: Path, *, sizes: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[ServedModel]:
    model = tiny_family(name, **{"head_dim": 16, "hidden_size": 64, **(sizes or {})})
    model.to(settings.pop("dtype", torch.bfloat16))
    with load_model(saved(model, folder), LoadSettings(context=128, **settings)) as loaded:
        yield loaded


@torch.inference_mode()
def in_a_crowd(loaded: ServedModel) -> Tensor:
    """Return logits of three requests that the engine's runner decodes together."""
    runner = choose_runner(loaded, 96)
    assert isinstance(runner, VarlenRunner)
    ids, rows = tokens(3, 16).tolist(), []
    for number in range(3):
        runner.open(str(number), 16)
    for past, new in ((0, 9), (9, 1), (10, 1), (11, 3), (14, 1)):
        inputs = [
            RunnerInput(request=str(n), tokens=ids[n][past : past + new], past=past, num_logits=new)
            for n in range(3)
        ]
        rows.append(runner.step(inputs))
    return torch.cat(rows)


@torch.no_grad()
def begun(model: Any, tokens_B5: Tensor) -> Any:
    """Return a cache behind a prompt and one token, after which it has room for others."""
    _, cache = forward_with_cache(model, None, input_ids=tokens_B5[:, :4])
    return forward_with_cache(model, cache, input_ids=tokens_B5[:, 4:])[1]


def counts(loaded: ServedModel) -> tuple[float, ...]:
    counters = loaded._shared.counters
    return counters.hits, counters.fetches, counters.substituted, counters.routed


@contextmanager
def nothing() -> Iterator[None]:
    yield
