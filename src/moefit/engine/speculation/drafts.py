"""Drafts: what may follow a request's tokens.

`Drafter` is what the engine needs of a source of drafts; `ModelDrafter` (`draft_model`) is one that
computes. `PromptLookup` finds the longest end of a
request's tokens that occurred before, in the prompt or in the completion, and drafts what followed
it there (prompt lookup decoding; vLLM's method "ngram"). No tensors or threads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from moefit.engine.prefix.tree import Prefix
from moefit.errors import ConfigError

SHORTEST_MATCH = 2  # tokens; single tokens occur everywhere
LONGEST_MATCH = 16  # tokens that are compared
_PLACES = 16  # earlier occurrences that are compared, the last ones


SpeculateSetting = Literal["off", "ngram", "draft", "mtp"]
"""Where drafts come from; see `EngineSettings`."""

MAX_STEP_DRAFTS = 24  # drafted tokens of one step
MAX_DRAFT = 16  # of one request
COMPUTED_EVIDENCE = 2  # of what a model drafts: its places in a draft are classes of their own
LOOKUP_BYTES = 256  # per token of a text that is looked up in


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationStats:
    """Totals since the engine was created.

    Attributes:
        drafts: Drafts that were verified, at least in part.
        drafted: Their tokens.
        accepted: Those that were right.
        accepted_at: The same by place in the draft.
        plain_steps: Decoding steps that could have verified a draft, but would have been slower.
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = (0,) * MAX_DRAFT
    plain_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculate:
    """What `--speculate` says.

    Attributes:
        setting: Where drafts come from.
        draft: The draft model, as for `moefit.load`.
    """

    setting: SpeculateSetting = "off"
    draft: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what a text says. Raises ConfigError for anything else.

        >>> Speculate.parse("draft:models/small")
        Speculate(setting='draft', draft='models/small')
        """
        if text == "off":
            return cls()
        if text == "ngram":
            return cls(setting="ngram")
        if text == "mtp":
            return cls(setting="mtp")
        kind, _, model = text.partition(":")
        if kind == "draft" and model:
            return cls(setting="draft", draft=model)
        raise ConfigError(
            f"--speculate {text} is not one of off, ngram, mtp, draft:MODEL (a folder, or a name "
            "on the Hub)"
        )


Chooser = Callable[[Any], int]
"""Chooses a token from logits [V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedRequest:
    """What a drafter may know of a request when it begins.

    Attributes:
        tokens: Of prompt and completion at most.
        prefix: The prompt, if keys and values may be kept for later requests.
        foreseen: See `Sampler.foreseen`, of the request's sampler as it is when this is called.
    """

    tokens: int
    prefix: Prefix | None = None
    foreseen: Callable[[], Chooser | None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Tokens that may follow.

    Attributes:
        tokens: The first one follows directly.
        evidence: How much speaks for the first one, in the drafter's own unit; one more for each
            that follows it.
    """

    tokens: tuple[int, ...]
    evidence: int


class Drafter(Protocol):
    """A source of drafts for the requests of an engine.

    Attributes:
        name: For people.
        computes: Whether each drafted token takes time worth measuring, so that the number of
            tokens is decided before they are drafted, and only those are.
    """

    name: str
    computes: bool

    def open(self, request: str, about: DraftedRequest) -> None:
        """Begin a request."""
        ...

    def close(self, request: str) -> None:
        """Free what is held for a request; unknown ones are ignored."""
        ...

    def behind(self, request: str, tokens: int) -> int | None:
        """Return how many tokens have to be read before it drafts; None if it drafts nothing.

        Args:
            request: Request id.
            tokens: Number of the request's tokens.
        """
        ...

    def draft(self, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Draft]:
        """Return drafts for requests, where there are any.

        Args:
            wanted: Tokens of each request so far, and how many to draft at most.
        """
        ...


class PromptLookup:
    """Occurrences of pairs of tokens in one request's tokens, which only become longer.

    >>> text = PromptLookup()
    >>> text.draft([1, 2, 3, 4, 9, 2, 3], most=2)
    Draft(tokens=(4, 9), evidence=2)
    """

    def __init__(self):
        self._last: dict[tuple[int, int], int] = {}  # where a pair ends the last time
        self._earlier: list[int] = []  # by place: where the pair that ends there ended before

    def draft(self, tokens: Sequence[int], most: int) -> Draft | None:
        """Return what followed the longest earlier occurrence of the last tokens.

        A draft that reaches the end of the tokens goes on with its own beginning, so that a text
        that repeats itself is drafted at any length.

        Args:
            tokens: All tokens of the request; those of earlier calls are its beginning.
            most: Tokens of the draft.
        """
        self._index(tokens)
        if most < 1 or len(tokens) <= SHORTEST_MATCH:
            return None
        length, place = 0, -1
        candidate = self._earlier[-1]
        for _ in range(_PLACES):
            if candidate < 0 or length == LONGEST_MATCH:
                break
            if (found := _common_end(tokens, candidate)) > length:
                length, place = found, candidate
            candidate = self._earlier[candidate]
        if place < 0:
            return None
        period = len(tokens) - 1 - place
        following = [tokens[place + 1 + at % period] for at in range(most)]
        return Draft(tokens=tuple(following), evidence=length)

    def _index(self, tokens: Sequence[int]) -> None:
        for place in range(len(self._earlier), len(tokens)):
            pair = (tokens[place - 1], tokens[place])
            self._earlier.append(self._last.get(pair, -1) if place else -1)
            if place:
                self._last[pair] = place


def _common_end(tokens: Sequence[int], place: int) -> int:
    """Return how many tokens up to `place` equal the last ones, at most `LONGEST_MATCH`."""
    most = min(LONGEST_MATCH, place + 1)
    last = len(tokens) - 1
    return next((n for n in range(most) if tokens[place - n] != tokens[last - n]), most)


class LookupDrafter:
    """Draft by prompt lookup, for each request from its own tokens."""

    name = "ngram"
    computes = False

    def __init__(self):
        self._texts: dict[str, PromptLookup] = {}

    def open(self, request: str, about: DraftedRequest) -> None:
        """Begin a request."""
        del about
        self._texts[request] = PromptLookup()

    def close(self, request: str) -> None:
        """Forget a request."""
        self._texts.pop(request, None)

    def behind(self, request: str, tokens: int) -> int | None:
        """Return 0: looking up takes no time worth measuring."""
        del request, tokens
        return 0

    def draft(self, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Draft]:
        """Return drafts for the requests whose last tokens occurred before."""
        found = {
            name: self._texts[name].draft(tokens, most) for name, (tokens, most) in wanted.items()
        }
        return {name: draft for name, draft in found.items() if draft is not None}
