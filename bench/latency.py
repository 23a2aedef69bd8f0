"""How long what crosses nodes takes: three node processes on one store, and one client.

    python -m bench.latency [--store memory|sqlite|valkey|postgres|all] [--events 500] [--rate 100] [--json FILE]

Clocks: the monotonic clock of one machine, which all processes share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.bar import Bar
from bench.client import Client, text_of
from bench.figures import share_of
from bench.load import runner
from nonstick.testing import PostgresServer, ValkeyServer
from nonstick.testing.servers.processes import NodeProcess

STORES: Final = ("memory", "sqlite", "valkey", "postgres")

_WARM_UP: Final = 50
"""Events before those that count."""
_OLDER: Final = 0.1
"""Seconds between the begin of a call's stream, when its node begins to follow the log, and its cancel."""
_AT_ONCE: Final = 120
"""Calls that run at once: a node takes 128 of one session."""
_DEADLINE: Final = 60.0
"""Seconds, beyond the time that the rate alone takes."""


@dataclass(frozen=True)
class Result:
    """One line of the table. Times are in milliseconds."""

    store: str
    what: str
    events: int
    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class Load:
    """How much of what is measured, the warm-up included, and how fast."""

    count: int
    rate: float
    bar: Bar


Measure = Callable[[Client, "list[NodeProcess]", Load], Awaitable["list[int]"]]
"""Nanoseconds that each event took, in the order in which they came."""


# ---- what is measured


async def delivery(client: Client, nodes: list[NodeProcess], load: Load) -> list[int]:
    """A tool on `a` sends a notification on the standalone stream; a GET on `b` brings it."""
    took: list[int] = []
    complete = asyncio.Event()

    def heard(message: dict[str, Any]) -> None:
        now = time.monotonic_ns()
        took.append(now - int(message["params"]["message"]))
        load.bar.step()
        if len(took) == load.count:
            complete.set()

    listening = asyncio.create_task(client.listen(nodes[1].port, heard))
    try:
        text_of(await client.call(nodes[0].port, "announce", count=load.count, rate=load.rate))
        await _first(complete.wait(), listening)
    finally:
        listening.cancel()
        await asyncio.wait([listening])
    return took


async def reply(client: Client, nodes: list[NodeProcess], load: Load) -> list[int]:
    """A tool on `a` asks the client; the reply is posted to another node. From the start of the POST to the tool."""
    others = [node.port for node in nodes[1:]]
    async with asyncio.TaskGroup() as group:

        def heard(request: dict[str, Any]) -> None:
            load.bar.step()
            others.append(others.pop(0))
            group.create_task(client.reply(others[0], request))

        answer = await client.call(nodes[0].port, "ask", heard, count=load.count, rate=load.rate)
    took: list[int] = json.loads(text_of(answer))
    return took


async def cancel(client: Client, nodes: list[NodeProcess], load: Load) -> list[int]:
    """A call on `a` is cancelled through another node. From the start of the POST to the handler."""
    others = [node.port for node in nodes[1:]]
    sent: dict[str, int] = {}
    ended: dict[str, dict[str, Any]] = {}
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> None:
        request_id, label = client.next_id(), str(number)
        started = asyncio.Event()
        async with room:
            call = asyncio.create_task(
                client.call(nodes[0].port, "hang", started=started.set, request_id=request_id, label=label)
            )
            await _first(started.wait(), call)
            # Half a tick more, so that no other call begins in the same moment.
            await asyncio.sleep(_OLDER + 0.5 / load.rate)
            port = others[number % len(others)]
            sent[label] = await client.notify(port, "notifications/cancelled", requestId=request_id)
            ended[label] = await call
        load.bar.step()

    start = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(load.count):
            await asyncio.sleep(max(0.0, start + number / load.rate - time.monotonic()))
            group.create_task(one(number))
    seen: dict[str, int] = json.loads(text_of(await client.call(nodes[0].port, "cancelled")))
    if missed := {label: ended[label] for label in sent if label not in seen}:
        raise RuntimeError(f"{len(missed)} handlers saw no cancel; their calls ended so: {missed}")
    return [seen[label] - then for label, then in sent.items()]


