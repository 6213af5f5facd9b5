"""What tests of layers share."""

from typing import Any

import pytest

from moefit.serve.layer import layer_chain


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Layers of each call, and how many of them it computed."""
    made: list[tuple[int, int]] = []
    own = layer_chain.compute_layers

    def counting(kernels: Any, layers: Any, *others: Any) -> Any:
        output = own(kernels, layers, *others)
        made.append((len(layers), output.complete))
        return output

    monkeypatch.setattr(layer_chain, "compute_layers", counting)
    return made
