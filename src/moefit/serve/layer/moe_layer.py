"""The served experts module of one MoE block; replaces the family's own module.

`VirtualExperts` takes and returns what the family's experts module does. In each step it observes
the router's choice, reroutes it to resident experts in the bounded and virtual modes, and computes
it with the `ExpertInvoker`. It starts and publishes swaps at step borders.

Shapes: T tokens, D model width, E experts, K chosen per token, R = T * K rows.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moefit.graphs import outside_of_graphs
from moefit.moe.families import MoeBlock
from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule
from moefit.quant.format import NATIVE, Format, slot_kind
from moefit.quant.layers.decoder_layers import ExpertAddresses
from moefit.serve.cache.eviction import EvictionPolicy
from moefit.serve.cache.scores import ExpertImportanceEstimator
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.cache.swaps import SharedState, StepWatcher, Swaps
from moefit.serve.config import Mode, Policy
from moefit.serve.hybrid.host_experts import HostExperts
from moefit.serve.io.loads import wait_for_load
from moefit.serve.layer.executor import ExpertInvoker, StepLoads
from moefit.serve.layer.rerouting import (
    ScoredRouting,
    mask_absent,
    rescale_weights,
    substitute_absent,
    substituted_mass,
)

SENSITIVITY_HALF_LIFE = 1024.0  # tokens; half-life of the scores that precision is chosen by


@dataclass(slots=True)
class StepState:
    """State of a step in one block; a plain object, since attributes of modules are slow to set.

    Attributes:
        logits_TE: The router's logits, set by the router's hook.
        prefilling: Whether the step has more than one token per sequence, set by a hook.
        number: Steps computed so far.
        begun: Whether the present step has begun (`begin_step`).
    """

    logits_TE: Tensor | None = None
    prefilling: bool = False
    number: int = 0
    begun: bool = False


class VirtualExperts(nn.Module):
    """The experts of one MoE block, computed from slots.

    Attributes:
        format: Format of newly allocated slots.
        scoring: The router's scoring rule; None if unknown, then only exact mode is possible.
        router: Name of the module that outputs the logits, None if unknown.
        bias_E: Bias that the router adds to the scores for its choice, if any.
        resident_order: All experts in the order in which virtual mode holds them, if the model was
            trained for one (`expert_dropout` in config.json).
        depth: Position among the model's blocks, 0 to 1.
        index: Position among the model's blocks; `SharedState.on_step` runs in the first.
        reachable: False for a block that text never reaches, such as one of a vision tower.
        state: Of the step.
        recorder: If set, `forward` passes the routing to it and returns zeros.
        use_counts: Tokens per expert by the router's choice; the last entry is padding.
    """

    def __init__(
        self,
        block: MoeBlock,
        shared: SharedState,
        slot_table: SlotTable,
        slots: dict[int, Slot],
        eviction: EvictionPolicy,
        importance: ExpertImportanceEstimator,
    ):
        super().__init__()
        self.format: Format = NATIVE
        self.index = 0
        self.block, self.shared, self.slot_table, self.slots = block, shared, slot_table, slots
        self.num_experts = block.num_experts
        self.eviction, self.importance = eviction, importance
        self.output_energy = ExpertImportanceEstimator(
            self.num_experts, half_life_tokens=SENSITIVITY_HALF_LIFE
        )
        self.scoring: ScoringRule | None = None
        self.bias_E: Tensor | None = None
        self.router: str | None = None
        self.resident_order: Sequence[int] | None = None
        self.depth = 0.5
        self.reachable = True
        self.state = StepState()
        self.recorder: Callable[[Routing], None] | None = None
        self.swaps = Swaps(block.name, shared, slot_table, slots)
        self._invoke = ExpertInvoker(
            block, slot_table, slots, shared.transfer, shared.counters, self.swaps.take
        )
        self.use_counts = [0] * (self.num_experts + 1)

    @outside_of_graphs  # it waits for loads
    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        """Compute the experts; arguments and result are those of the family's own module."""
        x_TD = x.reshape(-1, x.shape[-1])
        return self.compute(x_TD, self.block.layout.routing(len(x_TD), *arguments)).view_as(x)

    def compute(self, x_TD: Tensor, chosen: Routing) -> Tensor:
        """Compute the experts for a router's choice; `state` must be that of the step."""
        if self.recorder is not None:
            self.recorder(chosen)
            return torch.zeros_like(x_TD)
        with self.shared.lock:
            return self._step(x_TD, chosen)

    def addresses(self, *, prefilling: bool) -> ExpertAddresses | None:
        """Return the residents for a call that computes whole layers; the caller holds the lock.

        Args:
            prefilling: Whether the step has more than one token per sequence.

        Returns:
            None where a step may do more than fetch and compute the experts of the router's choice.
        """
        self.state.prefilling = prefilling
        policy = self.shared.policy
        if (
            self.recorder is not None
            or self.shared.watcher is not None
            or self._invoke.collect_stats
            or self.swaps
            or self.swaps.guessed
            or policy.mode != "exact"
            or self._step_mode(policy) != "exact"
        ):
            return None
        return self._invoke.addresses()

    def begin_loads(self, ids: Sequence[int]) -> StepLoads | None:
        """Begin to load absent experts for a call that computes whole layers; see `addresses`.

        Args:
            ids: The chosen expert of each row.

        Returns:
            None where the block must be computed by itself.
        """
        fixed = self.shared.policy.residency == "fixed"
        return None if fixed else self._invoke.begin_loads(ids)

    def compute_in_host(self, host: HostExperts | None) -> None:
        """Compute part of the misses in host memory from now on, or none; hold the lock."""
        self._invoke.host = host

    def unused_slot(self) -> Slot | None:
        """Return an empty slot, or a spare one, whose content nothing depends on."""
        if self.slot_table.empty:
            return self.slots[next(iter(self.slot_table.empty_slots))]
        return next(iter(self.shared.spares.get(self.spares_key, ())), None)

    def begin_step(self) -> None:
        """Do what comes before each step of the model's first block; the caller holds the lock."""
        if self.index or self.state.begun:
            return
        self.state.begun = True
        if self.shared.on_step and self.shared.policy.residency == "manager":
            self.shared.on_step()

    def computed(
        self,
        ids: Sequence[int],
        shares: Sequence[float],
        tokens: int,
        logits_TE: Tensor,
        fetched: int = 0,
    ) -> None:
        """Observe a step whose experts have been computed by a call for whole layers.

        Args:
            ids: The chosen expert of each row.
            shares: Sum over tokens of |x| * |weight| for each expert.
            tokens: T.
            logits_TE: The router's logits.
            fetched: How many of the experts were absent at first.
        """
        chosen = set(ids)
        self.state.logits_TE = logits_TE
        self.shared.counters.hits += len(chosen) - fetched
        if self.shared.policy.residency == "manager":
            for expert in ids:
                self.use_counts[expert] += 1
            self._observe_weights({one: shares[one] for one in chosen}, tokens)
        self.state.number += 1
        self.state.begun = False

    def fill(self) -> None:
        """Start loading absent experts into empty slots: the first, or the most important ones."""
        self.swaps.fill(self._fill_scores(), self.spares_key)

    def counts(self) -> list[float]:
        """Return how many tokens used each expert."""
        return list(map(float, self.use_counts[: self.num_experts]))

    def warm_start(self, counts: Sequence[float]) -> None:
        """Start loading the experts of the highest counts into empty slots.

        Blocks that were trained for an order of experts keep it.
        """
        if self.resident_order is not None or not self.slot_table.empty:
            return
        used = {expert: count for expert, count in enumerate(counts) if count > 0}
        best = sorted(used, key=lambda one: (-used[one], one))[: self.slot_table.num_slots]
        # At most 1, which is little beside a token's |x| * weight: present use soon prevails.
        shares = {expert: count / max(used.values()) for expert, count in used.items()}
        self.importance.observe(shares)
        self.eviction.observe({expert: shares[expert] for expert in best})
        self.fill()

    def _fill_scores(self) -> list[float]:
        if self.resident_order is None or self.shared.policy.mode != "virtual":
            return self.importance.scores()
        scores = [0.0] * self.num_experts
        for place, expert in enumerate(self.resident_order):
            scores[expert] = float(self.num_experts - place)
        return scores

    def hold_first(self) -> None:
        """Make the first experts of `resident_order` resident, as many as there are slots."""
        if self.resident_order is not None:
            self.set_residents(self.resident_order[: self.slot_table.num_slots])

    def _step(self, x_TD: Tensor, chosen: Routing) -> Tensor:
        self.begin_step()
        policy = self.shared.policy
        mode = self._step_mode(policy)
        watcher = self._watcher(mode, policy)
        self._end_background_loads(mode, chosen)
        if self.swaps and not self.slot_table.residents and not self.slot_table.empty:
            self.swaps.wait_for_first()  # every slot is being filled
        if policy.residency == "manager":
            self._observe(x_TD, chosen)
        routing = chosen if mode == "exact" else self._reroute(mode, policy, chosen)
        residents = set(self.slot_table.residents)
        if watcher is not None:
            watcher.chosen(self.index, chosen)
            self._invoke.when_read = partial(watcher.read, self.index, x_TD)
        try:
            y_TD = self._sum_of_experts(x_TD, routing)
        finally:
            self._invoke.when_read = None
            if policy.residency == "fixed":
                self._restore(residents)
        if policy.residency == "manager" and self._invoke.output_energy_R is not None:
            self._observe_outputs(routing, self._invoke.output_energy_R)
        self.state.number += 1
        self.state.begun = False
        if watcher is not None:
            watcher.computed(self.index)
        if (
            policy.residency == "manager"
            and mode == "virtual"
            and self.shared.manager.due(self.state.number)
        ):
            self.swaps.begin(self.importance.scores(), self.spares_key)
        return y_TD

    def _watcher(self, mode: Mode, policy: Policy) -> StepWatcher | None:
        """Return who follows this step: nobody in modes that do not fetch, and in evaluations."""
        exact = mode == policy.mode == "exact"
        return self.shared.watcher if exact and policy.residency == "manager" else None

    def _end_background_loads(self, mode: Mode, chosen: Routing) -> None:
        """Publish, cancel or wait for loads in the background, before a step uses residents.

        In exact mode the invoker takes over those that the step needs, and in virtual mode no step
        waits for one.
        """
        if not self.swaps and not self.swaps.guessed:
            return
        needed = () if mode == "virtual" else self._chosen_experts(chosen)
        self.swaps.end_guesses(needed)
        self.swaps.cancel(needed)  # the invoker loads these itself
        self.swaps.publish(wait_for=needed if mode == "bounded" else ())

    def _sum_of_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum over a token's experts."""
        if not self.block.weighs_inputs:
            return self._invoke(x_TD, routing)
        num_choices = routing.ids_TK.shape[1]
        weights_R1 = routing.weights_TK.reshape(-1, 1).type_as(x_TD)
        x_RD = x_TD.repeat_interleave(num_choices, dim=0) * weights_R1
        y_RD = self._invoke(
            x_RD, Routing(routing.ids_TK.reshape(-1, 1), torch.ones_like(weights_R1))
        )
        return y_RD.view(len(x_TD), num_choices, -1).sum(1)

    def _step_mode(self, policy: Policy) -> Mode:
        """Return the mode of this step; virtual is exact while there are empty slots to fill."""
        mode = policy.prefill if self.state.prefilling else policy.mode
        if self.scoring is None:  # only unreachable blocks; set_mode raises for others
            return "exact"
        fetches = mode == "virtual" and self.slot_table.empty and policy.residency != "fixed"
        return "exact" if fetches or not self.slot_table.residents else mode

    @staticmethod
    def _chosen_experts(routing: Routing) -> set[int]:
        return set(routing.ids_TK.unique().tolist())

    def set_residents(self, experts: Collection[int]) -> None:
        """Evict all other experts and load these, as far as there are slots."""
        self.swaps.settle()
        for expert in set(self.slot_table.residents) - set(experts):
            self.slot_table.evict(expert)
        absent = [expert for expert in experts if expert not in self.slot_table.residents]
        self.load_all(absent[: self.slot_table.empty])

    def load_all(self, experts: Collection[int]) -> None:
        """Load absent experts into empty slots, in parallel, and wait for them.

        Args:
            experts: At most as many as there are empty slots.

        Raises:
            CheckpointError: An expert cannot be read. Experts loaded before it stay resident.
        """
        pending: deque[tuple[int, Future[float]]] = deque()
        try:
            for expert in experts:
                slot = self.slot_table.reserve(expert, protected=self.slot_table.residents)
                assert slot is not None, "no empty slot"
                load = self.shared.transfer.load(self.block.name, expert, self.slots[slot])
                pending.append((slot, load))
            while pending:
                wait_for_load(pending[0][1])
                self.slot_table.publish(pending.popleft()[0])
        except BaseException:
            for _, load in pending:  # before waiting, so that none starts meanwhile
                load.cancel()
            for slot, load in pending:
                wait([load])
                self.slot_table.abandon(slot)
            raise

    def _observe(self, x_TD: Tensor, chosen: Routing) -> None:
        """Update importance, eviction and use counts with the router's choice."""
        weights = _weight_by_expert(x_TD, chosen, self.num_experts)
        ids_R = chosen.ids_TK.flatten()
        if len(x_TD) == 1:  # faster than a bincount
            for expert in ids_R.tolist():
                self.use_counts[expert] += 1
        else:
            counts = torch.bincount(ids_R, minlength=self.num_experts + 1).tolist()
            self.use_counts = [a + b for a, b in zip(self.use_counts, counts, strict=True)]
        self._observe_weights(weights, len(x_TD))

    def _observe_weights(self, weights: Mapping[int, float], rows: int) -> None:
        # Scores decay per token of a sequence. How many sequences the rows belong to is not known
        # here; decoding counts as one token, which is exact for one token per sequence.
        tokens = rows if self.state.prefilling else 1
        self.importance.observe(weights, tokens)
        self.eviction.observe(weights, tokens)

    def enable_stats(self) -> None:
        """Start to accumulate each expert's contribution to the output in `output_energy`."""
        self._invoke.collect_stats = True

    def reset_stats(self) -> None:
        """Forget `output_energy`, and stop to accumulate it."""
        self._invoke.collect_stats, self._invoke.output_energy_R = False, None
        self.output_energy = ExpertImportanceEstimator(
            self.num_experts, half_life_tokens=SENSITIVITY_HALF_LIFE
        )

    def _observe_outputs(self, routing: Routing, output_energy_R: Tensor) -> None:
        energy_E1 = torch.zeros(self.num_experts + 1)  # the last entry is padding
        energy_E1.scatter_add_(0, routing.ids_TK.flatten().cpu(), output_energy_R.cpu())
        energy = dict(enumerate(energy_E1[: self.num_experts].tolist()))
        self.output_energy.observe(energy, len(routing.ids_TK) if self.state.prefilling else 1)

    def _reroute(self, mode: Mode, policy: Policy, chosen: Routing) -> Routing:
        """Return the routing of the bounded or virtual mode, and count what it substitutes."""
        assert self.scoring is not None, "only exact mode without a scoring rule"
        assert self.state.logits_TE is not None, "the router's hook has not run"
        scored = ScoredRouting(
            rule=self.scoring,
            logits_TE=self.state.logits_TE.reshape(-1, self.num_experts),
            bias_E=self.bias_E,
            routing=chosen,
        )
        resident_E = torch.zeros(self.num_experts, dtype=torch.bool, device=chosen.ids_TK.device)
        resident_E[list(self.slot_table.residents)] = True
        if mode == "virtual":
            routing = mask_absent(scored, resident_E)
        else:
            bound = policy.bound_at(self.depth)
            routing = substitute_absent(scored, resident_E, bound=bound, protected=policy.protected)
        if policy.keep_mass:
            routing = rescale_weights(chosen, routing)
        if routing is not chosen:
            self.shared.counters.substituted += substituted_mass(chosen, routing)
            replaced = self._chosen_experts(chosen) - self._chosen_experts(routing)
            self.shared.counters.substitutions += len(replaced)
        self.shared.counters.routed += 1
        return routing

    def _restore(self, residents: set[int]) -> None:
        """Undo the step's changes of the resident set."""
        for expert in set(self.slot_table.residents) - residents:
            self.slot_table.evict(expert)
        self.load_all(sorted(residents - set(self.slot_table.residents)))

    @property
    def spares_key(self) -> tuple[str, int]:
        """Return the key of the spare slots for this block's swaps (kind, slot bytes)."""
        return slot_kind(self.format, self.block.layout.specs), self.block_slot_bytes

    @property
    def block_slot_bytes(self) -> int:
        """Return the bytes of a newly allocated slot of this block."""
        return self.format.nbytes(self.block.layout.specs)


def _weight_by_expert(x_TD: Tensor, chosen: Routing, num_experts: int) -> dict[int, float]:
    """Return the sum over tokens of |x| * |router weight| for each chosen expert."""
    ids_TK, weights_TK = chosen.ids_TK, chosen.weights_TK
    if len(x_TD) == 1:
        weights: dict[int, float] = {}
        norm = float(torch.linalg.vector_norm(x_TD.detach(), dtype=torch.float32))
        for expert, weight in zip(ids_TK[0].tolist(), weights_TK[0].tolist(), strict=True):
            if expert < num_experts:
                weights[expert] = weights.get(expert, 0.0) + norm * abs(weight)
        return weights
    norms_T1 = x_TD.float().norm(dim=-1, keepdim=True)
    weighted_TK = weights_TK.float().abs() * norms_T1
    sums_E1 = torch.zeros(num_experts + 1, device=ids_TK.device)
    sums_E1.scatter_add_(0, ids_TK.flatten(), weighted_TK.flatten())
    sums = sums_E1[:num_experts].tolist()
    chosen_experts = set(ids_TK.unique().tolist())
    return {expert: sums[expert] for expert in chosen_experts if expert < num_experts}
