"""Speculative decoding of an engine's requests: what each step verifies, and what became of it.

`Speculation` drafts tokens for requests that decode, decides how many of them a step verifies
(`cost`), and counts how many were right. A draft's token is accepted if it is the one that the
request's sampler chooses at its place, so that answers are those of plain decoding, greedy or
sampled, with whatever grammar or penalties. All methods are called in the engine's thread, except
where noted.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from time import monotonic

from moefit.engine.invariance import Invariance
from moefit.engine.runners import Runner, RunnerInput
from moefit.engine.speculation.cost import (
    COMPUTED_PRIOR,
    Acceptance,
    DraftingTimes,
    StepGrowth,
    StepTimes,
    choose_lengths,
)
from moefit.engine.speculation.draft_model import ModelDrafter
from moefit.engine.speculation.drafts import (
    COMPUTED_EVIDENCE,
    MAX_DRAFT,
    MAX_STEP_DRAFTS,
    Draft,
    DraftedRequest,
    Drafter,
    LookupDrafter,
    SpeculateSetting,
    SpeculationStats,
)
from moefit.engine.speculation.mtp import MtpDrafter
from moefit.errors import ConfigError
from moefit.serve.config import Policy
from moefit.serve.hf.mtp import has_mtp
from moefit.serve.memory.activations import experts_per_token
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.model import ServedModel

PROBE_STEPS = 64  # steps without drafts after which one tries a few, to measure it
_PROBE_TOKENS, _PROBE_CHANCE = 3, 0.5
_COMPUTED_PROBE_SHARE = 0.01  # of the seconds of all steps, that probes may take
_READ_MEASURED = 32  # unread tokens up to which the time of a call is that of drafting
# Share of the seconds of the longest answer that reading its prompt may take. Drafts gain at least
# twice as much, but answers may end early.
_READ_SHARE = 0.04
_LOG = logging.getLogger(__name__)


def drafter_of(
    setting: SpeculateSetting, served: ServedModel, places: int, runner: Runner
) -> Drafter | None:
    """Return where drafts come from by this setting; None from nowhere.

    Args:
        setting: Of the engine.
        served: The model.
        places: Tokens that the KV cache holds.
        runner: That computes the engine's steps.

    Raises:
        ConfigError: The model was loaded without what the setting needs.
        UnsupportedModelError: The draft model cannot draft.
    """
    if setting == "ngram":
        return LookupDrafter()
    if setting == "off":
        return None
    if setting == "mtp":
        if not has_mtp(served.model):
            raise ConfigError(
                "speculate='mtp' needs the layer for multi-token prediction, and the model was "
                "loaded without; give mtp=True to moefit.load, or use speculate='ngram'"
            )
        return MtpDrafter(runner, places, served.budget.step_tokens)
    if served.draft is None:
        raise ConfigError(
            "speculate='draft' needs a draft model, and the model was loaded without; give one to "
            "moefit.load (draft=...), or use speculate='ngram'"
        )
    return ModelDrafter(served.draft, places)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationCoverage:
    """Whether steps verify drafts.

    Attributes:
        active: Whether they may.
        reason: Why not, or what to know.
    """

    active: bool
    reason: str = ""

    def describe(self) -> str:
        """Return a line for people."""
        words = "tokens are drafted" if self.active else "no tokens are drafted"
        return f"{words}: {self.reason}" if self.reason else words


@dataclass(slots=True)
class _Totals:
    """As `SpeculationStats`."""

    drafts: int = 0
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT)
    plain_steps: int = 0


class Speculation:
    """Drafts of an engine's requests.

    Args:
        served: The model.
        drafter: Where drafts come from; None drafts nothing.
        packed: Whether the engine computes all tokens of a step together.

    Attributes:
        choose: Decides how many tokens of each draft are verified, with the arguments of
            `choose_lengths`; measurements replace it.
    """

    def __init__(self, served: ServedModel, drafter: Drafter | None, *, packed: bool):
        self._served, self._drafter, self._packed = served, drafter, packed
        self.choose: Callable[..., dict[str, int]] = choose_lengths
        self._vocabulary: int = served.model.config.get_text_config(decoder=True).vocab_size
        self._computes = drafter is not None and drafter.computes
        priors = (COMPUTED_PRIOR, COMPUTED_PRIOR) if self._computes else ()
        self._acceptance = Acceptance(*priors)
        self._times, self._drafting = StepTimes(StepGrowth()), DraftingTimes()
        self._reading = DraftingTimes()  # of unread tokens
        self._seconds = self._probed = 0.0  # of all steps, and of drafting in probes
        self._probes = False  # whether this step does
        self._seen: tuple[MemoryBudget, Policy] | None = None  # in force when times were measured
        self._drafts: dict[str, Draft] = {}  # of this step, also those that are not verified
        self._chances: dict[str, list[float]] = {}  # of their tokens
        self._totals, self._without = _Totals(), 0
        self._failed = ""

    @property
    def enabled(self) -> bool:
        """Whether anything is ever drafted."""
        return self._drafter is not None

    def coverage(self, invariance: Invariance) -> SpeculationCoverage:
        """Return whether steps verify drafts in the mode in force. From any thread."""
        policy, drafter = self._served.policy, self._drafter
        modes = [mode for mode in (policy.mode, policy.prefill) if mode != "exact"]
        if drafter is None:
            return SpeculationCoverage(active=False, reason="switched off")
        if self._failed:
            return SpeculationCoverage(active=False, reason=self._failed)
        if not self._packed:
            name = type(self._served.model).__name__
            reason = f"requests of {name} are computed one at a time, with caches of their own"
            return SpeculationCoverage(active=False, reason=reason)
        if modes:
            reason = f"in mode {modes[0]} an answer would depend on what is drafted"
            return SpeculationCoverage(active=False, reason=reason)
        if invariance.covered:
            return SpeculationCoverage(active=True, reason=f"by {drafter.name}")
        first = invariance.not_covered[0]
        return SpeculationCoverage(
            active=True,
            reason=f"by {drafter.name}; answers may differ in their last bits from those without "
            f"({first.module}: {first.reason})",
        )

    def open(self, request: str, about: DraftedRequest, *, sampled: bool) -> None:
        """Begin a request; `sampled` if it is not greedy."""
        if self._drafter is None:
            return
        self._acceptance.open(request, sampled=sampled)
        if not self._failed:
            try:
                self._drafter.open(request, about)
            except Exception as error:  # noqa: BLE001 - drafts are never worth a request
                self._fail(error)

    def close(self, request: str) -> None:
        """Forget a request; unknown ones are ignored."""
        self._drafts.pop(request, None)
        self._acceptance.close(request)
        if self._drafter is not None:
            self._drafter.close(request)

    def propose(
        self, decoding: Mapping[str, tuple[Sequence[int], int]], tokens: int, invariance: Invariance
    ) -> dict[str, tuple[int, ...]]:
        """Return the drafts that the next step verifies.

        Args:
            decoding: Tokens of each request that decodes in it, and how many it may still generate
                beyond the next one.
            tokens: Of the step without drafts.
            invariance: Of the mode in force.
        """
        self._drafts = {}
        if self._drafter is None or not self.coverage(invariance).active:
            return {}
        self._forget_if_changed()
        wanted = {
            name: (text, min(left, MAX_DRAFT)) for name, (text, left) in decoding.items() if left
        }
        try:
            if self._drafter.computes:
                return self._computed(self._drafter, wanted, decoding, tokens)
            self._drafts = self._as_wanted(self._drafter.draft(wanted), wanted)
            known = {
                name: (draft.evidence, len(draft.tokens)) for name, draft in self._drafts.items()
            }
            lengths = self._lengths(known, tokens)
        except Exception as error:  # noqa: BLE001 - drafts are never worth a request
            self._fail(error)
            return {}
        return {name: self._drafts[name].tokens[:length] for name, length in lengths.items()}

    def _fail(self, error: Exception) -> None:
        """Draft nothing from now on."""
        _LOG.error("no tokens are drafted any more", exc_info=error)
        self._drafts = {}
        self._failed = f"drafting failed ({type(error).__name__}: {error})"

    def _computed(
        self,
        drafter: Drafter,
        wanted: Mapping[str, tuple[Sequence[int], int]],
        decoding: Mapping[str, tuple[Sequence[int], int]],
        tokens: int,
    ) -> dict[str, tuple[int, ...]]:
        """Decide how many tokens to draft, and draft those."""
        left = {name: most for name, (_, most) in decoding.items()}
        behind = {name: drafter.behind(name, len(text)) for name, (text, _) in wanted.items()}
        known = {
            name: (COMPUTED_EVIDENCE, most)
            for name, (_, most) in wanted.items()
            if (unread := behind[name]) is not None and self._is_read_in_time(unread, left[name])
        }
        lengths = self._lengths(known, tokens)
        self._probes = not lengths and self._may_probe()
        if self._probes:
            lengths = self._probe(behind, wanted)
        if not lengths:
            return {}
        chosen = {name: (wanted[name][0], length) for name, length in lengths.items()}
        began = monotonic()
        self._drafts = self._as_wanted(drafter.draft(chosen), chosen)
        seconds, unread = monotonic() - began, [behind[name] or 0 for name in chosen]
        left_unread = [drafter.behind(name, len(text)) or 0 for name, (text, _) in chosen.items()]
        self._measure(seconds, unread, sum(unread) - sum(left_unread))
        return {name: draft.tokens for name, draft in self._drafts.items()}

    def _as_wanted(
        self, drafts: Mapping[str, Draft], wanted: Mapping[str, tuple[Sequence[int], int]]
    ) -> dict[str, Draft]:
        """Return the drafts of these requests that are not empty, no longer than was asked for.

        More tokens would be written beyond what the KV cache reserves for a request. They end
        before the first id that the served model does not have: with the same tokenizer, a draft
        model may have more rows.
        """
        found: dict[str, Draft] = {}
        for name, (_, most) in wanted.items():
            if name not in drafts:
                continue
            ids = map(int, drafts[name].tokens[:most])
            tokens = tuple(takewhile(lambda token: 0 <= token < self._vocabulary, ids))
            if tokens:
                found[name] = replace(drafts[name], tokens=tokens)
        return found

    def _is_read_in_time(self, unread: int, left: int) -> bool:
        """Return whether reading a request's text takes little of the time of its answer."""
        step = self._times.seconds(1)
        if unread <= _READ_MEASURED or step is None:
            return True
        return self._reading.seconds(unread) <= _READ_SHARE * left * step

    def _measure(self, seconds: float, unread: Sequence[int], read: int) -> None:
        """Record how long drafting took, or reading.

        Args:
            seconds: Of the call.
            unread: Tokens of each request that it had not read before.
            read: How many of them it has now: a draft model reads some in each call, the layer for
                multi-token prediction all.
        """
        longest = max((len(one.tokens) for one in self._drafts.values()), default=0)
        if max(unread) > _READ_MEASURED:
            self._reading.add(max(read, 1), seconds)
        elif longest:
            self._drafting.add(longest, seconds)
        if self._probes:
            self._probed += seconds

    def _may_probe(self) -> bool:
        """Return whether it is time to measure again what a drafter that computes is worth."""
        in_time = self._probed <= _COMPUTED_PROBE_SHARE * self._seconds
        return self._without >= PROBE_STEPS and in_time

    def _probe(
        self,
        behind: Mapping[str, int | None],
        wanted: Mapping[str, tuple[Sequence[int], int]],
    ) -> dict[str, int]:
        """Return a short draft of the request that is read soonest."""
        unread = {name: number for name, number in behind.items() if number is not None}
        if not unread:
            return {}
        name = min(unread, key=lambda one: unread[one])
        most = min(_PROBE_TOKENS, wanted[name][1])
        self._chances[name] = self._acceptance.chances(name, COMPUTED_EVIDENCE, most)
        if unread[name] <= _READ_MEASURED:  # else it has to go on reading
            self._without = 0
        return {name: most}

    def _lengths(self, known: Mapping[str, tuple[int, int]], tokens: int) -> dict[str, int]:
        """Return how many tokens of each draft to verify.

        Args:
            known: Evidence and tokens of each draft.
            tokens: Of the step without drafts.
        """
        self._chances = {}
        if not known:
            self._without += self._computes
            return {}
        chances = {name: self._acceptance.chances(name, *one) for name, one in known.items()}
        self._chances = chances
        chosen = self.choose(
            chances,
            tokens=tokens,
            most=MAX_STEP_DRAFTS,
            seconds=self._times.seconds,
            drafting=self._drafting.seconds,
        )
        if chosen:
            self._without = 0
            return chosen
        self._totals.plain_steps += 1
        self._without += 1
        likeliest = max(chances, key=lambda name: chances[name][0])
        if self._computes or self._without < PROBE_STEPS:
            return {}
        if chances[likeliest][0] < _PROBE_CHANCE:
            return {}
        self._without = 0
        return {likeliest: min(_PROBE_TOKENS, len(chances[likeliest]))}

    def observe(self, request: str, tokens: Sequence[int], verified: int) -> None:
        """Count what a draft was worth, whether it was verified or not.

        Args:
            request: Request id.
            tokens: Generated in this step.
            verified: Tokens of the draft that the step computed.
        """
        draft = self._drafts.get(request)
        if draft is None:
            return
        right = 0
        for place, (guess, token) in enumerate(zip(draft.tokens, tokens, strict=False)):
            self._acceptance.add(request, draft.evidence + place, accepted=guess == token)
            if guess != token:
                break
            right += place < verified
        if verified:
            self._acceptance.verified(request, self._chances[request][:verified], right)
            self._totals.drafts += 1
            self._totals.drafted += verified
            for place in range(right):
                self._totals.accepted_at[place] += 1

    def computed(self, inputs: Sequence[RunnerInput]) -> None:
        """Let a drafter that is a part of the model keep what it needs of a step."""
        if isinstance(self._drafter, MtpDrafter):
            self._drafter.computed(inputs)

    def stepped(self, tokens: int, seconds: float) -> None:
        """Record how long a step of this many tokens took."""
        if self._drafter is not None:
            self._times.add(tokens, seconds)
            self._seconds += seconds

    def stats(self) -> SpeculationStats | None:
        """Return totals; None if nothing is ever drafted. From any thread."""
        if self._drafter is None:
            return None
        totals = self._totals
        return SpeculationStats(
            drafts=totals.drafts,
            drafted=totals.drafted,
            accepted=sum(totals.accepted_at),
            accepted_at=tuple(totals.accepted_at),
            plain_steps=totals.plain_steps,
        )

    def _forget_if_changed(self) -> None:
        """Measure again after a change of the budget, of formats or of the mode."""
        now = self._served.budget, self._served.policy
        if self._seen is None or now[0] is not self._seen[0] or now[1] != self._seen[1]:
            self._seen = now
            self._times, self._drafting = StepTimes(growth_of(self._served)), DraftingTimes()
            self._reading = DraftingTimes()


def growth_of(served: ServedModel) -> StepGrowth:
    """Return how the time of a step may grow with its tokens in the budget in force."""
    blocks = list(served.blocks.values())
    first = blocks[0]
    config = served.model.config.get_text_config(decoder=True)
    top_k = min(experts_per_token(config), first.num_experts)
    missing = any(one.slot_table.num_slots < one.num_experts for one in blocks)
    used = top_k * sum(one.format.nbytes(one.block.layout.specs) for one in blocks)
    share = 1.0 if missing else used / (used + served.budget.weights - served.budget.draft)
    return StepGrowth(experts=first.num_experts, chosen=top_k, share=share)
