"""Measure how well the experts of later layers can be predicted, on a text.

A text is decoded token by token by a served model, so that its budget decides which experts are
missing. At each layer the predictor guesses the experts of the layers ahead, and the guesses are
compared with what the routers choose. Two baselines use no state: the experts used most so far, and
those of the previous token. An oracle at a distance of d layers knows all but the first d layers.

Shapes: T tokens, D model width.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moefit.errors import ConfigError, DataError, UnsupportedModelError
from moefit.evaluate.decoding import Decoding
from moefit.moe.routing import Routing
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.model import ServedModel
from moefit.serve.prediction.guesses import Confidence, margins
from moefit.serve.prediction.next_router import Predictor
from moefit.serve.prediction.probes import Probes

MOST_AHEAD = 4  # layers
CONFIDENT = 0.5  # probability above which precision is reported
_PROMPT = 16  # tokens at once before the first prediction
USAGE, PREVIOUS, ORACLE = "usage counts", "previous token", "oracle"


@dataclass(slots=True)
class PredictionScore:
    """Counts over all tokens of one layer, or of all.

    Attributes:
        chosen: Experts that the router chose.
        found: Those of them among the K that were predicted first, with K as many as it chose.
        found_twice: Those among the first 2K.
        confident: Guesses with a confidence of at least `CONFIDENT`.
        confident_right: Those of them that were chosen.
        missing: Chosen experts that were not in memory.
        missing_found: Those of them among the first K.
        missing_confident: Those of them that were guessed with at least that confidence.
    """

    chosen: int = 0
    found: int = 0
    found_twice: int = 0
    confident: int = 0
    confident_right: int = 0
    missing: int = 0
    missing_found: int = 0
    missing_confident: int = 0

    def add(self, other: "PredictionScore") -> None:
        """Add the counts of another layer."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def as_dict(self) -> dict[str, float | None]:
        """Return shares for JSON; None where nothing was counted."""
        return {
            "recall": _share(self.found, self.chosen),
            "recall_2k": _share(self.found_twice, self.chosen),
            "precision": _share(self.confident_right, self.confident),
            "misses": _share(self.missing, self.chosen),
            "misses_covered": _share(self.missing_found, self.missing),
            "misses_confident": _share(self.missing_confident, self.missing),
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


ByDistance = Mapping[int, Mapping[int, PredictionScore]]
"""Scores by number of layers ahead, and by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionReport:
    """How well experts are predicted.

    Attributes:
        tokens: Tokens that were decoded.
        slots: Slots of all layers.
        experts: Experts of all layers.
        layers: By number of layers ahead, the score of each layer that its router can predict.
        baselines: By name, the score over all layers.
        probes: As `layers`, by trained probes; empty without them.
        probes_text: Name of the text that they were fitted on.
    """

    tokens: int
    slots: int
    experts: int
    layers: ByDistance
    baselines: Mapping[str, PredictionScore]
    probes: ByDistance = field(default_factory=dict)
    probes_text: str = ""

    def total(self, ahead: int) -> PredictionScore:
        """Return the score over all layers that can be predicted so many layers ahead."""
        return total(self.layers[ahead])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "tokens": self.tokens,
            "slots": self.slots,
            "experts": self.experts,
            "confidence": CONFIDENT,
            "ahead": _distances(self.layers),
            "probes": _distances(self.probes),
            "probes_text": self.probes_text,
            "baselines": {name: one.as_dict() for name, one in self.baselines.items()},
        }


def total(layers: Mapping[int, PredictionScore]) -> PredictionScore:
    """Return the score over several layers."""
    sum_of = PredictionScore()
    for score in layers.values():
        sum_of.add(score)
    return sum_of


def _distances(found: ByDistance) -> dict[str, Any]:
    return {
        str(ahead): {
            "all": total(layers).as_dict(),
            "layers": {str(at): one.as_dict() for at, one in layers.items()},
        }
        for ahead, layers in found.items()
    }


@dataclass(slots=True)
class _Guess:
    """What was predicted so many layers ahead: experts in order, and margins of the first."""

    ahead: int
    ranked: Sequence[int]
    margins: Mapping[int, float]


@dataclass(slots=True)
class _Layer:
    chosen: int = 1  # experts in the last step
    last: Collection[int] = ()
    counts: list[int] = field(default_factory=list)
    guesses: list[_Guess] = field(default_factory=list)


class _All:
    """Several watchers of the same steps."""

    def __init__(self, meters: Sequence["PredictionMeter"]):
        self._meters = meters

    def chosen(self, block: int, routing: Routing) -> None:
        for one in self._meters:
            one.chosen(block, routing)

    def read(self, block: int, x_TD: Tensor) -> None:
        for one in self._meters:
            one.read(block, x_TD)

    def computed(self, block: int) -> None:
        pass


class PredictionMeter:
    """Follows the steps of a served model, and compares guesses with choices.

    Args:
        blocks: The served blocks, in order.
        predictor: What is measured.
    """

    def __init__(self, blocks: Sequence[VirtualExperts], predictor: Predictor):
        self._blocks, self._predictor = blocks, predictor
        self._layers = [_Layer(counts=[0] * one.num_experts) for one in blocks]
        self._confidence = {ahead: Confidence(len(blocks)) for ahead in range(1, MOST_AHEAD + 1)}
        self.scores: dict[int, dict[int, PredictionScore]] = {
            ahead: {} for ahead in self._confidence
        }
        self.baselines = {name: PredictionScore() for name in (USAGE, PREVIOUS, ORACLE)}

    def chosen(self, block: int, routing: Routing) -> None:
        """Compare the guesses for a layer with its router's choice; see `StepWatcher`."""
        layer, experts = self._layers[block], self._blocks[block]
        chosen = {one for one in routing.ids_TK.flatten().tolist() if one < experts.num_experts}
        missing = chosen - set(experts.slot_table.residents)
        if len(routing.ids_TK) == 1:
            for guess in layer.guesses:
                self._count(block, guess, chosen, missing)
            self._count_baselines(layer, chosen, missing, first=block == 0)
        for expert in chosen:
            layer.counts[expert] += 1
        layer.guesses, layer.last = [], chosen
        layer.chosen = len(chosen) if len(routing.ids_TK) == 1 else routing.ids_TK.shape[1]

    def read(self, block: int, x_TD: Tensor) -> None:
        """Guess the experts of the layers ahead."""
        if len(x_TD) > 1:
            return
        for ahead in self.scores:
            if block + ahead >= len(self._blocks):
                return
            scores_TE = self._predictor.scores(block, ahead, x_TD)
            if scores_TE is not None:
                there = self._layers[block + ahead]
                ranked = scores_TE[0].argsort(descending=True).tolist()
                found = margins(scores_TE.tolist(), there.chosen)
                there.guesses.append(_Guess(ahead, ranked, found))

    def computed(self, block: int) -> None:
        """Nothing is measured at the end of a layer."""

    def found(self) -> ByDistance:
        """Return the scores of what could be predicted."""
        return {ahead: one for ahead, one in self.scores.items() if one}

    def _count(
        self, block: int, guess: _Guess, chosen: Collection[int], missing: Collection[int]
    ) -> None:
        confidence = self._confidence[guess.ahead]
        confident = {
            one for one, margin in guess.margins.items()
            if confidence.of(block, margin) >= CONFIDENT
        }  # fmt: skip
        score = self.scores[guess.ahead].setdefault(block, PredictionScore())
        score.add(_score(guess.ranked, chosen, missing, confident))
        for expert, margin in guess.margins.items():
            confidence.observe(block, margin, expert in chosen)

    def _count_baselines(
        self, layer: _Layer, chosen: Collection[int], missing: Collection[int], *, first: bool
    ) -> None:
        used = sorted(range(len(layer.counts)), key=lambda one: -layer.counts[one])
        self.baselines[USAGE].add(_score(used, chosen, missing, ()))
        self.baselines[PREVIOUS].add(_score(sorted(layer.last), chosen, missing, ()))
        known = () if first else sorted(chosen)
        self.baselines[ORACLE].add(_score(known, chosen, missing, known))


def _score(
    ranked: Sequence[int],
    chosen: Collection[int],
    missing: Collection[int],
    confident: Collection[int],
) -> PredictionScore:
    first, twice = set(ranked[: len(chosen)]), set(ranked[: 2 * len(chosen)])
    return PredictionScore(
        chosen=len(chosen),
        found=sum(one in first for one in chosen),
        found_twice=sum(one in twice for one in chosen),
        confident=len(confident),
        confident_right=sum(one in chosen for one in confident),
        missing=len(missing),
        missing_found=sum(one in first for one in missing),
        missing_confident=sum(one in confident for one in missing),
    )


@torch.inference_mode()
def measure_prediction(
    served: ServedModel,
    ids_T: Tensor,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PredictionReport:
    """Decode a text and compare the predicted experts with those that the routers choose.

    Args:
        served: The model, in exact mode.
        ids_T: The text; windows of the model's context are decoded one after the other.
        progress: Called after each token with the number of tokens, done and in total.

    Raises:
        UnsupportedModelError: The model's experts cannot be predicted; the message says why.
        ConfigError: The model is not in exact mode, or was loaded with prefetch off.
        DataError: The text is too short.
    """
    if served.policy.mode != "exact":
        raise ConfigError(
            f"prediction is measured in mode exact, and the mode is {served.policy.mode}; leave "
            "--mode out"
        )
    predictor = served.prefetching.predictor
    if served.prefetching.setting == "off":
        raise ConfigError(
            "the model was loaded with prefetch='off', so without a predictor; load it with "
            'prefetch="on"'
        )
    if predictor is None:
        raise UnsupportedModelError(f"prediction cannot be measured: {served.prefetching.obstacle}")
    window = min(served.budget.context or len(ids_T), len(ids_T))
    total = sum(max(0, len(one) - _PROMPT) for one in ids_T.split(window))
    if total < 1:
        raise DataError(
            f"the text has {len(ids_T)} tokens, and prediction begins after {_PROMPT}; give more"
        )
    by_probes = isinstance(predictor, Probes)
    first = served.prefetching.routers or predictor
    blocks, done = list(served.blocks.values()), 0
    meters = [PredictionMeter(blocks, one) for one in (first, *([predictor] * by_probes))]
    with served.watched(_All(meters)):
        for ids_L in ids_T.split(window):
            if len(ids_L) <= _PROMPT:
                continue
            decoding = Decoding(served)
            decoding(ids_L[:_PROMPT])
            for ids_1 in ids_L[_PROMPT:].split(1):
                decoding(ids_1)
                done += 1
                progress(done, total)
    report = served.report()
    return PredictionReport(
        tokens=total,
        slots=sum(report["slots"].values()),
        experts=sum(report["experts"].values()),
        layers=meters[0].found(),
        baselines=meters[0].baselines,
        probes=meters[1].found() if by_probes else {},
        probes_text=(served.prefetching.probes.as_dict() or {}).get("text", ""),
    )
