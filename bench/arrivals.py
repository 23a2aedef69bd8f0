"""Sessions that are opened at a fixed rate, however fast the answers come: an open loop.

    python -m bench.arrivals [--only NAME ...] [--rates 200 400 700 1000] [--seconds 5]

An arrival is `initialize`, then `notifications/initialized` on the same connection. Its time runs from when it was to
arrive until the whole answer to `initialize`: a client that finds all connections taken has waited, too. The load
comes from the machine that serves it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from bench.figures import share_of
from bench.load import Worker, runner
from bench.opponents import OPPONENTS
from bench.requests import company
from bench.stage import Stage

__all__ = ["NAMES", "RATES", "Step", "run", "schedule", "step"]

NAMES: Final = ("nonstick valkey, 3 nodes", "mcp, in memory")
RATES: Final = (200, 400, 700, 1000)
CONNECTIONS: Final = 128
"""Arrivals that are under way at once."""
WARM_UP: Final = 100
SUSTAINED: Final = 0.95
"""A rate is sustained if at least this share of it was served, each arrival without an error."""
PATIENCE: Final = 120.0
"""Seconds that the last arrivals of a step may take."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """What became of one rate.

    Attributes:
        rate: Arrivals a second that were due.
        achieved: Sessions opened a second, from the first arrival to the last answer.
        nodes_cpu: Of the nodes together, in cores.
        client_cpu: Of the load itself, in cores.
    """

    name: str
    rate: float
    arrivals: int
    achieved: float
    errors: int
    p50_ms: float
    p99_ms: float
    nodes_cpu: float
    client_cpu: float

    @property
    def sustained(self) -> bool:
        return not self.errors and self.achieved >= SUSTAINED * self.rate


def schedule(rate: float, seconds: float) -> Iterator[float]:
    """When each arrival is due, in seconds from the start, at even distances."""
    return (number / rate for number in range(round(rate * seconds)))


async def step(stage: Stage, rate: float, seconds: float, connections: int = CONNECTIONS) -> Step:
    """Lets them arrive at this rate for so long, and waits for the last answer."""
    due = schedule(rate, seconds)
    took: list[float] = []
    errors = 0
    workers = [Worker([stage.ports[number % len(stage.ports)]], "sessions") for number in range(connections)]
    for worker in workers:
        await worker.open()
    cpu, own, begun = stage.cpu(), time.process_time(), time.perf_counter()

    async def serve(worker: Worker) -> None:
        nonlocal errors
        # All take from the one schedule: whoever is free takes the arrival that is due next.
        for offset in due:
            await asyncio.sleep(max(0.0, begun + offset - time.perf_counter()))
            try:
                await worker.introduce()
                took.append(time.perf_counter() - begun - offset)
                await worker.confirm()
            except (RuntimeError, OSError):
                errors += 1
                worker.close()
                await worker.open()

    try:
        async with asyncio.timeout(seconds + PATIENCE), asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(serve(worker))
    finally:
        for worker in workers:
            worker.close()
    lasted = time.perf_counter() - begun
    if not took:
        raise RuntimeError(f"{stage.opponent.name} opened no session in {seconds:g} s at {rate:g} a second")
    return Step(
        name=stage.opponent.name,
        rate=rate,
        arrivals=round(rate * seconds),
        achieved=len(took) / lasted,
        errors=errors,
        p50_ms=share_of(took, 0.5) * 1e3,
        p99_ms=share_of(took, 0.99) * 1e3,
        nodes_cpu=(stage.cpu() - cpu) / lasted,
        client_cpu=(time.process_time() - own) / lasted,
    )


async def run(names: Sequence[str], rates: Sequence[float], seconds: float, tell: Tell) -> list[Step]:
    """Each of them at each rate, on nodes that serve nothing else."""
    found = []
    for name in names:
        async with company([OPPONENTS[name]]) as [stage]:
            await step(stage, WARM_UP, 1.0)
            for rate in rates:
                tell(f"{rate:g} arrivals a second, {name}")
                found.append(await step(stage, rate, seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=OPPONENTS, default=list(NAMES))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="arrivals a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each rate")
    options = parser.parse_args()
    with runner() as loop:
        found = loop.run(run(options.only, options.rates, options.seconds, lambda what: print(what, file=sys.stderr)))
    print(f"{'':26} {'a second':>8} {'achieved':>8} {'errors':>6} {'p50 ms':>9} {'p99 ms':>9} {'nodes':>6} {'load':>6}")
    for one in found:
        print(
            f"{one.name:26} {one.rate:8.0f} {one.achieved:8.0f} {one.errors:6} {one.p50_ms:9.1f} {one.p99_ms:9.1f} "
            f"{one.nodes_cpu:6.2f} {one.client_cpu:6.2f}"
        )


if __name__ == "__main__":
    main()
