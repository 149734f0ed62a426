"""The packages as `make dist` builds them, installed into an environment of their own."""

from __future__ import annotations

import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import dist
import pytest

from aisse import __version__

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this tree and the wheel made of it."""
    return dist.build(tmp_path_factory.mktemp("dist"))


def test_wheel_in_an_empty_environment_has_its_commands_page_client_and_units(
    packages: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its dependencies are those of this environment, so that nothing is fetched."""
    python = dist.install(packages[1], tmp_path / "empty", Path(sysconfig.get_paths()["purelib"]))
    version, units, page, answer = dist.attempt(python)
    assert version == f"aisse {__version__}"
    assert units == "units: aisse.service, aisse.socket, aisse@.service"
    assert "aisse.js" in page
    assert answer == "answer: complete"


def test_packages_hold_what_they_should(packages: tuple[Path, Path]) -> None:
    dist.look(*packages)


def test_wheel_holds_every_file_of_the_package_and_no_other(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    folder = dist.ROOT / "aisse"
    there = {f"aisse/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    assert names == {name for name in there if "__pycache__" not in name}


def test_readme_is_what_an_index_shows(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        said = archive.read(name).decode()
    assert "\nDescription-Content-Type: text/markdown\n" in said
    assert said.endswith((dist.ROOT / "README.md").read_text())


def without(name: str, suffix: str) -> Callable[[tuple[Path, Path], Path], tuple[Path, Path]]:
    """Packages like those given, but for one file in one of them."""

    def changed(packages: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
        sdist, wheel = packages
        if suffix == ".whl":
            less = folder / wheel.name
            with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(less, "w") as copy:
                for item in archive.infolist():
                    if not item.filename.endswith(name):
                        copy.writestr(item, archive.read(item))
            return sdist, less
        less = folder / sdist.name
        with tarfile.open(sdist) as archive, tarfile.open(less, "w:gz") as copy:
            for member in archive:
                if not member.name.partition("/")[2].startswith(name):
                    copy.addfile(member, archive.extractfile(member))
        return less, wheel

    return changed


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("web/index.html", ".whl"),
        ("aisse@.service", ".whl"),
        ("licenses/LICENSE", ".whl"),
        ("nginx/", ".tar.gz"),
        ("CHANGELOG.md", ".tar.gz"),
    ],
)
def test_package_that_lacks_a_file_is_refused(
    packages: tuple[Path, Path], tmp_path: Path, name: str, suffix: str
) -> None:
    with pytest.raises(dist.DistError, match="lacks"):
        dist.look(*without(name, suffix)(packages, tmp_path))
