"""Parameters of a test of which a few run in `make test` and all in `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return values as parameters; all but the quick ones are marked slow."""
    kept = list(quick)
    assert all(one in list(values) for one in kept), "a value that is none of the parameters"
    return [one if one in kept else pytest.param(one, marks=pytest.mark.slow) for one in values]
