"""Compute part of a layer's missing experts in host memory, while others are fetched (MoNDE).

`HostSide` is one per model: the host cache, the costs of both sides, the rule that divides misses,
and the thread that computes. `HostExperts` is one per block. Misses that lie in host memory are
divided by their tokens, for each layer and step: the hottest are fetched, the others are computed
where they lie and do not enter slots. Their inputs and outputs move instead of their weights.
Misses that host memory does not hold are fetched, since reading them is what costs.

Shapes: T tokens, D model width, K chosen per token, R routed rows.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moefit.moe.families import MoeBlock
from moefit.serve.cache.host_cache import HeldExpert, HostCache
from moefit.serve.cache.slot import Slot
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.rules import Rule
from moefit.serve.io.device_copy import CopyEngine
from moefit.serve.layer.expert_executor import ExpertExecutor

_TOGETHER = 8  # experts computed in one call, after which a cancelled step ends

Rows = Sequence[int] | Tensor
"""Rows of the flattened choice."""


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What a step wants of one block.

    Attributes:
        x_TD: Inputs.
        rows: By expert, its rows of the flattened choice.
        num_choices: K, the number of experts per token.
        y_RD: Unweighted outputs, one row per choice, to be written.
    """

    x_TD: Tensor
    rows: Mapping[int, Rows]
    num_choices: int
    y_RD: Tensor


