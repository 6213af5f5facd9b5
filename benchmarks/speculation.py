"""Measure how many drafted tokens are right, and tokens/s with and without them.

    python benchmarks/speculation.py reference [--tokens 160] [--count 6] [--save]
    python benchmarks/speculation.py FOLDER --accept 0.5,0.8,0.95 [--precision int4]
        [--memory 2.5GiB] [--replay TRACE.npz] [--save NAME]

Without `--accept`: prompt lookup on held-out modules of the standard library, by kind of prompt.
`edit`: a function and a request to write it again; `list`: a module and the beginning of its
`__all__`; `continue`: a module alone. Greedy and sampled.

With `--accept` acceptance is injected, for shapes whose weights are random: answers are fixed
random tokens, whatever the model says, and each drafted token is right with that probability.
`--replay` replaces the routers' choices by recorded ones (serving_speed.py), so that consecutive
tokens use related experts.

Arms take turns: `off`; `auto`, as served; `always`, which verifies all that is drafted, up to
`--always` tokens. Seconds are those from the first token to the last, of the median of `--rounds`
runs of an answer.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from time import perf_counter
from typing import Any

import record
import serving_speed
import torch

import moefit
from moefit.engine.api import EngineSettings, Event, FinishedEvent, SamplingParams, TokenEvent
from moefit.engine.engine import Engine
from moefit.engine.sampler import Sampler
from moefit.engine.speculation.drafts import (
    Draft,
    DraftedRequest,
    Drafter,
    LookupDrafter,
    SpeculationStats,
)
from moefit.serve.model import ServedModel

ARMS = ("off", "auto", "always")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--accept", help="probabilities that a drafted token is right")
    parser.add_argument("--memory")
    parser.add_argument("--precision", default="native")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--tokens", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt, if injected")
    parser.add_argument("--requests", type=int, default=1, help="that run at once")
    parser.add_argument("--count", type=int, default=6, help="prompts of a kind")
    parser.add_argument("--always", type=int, default=4)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--temperatures", default="0,0.7")
    parser.add_argument("--save", nargs="?", const="")
    given = parser.parse_args()
    settings = {
        "memory": given.memory, "precision": given.precision, "dense_precision": given.precision,
        "context": given.context, "dtype": getattr(torch, given.dtype), "sequences": 40,
    }  # fmt: skip
    with moefit.load(given.model, **settings) as served:
        if given.replay:
            serving_speed.replay(served, given.replay)
        results = injected(served, given) if given.accept else texts(served, given)
        results["hit rate"] = round(served.report()["hit_rate"], 4)
        results["peak bytes"] = served.report()["peak_process_bytes"]
    print(json.dumps(results, indent=1))
    if given.save is not None:
        kind = "acceptance injected" if given.accept else "prompt lookup, trained model"
        routing = "recorded routing" if given.replay else "the model's own routing"
        print(record.write("speculation", results, notes=f"{kind}; {routing}", suffix=given.save))


def texts(served: ServedModel, given: argparse.Namespace) -> dict[str, Any]:
    """Return acceptance and speed by kind of prompt, on a trained model."""
    found: dict[str, Any] = {}
    with engines_of(served, given, LookupDrafter) as engines:
        for kind, prompts in prompts_of(served, given.count).items():
            for temperature in map(float, given.temperatures.split(",")):
                runs: dict[str, list[dict[str, Any]]] = {}
                for number, prompt in enumerate(prompts):
                    sampling = SamplingParams(
                        max_tokens=given.tokens,
                        temperature=temperature,
                        seed=number,
                        ignore_eos=True,
                    )
                    answers, repeated = set(), dict[str, list[dict[str, Any]]]()
                    for again in range(given.rounds):
                        for arm in turn(engines, number + again):
                            run = answered(engines[arm], [prompt], sampling)
                            answers.add(tuple(run.pop("tokens")[0]))
                            repeated.setdefault(arm, []).append(run)
                    for arm, ones in repeated.items():
                        runs.setdefault(arm, []).append(median_of(ones))
                    assert len(answers) == 1, "answers are the same in all arms"
                    share = len(set(answers.pop())) / given.tokens
                    runs.setdefault("different", []).append({"share": share})
                found[f"{kind}, temperature {temperature}"] = summary(runs)
                print(kind, temperature, json.dumps(summary(runs)), file=sys.stderr, flush=True)
    return found


def median_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run whose seconds are the median of those of the same answer."""
    return sorted(runs, key=lambda one: one["seconds"])[len(runs) // 2]


def injected(served: ServedModel, given: argparse.Namespace) -> dict[str, Any]:
    """Return speed by acceptance, where a drafted token is right with that probability."""
    vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
    chance, found = random.Random(0), dict[str, Any]()

    def tokens(number: int) -> list[int]:
        return [chance.randrange(vocabulary) for _ in range(number)]

    known = Known(given.prompt)
    sampling = SamplingParams(max_tokens=given.tokens, temperature=0.0, ignore_eos=True)
    for accept in map(float, given.accept.split(",")):
        runs: dict[str, list[dict[str, Any]]] = {}
        with engines_of(served, given, lambda: known) as engines:
            for number in range(-1, given.rounds):  # the first round warms up
                prompts = [tokens(given.prompt) for _ in range(given.requests)]
                answers = [tokens(given.tokens) for _ in prompts]
                known.learn(prompts, answers, accept)
                for arm in turn(engines, number):
                    run = answered(engines[arm], prompts, sampling, answers)
                    assert run.pop("tokens") == answers
                    if number >= 0:
                        runs.setdefault(arm, []).append(run)
        found[f"acceptance {accept} (injected)"] = summary(runs)
    return found


def turn(engines: Mapping[str, Engine], number: int) -> Sequence[str]:
    """Return the arms in the order of a round."""
    return list(engines) if number % 2 == 0 else list(engines)[::-1]


class Known:
    """Drafts the tokens of known answers, each right with a given probability."""

    name = "known answers"
    computes = False

    def __init__(self, size: int):
        self._size, self._accept, self._chance = size, 0.0, random.Random(1)
        self._answers: dict[tuple[int, ...], Sequence[int]] = {}

    def learn(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], accept: float
    ) -> None:
        """Draft these answers from now on, with this probability for each token."""
        self._answers = {tuple(one): a for one, a in zip(prompts, answers, strict=True)}
        self._accept = accept

    def open(self, request: str, about: DraftedRequest) -> None:
        """Do nothing."""

    def close(self, request: str) -> None:
        """Do nothing."""

    def behind(self, request: str, tokens: int) -> int:
        """Return 0."""
        del request, tokens
        return 0

    def draft(self, wanted: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Draft]:
        """Return what follows, with wrong tokens in it."""
        found = {}
        for name, (tokens, most) in wanted.items():
            answer, done = self._answers[tuple(tokens[: self._size])], len(tokens) - self._size
            following = answer[done : done + most]
            guesses = tuple(
                token if self._chance.random() < self._accept else (token + 1) % 999
                for token in following
            )
            if guesses:
                found[name] = Draft(tokens=guesses, evidence=99)  # the same class at all places
        return found


