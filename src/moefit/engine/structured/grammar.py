"""Compile grammars for a model's tokens, and follow them token by token.

`GrammarCompiler` keeps what it compiled for the last grammars, and which ones it refused.
`Grammar.start` returns the state of
one answer, whose `allowed` is the mask of its next token.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from moefit.engine.structured.library import llguidance
from moefit.engine.structured.trial import tried
from moefit.engine.structured.vocabulary import Vocabulary, vocabulary
from moefit.errors import ConfigError, QueueFullError

MAX_GRAMMARS = 64
MAX_TRIED = 4096
MAX_CACHED_TEXT = 1 << 20  # bytes of their texts
_TOO_COMPLEX = "grammar_too_complex"
# Bounds on one mask: about 10 ms, and some 20 MB of states for one answer.
_LIMITS = {
    "max_lexer_states": 20_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class GrammarError(Exception):
    """A request's grammar does not let it continue. The message may be shown to clients."""

    code = _TOO_COMPLEX


class UntriedError(QueueFullError):
    """A grammar is not compiled yet; `GrammarCompiler.prepare` does so.

    Attributes:
        grammar: Its text.
        parts: Grammars of clients that it has.
    """

    def __init__(self, grammar: str, parts: Sequence[str]):
        super().__init__("the forms of this request are not all tried yet; send it again")
        self.grammar, self.parts = grammar, parts


class GrammarState:
    """Which tokens may follow the ones that an answer has so far."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def allowed(self, size: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Return a mask of the token ids that may come next.

        Args:
            size: Length of the mask; ids beyond the vocabulary are False.

        Raises:
            GrammarError: If the grammar is too complex at this place.
        """
        bits = self._matcher.compute_bitmask()
        self._check()
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(bool)
        return mask[:size] if len(mask) >= size else np.pad(mask, (0, size - len(mask)))

    def accept(self, token: int) -> None:
        """Continue with a token that `allowed` admits.

        Raises:
            GrammarError: If the grammar is too complex at this place.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = _first_line(self._matcher.get_error())
            raise GrammarError(f"the grammar or schema is too complex to go on: {why}")


class Grammar:
    """A compiled grammar; any number of answers may follow it at once."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def start(self) -> GrammarState:
        """Return the state of a new answer."""
        return GrammarState(self._matcher.deep_copy())


