"""Percentiles over the last minutes."""

from hypothesis import given
from hypothesis import strategies as st

from moefit.server.metrics import Window


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1))
def test_nearest_rank(values: list[float], share: float) -> None:
    window = Window(seconds=1000)
    for at, value in enumerate(values):
        window.add(value, at=float(at))
    (found,) = window.percentiles(share, at=50.0)
    assert found is not None
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values) + 1e-9


def test_window_drops_old_and_excess_values() -> None:
    window = Window(seconds=10, most=3)
    for at in range(5):
        window.add(float(at), at=float(at))
    assert window.percentiles(0.01, 1.0, at=5.0) == (2.0, 4.0)
    assert window.percentiles(0.5, at=13.5) == (4.0,)
    assert window.percentiles(0.5, 0.9, at=20.0) == (None, None)
