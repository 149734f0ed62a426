"""A system instance of systemd of one's own: process 1 of a pid namespace, with /run, /dev and a cgroup to itself.

Everything else of the machine is read-only to it, its units are those of one directory, and the network is the
machine's. It needs root, and a cgroup2 file system in which groups can be made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import aisse

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterator

BOOT_S = 60.0
COMMAND_S = 90.0

PROGRAM = "/usr/lib/systemd/systemd"

# The interpreter that runs the tests and what it imports, where services can read. Nothing but that is in /opt there.
PYTHON = Path("/opt/python/bin") / Path(sys.executable).resolve().name
_IMPORTS = {"/opt/packages": sysconfig.get_path("purelib"), "/opt/aisse": str(Path(aisse.__file__).parents[1])}
ENVIRONMENT = {"PYTHONPATH": "/opt/aisse:/opt/packages", "LD_LIBRARY_PATH": "/opt/python/lib"}

# Becomes process 1 of its namespaces. The first argument is the one directory that is shared with the outside.
_BOOT = f"""
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/dev /run/shared
mount --bind "$1" /run/shared
mount --rbind /dev /run/dev
mount -t tmpfs -o mode=755 tmpfs /dev
for node in null zero full random urandom tty; do
    : > /dev/$node
    mount --bind /run/dev/$node /dev/$node
done
: > /dev/kmsg
mount --bind /run/shared/log /dev/kmsg
mkdir /dev/shm /dev/pts
mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
ln -s pts/ptmx /dev/ptmx
umount -l /run/dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir /opt/python {" ".join(_IMPORTS)}
mount --bind "{sys.base_prefix}" /opt/python
{"".join(f'mount --bind "{source}" {target};' for target, source in _IMPORTS.items())}
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
mkdir -p "$1"
mount --bind /run/shared "$1"
mount -o remount,ro,bind /
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
mount --make-rshared /
exec env -i PATH="$PATH" container=unshare SYSTEMD_UNIT_PATH="$1/units" \\
    SYSTEMD_GENERATOR_PATH="$1/none" SYSTEMD_ENVIRONMENT_GENERATOR_PATH="$1/none" \\
    {PROGRAM} --system --unit=default.target --log-target=kmsg --show-status=no \\
    --default-standard-output=null --default-standard-error=null
