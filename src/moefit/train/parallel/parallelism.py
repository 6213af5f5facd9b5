"""How a model is spread over processes: `Parallelism`, of one process and of many.

`DataParallel` is FSDP2: each process holds a part of every weight, gradient and optimizer state,
and computes its share of each micro-batch. Losses that depend on a whole micro-batch are computed
from sums over all processes, so results do not depend on the number of processes.

Shapes: B sequences of a micro-batch, N tokens per sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moefit.dsmoe.config import nearest_multiple
from moefit.errors import ConfigError
from moefit.train.config import TrainConfig
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.dispatch import Dispatch, spread_experts
from moefit.train.parallel.processes import OneProcess, Processes


class Parallelism(Protocol):
    """Spreads a model and its batches over the processes of a run."""

    @property
    def processes(self) -> Processes:
        """Those that train together."""
        ...

    @property
    def clock(self) -> Clock:
        """Measures gathering of weights and reducing of gradients and sums."""
        ...

    @property
    def dispatch(self) -> Dispatch | None:
        """Sends tokens to experts of other processes; None if every process has all."""
        ...

    def wrap(self, model: PreTrainedModel) -> None:
        """Spread a model that every process has built alike; in place."""
        ...

    def share(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Return the part of a micro-batch that this process computes."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum over processes; differentiable."""
        ...

    def clip(self, model: nn.Module, limit: float) -> float:
        """Scale all gradients to a norm of at most `limit`; return the norm before."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the micro-batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """The trivial case: one process, which has everything."""

    clock: Clock
    processes: Processes = field(default_factory=OneProcess)
    dispatch: None = None

    def wrap(self, model: PreTrainedModel) -> None:
        """Leave the model as it is."""

    def share(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Return all rows."""
        return rows

    def total(self, sums: Tensor) -> Tensor:
        """Return the sums."""
        return sums

    def clip(self, model: nn.Module, limit: float) -> float:
        """Scale all gradients to a norm of at most `limit`; return the norm before."""
        return float(nn.utils.clip_grad_norm_(model.parameters(), limit))

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows


class _TimedAllGather(DefaultAllGather):
    def __init__(self, clock: Clock):
        self._clock = clock

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._clock.running():
            return super().__call__(*arguments, **options)


class _TimedReduceScatter(DefaultReduceScatter):
    def __init__(self, clock: Clock):
        self._clock = clock

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._clock.running():
            return super().__call__(*arguments, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallel:
    """FSDP2 over all processes; with a mesh of two dimensions HSDP.

    Attributes:
        mesh: `(data,)`, or `(replicate, data)`: weights are sharded over `data` and copied over
            `replicate`.
        reshard: Free a layer's gathered weights after its forward pass.
        dispatch: Spreads experts whole instead of sharding them; None to shard everything.
    """

    processes: Processes
    mesh: DeviceMesh
    reshard: bool
    clock: Clock
    dispatch: Dispatch | None = None

    def wrap(self, model: PreTrainedModel) -> None:
        """Shard a model that every process has built alike, layer by layer."""
        layers = cast("Sequence[nn.Module]", model.get_submodule("model.layers"))
        apart = spread_experts(model, self.dispatch) if self.dispatch is not None else None
        for module in (*layers, model):
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=self.reshard,
                ignored_params=apart,
            )
            assert isinstance(module, FSDPModule)
            module.set_custom_all_gather(_TimedAllGather(self.clock))
            module.set_custom_reduce_scatter(_TimedReduceScatter(self.clock))

    def share(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Return the part of a micro-batch that this process computes."""
        return rows.chunk(self.processes.size, dim=dim)[self.processes.rank]

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum over processes; differentiable.

        The gradients of all processes are summed in the backward pass, and FSDP takes the mean
        over processes: together that is the gradient of one process with the whole batch.
        """
        group = cast(dist.ProcessGroup, dist.group.WORLD)
        if torch.compiler.is_compiling():  # a compiled function cannot look at the clock
            return funcol.wait_tensor(funcol.all_reduce(sums, "sum", group))
        with self.clock.running():
            return funcol.wait_tensor(funcol.all_reduce(sums, "sum", group))

    def clip(self, model: nn.Module, limit: float) -> float:
        """Scale all gradients to a norm of at most `limit`; return the norm before."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the micro-batch."""
        parts = [torch.empty_like(rows) for _ in range(self.processes.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


def parallelism(config: TrainConfig, processes: Processes, device: torch.device) -> Parallelism:
    """Return how a run's model is spread over its processes.

    Args:
        config: The run's configuration.
        processes: All of them take part.
        device: Of this process.

    Raises:
        ConfigError: The batch, the processes or their settings do not fit each other.
    """
    _check_sizes(config, processes)
    clock = Clock(device)
    if processes.size == 1:
        return Single(clock=clock, processes=processes)
    settings = config.parallel
    shape, names = (processes.size,), ("data",)
    if settings.replicate > 1:
        shape, names = (settings.replicate, processes.size // settings.replicate), _HSDP
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dispatch = None
    if settings.experts == "all_to_all":
        dispatch = Dispatch(
            mesh=mesh,
            rank=processes.rank,
            own_machine=own_machine(config, processes),
            capacity_factor=settings.capacity_factor,
            clock=Clock(device),
        )
    return DataParallel(
        processes=processes, mesh=mesh, reshard=settings.reshard, clock=clock, dispatch=dispatch
    )


_HSDP = ("replicate", "data")


def machines(config: TrainConfig, processes: Processes) -> int:
    """Return the number of machines: as given, or as torchrun says."""
    return config.parallel.nodes or processes.nodes


def own_machine(config: TrainConfig, processes: Processes) -> tuple[bool, ...]:
    """Return, per process, whether it is on the machine of this one."""
    per_machine = processes.size // machines(config, processes)
    mine = processes.rank // per_machine
    return tuple(rank // per_machine == mine for rank in range(processes.size))


def _check_sizes(config: TrainConfig, processes: Processes) -> None:
    size, settings, nodes = processes.size, config.parallel, machines(config, processes)
    parts = {"processes": size, "machines": nodes if config.data.shard_by == "source" else 1}
    for name, count in parts.items():
        if config.batch_size % count:
            nearest = nearest_multiple(config.batch_size, count)
            raise ConfigError(
                f"batch_size={config.batch_size} sequences do not divide among {count} {name}; "
                f"the nearest that works is batch_size={nearest}"
            )
    if size == 1:
        return  # settings of many processes have no effect, so that one process can go on
    for name, value in (("replicate", settings.replicate), ("nodes", nodes)):
        if size % value:
            fits = max(n for n in range(1, min(size, value) + 1) if size % n == 0)
            raise ConfigError(
                f"parallel.{name}={value} does not divide the {size} processes; the nearest that "
                f"works is {fits}"
            )
    if settings.replicate > 1 and settings.experts == "all_to_all":
        raise ConfigError(
            f"parallel.replicate={settings.replicate} copies all weights, but parallel.experts="
            "all_to_all keeps each expert in one process; give replicate=1, or experts=data"
        )
