"""What a served model refuses to do, since its experts are not among its parameters.

transformers' model does not know that its experts lie in slots: it would convert or move the rest
alone, save a checkpoint without experts, and turn logits that are no numbers into tokens. Each
guard is set on the one instance that is served, never on a class. Knows nothing of slots.
"""

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from moefit.errors import CheckpointError, UnsupportedModelError


class FiniteLogits(LogitsProcessor):
    """Ends a generation whose logits are no finite numbers; changes none.

    Raises:
        CheckpointError: The largest logit of a sequence is NaN or infinite.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` as they are."""
        refuse_no_numbers(scores)
        return scores


def refuse_no_numbers(logits: Tensor) -> None:
    """Refuse logits [.., V] of which no token can be chosen.

    Args:
        logits: Of any number of tokens. Minus infinity is a token that cannot be, and fine.

    Raises:
        CheckpointError: The largest logit of a token is NaN or infinite.
    """
    if not logits.amax(-1).isfinite().all():  # the largest is NaN if any of them is
        raise CheckpointError(
            "the model's logits are no finite numbers, so that no token can be chosen: its "
            "weights are damaged (copy or download the checkpoint again), or too large for this "
            "dtype (--dtype float32 or bfloat16)"
        )


def guard(model: PreTrainedModel, experts: Collection[str]) -> None:
    """Let a served model refuse what would break it; all else is as it was.

    Args:
        model: Whose experts are served.
        experts: Names of the modules that serve them.
    """
    around = {""} | {
        ".".join(parts[:number])
        for name in experts
        for parts in [name.split(".")]
        for number in range(1, len(parts) + 1)
    }
    for name in around:
        module = model.get_submodule(name)
        cast(Any, module)._apply = _no_conversion(module)
    cast(Any, model).save_pretrained = _no_saving
    cast(Any, model).generate = _with_finite_logits(cast(Any, model).generate)


def _no_conversion(module: nn.Module) -> Callable[..., nn.Module]:
    """`nn.Module._apply` for conversions that change nothing; all others raise."""

    def apply(change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        del recurse
        for example in _examples(module):
            changed = change(example)
            if changed is example or _alike(changed, example):
                continue
            raise UnsupportedModelError(
                f"a served model cannot become {_words(changed)}: its experts are in slots of "
                f"{_words(example)}, which transformers does not convert; load it anew with "
                "moefit.load(..., dtype=..., device=...)"
            )
        return module

    return apply


def _examples(module: nn.Module) -> list[Tensor]:
    """An empty tensor of every dtype and device that the module has."""
    kinds = {(one.dtype, one.device) for one in (*module.parameters(), *module.buffers())}
    return [torch.empty(0, dtype=dtype, device=device) for dtype, device in sorted(kinds, key=str)]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _no_saving(*_: object, **__: object) -> NoReturn:
    raise UnsupportedModelError(
        "a served model cannot be saved: its experts are not among its parameters, and the "
        "checkpoint would be without them. Copy the folder that it was loaded from, or write "
        "quantised experts with moefit pack"
    )


def _with_finite_logits(generate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(generate)
    def checked(*args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        processors = LogitsProcessorList([*(logits_processor or ()), FiniteLogits()])
        return generate(*args, logits_processor=processors, **kwargs)

    return checked
