"""Builds the sdist and the wheel into dist/, and tries the wheel in an empty environment: `make dist`.

The wheel is built from the sdist, not from this tree, so that the sdist is known to be whole. The exit code is 1 where
something is missing or does not work.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

_QUESTION = b'{"messages": [{"role": "user", "content": "[[tokens=5 pace=0]]"}]}'
_START_S = 100
_EXIT_S = 60

# What has to be in the packages beside the modules, which the wheel needs to run at all.
IN_THE_WHEEL = (
    "aisse/py.typed",
    "aisse/deploy/aisse.service",
    "aisse/deploy/aisse.socket",
    "aisse/deploy/aisse@.service",
    "aisse/web/index.html",
    "aisse/web/aisse.js",
    "aisse/web/aisse.d.ts",
    "aisse/web/vendor/markdown-it.LICENSE",
)
IN_THE_SDIST = (*IN_THE_WHEEL, "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml")
FOLDERS_IN_THE_SDIST = ("nginx", "tests")


class DistError(Exception):
    """A package lacks something, or does not work."""


def build(into: Path) -> tuple[Path, Path]:
    """The sdist of this tree, and the wheel that is built from it, in a new or empty folder. Needs no network."""
    into.mkdir(parents=True, exist_ok=True)
    _hatch("sdist", ROOT, into)
    (sdist,) = into.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (tree,) = Path(unpacked).iterdir()
        _hatch("wheel", tree, into)
    (wheel,) = into.glob("*.whl")
    return sdist, wheel


def _hatch(target: str, tree: Path, into: Path) -> None:
    line = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(into.absolute())]
    done = subprocess.run(line, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistError(f"hatchling: {done.stderr.strip()[-500:]}")


def look(sdist: Path, wheel: Path) -> None:
    """Raises DistError where a file is missing in a package."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    missing = [name for name in IN_THE_SDIST if name not in names]
    missing += [f"{name}/" for name in FOLDERS_IN_THE_SDIST if not any(found.startswith(f"{name}/") for found in names)]
    if missing:
        raise DistError(f"{sdist.name} lacks {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in IN_THE_WHEEL if name not in names]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        missing.append("LICENSE")
    if missing:
        raise DistError(f"{wheel.name} lacks {', '.join(missing)}")


def install(wheel: Path, folder: Path, dependencies: Path | None = None) -> Path:
    """The interpreter of a new environment in `folder` that has the wheel and what it depends on, and nothing else.

    With `dependencies`, a folder of packages, nothing is fetched: they are taken from there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    if dependencies is not None:
        pip += ["--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    if dependencies is not None:
        # What an editable install puts there is not followed: such files count in an environment's own folder alone.
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


def attempt(python: Path) -> list[str]:
    """Uses the installed commands as somebody new would. What was seen, in words; DistError where it is not right."""
    command = python.with_name("aisse")
    version = _said([command, "--version"]).strip()
    where = Path(_said([python, "-c", "import aisse; print(aisse.__file__)"]).strip())
    if not where.is_relative_to(python.parents[1]):
        raise DistError(f"it runs {where}, and not what was installed")
    units = _said([command, "unit"])
    found = re.findall(r"^# --- /etc/systemd/system/(\S+)$", units, re.MULTILINE)
    if len(found) != 3 or f"ExecStart={python}" not in units:
        raise DistError("`aisse unit` does not print three units for its own interpreter")
    served = _serve(command)
    return [version, f"units: {', '.join(found)}", *served]


def _said(line: list[str | Path]) -> str:
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(line, cwd=elsewhere, env=_environ(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistError(f"{line[0]}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _environ() -> dict[str, str]:
    """Without what would have this tree imported, and without settings."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AISSE_", "COVERAGE_"))
    }


def _serve(command: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as elsewhere, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [command, "serve", "--port", "0", "--upstream", "simulator"],
            cwd=elsewhere,
            env=_environ(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            address = re.search(r"http://\S+", first)
            if address is None:
                errors.seek(0)
                raise DistError(f"`aisse serve` does not start: {errors.read().decode()[-500:]}")
            seen = _asked(address[0])
            process.send_signal(signal.SIGTERM)
            if process.wait(_EXIT_S) != 0:
                raise DistError("`aisse serve` does not end well")
        finally:
            process.kill()
            process.communicate()
    return seen


def _asked(url: str) -> list[str]:
    page = _got(f"{url}/")
    files = ["aisse.js", *re.findall(r'(?:src|href)="(?!data:)([^":#]+)"', page)]
    for file in files:
        _got(f"{url}/{file}")
    headers = {"Content-Type": "application/json"}
    answer = _got(urllib.request.Request(f"{url}/api/chat", data=_QUESTION, headers=headers))
    if '"reason":"complete"' not in answer:
        raise DistError(f"the simulator's answer is not complete: {answer[-200:]}")
    return [f"page: / and {', '.join(dict.fromkeys(files))}", "answer: complete"]


def _got(request: str | urllib.request.Request) -> str:
    try:
        with urllib.request.urlopen(request, timeout=_START_S) as response:
            text: str = response.read().decode()
    except OSError as error:
        url = request if isinstance(request, str) else request.full_url
        raise DistError(f"{url}: {error}") from None
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", help="where they go: dist")
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    try:
        sdist, wheel = build(folder)
        look(sdist, wheel)
        with tempfile.TemporaryDirectory() as environment:
            seen = attempt(install(wheel, Path(environment)))
    except DistError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([*seen, *(f"{path}  {path.stat().st_size:,} bytes" for path in (sdist, wheel))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
