"""Let an engine's KV cache grow beyond the tokens that are reserved from the start.

`KvGrowth` moves bytes of one budget from expert slots to the KV cache when requests need them, and
back. Before the cache grows slots are removed, and before slots are added the cache has shrunk, so
that the process stays within its budget. It changes sizes in the engine's thread, between steps.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Condition, Lock
from time import monotonic

from moefit.engine.api import EngineSettings
from moefit.engine.context.reservation import ReservationRule
from moefit.engine.request_state import Longest
from moefit.engine.runners import Runner, VarlenRunner
from moefit.engine.scheduler import Scheduler
from moefit.engine.speculation.drafts import LOOKUP_BYTES
from moefit.errors import BudgetTooSmallError, ConfigError, MoefitError
from moefit.host import available_bytes
from moefit.serve.config import AUTO_PRECISION
from moefit.serve.memory.budget import MemoryBudget, at_least, format_bytes, parse_bytes
from moefit.serve.memory.context import ContextCosts, context_costs
from moefit.serve.memory.follow import default_headroom
from moefit.serve.model import ServedModel

_LOG = logging.getLogger(__name__)
_UNKNOWN_LENGTH = 1 << 30  # tokens of a model without positions
RETRY_AFTER = 10.0  # seconds after the system could not give memory


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Sizes of an engine's requests.

    Args:
        own: Tokens of the model's longest text; None if it is not known.
        step: Tokens of the longest step.
    """

    own: int | None
    step: int


