"""A block's experts module, served: it takes the place of the family's own.

Owns what happens in one call: the family's choice is observed, in the bounded and virtual modes
changed towards what is resident, and computed by the invoker. Also when swaps begin and when they
are published: at step borders. Knows nothing of budgets or files.

Shapes: T tokens, D model width, E experts, K chosen per token.
"""

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait

import torch
from torch import Tensor, nn

from moefit.moe.families import MoeBlock
from moefit.moe.routing import Routing
from moefit.moe.scoring import ScoringRule
from moefit.quant.format import NATIVE, Format
from moefit.serve.cache.eviction import EvictionPolicy
from moefit.serve.cache.scores import ExpertImportanceEstimator
from moefit.serve.cache.slot import Slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.cache.swaps import SharedState, Swaps
from moefit.serve.config import Mode, Policy
from moefit.serve.io.loads import wait_for_load
from moefit.serve.layer.executor import ExpertInvoker
from moefit.serve.layer.rerouting import (
    ScoredRouting,
    mask_absent,
    rescale_weights,
    substitute_absent,
    substituted_mass,
)

LONG = 1024.0  # tokens after which what an expert's precision is chosen by counts half


class VirtualExperts(nn.Module):
    """One block's experts over slots. `scoring` None: only the exact mode is possible."""

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
        self.format: Format = NATIVE  # of slots to come
        self.first = False  # of the model's blocks
        self.block, self.shared, self.slot_table, self.slots = block, shared, slot_table, slots
        self.num_experts = block.num_experts
        self.eviction, self.importance = eviction, importance
        self.output_energy = ExpertImportanceEstimator(self.num_experts, half_life_tokens=LONG)
        self.scoring: ScoringRule | None = None
        self.bias_E: Tensor | None = None
        self.depth = 0.5  # among the model's blocks, from 0 to 1
        self.used = True  # the probe says otherwise of a block that text does not reach
        self.logits_TE: Tensor | None = None  # the router's hook leaves them here
        self.prefilling = False  # and the block's hook this
        self.recorder: Callable[[Routing], None] | None = None
        self._invoke = ExpertInvoker(block, slot_table, slots, shared.transfer, shared.counters)
        self.swaps = Swaps(block.name, shared, slot_table, slots)
        self.uses = [0] * (self.num_experts + 1)  # tokens by router's choice; the last is padding
        self._steps = 0

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        """What the family's own experts module takes and gives."""
        x_TD = x.reshape(-1, x.shape[-1])
        chosen = self.block.layout.routing(len(x_TD), *arguments)
        if self.recorder is not None:
            self.recorder(chosen)
            return torch.zeros_like(x)
        with self.shared.lock:
            return self._step(x_TD, chosen).view_as(x)

    def fill(self) -> None:
        """Begin to load the most important absent experts into empty slots."""
        self.swaps.fill(self.importance.scores(), self.spares_key)

    def _step(self, x_TD: Tensor, chosen: Routing) -> Tensor:
        policy = self.shared.policy
        if self.first and self.shared.on_step and policy.residency == "manager":
            self.shared.on_step()
        mode = self._mode(policy)
        needed = self._in_use(chosen) if mode != "virtual" else ()
        self.swaps.cancel(needed)  # the invoker reads at once what the background has not begun
        self.swaps.publish(wait_for=needed)
        if self.swaps and not self.slot_table.residents and not self.slot_table.empty:
            self.swaps.wait_for_first()  # every slot is being filled
        if policy.residency == "manager":
            self._observe(x_TD, chosen)
        routing = chosen if mode == "exact" else self._rerouted(mode, policy, chosen)
        before = set(self.slot_table.residents)
        try:
            y_TD = self._invoke(x_TD, routing)
        finally:
            if policy.residency == "fixed":
                self._restore(before)
        if policy.residency == "manager" and self._invoke.energy_R is not None:
            self._observe_outputs(routing, self._invoke.energy_R)
        self._steps += 1
        if (
            policy.residency == "manager"
            and mode == "virtual"
            and self.shared.manager.due(self._steps)
        ):
            self.swaps.begin(self.importance.scores(), self.spares_key)
        return y_TD

    def _mode(self, policy: Policy) -> Mode:
        """The mode of this step; while slots are empty, virtual fetches as exact does."""
        mode = policy.prefill if self.prefilling else policy.mode
        if self.scoring is None:  # of a tower that text does not reach; set_mode refuses others
            return "exact"
        fetches = mode == "virtual" and self.slot_table.empty and policy.residency != "fixed"
        return "exact" if fetches or not self.slot_table.residents else mode

    def _in_use(self, chosen: Routing) -> Collection[int]:
        return set(chosen.ids_TK.unique().tolist()) if self.swaps else ()

    def hold(self, experts: Collection[int]) -> None:
        """Make these the residents, as far as there are slots; others leave."""
        self.swaps.settle()
        for expert in set(self.slot_table.residents) - set(experts):
            self.slot_table.evict(expert)
        absent = [expert for expert in experts if expert not in self.slot_table.residents]
        self.load_all(absent[: self.slot_table.empty])

    def load_all(self, experts: Collection[int]) -> None:
        """Load absent experts into empty slots and wait for them; the readers share the work.

        Args:
            experts: No more of them than there are empty slots.

        Raises:
            CheckpointError: One cannot be read. Those that were read by then are resident.
        """
        coming: deque[tuple[int, Future[float]]] = deque()
        try:
            for expert in experts:
                slot = self.slot_table.reserve(expert, protected=self.slot_table.residents)
                assert slot is not None, "there is an empty one"
                load = self.shared.transfer.load(self.block.name, expert, self.slots[slot])
                coming.append((slot, load))
            while coming:
                wait_for_load(coming[0][1])
                self.slot_table.publish(coming.popleft()[0])
        except BaseException:
            for _, load in coming:  # those that have not begun, first
                load.cancel()
            for slot, load in coming:
                wait([load])
                self.slot_table.abandon(slot)
            raise

    def load_now(self, expert: int) -> None:
        """Bring an absent expert into an empty slot, and wait for it."""
        slot = self.slot_table.reserve(expert, protected=self.slot_table.residents)
        assert slot is not None, "there is an empty one"
        try:
            wait_for_load(self.shared.transfer.load(self.block.name, expert, self.slots[slot]))
        except BaseException:
            self.slot_table.abandon(slot)
            raise
        self.slot_table.publish(slot)

    def _observe(self, x_TD: Tensor, chosen: Routing) -> None:
        weights = _weight_by_expert(x_TD, chosen, self.num_experts)
        for expert in chosen.ids_TK.flatten().tolist() if len(x_TD) == 1 else ():
            self.uses[expert] += 1
        if len(x_TD) > 1:
            more = torch.bincount(chosen.ids_TK.flatten(), minlength=self.num_experts + 1).tolist()
            self.uses = [a + b for a, b in zip(self.uses, more, strict=True)]
        # Time counts per sequence, and a block sees only tokens; a batch of one is the usual case.
        tokens = len(x_TD) if self.prefilling else 1
        self.importance.observe(weights, tokens)
        self.eviction.observe(weights, tokens)

    def enable_stats(self) -> None:
        """Keep count of how much each expert adds to the output from now on (`output_energy`)."""
        self._invoke.collect_stats = True

    def _observe_outputs(self, routing: Routing, energy_R: Tensor) -> None:
        sums_E1 = torch.zeros(self.num_experts + 1)
        sums_E1.scatter_add_(0, routing.ids_TK.flatten().cpu(), energy_R.cpu())
        tokens = len(routing.ids_TK)
        sums = dict(enumerate(sums_E1[: self.num_experts].tolist()))
        self.output_energy.observe(sums, tokens if self.prefilling else 1)

    def _rerouted(self, mode: Mode, policy: Policy, chosen: Routing) -> Routing:
        assert self.scoring is not None, "set_policy() refuses other modes then"
        assert self.logits_TE is not None, "the router's hook has run"
        scored = ScoredRouting(
            rule=self.scoring,
            logits_TE=self.logits_TE.reshape(-1, self.num_experts),
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
            asked, answering = (set(one.ids_TK.unique().tolist()) for one in (chosen, routing))
            self.shared.counters.substitutions += len(asked - answering)
        self.shared.counters.routed += 1
        return routing

    def _restore(self, before: set[int]) -> None:
        """The resident set as it was before the step."""
        for expert in set(self.slot_table.residents) - before:
            self.slot_table.evict(expert)
        for expert in sorted(before - set(self.slot_table.residents)):
            self.load_now(expert)

    @property
    def spares_key(self) -> tuple[str, int]:
        """Which spares are for its swaps."""
        return self.format.name, self.block_slot_bytes

    @property
    def block_slot_bytes(self) -> int:
        """Bytes of a slot of this block as it is new."""
        return self.format.nbytes(self.block.layout.specs)


def _weight_by_expert(x_TD: Tensor, chosen: Routing, num_experts: int) -> dict[int, float]:
    """Per chosen expert, the sum over tokens of |x| * weight."""
    ids, weights_TK = chosen.ids_TK, chosen.weights_TK
    if len(x_TD) == 1:
        weights: dict[int, float] = {}
        norm = float(x_TD.norm(dtype=torch.float32))
        for expert, weight in zip(ids[0].tolist(), weights_TK[0].tolist(), strict=True):
            if expert < num_experts:
                weights[expert] = weights.get(expert, 0.0) + norm * abs(weight)
        return weights
    norms_T1 = x_TD.float().norm(dim=-1, keepdim=True)
    weighted_TK = weights_TK.float().abs() * norms_T1
    sums_E1 = torch.zeros(num_experts + 1, device=ids.device)
    sums_E1.scatter_add_(0, ids.flatten(), weighted_TK.flatten())
    sums = sums_E1[:num_experts].tolist()
    used = set(ids.unique().tolist())
    return {expert: sums[expert] for expert in used if expert < num_experts}
