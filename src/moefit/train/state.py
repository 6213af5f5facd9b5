"""What a checkpoint carries beside the weights, and the way back into a run.

Owns the trainer's state: optimizer, random generators, time spent, and the marks (precision,
fingerprint of the data) by which a resumed run knows that it would be the same run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefit.errors import CheckpointError, ConfigError, DataError
from moefit.train import checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All that steps change, with what it rests on. `precision` is what was come to, not `auto`."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    fingerprint: str

    def pack(self, seconds: float) -> dict[str, Any]:
        """The state as torch.save can write it, after `seconds` of training."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": seconds,
            "precision": self.precision,
            "data": self.fingerprint,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, folder: Path) -> tuple[int, float]:
        """Take up the checkpoint in `folder`; gives its step and the seconds that led to it.

        Every file is verified first. Raises CheckpointError if one is damaged or of another
        model, DataError or ConfigError if going on would make it another run.
        """
        state = checkpoint.load_state(folder)
        self._check_data(folder, state)
        self._check_precision(folder, state)
        self._load(folder, state)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            _set_cuda_rng(state.get("cuda_rng"), self.device)
        return state["step"], state["seconds"]

    def _check_data(self, folder: Path, state: dict[str, Any]) -> None:
        if state.get("data", self.fingerprint) == self.fingerprint:
            return
        raise DataError(
            f"the text or the tokenizer has changed since step {state['step']} of this run "
            f"({folder}): its fingerprint was {state['data']} and is {self.fingerprint}; restore "
            "what data.sources, data.held_out and data.tokenizer name, or start a new run with "
            "out=FOLDER"
        )

    def _check_precision(self, folder: Path, state: dict[str, Any]) -> None:
        before = state.get("precision", self.precision)
        if before == self.precision:
            return
        raise ConfigError(
            f"{folder} was trained in {before}, but would go on in {self.precision} on "
            f"{self.device}; give precision={before} to go on as it began, or start a new run "
            "with out=FOLDER"
        )

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        try:
            saved = type(self.model).from_pretrained(folder, dtype=torch.float32)
            self.model.load_state_dict(saved.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{folder} is whole, but not of the model that these settings describe: {error}; "
                "give the settings that it was trained with, or another folder with out=FOLDER"
            ) from error


def _set_cuda_rng(saved: torch.Tensor | None, device: torch.device) -> None:
    """Take up the device's generator; a run that began on the CPU has none, so seed one alike."""
    if saved is None:
        torch.cuda.manual_seed(torch.initial_seed())
    else:
        torch.cuda.set_rng_state(saved, device)
