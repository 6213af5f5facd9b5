"""Measure what reading predicted experts early gains, off, by prediction and by an oracle.

    python benchmarks/prefetching.py FOLDER --memory 2.47GiB,1.37GiB --rates 0.4GB,1GB,2GB,none
        [--precision int8] [--replay TRACE.npz --found 0.3 --right 0.8] [--save NAME]
        [--probes-found 0.6 --probes-right 0.8] [--slots N,M] [--new-tokens 32] [--warm-up 24]
        [--arms off,guess,guess@2,probes,oracle,auto] [--rounds 1] [--add]

One model is loaded per budget (`--memory`), or once and given so many slots per layer (`--slots`).
Each arm decodes the same tokens, beginning with empty slots: `off`; `guess`, which always
prefetches; `probes`, the same with probes from `moefit pack --probes`; `oracle`, the same with the
router's own choice as the guess; `auto`, which measures, with probes if there are any, and decodes
as many tokens before the others as its decision takes. ARM@N looks N layers ahead instead of one.

With `--replay` routers choose what a recording chose (serving_speed.py), and guesses are drawn: of
the experts that a router will choose they name those in memory, the missing ones with probability
`--found` (for `probes` `--probes-found`), and so many wrong ones that a share `--right` of the
named missing ones is right, as measured by benchmarks/prediction.py on trained models. Both may be
given by distance, such as 0.57,0.52,0.48,0.42. What is found from far is found from near too.
Without `--replay`, `guess` is the next router, on a text (`--text`). `--add` keeps what the record
of the same name and day has of other settings.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console
from rich.table import Table
from serving_speed import SEED, replay
from slow_storage import limited_to
from torch import Tensor

import moefit
from moefit.evaluate.decoding import Decoding
from moefit.evaluate.passage import read_text
from moefit.serve.model import ServedModel
from moefit.serve.prediction.guesses import TRIAL_STEPS
from moefit.serve.prediction.prefetch import Prefetcher, Trial
from moefit.serve.prediction.probes import Probes


class Drawn:
    """Guesses of a recorded choice: right ones with given probabilities, wrong ones for the rest.

    Args:
        served: The model, whose routers replay a recording.
        replayed: The recorded choices of each layer.
        found: Probability of naming a chosen expert that is missing, by distance.
        right: Share of the named missing experts that are chosen, by distance.
    """

    def __init__(
        self,
        served: ServedModel,
        replayed: list[Any],
        found: Sequence[float],
        right: Sequence[float],
    ):
        self._blocks, self._replayed = list(served.blocks.values()), replayed
        self._found, self._right = found, right

    def restart(self) -> None:
        """Replay the recording from its beginning."""
        for one in self._replayed:
            one.restart()

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor:
        experts = self._blocks[block + ahead]
        chosen = self._replayed[block + ahead].coming(len(x_TD))
        scores_TE = torch.full((len(x_TD), experts.num_experts), -1.0)
        here = {*experts.slot_table.residents, *experts.slot_table.filling}
        used = here | set(chosen.flatten().tolist())
        others = sorted(set(range(experts.num_experts)) - used)
        found = self._found[min(ahead, len(self._found)) - 1]
        right = self._right[min(ahead, len(self._right)) - 1]
        for row, ids in enumerate(chosen.tolist()):
            # The same draws from every distance, as errors of predictors are alike.
            draw = random.Random(f"{SEED} {block + ahead} {self._replayed[block + ahead].position}")
            drawn = {one: draw.random() for one in ids}
            held = [one for one in ids if one in here]
            missing = [one for one in ids if one not in here and drawn[one] < found]
            wrong = sum(draw.random() < (1 - right) / right for _ in missing)
            wrong = min(wrong, len(ids) - len(held) - len(missing), len(others))
            scores_TE[row, held + missing + draw.sample(others, wrong)] = 1.0
        return scores_TE


class Recorded:
    """The choices of an earlier run over the same tokens, as an oracle.

    Args:
        choices: Expert ids by layer and step.
        num_experts: Of each layer.

    Attributes:
        at: The present step.
        watcher: What prefetches, which is told the number of chosen experts too.
    """

    watcher: Prefetcher

    def __init__(self, choices: list[list[list[int]]], num_experts: int):
        self._choices, self._num_experts = choices, num_experts
        self.at = 0

    def scores(self, block: int, ahead: int, x_TD: Tensor) -> Tensor:
        scores_TE = torch.full((len(x_TD), self._num_experts), -1.0)
        chosen = self._choices[block + ahead][self.at]
        self.watcher._states[block + ahead].chosen = len(chosen)
        scores_TE[0, chosen] = 1.0
        return scores_TE


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for memory in arguments.memory.split(","):
        how = {"memory": memory, "context": 256, "precision": arguments.precision}
        how |= {"prefetch": "on", "dense_precision": arguments.precision}
        with moefit.load(arguments.folder, **how) as served:
            layers = len(served.blocks)
            about = served.prefetching.probes.as_dict()
            arguments.probes_text = about and f"{about['tokens']:,} tokens of {about['text']}"
            for slots in [int(one) for one in arguments.slots.split(",") if one] or [0]:
                if slots:
                    served.set_memory(served.budget.total_for_slots([slots] * layers))
                for rate in arguments.rates.split(","):
                    with limited_to(None if rate == "none" else rate):
                        name = f"{f'{slots} slots' if slots else memory}, {rate}/s"
                        results[name] = measured(served, arguments)
                        print(name, json.dumps(results[name]), flush=True)
                        if arguments.save:
                            print(save(results, arguments))
    Console().print(table(results))


def save(results: dict[str, Any], arguments: argparse.Namespace) -> Path:
    drawn = f"; drawn guesses find {arguments.found} of the missing, {arguments.right} are right"
    drawn += f"; those of probes {arguments.probes_found} and {arguments.probes_right}"
    if arguments.add:
        old = record.RESULTS / f"prefetching-{arguments.save}-{date.today().isoformat()}.json"
        known = json.loads(old.read_text())["results"] if old.is_file() else {}
        results = known | results
    notes = "all arms decode the same tokens from empty slots" + (drawn if arguments.replay else "")
    if arguments.probes_text:
        notes += f"; probes fitted on {arguments.probes_text}"
    return record.write("prefetching", results, notes=notes, suffix=arguments.save)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--slots", default="")
    parser.add_argument("--rates", default="none")
    parser.add_argument("--precision", default="native")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--found", type=numbers, default=[0.3])
    parser.add_argument("--right", type=numbers, default=[0.8])
    parser.add_argument("--probes-found", type=numbers, default=[0.6])
    parser.add_argument("--probes-right", type=numbers, default=[0.8])
    parser.add_argument("--arms", default="off,guess,oracle,auto")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--add", action="store_true")
    return parser.parse_args()


def numbers(given: str) -> list[float]:
    return [float(one) for one in given.split(",")]


def measured(served: ServedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return tokens/s and counters of each arm, and speeds relative to `off`."""
    replayed = replay(served, arguments.replay) if arguments.replay else []
    tokens = max(arguments.warm_up + arguments.new_tokens, TRIAL_STEPS)
    if arguments.replay:
        vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(SEED)
        ids_T = torch.randint(0, vocabulary, (tokens + 1,), generator=generator)
    else:
        ids_T = read_text(arguments.text, served.tokenizer, 256, None).ids_T[: tokens + 1]
    rounds: dict[str, list[dict[str, Any]]] = {}
    choices = [] if replayed else choices_of(served, ids_T)
    if replayed:  # once before, so that the files are in the page cache for the first arm too
        one_arm(served, "off", None, ids_T, arguments)
    for _ in range(arguments.rounds):
        for arm in arguments.arms.split(","):
            for one in replayed:
                one.restart()
            predictor = predictor_of(arm, served, replayed, choices, arguments)
            rounds.setdefault(arm, []).append(one_arm(served, arm, predictor, ids_T, arguments))
    for one in replayed:
        one.remove()
    results = {
        arm: found[-1] | {"tokens_per_second": statistics.median(speeds), "rounds": speeds}
        for arm, found in rounds.items()
        for speeds in [[one["tokens_per_second"] for one in found]]
    }
    off = results["off"]["tokens_per_second"]
    for one in results.values():
        one["against_off"] = one["tokens_per_second"] / off
    return results


