"""From the tokens of an answer to text that can be sent, as it comes.

Owns what is certain of a text whose last tokens may be half a character or the beginning of a stop
text. Knows nothing of requests or steps. (tokenizers' `DecodeStream` is not used: it gives up when
bytes are no UTF-8, which a model may well produce, and knows only one kind of tokenizer.)
"""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoders write for bytes that are no character
_PARTIAL = 3  # the most bytes that a character may lack its last one after
_PATIENCE = 16  # tokens to wait for text that goes on from what was given


class TextStream:
    """The text of one answer, token by token; special tokens have none.

    tokenizer: the model's. stop: texts that end the answer; the one that is complete first does,
    and nothing of it is given. after: tokens that the answer goes on from, whose text is not given;
    with some tokenizers a first word has a leading space only so.

    All that `push` and `finish` give is `tokenizer.decode` of all tokens up to the stop text,
    without a last character that is incomplete. Where tokens are no UTF-8 it has U+FFFD for them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Iterable[str] = (),
        *,
        after: Sequence[int] = (),
    ):
        self._tokenizer, self._stop = tokenizer, tuple(text for text in stop if text)
        self._special = special_ids(tokenizer)
        self._window = [token for token in after[-_PATIENCE:] if token not in self._special]
        self._clean = len(self._window)  # up to here the window's text has been given, whole
        self._given = self._decode(self._window)
        self._held = ""  # characters that may yet be part of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token; often empty, and always after a stop text."""
        if self.stopped or token in self._special:
            return ""
        self._window.append(token)
        return self._release(self._take())

    def finish(self) -> str:
        """What was held back, when no token comes any more."""
        if self.stopped:
            return ""
        text = self._decode(self._window)
        if not text.startswith(self._given):
            text, self._given = self._decode(self._window[self._clean :]), ""
        rest = _without_partial(text[len(self._given) :])
        self._given += rest
        released = self._release(rest)
        if not self.stopped:
            released, self._held = released + self._held, ""
        return released

    def _take(self) -> str:
        """New whole characters of the window.

        The window begins where characters do, one stretch before what is new, since some decoders
        treat the beginning of a text in a way of their own.
        """
        text = self._decode(self._window)
        if not text.startswith(self._given):
            # A decoder of single bytes that takes back a character while the next is incomplete.
            if len(self._window) - self._clean <= _PATIENCE:
                return ""
            self._window, self._clean, self._given = self._window[self._clean :], 0, ""
            text = self._decode(self._window)
        new = text[len(self._given) :]
        certain = _without_partial(new)
        self._given += certain
        if certain == new and (new or len(self._window) - self._clean > _PATIENCE):
            self._window = self._window[self._clean :]
            self._clean, self._given = len(self._window), self._decode(self._window)
        return certain

    def _release(self, new: str) -> str:
        """What of the held and the new characters cannot belong to a stop text."""
        text = self._held + new
        complete = [
            (text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text
        ]
        if complete:
            self.stopped, self._held = True, ""
            return text[: sum(min(complete))]
        keep = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence has one text"
        return text


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that `decode` leaves out when it skips special ones."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, added in added if added.special)


def _without_partial(text: str) -> str:
    """Without U+FFFD at the end that may be the beginning of a character.

    >>> _without_partial("a" + 5 * _BROKEN) == "a" + 2 * _BROKEN
    True
    """
    broken = len(text) - len(text.rstrip(_BROKEN))
    return text[: len(text) - min(broken, _PARTIAL)]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`.

    >>> _begun("one\\n", "\\n\\n")
    1
    """
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
