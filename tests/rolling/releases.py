"""The wheel of the last release, which lies beside this file: `CONTRIBUTING.md` says how it is made."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

__all__ = ["ROOT", "released", "unpacked", "wheel", "wheel_version"]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def wheel() -> Path:
    """The one wheel that is here."""
    (found,) = HERE.glob("nonstick-*.whl")
    return found


def wheel_version() -> str:
    return wheel().name.split("-")[1]


def released() -> list[str]:
    """The versions that the changelog names, newest first."""
    return re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def unpacked(directory: Path) -> dict[str, str]:
    """Unpacks the wheel, as an installation of it would, and gives the environment of processes that are to run it."""
    with zipfile.ZipFile(wheel()) as archive:
        archive.extractall(directory)
    # The tests' own servers come from here, nonstick from there.
    return {"PYTHONPATH": f"{directory}:{ROOT}"}
