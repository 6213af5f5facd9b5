import pytest

from moefit.serve.stats import Counters


def test_rates_of_nothing() -> None:
    counters = Counters()
    assert counters.hit_rate == 1.0 and counters.substituted_mass == 0.0


def test_rates_by_hand() -> None:
    counters = Counters(hits=3, fetches=1, substituted=0.5, routed=2, swaps=7, wait_seconds=0.25)
    assert counters.hit_rate == 0.75
    assert counters.substituted_mass == pytest.approx(0.25)
    assert counters.as_dict() == {
        "hits": 3, "fetches": 1, "substitutions": 0, "swaps": 7, "wait_seconds": 0.25,
        "substituted": 0.5, "routed": 2, "hit_rate": 0.75, "substituted_mass": 0.25,
    }  # fmt: skip
