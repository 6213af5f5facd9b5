"""Keeps a served model within the tokens that its memory was reckoned for.

Owns one check, made before every step under a budget: cache and activations of more tokens than
the ledger reserved would break the budget, so that step is refused and nothing is lost. Knows
nothing of experts.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moefit.errors import ConfigError


@runtime_checkable
class TokenHolder(Protocol):
    """A cache that several sequences of different lengths share, and that can count."""

    def tokens_held(self) -> int:
        """Tokens of all sequences, those of the step that is about to be made included."""
        ...


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


def limit_context(model: nn.Module, limit: Callable[[], int | None]) -> RemovableHandle:
    """Refuse steps whose sequences would hold more than `limit()` tokens together; None: no limit.

    The step raises ConfigError. Tokens of all sequences count, those in the cache too.
    """

    def check(_model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        most = limit()
        if most is None:
            return
        wanted = _held(inputs, named)
        if wanted > most:
            raise ConfigError(
                f"this step would hold {wanted:,} tokens, but the memory budget reserves for "
                f"{most:,}; load with context={wanted} or more, or give shorter or fewer sequences"
            )

    return model.register_forward_pre_hook(check, with_kwargs=True)


def _held(inputs: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Tokens of the longer side of the step, its past included, over all sequences."""
    if isinstance(shared := named.get("past_key_values"), TokenHolder):
        return shared.tokens_held()
    given = [*inputs[:1], *(named.get(name) for name in _TOKENS)]
    tensors = [one for one in given if isinstance(one, Tensor) and one.dim() >= 2]
    if not tensors:
        return 0
    sequences = max(one.shape[0] for one in tensors)
    new = max(one.shape[1] for one in tensors)
    cache: Any = named.get("past_key_values")
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return sequences * (int(past) + new)
