"""All workloads: writes bench/results/DATE.json part by part, and prints the tables.

    python -m bench [--full] [--only PART ...] [--output FILE]

The short form takes about five minutes on two idle cores, `--full` half an hour or so. The parts that are run replace
those in the file, the others stay: a long run can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench import arrivals, guard, instructions, latency, many, million, resume
from bench.bar import Bar
from bench.load import runner
from bench.opponents import OPPONENTS
from bench.report import tables
from bench.requests import Line, Workload, company, measure
from bench.stage import raise_file_limit

RESULTS: Final = Path(__file__).parent / "results"

KEY: Final = (
    "bare ASGI, one read",
    "bare ASGI, one read, 3 nodes",
    "nonstick memory, 1 node",
    "nonstick sqlite, 3 nodes",
    "nonstick valkey, 1 node",
    "nonstick valkey, 3 nodes",
    "mcp, in memory",
    "mcp, in memory, JSON",
)
ECHO: Final = tuple(name for name in OPPONENTS if name != "mcp, event store")
"""Without the one that is there for its resumes."""
STATEFUL: Final = (
    "nonstick memory, 1 node",
    "nonstick sqlite, 3 nodes",
    "nonstick valkey, 1 node",
    "nonstick valkey, 3 nodes",
    "nonstick postgres, 3 nodes",
    "mcp, in memory",
    "FastMCP, in memory",
    "TypeScript SDK, in memory",
)
LATENCY_STORES: Final = tuple(store for store in latency.STORES if store != "memory")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    rounds: int
    requests: int
    events: int
    idle: int
    streams: int
    seconds: float
    million: tuple[int, int]

    def workloads(self) -> list[tuple[Workload, tuple[str, ...]]]:
        """Each with the opponents that it says something about."""
        whole = self.requests
        return [
            (Workload("echo", 16, whole), ECHO),
            (Workload("echo", 1, whole), KEY),
            (Workload("echo", 64, whole), KEY),
            (Workload("progress", 16, whole // 4), STATEFUL),
            (Workload("initialize", 16, whole // 2), STATEFUL),
        ]


SHORT: Final = Size(rounds=24, requests=64, events=100, idle=5000, streams=500, seconds=2.0, million=(1000, 10_000))
FULL: Final = Size(
    rounds=40, requests=320, events=2000, idle=100_000, streams=10_000, seconds=5.0, million=(million.FEW, million.MANY)
)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """What can be run alone: `steps` says how often it tells how far it is. `full_only`: not in the short form."""

    run: Callable[[Size, Tell], Coroutine[Any, Any, Any]]
    steps: Callable[[Size], int]
    full_only: bool = False


async def _requests(size: Size, tell: Tell) -> list[dict[str, Any]]:
    tell("starting all opponents")
    lines = []
    async with company([OPPONENTS[name] for name in ECHO]) as stages:
        for workload, names in size.workloads():
            chosen = [stage for stage in stages if stage.opponent.name in names]
            lines += await measure(chosen, workload, size.rounds, tell)
    return [_kept(line) for line in lines]


async def _latency(size: Size, tell: Tell) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def told(result: latency.Result) -> None:
        tell(f"{result.store} {result.what}")
        found.append(asdict(result))

    for store in LATENCY_STORES:
        with latency.opened(store) as url:
            await latency.run(store, url, size.events, 100.0, told, bars=False)
    return found


async def _arrivals(size: Size, tell: Tell) -> list[dict[str, Any]]:
    steps = await arrivals.run(arrivals.NAMES, arrivals.RATES, size.seconds, tell)
    return [{**asdict(step), "sustained": step.sustained} for step in steps]


COUNTED: Final = (*instructions.KINDS, *instructions.SDK_KINDS)

PARTS: Final = {
    "requests": Part(_requests, lambda size: 1 + sum(len(names) for _, names in size.workloads()) * size.rounds),
    "latency": Part(_latency, lambda _: len(LATENCY_STORES) * len(latency.MEASURES)),
    "arrivals": Part(_arrivals, lambda _: len(arrivals.NAMES) * len(arrivals.RATES)),
    "resume": Part(lambda _, tell: resume.run(resume.NAMES, tell), lambda _: len(resume.NAMES) * (resume.RESUMES + 2)),
    "streams": Part(lambda size, tell: many.run_streams(size.streams, tell), lambda size: many.steps(0, size.streams)),
    "idle": Part(lambda size, tell: many.run_idle(size.idle, tell), lambda size: many.steps(size.idle, 0)),
    "flat": Part(lambda _, tell: guard.growth(tell), lambda _: len(guard.GROWTH)),
    "million": Part(
        lambda size, tell: million.run(*size.million, tell), lambda size: million.steps(*size.million), full_only=True
    ),
    "instructions": Part(lambda _, tell: instructions.measure(COUNTED, tell), lambda _: len(COUNTED), full_only=True),
}


def run(name: str, size: Size, before: str = "") -> tuple[Any, dict[str, Any]]:
    """What this part measured, and when and how it was run. `before` is shown in front of what it does."""
    part = PARTS[name]
    bar = Bar(part.steps(size))
    load, begun = os.getloadavg()[0], time.monotonic()
    try:
        with runner() as loop:
            found = loop.run(part.run(size, lambda what: bar.step(before + what)))
    finally:
        bar.close()
    return found, {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python -m bench{' --full' if size is FULL else ''} --only {name}",
        "code": _code(),
        "size": asdict(size),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "seconds": round(time.monotonic() - begun, 1),
    }


def kept(file: Path, environment: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """What the file holds and these parts do not replace.

    Raises:
        ValueError: It was measured elsewhere, or with other versions.
    """
    empty: dict[str, Any] = {"environment": environment, "parts": {}}
    if not file.exists():
        return empty
    results: dict[str, Any] = json.loads(file.read_text())
    stay = [name for name in results["parts"] if name not in parts]
    if not stay:
        return empty
    if results["environment"] != environment:
        raise ValueError(f"{file} was measured on another machine or with other versions: give another --output")
    about = {name: results["parts"][name] for name in stay}
    return {"environment": environment, "parts": about, **{name: results[name] for name in stay}}


def _kept(line: Line) -> dict[str, Any]:
    """Without each request's own time."""
    return {
        "workload": Workload(line.tool, line.connections, 0).name,
        "name": line.name,
        "requests": len(line.took),
        "cpu_us": round(line.cost, 1),
        "cpu_us_rounds": [round(cpu * 1e6, 1) for cpu in line.cpu],
        "p50_ms": round(line.percentile(0.5), 3),
        "p99_ms": round(line.percentile(0.99), 3),
        "rate": round(line.rate, 1),
    }


def _environment() -> dict[str, Any]:
    packages = ("nonstick", "mcp", "fastmcp", "uvicorn", "uvloop", "httptools", "pydantic", "redis", "hiredis")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _code() -> str:
    """The commit, if this is a checkout."""
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="10,000 streams, a million sessions, more of everything")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of bench/results/DATE.json")
    options = parser.parse_args()
    output = options.output or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}.json"
    chosen = options.only or [name for name, part in PARTS.items() if options.full or not part.full_only]
    raise_file_limit()
    failed = []
    try:
        results = kept(output, _environment(), chosen)
    except ValueError as error:
        sys.exit(str(error))
    output.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(chosen):
        before = f"part {number + 1} of {len(chosen)}, "
        try:
            results[name], results["parts"][name] = run(name, FULL if options.full else SHORT, before)
        except Exception:
            # It takes nothing of what is measured before it and after it.
            traceback.print_exc()
            failed.append(name)
            continue
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))
    print(f"\nwritten to {output}")
    if failed:
        sys.exit(f"failed, and can be run again by --only: {' '.join(failed)}")


if __name__ == "__main__":
    main()