class HostSide:
    """What all blocks share. Call `close` at the end.

    Args:
        cache: Experts in host memory.
        engine: Copies between host memory and the device.
        costs: Of an expert on each side.
        rule: Divides misses.
    """

    def __init__(self, cache: HostCache, engine: CopyEngine, costs: Costs, rule: Rule):
        costs.check()
        self.cache, self.engine, self.costs, self.rule = cache, engine, costs, rule
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moefit-host-experts")

    def submit(self, work: "HostWork", ordered: AbstractContextManager[None]) -> Future[Tensor]:
        """Start computing on the thread."""
        return self._thread.submit(work.compute, ordered)

    def close(self) -> None:
        """End the thread, after the work in progress."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class HostExperts:
    """The experts of one block in host memory.

    Args:
        block: The MoE block.
        side: What blocks share.
        scores: Of experts, by recent use; among equally many tokens the best are fetched.
    """

    def __init__(self, block: MoeBlock, side: HostSide, scores: Mapping[int, float]):
        self._block, self._side, self._scores = block, side, scores
        self._executor = ExpertExecutor(block.layout, torch.device("cpu"))

    def begin(
        self,
        demand: Demand,
        absent: Sequence[int],
        slots: Mapping[int, Slot],
        *,
        loading: bool = False,
    ) -> tuple[list[int], "HostWork | None"]:
        """Divide the misses of a step, and start computing those that are not fetched.

        Args:
            demand: Of the step.
            absent: Its misses.
            slots: The block's slots, which all have one format where misses are divided.
            loading: Whether other experts of the step are being loaded already.

        Returns:
            The experts to fetch, in that order, and the work on the others; end it in any case.
        """
        like = next(iter(slots.values()), None)
        if like is None or any(slot.format != like.format for slot in slots.values()):
            return list(absent), None
        cache, name = self._side.cache, self._block.name
        there = self._hottest_first(
            demand, [one for one in absent if cache.has(name, one, like.format)]
        )
        number = self._fetched(demand, there)
        # What is loaded passes through host memory, so it needs a buffer before this work ends.
        most = cache.holdable(like.nbytes)
        if loading or number or len(there) < len(absent):
            number = max(number, len(there) - most)
        held = self._held(there[number:], like)
        while len(held) > most and len(held) < len(absent):  # one was evicted in the meantime
            cache.release(held.pop(next(iter(held))))
        work = HostWork(self._side, self._executor, demand, held)
        fetched = [one for one in absent if one not in there]  # from storage, which takes longest
        fetched += [one for one in there if one not in work.experts]
        if not work.experts:
            return fetched, None
        work.start()
        return fetched, work

    def _held(self, experts: Sequence[int], like: Slot) -> dict[int, HeldExpert]:
        """Keep experts in host memory, and return those that are still there."""
        cache, held = self._side.cache, dict[int, HeldExpert]()
        try:
            for expert in experts:
                one = cache.hold(self._block.name, expert, like)
                if one is not None:
                    held[expert] = one
        except BaseException:
            for one in held.values():
                cache.release(one)
            raise
        return held

    def _hottest_first(self, demand: Demand, experts: Sequence[int]) -> list[int]:
        scores = self._scores
        return sorted(experts, key=lambda one: (-len(demand.rows[one]), -scores.get(one, 0.0), one))

    def _fetched(self, demand: Demand, there: Sequence[int]) -> int:
        """Return how many of the misses in host memory are fetched, the first ones."""
        tokens = [len(demand.rows[one]) for one in there]
        others = [len(rows) for one, rows in demand.rows.items() if one not in there]
        return self._side.rule(self._side.costs, tokens, others)


@dataclass(slots=True, eq=False)
class HostWork:
    """Experts of one step that are being computed in host memory.

    Attributes:
        side: Where.
        executor: Of the host.
        demand: Of the step.
        held: The experts; they stay in host memory until `end`.
    """

    side: HostSide
    executor: ExpertExecutor
    demand: Demand
    held: Mapping[int, HeldExpert]
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _done: Future[Tensor] | None = None
    _inputs: tuple[Tensor, int] = (torch.empty(0), 1)
    _ended: bool = False

    @property
    def experts(self) -> Mapping[int, HeldExpert]:
        """The experts that are computed here."""
        return self.held

    def start(self) -> None:
        """Start; call this on the thread that requested the computation of the inputs."""
        try:
            self._inputs = self._gathered()  # before `ordered`, which copies wait for
            self._done = self.side.submit(self, self.side.engine.ordered())
        except BaseException:
            self.end()
            raise

    def compute(self, ordered: AbstractContextManager[None]) -> Tensor:
        """Return the outputs of all rows, expert by expert, in host memory."""
        demand, (x_RD, choices) = self.demand, self._inputs
        with torch.inference_mode():
            with ordered:
                x_RD = self.side.engine.to_host(x_RD)
            sizes = [len(demand.rows[one]) for one in self.held]
            rows = torch.arange(sum(sizes)).split(sizes)
            y_RD = torch.empty(sum(sizes), x_RD.shape[1], dtype=demand.y_RD.dtype)
            batch = [(one.slot, mine) for one, mine in zip(self.held.values(), rows, strict=True)]
            for at in range(0, len(batch), _TOGETHER):
                if self._cancelled.is_set():
                    break
                self.executor.outputs(x_RD, batch[at : at + _TOGETHER], choices, y_RD)
        return y_RD

    def _gathered(self) -> tuple[Tensor, int]:
        """Return inputs and how many rows have each: the one token, or a row for each choice."""
        demand = self.demand
        if len(demand.x_TD) == 1:
            return demand.x_TD, sum(len(demand.rows[one]) for one in self.held)
        return demand.x_TD[self._rows() // demand.num_choices], 1

    def _rows(self) -> Tensor:
        """Return the rows of all experts, one after the other."""
        device = self.demand.y_RD.device
        return torch.cat(
            [torch.as_tensor(self.demand.rows[one], device=device) for one in self.held]
        )

    def collect(self, y_RD: Tensor) -> None:
        """Wait, and write the outputs into their rows. Raises what the computation raised."""
        assert self._done is not None
        made_RD = self._done.result()
        y_RD[self._rows()] = self.side.engine.to_device(made_RD)

    def cancel(self) -> None:
        """Compute no further expert."""
        self._cancelled.set()
        if self._done is not None:
            self._done.cancel()

    def end(self) -> None:
        """Cancel, wait, and let the experts be evicted again. May be called repeatedly.

        On return nothing reads host memory any more, even after KeyboardInterrupt.
        """
        self.cancel()
        try:
            if self._done is not None:
                wait([self._done])
        finally:
            while self._done is not None and not self._done.done():
                with suppress(KeyboardInterrupt):  # the first one is being raised already
                    wait([self._done])
            if not self._ended:
                self._ended = True
                for held in self.held.values():
                    self.side.cache.release(held)
