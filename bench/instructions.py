"""What a request costs in machine instructions: a real server process under callgrind, on a real Valkey.

    python -m bench.instructions                      # what CI compares, beside what was committed
    python -m bench.instructions --commit             # writes bench/instructions.json
    python -m bench.instructions --only NAME ... [--tool echo|progress|initialize] [--keep FOLDER]

Needs valgrind. Instructions in user space of the server's process alone, in thousands a call. Neither the speed of the
machine nor what else it does changes them; to compare two machines, take the ratio to the limit of the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench.budgets import LIMIT, SDK, SDK_JSON
from bench.load import Load, runner
from bench.opponents import OPPONENTS, Opponent
from bench.requests import ARGUMENTS, company
from bench.stage import Stage

__all__ = ["COMMITTED", "KINDS", "Kind", "committed", "differences", "environment", "measure", "ratios", "worse"]

COMMITTED: Final = Path(__file__).with_name("instructions.json")

WARM_UP: Final = 40
ROUNDS: Final = 3
"""The least counts: what a node does in the background, such as renewing its lease, falls into one or the other."""
TOLERANCE: Final = 0.03
"""Of a ratio to the limit, with the versions that the committed figures were counted with."""
OTHER_TOLERANCE: Final = 0.15
"""The same with other versions: each has its own costs, in the limit too."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """One request that is counted: `requests` in each round."""

    name: str
    opponent: str
    tool: str = "echo"
    requests: int = 40


LIMIT_KIND: Final = Kind("the limit", LIMIT)
OURS: Final = "nonstick valkey, 1 node"
KINDS: Final = (
    LIMIT_KIND,
    Kind("echo", OURS),
    Kind("10 notifications", OURS, "progress", 10),
    Kind("opening a session", OURS, "initialize", 20),
    Kind("echo, low-level", f"{OURS}, low-level"),
    Kind('echo, answer="sse"', f"{OURS}, sse"),
)
"""What CI compares."""
SDK_KINDS: Final = (Kind("echo of the SDK", SDK), Kind("echo of the SDK, JSON", SDK_JSON))
"""What `python -m bench` puts beside them."""


async def measure(kinds: Sequence[Kind], tell: Tell = lambda _: None, keep: Path | None = None) -> dict[str, float]:
    """Thousands of instructions a call of each kind. All opponents run at once, and each is asked for one at a time.

    Args:
        keep: Where callgrind's files stay, for `callgrind_annotate`.

    Raises:
        RuntimeError: There is no valgrind.
    """
    with tempfile.TemporaryDirectory(prefix="nonstick-bench-") as home:
        folder = keep or Path(home)
        folder.mkdir(parents=True, exist_ok=True)
        opponents = [_watched(OPPONENTS[name], folder) for name in dict.fromkeys(kind.opponent for kind in kinds)]
        found: dict[str, float] = {}

        async def ask(stage: Stage) -> None:
            for kind in kinds:
                if kind.opponent == stage.opponent.name:
                    found[kind.name] = await _count(stage, kind, folder)
                    tell(f"instructions: {kind.name}")

        async with company(opponents) as stages, asyncio.TaskGroup() as group:
            for stage in stages:
                group.create_task(ask(stage))
        return {kind.name: found[kind.name] for kind in kinds}


def _watched(opponent: Opponent, folder: Path) -> Opponent:
    """The same under callgrind, which counts once it is told to."""
    callgrind = shutil.which("valgrind")
    if callgrind is None or shutil.which("callgrind_control") is None:
        raise RuntimeError("bench.instructions needs valgrind: apt-get install valgrind")
    # An output file is made of each dump: its name ends with the process and the number of the dump.
    under = (callgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/callgrind.%p", "--instr-atstart=no")
    # Else the order of sets, and with it the number of instructions, is another in each run.
    return replace(opponent, under=under, options={**opponent.options, "PYTHONHASHSEED": "0"})


async def _count(stage: Stage, kind: Kind, folder: Path) -> float:
    """Of its first process, in thousands a call."""
    node, nodes = stage.pids[0], len(stage.pids)
    load = Load(stage.ports, stage.opponent.speaks, 1)
    await load.open()
    try:
        await load.run(WARM_UP * nodes, kind.tool, ARGUMENTS[kind.tool])
        await _control("--instr=on", node)
        counted = []
        for _ in range(ROUNDS):
            await _control("--zero", node)
            await load.run(kind.requests * nodes, kind.tool, ARGUMENTS[kind.tool])
            earlier = _dumps(folder, node)
            await _control("--dump", node)
            counted.append(sum(map(_total, _dumps(folder, node) - earlier)))
        await _control("--instr=off", node)
    finally:
        load.close()
    return round(min(counted) / kind.requests / 1000, 1)


async def _control(what: str, process: int) -> None:
    control = await asyncio.create_subprocess_exec(
        *("callgrind_control", what, str(process)), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await control.communicate()
    if control.returncode:
        raise RuntimeError(f"callgrind_control {what} failed:\n{said.decode(errors='replace')}")


def _dumps(folder: Path, process: int) -> set[Path]:
    return set(folder.glob(f"callgrind.{process}.*"))


def _total(dump: Path) -> int:
    """Instructions that callgrind counted in all threads."""
    for line in dump.read_text(errors="replace").splitlines():
        if line.startswith("totals:"):
            return int(line.split()[1])
    raise RuntimeError(f"{dump} has no total")


def ratios(thousands: Mapping[str, float]) -> dict[str, float]:
    """Of each kind to the limit."""
    return {name: round(count / thousands[LIMIT_KIND.name], 3) for name, count in thousands.items()}


def environment() -> dict[str, str]:
    """All that the figures depend on, apart from this code."""
    packages = ("mcp", "pydantic", "pydantic-core", "anyio", "starlette", "uvicorn", "uvloop", "httptools")
    libc = " ".join(platform.libc_ver()).strip()
    return {
        "machine": platform.machine(),
        "libc": libc,
        "python": platform.python_version(),
        **{name: version(name) for name in (*packages, "opentelemetry-api", "redis", "hiredis")},
    }


def committed() -> dict[str, Any]:
    """What `bench/instructions.json` holds: `environment` and `thousands`."""
    kept: dict[str, Any] = json.loads(COMMITTED.read_text())
    return kept


def worse(found: Mapping[str, float], kept: Mapping[str, float], tolerance: float) -> Iterator[str]:
    """One line for each kind whose ratio to the limit is above the committed one by more than this share of it."""
    were = ratios(kept)
    for name, ratio in ratios(found).items():
        if ratio > were[name] * (1 + tolerance):
            yield (
                f"{name}: {ratio:.2f} times the limit ({found[name]:.0f} thousand instructions), "
                f"committed {were[name]:.2f} ({kept[name]:.0f})"
            )


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What was not the same when the committed figures were counted."""
    return [f"{name} {here.get(name)}, not {there.get(name)}" for name in there if here.get(name) != there[name]]


def _show(found: Mapping[str, float], kept: Mapping[str, float]) -> None:
    limits = ratios(found) if LIMIT_KIND.name in found else {}
    for name, count in found.items():
        ratio = f", {limits[name]:.2f} times the limit" if limits else ""
        was = f"; committed: {kept[name]:.0f}" if name in kept else ""
        print(f"{name:42} {count:8.1f} thousand instructions{ratio}{was}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=OPPONENTS, help="these opponents instead")
    parser.add_argument("--tool", choices=ARGUMENTS, default="echo", help="with --only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where callgrind's files stay")
    parser.add_argument("--commit", action="store_true", help="write the figures to bench/instructions.json")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    kinds = [Kind(name, name, options.tool) for name in options.only] if options.only else KINDS
    with runner() as loop:
        found = loop.run(measure(kinds, lambda what: print(what, file=sys.stderr), options.keep))
    if options.json:
        print(json.dumps(found))
        return
    _show(found, committed()["thousands"] if COMMITTED.exists() and not options.only else {})
    if options.commit and not options.only:
        COMMITTED.write_text(json.dumps({"environment": environment(), "thousands": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
