"""The benchmark's processes: started on their own CPUs, ended by their own ids, and never left behind."""

import contextlib
import ctypes
import http.client
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from measure import NODE_FOLDER

FOLDER = Path(__file__).parent
_PR_SET_PDEATHSIG = 1
_START_S = 60.0
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


class BenchError(Exception):
    """The benchmark cannot go on; the text says why."""


@dataclass(frozen=True)
class Placement:
    """The CPUs of the relay, and those of upstream and load. The same where there is only one."""

    relay: frozenset[int]
    others: frozenset[int]


def placement() -> Placement:
    """One CPU for the relay, as a relay of one process has; up to two of the rest for upstream and load."""
    cpus = sorted(os.sched_getaffinity(0))
    return Placement(frozenset(cpus[-1:]), frozenset(cpus[:-1][:2] or cpus))


class Child:
    """One process; leaving its `with` ends it. Output goes to files in `folder`, or `piped` in and out to us, or to a
    descriptor of the caller's.

    It dies with this process even where that is killed, and gets no Ctrl-C of its own: the parent ends it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        cpus: frozenset[int],
        folder: Path,
        *,
        piped: bool = False,
        stderr: int | None = None,
    ) -> None:
        self.name = name
        self._out = folder / f"{name}.{time.monotonic_ns()}"
        libc = ctypes.CDLL(None)

        def prepare() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.sched_setaffinity(0, cpus)

        with self._out.open("wb") as out, self._out.with_suffix(".err").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else out,
                stderr=err if stderr is None else stderr,
                cwd=FOLDER.parent.parent,
                env=_environment(),
                start_new_session=True,
                preexec_fn=prepare,  # noqa: PLW1509 - this process has one thread
            )
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Not asked first: a relay that drains would wait for streams that nobody needs any more.
        self.process.kill()
        self.process.wait()

    def port(self) -> int:
        """The port in the address that the process prints when it is ready. BenchError if it does not."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := _ADDRESS.search(self._out.read_text()):
                return int(found[1])
            time.sleep(0.02)
        raise BenchError(f"{self.name} did not start: {self.complaint()}")

    def complaint(self) -> str:
        """The end of what it wrote to stderr."""
        lines = self._out.with_suffix(".err").read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-5:]) or "no word on stderr"


class LoadDriver(Child):
    """The load's process and its commands."""

    def __init__(self, cpus: frozenset[int], folder: Path) -> None:
        command = [sys.executable, str(FOLDER / "load.py")]
        super().__init__("load", command, cpus, folder, piped=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def do(self, command: str, *, within: float = 120.0, **arguments: Any) -> dict[str, Any]:
        """One command and its answer; BenchError if it fails or takes longer than `within` seconds."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin, "a pipe, by the constructor"
        assert stdout, "a pipe, by the constructor"
        try:
            stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"the load is gone: {self.complaint()}") from None
        if not select.select([stdout], [], [], within)[0]:
            raise BenchError(f"the load did not answer {command!r} within {within} s")
        line = stdout.readline()
        if not line:
            raise BenchError(f"the load is gone: {self.complaint()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"load, {command}: {answer['error']}")
        return answer


@dataclass(frozen=True)
class Kind:
    """A relay under test. `missing` says why it cannot run here."""

    name: str
    command: tuple[str, ...]
    settings: bool = False  # takes aisse's settings as flags
    missing: str = ""


def relay_kinds(names: Sequence[str]) -> list[Kind]:
    """The relays by their names; node's packages are installed where they are not yet. BenchError: unknown name."""
    return [_kind(name) for name in names]


def start_relay(
    kind: Kind,
    upstream_port: int,
    cpus: frozenset[int],
    folder: Path,
    *,
    stderr: int | None = None,
    **settings: float | str,
) -> Child:
    """Starts a relay before the upstream; `settings` are aisse's, other relays have none."""
    address = f"http://127.0.0.1:{upstream_port}"
    if not kind.settings:
        command = [kind.command[0], *kind.command[1:2], address, *kind.command[2:]]
    else:
        # Streams of thousands that only think must not run into the limits on silence.
        chosen = {"port": 0, "max_streams": 10_000, "silence_s": 600, "no_content_s": 600} | settings
        flags = [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", f"{value}")]
        command = [*kind.command, "--upstream", address, "--log-format", "json", *flags]
    return Child(kind.name, command, cpus, folder, stderr=stderr)


def http_json(port: int, method: str, path: str) -> dict[str, Any]:
    """A small request to a loopback server; {} where the answer is no JSON object."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path)
        value = json.loads(connection.getresponse().read())
    except ValueError:
        return {}
    finally:
        connection.close()
    return value if isinstance(value, dict) else {}


def _kind(name: str) -> Kind:
    if name == "aisse":
        return Kind(name, (sys.executable, "-m", "aisse", "serve"), settings=True)
    if name == "naive":
        return Kind(name, (sys.executable, str(FOLDER / "naive.py")))
    if name == "node":
        node = shutil.which("node") or "node"
        return Kind(name, (node, str(NODE_FOLDER / "server.mjs")), missing=_node_missing())
    fault = name.removeprefix("faulty-")
    if fault in ("lose", "double", "swap"):
        return Kind(name, (sys.executable, str(FOLDER / "faulty.py"), fault))
    raise BenchError(f"no relay is called {name!r}")


def _node_missing() -> str:
    """Installs Node's packages if need be; the reason if there is no Node to measure."""
    npm = shutil.which("npm")
    if not shutil.which("node"):
        return "node is not installed"
    if not (NODE_FOLDER / "node_modules" / "express").exists():
        if not npm:
            return "npm is not installed"
        command = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=NODE_FOLDER, capture_output=True, text=True, check=False)
        if done.returncode:
            return "npm install failed: " + (done.stderr.strip().splitlines() or ["no word on stderr"])[-1]
    return ""


def _environment() -> dict[str, str]:
    """Ours without keys, settings and proxies: neither may change what is measured."""
    unwanted = re.compile(r"AISSE_.*|EZAI_API_KEY|ANTHROPIC_API_KEY|(HTTPS?|ALL|NO)_PROXY", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not unwanted.fullmatch(name)}
    return kept | {"NODE_ENV": "production"}
