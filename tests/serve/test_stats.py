import pytest

from moefit.serve.stats import LOG_INTERVAL, RECOVERY, Counters, LoadFailures


def test_rates_without_accesses() -> None:
    counters = Counters()
    assert counters.hit_rate == 1.0 and counters.substituted_mass == 0.0


def test_rates() -> None:
    counters = Counters(hits=3, fetches=1, substituted=0.5, routed=2, swaps=7, wait_seconds=0.25)
    assert counters.hit_rate == 0.75
    assert counters.substituted_mass == pytest.approx(0.25)
    assert counters.as_dict() == {
        "hits": 3, "fetches": 1, "substitutions": 0, "swaps": 7, "wait_seconds": 0.25,
        "substituted": 0.5, "routed": 2, "hit_rate": 0.75, "substituted_mass": 0.25,
        "computed_on_host": 0,
        "prefetches": 0, "prefetches_used": 0, "prefetched_bytes": 0, "prefetch_wasted_bytes": 0,
    }  # fmt: skip


def test_failed_reads_are_counted_and_logged_at_intervals(caplog) -> None:
    now = [0.0]
    failures = LoadFailures(lambda: now[0])
    assert not failures.failing
    for _ in range(40):
        failures.failed("layers.3", 7, OSError("the disk is gone"), background=True)
    failures.failed("layers.3", 7, OSError("the disk is gone"), background=False)
    assert (failures.background, failures.demand, len(caplog.records)) == (40, 1, 1)
    assert "expert 7 of layers.3" in caplog.text and "the disk is gone" in caplog.text
    now[0] = LOG_INTERVAL
    failures.failed("layers.3", 8, OSError("the disk is gone"), background=True)
    assert len(caplog.records) == 2 and "40 more reads failed" in caplog.text
    assert failures.as_dict() == {
        "load_failures": {"demand": 1, "background": 41},
        "loads_failing": True,
    }


def test_reading_recovers_after_a_minute_without_failures() -> None:
    now = [0.0]
    failures = LoadFailures(lambda: now[0])
    failures.failed("layers.3", 7, OSError(), background=True)
    now[0] = 10 * RECOVERY
    assert failures.failing, "no read has succeeded since"
    failures.worked()
    assert not failures.failing
    failures.failed("layers.3", 7, OSError(), background=True)
    failures.worked()
    assert failures.failing, "one expert is still damaged"
    now[0] += RECOVERY
    assert not failures.failing
