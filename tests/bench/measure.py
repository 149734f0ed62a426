"""What the operating system says about a process, and about this machine."""

import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

NODE_FOLDER = Path(__file__).parent / "node"


def cpu_ns(pid: int) -> int:
    """User and system time of all threads of a process, those that ended included, in nanoseconds.

    The clock id is the one clock_getcpuclockid(3) computes; /proc/PID/stat says the same in steps of 10 ms.
    """
    return time.clock_gettime_ns((~pid << 3) | 2)


def rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    found = re.search(r"^Rss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found, "the kernel writes this line"
    return int(found[1])


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def percentile_ms(ordered_ns: Sequence[int], share: float) -> float:
    """The value below which `share` of the ordered values lie, in milliseconds; 0 of none."""
    if not ordered_ns:
        return 0.0
    return round(ordered_ns[min(int(len(ordered_ns) * share), len(ordered_ns) - 1)] / 1e6, 3)


def machine(node_version: str | None) -> str:
    """One line: processor, system and versions, those of Node only where it takes part."""
    parts = [
        f"{_processor()}, {os.cpu_count()} CPUs",
        f"{platform.system()} {platform.release().partition('-')[0]}",
        f"Python {platform.python_version()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "uvloop")),
    ]
    if node_version:
        parts += [f"Node {node_version.removeprefix('v')}", *map(_node_package, ("express", "node-fetch"))]
    return "; ".join(parts)


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _node_package(name: str) -> str:
    manifest = json.loads((NODE_FOLDER / "node_modules" / name / "package.json").read_text())
    return f"{name} {manifest['version']}"
