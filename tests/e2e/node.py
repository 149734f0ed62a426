"""Node, and the packages that tests run in it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

CLIENTS = Path(__file__).parent / "clients"

_INSTALL_S = 150
_OPTIONS = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline")


class NodeMissingError(Exception):
    """Node or a package is not there, in words."""


def node_with(folder: Path) -> str:
    """Node's path, with the packages of `folder`/package.json installed there. Raises NodeMissingError."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NodeMissingError(f"{'npm' if node else 'node'} is not installed")
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    if wanted != {name: _installed(folder, name) for name in wanted}:
        try:
            done = subprocess.run(
                [npm, "install", *_OPTIONS], cwd=folder, capture_output=True, text=True, check=False, timeout=_INSTALL_S
            )
        except subprocess.TimeoutExpired:
            raise NodeMissingError(
                f"npm install takes longer than {_INSTALL_S} seconds; is the registry reachable?"
            ) from None
        if done.returncode:
            raise NodeMissingError("npm install failed: " + done.stderr.strip()[-300:])
    return node


def _installed(folder: Path, name: str) -> str | None:
    manifest = folder / "node_modules" / name / "package.json"
    version: str | None = json.loads(manifest.read_text())["version"] if manifest.exists() else None
    return version
