"""Keep torch on one thread in steps whose work the kernels do.

OpenMP's threads spin for milliseconds after each parallel operation of torch, on the cores that the
kernels' own threads need: a single small product per step makes all kernels of the step slower.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moefit.cache_argument import given_cache
from moefit.quant.cpu_kernels import kernels
from moefit.serve.layer.decoder_layer import MOST_TOKENS


def use_one_thread_of_torch(model: nn.Module) -> Callable[[], None]:
    """Use one thread for torch's own operations in steps of few tokens, and all for the kernels.

    Args:
        model: A model all of whose layers are computed by kernels in such steps.

    Returns:
        A function that undoes the change.
    """

    def begin(_model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids, compiled = given[0] if given else named.get("input_ids"), kernels()
        few = (
            isinstance(ids, Tensor)
            and ids.is_cpu
            and ids.shape[0] == 1  # several sequences are computed by the family's own code
            and ids.numel() <= MOST_TOKENS
        )
        if compiled is not None and few and given_cache(named) is not None:
            compiled.keep_torch_on_one_thread(True)

    def end(*_: Any) -> None:
        if (compiled := kernels()) is not None:
            compiled.keep_torch_on_one_thread(False)

    handles = (
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    )

    def undo() -> None:
        end()  # a step that was interrupted
        for one in handles:
            one.remove()

    return undo