class KvGrowth:
    """Size of an engine's KV cache.

    Args:
        served: Its model.
        runner: That computes its requests; none has run yet.
        scheduler: With the tokens that are reserved.
        settings: Of the engine.
        sizes: Of its requests.
        changed: Guards the scheduler.

    Attributes:
        base: Tokens that are reserved from the start.

    Raises:
        ConfigError: The settings ask for more than model and KV cache can hold.
    """

    def __init__(
        self,
        served: ServedModel,
        runner: Runner,
        scheduler: Scheduler,
        settings: EngineSettings,
        sizes: EngineSizes,
        changed: Condition,
    ):
        self._served, self._runner, self._scheduler = served, runner, scheduler
        self._settings, self._sizes, self._changed = settings, sizes, changed
        self.base = scheduler.tokens
        self._rule = ReservationRule(self.base)
        self._retry_at = 0.0
        self._owes = False  # whether, after an error, it is charged with more than it has places
        self._sizing = Lock()  # while sizes differ; taken before `changed`
        self._known: tuple[MemoryBudget, int] | None = None
        self._obstacle = _obstacle(served, runner, settings)
        self._costs = None if self._obstacle else _costs(served, runner, settings, sizes.step)
        self._check()
        scheduler.allow(self.most())

    def most(self) -> int:
        """Return the tokens that the cache may hold in the budget in force. From any thread."""
        costs, budget = self._costs, self._served.budget
        if costs is None or budget.planned is not None:
            return self.base
        if budget.total is None:  # nothing that is in use is given up for it, so it is not counted
            room = (available_bytes() - default_headroom()) // costs.token_bytes
            return max(self._scheduler.tokens, min(self._limit(), room))
        known = self._known
        if known is None or known[0] is not budget:
            spare = self._settings.context_max is None
            found = costs.most(budget, self._limit(), spare_experts=spare)
            self._known = known = budget, found
        return known[1]

    def longest(self) -> Longest:
        """Return the most tokens of a request now, and why not more. From any thread."""
        most, asked, own = self.most(), self._settings.max_model_len, self._sizes.own
        if own is not None and own <= min(most, asked or own):
            return Longest(tokens=own)
        if asked is not None and asked <= most:
            return Longest(tokens=asked, why="max_model_len")
        why, remedy = self._why(most)
        return Longest(tokens=most, why=why, remedy=remedy)

    def adjust(self) -> list[tuple[str, str]]:
        """Change the size to what requests need; return waiting ones that cannot run, and why."""
        if self._costs is None:
            return []
        now = monotonic()
        present = self._scheduler.tokens
        most = present if now < self._retry_at else self.most()
        excessive = self._allow(most)
        with self._changed:
            needed = self._scheduler.wanted()
        tokens = self._rule.next(now, present=present, needed=needed, most=most)
        if tokens is None and self._owes and now >= self._retry_at:
            tokens = present
        if tokens is not None:
            try:
                self._resize(tokens)
            except (MoefitError, OSError) as error:
                words = "the KV cache cannot change from %d to %d tokens now: %s"
                _LOG.warning(words, present, tokens, error)
                self._retry_at = now + RETRY_AFTER
                excessive += self._allow(self._scheduler.tokens)
        return [(name, self._excuse()) for name in dict.fromkeys(excessive)]

    def wait(self) -> float | None:
        """Return the seconds after which `adjust` has something to do; None for any time."""
        if self._costs is None:
            return None
        now = monotonic()
        wait = self._rule.wait(now, self._scheduler.tokens)
        if not self._owes:
            return wait
        again = max(0.0, self._retry_at - now)
        return again if wait is None else min(wait, again)

    def least_memory(self) -> int:
        """Return the smallest budget for the requests that run now. From any thread."""
        budget = self._served.budget
        if self._costs is None:
            return budget.min_bytes
        return self._costs.at(budget, self._least() or self._scheduler.tokens).min_bytes

    def set_memory(self, memory: str | int | None) -> MemoryBudget:
        """Change the budget; the cache gives back what is unused where that has no room for it.

        Raises:
            BudgetTooSmallError: See `ServedModel.set_memory`.
            ConfigError: Likewise.
            OSError: Likewise.
        """
        try:
            self._served.set_memory(memory)
        except BudgetTooSmallError as error:
            self._make_room(memory, error)
            self._served.set_memory(memory)
        fewest, most = self._least(), self.most()
        if fewest is not None and most < self._scheduler.tokens:
            try:
                self._resize(max(fewest, most))
            except (MoefitError, OSError) as error:  # the budget is in force all the same
                self._retry_at = monotonic() + RETRY_AFTER
                _LOG.warning("the KV cache cannot give back memory now: %s", error)
        return self._served.budget

    def close(self) -> None:
        """Give back what the cache has grown by, once no request runs."""
        if self._scheduler.tokens > self.base and not self._scheduler.reserved:
            try:
                self._resize(self.base)
            except (MoefitError, OSError, RuntimeError):  # such as of a model that is closed
                _LOG.exception("the KV cache of a closed engine could not be made smaller")

    def check(self) -> None:
        """Raise AssertionError if scheduler, cache and budget differ in size."""
        with self._sizing:
            tokens, budget = self._scheduler.tokens, self._served.budget
            if self._runner.prefixes is not None:
                assert self._runner.prefixes.places == tokens
            if self._costs is not None:
                assert isinstance(self._runner, VarlenRunner) and budget.context is not None
                assert tokens <= self._runner.cache.pool.held <= budget.context
                assert budget.context == tokens or self._owes
                assert budget.kv_cache == self._costs.at(budget, budget.context).kv_cache

    def _allow(self, most: int) -> list[str]:
        with self._changed:
            return list(self._scheduler.allow(most))

    def _least(self) -> int | None:
        """Return the fewest tokens that hold what running requests have reserved."""
        with self._changed:
            present, reserved = self._scheduler.tokens, self._scheduler.reserved
        return self._rule.least(present, reserved)

    def _resize(self, tokens: int) -> None:
        """Change the size. Raises MoefitError or OSError if it cannot grow, or slots cannot."""
        with self._sizing:
            self._resize_all(tokens)

    def _resize_all(self, tokens: int) -> None:
        assert self._costs is not None and isinstance(self._runner, VarlenRunner)
        before, costs, pool = self._scheduler.tokens, self._costs, self._runner.cache.pool

        def charge(number: int) -> None:
            self._served.change_budget(lambda budget: costs.at(budget, number))

        if tokens > (self._served.budget.context or 0):
            charge(tokens)
        self._owes = True
        try:
            self._runner.resize(tokens)
        finally:  # after an error it may have fewer places, or larger tensors than places
            with self._changed:
                self._scheduler.resize(pool.places.places)
            if pool.held < (self._served.budget.context or 0):
                charge(pool.held)
            self._owes = self._served.budget.context != self._scheduler.tokens
        if tokens != before:
            _LOG.info("the KV cache holds %d tokens, %d before", tokens, before)

    def _make_room(self, memory: str | int | None, error: BudgetTooSmallError) -> None:
        """Give back what is unused, if a budget that was too small is large enough then.

        Raises:
            BudgetTooSmallError: It is not, and nothing has changed.
            OSError: There is no memory to copy what is kept.
        """
        fewest, costs = self._least(), self._costs
        try:
            if fewest is None or costs is None or memory is None:
                raise error
            total = parse_bytes(memory)
            costs.at(self._served.budget, fewest).with_total(total).slots()
        except BudgetTooSmallError as small:
            if (fewest or self._scheduler.tokens) <= self.base:
                raise
            raise self._in_use(small) from small
        self._resize(fewest)

    def _limit(self) -> int:
        """Return the tokens that the cache may hold in any budget."""
        own = self._sizes.own or _UNKNOWN_LENGTH
        return self._settings.context_max or max(self.base, own * self._settings.max_concurrency)

    def _why(self, most: int) -> tuple[str, Callable[[int], str]]:
        """Return why a request has no more tokens than the cache, and what would allow more."""
        costs, budget, limit = self._costs, self._served.budget, self._settings.context_max
        if costs is None or budget.planned is not None:
            obstacle = self._obstacle or "the model is served by a plan"
            return f"the KV cache does not grow: {obstacle}", _context
        if limit is not None and most >= limit:
            words = f"--context-max {limit}" if limit > self.base else "the KV cache does not grow"
            return words, lambda wanted: f"a server with --context-max {wanted}"
        if budget.total is None:
            return "no more memory is free", _context
        spare, total = limit is None, budget.total
        size = format_bytes(budget.total)
        why = f"the budget of {size} has no room for more" + " beside half of the experts" * spare

        def remedy(wanted: int) -> str:
            least = costs.needed(budget, wanted, spare_experts=spare)
            fewest = costs.needed(budget, wanted, spare_experts=False)
            more = f", or with --context-max {wanted}" if fewest <= total else ""
            return f"a budget of {at_least(least)}{more}"

        return why, remedy

    def _excuse(self) -> str:
        """Return the error of a request that waited while the cache lost the room for it."""
        longest = self.longest()
        why = f" ({longest.why})" if longest.why else ""
        return (
            "the KV cache has no room for this request any more: it may hold "
            f"{self._scheduler.most:,} tokens now{why}; try again later, or with a shorter prompt "
            "or answer"
        )

    def _in_use(self, error: BudgetTooSmallError) -> BudgetTooSmallError:
        running = f"requests that run hold {self._scheduler.reserved:,} tokens of KV cache"
        return BudgetTooSmallError(
            f"{error}; {running}, of which {self.base:,} are reserved from the start, so that a "
            "smaller budget is possible once they have ended"
        )

    def _check(self) -> None:
        """Raise ConfigError if the settings ask for more than is possible."""
        limit, asked = self._settings.context_max, self._settings.max_model_len
        if limit is not None and limit < self.base:
            raise ConfigError(
                f"context_max={limit:,} is less than the {self.base:,} tokens of KV cache that are "
                f"reserved from the start (context); give {self.base:,} or more"
            )
        if limit is not None and limit > self.base and self._obstacle:
            raise ConfigError(
                f"context_max={limit:,}, but the KV cache of this server does not grow: "
                f"{self._obstacle}; load with a context of {limit:,} instead"
            )
        own, most = self._sizes.own, self.most()
        most = most if own is None else min(most, own)
        if asked is not None and asked > most:
            raise ConfigError(
                f"max_model_len={asked:,}, but model and KV cache hold {most:,} tokens; load with "
                f"a larger context or budget, or use {most:,} or less"
            )


def _context(wanted: int) -> str:
    return f"a server with --context {wanted}"


def _obstacle(served: ServedModel, runner: Runner, settings: EngineSettings) -> str:
    """Return why an engine's cache does not grow; empty if it does."""
    name = type(served.model).__name__
    if not isinstance(runner, VarlenRunner):
        return f"requests of {name} are computed one at a time, each with a cache of its own"
    if served.model.device.type != "cpu":
        return "the model is on a GPU"
    if served.budget.context is None:
        return "its size was not estimated"
    if served.budget.planned is not None:
        return "the model is served by a plan"
    if settings.deterministic and served.placement_budget.settings.precision == AUTO_PRECISION:
        return "--precision auto would change formats with it, and so other requests' answers"
    return ""


def _costs(
    served: ServedModel, runner: Runner, settings: EngineSettings, step: int
) -> ContextCosts:
    assert isinstance(runner, VarlenRunner)
    return context_costs(
        served.budget,
        served.model.config,
        served.model.dtype,
        replace(served.placement_budget.settings, step_tokens=step),
        place_bytes=runner.cache.pool.bytes_per_place,
        more=LOOKUP_BYTES if settings.speculate == "ngram" else 0,
    )
