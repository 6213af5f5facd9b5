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


class MoefitError(Exception):
    """Base of all errors that a user can cause; the command line prints it without a traceback."""


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
