"""What a request costs: server CPU per request and latency, of every opponent, interleaved in one run.

    python -m bench.requests [--only NAME ...] [--tool echo|progress|initialize] [--connections 16] [--rounds 20]

All opponents are started at once and take many short turns, in another order each round, so that what the machine does
meanwhile meets all of them. CPU is user and system time of the opponent's processes, without the store's and the
client's. Ratios are taken inside each round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.bar import Bar
from bench.figures import paired, share_of
from bench.load import Load, runner
from bench.opponents import OPPONENTS, TYPESCRIPT, Opponent
from bench.stage import Stage, Stores

__all__ = ["Line", "Workload", "company", "measure", "order"]

ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "echo": {"text": "hello"},
    "progress": {"count": 10},
    "initialize": {},
}
WARM_UP: Final = 200
LEAD: Final = 4
"""A turn begins with one part in so many that does not count: the processor's caches hold another's data until then."""


@dataclass(frozen=True)
class Workload:
    """What the opponents are asked, and over how many connections at once."""

    tool: str
    connections: int
    requests: int

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.connections} connection{'s' if self.connections > 1 else ''}"


@dataclass
class Line:
    """What was measured of one opponent.

    Attributes:
        cpu: Seconds of server CPU per request, one a round. All lines of a run have the same rounds.
        took: Seconds from sending to the whole answer, of all requests.
        rates: Requests a second, one a round.
    """

    name: str
    tool: str
    connections: int
    cpu: list[float] = field(default_factory=list[float])
    took: list[float] = field(default_factory=list[float])
    rates: list[float] = field(default_factory=list[float])

    @property
    def cost(self) -> float:
        """Median of the rounds, in microseconds."""
        return statistics.median(self.cpu) * 1e6

    @property
    def rate(self) -> float:
        """Median of the rounds, in requests a second."""
        return statistics.median(self.rates)

    def percentile(self, share: float) -> float:
        """In milliseconds."""
        return share_of(self.took, share) * 1e3


def order(opponents: int, number: int) -> list[int]:
    """Whose turn comes when in this round: shuffled, so that nobody follows the same neighbour again and again."""
    return random.Random(number).sample(range(opponents), opponents)


@asynccontextmanager
async def company(opponents: Sequence[Opponent]) -> AsyncIterator[list[Stage]]:
    """All of them, up and running."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nonstick-bench-")))
        stores = stack.enter_context(Stores(home))
        node = _node() if any(not opponent.app for opponent in opponents) else ""
        stages = [Stage(opponent, stores.url(opponent.store), home, node) for opponent in opponents]
        for stage in stages:
            stack.callback(stage.stop)
            stage.launch()
        for stage in stages:
            await stage.listening()
        yield stages


async def measure(
    stages: Sequence[Stage], workload: Workload, rounds: int, step: Callable[[str], None] = lambda _: None
) -> list[Line]:
    """Lets them take turns. `step` is called before each turn."""
    tool, arguments = workload.tool, ARGUMENTS[workload.tool]
    with ExitStack() as stack:
        loads: list[Load] = []
        for stage in stages:
            load = Load(stage.ports, stage.opponent.speaks, workload.connections)
            stack.callback(load.close)
            await load.open()
            await load.run(min(WARM_UP, workload.requests), tool, arguments)
            loads.append(load)
        lines = [Line(stage.opponent.name, tool, workload.connections) for stage in stages]
        for number in range(rounds):
            for turn in order(len(stages), number):
                stage, load, line = stages[turn], loads[turn], lines[turn]
                step(f"{workload.name}: round {number + 1} of {rounds}, {line.name}")
                await load.run(workload.requests // LEAD, tool, arguments)
                before, begun = stage.cpu(), time.perf_counter()
                took = await load.run(workload.requests, tool, arguments)
                line.rates.append(len(took) / (time.perf_counter() - begun))
                line.cpu.append((stage.cpu() - before) / len(took))
                line.took += took
        return lines


def _node() -> str:
    from tests.conformance.npm import install, node

    return node(install(TYPESCRIPT), at_least=18)


def show(lines: Sequence[Line]) -> None:
    print(f"{'':42} {'CPU us':>8} {'to 1st':>8} {'p50 ms':>8} {'p99 ms':>8} {'p99/p50':>8} {'a second':>9}")
    for line in lines:
        p50, p99, ratio = line.percentile(0.5), line.percentile(0.99), paired(line.cpu, lines[0].cpu)
        print(f"{line.name:42} {line.cost:8.0f} {ratio:8.2f} {p50:8.2f} {p99:8.2f} {p99 / p50:8.1f} {line.rate:9.0f}")


async def _measure(opponents: Sequence[Opponent], workload: Workload, rounds: int) -> list[Line]:
    bar = Bar(rounds * len(opponents))
    async with company(opponents) as stages:
        lines = await measure(stages, workload, rounds, bar.step)
    bar.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=OPPONENTS, default=list(OPPONENTS))
    parser.add_argument("--tool", choices=ARGUMENTS, default="echo")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=320, help="of each opponent in each round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = [OPPONENTS[name] for name in options.only]
    print(f"{platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}", file=sys.stderr)
    workload = Workload(options.tool, options.connections, options.requests)
    with runner() as loop:
        lines = loop.run(_measure(chosen, workload, options.rounds))
    show(lines)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in lines]))


if __name__ == "__main__":
    main()
