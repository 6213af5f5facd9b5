"""The errors that a user can cause.

    MoefitError
    ├── ConfigError            what was asked for contradicts itself or does not exist
    │   └── RequestTooLargeError  a request that the context or its memory can never hold
    ├── DataError              the text cannot be read, or is too little
    ├── CheckpointError        a checkpoint is missing, damaged, foreign or cannot be written
    ├── BudgetTooSmallError    a memory budget below the model's floor
    ├── UnsupportedModelError  the model is sound, but this operation cannot represent it
    ├── QueueFullError         as many requests wait as may
    ├── RefusedError           the engine takes no more requests
    └── DivergenceError        training reached a loss that is not a number

Each message says what was given, why it can't be, and the nearest thing that works. Broken
invariants of our own are `assert`s, not these.
"""

import unicodedata


def printable(text: str) -> str:
    r"""Return the text with control and formatting characters written as escapes.

    Names that come from a checkpoint may hold terminal escapes. Line feeds and tabs stay.

    >>> print(printable("model \x1b[2J"))
    model \x1b[2J
    """
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape").decode()


def in_brief(error: BaseException, limit: int = 300) -> str:
    """Return the error's class and message in one line of bounded length."""
    words = " ".join(str(error).split())
    cut = words if len(words) <= limit else f"{words[:limit]}..."
    return f"{type(error).__name__}: {cut}" if cut else type(error).__name__


class MoefitError(Exception):
    """Base of all errors that a user can cause; the command line prints it without a traceback.

    Messages are safe to print: see `printable`.
    """

    def __init__(self, *values: object):
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in values))


class ConfigError(MoefitError, ValueError):
    """What was asked for contradicts itself or does not exist."""


class RequestTooLargeError(ConfigError):
    """Prompt and answer of one request are more tokens than can ever be held."""


class DataError(MoefitError):
    """The text cannot be read, or there is too little of it."""


class CheckpointError(MoefitError):
    """A checkpoint is missing, damaged, foreign, or cannot be written."""


class BudgetTooSmallError(MoefitError):
    """The memory budget is below what the model can run in; the message names that floor."""


class UnsupportedModelError(MoefitError):
    """The model is sound, but this operation cannot represent it."""


class QueueFullError(MoefitError):
    """As many requests wait already as may; one that comes later may be taken."""


class RefusedError(MoefitError):
    """The engine is closing, and takes no more requests."""


class DivergenceError(MoefitError):
    """Training reached a loss that is not finite."""
