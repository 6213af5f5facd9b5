"""The server of the soak test: started, killed, started again; and what is counted."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

_PROGRAM = Path(__file__).with_name("impatient_server.py")
_LONGEST_TICK = 2.0  # seconds; on a busy machine a tenth of a second takes longer
_ERROR = re.compile(r"(?:\w+\.)*(\w+(?:Error|Exception))\b")


@dataclass(slots=True)
class Tally:
    """Counts for the record."""

    minutes: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    invalid: int = 0
    hung_up: int = 0
    cancelled: int = 0
    cut_by_kill: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    failed_without_cause: int = 0
    without_room: int = 0
    without_an_end: int = 0
    kills: int = 0
    kills_in_mid_write: int = 0
    budget_changes: int = 0
    budget_changes_failed: int = 0
    budgets_in_use: int = 0
    outages: int = 0
    full_disks: int = 0
    damaged_files: int = 0
    samples: int = 0
    samples_above_budget: int = 0
    worst_excess_bytes: int = 0
    logged: dict[str, int] = field(default_factory=dict)
    features: dict[str, int] = field(default_factory=dict)
    process_bytes_by_minute: list[int] = field(default_factory=list)

    def count(self, name: str, key: str, number: int = 1) -> None:
        """Add to one of the fields that count by key."""
        counts: dict[str, int] = getattr(self, name)
        counts[key] = counts.get(key, 0) + number


class Clock:
    """Time in which the test runs; none passes while all of it is stopped (SIGSTOP).

    Args:
        seconds: How long it runs, unless `stop` is called.
    """

    def __init__(self, seconds: float):
        self._seconds, self.ran = seconds, 0.0

    def stop(self) -> None:
        """End the test."""
        self._seconds = self.ran

    def goes_on(self, seconds: float = 0.0) -> bool:
        """Return whether more than so many seconds are left."""
        return self._seconds - self.ran > seconds

    async def run(self) -> None:
        """Count until the end."""
        last = time.monotonic()
        while self.goes_on():
            await asyncio.sleep(0.1)
            now = time.monotonic()
            self.ran, last = self.ran + min(now - last, _LONGEST_TICK), now


class Server:
    """`moefit serve` with one of several ways to draft tokens, another after each start.

    Args:
        command: Arguments of `moefit serve`.
        port: Where it listens.
        drafts: Values of `--speculate`, taken in turn.
        folder: For logs and caches.
        before: A command that runs the server, such as in a control group; may be empty.
        tally: What is counted.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        drafts: Sequence[str],
        folder: Path,
        before: Sequence[str],
        tally: Tally,
    ):
        self._command, self._drafts, self._folder = command, drafts, folder
        self._before, self._tally = before, tally
        self._port, self.url = str(port), f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._features: Mapping[str, int] = {}
        self._kv_tokens: int | None = None  # in the last sample of this process
        self.starts = self.pid = 0
        self.log = folder / "server.log"
        self.up = asyncio.Event()
        self.steady = asyncio.Lock()
        """Held while the server is killed and started, and while its files are changed."""
        self.outage_ended = float("-inf")

    async def start(self, http: httpx.AsyncClient) -> None:
        """Start the server with the next way of drafting, and wait until it answers."""
        draft = self._drafts[self.starts % len(self._drafts)]
        command = [
            *self._before, sys.executable, str(_PROGRAM), "serve", *self._command,
            "--port", self._port, "--speculate", draft,
        ]  # fmt: skip
        environ = {**os.environ, "XDG_CACHE_HOME": str(self._folder / "cache")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        for _ in range(600):
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended: {self.log.read_text()[-3000:]}")
            try:
                if (await http.get("/health")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.5)
        self.pid = _server_below(self._process.pid) if self._before else self._process.pid
        self.starts += 1
        most = (await http.get("/v1/memory")).json()["most"]
        (await http.post("/v1/memory", json={"bytes": most})).raise_for_status()
        self.up.set()

    def kill(self) -> None:
        """End the server at once."""
        assert self._process is not None
        self.up.clear()
        self._note_features()
        os.kill(self.pid, 9)
        self._process.wait(60)

    def end(self) -> None:
        """End the server as an operator would; it must exit without an error."""
        if self._process is None or self._process.poll() is not None:
            return
        self._note_features()
        os.kill(self.pid, 15)
        code = self._process.wait(120)
        if code:
            self._tally.count("logged", f"exit status {code}")

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def observe(self, state: Mapping[str, Any]) -> None:
        """Note what the features did since this start, from GET /v1/memory."""
        prefix, guesses = state["prefix_cache"], state["speculation"]
        self._features = {
            "prompt tokens": prefix["queries"],
            "of kept prefixes": prefix["hits"],
            "removed from memory": prefix["evicted"],
            **{f"{name} in files": prefix["disk"][name] for name in ("read", "written", "damaged")},
            "tokens drafted": guesses["drafted"],
            "drafted and right": guesses["accepted"],
            "experts read": state["counters"]["fetches"],
        }
        before, now = self._kv_tokens, int(state["kv_tokens"])
        self._kv_tokens = now
        if before is not None and before != now:
            change = "grew" if now > before else "gave back"
            self._tally.count("features", f"times that the KV cache {change}")

    def _note_features(self) -> None:
        for name, number in self._features.items():
            self._tally.count("features", name, number)
        self._features = {}
        self._kv_tokens = None

    def read_log(self) -> None:
        """Count what the log has of errors, by class, and of files of prefixes."""
        for line in self.log.read_text().splitlines():
            if line.startswith("peak "):  # written by the command before the server
                name, peak = "peak of the control group, MiB", int(line.split()[1])
                self._tally.features[name] = max(peak, self._tally.features.get(name, 0))
            elif found := _ERROR.match(line):
                self._tally.count("logged", found[1])
            else:
                for words in ("prefixes cannot be written", "is not used:"):
                    self._tally.logged[words] = self._tally.logged.get(words, 0) + (words in line)


def _server_below(pid: int) -> int:
    """Return the id of the server that another command runs."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if _PROGRAM.name.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        time.sleep(0.05)
    raise SystemExit("the command before the server runs none")
