"""Which experts the layers of each step want: recorded routing, or random routing of a given skew.

A step is a prompt's tokens, or one token of each of several sequences. A recording is an .npz file
with `experts` [tokens, layers, K] and, for several sequences, `seq_ptr` [sequences + 1].

Shapes: T tokens, L layers, K chosen per token, E experts.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moefit.errors import ConfigError, in_brief
from moefit.simulate.costs import ExpertShape

Ids = NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is computed.

    Attributes:
        batch: Sequences that decode together, each with a token per step.
        prompt: Tokens of a prompt per step instead, 0 for decoding.
        steps: Most steps.
    """

    batch: int = 1
    prompt: int = 0
    steps: int = 64

    def check(self) -> None:
        """Raise ConfigError if a number is out of range."""
        for name, value in (("batch", self.batch), ("steps", self.steps)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; give 1 or more")
        if self.prompt < 0:
            raise ConfigError(f"prompt is {self.prompt}; give a number of tokens, 0 for decoding")


def read_recording(path: Path, shape: ExpertShape) -> list[Ids]:
    """Return the recorded sequences, ids_TLK each.

    Raises:
        ConfigError: The file is no recording, of a model of another shape, or names an expert twice
            for one token.
    """
    arrays = _arrays(path)
    if "experts" not in arrays:
        raise _not_recorded(path, f"it has {', '.join(arrays) or 'no arrays'}")
    experts = arrays["experts"]
    if experts.ndim != 3 or not np.issubdtype(experts.dtype, np.integer) or not experts.size:
        raise _not_recorded(path, f"`experts` is {experts.dtype} of shape {experts.shape}")
    least, most = int(experts.min()), int(experts.max())
    if experts.shape[1:] != (shape.layers, shape.chosen) or least < 0 or most >= shape.experts:
        raise ConfigError(
            f"{path} has {experts.shape[1]} layers, {experts.shape[2]} experts per token and "
            f"experts {least} to {most}; {shape.name} has {shape.layers}, {shape.chosen} and "
            f"{shape.experts} experts from 0: give the --shape of the recorded model"
        )
    _check_distinct(path, experts)
    ends = arrays.get("seq_ptr", np.array([0, len(experts)]))
    if (
        ends.ndim != 1
        or not np.issubdtype(ends.dtype, np.integer)
        or len(ends) < 2
        or ends[0]
        or ends[-1] != len(experts)
        or (np.diff(ends.astype(np.int64)) < 0).any()
    ):
        raise ConfigError(
            f"`seq_ptr` in {path} does not divide its {len(experts)} tokens; give the first token "
            "of each sequence, ascending from 0, and the number of tokens at the end"
        )
    return [experts[a:b] for a, b in pairwise(ends.tolist()) if b > a]


def _check_distinct(path: Path, experts: Ids) -> None:
    """Raise ConfigError if a token has an expert twice, which would be counted as two."""
    sorted_TLK = np.sort(experts, axis=2)
    twice_TL = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(2)
    if twice_TL.any():
        token, layer = (int(one) for one in np.argwhere(twice_TL)[0])
        raise ConfigError(
            f"{path} has experts {experts[token, layer].tolist()} for token {token} in layer "
            f"{layer}: one of them twice, but a router chooses an expert once "
            f"({int(twice_TL.sum())} of {twice_TL.size} choices are like this); record the routing "
            "again, such as with moefit profile MODEL --text FILE --routing FILE.npz"
        )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file. Raises ConfigError if it is not one."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise _not_recorded(path, in_brief(error)) from error


def _not_recorded(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{path} is not a recorded routing: {reason}; give an .npz file with an array `experts` "
        "of integers [tokens, layers, experts per token]"
    )


def random_routing(shape: ExpertShape, skew: float, tokens: int, seed: int = 0) -> Ids:
    """Return ids_TLK of random routing, in which expert n of a layer is as likely as n^-skew.

    Args:
        shape: Of the model.
        skew: 0 for equal shares; about 1 for the skew of natural text in large layers.
        tokens: T.
        seed: Of the random numbers.
    """
    generator = np.random.default_rng(seed)
    log_E = -skew * np.log(np.arange(1, shape.experts + 1))  # shares themselves may be too small
    # The K largest of log-weights with Gumbel noise are a sample without replacement.
    noise = generator.gumbel(size=(tokens, shape.layers, shape.experts))
    order_LE = np.argsort(generator.random((shape.layers, shape.experts)), axis=1)
    scores = log_E[order_LE][None] + noise
    return np.argpartition(scores, -shape.chosen, axis=2)[:, :, -shape.chosen :]


def steps_of(sequences: Sequence[Ids], workload: Workload) -> Iterator[Ids]:
    """Yield the ids_TLK of each step.

    Decoding begins with `batch` sequences at their first tokens; a sequence that ends is followed
    by the next one, and the last steps have fewer.

    Raises:
        ConfigError: No sequence is long enough for a prompt.
    """
    if workload.prompt:
        whole = [one[: workload.prompt] for one in sequences if len(one) >= workload.prompt]
        if not whole:
            longest = max(map(len, sequences))
            raise ConfigError(
                f"no recorded sequence has {workload.prompt} tokens; give --prompt {longest} or "
                "less"
            )
        yield from whole[: workload.steps]
        return
    waiting, running = list(sequences)[::-1], list[Iterator[Ids]]()
    for _ in range(workload.steps):
        tokens = []
        while waiting and len(running) < workload.batch:
            running.append(iter(waiting.pop()))
        for one in list(running):
            token = next(one, None)
            while token is None and waiting:
                running[running.index(one)] = one = iter(waiting.pop())
                token = next(one, None)
            if token is None:
                running.remove(one)
            else:
                tokens.append(token)
        if not tokens:
            return
        yield np.stack(tokens)


def demand(ids_TK: Ids) -> dict[int, int]:
    """Return how many tokens want each expert of a layer.

    >>> demand(np.array([[3, 1], [3, 2]]))
    {1: 1, 2: 1, 3: 2}
    """
    experts, counts = np.unique(ids_TK, return_counts=True)
    return dict(zip(experts.tolist(), counts.tolist(), strict=True))
