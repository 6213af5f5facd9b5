"""Helpers for tests of the engine: a served model, requests and recorded events."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from typing import Any

import torch
from tiny_families import token_ids
from tiny_served import tokens
from torch import Tensor

from moefit.engine.api import (
    EngineSettings,
    Event,
    FinishedEvent,
    PromptEvent,
    SamplingParams,
    TokenEvent,
)
from moefit.engine.engine import Engine
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

torch.set_num_threads(1)

LENGTHS = (5, 13, 1, 20, 9, 3, 16)


class Heard:
    """A listener that records events. `at` is called with each event in the engine's thread."""

    def __init__(self, at: Callable[[Event], None] | None = None):
        self.events: list[Event] = []
        self._at, self._done = at, Flag()

    def __call__(self, event: Event) -> None:
        assert not self._done.is_set(), "nothing comes after the last event"
        self.events.append(event)
        if self._at is not None:
            self._at(event)
        if isinstance(event, FinishedEvent):
            self._done.set()

    def wait(self) -> "Heard":
        assert self._done.wait(60), "the request did not end"
        return self

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, TokenEvent)]

    @property
    def end(self) -> FinishedEvent:
        last = self.wait().events[-1]
        assert isinstance(last, FinishedEvent)
        return last

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, TokenEvent | FinishedEvent))

    @property
    def prompt(self) -> PromptEvent:
        (prompt,) = [event for event in self.events if isinstance(event, PromptEvent)]
        return prompt


@contextmanager
def engine_of(
    folder: Path, *, slots: int | None = 2, context: int = 128, **settings: Any
) -> Iterator[Engine]:
    """A started engine over a model with `slots` per block; None is without a budget."""
    with load_model(folder, LoadSettings(context=context)) as served:
        if slots is not None:
            counts = [min(slots, experts.num_experts) for experts in served.blocks.values()]
            served.set_memory(served.budget.total_for_slots(counts))
        with running(served, **settings) as engine:
            yield engine
        served.check()


@contextmanager
def running(served: ServedModel, **settings: Any) -> Iterator[Engine]:
    engine = Engine(served, EngineSettings(**settings))
    engine.start()
    try:
        yield engine
        engine.check()
    finally:
        engine.close()


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [tokens(length, seed=length).tolist() for length in lengths]


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)


def generated(served: ServedModel, prompt: Sequence[int], max_tokens: int = 8) -> list[int]:
    """Return the model's own greedy output."""
    made = served.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    skip = 1 if served.model.config.is_encoder_decoder else len(prompt)
    return made[0, skip:].tolist()


def ask(engine: Engine, prompt: Sequence[int], sampling: SamplingParams) -> Heard:
    heard = Heard()
    engine.submit(prompt, sampling, heard)
    return heard


@contextmanager
def paused(engine: Engine) -> Iterator[Flag]:
    """Block the engine's thread within a step until the flag is set."""
    waits, go = Flag(), Flag()

    def hold(_event: Event) -> None:
        waits.set()
        assert go.wait(30), "nobody let the engine go on"

    engine.submit([3], greedy(1), hold)
    assert waits.wait(30)
    try:
        yield go
    finally:
        go.set()


def check_crowd(engine: Engine, lengths: Sequence[int] = LENGTHS, max_tokens: int = 8) -> None:
    """Compare requests that arrive while others run with the model's own outputs."""
    expected = [generated(engine.served, prompt, max_tokens) for prompt in prompts(lengths)]
    heard = []
    with paused(engine) as go:
        for prompt in prompts(lengths[:-2]):
            heard.append(ask(engine, prompt, greedy(max_tokens)))
        go.set()
        heard[0].wait()
        for prompt in prompts(lengths[-2:]):
            heard.append(ask(engine, prompt, greedy(max_tokens)))
        assert {one.end.reason for one in heard} <= {"length", "stop"}, heard[0].end
    for one, tokens_of_one in zip(heard, expected, strict=True):
        assert one.tokens == tokens_of_one


def text(length: int) -> list[int]:
    """Return token ids of the tiny models."""
    return token_ids(length, seed=length).clamp(max=60).tolist()


def scored(engine: Engine, tokens: Sequence[int]) -> Heard:
    """Ask for a greedy answer with all log-probabilities."""
    return ask(engine, tokens, greedy(6, prompt_logprobs=0, logprobs=0))


def logprobs(heard: Heard) -> Tensor:
    """Log probabilities of the prompt's tokens and of the answer's."""
    known = heard.wait().prompt.logprobs
    assert known is not None
    prompt = [one.logprob for one in known if one is not None]
    answer = [one.logprob for one in heard.events if isinstance(one, TokenEvent)]
    numbers = prompt + [one.logprob for one in answer if one is not None]
    return torch.tensor(numbers, dtype=torch.float64)
