"""How a transformers model takes its KV cache and returns it.

transformers 5.24 renamed the argument `past_key_values` of every forward pass, and the field of its
outputs, to `cache`; some state-space models before it had `cache_params`. What a model knows is
read from the signature of its forward pass, whatever the version. A name that a model does not know
would be swallowed by its `**kwargs`, and the model would go on without a cache.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from types import MethodType
from typing import Any

from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from moefit.errors import UnsupportedModelError

CACHE_NAMES = ("past_key_values", "cache", "cache_params")
# What transformers' own layers and outputs are given, in the installed version.
CACHE_NAME = next(
    field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES
)


def cache_name(model: nn.Module) -> str:
    """Return the name under which a model's forward pass takes its KV cache.

    >>> class Model(nn.Module):
    ...     def forward(self, input_ids, cache=None): ...
    >>> cache_name(Model())
    'cache'

    Raises:
        UnsupportedModelError: It takes none of the known names.
    """
    base = getattr(model, "base_model", model)  # to which a model may pass on `**kwargs`
    for module in (model, base):
        known = _known_names(module.forward)
        if known:
            return known[0]
        if not _takes_any(module.forward):
            break
    names = ", ".join(CACHE_NAMES)
    raise UnsupportedModelError(
        f"the forward pass of {type(model).__name__} takes no KV cache under a name that moefit "
        f"knows ({names}), so every token would be computed without the ones before it; models of "
        "transformers for text generation take one"
    )


def _known_names(forward: Callable[..., Any]) -> list[str]:
    parameters = _parameters_of(forward)
    return [name for name in CACHE_NAMES if name in parameters]


def _takes_any(forward: Callable[..., Any]) -> bool:
    kinds = _parameters_of(forward).values()
    return inspect.Parameter.VAR_KEYWORD in kinds


def _parameters_of(forward: Callable[..., Any]) -> dict[str, Any]:
    """Return the kinds of a function's parameters by name; those of a class are kept."""
    if isinstance(forward, MethodType):
        return _known_parameters(forward.__func__)
    return _parameters(forward)


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: one.kind for name, one in inspect.signature(function).parameters.items()}


_known_parameters = lru_cache(maxsize=64)(_parameters)  # asked for every token


def given_cache(named: Mapping[str, Any]) -> Any:
    """Return the KV cache among the named arguments of a forward pass, or None."""
    return next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)


def with_cache(named: Mapping[str, Any], cache: Any, model: nn.Module) -> dict[str, Any]:
    """Return a forward pass's named arguments with this KV cache, under the name that it knows."""
    others = {name: value for name, value in named.items() if name not in CACHE_NAMES}
    return {**others, cache_name(model): cache}


def returned_cache(output: Any) -> Any:
    """Return the KV cache that a forward pass returned.

    Raises:
        UnsupportedModelError: It returned none.
    """
    names = [name for name in (CACHE_NAME, *CACHE_NAMES) if name in output]
    cache = output[names[0]] if names else None
    if cache is None:
        raise UnsupportedModelError(
            f"{type(output).__name__} has no KV cache ({', '.join(CACHE_NAMES)}), so the next "
            "token would be computed without the ones before it"
        )
    return cache


def forward_with_cache(model: Any, cache: Any, /, **inputs: Any) -> tuple[Any, Any]:
    """Run a forward pass that continues from a KV cache.

    Args:
        model: The model.
        cache: Of the tokens before; None begins a new one.
        inputs: Named arguments of the forward pass.

    Returns:
        The model's output, and the KV cache after it.

    Raises:
        UnsupportedModelError: The model takes or returns no KV cache.
    """
    output = model(**with_cache(inputs, cache, model), use_cache=True)
    return output, returned_cache(output)


def one_cache(*given: Cache | None) -> Cache | None:
    """Return the KV cache of a forward pass that takes it under several names.

    Raises:
        ValueError: More than one is given.
    """
    caches = [one for one in given if one is not None]
    if len(caches) > 1:
        raise ValueError("give the KV cache once, as cache or as past_key_values")
    return caches[0] if caches else None
