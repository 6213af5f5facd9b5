"""A model loaded in a configuration, to be measured.

Owns the way from a `Subject` (which model, in which dtype, under which rule) and a configuration to
a served model. Knows nothing of what is measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moefit.moe.routing import Rule
from moefit.plan.configuration import Configuration
from moefit.serve.dsmoe_rules import use_rule
from moefit.serve.loading import load
from moefit.serve.served import ServedModel
from moefit.serve.settings import LoadSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is planned for. dtype None: the checkpoint's own; rule None: the model's own."""

    folder: Path
    dtype: torch.dtype | None = None
    rule: str | None = None
    device: str = "cpu"

    def load(
        self, configuration: Configuration, *, context: int, memory: int | None = None
    ) -> ServedModel:
        """The model, so served. Raises what `moefit.serve.loading.load` does."""
        settings = LoadSettings(
            memory=memory,
            device=self.device,
            context=context,
            dtype=self.dtype,
            **configuration.load_settings(),
        )
        served = load(self.folder, settings, **configuration.policy_settings())
        if self.rule is not None:
            use_rule(served.model, Rule.parse(self.rule))
        return served


def fill(served: ServedModel) -> None:
    """Load experts until every slot is taken, the first ones of each block."""
    residents: Mapping[str, range] = {
        name: range(one.residency.number) for name, one in served.blocks.items()
    }
    served.set_residents(residents)
