"""What a KV cache takes that holds more tokens than were reserved when the model was loaded.

`ContextCosts` gives the budget with another number of tokens, and the most tokens for which a
budget has room beside experts. A grown cache is charged with a layer more than it holds: while its
size changes it is copied tensor by tensor, and the process must not exceed its budget meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moefit.serve.config import LoadSettings
from moefit.serve.memory.activations import kv_bytes_per_token, layers_with_cache
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.memory.estimate import step_tokens, step_workspace

# Of a token that was not reserved at load, beside its keys and values: in a request's lists of
# tokens, and in the tree of prefixes. By hand: 100 to 150.
TOKEN_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextCosts:
    """Bytes of a KV cache that may grow.

    Args:
        reserved: The budget with the tokens that are reserved from the start.
        token_bytes: Of a token in a grown cache.
        steps: Returns tokens of the longest step and bytes of its activations, by tokens of the
            cache.
    """

    reserved: MemoryBudget
    token_bytes: int
    steps: Callable[[int], tuple[int, int]]

    @property
    def base(self) -> int:
        """Tokens that are reserved from the start."""
        assert self.reserved.context is not None
        return self.reserved.context

    def at(self, budget: MemoryBudget, tokens: int) -> MemoryBudget:
        """Return a budget with this many tokens in the KV cache, and no fewer than reserved."""
        given, tokens = self.reserved, max(tokens, self.base)
        kv_cache, workspace, longest = given.kv_cache, given.workspace, given.step_tokens
        if tokens > self.base:
            steps, work = self.steps(tokens)
            kv_cache, workspace = tokens * self.token_bytes, max(workspace, work)
            longest = max(longest or 0, steps)
        return replace(
            budget, context=tokens, kv_cache=kv_cache, workspace=workspace, step_tokens=longest
        )

    def needed(self, budget: MemoryBudget, tokens: int, *, spare_experts: bool) -> int:
        """Return the smallest total in which the KV cache may hold this many tokens.

        Args:
            budget: The budget in force, with any number of tokens.
            tokens: Of all requests together.
            spare_experts: Leave experts half of what they have with the tokens reserved from the
                start; otherwise the fewest slots.
        """
        small, large = self.at(budget, self.base), self.at(budget, tokens)
        if not spare_experts or tokens <= self.base:
            return large.min_bytes
        # half of what `total - small.fixed` leaves for experts, but no more than half of all
        half = min(
            2 * large.fixed - small.fixed, large.fixed + (small.max_bytes - small.fixed + 1) // 2
        )
        return max(large.min_bytes, half)

    def most(self, budget: MemoryBudget, limit: int, *, spare_experts: bool) -> int:
        """Return the most tokens, up to `limit`, for which a budget with a total has room."""
        assert budget.total is not None
        low, high = self.base, max(limit, self.base)
        while low < high:
            middle = (low + high + 1) // 2
            if self.needed(budget, middle, spare_experts=spare_experts) <= budget.total:
                low = middle
            else:
                high = middle - 1
        return low


def context_costs(
    budget: MemoryBudget,
    config: Any,
    dtype: torch.dtype,
    settings: LoadSettings,
    *,
    place_bytes: int,
    more: int,
) -> ContextCosts:
    """Return what a model's KV cache takes if it grows.

    Args:
        budget: With the tokens that are reserved from the start.
        config: The model's transformers configuration.
        dtype: Of the model.
        settings: With which it was loaded, and the tokens of the engine's longest step.
        place_bytes: Bytes of a token's keys and values as they are in the cache.
        more: Bytes of a token besides, such as for drafting.
    """
    keys = max(place_bytes, kv_bytes_per_token(config, dtype, int8=settings.int8_cache))
    copied = -(-keys // max(1, layers_with_cache(config)))

    def steps(tokens: int) -> tuple[int, int]:
        work = step_workspace(config, dtype, settings, context=tokens, first_use=budget.first_use)
        return step_tokens(config, settings, tokens), work

    return ContextCosts(
        reserved=budget, token_bytes=keys + copied + TOKEN_BYTES + more, steps=steps
    )