class Played(Sampler):
    """Returns the tokens of a fixed answer, whatever the logits are."""

    def __init__(self, sampling: SamplingParams, answer: Sequence[int]):
        super().__init__(sampling)
        self._answer = iter(answer)

    @property
    def plain(self) -> bool:
        """False: `choose` returns the answer's tokens."""
        return False

    def choose(self, logits_V: torch.Tensor) -> tuple[int, None]:
        """Return the next token, after the work that greedy sampling takes."""
        logits_V.argmax()
        return next(self._answer), None


@contextmanager
def engines_of(
    served: ServedModel, given: argparse.Namespace, drafter: Callable[[], Drafter]
) -> Iterator[dict[str, Engine]]:
    """Engines without kept prefixes that verify drafts as their arms say; one works at a time."""
    settings = EngineSettings(prefix_cache="off", max_concurrency=given.requests)
    engines = {
        arm: Engine(served, settings, drafter=None if arm == "off" else drafter())
        for arm in given.arms.split(",")
    }
    if "always" in engines:
        engines["always"].speculation.choose = _always(given.always)
    for one in engines.values():
        one.start()
    try:
        yield engines
    finally:
        for one in engines.values():
            one.close()


def _always(length: int) -> Any:
    """Return a rule that verifies drafts up to this length."""

    def choose(chances: Mapping[str, Sequence[float]], **_: Any) -> dict[str, int]:
        return {name: min(length, len(one)) for name, one in chances.items()}

    return choose


