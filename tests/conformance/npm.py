"""npm packages at pinned versions, and a Node.js to run them with.

A directory with a `package-lock.json` gets a `node_modules` beside it, which git ignores. No install script runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

__all__ = ["NpmMissing", "install", "node"]

_INSTALL_SECONDS: Final = 600.0


class NpmMissing(Exception):
    """This machine has no npm, or no Node.js that is new enough."""


def install(home: Path) -> Path:
    """What `home`'s lock file says is in `home/node_modules`; returns that directory. Quick when it already is.

    Raises:
        NpmMissing: There is no npm here.
        RuntimeError: npm failed; the message has what it said.
    """
    modules = home / "node_modules"
    lock, done = home / "package-lock.json", modules / ".installed"
    if done.is_file() and done.read_bytes() == lock.read_bytes():
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise NpmMissing("npm is not installed")
    print(f"npm ci in {home.name} (once)", flush=True)
    result = subprocess.run(
        [npm, "ci", "--no-progress"],
        cwd=home,
        env={**os.environ, "CI": "1"},
        capture_output=True,
        text=True,
        timeout=_INSTALL_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"npm ci failed in {home}:\n{result.stderr[-2000:]}")
    done.write_bytes(lock.read_bytes())
    return modules


def node(modules: Path, *, at_least: int) -> str:
    """The path of a Node.js of this major version or newer: the machine's, else one that is in `modules`.

    Raises:
        NpmMissing: There is none.
    """
    here = [found] if (found := shutil.which("node")) else []
    for candidate in [*here, *sorted(str(path) for path in modules.glob("node-*/bin/node"))]:
        if _major(candidate) >= at_least:
            return candidate
    raise NpmMissing(f"Node.js {at_least} or newer is not installed, and npm has none for this machine")


def _major(path: str) -> int:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.match(r"v(\d+)\.", said)
    return int(match[1]) if match else 0
