import math

from moefit.train.spikes import LEAST, MOST_IN_A_ROW, SpikeDetector


def calm(detector, steps=LEAST):
    for step in range(steps):
        assert not detector.is_spike(2 + step % 2 / 10, 1 + step % 3 / 10)


def test_the_first_steps_are_never_spikes_but_infinite_values_are():
    detector = SpikeDetector(3)
    calm(detector, LEAST - 1)
    assert not detector.is_spike(100, 100)
    assert detector.is_spike(math.inf, 1)


def test_spikes_do_not_change_what_counts_as_normal():
    detector = SpikeDetector(3)
    calm(detector)
    assert all(detector.is_spike(9, 1) for _ in range(MOST_IN_A_ROW))
    assert not detector.is_spike(9, 1)  # the model has changed, or stops with an error
    assert not any(detector.is_spike(9, 1) for _ in range(LEAST))  # from then on it is normal
    assert detector.skipped == MOST_IN_A_ROW


def test_sparse_steps_are_compared_with_sparse_steps():
    detector = SpikeDetector(3)
    for step in range(LEAST):
        assert not detector.is_spike(2 + step % 2 / 10, 1)
        assert not detector.is_spike(5 + step % 2 / 10, 3, sparse=True)
    assert detector.is_spike(5, 1)
    assert not detector.is_spike(5, 3, sparse=True)
    for _ in range(MOST_IN_A_ROW):  # each kind has its own number in a row
        assert detector.is_spike(9, 3, sparse=True)
    assert detector.is_spike(9, 1)
    assert not detector.is_spike(9, 3, sparse=True)


def test_a_restored_detector_goes_on():
    detector, other = SpikeDetector(3), SpikeDetector(3)
    calm(detector)
    detector.is_spike(50, 1)
    other.load_state_dict(detector.state_dict())
    assert other.state_dict() == detector.state_dict()
    assert other.is_spike(9, 1)
    assert other.skipped == 2


def test_without_sigma_nothing_is_skipped():
    assert not SpikeDetector(None).is_spike(math.nan, 1)
