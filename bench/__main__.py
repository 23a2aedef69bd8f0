"""All workloads in one run: writes bench/results/DATE.json, and prints the tables.

    python -m bench [--full] [--output FILE]

The short form takes about four minutes on two idle cores, `--full` an hour or so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench import latency, many
from bench.bar import Bar
from bench.opponents import OPPONENTS
from bench.report import tables
from bench.requests import Line, Workload, company, measure

RESULTS: Final = Path(__file__).parent / "results"

KEY: Final = (
    "bare ASGI, one read",
    "nonstick memory, 1 node",
    "nonstick sqlite, 3 nodes",
    "nonstick valkey, 1 node",
    "nonstick valkey, 3 nodes",
    "mcp, in memory",
    "mcp, in memory, JSON",
)
STATEFUL: Final = (
    "nonstick memory, 1 node",
    "nonstick sqlite, 3 nodes",
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

    def workloads(self) -> list[tuple[Workload, tuple[str, ...]]]:
        """Each with the opponents that it says something about."""
        whole = self.requests
        return [
            (Workload("echo", 16, whole), tuple(OPPONENTS)),
            (Workload("echo", 1, whole), KEY),
            (Workload("echo", 64, whole), KEY),
            (Workload("progress", 16, whole // 4), STATEFUL),
            (Workload("initialize", 16, whole // 2), STATEFUL),
        ]


SHORT: Final = Size(rounds=3, requests=320, events=100, idle=5000, streams=500)
FULL: Final = Size(rounds=7, requests=3200, events=2000, idle=100_000, streams=10_000)

MANY_STEPS: Final = 2 * (many.SAMPLES + 1) + 2 + many.BROADCASTS


async def _requests(size: Size, bar: Bar) -> list[Line]:
    bar.step("starting all opponents")
    lines = []
    async with company(list(OPPONENTS.values())) as stages:
        for workload, names in size.workloads():
            chosen = [stage for stage in stages if stage.opponent.name in names]
            lines += await measure(chosen, workload, size.rounds, bar.step)
    return lines


def run(size: Size) -> dict[str, Any]:
    """All workloads, one after the other; within each, the opponents take turns."""
    turns = sum(len(names) for _, names in size.workloads()) * size.rounds
    total = 1 + turns + len(LATENCY_STORES) * len(latency.MEASURES) + MANY_STEPS + size.streams // 1024
    bar = Bar(total)
    before = os.getloadavg()[0]
    lines = asyncio.run(_requests(size, bar))
    crossed: list[dict[str, Any]] = []

    def tell(result: latency.Result) -> None:
        bar.step(f"{result.store} {result.what}")
        crossed.append(asdict(result))

    for store in LATENCY_STORES:
        with latency.opened(store) as url, latency.runner() as loop:
            loop.run(latency.run(store, url, size.events, 100.0, tell, bars=False))
    lots = asyncio.run(many.run(size.idle, size.streams, bar.step))
    bar.close()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m bench" + (" --full" if size is FULL else ""),
        "environment": _environment(before),
        "size": asdict(size),
        "requests": [_kept(line) for line in lines],
        "latency": crossed,
        "many": lots,
    }


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


def _environment(load_before: float) -> dict[str, Any]:
    packages = ("nonstick", "mcp", "fastmcp", "uvicorn", "uvloop", "httptools", "pydantic", "redis", "hiredis")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="10,000 streams, 100,000 idle sessions, seven rounds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of bench/results/DATE.json")
    options = parser.parse_args()
    results = run(FULL if options.full else SHORT)
    output = options.output or RESULTS / f"{results['date'][:10]}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
