"""What the soak test does to the server while clients use it, and what it watches."""

import argparse
import asyncio
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx2 as httpx
from soak_requests import bomb
from soak_server import Clock, Server, Tally

from moefit.serve.memory.budget import format_bytes

_IN_USE = "requests that run hold"  # of a budget too small for a KV cache that has grown
PAGE = os.sysconf("SC_PAGE_SIZE")


class Faults:
    """Everything that goes wrong, as loops that run until the clock's end.

    Args:
        http: A client.
        server: The server.
        paths: Folder of the model that it serves, and a small file system with its folder for
            prefixes, `prefixes`.
        given: Arguments of the command.
        tally: What is counted.
        clock: Says when to stop.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        server: Server,
        paths: tuple[Path, Path],
        given: argparse.Namespace,
        tally: Tally,
        clock: Clock,
    ):
        self._http, self._server, self._tally = http, server, tally
        self._goes_on = clock.goes_on
        self._copy, self._disk = paths
        self._given, self._chance = given, random.Random(given.seed)

    async def run(self) -> None:
        """Run all loops."""
        await asyncio.gather(
            self.change_budget(), self.lose_a_file(), self.fill_disk(), self.kill_in_mid_write(),
            self.cancel_some(), self.send_bombs(), self.watch(),
        )  # fmt: skip

    async def change_budget(self) -> None:
        """Set another budget, between the least of this model and all experts, or let it follow."""
        while self._goes_on():
            await asyncio.sleep(self._given.every)
            await self._server.up.wait()
            start = self._server.starts
            with suppress(httpx.TransportError):
                state = (await self._http.get("/v1/memory")).json()
                size = self._chance.randint(state["floor"], state["most"])
                wanted = "auto" if self._chance.random() < 1 / 6 else size
                response = await self._http.post("/v1/memory", json={"bytes": wanted})
                self._tally.budget_changes += 1
                if _IN_USE in response.text:  # requests that began since the bounds were asked for
                    self._tally.budgets_in_use += 1
                elif response.status_code != 200:
                    self._tally.budget_changes_failed += 1
                    self._tally.count("failed", f"budget: {response.text[:120]}")
                continue
            if start == self._server.starts and self._server.up.is_set():
                self._tally.without_an_end += 1

    async def lose_a_file(self) -> None:
        """Empty a shard for a while, so that reads are too short; its inode stays."""
        shard = sorted(self._copy.glob("*.safetensors"))[-1]
        whole = shard.read_bytes()
        while self._goes_on(70):
            await asyncio.sleep(60)
            async with self._server.steady:
                with shard.open("r+b") as file:
                    file.truncate(len(whole) // 4)
                self._tally.outages += 1
                self._server.outage_ended = float("inf")
                await asyncio.sleep(4)
                with shard.open("r+b") as file:
                    file.write(whole)
                os.sync()
                self._server.outage_ended = time.monotonic()

    async def fill_disk(self) -> None:
        """Leave no room or too little for a file on the disk with prefixes, half of the time."""
        filler = self._disk / "filler"
        while self._goes_on(30):
            await asyncio.sleep(15)
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
            self._tally.full_disks += 1
            with filler.open("r+b") as file:
                left = self._chance.randrange(0, 300 << 10)
                file.truncate(max(0, filler.stat().st_size - left))
            await asyncio.sleep(15)
            filler.unlink()

    async def kill_in_mid_write(self) -> None:
        """Kill the server while it writes a file of prefixes, if it does, and start it again."""
        while self._goes_on(90):
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * self._given.kill)
            if not self._goes_on():
                return
            async with self._server.steady:
                for folder in (self._disk / "prefixes").glob("*/"):
                    stop = await asyncio.create_subprocess_exec(
                        sys.executable, str(Path(__file__).with_name("stop_in_write.py")),
                        str(self._server.pid), str(folder), "10",
                    )  # fmt: skip
                    await stop.wait()
                self._server.kill()
                self._tally.kills += 1
                left = list((self._disk / "prefixes").glob("*/*.partial"))
                self._tally.kills_in_mid_write += bool(left)
                self._damage()
                await self._server.start(self._http)

    def _damage(self) -> None:
        """Change one byte of a file of prefixes, and cut another."""
        files = sorted((self._disk / "prefixes").glob("*/*.kv"))
        for path in self._chance.sample(files, min(2, len(files))):
            with path.open("r+b") as file:
                at = self._chance.randrange(path.stat().st_size)
                if self._tally.damaged_files % 2:
                    file.truncate(at)
                else:
                    file.seek(at)
                    (byte,) = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte ^ 1]))
            self._tally.damaged_files += 1

    async def cancel_some(self) -> None:
        """Cancel a request that runs or waits, as an operator."""
        while self._goes_on():
            await asyncio.sleep(10)
            await self._server.up.wait()
            with suppress(httpx.TransportError):
                found = (await self._http.get("/v1/requests")).json()["requests"]
                if found:
                    number = self._chance.choice(found)["number"]
                    await self._http.post("/v1/requests/cancel", json={"number": number})

    async def send_bombs(self) -> None:
        """Send schemas that take too much to compile; each must be refused."""
        number = 0
        while self._goes_on():
            await asyncio.sleep(10)
            await self._server.up.wait()
            with suppress(httpx.TransportError):
                one, number = bomb(number), number + 1
                response = await self._http.post(one.url, json=one.body)
                refused = response.status_code in (400, 429)
                self._tally.count("finished", "bomb refused" if refused else "bomb accepted")
                self._tally.wrong += not refused

    async def watch(self) -> None:
        """Compare the process's resident set with the current budget ten times per second."""
        minute = time.monotonic()
        while self._goes_on():
            await asyncio.sleep(0.1)
            await self._server.up.wait()
            start = self._server.starts
            try:
                before = await self._state()
                resident = self._resident()
                after = await self._state()
            except (httpx.TransportError, OSError):  # killed; a client notices if it was not
                continue
            if start != self._server.starts or not self._server.up.is_set():
                continue
            self._server.observe(after)
            excess = resident - max(before["budget"]["total"], after["budget"]["total"])
            self._tally.samples += 1
            self._tally.samples_above_budget += excess > 0
            self._tally.worst_excess_bytes = max(self._tally.worst_excess_bytes, excess)
            if time.monotonic() >= minute:
                self._tally.process_bytes_by_minute.append(resident)
                minute += 60
                print(f"{format_bytes(resident)}: {self._tally}", flush=True)

    async def _state(self) -> dict[str, dict[str, int]]:
        return (await self._http.get("/v1/memory")).raise_for_status().json()

    def _resident(self) -> int:
        return int(Path(f"/proc/{self._server.pid}/statm").read_text().split()[1]) * PAGE
