"""Load the experts that the next layer is predicted to choose, in exact mode.

`Prefetcher` follows the steps of all blocks. Once a block waits for no read any more, it predicts
the next block's experts, and starts to read those that are worth it into that block's slots, while
the present block's experts and the next attention block are computed. When the next router has
chosen, the guesses whose reading has not started are cancelled, and the invoker takes over those
that it needs. Outputs do not depend on any of it: a step computes the same experts wherever they
came from.

Decisions are in `guesses.py`. All calls are made under the lock of `SharedState`, on the thread
that computes; slots are reserved, filled and published by `Swaps`.

Shapes: T tokens, D model width, E experts.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
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
from moefit.serve.prediction.guesses import Confidence, Reading, Trial, choose, margins
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
class _BlockState:
    """What is known of one block.

    Attributes:
        chosen: Experts per token in its last step.
        window: Time from the start of prefetching to its router's choice; None if unknown.
        began: When prefetching for its present step began; None if it did not.
        margins: Margins by expert that were predicted for its present step.
        absent: The experts of these that were not in memory.
    """

    chosen: int = 1
    window: float | None = None
    began: float | None = None
    margins: Mapping[int, float] = field(default_factory=dict)
    absent: frozenset[int] = frozenset()


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
    """Prefetch the next block's experts.

    Args:
        blocks: The served blocks, in order.
        shared: Their state.
        predictor: Guesses a block's experts from the inputs of the one before.
        trial: Decides in which steps to prefetch; None for all.

    Attributes:
        failure: The error after which it was switched off; empty if there was none.
    """

    def __init__(
        self,
        blocks: Sequence[VirtualExperts],
        shared: SharedState,
        predictor: Predictor,
        trial: Trial | None,
    ):
        self._blocks, self._shared, self.predictor = blocks, shared, predictor
        self.trial, self.failure = trial, ""
        self._states = [_BlockState() for _ in blocks]
        self._absent, self._resident = Confidence(len(blocks)), Confidence(len(blocks))
        self._step = _Step()

    def chosen(self, block: int, routing: Routing) -> None:
        """Compare the guesses for a block with its router's choice; see `StepWatcher`."""
        try:
            self._chosen(block, routing)
        except Exception as error:  # noqa: BLE001 - no step may fail because of a guess
            self._switch_off(error)

    def read(self, block: int, x_TD: Tensor) -> None:
        """Start to read what the next block is predicted to choose; see `StepWatcher`."""
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
        if state.began is not None:
            took = now - state.began
            before = took if state.window is None else state.window
            state.window = _KEEP * before + (1 - _KEEP) * took
        if self._step.tokens > MOST_TOKENS:
            return
        experts = routing.ids_TK.flatten().tolist()
        for expert, margin in state.margins.items():
            confidence = self._absent if expert in state.absent else self._resident
            confidence.observe(block, margin, expert in experts)
        state.began, state.margins, state.absent = None, {}, frozenset()
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
            state.began, state.margins, state.absent = None, {}, frozenset()

    def _read(self, block: int, x_TD: Tensor) -> None:
        if not self._step.prefetches or block + 1 >= len(self._blocks):
            return
        experts, state = self._blocks[block + 1], self._states[block + 1]
        table = experts.slot_table
        if len(table.residents) == experts.num_experts:
            return
        scores_TE = self.predictor.scores(block, 1, x_TD)
        if scores_TE is None:
            return
        state.began = perf_counter()
        state.margins = margins(scores_TE.tolist(), state.chosen)
        loading = set(table.filling)
        state.absent = frozenset(
            one for one in state.margins if one not in table.residents and one not in loading
        )
        likely = self._likely(block + 1)
        for expert in self._worth_reading(block, likely):
            experts.swaps.prefetch(expert, likely)

    def _worth_reading(self, block: int, likely: Collection[int]) -> Sequence[int]:
        """Return the experts of the next block to read now, which displace no likely one."""
        experts, state = self._blocks[block + 1], self._states[block + 1]
        load, table = self._shared.transfer.seconds_per_load, experts.slot_table
        if load is None or state.window is None or not state.absent:
            return ()
        absent = {one: self._absent.of(block + 1, state.margins[one]) for one in state.absent}
        unlikely = sum(one not in likely for one in table.residents)
        free = table.num_slots // 2 - len(table.filling)  # the step needs slots of its own
        reading = Reading(
            load=load,
            window=state.window,
            queued=sum(one.swaps.loading for one in self._blocks),
            most=max(0, min(free, table.empty + unlikely)),
        )
        return choose(absent, reading)

    def _likely(self, block: int) -> set[int]:
        """Return the residents that the block may choose, which no guess displaces."""
        guesses, residents = self._states[block].margins, self._blocks[block].slot_table.residents
        return {
            one
            for one, margin in guesses.items()
            if one in residents and self._resident.of(block, margin) > UNLIKELY
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
    prefetcher = Prefetcher(list(blocks.values()), shared, predictor, trial)
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
