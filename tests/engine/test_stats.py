import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.api import TokenRate


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_covers_recent_seconds() -> None:
    clock = Clock()
    pace = TokenRate(clock)
    assert pace.per_second() == 0
    for _ in range(20):
        pace.add(3)
        clock.now += 1
    assert pace.total == 60
    assert pace.per_second() == pytest.approx(3.0)
    clock.now += 4.5
    assert pace.per_second() < 1
    clock.now += 1
    assert pace.per_second() == 0 and pace.total == 60


def test_rate_of_first_tokens_is_not_exaggerated() -> None:
    pace = TokenRate(Clock())
    pace.add(1)
    assert pace.per_second() == 2, "a token just now counts as one in half a second"


@given(st.lists(st.tuples(st.integers(0, 16), st.floats(0, 3)), max_size=30))
def test_rate_covers_window(steps: list[tuple[int, float]]) -> None:
    clock, made = Clock(), []
    pace = TokenRate(clock)
    for tokens, seconds in steps:
        pace.add(tokens)
        made.append((clock.now, tokens))
        clock.now += seconds
    recent = [(at, tokens) for at, tokens in made if at >= clock.now - 5]
    seconds = max(clock.now - recent[0][0], 0.5) if recent else 1
    assert pace.per_second() == pytest.approx(sum(tokens for _, tokens in recent) / seconds)
    assert pace.total == sum(tokens for tokens, _ in steps)