def predictor_of(
    arm: str,
    served: ServedModel,
    replayed: list[Any],
    choices: list[list[list[int]]],
    arguments: argparse.Namespace,
) -> Any:
    arm = arm.partition("@")[0]
    if arm == "oracle":
        experts = next(iter(served.blocks.values())).num_experts
        return Drawn(served, replayed, [1.0], [1.0]) if replayed else Recorded(choices, experts)
    if replayed and arm in ("probes", "auto"):
        return Drawn(served, replayed, arguments.probes_found, arguments.probes_right)
    if replayed:
        return Drawn(served, replayed, arguments.found, arguments.right)
    found = served.prefetching
    if arm == "probes" and not isinstance(found.predictor, Probes):
        raise SystemExit(f"no probes: run moefit pack --probes first {found.probes.ignored}")
    return found.routers if arm == "guess" else found.predictor


def decoded(served: ServedModel, predictor: Any, ids_T: Tensor, warm_up: int) -> list[float]:
    """Decode tokens from empty slots; return the seconds of those after the warm-up."""
    served.set_residents(dict.fromkeys(served.blocks, ()))
    if isinstance(predictor, Drawn):
        predictor.restart()
    decoding, seconds = Decoding(served), []
    for number, ids_1 in enumerate(ids_T.split(1)):
        if isinstance(predictor, Recorded):
            predictor.at = number
        if number == warm_up:
            served.reset()
        began = time.perf_counter()
        decoding(ids_1)
        seconds.append(time.perf_counter() - began)
    return seconds[warm_up:]


