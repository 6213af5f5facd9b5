"""How a model is spread over processes: `Parallelism`, of one process and of many.

`DataParallel` is FSDP2: each process holds a part of every weight, gradient and optimizer state,
and computes its share of each micro-batch. Losses that depend on a whole micro-batch are computed
from sums over all shares, so results do not depend on the number of processes. With
`expert_tensor` a share belongs to a group of processes that divide the experts among them.

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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moefit.dsmoe.config import nearest_multiple
from moefit.errors import ConfigError
from moefit.train.config import TrainConfig
from moefit.train.memory.expert_dropout import chosen_experts
from moefit.train.parallel.clock import Clock
from moefit.train.parallel.dispatch import (
    Dispatch,
    capacity_line,
    check_spreadable,
    spread_experts,
)
from moefit.train.parallel.expert_tensor import ExpertTensor, check_divisible, divide_experts
from moefit.train.parallel.mixed_precision import (
    ROUNDED,
    WHOLE,
    round_weights,
    routers_with_weights,
    sum_rows_in_float32,
)
from moefit.train.parallel.processes import OneProcess, Processes, limit_waiting
from moefit.train.settings import ParallelConfig


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

    @property
    def shares(self) -> int:
        """Number of parts that a micro-batch is divided into."""
        ...

    @property
    def mine(self) -> int:
        """Number of this process's part, from 0."""
        ...

    def wrap(self, model: PreTrainedModel) -> None:
        """Spread a model that every process has built alike; in place."""
        ...

    def share(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Return the part of a micro-batch that this process computes."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum over the parts of a micro-batch; differentiable."""
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
    shares: int = 1
    mine: int = 0
    mixed: bool = False
    """Whether to compute with rounded weights."""

    def wrap(self, model: PreTrainedModel) -> None:
        """Leave the model as it is, but for rounded weights."""
        if self.mixed:
            round_weights(model)

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
        batch: One dimension: processes that have different parts of a micro-batch.
        reshard: Free a layer's gathered weights after its forward pass.
        dispatch: Spreads experts whole instead of sharding them, over all processes or each of
            several groups; None to shard everything.
        tensor: Divides experts among processes with the same part of a micro-batch; None if each
            process has a part of its own.
        mixed: Whether weights compute and travel in bfloat16, except those of routers.
    """

    processes: Processes
    mesh: DeviceMesh
    batch: DeviceMesh
    reshard: bool
    clock: Clock
    dispatch: Dispatch | None = None
    tensor: ExpertTensor | None = None
    mixed: bool = False

    @property
    def shares(self) -> int:
        """Number of parts that a micro-batch is divided into."""
        return self.batch.size()

    @property
    def mine(self) -> int:
        """Number of this process's part."""
        return self.batch.get_local_rank()

    def wrap(self, model: PreTrainedModel) -> None:
        """Shard a model that every process has built alike, layer by layer."""
        layers = cast("Sequence[nn.Module]", model.get_submodule("model.layers"))
        apart = spread_experts(model, self.dispatch) if self.dispatch is not None else None
        if self.tensor is not None:
            divide_experts(model, self.tensor)
        policies = dict.fromkeys(
            (*layers, model), ROUNDED if self.mixed else MixedPrecisionPolicy()
        )
        if self.mixed:  # routers before their layers
            for module in model.modules():
                sum_rows_in_float32(module)
            policies = dict.fromkeys(routers_with_weights(model), WHOLE) | policies
        for module, policy in policies.items():
            fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=self.reshard,
                mp_policy=policy,
                ignored_params=apart,
            )
            assert isinstance(module, FSDPModule)
            module.set_custom_all_gather(_TimedAllGather(self.clock))
            module.set_custom_reduce_scatter(_TimedReduceScatter(self.clock))

    def share(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Return the part of a micro-batch that this process computes."""
        return rows.chunk(self.shares, dim=dim)[self.mine]

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum over the parts of a micro-batch; differentiable.

        The gradients of all parts are summed in the backward pass, and FSDP takes the mean over
        parts: together that is the gradient of one process with the whole batch.
        """
        group = self.batch.get_group()
        if torch.compiler.is_compiling():  # a compiled function cannot look at the clock
            return funcol.wait_tensor(funcol.all_reduce(sums, "sum", group))
        with self.clock.running():
            return funcol.wait_tensor(funcol.all_reduce(sums, "sum", group))

    def clip(self, model: nn.Module, limit: float) -> float:
        """Scale all gradients to a norm of at most `limit`; return the norm before."""
        if self.dispatch is not None:
            self.dispatch.reduce(model.parameters())
        if self.tensor is not None:
            self.tensor.equalise(p for p in model.parameters() if p.grad is not None)
        by_mesh: dict[DeviceMesh, list[nn.Parameter]] = {}  # norms of one mesh can be combined
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert isinstance(parameter, DTensor)
                by_mesh.setdefault(parameter.device_mesh, []).append(parameter)
        norms = [_whole_norm(parameters) for parameters in by_mesh.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for parameters in by_mesh.values():
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the micro-batch."""
        parts = [torch.empty_like(rows) for _ in range(self.shares)]
        dist.all_gather(parts, rows.contiguous(), group=self.batch.get_group())
        return torch.cat(parts)


def _whole_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
    clock = Clock(device, processes.begin)
    settings = config.parallel
    mixed = settings.mixed_precision is not None
    if processes.size == 1:
        return Single(clock=clock, processes=processes, mixed=mixed)
    mesh = _mesh(settings, processes, device)
    limit_waiting(mesh)
    data = mesh[_HSDP] if settings.replicate > 1 else mesh["data"]
    dispatch = tensor = None
    if settings.experts == "all_to_all":
        experts = _experts_mesh(settings, processes, device, data)
        dispatch = Dispatch(
            mesh=experts,
            shares=processes.size,
            rank=experts.get_local_rank(experts.ndim - 1),
            own_machine=own_machine(config, processes),
            hierarchical=settings.all_to_all == "hierarchical",
            capacity_factor=settings.capacity_factor,
            clock=Clock(device, processes.begin),
        )
    if settings.expert_tensor > 1:
        # torch then sums over both in one all-reduce, so that all processes round alike.
        limit_waiting(mesh["data", "tensor"]._flatten("replica"))
        tensor = ExpertTensor(mesh=mesh["tensor"], clock=clock)
    batch = data._flatten("batch") if settings.replicate > 1 else data
    limit_waiting(batch)
    return DataParallel(
        processes=processes,
        mesh=data,
        batch=batch,
        reshard=settings.reshard,
        clock=clock,
        dispatch=dispatch,
        tensor=tensor,
        mixed=mixed,
    )


_HSDP = ("replicate", "data")


def _mesh(settings: ParallelConfig, processes: Processes, device: torch.device) -> DeviceMesh:
    """Return all processes as `(data,)`, with `replicate` before and `tensor` after it if used."""
    data = processes.size // (settings.replicate * settings.expert_tensor)
    sizes = {"replicate": settings.replicate, "data": data, "tensor": settings.expert_tensor}
    used = {name: size for name, size in sizes.items() if size > 1 or name == "data"}
    return init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))


def _experts_mesh(
    settings: ParallelConfig, processes: Processes, device: torch.device, data: DeviceMesh
) -> DeviceMesh:
    """Return all processes as `(copy, expert)`, or in one dimension if there is one group."""
    members = experts_group(settings, processes.size)
    if members == processes.size and data.ndim == 1:
        return data
    sizes = {"copy": processes.size // members, "expert": members}
    used = {name: size for name, size in sizes.items() if size > 1}
    mesh = init_device_mesh(device.type, tuple(used.values()), mesh_dim_names=tuple(used))
    limit_waiting(mesh)
    return mesh


def experts_group(settings: ParallelConfig, size: int) -> int:
    """Return how many processes share spread experts: as given, or those of a copy."""
    return settings.expert or size // settings.replicate


def machines(config: TrainConfig, processes: Processes) -> int:
    """Return the number of machines: as given, or as torchrun says."""
    return config.parallel.nodes or processes.nodes


def own_machine(config: TrainConfig, processes: Processes) -> tuple[bool, ...]:
    """Return, per process that shares experts with this one, whether it is on its machine."""
    per_machine = processes.size // machines(config, processes)
    mine, members = processes.rank // per_machine, experts_group(config.parallel, processes.size)
    first = processes.rank // members * members
    return tuple(rank // per_machine == mine for rank in range(first, first + members))


def _check_sizes(config: TrainConfig, processes: Processes) -> None:
    size, settings, nodes = processes.size, config.parallel, machines(config, processes)
    if config.data.shard_by == "source":
        _check_batch(config, "machines", nodes)
    if size == 1:
        return  # settings of many processes have no effect, so that one process can go on
    for name, value, among, count in (
        ("expert_tensor", settings.expert_tensor, "processes", size),
        ("replicate", settings.replicate, *_groups(settings, size)),
        ("nodes", nodes, "processes", size),
    ):
        if count % value:
            fits = max(n for n in range(1, min(count, value) + 1) if count % n == 0)
            raise ConfigError(
                f"parallel.{name}={value} does not divide the {count} {among}; the nearest that "
                f"works is {fits}"
            )
    _check_batch(config, *_groups(settings, size))
    if config.data.shard_by == "source" and size // nodes % settings.expert_tensor:
        raise ConfigError(
            f"parallel.expert_tensor={settings.expert_tensor} makes processes of several machines "
            "share tokens, but with data.shard_by=source each machine has its own text; give a "
            f"divisor of its {size // nodes} processes, or data.shard_by=none"
        )
    if settings.all_to_all == "hierarchical" and nodes == 1:
        raise ConfigError(
            "parallel.all_to_all=hierarchical has no effect, because all processes are on one "
            "machine; give all_to_all=flat, or parallel.nodes=2 to treat them as two"
        )
    if settings.experts == "all_to_all":
        _check_groups(settings, size, nodes)


def _check_groups(settings: ParallelConfig, size: int, nodes: int) -> None:
    """Raise ConfigError if experts cannot be spread over groups of processes as configured."""
    members, per_machine = experts_group(settings, size), size // nodes
    if members < 2:
        raise ConfigError(
            f"parallel.replicate={settings.replicate} leaves one process to a copy of the model, "
            f"which would have all experts; give parallel.expert={size}, or experts=data"
        )
    if size % members:
        fits = max(n for n in range(1, min(size, members) + 1) if size % n == 0)
        raise ConfigError(
            f"parallel.expert={members} does not divide the {size} processes; the nearest that "
            f"works is {fits if fits > 1 else size}"
        )
    if per_machine % members and members % per_machine:
        raise ConfigError(
            f"parallel.expert={members} processes are not equally many of each machine, which has "
            f"{per_machine}; give a divisor of {per_machine}, or a multiple of it"
        )
    if settings.all_to_all == "hierarchical" and members <= per_machine:
        raise ConfigError(
            f"parallel.all_to_all=hierarchical has no effect, because the {members} processes that "
            "share experts are on one machine; give all_to_all=flat, or parallel.expert="
            f"{2 * per_machine}"
        )


def _groups(settings: ParallelConfig, size: int) -> tuple[str, int]:
    """Return what a micro-batch is divided among, and their number."""
    tensor = settings.expert_tensor
    return ("processes", size) if tensor == 1 else (f"groups of {tensor} processes", size // tensor)


def _check_batch(config: TrainConfig, among: str, count: int) -> None:
    if config.batch_size % count:
        raise ConfigError(
            f"batch_size={config.batch_size} sequences do not divide among {count} {among}; the "
            f"nearest that works is batch_size={nearest_multiple(config.batch_size, count)}"
        )


def check_model(config: TrainConfig, model: PreTrainedModel, processes: int) -> list[str]:
    """Return what to say about a model that is to be spread over processes.

    Raises:
        ConfigError: It cannot be spread as configured.
    """
    settings, lines = config.parallel, []
    if processes == 1 and settings != ParallelConfig(mixed_precision=settings.mixed_precision):
        but = " but mixed_precision" if settings.mixed_precision else ""
        lines.append(f"one process: settings of parallel{but} have no effect")
    if processes > 1 and settings.expert_tensor > 1:
        check_divisible(int(model.config.num_experts), settings.expert_tensor)
    if settings.experts == "all_to_all":
        rule = getattr(model.config, "training_rule", None)
        rule = rule or f"top_k:{model.config.num_experts_per_tok}"
        members = 1 if processes == 1 else experts_group(settings, processes)
        check_spreadable(int(model.config.num_experts), members, rule)
        # The last token of a sequence is a target only, but is computed too.
        rows = config.batch_size * (config.seq_len + 1) * chosen_experts(model) // processes
        factor, delta = settings.capacity_factor, settings.capacity_delta
        lines.append(capacity_line(model.config, rows, factor, delta))
    return lines