MEASURES: Final[tuple[Measure, ...]] = (delivery, reply, cancel)


async def _first(wanted: Coroutine[Any, Any, Any], other: asyncio.Task[Any]) -> None:
    """Waits for the one; the end of the other before that is a failure."""
    task = asyncio.create_task(wanted)
    await asyncio.wait([task, other], return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        raise RuntimeError("a stream ended too early") from other.exception()


# ---- the run


async def run(
    store: str, url: str, events: int, rate: float, tell: Callable[[Result], None], *, bars: bool = True
) -> None:
    """Takes all measures over this store, each with nodes that are warm and a session of its own."""
    async with AsyncExitStack() as stack:
        nodes = [NodeProcess("bench.server:app", name=name, store=url) for name in "abc"]
        for node in nodes:
            await stack.enter_async_context(node)
        try:
            for measure in MEASURES:
                tell(
                    await _measure(
                        measure, store, nodes, Load(_WARM_UP + events, rate, Bar(_WARM_UP + events, shown=bars))
                    )
                )
        except BaseException:
            for node in nodes:
                sys.stderr.write(f"---- {node.name}\n{node.written[-2000:]}")
            raise


async def _measure(measure: Measure, store: str, nodes: list[NodeProcess], load: Load) -> Result:
    what, events = getattr(measure, "__name__", ""), load.count - _WARM_UP
    try:
        async with asyncio.timeout(_DEADLINE + events / load.rate), Client(nodes[0].port) as client:
            took = (await measure(client, nodes, load))[_WARM_UP:]
    finally:
        load.bar.close()
    if len(took) != events:
        raise RuntimeError(f"{what}: {len(took)} of {events} events were seen")
    p50, p99, longest = (share_of(took, share) / 1e6 for share in (0.5, 0.99, 1.0))
    return Result(store, what, events, round(p50, 3), round(p99, 3), round(longest, 3))


@contextmanager
def opened(store: str) -> Iterator[str]:
    """The URL of a store of this kind, made for the run."""
    if store == "valkey":
        with ValkeyServer() as valkey:
            yield valkey.url
    elif store == "postgres":
        with PostgresServer() as postgres:
            yield postgres.url
    else:
        with tempfile.TemporaryDirectory(prefix="nonstick-bench-") as home:
            yield f"sqlite:///{Path(home) / 'sessions.db'}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description="Latency across nodes.")
    parser.add_argument("--store", choices=[*STORES, "all"], default="all", help="Default: %(default)s")
    parser.add_argument("--events", type=int, default=500, help="of each kind. Default: %(default)s")
    parser.add_argument("--rate", type=float, default=100.0, help="events a second. Default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(argv)
    if options.events < 1 or not 0 < options.rate <= 125:
        parser.error("--events must be positive, --rate above 0 and up to 125")
    results: list[Result] = []

    def tell(result: Result) -> None:
        results.append(result)
        line = f"{result.store:<8} {result.what:<10} {result.events:>7} {result.p50:>9.2f} {result.p99:>9.2f}"
        print(f"{line} {result.max:>9.2f}", flush=True)

    load = f"{options.rate:g} events/s, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start"
    print(f"{load}; milliseconds")
    print(f"{'store':<8} {'what':<10} {'events':>7} {'p50':>9} {'p99':>9} {'max':>9}")
    for store in STORES if options.store == "all" else (options.store,):
        if store == "memory":
            print(
                f"{store:<8} skipped: it lives in one process, so nothing can cross nodes that are processes",
                flush=True,
            )
            continue
        with opened(store) as url, runner() as loop:
            loop.run(run(store, url, options.events, options.rate, tell))
    if options.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
        report = {"rate": options.rate, "machine": machine, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