@torch.inference_mode()
def one_arm(
    served: ServedModel, arm: str, predictor: Any, ids_T: Tensor, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Decode the tokens from empty slots with a prefetcher of its own."""
    arm, _, horizon = arm.partition("@")
    trial = Trial() if arm == "auto" else None
    blocks = list(served.blocks.values())
    watcher = Prefetcher(blocks, served._shared, predictor, trial, int(horizon or 1))
    if isinstance(predictor, Recorded):
        predictor.watcher = watcher
    tokens = arguments.warm_up + arguments.new_tokens
    with served.watched(None if arm == "off" else watcher):
        if trial is not None:
            decoded(served, predictor, ids_T[:TRIAL_STEPS], arguments.warm_up)
            trial.interrupted()
        timed = decoded(served, predictor, ids_T[:tokens], arguments.warm_up)
    report = served.report()
    names = ("hit_rate", "prefetches", "prefetches_used", "wait_seconds")
    return {
        "tokens_per_second": len(timed) / sum(timed),
        "pays": None if trial is None else trial.pays(1),
        **{name: report[name] for name in names},
        "prefetched_bytes": report["prefetched_bytes"],
        "wasted_bytes": report["prefetch_wasted_bytes"],
        "misses_per_layer": report["fetches"] / len(timed) / len(served.blocks),
    }


@torch.inference_mode()
def choices_of(served: ServedModel, ids_T: Tensor) -> list[list[list[int]]]:
    """Return the experts that routers choose for each token, by layer and step."""
    watcher = Choices(len(served.blocks))
    with served.watched(watcher):
        decoding = Decoding(served)
        for ids_1 in ids_T[:-1].split(1):
            decoding(ids_1)
    return watcher.choices


class Choices:
    """A watcher that records choices."""

    def __init__(self, layers: int):
        self.choices: list[list[list[int]]] = [[] for _ in range(layers)]

    def chosen(self, block: int, routing: Any) -> None:
        self.choices[block].append(routing.ids_TK.flatten().tolist())

    def read(self, block: int, x_TD: Tensor) -> None:
        pass

    def computed(self, block: int) -> None:
        pass


def speed(one: dict[str, Any]) -> str:
    return f"{one['tokens_per_second']:.2f} ({one['against_off']:.2f}x)"


def table(results: dict[str, Any]) -> Table:
    out = Table(title="decoding one sequence, tokens/s", title_justify="left")
    arms = list(next(iter(results.values())))
    for name in ("", *arms, "misses a layer", "used of early reads"):
        out.add_column(name, justify="right", no_wrap=True)
    for name, found in results.items():
        guess = found.get("guess", found[arms[-1]])
        out.add_row(
            name,
            *(
                f"{found[one]['tokens_per_second']:.2f} ({found[one]['against_off']:.2f}x)"
                for one in arms
            ),
            f"{found['off']['misses_per_layer']:.2f}",
            f"{guess['prefetches_used']} of {guess['prefetches']}",
        )
    return out


if __name__ == "__main__":
    main()
