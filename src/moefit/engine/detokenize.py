"""Convert tokens to text incrementally.

Emits only text that is final: the last tokens may be part of a character or of a stop text.
tokenizers' `DecodeStream` is not used because it fails on invalid UTF-8, which models can generate,
and supports only one kind of tokenizer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # decoders write it for invalid UTF-8
_MAX_PARTIAL = 3  # bytes of an incomplete UTF-8 character at most
_MAX_PENDING = 16  # tokens to wait for a complete character


class IncrementalDetokenizer:
    """Detokenize one completion token by token; special tokens have no text.

    Without `visible` tokens, the results of `push` and `finish` add up to `tokenizer.decode` of all
    tokens up to the stop text, without an incomplete last character. Invalid UTF-8 becomes U+FFFD.

    Args:
        tokenizer: The model's tokenizer.
        stop: Texts that end the completion and are not emitted; the one that is complete first
            counts. A stop text that contains a special token's text, such as "<|im_end|>", is
            matched against all tokens, any other against the emitted text.
        after: Tokens before the completion, whose text is not emitted. Some tokenizers give the
            first word a leading space only with them.
        visible: Special tokens whose text is emitted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Iterable[str] = (),
        *,
        after: Sequence[int] = (),
        visible: Collection[int] = (),
    ):
        self._visible = visible
        self._tokenizer = tokenizer
        self._special = special_texts(tokenizer)
        self._matcher = _StopMatcher(stop, self._special.values())
        self._window = [token for token in after[-_MAX_PENDING:] if token not in self._special]
        self._complete = len(self._window)  # tokens of the window whose text was emitted completely
        self._emitted = self._decode(self._window)

    @property
    def stopped(self) -> bool:
        """Whether a stop text is complete."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """Return the text that becomes final; often empty, and always after a stop text."""
        if self.stopped:
            return ""
        if token in self._special:
            if token in self._visible:
                return self._show_special(self._special[token])
            return self._matcher.hide(self._special[token], self._pending_text)
        self._window.append(token)
        return self._matcher.show(self._next_text())

    def end(self, token: int) -> str:
        """Like `push`, for a token that ends the completion: only special tokens are read."""
        if token not in self._special or self.stopped:
            return ""
        return self._matcher.hide(self._special[token], self._pending_text)

    def finish(self) -> str:
        """Return the text held back, after the last token."""
        if self.stopped:
            return ""
        rest = self._pending_text()
        self._emitted += rest
        released = self._matcher.show(rest)
        return released if self.stopped else released + self._matcher.take()

    def _show_special(self, text: str) -> str:
        """Return the text before a special token and its own; text continues behind it."""
        shown = self._matcher.show(self._pending_text())
        kept = self._decode(self._window)
        if _without_partial(kept) != kept:  # an incomplete character is lost
            self._window, kept = [], ""
        self._complete, self._emitted = len(self._window), kept
        return shown + ("" if self.stopped else self._matcher.show(text))

    def _pending_text(self) -> str:
        """Return the text not emitted yet, without an incomplete last character."""
        text, given = self._decode(self._window), self._emitted
        if not text.startswith(given):
            text, given = self._decode(self._window[self._complete :]), ""
        return _without_partial(text[len(given) :])

    def _next_text(self) -> str:
        """Return new complete characters of the window.

        The window begins at a character boundary, one stretch before the new text, because some
        decoders treat the beginning of a text differently.
        """
        text = self._decode(self._window)
        if not text.startswith(self._emitted):
            # A byte-level decoder that withdraws a character while the next is incomplete.
            if len(self._window) - self._complete <= _MAX_PENDING:
                return ""
            self._window, self._complete, self._emitted = self._window[self._complete :], 0, ""
            text = self._decode(self._window)
        new = text[len(self._emitted) :]
        certain = _without_partial(new)
        self._emitted += certain
        if certain == new and (new or len(self._window) - self._complete > _MAX_PENDING):
            self._window = self._window[self._complete :]
            self._complete, self._emitted = len(self._window), self._decode(self._window)
        return certain

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def special_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the texts of the tokens that `decode` skips as special."""
    added = tokenizer.added_tokens_decoder.items()
    return {token: added.content for token, added in added if added.special}


class _StopMatcher:
    """Search for stop texts, holding back text that may be the beginning of one.

    The text of special tokens is hidden: it is never emitted and only matches stop texts that
    contain a special token's text.
    """

    def __init__(self, stop: Iterable[str], special: Collection[str]):
        stops = [text for text in stop if text]
        self._hidden = [text for text in stops if any(one and one in text for one in special)]
        self._shown = [text for text in stops if text not in self._hidden]
        self._text, self._marks = "", ""  # text held back; "s" marks shown, "h" hidden
        self.stopped = False

    def show(self, new: str) -> str:
        """Append text and return what cannot belong to a stop text."""
        self._text, self._marks = self._text + new, self._marks + "s" * len(new)
        return self._release()

    def hide(self, new: str, pending: Callable[[], str]) -> str:
        """Append a special token's text and return what cannot belong to a stop text.

        Args:
            new: The special token's text.
            pending: Returns the text of earlier tokens that is not final. It is emitted later
                unless a stop text is complete here.
        """
        if not self._hidden:
            return ""
        rest = pending()
        if rest and any(stop in self._text + rest + new for stop in self._hidden):
            self._text, self._marks = self._text + rest, self._marks + "s" * len(rest)
        self._text, self._marks = self._text + new, self._marks + "h" * len(new)
        return self._release()

    def take(self) -> str:
        """Return the text held back, which belongs to no stop text."""
        return self._cut(len(self._text))

    def _release(self) -> str:
        at = [place for place, mark in enumerate(self._marks) if mark == "s"]
        shown = "".join(self._text[place] for place in at)
        complete = [
            (self._text.find(stop) + len(stop), self._text.find(stop))
            for stop in self._hidden
            if stop in self._text
        ] + [
            (at[shown.find(stop) + len(stop) - 1] + 1, at[shown.find(stop)])
            for stop in self._shown
            if stop in shown
        ]
        if complete:  # the one that ends first, the longest of these
            self.stopped = True
            return self._cut(min(complete)[1])
        keep_from = [len(self._text) - _overlap(self._text, stop) for stop in self._hidden]
        places = [*at, len(self._text)]
        keep_from += [places[len(shown) - _overlap(shown, stop)] for stop in self._shown]
        return self._cut(min(keep_from, default=len(self._text)))

    def _cut(self, place: int) -> str:
        """Return the visible text before a position and hold back the remainder."""
        text = zip(self._text[:place], self._marks[:place], strict=True)
        self._text, self._marks = self._text[place:], self._marks[place:]
        return "".join(character for character, mark in text if mark == "s")


def _without_partial(text: str) -> str:
    """Remove U+FFFD at the end that may be the beginning of a character.

    >>> _without_partial("a" + 5 * _REPLACEMENT) == "a" + 2 * _REPLACEMENT
    True
    """
    broken = len(text) - len(text.rstrip(_REPLACEMENT))
    return text[: len(text) - min(broken, _MAX_PARTIAL)]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are a prefix of `stop`.

    >>> _overlap("one\\n", "\\n\\n")
    1
    """
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
