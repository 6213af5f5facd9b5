"""The state of a run that checkpoints save and restore, by any number of processes.

One process writes weights as a model folder and the optimizer's state beside it. Many write both by
torch.distributed.checkpoint into the subfolder `sharded`, each its own part. Either is restored by
any number of processes.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel

from moefit.errors import CheckpointError, ConfigError, DataError
from moefit.moe.expert_dropout import KEY, dropout_record
from moefit.train.checkpoint import load_state, verify
from moefit.train.memory.low_rank import factors, load_trained
from moefit.train.parallel.processes import OneProcess, Processes
from moefit.train.spikes import SpikeDetector

MIXED = "mixed bf16"
"""The precision of a run with `parallel.mixed_precision`."""
SHARDED = "sharded"
"""Subfolder of a checkpoint with the parts of many processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The state of a run, as one of its processes holds it.

    Attributes:
        model: The model, or this process's part.
        optimizer: Its optimizer.
        device: Where it is trained.
        precision: `fp32`, `bf16` or `MIXED`, not `auto`.
        fingerprint: Of text and tokenizer.
        seed: Of the run.
        shards: Machines that the text is divided among.
        processes: Of the run.
        stream: Of random numbers; processes that compute the same have the same one.
        streams: Their number.
        spikes: What was found of steps to skip.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    fingerprint: str
    seed: int = 0
    shards: int = 1
    processes: Processes = field(default_factory=OneProcess)
    stream: int = 0
    streams: int = 1
    spikes: SpikeDetector = field(default_factory=lambda: SpikeDetector(None))

    def state_dict(self, seconds: float) -> dict[str, Any]:
        """Return the state of one process without weights, after `seconds` of training."""
        state = {"optimizer": self.optimizer.state_dict(), **self._facts(seconds)}
        changes = {"low_rank": found} if (found := factors(self.model)) else {}
        return {**state, **self._generators(), **changes}

    def shared_state(self, seconds: float) -> dict[str, Any]:
        """Return what the processes of a run know apart from sharded tensors; all call it."""
        generators = self.processes.every(self._generators())
        return {**self._facts(seconds), "generators": generators, "streams": self.streams}

    def sharded_tensors(self) -> dict[str, Any]:
        """Return weights and the optimizer's state by name, each tensor this process's part."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _facts(self, seconds: float) -> dict[str, Any]:
        facts = {"seconds": seconds, "precision": self.precision, "data": self.fingerprint}
        facts["optimizer_name"] = _optimizer_name(self.optimizer)
        return {**facts, "shards": self.shards, "spikes": self.spikes.state_dict()}

    def _generators(self) -> dict[str, Tensor]:
        states = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore(self, folder: Path) -> tuple[int, float]:
        """Restore a checkpoint after verifying its files; all processes call it.

        Returns:
            Its step, and the seconds of training until then.

        Raises:
            CheckpointError: A file is damaged, of another model, or not visible here.
            DataError: Text or tokenizer have changed.
            ConfigError: The precision, or the machines that text is divided among, have changed.
        """
        self.processes.on_main(lambda: verify(folder))
        state = self.processes.agreed(lambda: load_state(folder, checked=True))
        self.processes.agreed(lambda: self._check_same_run(folder, state))
        self.processes.agreed(lambda: self._load(folder, state))
        self._restore_generators(state)
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])
        return state["step"], state["seconds"]

    def _check_same_run(self, folder: Path, state: dict[str, Any]) -> None:
        mine = _optimizer_name(self.optimizer)
        before = state.get("optimizer_name", mine)
        if before != mine:
            raise ConfigError(
                f"{folder} was trained with optimizer.name={before}, whose state {mine} cannot "
                f"continue; give optimizer.name={before}, or start from its weights alone with "
                "start_from"
            )
        if state.get("data", self.fingerprint) != self.fingerprint:
            raise DataError(
                f"the text or the tokenizer has changed since step {state['step']} of this run "
                f"({folder}): its fingerprint was {state['data']} and is {self.fingerprint}; "
                "restore what data.sources, data.held_out and data.tokenizer name, or start a new "
                "run with out=FOLDER"
            )
        shards = state.get("shards", 1)
        if shards != self.shards:
            raise ConfigError(
                f"{folder} was trained with text divided among {shards} machines "
                f"(data.shard_by=source), but there are {self.shards}, which would see other text; "
                f"start it on {shards}, give parallel.nodes={shards}, or start a new run with "
                "out=FOLDER"
            )
        before = state.get("precision", self.precision)
        if before != self.precision:
            raise ConfigError(
                f"{folder} was trained in {before}, but would continue in {self.precision} on "
                f"{self.device}; give {_precision_setting(before, self.precision)}, or start a new "
                "run with out=FOLDER"
            )

    def _load(self, folder: Path, state: dict[str, Any]) -> None:
        try:
            if (folder / SHARDED).is_dir():
                config = type(self.model.config).from_pretrained(folder)
                self._check_routers(config)
                self._load_sharded(folder / SHARDED)
            else:
                config = self._load_whole(folder, state["optimizer"], state.get("low_rank"))
            if (record := dropout_record(config)) is not None:
                setattr(self.model.config, KEY, record.as_dict())
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
            raise CheckpointError(
                f"{folder} is undamaged, but is not of the model that these settings describe: "
                f"{error}; give the settings that it was trained with, or another folder with "
                "out=FOLDER"
            ) from error

    def _check_routers(self, saved: Any) -> None:
        """Raise ValueError for a model with the same weights whose routers choose otherwise."""
        for name in ("router_type", "pregated"):
            before, now = (getattr(one, name, None) for one in (saved, self.model.config))
            if before != now:
                raise ValueError(f"it has {name}={before}, not {now}")

    def _load_sharded(self, folder: Path) -> None:
        tensors = self.sharded_tensors()
        if self.processes.size == 1:
            load_alone(tensors, folder)
        else:
            load(tensors, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )

    def _load_whole(
        self, folder: Path, optimizer: dict[str, Any], changes: Mapping[str, Tensor] | None
    ) -> Any:
        """Load the checkpoint of one process; return the model's configuration."""
        saved = type(self.model).from_pretrained(folder, dtype=torch.float32)
        self._check_routers(saved.config)
        if changes is not None:
            load_trained(self.model, saved.state_dict(), changes)
            self.optimizer.load_state_dict(optimizer)
            return saved.config
        if self.processes.size == 1:
            self.model.load_state_dict(saved.state_dict())
            self.optimizer.load_state_dict(optimizer)
            return saved.config
        self._load_weights(saved.state_dict())
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = {
            index: {name: _part(value, parameters[index]) for name, value in one.items()}
            for index, one in optimizer["state"].items()
        }
        self.optimizer.load_state_dict({**optimizer, "state": states})
        return saved.config

    def _load_weights(self, whole: Mapping[str, Tensor]) -> None:
        """Copy this process's part of whole weights."""
        mine = self.model.state_dict()
        different = sorted(
            name for name in {*mine, *whole} if _shape(mine, name) != _shape(whole, name)
        )
        if different:
            raise ValueError(f"other weights: {', '.join(different)}")
        for name, tensor in mine.items():
            _here(tensor).copy_(_own_rows(whole[name], tensor))

    def _restore_generators(self, state: Mapping[str, Any]) -> None:
        """Restore random states; other numbers of processes or streams have new ones."""
        everyone = state.get("generators", [state])
        streams = state.get("streams", len(everyone))
        if (len(everyone), streams) != (self.processes.size, self.streams):
            seed_process(self.seed, self.stream, state["step"])
            return
        mine = everyone[self.processes.rank]
        torch.set_rng_state(mine["rng"])
        if self.device.type == "cuda":
            if "cuda_rng" in mine:
                torch.cuda.set_rng_state(mine["cuda_rng"], self.device)
            else:  # the run began on the CPU
                torch.cuda.manual_seed(torch.initial_seed())


