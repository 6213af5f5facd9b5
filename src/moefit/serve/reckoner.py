"""The ledger of a model that is served already, under another placement.

Owns what stays as it was when loading began: the size of the process, and every setting but the
placement. Reads the checkpoint's headers again, for a loaded model's modules are no skeleton.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from moefit.errors import ConfigError
from moefit.serve.budget import MemoryBudget
from moefit.serve.ladders import AUTO
from moefit.serve.packed import PackedStore
from moefit.serve.placement import BlockPlacement, Placement
from moefit.serve.reckon import ledger
from moefit.serve.settings import AUTO_PRECISION, NATIVE_PRECISION, LoadSettings
from moefit.serve.skeleton import Skeleton, build


@dataclass(frozen=True)
class Reckoner:
    """process, tokenizer: bytes that they take, as they were found when the model was loaded."""

    folder: Path
    settings: LoadSettings
    process: int
    tokenizer: int
    packed: PackedStore

    def budget(self, placement: Placement, total: int | None) -> MemoryBudget:
        """With the slots of this placement. Raises ConfigError for one that cannot be."""
        if self.settings.precision == AUTO_PRECISION:
            raise ConfigError(
                "precision auto gives every expert its format by itself, and a placement does so "
                "too; load with a placement (--plan, --max-loss) to change it while serving"
            )
        settings = replace(
            self.settings, placement=placement, precision=NATIVE_PRECISION, memory=total
        )
        settings.check()
        return self._here(ledger(self._skeleton(), settings, self.packed))

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The least and the most that any placement takes."""
        skeleton = self._skeleton()
        each = {block.name: block.num_experts for block in skeleton.blocks}
        fewest = [_taken(self._uniform(dict.fromkeys(each, 1), name, skeleton)) for name in AUTO]
        return min(fewest), _taken(self._uniform(each, NATIVE_PRECISION, skeleton))

    def _uniform(self, slots: dict[str, int], format: str, skeleton: Skeleton) -> MemoryBudget:
        placement = {
            name: BlockPlacement(slots=number, formats=(format,)) for name, number in slots.items()
        }
        settings = replace(
            self.settings, placement=placement, precision=NATIVE_PRECISION, memory=None
        )
        return self._here(ledger(skeleton, settings, self.packed))

    def _here(self, budget: MemoryBudget) -> MemoryBudget:
        """The same for the process that serves, whose tokenizer has been read."""
        return replace(budget, process=self.process, slack=0, tokenizer=self.tokenizer, reading=0)

    def _skeleton(self) -> Skeleton:
        return build(self.folder, self.settings.dtype)


def _taken(budget: MemoryBudget) -> int:
    assert budget.planned is not None
    return budget.fixed + budget.planned.nbytes
