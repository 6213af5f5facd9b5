"""From the tokens of an answer to text that can be sent, as it comes.

Owns what is certain of a text whose last tokens may be half a character or the beginning of a stop
text. Knows nothing of requests or steps. (tokenizers' `DecodeStream` is not used: it gives up when
bytes are no UTF-8, which a model may well produce, and knows only one kind of tokenizer.)
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoders write for bytes that are no character
_PARTIAL = 3  # the most bytes that a character may lack its last one after
_PATIENCE = 16  # tokens to wait for text that goes on from what was given


class IncrementalDetokenizer:
    """The text of one answer, token by token; special tokens have none.

    tokenizer: the model's. stop: texts that end the answer; the one that is complete first does,
    and nothing of it is given. A stop text that contains a special token's text, as "<|im_end|>",
    is looked for among all tokens; every other one among the text that is given. after: tokens that
    the answer goes on from, whose text is not given; with some tokenizers a first word has a
    leading space only so.

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
        self._tokenizer = tokenizer
        self._special = special_texts(tokenizer)
        self._stops = _Stops(stop, self._special.values())
        self._window = [token for token in after[-_PATIENCE:] if token not in self._special]
        self._clean = len(self._window)  # up to here the window's text has been given, whole
        self._given = self._decode(self._window)

    @property
    def stopped(self) -> bool:
        """Whether a stop text is complete."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text that is certain with this token; often empty, and always after a stop text."""
        if self.stopped:
            return ""
        if token in self._special:
            return self._stops.hide(self._special[token], self._rest)
        self._window.append(token)
        return self._stops.show(self._take())

    def end(self, token: int) -> str:
        """As `push` for a token that ends the answer: none but a special one is read."""
        return self.push(token) if token in self._special else ""

    def finish(self) -> str:
        """What was held back, when no token comes any more."""
        if self.stopped:
            return ""
        rest = self._rest()
        self._given += rest
        released = self._stops.show(rest)
        return released if self.stopped else released + self._stops.take()

    def _rest(self) -> str:
        """The text of tokens that has not been given, without an incomplete last character."""
        text, given = self._decode(self._window), self._given
        if not text.startswith(given):
            text, given = self._decode(self._window[self._clean :]), ""
        return _without_partial(text[len(given) :])

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

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence has one text"
        return text


def special_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that `decode` leaves out when it skips special ones, and what they say."""
    added = tokenizer.added_tokens_decoder.items()
    return {token: added.content for token, added in added if added.special}


class _Stops:
    """Looks for stop texts, and holds back what may be the beginning of one.

    What special tokens say is hidden: it is never given, and counts only for stop texts that
    contain a special token's text.
    """

    def __init__(self, stop: Iterable[str], special: Collection[str]):
        stops = [text for text in stop if text]
        self._hidden = [text for text in stops if any(one and one in text for one in special)]
        self._shown = [text for text in stops if text not in self._hidden]
        self._text, self._marks = "", ""  # what is held; "s" for each character that is shown
        self.stopped = False

    def show(self, new: str) -> str:
        """What of the held and these new characters cannot belong to a stop text."""
        self._text, self._marks = self._text + new, self._marks + "s" * len(new)
        return self._release()

    def hide(self, new: str, pending: Callable[[], str]) -> str:
        """As `show`, for a special token's text.

        pending: gives the text of tokens before it that is not certain yet. It comes later, unless
        the answer ends here.
        """
        if not self._hidden:
            return ""
        rest = pending()
        if rest and any(stop in self._text + rest + new for stop in self._hidden):
            self._text, self._marks = self._text + rest, self._marks + "s" * len(rest)
        self._text, self._marks = self._text + new, self._marks + "h" * len(new)
        return self._release()

    def take(self) -> str:
        """What was held back, of which no stop text came."""
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
        if complete:  # the one that ends first, and of these the longest
            self.stopped = True
            return self._cut(min(complete)[1])
        begun = [len(self._text) - _begun(self._text, stop) for stop in self._hidden]
        places = [*at, len(self._text)]
        begun += [places[len(shown) - _begun(shown, stop)] for stop in self._shown]
        return self._cut(min(begun, default=len(self._text)))

    def _cut(self, place: int) -> str:
        """Give what is shown before a place, and hold the rest."""
        text = zip(self._text[:place], self._marks[:place], strict=True)
        self._text, self._marks = self._text[place:], self._marks[place:]
        return "".join(character for character, mark in text if mark == "s")


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
