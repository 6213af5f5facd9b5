"""Which process of a run is lost: each sends heartbeats to the others, by torch's store.

A heartbeat says how often its process has begun to communicate, and how long it has computed. So a
process whose wait for others has failed can name the one that is stopped, has ended or is behind.
A process is silent while its heartbeat, as another one reads it, does not change. That is counted
in reads, so no clocks are compared, and a pause of all processes, as of a machine, is no silence.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread, get_native_id
from typing import Literal

import torch.distributed as dist
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from moefit.errors import LostProcessError

INTERVAL = 1.0
"""Seconds between heartbeats, of runs of up to 50 processes."""
_MISSED = 3  # heartbeats, until a process counts as stopped when communication has failed
_NO_LIMIT = timedelta(days=20)  # what fits in the store's 31 bits of milliseconds
_BACKGROUND = ("gloo", "pt_")  # names of torch's threads that wait for messages
ADVICE = (
    "torchrun reports which process ended first; the same command resumes from the last "
    "checkpoint, and torchrun --max-restarts=N does so by itself"
)

End = Literal["", "done", "lost", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a process says about itself.

    Attributes:
        count: Number of this heartbeat.
        begun: Communications that the process has begun.
        work: Hundredths of a second that it has computed, without waiting for messages.
        end: How it has ended: `done`, `lost` contact to another one, or `failed` by itself.
    """

    count: int
    begun: int
    work: int
    end: End = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A process, as another one sees it.

    Attributes:
        beat: Its last heartbeat; None before the first.
        silent: Seconds since that was new.
        idle: Seconds since it has computed anything.
        where: Its machine and process id.
    """

    beat: Beat | None
    silent: float
    idle: float
    where: str


def missing(seen: Sequence[Seen], silence: float) -> str | None:
    """Return who is lost and why, as part of a sentence; None if that cannot be told.

    Args:
        seen: All processes, by rank.
        silence: Seconds without a heartbeat after which a process counts as stopped.
    """
    alive = [(rank, one) for rank, one in enumerate(seen) if one.beat is None or not one.beat.end]
    stopped = [(rank, one) for rank, one in alive if one.silent >= silence]
    if stopped:
        longest = max(one.silent for _, one in stopped)
        return f"{_names(stopped)}: no heartbeat for {longest:.0f} s"
    failed = [(r, one) for r, one in enumerate(seen) if one.beat and one.beat.end == "failed"]
    if failed:
        return f"{_names(failed)}: ended with an error of its own"
    begun = [one.beat.begun for _, one in alive if one.beat is not None]
    behind = [(rank, one) for rank, one in alive if one.beat and one.beat.begun < max(begun)]
    if behind:
        return f"{_names(behind)}: still running, but did not come to where the others wait"
    return None


def _names(some: Sequence[tuple[int, Seen]]) -> str:
    return " and ".join(f"process {rank} ({one.where})" for rank, one in some)


@dataclass(slots=True)
class _Record:
    """The last heartbeat of a process, and how often it, and the work in it, was read again."""

    where: str
    beat: Beat | None = None
    missed: int = 0
    idle: int = 0

    def update(self, beat: Beat) -> None:
        known = self.beat
        self.missed = self.missed + 1 if known and beat.count == known.count else 0
        self.idle = self.idle + 1 if known and beat.work == known.work else 0
        self.beat = beat


@dataclass(slots=True, kw_only=True)
class Heartbeats:
    """Sends the heartbeats of this process and reads those of all.

    Attributes:
        rank: Of this process.
        size: Number of processes.
        run: A name that all processes of this start have in common, and no earlier ones.
        timeout: Seconds to wait for process 0 while it neither computes nor ends.
        interval: Seconds between heartbeats.
        begun: Communications that this process has begun; counted by those who begin them.
    """

    rank: int
    size: int
    run: str
    timeout: float
    interval: float = INTERVAL
    begun: int = 0
    _tasks: int = 0
    _seen: list[_Record] = field(default_factory=list)
    _answers: int = 0
    _known: int = 0
    _quiet: int = 0
    _end: End = ""
    _stop: Event = field(default_factory=Event)
    _thread: Thread | None = None
    _waits: Store | None = None

    def start(self) -> None:
        """Begin to send and read; all processes call it."""
        self.interval *= max(1.0, self.size / 50)  # the store has an even load
        self._waits = self._store()
        store = self._store()
        here = f"{socket.gethostname()}, process id {os.getpid()}"
        store.set(f"where/{self.rank}", here)
        places = (store.get(f"where/{rank}").decode() for rank in range(self.size))
        self._seen = [_Record(place) for place in places]
        self._thread = Thread(target=self._run, args=(store,), name="heartbeats", daemon=True)
        self._thread.start()

    def _store(self) -> Store:
        """Return a connection of its own: one that waits answers nothing else."""
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=self.timeout),
            wait_for_workers=False,
        )
        return PrefixStore(f"moefit/{self.run}", store)

    def stop(self, end: End) -> None:
        """Send a last heartbeat that says how this process ends."""
        self._end = end
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self.interval)  # no longer, for a store may not answer

    def _run(self, store: Store) -> None:
        keys = [f"beat/{rank}" for rank in range(self.size)]
        count, mine = 0, keys[self.rank]
        try:
            while True:
                stopping = self._stop.wait(self.interval if count else 0)
                count += 1
                store.set(mine, json.dumps(asdict(self._beat(count))))
                if stopping:
                    return
                beats = [Beat(**json.loads(text)) for text in store.multi_get(keys)]
                for record, beat in zip(self._seen, beats, strict=True):
                    record.update(beat)
                self._answers += 1
        except (RuntimeError, dist.DistError):
            return  # the process that has the store has ended, so contact will be lost anyway

    def _beat(self, count: int) -> Beat:
        work = _computed(apart_from=get_native_id())
        return Beat(count=count, begun=self.begun, work=work, end=self._end)

    def seen(self) -> list[Seen]:
        """Return the state of all processes when the store last answered.

        While it does not answer, process 0 is silent, whose machine usually has the store.
        """
        quiet = [self._quiet if rank == 0 != self.rank else 0 for rank in range(self.size)]
        return [
            Seen(
                beat=one.beat,
                silent=(one.missed + more) * self.interval,
                idle=(one.idle + more) * self.interval,
                where=one.where,
            )
            for one, more in zip(self._seen, quiet, strict=True)
        ]

    def _count_answers(self) -> None:
        """Count the calls, one per interval, since the store has last answered."""
        self._quiet = self._quiet + 1 if self._answers == self._known else 0
        self._known = self._answers

    def missing(self) -> str | None:
        """Return who is lost and why, after communication has failed; see `missing`.

        Waits some heartbeats for the signs of a process that has just ended.
        """
        silence = self.interval * _MISSED
        for _ in range(_MISSED + 1):
            seen = self.seen()
            if any(one.silent >= silence or (one.beat and one.beat.end) for one in seen):
                break
            time.sleep(self.interval)
            self._count_answers()
        return missing(self.seen(), silence)

    def announce(self) -> None:
        """Say that process 0 has finished its next task, for which others wait."""
        assert self._waits is not None
        self._waits.set(f"task/{self._tasks}", "")
        self._tasks += 1

    def wait(self) -> None:
        """Wait until process 0 has finished its next task, as long as it computes.

        Raises:
            LostProcessError: It has ended, or has neither computed nor sent a heartbeat for
                `timeout` seconds, or another process has ended or is silent.
        """
        over, number = Event(), self._tasks
        self._tasks += 1
        Thread(target=self._await, args=(number, over), daemon=True).start()
        while not over.wait(self.interval):
            self._count_answers()
            seen = self.seen()
            ended = any(one.beat and one.beat.end in ("lost", "failed") for one in seen)
            if ended or any(one.silent >= self.timeout for one in seen):
                raise self.lost(None)
            if seen[0].idle >= self.timeout:
                raise self.lost(f"it has computed nothing for {seen[0].idle:.0f} s", 0)

    def lost(self, reason: str | None, suspect: int | None = None) -> LostProcessError:
        """Return the error of a process that waited until its limit.

        Args:
            reason: What is known.
            suspect: The process that is to blame if no other is.
        """
        found = self.missing()
        if found is None:
            known = suspect is not None
            found = f"process {suspect} ({self._seen[suspect].where})" if known else "another one"
        return LostProcessError(
            f"process {self.rank} of {self.size} lost contact with {found}"
            f"{f' ({reason})' if reason else ''}; {ADVICE}"
        )

    def _await(self, number: int, over: Event) -> None:
        assert self._waits is not None
        # Without the store, its process has ended, so that the next communication fails.
        with suppress(RuntimeError, dist.DistError):
            self._waits.wait([f"task/{number}"], _NO_LIMIT)
        over.set()


def _computed(apart_from: int) -> int:
    """Return hundredths of a second of processor time of this process.

    Without one thread and without torch's that wait for messages, which compute a little whatever
    the process does. Threads that have ended do not count, so the number may become smaller.
    """
    total = 0
    for thread in Path("/proc/self/task").iterdir():
        try:
            before, _, after = (thread / "stat").read_text().rpartition(")")
        except OSError:
            continue  # it has just ended
        name, numbers = before.partition("(")[2], after.split()
        if int(thread.name) != apart_from and not name.startswith(_BACKGROUND):
            total += int(numbers[11]) + int(numbers[12])  # in user and in system mode
    return total
