"""The errors that a user can cause.

    MoefitError
    ├── ConfigError            the request contradicts itself or names something unknown
    │   ├── RequestTooLargeError  a request that never fits in the context or its memory
    │   └── UnreachedTargetError  no plan has the loss or the speed that was asked for
    ├── DataError              the text cannot be read, or is too short
    ├── CheckpointError        a checkpoint is missing, damaged, unknown or cannot be written
    ├── BudgetTooSmallError    a memory budget below the model's minimum
    ├── UnsupportedModelError  the model is valid, but this operation does not support it
    ├── DeviceError            the device failed or has disappeared while a model is served
    ├── QueueFullError         the queue of waiting requests is full
    ├── RefusedError           the engine accepts no more requests
    ├── DivergenceError        the training loss is not finite
    ├── LostProcessError       another process of the same run ended or does not answer
    └── ElsewhereError         another process of the same run reports the error

Each message says what was given, why it is not possible, and the nearest thing that works. Broken
invariants of moefit itself are `assert`s instead.
"""

import re
import unicodedata

_LINK = r" For further information visit \S+"  # that pydantic adds to each error


def printable(text: str) -> str:
    r"""Return the text with control and formatting characters written as escapes.

    Names in a checkpoint may contain terminal escapes. Line feeds and tabs are not changed.

    >>> print(printable("model \x1b[2J"))
    model \x1b[2J
    """
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape").decode()


def in_brief(error: BaseException, limit: int = 300) -> str:
    """Return the error's class and message in one line of bounded length."""
    text = re.sub(_LINK, "", " ".join(str(error).split()))
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return f"{type(error).__name__}: {cut}" if cut else type(error).__name__


class MoefitError(Exception):
    """Base of all errors that a user can cause; the command line prints it without a traceback.

    Messages are safe to print: see `printable`.
    """

    def __init__(self, *values: object):
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in values))


class ConfigError(MoefitError, ValueError):
    """The request contradicts itself or names something unknown."""


class RequestTooLargeError(ConfigError):
    """Prompt and completion of one request have more tokens than can ever fit."""


class UnreachedTargetError(ConfigError):
    """No plan for the budget has the loss or the speed that was asked for."""


class DataError(MoefitError):
    """The text cannot be read, or is too short."""


class CheckpointError(MoefitError):
    """A checkpoint is missing, damaged, unknown, or cannot be written."""


class BudgetTooSmallError(MoefitError):
    """The memory budget is below the model's minimum, which the message names."""


class UnsupportedModelError(MoefitError):
    """The model is valid, but this operation does not support it."""


class DeviceError(MoefitError):
    """The device failed, or has disappeared, while a model is served on it."""


class QueueFullError(MoefitError):
    """The queue of waiting requests is full; a later retry may succeed."""


class RefusedError(MoefitError):
    """The engine is closing and accepts no more requests."""


class DivergenceError(MoefitError):
    """The training loss is not finite."""


class LostProcessError(MoefitError):
    """Another process of the same run ended or does not answer."""


class ElsewhereError(MoefitError):
    """Another process of the same run reports the error; this one ends without a message."""