def answered(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    answers: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Run requests together; return their tokens, seconds of decoding, and what was drafted."""
    heard = [_Heard() for _ in prompts]

    def submit() -> None:  # between steps, so that no request begins without its sampler
        names = [
            engine.submit(prompt, sampling, one) for prompt, one in zip(prompts, heard, strict=True)
        ]
        for name, answer in zip(names, answers, strict=False):
            engine._requests[name].sampler = Played(sampling, answer)

    before, began = engine.served.report(), engine.stats()
    engine.between_steps(submit)
    for one in heard:
        assert one.done.wait(3600)
    after, stats = engine.served.report(), engine.stats()
    first, last = began.speculation or SpeculationStats(), stats.speculation or SpeculationStats()
    seconds = max(one.times[-1] for one in heard) - max(one.times[0] for one in heard)
    return {
        "tokens": [one.tokens for one in heard],
        "seconds": seconds,
        "made": sum(len(one.times) - 1 for one in heard),
        "steps": stats.steps - began.steps,
        "fetches": after["fetches"] - before["fetches"],
        "bytes": after["bytes_read"] - before["bytes_read"],
        "drafts": last.drafts - first.drafts,
        "drafted": last.drafted - first.drafted,
        "accepted": last.accepted - first.accepted,
        "plain steps": last.plain_steps - first.plain_steps,
    }


class _Heard:
    """A listener that keeps the tokens of a request and their times."""

    def __init__(self):
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.done = Flag()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token)
            self.times.append(perf_counter())
        elif isinstance(event, FinishedEvent):
            self.done.set()


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return speeds, and what was drafted, by arm."""
    found: dict[str, Any] = {}
    for arm, ones in runs.items():
        if arm == "different":
            shares = [one["share"] for one in ones]
            found["different tokens / tokens"] = round(statistics.median(shares), 3)
            continue
        total = {name: sum(one[name] for one in ones) for name in ones[0]}
        found[arm] = {
            "tokens per second": round(total["made"] / total["seconds"], 2),
            "fetched experts per token": round(total["fetches"] / total["made"], 2),
            "MiB read per token": round(total["bytes"] / total["made"] / 2**20, 2),
        }
        if arm != "off":
            found[arm] |= {
                "accepted / drafted": round(total["accepted"] / max(1, total["drafted"]), 3),
                "tokens a draft": round(1 + total["accepted"] / max(1, total["drafts"]), 2),
                "verifying steps": total["drafts"],
                "steps that could have": total["plain steps"],
            }  # fmt: skip
            speeds = [
                off["seconds"] / one["seconds"] for off, one in zip(runs["off"], ones, strict=True)
            ]
            found[arm]["speed / off"] = round(statistics.median(speeds), 3)
            found[arm]["speed / off, each"] = [round(one, 2) for one in speeds]
    return found


def prompts_of(served: ServedModel, count: int) -> dict[str, list[list[int]]]:
    """Return prompts by kind, from held-out modules of the standard library."""
    from moefit.train.config import DataConfig
    from moefit.train.data.split import split

    kinds: dict[str, list[list[int]]] = {"edit": [], "list": [], "continue": []}
    for document in split(DataConfig()).held_out():
        functions = [one for one in functions_of(document.text) if 300 < len(one) < 1000]
        if not functions:
            continue
        function, head = functions[0], functions[0].splitlines(keepends=True)[0]
        edit = f"{function}\n\n# The same function with a comment more.\n\n{head}"
        listed = f"{document.text[:1500]}\n\n\n__all__ = ["
        for kind, text in (("edit", edit), ("list", listed), ("continue", document.text[:1500])):
            kinds[kind].append(served.tokenizer(text)["input_ids"])
        if len(kinds["edit"]) == count:
            break
    return kinds


def functions_of(text: str) -> list[str]:
    """Return the functions of a module at its outermost level."""
    parts = ("\n" + text).split("\ndef ")[1:]
    found = []
    for part in parts:
        lines = part.splitlines(keepends=True)
        body = [n for n, line in enumerate(lines[1:], 1) if line.strip() and not line[0].isspace()]
        found.append("def " + "".join(lines[: body[0] if body else len(lines)]).rstrip() + "\n")
    return found


if __name__ == "__main__":
    main()
