import torch
from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.varlen import Segment, Segments, first_key

segments = st.builds(
    Segment, start=st.integers(0, 9), past=st.integers(0, 9), new=st.integers(1, 6)
)
windows = st.none() | st.integers(1, 12)


def sees(segment: Segment, query: int, window: int | None) -> set[int]:
    """Reference: keys of the request that one of its new tokens attends to."""
    at = segment.past + query
    return {key for key in range(at + 1) if window is None or key > at - window}


@given(segments, windows)
def test_mask_hides_other_tokens(segment: Segment, window: int | None) -> None:
    mask_TL = Segments(rows=(segment,)).mask(segment, window, torch.zeros(1))
    first = first_key(segment, window)
    for query in range(segment.new):
        seen = {first + key for key, hidden in enumerate(mask_TL[query].tolist()) if not hidden}
        assert seen == sees(segment, query, window)
    assert first == min(key for query in range(segment.new) for key in sees(segment, query, window))


@given(segments)
def test_segment_end_follows_last_key(segment: Segment) -> None:
    assert segment.end == segment.start + segment.past + segment.new


def test_mask_is_cached_by_step_and_dtype() -> None:
    segment = Segment(start=0, past=2, new=3)
    step = Segments(rows=(segment,))
    mask = step.mask(segment, None, torch.zeros(1))
    assert step.mask(segment, None, torch.ones(4)) is mask
    assert step.mask(segment, None, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert step.mask(segment, 2, torch.zeros(1)) is not mask