"""

# What every unit asks for, and nothing that would start anything.
_TARGETS = ("default", "sysinit", "basic", "sockets", "shutdown", "network-online", "multi-user")


class UnavailableError(Exception):
    """It cannot run on this machine; the message says what failed."""


@dataclass
class Manager:
    """The running instance. Files that its services are to see belong into `directory`."""

    directory: Path
    pid: int
    """Of its process 1, as it is seen from outside."""
    said: bytearray = field(default_factory=bytearray)

    def log(self) -> str:
        """What systemd itself said so far."""
        return self.said.decode(errors="replace")

    def write(self, unit: str, text: str) -> None:
        """A unit, or `<unit>.d/<name>.conf`; `reload` makes it known."""
        path = self.directory / "units" / unit
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    async def reload(self) -> None:
        await self.ctl("daemon-reload")

    async def ctl(self, *arguments: str) -> str:
        """`systemctl ...`, which must succeed."""
        code, text = await self.run("systemctl", *arguments)
        assert code == 0, f"systemctl {' '.join(arguments)}: {text}\n{self.log()}"
        return text

    async def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return (await self.ctl("show", "--value", f"--property={name}", unit)).strip()

    async def main_pid(self, unit: str) -> int:
        """The process id of a service's main process, as it is seen from outside."""
        inside = await self.show(unit, "MainPID")
        found = self._outside(inside)
        assert found is not None, f"{unit} has no main process: {inside}\n{self.log()}"
        return found

    def _outside(self, pid: str) -> int | None:
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                ids = re.findall(r"^NSpid:\t\d+\t(\d+)$", (process / "status").read_text(), re.MULTILINE)
                if ids == [pid] and (process / "ns/pid").readlink() == namespace:
                    return int(process.name)
        return None

    async def run(self, *line: str) -> tuple[int, str]:
        """A command in the namespaces: its exit code and what it said."""
        process = await asyncio.create_subprocess_exec(
            *("nsenter", f"--target={self.pid}", "--mount", "--pid", *line),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(COMMAND_S):
                out, _ = await process.communicate()
        finally:
            await _ended(process)
        assert process.returncode is not None
        return process.returncode, out.decode()


@contextlib.asynccontextmanager
async def booted() -> AsyncIterator[Manager]:
    """A running instance without any service. Raises UnavailableError where the machine does not allow one."""
    for program in (PROGRAM, "unshare", "nsenter", "systemctl"):
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is not installed")
    if os.geteuid() != 0:
        raise UnavailableError("a system instance needs root")
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(_directory())
        group = await stack.enter_async_context(_cgroup())
        manager = Manager(directory, 0)
        stack.enter_context(_log(manager))
        output = stack.enter_context((directory / "boot").open("wb"))
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec unshare "$@"', str(group)),
            *("--mount", "--pid", "--fork", "--mount-proc", "--cgroup", "--ipc", "--uts", "--kill-child"),
            *("sh", "-c", _BOOT, "boot", str(directory)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        stack.push_async_callback(_ended, process)  # and with it process 1, and with that all of the namespace
        await _until_running(manager, process)
        yield manager


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="aisse-systemd-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # services have a user of their own
        (directory / "none").mkdir()
        units = directory / "units"
        units.mkdir()
        for target in _TARGETS:
            (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        yield directory


async def _until_running(manager: Manager, process: Process) -> None:
    code, state = 1, "no process 1 yet"
    try:
        async with asyncio.timeout(BOOT_S):
            while code != 0 and process.returncode is None:
                await asyncio.sleep(0.02)
                manager.pid = _child(process.pid)
                if manager.pid:
                    code, state = await manager.run("systemctl", "is-system-running")
    except TimeoutError:
        pass
    if code != 0:
        said = (manager.directory / "boot").read_text().strip()
        raise UnavailableError(
            f"systemd does not start in namespaces of its own: {said or state.strip()} {manager.log()}"
        )


@contextlib.contextmanager
def _log(manager: Manager) -> Iterator[None]:
    """Collects what systemd writes to its /dev/kmsg."""
    fifo = manager.directory / "log"
    os.mkfifo(fifo)  # a plain file would be overwritten by each process that opens it anew
    descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, lambda: manager.said.extend(os.read(descriptor, 65536)))
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _child(pid: int) -> int:
    """The process id of a process's one child, 0 as long as there is none."""
    try:
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text() or "0")
    except OSError:
        return 0


@contextlib.asynccontextmanager
async def _cgroup() -> AsyncIterator[Path]:
    """A new group below our own, without processes in it before and after."""
    group = _new_cgroup()
    try:
        yield group
    finally:
        async with asyncio.timeout(BOOT_S):
            while "populated 1" in (group / "cgroup.events").read_text():
                await asyncio.sleep(0.02)
        for path, _, _ in os.walk(group, topdown=False):
            os.rmdir(path)  # noqa: PTH106 - it is a name, not a Path


def _new_cgroup() -> Path:
    mounts = Path("/proc/self/mountinfo").read_text()
    found = re.search(r"^\S+ \S+ \S+ \S+ (\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    ours = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if found is None or ours is None:
        raise UnavailableError("no cgroup2 file system is mounted")
    group = Path(found[1]) / ours[1] / f"aisse-test-{secrets.token_hex(4)}"
    try:
        group.mkdir()
    except OSError as error:
        raise UnavailableError(f"no cgroup can be made in {group.parent}: {error.strerror}") from None
    return group


async def _ended(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
