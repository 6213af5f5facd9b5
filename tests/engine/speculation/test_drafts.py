"""Prompt lookup finds the longest earlier occurrence, as a search of all places does."""

from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.speculation.drafts import (
    LONGEST_MATCH,
    SHORTEST_MATCH,
    Draft,
    DraftedRequest,
    LookupDrafter,
    PromptLookup,
)


def longest_end(tokens: list[int]) -> int:
    """Return the longest end of the tokens that ends earlier too, by trying all places."""
    last = len(tokens) - 1
    found = 0
    for place in range(last):
        length = 0
        while length <= place and tokens[place - length] == tokens[last - length]:
            length += 1
        found = max(found, length)
    return min(found, LONGEST_MATCH)


@given(st.lists(st.integers(0, 2), max_size=15), st.integers(0, 6))
def test_as_a_search_of_all_places(tokens: list[int], most: int) -> None:
    draft, length = PromptLookup().draft(tokens, most), longest_end(tokens)
    if most == 0 or length < SHORTEST_MATCH:
        assert draft is None
        return
    assert draft is not None
    assert draft.evidence == length
    text = [*tokens, *draft.tokens]
    end = tokens[len(tokens) - length :]
    places = [
        place
        for place in range(length, len(tokens))
        if tokens[place - length : place] == end
        and text[place : place + most] == list(draft.tokens)
    ]
    assert places, "what followed the end at an earlier place"
    assert len(draft.tokens) == most


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(1, 9), max_size=8))
def test_growing_texts_are_drafted_as_whole_ones(tokens: list[int], cuts: list[int]) -> None:
    text, end = PromptLookup(), 0
    for cut in cuts:
        end = min(len(tokens), end + cut)
        assert text.draft(tokens[:end], 5) == PromptLookup().draft(tokens[:end], 5)


def test_long_drafts_of_a_text_that_repeats_itself() -> None:
    assert PromptLookup().draft([1, 2, 3, 1, 2, 3, 1, 2], 7) == Draft(
        tokens=(3, 1, 2, 3, 1, 2, 3), evidence=5
    )


def test_requests_draft_from_their_own_tokens() -> None:
    drafter = LookupDrafter()
    drafter.open("a", DraftedRequest(tokens=9))
    drafter.open("b", DraftedRequest(tokens=9))
    texts = {"a": ([1, 2, 3, 1, 2], 1), "b": ([1, 2], 4)}
    assert drafter.draft(texts) == {"a": Draft(tokens=(3,), evidence=2)}
    drafter.close("a")
    drafter.close("a")
    assert drafter.draft({"b": ([1, 2, 1, 2], 2)}) == {"b": Draft(tokens=(1, 2), evidence=2)}
