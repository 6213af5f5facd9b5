"""How long a layer's small operations take, by torch and by the kernels, and what a token gains.

    python benchmarks/layer_operations.py FOLDER [--precision int4-nearest] [--context 256]
        [--rounds 9] [--tokens 12] [--threads 2] [--save NAME]

FOLDER is a model with experts, such as make_checkpoint.py writes. Each operation is called on the
first layer's own module with one token, as the family computes it and as it is served, in turn.
Whole tokens are decoded with torch's small operations, with a kernel call for each, and with two
calls a layer, in interleaved rounds of one process; products and attention are always the kernels'.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import record
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import moefit
from moefit.quant.cpu_kernels import status
from moefit.serve.layer.decoder_layer import LayerForward
from moefit.serve.model import ServedModel

CALLS = 200  # of an operation in one round
Way = Callable[[], Any]


WAYS: dict[str, type | tuple[type, ...]] = {
    "torch": object,
    "kernels": LayerForward,
    "two calls a layer": (),
}
"""Ways of computing whole tokens, each with the kinds of `forward` that it does without."""


@contextmanager
def without(model: nn.Module, kinds: Any) -> Iterator[None]:
    """Compute modules by the family's own code within the block, those with such a `forward`."""
    changed = {
        one: vars(one).pop("forward")
        for one in model.modules()
        if "forward" in vars(one) and isinstance(vars(one)["forward"], kinds)
    }
    try:
        yield
    finally:
        for module, forward in changed.items():
            vars(module)["forward"] = forward


def seconds(call: Way, number: int) -> float:
    began = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - began) / number


def rotary_calls(model: nn.Module) -> dict[str, tuple[Way, Way]]:
    """Return the rotary embedding of one token's queries and keys, by torch and by the kernel."""
    for module in model.modules():
        forward = vars(module).get("forward")
        for function in getattr(forward, "__globals__", {}).values():
            if hasattr(function, "own") and hasattr(module, "head_dim"):
                width, dtype = int(cast(Any, module).head_dim), cast(Any, model).dtype
                query = torch.randn(1, 1, 16, width).to(dtype).transpose(1, 2)
                angles = torch.randn(2, 1, 1, width).to(dtype)
                given = (query, query.clone(), *angles)
                return {
                    "rotary embedding": (
                        lambda: function.own(*given),  # noqa: B023 - returned at once
                        lambda: function(*given),  # noqa: B023
                    )
                }
    return {}


def norm_calls(model: nn.Module) -> dict[str, tuple[Way, Way]]:
    """Return one norm of each width, by torch and by the kernel."""
    found: dict[str, tuple[Way, Way]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if "forward" in vars(module) and weight is not None and weight.dim() == 1:
            x = torch.randn(1, 1, len(weight)).to(cast(Any, model).dtype)
            own, kernel = type(module).forward, module.forward
            found.setdefault(
                f"norm of {len(weight)}",
                (lambda m=module, x=x, f=own: f(m, x), lambda x=x, f=kernel: f(x)),
            )
    return found


def router_calls(served: ServedModel) -> dict[str, tuple[Way, Way]]:
    """Return the first layer's router for one token, its matrix product included."""
    first = next(iter(served.blocks.values()))
    module = served.model.get_submodule(first.router) if first.router else None
    if module is None or "forward" not in vars(module):
        return {}
    weight = module._parameters["weight"]
    assert weight is not None
    x, own = torch.randn(1, weight.shape[1]).to(served.model.dtype), type(module).forward
    return {"router": (lambda: own(module, x), lambda: module.forward(x))}


def decoder(served: ServedModel, context: int) -> Way:
    """Process a prompt; return a function that decodes one random token behind it."""
    vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (1, context), generator=generator)
    cache = served.model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step() -> None:
        ids = torch.randint(0, vocabulary, (1, 1), generator=generator)
        served.model(input_ids=ids, past_key_values=cache, use_cache=True)

    return step


@torch.inference_mode()
def measure(served: ServedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    model = served.model
    calls = norm_calls(model) | rotary_calls(model) | router_calls(served)
    single: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    step = decoder(served, arguments.context)
    whole: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(8):
        step()
    for _ in range(arguments.rounds):
        for name, (own, kernel) in calls.items():
            single[name][0].append(seconds(own, CALLS))
            single[name][1].append(seconds(kernel, CALLS))
        for name, kinds in WAYS.items():
            with without(model, kinds):
                step()
                whole[name].append(seconds(step, arguments.tokens))
    return {
        "level": status(),
        "operations": {
            name: {"torch": median(own), "kernels": median(kernel)}
            for name, (own, kernel) in single.items()
        },
        "token": {name: median(found) for name, found in whole.items()} | {"rounds": whole},
        "saved": {
            name: median(a - b for a, b in zip(whole["torch"], found, strict=True))
            for name, found in whole.items()
        },
        "layers": len(served.blocks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="int4-nearest")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    precision = {"precision": arguments.precision, "dense_precision": arguments.precision}
    with moefit.load(arguments.folder, context=2 * arguments.context + 512, **precision) as served:
        everyone = {name: range(one.num_experts) for name, one in served.blocks.items()}
        served.set_residents(everyone)
        results = measure(served, arguments)
    out = Table(title=f"one token, {results['level']}", title_justify="left")
    for column in ("operation", "torch", "kernels"):
        out.add_column(column, justify="left" if column == "operation" else "right")
    for name, found in results["operations"].items():
        out.add_row(name, *(f"{found[way] * 1e6:.1f} us" for way in ("torch", "kernels")))
    for way in WAYS:
        out.add_row(f"whole token, {way}", f"{results['token'][way] * 1e3:.2f} ms", "")
    Console(width=100).print(out)
    if arguments.save:
        notes = (
            "seconds; medians of rounds that alternate; an operation is called with its data in "
            "the caches; whole tokens differ in small operations and the calls between them alone"
        )
        print(record.write("layer-operations", results, notes=notes, suffix=arguments.save))


if __name__ == "__main__":
    main()
