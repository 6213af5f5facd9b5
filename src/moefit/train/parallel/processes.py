"""The processes of a run: who they are, and what they decide and report together.

`torchrun` starts the processes and names them in environment variables. An error that one process
meets is raised by all, so that none waits for another.
"""

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from moefit.errors import ConfigError, ElsewhereError, LostProcessError, MoefitError
from moefit.train.parallel.heartbeats import ADVICE, Heartbeats

T = TypeVar("T")
TIMEOUT_SECONDS = 600.0


class Processes(Protocol):
    """The processes of a run, as one of them sees them."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    @property
    def node(self) -> int:
        """Number of this process's machine, from 0."""
        ...

    @property
    def nodes(self) -> int:
        """Number of machines."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        ...

    def agreed(self, action: Callable[[], T]) -> T:
        """Run an action in every process; if it fails in one, raise in all.

        Raises:
            MoefitError: The action failed; in the other processes an `ElsewhereError`.
        """
        ...

    def on_main(self, action: Callable[[], T]) -> T:
        """Run an action in the main process; all return its result, or raise if it fails."""
        ...

    def every(self, value: T) -> list[T]:
        """Return the values of all processes by rank."""
        ...

    def most(self, value: int) -> int:
        """Return the greatest value of all processes."""
        ...

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of values over all processes."""
        ...

    def check_alike(self, settings: dict[str, Any]) -> None:
        """Raise ConfigError if processes have different settings."""
        ...

    def begin(self) -> None:
        """Count a communication that this process begins: one with a lower count is behind."""
        ...