class GrammarCompiler:
    """Compile grammars for one model. Thread-safe.

    Args:
        tokenizer: The model's tokenizer; None if it has none.
        size: Token ids of the model.
        eos_ids: Tokens that end an answer; allowed wherever the grammar may end.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, *, size: int, eos_ids: Collection[int]
    ):
        self._source, self._size, self._eos_ids = tokenizer, size, sorted(eos_ids)
        self._lock = Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()  # by digests of the texts

    def verdict(self, grammar: str) -> str | None:
        """Return what is wrong with a client's grammar; None if it was not tried yet."""
        with self._lock:
            return self._verdicts.get(_digest(grammar))

    def compiled(self, grammar: str) -> Grammar | None:
        """Return a grammar that is kept; None if there is none."""
        with self._lock:
            if (known := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
            return known

    def prepare(self, grammar: str, parts: Sequence[str]) -> None:
        """Try the parts in one other process, then compile the grammar.

        `verdict` and `compiled` return what was found. Takes seconds where a client wants it to.

        Args:
            grammar: Its text, as `sources.compose` returns it.
            parts: Grammars of clients that it has.

        Raises:
            ConfigError: If the library is not installed.
        """
        new = [one for one in dict.fromkeys(parts) if self.verdict(one) is None]
        if new:
            for one, why in zip(new, tried(new, _LIMITS), strict=False):
                self._keep(one, _explained(_first_line(why)) if why else "")
        if any(self.verdict(one) != "" for one in parts):
            return
        try:
            self.compile(grammar)
        except ConfigError as error:
            self._keep(grammar, str(error))

    def _keep(self, grammar: str, why: str) -> None:
        with self._lock:
            self._verdicts[_digest(grammar)] = why
            if len(self._verdicts) > MAX_TRIED:
                self._verdicts.popitem(last=False)

    def compile(self, grammar: str) -> Grammar:
        """Return a compiled grammar; takes up to some tenths of a second the first time.

        Args:
            grammar: Its text, as `sources.compose` returns it. Parts of clients were checked.

        Raises:
            ConfigError: If the grammar is invalid or uses what is not supported, the model has no
                tokenizer, or the library is not installed.
        """
        if (known := self.compiled(grammar)) is not None:
            return known
        with self._lock:
            tokenizer = self._ready()
        made = _compiled(tokenizer, grammar)
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > 1 and self._too_much():
                self._compiled.popitem(last=False)
        return made

    def __len__(self) -> int:
        """Return how many compiled grammars are kept."""
        return len(self._compiled)

    def _too_much(self) -> bool:
        return len(self._compiled) > MAX_GRAMMARS or sum(map(len, self._compiled)) > MAX_CACHED_TEXT

    def _ready(self) -> Any:
        """Return the tokenizer in the library's form; built once, in about a second."""
        if self._tokenizer is None:
            library = llguidance()
            if self._source is None:
                raise ConfigError("this model has no tokenizer, which structured output needs")
            wrapped = _wrapped(self._source, self._size, self._eos_ids)
            wrapped.library_form = self._tokenizer = library.LLTokenizer(
                library.TokenizerWrapper(wrapped), eos_token=wrapped.eos_token_ids, slices=[]
            )
        return self._tokenizer


def _digest(grammar: str) -> bytes:
    return sha256(grammar.encode("utf-8", "surrogatepass")).digest()


def _compiled(tokenizer: Any, grammar: str) -> Grammar:
    library = llguidance()
    limits = library.LLParserLimits(**_LIMITS)
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        mask = matcher.compute_bitmask()  # finds grammars that match nothing
        if not matcher.is_error() and any(mask):
            return Grammar(matcher)
    why = _first_line(matcher.get_error()) or "no text matches it"
    raise ConfigError(_explained(why))


def _explained(why: str) -> str:
    if why.startswith("Unimplemented keys:"):
        names = why.partition(":")[2].strip(' []"').replace('"', "")
        return f"the schema uses {names}, which structured output does not support; leave it out"
    if "schema too large" in why:
        return (
            "the schema is too large once its references and combinations are written out; use "
            "fewer of $ref, allOf, anyOf and oneOf within each other"
        )
    if "empty" in why or "NoExtension" in why:
        return f"no answer can match it: {why}"
    return why


def _first_line(message: str) -> str:
    return " ".join(message.split("<state>")[0].split("<non-verbose")[0].split())[:300]


class _Wrapped:
    """A tokenizer as the library expects one.

    The library tokenizes what a grammar forces, to see which token comes next. The model's own
    tokens are used where they spell the text exactly, which those of SentencePiece may not at its
    beginning; others are right too, but less likely.
    """

    def __init__(self, source: PreTrainedTokenizerBase, found: Vocabulary, eos_ids: Sequence[int]):
        self.tokens, self.special_token_ids = found.tokens, sorted(found.special)
        self.eos_token_id, self.eos_token_ids, self.bos_token_id = eos_ids[0], list(eos_ids), None
        self.library_form: Any = None
        self._encode = getattr(getattr(source, "backend_tokenizer", None), "encode", None)

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts only")
        if self.library_form is None:  # called while it is built
            return []
        return self._own(text) or self.library_form.greedy_tokenize(text)

    def _own(self, text: str) -> list[int] | None:
        if self._encode is None:
            return None
        try:
            ids = self._encode(text, add_special_tokens=False).ids
        except Exception:  # noqa: BLE001 - another thread has borrowed the tokenizer
            return None
        known = all(one < len(self.tokens) for one in ids)
        spelt = b"".join(self.tokens[one] for one in ids) if known else b""
        return ids if spelt == text.encode() else None


def _wrapped(source: PreTrainedTokenizerBase, size: int, eos_ids: Sequence[int]) -> _Wrapped:
    found = vocabulary(source, size)
    tokens, special = list(found.tokens), {*found.special, *eos_ids}
    if not eos_ids:  # the library needs one; its bit is beyond the logits
        eos_ids = [len(tokens)]
        tokens.append(b"")
        special.add(len(tokens) - 1)
    for token in special:  # a name of its own, since the library looks tokens up by their text
        tokens[token] = tokens[token] or b"<|unnamed_%d|>" % token
    return _Wrapped(source, Vocabulary(tokens=tokens, special=special), eos_ids)
