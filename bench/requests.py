"""What a request costs: server CPU per request and latency, of every opponent, interleaved in one run.

    python -m bench.requests [--only NAME ...] [--tool echo|progress|initialize] [--connections 16] [--rounds 5]

All opponents are started at once and take turns, round by round, so that what the machine does meanwhile meets all of
them. CPU is user and system time of the opponent's processes, without the store's and the client's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.load import Load
from bench.opponents import OPPONENTS, TYPESCRIPT, Opponent
from bench.stage import Stage, Stores

__all__ = ["Line", "measure"]

ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "echo": {"text": "hello"},
    "progress": {"count": 10},
    "initialize": {},
}
WARM_UP: Final = 200


@dataclass
class Line:
    """What was measured of one opponent.

    Attributes:
        cpu: Seconds of server CPU per request, one a round.
        took: Seconds from sending to the whole answer, of all requests.
    """

    name: str
    tool: str
    connections: int
    cpu: list[float] = field(default_factory=list[float])
    took: list[float] = field(default_factory=list[float])

    @property
    def cost(self) -> float:
        """Median of the rounds, in microseconds."""
        return statistics.median(self.cpu) * 1e6

    def percentile(self, share: float) -> float:
        """In milliseconds."""
        took = sorted(self.took)
        return took[min(len(took) - 1, int(len(took) * share))] * 1e3


async def measure(
    opponents: Sequence[Opponent], tool: str, *, connections: int, rounds: int, requests: int
) -> list[Line]:
    """Starts them all, and lets them take turns."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nonstick-bench-")))
        stores = stack.enter_context(Stores(home))
        node = _node() if any(not opponent.app for opponent in opponents) else ""
        stages: list[tuple[Stage, Load]] = []
        for opponent in opponents:
            stage = Stage(opponent, stores.url(opponent.store), home, node)
            stack.callback(stage.stop)
            await stage.start()
            load = Load(stage.ports, opponent.speaks, connections)
            stack.callback(load.close)
            await load.open()
            await load.run(WARM_UP, tool, ARGUMENTS[tool])
            stages.append((stage, load))
        lines = [Line(stage.opponent.name, tool, connections) for stage, _ in stages]
        for number in range(rounds):
            for (stage, load), line in zip(stages, lines, strict=True):
                print(f"\r{tool}: round {number + 1} of {rounds}, {line.name:40}", end="", file=sys.stderr)
                before = stage.cpu()
                took = await load.run(requests, tool, ARGUMENTS[tool])
                line.cpu.append((stage.cpu() - before) / len(took))
                line.took += took
        print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
        return lines


def _node() -> str:
    from tests.conformance.npm import install, node

    return node(install(TYPESCRIPT), at_least=18)


def show(lines: Sequence[Line]) -> None:
    print(f"{'':42} {'CPU us':>8} {'p50 ms':>8} {'p99 ms':>8} {'p99/p50':>8}")
    for line in lines:
        p50, p99 = line.percentile(0.5), line.percentile(0.99)
        print(f"{line.name:42} {line.cost:8.0f} {p50:8.2f} {p99:8.2f} {p99 / p50:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=OPPONENTS, default=list(OPPONENTS))
    parser.add_argument("--tool", choices=ARGUMENTS, default="echo")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000, help="of each opponent in each round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = [OPPONENTS[name] for name in options.only]
    print(f"{platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
    lines = asyncio.run(
        measure(
            chosen,
            options.tool,
            connections=options.connections,
            rounds=options.rounds,
            requests=options.requests,
        )
    )
    show(lines)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines]))


if __name__ == "__main__":
    main()
