"""Load the experts that the next layers are predicted to choose, in exact mode.

`Prefetcher` follows the steps of all blocks. Once a block waits for no read any more, it predicts
the experts of the next block, or of the next few (the horizon), and starts to read those that are
worth it into these blocks' slots, while the present block's experts and the next attention block
are computed. When the next router has chosen, the guesses whose reading has not started are
cancelled, and the invoker takes over those that it needs. Guesses for blocks beyond it are
cancelled too, since they would delay what the block waits for, and chosen anew afterwards, from a
state that is nearer to them. Outputs do not depend on any of it: a step computes the same experts
wherever they came from.

Decisions are in `guesses.py`. All calls are made under the lock of `SharedState`, on the thread
that computes; slots are reserved, filled and published by `Swaps`.

Shapes: T tokens, D model width, E experts.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.errors import CheckpointError
from moefit.moe.routing import Routing
from moefit.serve.cache.swaps import SharedState
from moefit.serve.config import AUTO_PRECISION, LoadSettings, Mode
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.prediction.guesses import (
    Candidates,
    Confidence,
    Trial,
    choose_nearest_first,
    margins,
)
from moefit.serve.prediction.next_router import (
    FORMATS_DEPEND,
    NextRouter,
    Predictor,
    obstacle,
)
from moefit.serve.prediction.pregated import EarlyReader, PreGates, is_pregated
from moefit.serve.prediction.previous_token import KnownChoices, StepReader
from moefit.serve.prediction.probes import NO_PROBES, UNUSED, FoundProbes, Maps, Probes

MOST_TOKENS = 32  # of a step; more choose nearly all experts
UNLIKELY = 0.1  # confidence up to which a guess may displace a resident
PROBES, NEXT_ROUTER = "probes", "next router"  # names of predictors
PREGATED = "pregated"  # another; in place of the setting, of models that know their next experts
PREVIOUS = "previous token"  # another: all blocks' experts are known before a step
_LOG = logging.getLogger(__name__)
_KEEP = 0.9  # of the mean window of a block, per step


@dataclass(slots=True)
class _Guess:
    """What is guessed for one block from so many blocks before.

    Attributes:
        window: Time from the guess to the router's choice, in which no step waits for a read;
            None if unknown.
        began: When the guess for the present step was made; None if there is none.
        waited: What all steps had waited for reads by then.
        margins: Margins by expert that were predicted for the present step.
        absent: The experts of these that were not in memory.
    """

    window: float | None = None
    began: float | None = None
    waited: float = 0.0
    margins: Mapping[int, float] = field(default_factory=dict)
    absent: frozenset[int] = frozenset()

    def forget(self) -> None:
        """Drop what was guessed for a step, but not how long its window is."""
        self.began, self.margins, self.absent = None, {}, frozenset()

    def measured(self, now: float, waited: float) -> None:
        """Take the time of the router's choice into the mean of windows."""
        if self.began is None:
            return
        took = max(0.0, now - self.began - (waited - self.waited))
        before = took if self.window is None else self.window
        self.window = _KEEP * before + (1 - _KEEP) * took


@dataclass(slots=True)
class _BlockState:
    """What is known of one block.

    Attributes:
        guesses: By distance, the nearest first.
        chosen: Experts per token in its last step.
    """

    guesses: list[_Guess]
    chosen: int = 1


@dataclass(slots=True)
class _Step:
    """The present step of the model."""

    block: int = -1
    tokens: int = 0
    prefetches: bool = False
    began: float = 0.0
    ended: float = 0.0
    waited: float = 0.0


