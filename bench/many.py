"""What many sessions and many open streams cost: three nodes on one Valkey.

    python -m bench.many [--idle 5000] [--streams 500]   (0: not at all)

Memory is what the node processes hold (their resident set); bytes in the store are what Valkey says it uses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis.asyncio

import nonstick
from bench.load import Load, Worker, get, runner
from bench.opponents import OPPONENTS
from bench.requests import company
from bench.stage import Stage, raise_file_limit

__all__ = ["run_idle", "run_streams", "steps"]

NODES: Final = OPPONENTS["nonstick valkey, 3 nodes"]
SDK: Final = OPPONENTS["mcp, in memory"]
CONNECTIONS: Final = 32
SAMPLES: Final = 8
STEP: Final = 1000
"""Sessions or streams that are opened before the run says how far it is."""
SDK_SESSIONS: Final = 2000
REQUESTS: Final = 500
BROADCASTS: Final = 5
TRIES: Final = 20
DEADLINE: Final = 60.0

Tell = Callable[[str], None]


# ---- idle sessions


async def open_sessions(ports: Sequence[int], sessions: int) -> None:
    """Opens so many, over `CONNECTIONS` connections, and leaves them alone."""
    load = Load(ports, "sessions", min(CONNECTIONS, sessions))
    await load.open()
    if sessions > CONNECTIONS:
        await load.run(sessions - CONNECTIONS, "initialize", {})
    load.close()


async def idle(stage: Stage, sessions: int, tell: Tell) -> dict[str, Any]:
    """The slope of the nodes' memory, bytes in the store, and what a request costs with few and with many sessions."""
    tell("idle sessions: warming up")
    # What is only needed once, such as buffers, is there before it counts.
    await open_sessions(stage.ports, max(500, min(sessions // 5, STEP)))
    store = redis.asyncio.Redis.from_url(stage.url) if stage.url else None
    few = await _cost(stage, store)
    samples = [(0, stage.memory())]
    used = await _used(store)
    opened = 0
    for share in shares(sessions):
        for step in range(0, share, STEP):
            tell(f"idle sessions: {opened} of {sessions}, {stage.opponent.name}")
            more = min(STEP, share - step)
            await open_sessions(stage.ports, more)
            opened += more
        samples.append((opened, stage.memory()))
    stored = (await _used(store) - used) / opened
    many = await _cost(stage, store)
    if store is not None:
        await store.aclose()
    slope = statistics.linear_regression([count for count, _ in samples], [memory for _, memory in samples]).slope
    return {
        "opponent": stage.opponent.name,
        "sessions": opened,
        "samples": samples,
        "node_bytes_per_session": slope,
        "store_bytes_per_session": stored if stage.url else None,
        "few": few,
        "many": many,
    }


def shares(sessions: int) -> list[int]:
    """How many are opened before each of the samples."""
    return [sessions * (number + 1) // SAMPLES - sessions * number // SAMPLES for number in range(SAMPLES)]


async def _used(store: redis.asyncio.Redis | None) -> int:
    """Bytes of the store's data."""
    return 0 if store is None else int((await store.info("memory"))["used_memory_dataset"])


async def _commands(store: redis.asyncio.Redis | None) -> int:
    """Scripts that the store has run: each is a round trip."""
    return 0 if store is None else int((await store.info("commandstats"))["cmdstat_evalsha"]["calls"])


async def _cost(stage: Stage, store: redis.asyncio.Redis | None) -> dict[str, float]:
    """Server CPU, in microseconds, and store round trips per echo."""
    load = Load(stage.ports, "sessions", 8)
    await load.open()
    await load.run(REQUESTS // 2, "echo", {"text": "hello"})
    before, cpu = await _commands(store), stage.cpu()
    took = await load.run(REQUESTS, "echo", {"text": "hello"})
    used = stage.cpu() - cpu
    trips = (await _commands(store) - before) / len(took)
    load.close()
    return {"cpu_us": used / len(took) * 1e6, "round_trips": trips}


# ---- open streams


class Refused(Exception):
    """A GET got another status than 200."""


class Stream(asyncio.Protocol):
    """An open GET: counts the list changes that come."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard: asyncio.Future[float] | None = None

    @classmethod
    async def open(cls, port: int, request: bytes) -> Stream:
        _, stream = await asyncio.get_running_loop().create_connection(lambda: cls(request), "127.0.0.1", port)
        await stream.opened
        return stream

    def next(self) -> asyncio.Future[float]:
        """When the next one came."""
        self._heard = asyncio.get_running_loop().create_future()
        return self._heard

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        for waiting in (self.opened, self._heard):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error or ConnectionError("the node closed a stream"))

    def data_received(self, data: bytes) -> None:
        if not self.opened.done():
            if data.startswith(b"HTTP/1.1 200"):
                self.opened.set_result(None)
            else:
                self.opened.set_exception(Refused(data[:500].decode(errors="replace")))
        if b"list_changed" in data and self._heard is not None and not self._heard.done():
            self._heard.set_result(time.perf_counter())

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def listening(stage: Stage, count: int, tell: Tell) -> dict[str, Any]:
    """Memory per open GET stream, and how long it takes to tell all of them that the tools changed."""
    workers = [Worker([stage.ports[n % len(stage.ports)]], "sessions") for n in range(count)]
    for first in range(0, count, CONNECTIONS):
        if first % STEP < CONNECTIONS:
            tell(f"streams: {first} of {count} sessions")
        await asyncio.gather(*map(_open, workers[first : first + CONNECTIONS]))
    streams: list[Stream] = []
    refused = 0

    async def listen(number: int, worker: Worker) -> Stream:
        """On another node than the one that opened its session. A node that is too busy says 503: again, then."""
        nonlocal refused
        for _ in range(TRIES):
            try:
                return await Stream.open(stage.ports[(number + 1) % len(stage.ports)], get(worker.session))
            except Refused as error:
                if " 503 " not in str(error):
                    raise
                refused += 1
                await asyncio.sleep(1.0)
        raise RuntimeError(f"a stream was refused {TRIES} times")

    try:
        before, cpu = stage.memory(), stage.cpu()
        for first in range(0, count, CONNECTIONS):
            if first % STEP < CONNECTIONS:
                tell(f"streams: {first} of {count} open")
            some = list(enumerate(workers))[first : first + CONNECTIONS]
            streams += await asyncio.gather(*(listen(n, worker) for n, worker in some))
        opened = stage.cpu() - cpu
        cores = await _joined(stage, tell)
        memory = stage.memory() - before
        broadcasts = []
        async with nonstick.Cluster.connect(stage.url) as cluster:
            for number in range(BROADCASTS):
                tell(f"broadcast {number + 1} of {BROADCASTS} to {count} streams")
                heard = [stream.next() for stream in streams]
                begun, cpu = time.perf_counter(), stage.cpu()
                await cluster.notify_tools_changed()
                async with asyncio.timeout(DEADLINE):
                    times = sorted(at - begun for at in await asyncio.gather(*heard))
                broadcasts.append(
                    {
                        "first_ms": times[0] * 1e3,
                        "p50_ms": times[count // 2] * 1e3,
                        "last_ms": times[-1] * 1e3,
                        "cpu_us_per_stream": (stage.cpu() - cpu) / count * 1e6,
                    }
                )
    finally:
        for stream in streams:
            stream.close()
    return {
        "streams": count,
        "bytes_per_stream": memory / count,
        "cpu_us_per_open": opened / count * 1e6,
        "refused": refused,
        "idle_cores": cores,
        "broadcast": {name: statistics.median(one[name] for one in broadcasts) for name in broadcasts[0]},
    }


async def _joined(stage: Stage, tell: Tell) -> float:
    """Returns once the last streams have been joined to their logs: the cores that the nodes use from then on."""
    used = await _cores(stage, 2.0)
    async with asyncio.timeout(DEADLINE):
        while (now := await _cores(stage, 2.0)) < 0.9 * used:
            tell(f"streams: {now:.2f} cores")
            used = now
    return now


async def _cores(stage: Stage, seconds: float) -> float:
    """What the nodes use while nobody asks for anything."""
    begun, cpu = time.perf_counter(), stage.cpu()
    await asyncio.sleep(seconds)
    return (stage.cpu() - cpu) / (time.perf_counter() - begun)


async def _open(worker: Worker) -> None:
    """Opens its session; its connections are not kept."""
    await worker.open()
    await worker.initialize()
    worker.close()


# ---- the run


async def run_idle(sessions: int, tell: Tell) -> list[dict[str, Any]]:
    """On three nodes, and beside them at most `SDK_SESSIONS` on the SDK, each on processes of its own."""
    found = []
    for opponent, count in ((NODES, sessions), (SDK, min(sessions, SDK_SESSIONS))):
        async with company([opponent]) as [stage]:
            found.append(await idle(stage, count, tell))
    return found


async def run_streams(streams: int, tell: Tell) -> dict[str, Any]:
    async with company([NODES]) as [stage]:
        return await listening(stage, streams, tell)


def steps(sessions: int, streams: int) -> int:
    """How often a run of so many says how far it is."""
    idle = [math.ceil(share / STEP) for count in (sessions, min(sessions, SDK_SESSIONS)) for share in shares(count)]
    return (2 + sum(idle) if sessions else 0) + (2 * math.ceil(streams / STEP) + BROADCASTS if streams else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=5000, help="sessions")
    parser.add_argument("--streams", type=int, default=500)
    options = parser.parse_args()

    def tell(what: str) -> None:
        print(what, file=sys.stderr)

    raise_file_limit()
    with runner() as loop:
        found: dict[str, Any] = {}
        if options.idle:
            found["idle"] = loop.run(run_idle(options.idle, tell))
        if options.streams:
            found["streams"] = loop.run(run_streams(options.streams, tell))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
