"""The browser client in a Node process, run by jobs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    Outcome = dict[str, Any]

HERE = Path(__file__).parent
CLIENT = HERE.parents[1] / "aisse" / "web" / "aisse.js"
RUN_S = 90.0
TELL_S = 20.0
QUICK = 900_000


class Driver:
    """One Node process for many tests. Jobs, and what is told of them, are described in node/driver.mjs."""

    def __init__(self, node: str) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [node, str(HERE / "node" / "driver.mjs"), CLIENT.as_uri()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._numbers = itertools.count(1)
        self._told: dict[tuple[int, bool], Future[Outcome]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):
                file.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            outcome = json.loads(line)
            self._told.pop((outcome["run"], outcome["done"])).set_result(outcome)
        for future in list(self._told.values()):
            future.set_exception(RuntimeError("Node has ended"))

    def begin(self, **job: Any) -> Run:
        return Run(self, next(self._numbers), job)

    async def run(self, **job: Any) -> Outcome:
        return await self.begin(**job).outcome()

    async def value(self, **job: Any) -> Any:
        """What a job that is no chat comes to."""
        return (await self.run(**job))["value"]

    @contextlib.contextmanager
    def patched(self, **patch: Any) -> Iterator[None]:
        """Within, Node's globals are as node/driver.mjs says; by default the client's pauses take no time."""
        self.say({"patch": {"quick": QUICK, "random": 0.5} | patch})
        try:
            yield
        finally:
            self.say({"patch": {}})

    def expect(self, run: int, *, done: bool) -> Future[Outcome]:
        """What is told of a run next: at its end, or before."""
        future: Future[Outcome] = Future()
        self._told[run, done] = future
        return future

    def say(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `_read` tells
            self._process.stdin.write(json.dumps(line).encode() + b"\n")
            self._process.stdin.flush()

    def stderr(self) -> str:
        # Without a seek: Node writes at the same offset.
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode()[-2000:]


class Run:
    """A chat under way."""

    def __init__(self, driver: Driver, number: int, job: dict[str, Any]) -> None:
        self._driver = driver
        self._number = number
        self._told = driver.expect(number, done=True)
        driver.say({"run": number, **job})

    def do(self, what: str) -> None:
        self._driver.say({"run": self._number, "do": what})

    async def outcome(self) -> Outcome:
        """All of it, once it is over. AssertionError with what there is where that takes too long."""
        try:
            async with asyncio.timeout(RUN_S):
                outcome = await asyncio.wrap_future(self._told)
        except TimeoutError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    raise AssertionError(f"not over: {await self.so_far()}") from None
            raise AssertionError(f"Node hangs; {self._driver.stderr()}") from None
        assert "broken" not in outcome, outcome["broken"]
        return outcome

    async def so_far(self) -> Outcome:
        """What there is of it now."""
        told = self._driver.expect(self._number, done=False)
        self.do("tell")
        return await asyncio.wrap_future(told)
