"""A model being served inside a memory budget.

Owns what a user does with it: the Hugging Face model and its tokenizer, the budget and the modes
while it runs, the report. Every change takes the lock that a block's step holds, so that a step
never sees half of one. Knows nothing of how experts are found or read.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from moefit.errors import ConfigError, UnsupportedModelError
from moefit.serve.cache.resize import apply_placement, resize
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.config import BlockPlacement, Mode, Placement, Policy
from moefit.serve.hf.attention import use_kernels
from moefit.serve.hf.guards import guard
from moefit.serve.hf.kv_cache import limit_context, reserve_caches
from moefit.serve.memory.budget import MemoryBudget, parse_bytes
from moefit.serve.memory.estimate import check_system_memory
from moefit.serve.precision.upgrades import Upgrades
from moefit.serve.report import BlockView, ServedParts, report_of, view_of


class ServedModel:
    """What `moefit.load` gives; also `model, tokenizer = moefit.load(...)`.

    Thread-safe: budget, mode and report from any thread, `generate` from one at a time.
    """

    def __init__(self, parts: ServedParts):
        self._parts = parts
        self.folder, self.model, self._tokenizer = parts.folder, parts.model, parts.tokenizer
        self.blocks, self._budget = parts.blocks, parts.budget
        self._store, self._host_cache, self._shared = parts.store, parts.host_cache, parts.shared
        self.placement_budget, self.generation = parts.placement_budget, parts.generation
        self._upgrades: Upgrades | None = None
        guard(self.model, self.blocks)
        self._hooks = (
            *parts.hooks,
            limit_context(self.model, self._context),
            reserve_caches(self.model, self._context),
        )
        self._undo_attention = use_kernels(self.model)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ConfigError if its folder has none, or a damaged one."""
        if isinstance(self._tokenizer, str):
            raise ConfigError(self._tokenizer)
        return self._tokenizer

    @property
    def budget(self) -> MemoryBudget:
        """The ledger in force."""
        return self._budget

    @property
    def policy(self) -> Policy:
        """What happens on a miss, in force."""
        return self._shared.policy

    @property
    def loads_failing(self) -> bool:
        """Whether experts cannot be read now; unlike `report()`, waits for no step."""
        return self._shared.transfer.failures.failing

    def _context(self) -> int | None:
        """The most tokens that a step may hold; without a budget there is no limit."""
        budget = self._budget  # another one may take its place meanwhile
        return None if budget.total is None else budget.context

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return self.model.generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def set_memory(self, memory: str | int | None) -> MemoryBudget:
        """Serve inside this budget from now on; returns the new ledger.

        Shrinking evicts and gives memory back before this returns; growing fills new slots in the
        background, unless residents are fixed: then they are all there when this returns.
        A placement that does not fit is forgotten: blocks have equal shares in the largest format
        of each from then on. `set_placement` gives another.
        Raises BudgetTooSmallError, ConfigError for more than the machine or the control group has,
        or OSError where the system has no such memory; everything is then as it was.
        """
        total = None if memory is None else parse_bytes(memory)
        with self._shared.lock:  # also while it is reckoned from the one in force
            return self._set_total(total)

    def _set_total(self, total: int | None) -> MemoryBudget:
        budget = self._budget.with_total(total)
        counts = budget.slots()
        check_system_memory(budget, self.model.device)
        if self._budget.planned is not None and budget.planned is None:
            alike = {
                name: BlockPlacement(slots=count, formats=(experts.format.name,))
                for (name, experts), count in zip(self.blocks.items(), counts, strict=True)
            }
            self._take(alike, budget, self.policy, placed=False)
            return budget
        with self._still():
            try:
                if self._upgrades:
                    self._upgrades.set_capacity(
                        min(budget.remaining_bytes(), self._upgrades.capacity)
                    )
                for name in resize(self.blocks, counts, self.model.device):
                    self.blocks[name].fill()
                self._budget = budget
            finally:
                if self._upgrades:
                    self._upgrades.set_capacity(self._budget.remaining_bytes())
        return budget

    def set_placement(
        self,
        placement: Placement,
        *,
        memory: str | int | None,
        mode: Mode = "exact",
        manager: VirtualExpertManager | None = None,
        **settings: Any,
    ) -> MemoryBudget:
        """Serve so within this budget from now on, as `moefit.load(placement=...)` would.

        Experts that are in memory in the wanted format stay; the others come in the background,
        and what is needed before is fetched. manager: of the virtual mode; None is the one in
        force. settings: of `Policy`, as `set_mode` takes them.
        Raises BudgetTooSmallError if it does not fit, ConfigError or UnsupportedModelError for what
        cannot be, OSError where the system has no such memory; all is then as it was, but experts
        may have to come again.
        """
        self.checked_policy(mode, **settings)  # refuses before the ledger is made, which takes long
        total = None if memory is None else parse_bytes(memory)
        budget = self.placement_budget.budget(placement, total)
        budget.slots()  # refuses what does not fit
        with self._shared.lock:
            policy = self.checked_policy(mode, **settings)
            self._take(placement, budget, policy, placed=True)
            self._shared.manager = manager or self._shared.manager
        return budget

    def _take(
        self, placement: Placement, budget: MemoryBudget, policy: Policy, *, placed: bool
    ) -> None:
        """Give blocks these slots, and begin to fill them; placed as of `allocate_spares`."""
        with self._still():
            try:
                spares = self._shared.spares
                apply_placement(self.blocks, spares, placement, self.model.device, placed=placed)
                self._budget, self._shared.policy = budget, policy
            finally:
                for experts in self.blocks.values():
                    experts.fill()

    @contextmanager
    def _still(self) -> Iterator[None]:
        """No step and no swap is under way within; what was to be loaded is, in the end."""
        with self._shared.lock:
            self._shared.transfer.settle()  # slots may go that work in a GPU's queue still reads
            unfilled = [experts for experts in self.blocks.values() if experts.swaps]
            for experts in unfilled:
                experts.swaps.cancel()
            try:
                self._settle()
                yield
            finally:
                for experts in unfilled:
                    experts.fill()
            if self.policy.residency == "fixed":
                self._settle()

    def start_upgrades(
        self, upgrades: Upgrades, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Give each expert its own precision from now on; loads all experts if all have slots.

        progress hears how many experts of how many have come.
        """
        with self._shared.lock:
            self._upgrades, self._shared.on_step = upgrades, upgrades.step
            upgrades.set_capacity(self._budget.remaining_bytes())
            if all(one.slot_table.num_slots == one.num_experts for one in self.blocks.values()):
                upgrades.fill(progress)

    def settle_precision(self) -> None:
        """Carry changes of precision out now that would else follow in the background."""
        with self._shared.lock:
            if self._upgrades:
                self._upgrades.settle()

    def set_mode(self, mode: Mode, **settings: Any) -> Policy:
        """Change the mode, and any other setting of `Policy`, from the next step on.

        `prefill` follows the mode unless given (`Policy.changed`).
        Raises ConfigError for an unknown setting or value, UnsupportedModelError if the family's
        routing rule is not known, so that nothing but exact is possible.
        """
        with self._shared.lock:  # also while it is made of the one in force, or changes are lost
            policy = self.checked_policy(mode, **settings)
            if policy.residency == "fixed":
                self._settle()
            self._shared.policy = policy
        return policy

    def checked_policy(self, mode: Mode, **settings: Any) -> Policy:
        """The policy that `set_mode` would put in force; changes nothing. Raises what it does."""
        policy = self._shared.policy.changed(mode, **settings)
        unknown = [
            name for name, one in self.blocks.items() if one.scoring is None and one.reachable
        ]
        if unknown and {policy.mode, policy.prefill} != {"exact"}:
            raise UnsupportedModelError(
                f"mode {mode} changes routing, but how {type(self.model).__name__}'s router makes "
                f"weights of scores was not recognised in {len(unknown)} of {len(self.blocks)} "
                f"blocks ({unknown[0]}); mode exact works"
            )
        return policy

    def set_residents(self, residents: Mapping[str, Collection[int]]) -> None:
        """Hold just these experts, by block name, as far as there are slots."""
        with self._shared.lock:
            self._shared.transfer.settle()
            for name, experts in residents.items():
                self.blocks[name].set_residents(experts)

    def norms(self, block: str) -> list[float]:
        """The norm of each of a block's experts; reads them all once."""
        return self._store.norms(block)

    def report(self) -> dict[str, Any]:
        """Bytes by part, residents by block, and what happened since loading or `reset`.

        What its numbers are is in `report_of`.
        """
        with self._shared.lock:
            return report_of(self._parts, self._budget)

    def views(self) -> list[BlockView]:
        """Every block as it is now, for people to look at."""
        with self._shared.lock:
            return [view_of(name, experts) for name, experts in self.blocks.items()]

    def reset(self) -> None:
        """Count from zero; loads and bytes read go on."""
        with self._shared.lock:
            self._shared.counters.__init__()

    @contextmanager
    def isolated(self, policy: Policy) -> Iterator[None]:
        """Compute under `policy` within the block, and leave no trace of it.

        Residents, importance, counters and the policy are afterwards what they were before.
        """
        with self._shared.lock:
            self._settle()
            before, counters = self.policy, replace(self._shared.counters)
            self._shared.policy = replace(policy, residency="fixed")
        try:
            yield
        finally:
            with self._shared.lock:
                self._shared.policy = before
                for name in counters.__slots__:
                    setattr(self._shared.counters, name, getattr(counters, name))

    def check(self) -> None:
        """Raise AssertionError if tables, slots or bytes don't agree."""
        with self._shared.lock:
            held = self._shared.spare_bytes
            for experts in self.blocks.values():
                experts.slot_table.check()
                experts.swaps.check()
                assert experts.slot_table.num_slots == len(experts.slots), experts.block.name
                held += sum(slot.nbytes for slot in experts.slots.values())
            total = self._budget.total
            room = None if total is None else total - self._budget.fixed + self._budget.staging
            assert room is None or held <= room, f"{held} bytes held, {room} may be"
            if self._host_cache is not None:
                self._host_cache.check()
            if self._upgrades:
                self._upgrades.check()

    def close(self) -> None:
        """Stop the transfer, take the hooks off, close the files. The model cannot be used then."""
        with self._shared.lock:
            for hook in self._hooks:
                hook.remove()
            self._undo_attention()
        self._shared.transfer.close()
        if self._host_cache is not None:
            self._host_cache.close()
        self._store.close()

    def _settle(self) -> None:
        """Let no swap be under way."""
        for experts in self.blocks.values():
            experts.swaps.settle()