@dataclass(frozen=True, slots=True)
class OneProcess:
    """A run of one process, in which every decision is its own."""

    rank: int = 0
    size: int = 1
    node: int = 0
    nodes: int = 1

    @property
    def is_main(self) -> bool:
        """True."""
        return True

    def agreed(self, action: Callable[[], T]) -> T:
        """Run the action."""
        return action()

    def on_main(self, action: Callable[[], T]) -> T:
        """Run the action."""
        return action()

    def every(self, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def most(self, value: int) -> int:
        """Return the value."""
        return value

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def check_alike(self, settings: dict[str, Any]) -> None:
        """Do nothing."""

    def begin(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyProcesses:
    """One of the processes that torchrun started.

    Attributes:
        control: A gloo group for decisions.
        heartbeats: Of all processes.
    """

    rank: int
    size: int
    node: int
    nodes: int
    control: dist.ProcessGroup
    heartbeats: Heartbeats

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def agreed(self, action: Callable[[], T]) -> T:
        """Run an action in every process; see `Processes`."""
        result, failure = _outcome(action)
        failures = self.every(failure)
        if all(one is None for one in failures):
            return cast(T, result)
        number, first = next((i, one) for i, one in enumerate(failures) if one is not None)
        if self.is_main and any(one is None for one in failures):
            first = _told(first, f"process {number} of {self.size}: ")
        raise first if self.is_main else _elsewhere(first)

    def on_main(self, action: Callable[[], T]) -> T:
        """Run an action in the main process; see `Processes`."""
        self.begin()
        box: list[Any] = [None, None]
        if self.is_main:  # it may take hours, which is more than a group waits
            box = list(_outcome(action))
            self.heartbeats.announce()
        else:
            self.heartbeats.wait()
        dist.broadcast_object_list(box, src=0, group=self.control)
        result, failure = box
        if failure is not None:
            raise failure if self.is_main else _elsewhere(failure)
        return cast(T, result)

    def every(self, value: T) -> list[T]:
        """Return the values of all processes by rank."""
        self.begin()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def most(self, value: int) -> int:
        """Return the greatest value of all processes."""
        self.begin()
        box = torch.tensor([value])
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of values over all processes."""
        self.begin()
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, group=self.control)
        return box.tolist()

    def check_alike(self, settings: dict[str, Any]) -> None:
        """Raise ConfigError if processes have different settings."""

        def check() -> None:
            mine, first = settings, everyone[0]
            names = sorted(k for k in {*mine, *first} if mine.get(k) != first.get(k))
            if names:
                raise ConfigError(
                    f"{socket.gethostname()} was given other settings than process 0 "
                    f"({', '.join(names)}); give all processes the same configuration file and "
                    "overrides"
                )

        everyone = self.every(settings)
        self.agreed(check)

    def begin(self) -> None:
        """Count a communication that this process begins; see `Processes`."""
        self.heartbeats.begun += 1


def _outcome(action: Callable[[], T]) -> tuple[T | None, MoefitError | None]:
    """Run an action; return its result and the error that a user can mend, if any."""
    try:
        return action(), None
    except MoefitError as error:
        return None, error


def _told(error: MoefitError, where: str) -> MoefitError:
    return type(error)(f"{where}{error}")


def _elsewhere(error: MoefitError) -> ElsewhereError:
    return ElsewhereError(f"process 0 reports {type(error).__name__}: {error}")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, but torchrun sets it to a number; "
            "start the processes with torchrun"
        ) from error


_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # of torchrun's variables


@contextmanager
def joined_processes(timeout: float = TIMEOUT_SECONDS) -> Iterator[Processes]:
    """Join the processes that torchrun started, for the duration of the context.

    Without torchrun's environment variables, or with one process, it is a run of one process.
    Processes communicate by gloo on CPUs and by NCCL on GPUs.

    Args:
        timeout: Seconds to wait for another process before it counts as lost.

    Raises:
        ConfigError: The environment is not torchrun's.
        LostProcessError: A process did not start, ended or did not answer.
    """
    size = _number("WORLD_SIZE", 1)
    if size < 2:
        yield OneProcess()
        return
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size} is set, but {', '.join(missing)} is not; start with torchrun, or "
            "unset WORLD_SIZE for one process"
        )
    rank, per_node = _number("RANK", 0), _number("LOCAL_WORLD_SIZE", size)
    wait = timedelta(seconds=timeout)
    with lost_as_error(rank, size):
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=wait)
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=wait))
        dist.monitored_barrier(group=control, timeout=wait, wait_all_ranks=True)
        name = [secrets.token_hex(8)]
        dist.broadcast_object_list(name, src=0, group=control)
        heartbeats = Heartbeats(rank=rank, size=size, run=name[0], timeout=timeout)
        heartbeats.start()
    processes = ManyProcesses(
        rank=rank,
        size=size,
        node=_number("GROUP_RANK", rank // per_node),
        nodes=max(1, size // per_node),
        control=control,
        heartbeats=heartbeats,
    )
    with _ended(heartbeats), lost_as_error(rank, size, heartbeats):
        _check_machines(processes, per_node)
        yield processes
        dist.destroy_process_group()  # not after an error: waiting for lost processes could hang


@contextmanager
def _ended(heartbeats: Heartbeats) -> Iterator[None]:
    """Let the other processes know how this one ends, so that none of them waits for it."""
    try:
        yield
    except LostProcessError:
        heartbeats.stop("lost")
        raise
    except BaseException:
        heartbeats.stop("failed")
        raise
    heartbeats.stop("done")


def _check_machines(processes: ManyProcesses, per_node: int) -> None:
    """Raise ConfigError if machines have different numbers of processes."""
    counts = sorted(set(processes.every(per_node)))

    def check() -> None:
        if len(counts) > 1:
            raise ConfigError(
                f"machines have different numbers of processes ({', '.join(map(str, counts))}); "
                f"give torchrun --nproc-per-node {counts[0]} on all"
            )

    processes.agreed(check)


def limit_waiting(mesh: DeviceMesh) -> None:
    """Let the groups of a mesh wait as long as others do, instead of torch's half hour."""
    for group in mesh.get_all_groups():
        _set_pg_timeout(timedelta(seconds=TIMEOUT_SECONDS), group)


def local_device(name: str) -> torch.device:
    """Return the device of this process: one GPU each, or the CPU.

    Args:
        name: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: The machine has fewer GPUs than processes, or one GPU is named for all.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ConfigError(
            f"device={name} is one device, but there are several processes; give device=cuda for "
            "one GPU each, or device=cpu"
        )
    local, found = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= found:
        raise ConfigError(
            f"process {local} of {socket.gethostname()} has no GPU of its own: there are {found}; "
            f"give torchrun --nproc-per-node {max(1, found)}, or device=cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def lost_as_error(rank: int, size: int, heartbeats: Heartbeats | None = None) -> Iterator[None]:
    """Raise LostProcessError for errors of communication.

    Args:
        rank: Of this process.
        size: Number of processes.
        heartbeats: Name the lost process; None before there are any.

    Raises:
        LostProcessError: Another process ended or did not answer.
    """
    try:
        yield
    except MoefitError:
        raise
    except (RuntimeError, dist.DistError) as error:
        text = " ".join(str(error).split())
        signs = ("gloo", "NCCL", "onnection", "imed out", "monitoredBarrier", "socket")
        if not (isinstance(error, dist.DistError) or any(sign in text for sign in signs)):
            raise
        if heartbeats is not None:
            raise heartbeats.lost(text[:300]) from error
        raise LostProcessError(
            f"process {rank} of {size} lost contact with another process ({text[:300]}); {ADVICE}"
        ) from error