def _precision_setting(wanted: str, given: str) -> str:
    """Return the settings that lead from one precision to another."""
    if wanted == MIXED:
        return "parallel.mixed_precision=bf16 without precision"
    without = " without parallel.mixed_precision" if given == MIXED else ""
    return f"precision={wanted}{without}"


def _optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the value of `optimizer.name` in the run's settings."""
    return type(optimizer).__name__.lower()


def load_alone(tensors: dict[str, Any], folder: Path) -> None:
    """Read whole tensors from a folder of parts, without other processes; in place."""
    with warnings.catch_warnings():  # torch suspects a mistake
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, checkpoint_id=folder, no_dist=True)


def _part(value: Any, parameter: Tensor) -> Any:
    """Return this process's part of a whole tensor that belongs to a sharded parameter."""
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    if not value.ndim:
        return value
    return DTensor.from_local(
        _own_rows(value, parameter).to(parameter.device, copy=True),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _own_rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a whole tensor that a parameter has here, as views.

    FSDP divides what expert parallelism has left, so the last dimension of a mesh comes first.
    torch's `distribute_tensor` cannot do this where the parts are unequal.
    """
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements, part = parameter.device_mesh, parameter.placements, whole
    for dim in reversed(range(mesh.ndim)):
        placement = placements[dim]
        if isinstance(placement, Shard | _StridedShard):
            chunks = part.chunk(mesh.size(dim), placement.dim)
            number = mesh.get_local_rank(dim)
            empty = part.narrow(placement.dim, 0, 0)
            part = chunks[number] if number < len(chunks) else empty
    return part


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def seed_process(seed: int, stream: int, step: int = 0) -> None:
    """Seed the random numbers of a process, `seed`'s own for the first stream.

    Args:
        seed: Of the run.
        stream: Processes with another part of the batch have another one.
        step: At which it begins.
    """
    first = stream == 0 and step == 0
    mixed = np.random.SeedSequence([seed, stream, step]).generate_state(2)
    torch.manual_seed(seed if first else int(mixed[0]) << 31 | int(mixed[1]))