class Prefetcher:
    """Prefetch the experts of the next blocks.

    Args:
        blocks: The served blocks, in order.
        shared: Their state.
        predictor: Guesses a block's experts from the inputs of an earlier one.
        trial: Decides in which steps to prefetch; None for all.
        horizon: Blocks ahead for which experts are read, 1 or more.

    Attributes:
        failure: The error after which it was switched off; empty if there was none.
    """

    def __init__(
        self,
        blocks: Sequence[VirtualExperts],
        shared: SharedState,
        predictor: Predictor,
        trial: Trial | None,
        horizon: int = 1,
    ):
        self._blocks, self._shared, self.predictor = blocks, shared, predictor
        self.trial, self.horizon, self.failure = trial, horizon, ""
        self._states = [_BlockState([_Guess() for _ in range(horizon)]) for _ in blocks]
        # By distance: farther guesses are right less often.
        self._absent = [Confidence(len(blocks)) for _ in range(horizon)]
        self._resident = [Confidence(len(blocks)) for _ in range(horizon)]
        self._step = _Step()

    def chosen(self, block: int, routing: Routing) -> None:
        """Compare the guesses for a block with its router's choice; see `StepWatcher`."""
        try:
            self._chosen(block, routing)
        except Exception as error:  # noqa: BLE001 - no step may fail because of a guess
            self._switch_off(error)

    def read(self, block: int, x_TD: Tensor) -> None:
        """Start to read what the next blocks are predicted to choose; see `StepWatcher`."""
        try:
            self._read(block, x_TD)
        except Exception as error:  # noqa: BLE001 - no step may fail because of a guess
            self._switch_off(error)

    def computed(self, block: int) -> None:
        """Note when the last block of a step is complete."""
        self._step.ended = perf_counter()

    def _switch_off(self, error: Exception) -> None:
        if self._shared.watcher is self:
            self._shared.watcher = None
        if not self.failure:
            self.failure = f"{type(error).__name__}: {error}"
            _LOG.warning("nothing is prefetched any more: %s", self.failure, exc_info=error)

    def _chosen(self, block: int, routing: Routing) -> None:
        now, state, tokens = perf_counter(), self._states[block], len(routing.ids_TK)
        if block <= self._step.block:
            self._begin_step(tokens, now)
        self._step.block = block
        for farther in self._blocks[block + 1 : block + self.horizon]:
            farther.swaps.withdraw_guesses()  # reads that this block waits for come first
        for guess in state.guesses:
            guess.measured(now, self._shared.counters.wait_seconds)
        if self._step.tokens > MOST_TOKENS:
            return
        experts = routing.ids_TK.flatten().tolist()
        for at, guess in enumerate(state.guesses):
            for expert, margin in guess.margins.items():
                confidence = self._absent if expert in guess.absent else self._resident
                confidence[at].observe(block, margin, expert in experts)
            guess.forget()
        padding = self._blocks[block].num_experts
        choices = len(experts) - experts.count(padding)
        state.chosen = max(1, min(-(-choices // tokens), padding - 1))

    def _begin_step(self, tokens: int, now: float) -> None:
        last, waited = self._step, self._shared.counters.wait_seconds
        if self.trial is not None and 0 < last.tokens <= MOST_TOKENS and last.ended > last.began:
            spent = waited - last.waited
            self.trial.measured(
                last.tokens, last.prefetches, last.ended - last.began, max(0.0, spent)
            )
        few = tokens <= MOST_TOKENS
        if self.trial is not None and not few:
            self.trial.interrupted()
        prefetches = few and (self.trial is None or self.trial.use(tokens))
        self._step = _Step(tokens=tokens, prefetches=prefetches, began=now, waited=waited)
        for state in self._states:  # of a step that was aborted
            for guess in state.guesses:
                guess.forget()

    def _read(self, block: int, x_TD: Tensor) -> None:
        if not self._step.prefetches:
            return
        distances = range(1, min(self.horizon, len(self._blocks) - 1 - block) + 1)
        guessed = [ahead for ahead in distances if self._guess(block, ahead, x_TD)]
        if (load := self._shared.transfer.seconds_per_load) is None:
            return
        queued = sum(one.swaps.loading for one in self._blocks)
        likely = [self._likely(block + ahead, ahead) for ahead in guessed]
        candidates = [
            self._candidates(block + ahead, ahead, residents)
            for ahead, residents in zip(guessed, likely, strict=True)
        ]
        chosen = choose_nearest_first(candidates, load=load, queued=queued)
        for ahead, residents, experts in zip(guessed, likely, chosen, strict=True):
            for expert in experts:
                self._blocks[block + ahead].swaps.prefetch(expert, residents)

    def _guess(self, block: int, ahead: int, x_TD: Tensor) -> bool:
        """Predict a later block's experts; return whether any may have to be read."""
        experts, state = self._blocks[block + ahead], self._states[block + ahead]
        table = experts.slot_table
        if len(table.residents) == experts.num_experts:
            return False
        scores_TE = self.predictor.scores(block, ahead, x_TD)
        if scores_TE is None:
            return False
        guess = state.guesses[ahead - 1]
        guess.began, guess.waited = perf_counter(), self._shared.counters.wait_seconds
        guess.margins = margins(scores_TE.tolist(), state.chosen)
        here = {*table.residents, *table.filling}
        guess.absent = frozenset(one for one in guess.margins if one not in here)
        return True

    def _candidates(self, block: int, ahead: int, likely: set[int]) -> Candidates:
        """Return the guesses that may be read now, which displace no likely expert."""
        guess, table = self._states[block].guesses[ahead - 1], self._blocks[block].slot_table
        confidence = self._absent[ahead - 1]
        unlikely = sum(one not in likely for one in table.residents)
        free = table.num_slots // 2 - len(table.filling)  # the step needs slots of its own
        known = () if guess.window is None else guess.absent
        return Candidates(
            absent={one: confidence.of(block, guess.margins[one]) for one in known},
            window=guess.window or 0.0,
            most=max(0, min(free, table.empty + unlikely)),
        )

    def _likely(self, block: int, ahead: int) -> set[int]:
        """Return the residents that the block may choose, which no guess displaces."""
        guess, confidence = self._states[block].guesses[ahead - 1], self._resident[ahead - 1]
        residents = self._blocks[block].slot_table.residents
        return {
            one
            for one, margin in guess.margins.items()
            if one in residents and confidence.of(block, margin) > UNLIKELY
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetching:
    """Whether a served model prefetches.

    Attributes:
        setting: As given, or `pregated`.
        predictor: What predicts: probes, the next router, or what a pre-gated model knows; None if
            no experts can be predicted.
        routers: The next router, also where probes predict; None if it cannot.
        probes: The probes that predict, and why others do not.
        prefetcher: At work; None if there is an obstacle.
        obstacle: Why nothing is prefetched in any mode; empty if something may be.
    """

    setting: str = "off"
    predictor: Predictor | None = None
    routers: NextRouter | None = None
    probes: FoundProbes = NO_PROBES
    prefetcher: Prefetcher | EarlyReader | StepReader | None = None
    obstacle: str = "it is off"

    def close(self) -> None:
        """Remove what it has added to the model."""
        if isinstance(self.prefetcher, StepReader):
            self.prefetcher.close()

    def budget_changed(self) -> None:
        """Measure anew whether prefetching pays; called under the lock of `SharedState`."""
        if self.prefetcher is not None and self.prefetcher.trial is not None:
            self.prefetcher.trial.forget()

    def as_dict(self, mode: Mode, *, missing: bool) -> dict[str, Any]:
        """Return plain values, for JSON.

        Args:
            mode: The mode in force.
            missing: Whether a block has fewer slots than experts.
        """
        obstacle, pays = self.obstacle, None
        if not obstacle and self.prefetcher is not None and self.prefetcher.failure:
            obstacle = f"it was switched off after an error ({self.prefetcher.failure})"
        if not obstacle and not missing:
            obstacle = "all experts are in memory"
        if not obstacle and mode != "exact":
            obstacle = f"mode {mode} is in force, and only exact mode fetches all missing experts"
        if not obstacle and self.prefetcher is not None and self.prefetcher.trial is not None:
            pays = self.prefetcher.trial.pays(1)
        return {
            "setting": self.setting,
            "obstacle": obstacle,
            "pays": pays,
            "horizon": self.prefetcher.horizon if isinstance(self.prefetcher, Prefetcher) else None,
            "predictor": self._name(),
            "probes": self.probes.as_dict(),
            "probes_ignored": self.probes.ignored,
        }

    def _name(self) -> str | None:
        match self.predictor:
            case None:
                return None
            case PreGates():
                return PREGATED
            case KnownChoices():
                return PREVIOUS
            case Probes():
                return PROBES
            case _:
                return NEXT_ROUTER


def start_prefetching(
    model: PreTrainedModel,
    blocks: Mapping[str, VirtualExperts],
    shared: SharedState,
    settings: LoadSettings,
    context: int | None,
    probes: FoundProbes,
) -> Prefetching:
    """Let a model prefetch if its settings say so and its experts can be predicted.

    Args:
        model: The model, whose experts return zeros meanwhile.
        blocks: The served blocks by name, in order.
        shared: Their state.
        settings: With which the model was loaded.
        context: The largest number of tokens in a step; None for any.
        probes: What was found of its probes.
    """
    if is_pregated(model):
        return _read_early(model, blocks, shared, settings)
    if reason := obstacle(model, len(blocks), settings):
        return Prefetching(setting=settings.prefetch, obstacle=reason)
    routers = NextRouter.of(model, blocks, context)
    probes, maps = _read_probes(probes, model.device)
    predictor = Probes(maps, list(blocks.values()), routers) if maps else routers
    if not any(predictor.predicts(block) for block in range(len(blocks))):
        family = type(model).__name__
        return Prefetching(
            setting=settings.prefetch,
            probes=probes,
            obstacle=f"the norms and routers of {family} are not of a form that can be predicted; "
            "`moefit pack --probes` fits probes that may",
        )
    trial = Trial() if settings.prefetch == "auto" else None
    prefetcher = Prefetcher(
        list(blocks.values()), shared, predictor, trial, settings.prefetch_horizon
    )
    shared.watcher = prefetcher
    return Prefetching(
        setting=settings.prefetch,
        predictor=predictor,
        routers=routers,
        probes=probes,
        prefetcher=prefetcher,
        obstacle="",
    )


def _read_probes(found: FoundProbes, device: torch.device) -> tuple[FoundProbes, Maps]:
    """Return the probes, and what was found without them if they cannot be read."""
    if found.file is None:
        return found, {}
    try:
        return found, found.file.read(found.depth, device)
    except CheckpointError as error:
        return FoundProbes(ignored=f"{error}; {UNUSED}"), {}


def _read_early(
    model: PreTrainedModel,
    blocks: Mapping[str, VirtualExperts],
    shared: SharedState,
    settings: LoadSettings,
) -> Prefetching:
    """Let a pre-gated model read its experts early, whatever the setting: nothing is guessed."""
    if settings.precision == AUTO_PRECISION:
        return Prefetching(setting=PREGATED, obstacle=FORMATS_DEPEND)
    if model.config.by_token_before:
        steps = StepReader(model, list(blocks.values()), shared)
        shared.watcher = steps
        return Prefetching(setting=PREGATED, predictor=steps.choices, prefetcher=steps, obstacle="")
    gates = PreGates(model, list(blocks.values()))
    reader = EarlyReader(list(blocks.values()), shared, gates)
    shared.watcher = reader
    return Prefetching(setting=PREGATED, predictor=gates, prefetcher=reader, obstacle="")
