"""What a request's time is spent on: py-spy watches one opponent's node under load, and the samples are summed up.

    python -m bench.where [--only NAME] [--tool echo] [--seconds 6]

A sample counts for the module whose function runs, and what a C function uses for the Python function that called it.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

from bench.load import Load
from bench.opponents import OPPONENTS
from bench.requests import ARGUMENTS, company

__all__ = ["main"]

CONNECTIONS: Final = 16
ROWS: Final = 25
RATE: Final = 400


async def _samples(name: str, tool: str, seconds: int) -> Counter[str]:
    """How often each function ran."""
    async with company([OPPONENTS[name]]) as [stage]:
        load = Load(stage.ports, stage.opponent.speaks, CONNECTIONS)
        await load.open()
        await load.run(200, tool, ARGUMENTS[tool])
        with tempfile.TemporaryDirectory(prefix="nonstick-bench-") as home:
            raw = Path(home) / "raw"
            command = ["py-spy", "record", "--format", "raw", "--full-filenames", "--function", "--nonblocking"]
            command += ["--rate", str(RATE), "--duration", str(seconds), "--output", str(raw)]
            watch = await asyncio.create_subprocess_exec(
                *command, "--pid", str(stage.pids[0]), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            waiting = asyncio.create_task(watch.communicate())
            while not waiting.done():
                await load.run(100, tool, ARGUMENTS[tool])
            _, said = await waiting
            if watch.returncode:
                raise RuntimeError(f"py-spy failed:\n{said.decode(errors='replace')}")
            lines = raw.read_text().splitlines()
        load.close()
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        found[stack.rpartition(";")[2]] += int(count)
    return found


def _module(frame: str) -> str:
    """`package/module`, of `function (/path/to/package/module.py)`."""
    path = frame.rpartition("(")[2].rstrip(")").partition(":")[0]
    for root in ("/site-packages/", "/src/"):
        if root in path:
            return path.rpartition(root)[2].removesuffix(".py")
    return re.sub(r".*/lib/python3\.\d+/", "python/", path).removesuffix(".py")


def _show(title: str, counts: Counter[str]) -> None:
    total: Any = counts.total()
    print(f"\n{title}")
    for name, count in counts.most_common(ROWS):
        print(f"  {100 * count / total:5.1f} %  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=OPPONENTS, metavar="NAME", default="nonstick valkey, 1 node")
    parser.add_argument("--tool", choices=ARGUMENTS, default="echo")
    parser.add_argument("--seconds", type=int, default=6)
    options = parser.parse_args()
    functions = asyncio.run(_samples(options.only, options.tool, options.seconds))
    if not functions:
        sys.exit("py-spy saw nothing: the machine may be too busy")
    modules: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    for frame, count in functions.items():
        modules[_module(frame)] += count
        packages[_module(frame).partition("/")[0]] += count
    _show("packages", packages)
    _show("modules", modules)
    _show(
        "functions", Counter({frame.partition(" (")[0] + " in " + _module(frame): n for frame, n in functions.items()})
    )


if __name__ == "__main__":
    main()
