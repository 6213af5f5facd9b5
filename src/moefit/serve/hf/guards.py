"""Disable operations that would break a served model, whose experts are not parameters.

transformers would convert or move the dense weights alone, save a checkpoint without experts, and
sample tokens from logits that are not finite. `guard` overrides these methods on the served
instance, never on a class.
"""

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from moefit.errors import CheckpointError, UnsupportedModelError


class FiniteLogits(LogitsProcessor):
    """Raise an error for logits that are not finite; return all others unchanged.

    Raises:
        CheckpointError: The largest logit of a sequence is NaN or infinite.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` unchanged."""
        refuse_no_numbers(scores)
        return scores


def refuse_no_numbers(logits: Tensor) -> None:
    """Raise an error if no token can be sampled from some logits.

    Args:
        logits: Logits [..., V]. Minus infinity is allowed: it excludes a token.

    Raises:
        CheckpointError: The largest logit of a token is NaN or infinite.
    """
    if not logits.amax(-1).isfinite().all():  # the largest is NaN if any of them is
        raise CheckpointError(
            "the model's logits are not finite, so no token can be sampled: its "
            "weights are damaged (copy or download the checkpoint again), or too large for this "
            "dtype (--dtype float32 or bfloat16)"
        )


def guard(model: PreTrainedModel, experts: Collection[str]) -> None:
    """Override conversion, saving and generation of a served model.

    Args:
        model: The served model.
        experts: Names of its served experts modules.
    """
    parents = {""} | {
        ".".join(parts[:number])
        for name in experts
        for parts in [name.split(".")]
        for number in range(1, len(parts) + 1)
    }
    for name in parents:
        module = model.get_submodule(name)
        cast(Any, module)._apply = _no_conversion(module)
    cast(Any, model).save_pretrained = _no_saving
    if hasattr(model, "generate"):  # a classifier of tokens has none
        cast(Any, model).generate = _with_finite_logits(cast(Any, model).generate)


def _no_conversion(module: nn.Module) -> Callable[..., nn.Module]:
    """Return an `nn.Module._apply` that raises an error for conversions that change anything."""

    def apply(change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        del recurse
        for example in _examples(module):
            changed = change(example)
            if (changed.dtype, changed.device) == (example.dtype, example.device):
                continue
            raise UnsupportedModelError(
                f"a served model cannot be converted to {_describe(changed)}: its experts are in "
                f"slots of {_describe(example)}, which are not converted; load it again with "
                "moefit.load(..., dtype=..., device=...)"
            )
        return module

    return apply


def _examples(module: nn.Module) -> list[Tensor]:
    """Return an empty tensor of each dtype and device that the module has."""
    kinds = {(one.dtype, one.device) for one in (*module.parameters(), *module.buffers())}
    return [torch.empty(0, dtype=dtype, device=device) for dtype, device in sorted(kinds, key=str)]


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _no_saving(*_: object, **__: object) -> NoReturn:
    raise UnsupportedModelError(
        "a served model cannot be saved: its experts are not among its parameters, and the "
        "checkpoint would lack them. Copy the folder that it was loaded from, or write "
        "quantised experts with moefit pack"
    )


def _with_finite_logits(generate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(generate)
    def checked(*args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        processors = LogitsProcessorList([*(logits_processor or ()), FiniteLogits()])
        return generate(*args, logits_processor=processors, **kwargs)

    return checked
