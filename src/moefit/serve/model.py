"""A model served inside a memory budget.

`ServedModel` is what users work with: the Hugging Face model and its tokenizer, the budget and the
mode, which may change while it runs, and reports. Every change holds the lock that a block's step
holds, so that a step never sees half of one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moefit.errors import ConfigError, UnsupportedModelError
from moefit.moe.expert_dropout import dropout_record
from moefit.serve.cache.resize import apply_placement, resize
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.cache.swaps import StepWatcher
from moefit.serve.config import BlockPlacement, LoadSettings, Mode, Placement, Policy
from moefit.serve.hf.guards import guard
from moefit.serve.hf.kv_cache import limit_context, reserve_caches
from moefit.serve.hybrid.start import HostComputing, start_host_side
from moefit.serve.kernels_in_place import put_kernels_in_place
from moefit.serve.memory.budget import MemoryBudget, parse_bytes
from moefit.serve.memory.estimate import step_tokens, step_workspace
from moefit.serve.memory.held import check_system_memory
from moefit.serve.precision.upgrades import Upgrades
from moefit.serve.prediction.prefetch import Prefetching, start_prefetching
from moefit.serve.prediction.probes import NO_PROBES, FoundProbes
from moefit.serve.report import BlockView, ServedParts, report_of, view_of


class ServedModel:
    """A loaded model; returned by `moefit.load`. Unpacks into `model, tokenizer`.

    Budget, mode and reports may be used from any thread, `generate` from one thread at a time.

    Args:
        parts: What loading has put together.

    Attributes:
        draft: The model that drafts tokens, if one was loaded; closed with this one.
    """

    def __init__(self, parts: ServedParts):
        self._parts = parts
        self.folder, self.model, self._tokenizer = parts.folder, parts.model, parts.tokenizer
        self.blocks, self._budget = parts.blocks, parts.budget
        self._store, self._host_cache, self._shared = parts.store, parts.host_cache, parts.shared
        self.placement_budget, self.generation = parts.placement_budget, parts.generation
        self._upgrades: Upgrades | None = None
        self.prefetching, self.host_computing = Prefetching(), HostComputing()
        self.draft: ServedModel | None = None
        self._deterministic = False
        record = dropout_record(self.model.config)
        self._keeps_order = record is not None and record.order == "nested"
        guard(self.model, self.blocks)
        self._hooks = (
            *parts.hooks,
            limit_context(self.model, self._context, self._longest_step),
            reserve_caches(self.model, self._context, int8=parts.int8_cache),
        )
        self.int8_cache = parts.int8_cache
        self._undo_kernels = put_kernels_in_place(
            self.model, self.blocks, self._context(), int8=parts.int8_cache, dry=self.zero_experts
        )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ConfigError if it is missing or damaged."""
        if isinstance(self._tokenizer, str):
            raise ConfigError(self._tokenizer)
        return self._tokenizer

    @property
    def budget(self) -> MemoryBudget:
        """The budget in force, by part."""
        return self._budget

    @property
    def policy(self) -> Policy:
        """The policy for missing experts in force."""
        return self._shared.policy

    @property
    def loads_failing(self) -> bool:
        """Whether reading experts fails now; unlike `report()`, does not wait for a step."""
        return self._shared.transfer.failures.failing

    @property
    def bytes_read(self) -> int:
        """Bytes of experts read from storage so far; unlike `report()`, does not wait."""
        return self._store.bytes_read

    def _context(self) -> int | None:
        """Return the largest number of tokens after a step; None (no limit) without a budget."""
        budget = self._budget  # read once: another thread may replace it
        return None if budget.total is None else budget.context

    def _longest_step(self) -> int | None:
        """Return the largest number of new tokens in a step; None without a budget."""
        budget = self._budget
        return None if budget.total is None else budget.step_tokens

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the Hugging Face model does; prompts longer than a step in parts."""
        if (part := self._prompt_part(args, kwargs)) is not None:
            kwargs.setdefault("prefill_chunk_size", part)
        return self.model.generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def _prompt_part(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
        """Return the tokens of a sequence to compute at once; None for all of the prompt."""
        ids_BT = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        limit, config = self._longest_step(), kwargs.get("generation_config")
        config = config or self.model.generation_config
        cached = kwargs.get("use_cache", config.use_cache)
        if limit is None or not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or not cached:
            return None
        beams = kwargs.get("num_beams", config.num_beams) or 1
        returned = kwargs.get("num_return_sequences", config.num_return_sequences) or 1
        part = limit // (len(ids_BT) * max(beams, returned))
        return max(1, part) if ids_BT.shape[1] > part else None

    def set_memory(self, memory: str | int | None) -> MemoryBudget:
        """Change the memory budget.

        Shrinking evicts experts and frees memory before this returns. Growing fills new slots in
        the background, or before this returns if residents are fixed. A placement that does not fit
        is dropped: blocks then have equal numbers of slots, each in its largest format.

        Args:
            memory: A size; None means as much as it takes.

        Returns:
            The new budget by part.

        Raises:
            BudgetTooSmallError: The size is below the minimum budget.
            ConfigError: The size is invalid, or exceeds the system's memory.
            OSError: Allocation failed. As after the other errors, nothing has changed.
        """
        total = None if memory is None else parse_bytes(memory)
        with self._shared.lock:  # the new budget depends on the present one
            return self._set_budget(self._budget.with_total(total))

    def change_budget(self, change: Callable[[MemoryBudget], MemoryBudget]) -> MemoryBudget:
        """Change parts by `change`; slots get what is left of the total. Raises as `set_memory`."""
        with self._shared.lock:
            return self._set_budget(change(self._budget))

    def reserve_steps(self, tokens: int) -> MemoryBudget:
        """Reserve memory for forward passes of this many tokens, if less is reserved.

        Args:
            tokens: Of all sequences together, at most the context.

        Returns:
            The budget in force, with fewer slots if they had to make room.

        Raises:
            BudgetTooSmallError: The minimum budget no longer fits.
        """
        with self._shared.lock:
            budget, config = self._budget, self.model.config
            if budget.step_tokens is None or tokens <= budget.step_tokens:
                return budget
            assert budget.context is not None
            settings = replace(self.placement_budget.settings, step_tokens=tokens)
            work = step_workspace(
                config, self.model.dtype, settings,
                context=budget.context, first_use=budget.first_use,
            )  # fmt: skip
            longest = step_tokens(config, settings, budget.context)
            larger = replace(budget, workspace=work, step_tokens=longest)
            made = self._set_budget(larger.with_total(budget.total))
            self.placement_budget = replace(self.placement_budget, settings=settings)
            return made

    def _set_budget(self, budget: MemoryBudget) -> MemoryBudget:
        counts = budget.slots()
        check_system_memory(budget, self.model.device)
        if self._budget.planned is not None and budget.planned is None:
            uniform = {
                name: BlockPlacement(slots=count, formats=(experts.format.name,))
                for (name, experts), count in zip(self.blocks.items(), counts, strict=True)
            }
            self._apply_placement(uniform, budget, self.policy, placed=False)
            self._restore_order()
            return budget
        with self._paused():
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
        if self._deterministic and self._upgrades:
            self._settle()
            self._upgrades.settle()
        self._restore_order()
        return budget

    def _restore_order(self) -> None:
        """After a change of slots, hold the first experts of the order that virtual mode keeps."""
        if self._keeps_order and self.policy.mode == "virtual":
            self.hold_first_experts()

    def set_placement(
        self,
        placement: Placement,
        *,
        memory: str | int | None,
        mode: Mode = "exact",
        manager: VirtualExpertManager | None = None,
        **settings: Any,
    ) -> MemoryBudget:
        """Change to another placement, as if loaded with `moefit.load(placement=...)`.

        Resident experts whose format does not change stay; others are loaded in the background, or
        when a step needs them.

        Args:
            placement: Slots and formats by block name.
            memory: The new budget; None means as much as it takes.
            mode: The new mode.
            manager: Of the virtual mode; None retains the present one.
            settings: Fields of `Policy`, as for `set_mode`.

        Returns:
            The new budget by part.

        Raises:
            BudgetTooSmallError: The placement does not fit in the budget.
            ConfigError: The placement or a setting is invalid.
            UnsupportedModelError: The model cannot be served in this mode.
            OSError: Allocation failed; slots are as before, but their experts are loaded again.
        """
        self.checked_policy(mode, **settings)  # before the estimate, which takes longer
        total = None if memory is None else parse_bytes(memory)
        budget = self.placement_budget.budget(placement, total)
        budget.slots()  # raises if it does not fit
        with self._shared.lock:
            policy = self.checked_policy(mode, **settings)
            if (self._budget.context or 0) > (budget.context or 0):
                raise ConfigError(f"the KV cache has grown to {self._budget.context} tokens; wait")
            self._apply_placement(placement, budget, policy, placed=True)
            self._shared.manager = manager or self._shared.manager
            self._restore_order()
        return budget

    def _apply_placement(
        self, placement: Placement, budget: MemoryBudget, policy: Policy, *, placed: bool
    ) -> None:
        """Change slots and start filling them; `placed` as for `allocate_spares`."""
        with self._paused():
            try:
                spares = self._shared.spares
                apply_placement(self.blocks, spares, placement, self.model.device, placed=placed)
                self._budget, self._shared.policy = budget, policy
            finally:
                for experts in self.blocks.values():
                    experts.fill()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Hold the lock with no swap in progress; restart unfinished loads at the end."""
        with self._shared.lock:
            self._shared.transfer.settle()  # queued GPU work may still read slots
            unfilled = [experts for experts in self.blocks.values() if experts.swaps]
            for experts in unfilled:
                experts.swaps.cancel()
            try:
                self._settle()
                yield
            finally:
                self.prefetching.budget_changed()
                for experts in unfilled:
                    experts.fill()
            if self.policy.residency == "fixed":
                self._settle()

    def start_upgrades(
        self, upgrades: Upgrades, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Start adapting each expert's precision; load all experts if all have slots.

        Args:
            upgrades: Changes formats at step borders.
            progress: Called with the number of loaded experts and of all.
        """
        with self._shared.lock:
            self._upgrades, self._shared.on_step = upgrades, upgrades.step
            upgrades.set_capacity(self._budget.remaining_bytes())
            if all(one.slot_table.num_slots == one.num_experts for one in self.blocks.values()):
                upgrades.fill(progress)

    def start_prefetching(self, settings: LoadSettings, probes: FoundProbes = NO_PROBES) -> None:
        """Prefetch in exact mode as the settings say; `prefetching` tells whether it does.

        Runs one short pass of the model, so that no request may be running.

        Args:
            settings: With which the model was loaded.
            probes: What was found of its probes.
        """
        self.prefetching.close()
        with self.zero_experts():
            self.prefetching = start_prefetching(
                self.model, self.blocks, self._shared, settings, self._context(), probes
            )

    def start_host_side(self, name: str) -> None:
        """Compute misses in host memory where that is faster; `host_computing` tells whether.

        Reads a few experts and measures both sides for half a second. Call this right after
        loading.

        Args:
            name: A value of the setting `host_compute`.
        """
        blocks = self.blocks
        with self._shared.lock:
            self.host_computing.close(list(blocks.values()))
            self.host_computing = start_host_side(
                self.model, blocks, self._host_cache, self._shared.transfer.engine, name
            )

    @contextmanager
    def watched(self, watcher: StepWatcher | None) -> Iterator[None]:
        """Let `watcher` follow steps in exact mode within the block, in place of prefetching."""
        with self._shared.lock:
            before, self._shared.watcher = self._shared.watcher, watcher
        try:
            yield
        finally:
            with self._shared.lock:
                self._shared.watcher = before

    def settle_precision(self) -> None:
        """Complete changes of precision that would otherwise follow in the background."""
        with self._shared.lock:
            if self._upgrades:
                self._upgrades.settle()

    @property
    def adapts_precision(self) -> bool:
        """Whether formats of experts follow their use."""
        return self._upgrades is not None and not self._deterministic

    def make_deterministic(self) -> None:
        """Let answers depend on nothing that other requests change.

        Modes in which they depend on resident experts are refused from now on. Under precision auto
        formats are settled now, and after each change of the budget, and no longer follow the use
        of experts.

        Raises:
            ConfigError: Such a mode is in force.
        """
        with self._shared.lock:
            _refuse_substitution(self.policy)
            self._deterministic = True
            self._fetch_all("deterministic answers do not depend on which experts have slots")
            if self._upgrades:
                self._shared.on_step = None
                self._upgrades.ignore_use()
                self._settle()
                self._upgrades.settle()

    def _fetch_all(self, reason: str) -> None:
        """Compute nothing in host memory from now on; the caller holds the lock."""
        if self.host_computing.side is not None:
            self.host_computing.close(list(self.blocks.values()))
            self.host_computing = HostComputing(obstacle=reason)

    def set_mode(self, mode: Mode, **settings: Any) -> Policy:
        """Change the mode and other fields of `Policy` from the next step on.

        Args:
            mode: The new mode.
            settings: Fields of `Policy`; `prefill` follows the mode by default.

        Returns:
            The new policy.

        Raises:
            ConfigError: A setting or value is invalid.
            UnsupportedModelError: Only exact mode is possible, because the routing rule of the
                model's family was not recognized.
            CheckpointError: An expert that virtual mode begins with cannot be read.
        """
        with self._shared.lock:  # the new policy depends on the present one
            policy = self.checked_policy(mode, **settings)
            if policy.residency == "fixed":
                self._settle()
            begins = policy.mode == "virtual" != self.policy.mode
            self._shared.policy = policy
            if begins:
                self.hold_first_experts()
        return policy

    def hold_first_experts(self) -> None:
        """Make the experts resident that the model was trained to keep.

        Without effect unless config.json records an order of experts (`expert_dropout`). If it was
        trained with this order alone (`nested`), virtual mode keeps them: its residency is `fixed`
        unless another is given, because swaps would leave the sets that it was trained with.

        Raises:
            CheckpointError: An expert cannot be read.
        """
        with self._shared.lock:
            for experts in self.blocks.values():
                experts.hold_first()

    def checked_policy(self, mode: Mode, **settings: Any) -> Policy:
        """Return the policy that `set_mode` would set, or raise as it would; change nothing."""
        if self._keeps_order:
            settings.setdefault("residency", "fixed" if mode == "virtual" else "manager")
        policy = self._shared.policy.changed(mode, **settings)
        if self._deterministic:
            _refuse_substitution(policy)
        unknown = [
            name for name, one in self.blocks.items() if one.scoring is None and one.reachable
        ]
        if unknown and {policy.mode, policy.prefill} != {"exact"}:
            raise UnsupportedModelError(
                f"mode {mode} changes routing, but how {type(self.model).__name__}'s router makes "
                f"weights from scores was not recognised in {len(unknown)} of {len(self.blocks)} "
                f"blocks ({unknown[0]}); mode exact works"
            )
        return policy

    def set_residents(self, residents: Mapping[str, Collection[int]]) -> None:
        """Make exactly these experts resident, as many as there are slots.

        Args:
            residents: Expert ids by block name.
        """
        with self._shared.lock:
            self._shared.transfer.settle()
            for name, experts in residents.items():
                self.blocks[name].set_residents(experts)

    def use_counts(self) -> dict[str, list[float]]:
        """Return how many tokens used each expert since loading, by block name."""
        with self._shared.lock:
            return {name: one.counts() for name, one in self.blocks.items()}

    def warm_start(self, counts: Mapping[str, Sequence[float]]) -> None:
        """Fill empty slots with the experts of the highest counts, in the background.

        Args:
            counts: By block name, a number of 0 or more per expert.
        """
        with self._shared.lock:
            for name, experts in self.blocks.items():
                experts.warm_start(counts[name])

    def fill(self) -> None:
        """Fill empty slots with any experts, in the background, so that no step waits for those."""
        with self._shared.lock:
            for experts in self.blocks.values():
                experts.fill()

    def norms(self, block: str) -> list[float]:
        """Return the norm of each expert of a block; reads all of them."""
        return self._store.norms(block)

    def report(self) -> dict[str, Any]:
        """Return bytes by part, residents by block and statistics; see `report_of`."""
        with self._shared.lock:
            blocks = self.blocks.values()
            missing = any(one.slot_table.num_slots < one.num_experts for one in blocks)
            prefetch = self.prefetching.as_dict(self.policy.mode, missing=missing)
            there = self.host_computing.as_dict()
            return report_of(self._parts, self._budget) | {
                "prefetch": prefetch,
                "hybrid": there,
            }

    def views(self) -> list[BlockView]:
        """Return the present state of every block, for display."""
        with self._shared.lock:
            return [view_of(name, experts) for name, experts in self.blocks.items()]

    def reset(self) -> None:
        """Reset the counters, except those of loads and bytes read."""
        with self._shared.lock:
            self._shared.counters.__init__()

    @contextmanager
    def isolated(self, policy: Policy) -> Iterator[None]:
        """Return a context that computes with `policy` and leaves the served state unchanged.

        Residents, importance, counters and the policy are restored at the end.
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

    @contextmanager
    def zero_experts(self) -> Iterator[None]:
        """Let all experts return zeros within the block, so that nothing is read or counted."""
        for experts in self.blocks.values():
            experts.recorder = lambda _routing: None
        try:
            yield
        finally:
            for experts in self.blocks.values():
                experts.recorder = None

    def check(self) -> None:
        """Raise AssertionError if tables, slots and bytes disagree."""
        with self._shared.lock:
            held = self._shared.spare_bytes
            for experts in self.blocks.values():
                experts.slot_table.check()
                experts.swaps.check()
                assert experts.slot_table.num_slots == len(experts.slots), experts.block.name
                held += sum(slot.nbytes for slot in experts.slots.values())
            total = self._budget.total
            limit = None if total is None else total - self._budget.fixed + self._budget.staging
            assert limit is None or held <= limit, f"{held} bytes in slots, limit {limit}"
            if self._host_cache is not None:
                self._host_cache.check()
            if self._upgrades:
                self._upgrades.check()

    def close(self) -> None:
        """Stop background threads, remove hooks and close files. The model is unusable then."""
        with self._shared.lock:
            for hook in self._hooks:
                hook.remove()
            for undo in self._undo_kernels:
                undo()
            self.prefetching.close()
            self.host_computing.close(list(self.blocks.values()))
        if self.draft is not None:
            self.draft.close()
        self._shared.transfer.close()
        if self._host_cache is not None:
            self._host_cache.close()
        self._store.close()

    def _settle(self) -> None:
        """Wait for all swaps in progress."""
        for experts in self.blocks.values():
            experts.swaps.settle()


def _refuse_substitution(policy: Policy) -> None:
    """Raise ConfigError for modes in which answers depend on resident experts."""
    for mode in (policy.mode, policy.prefill):
        if mode != "exact":
            raise ConfigError(
                f"in mode {mode} answers depend on which experts are in memory, and so on earlier "
                "requests, which deterministic answers rule out; mode exact works"
            )
