"""What many sessions and many open streams cost, and how long a resume takes: three nodes on one Valkey.

    python -m bench.many [--idle 5000] [--streams 500]

Memory is what the node processes hold (their resident set); bytes in the store are what Valkey says it uses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import redis.asyncio

import nonstick
from bench.load import Load, Worker
from bench.opponents import OPPONENTS, Opponent
from bench.stage import Stage, Stores

__all__ = ["idle", "listening", "resume", "run"]

NODES: Final = OPPONENTS["nonstick valkey, 3 nodes"]
SDK: Final = OPPONENTS["mcp, in memory"]
CONNECTIONS: Final = 32
SAMPLES: Final = 8
REQUESTS: Final = 500
EVENTS: Final = 1000
RESUMES: Final = 20
BROADCASTS: Final = 5
DEADLINE: Final = 60.0

Tell = Callable[[str], None]


# ---- idle sessions


async def open_sessions(ports: Sequence[int], sessions: int) -> None:
    """Opens so many, over `CONNECTIONS` connections, and leaves them alone."""
    load = Load(ports, "sessions", CONNECTIONS)
    await load.open()
    if sessions > CONNECTIONS:
        await load.run(sessions - CONNECTIONS, "initialize", {})
    load.close()


async def idle(stage: Stage, url: str, sessions: int, tell: Tell) -> dict[str, Any]:
    """The slope of the nodes' memory, bytes in the store, and what a request costs with few and with many sessions."""
    tell("idle sessions: warming up")
    # What is only needed once, such as buffers, is there before it counts.
    await open_sessions(stage.ports, max(500, sessions // 5))
    store = redis.asyncio.Redis.from_url(url) if url else None
    few = await _cost(stage, store)
    samples = [(0, stage.memory())]
    used = await _used(store)
    share = max(CONNECTIONS, sessions // SAMPLES)
    for number in range(SAMPLES):
        tell(f"idle sessions: {number * share} of {sessions}, {stage.opponent.name}")
        await open_sessions(stage.ports, share)
        samples.append(((number + 1) * share, stage.memory()))
    opened = SAMPLES * share
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
        "store_bytes_per_session": stored if url else None,
        "few": few,
        "many": many,
    }


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
                self.opened.set_exception(RuntimeError(data[:500].decode(errors="replace")))
        if b"list_changed" in data and self._heard is not None and not self._heard.done():
            self._heard.set_result(time.perf_counter())

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def listening(stage: Stage, url: str, count: int, tell: Tell) -> dict[str, Any]:
    """Memory per open GET stream, and how long it takes to tell all of them that the tools changed."""
    tell(f"streams: opening {count} sessions")
    workers = [Worker([stage.ports[n % len(stage.ports)]], "sessions") for n in range(count)]
    for first in range(0, count, CONNECTIONS):
        await asyncio.gather(*map(_open, workers[first : first + CONNECTIONS]))
    streams: list[Stream] = []
    try:
        before, cpu = stage.memory(), stage.cpu()
        for first in range(0, count, CONNECTIONS):
            if first % 1024 == 0:
                tell(f"streams: {first} of {count} open")
            some = list(enumerate(workers))[first : first + CONNECTIONS]
            opening = (Stream.open(stage.ports[(n + 1) % len(stage.ports)], _get(worker)) for n, worker in some)
            streams += await asyncio.gather(*opening)
        # The last of them are still being joined to their logs.
        await asyncio.sleep(1.0)
        memory, opened = stage.memory() - before, stage.cpu() - cpu
        broadcasts = []
        async with nonstick.Cluster.connect(url) as cluster:
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
        "broadcast": {name: statistics.median(one[name] for one in broadcasts) for name in broadcasts[0]},
    }


async def _open(worker: Worker) -> None:
    """Opens its session; its connections are not kept."""
    await worker.open()
    await worker.initialize()
    worker.close()


def _get(worker: Worker, after: str = "") -> bytes:
    lines = [
        "GET /mcp HTTP/1.1",
        "host: 127.0.0.1:80",
        "accept: text/event-stream",
        f"mcp-session-id: {worker.session}",
        "mcp-protocol-version: 2025-11-25",
        *([f"last-event-id: {after}"] if after else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


# ---- resume


async def resume(stage: Stage, tell: Tell) -> dict[str, Any]:
    """How long a finished stream of `EVENTS` events takes to be read again from its first event id, on another node."""
    tell(f"resume of {EVENTS} events")
    worker = Worker(stage.ports[:1], "sessions")
    await worker.open()
    await worker.initialize()
    answer = await worker.call("progress", {"count": EVENTS})
    first = next(line for line in answer.body.splitlines() if line.startswith(b"id: "))[4:].decode()
    readers = [Worker([port], "sessions") for port in stage.ports[1:]]
    took: list[float] = []
    cpu = stage.cpu()
    for number in range(RESUMES):
        reader = readers[number % len(readers)]
        await reader.open()
        begun = time.perf_counter()
        again = await reader.send(_get(worker, first))
        took.append(time.perf_counter() - begun)
        reader.close()
        if (seen := again.body.count(b"notifications/progress")) != EVENTS:
            raise RuntimeError(f"a resume brought {seen} of {EVENTS} events")
    used = stage.cpu() - cpu
    worker.close()
    return {
        "events": EVENTS,
        "p50_ms": statistics.median(took) * 1e3,
        "max_ms": max(took) * 1e3,
        "cpu_us_per_event": used / RESUMES / EVENTS * 1e6,
    }


# ---- the run


async def run(idle_sessions: int, streams: int, tell: Tell) -> dict[str, Any]:
    """All of it, each on nodes of its own."""
    found: dict[str, Any] = {"idle": []}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nonstick-bench-")))
        stores = stack.enter_context(Stores(home))

        async def started(opponent: Opponent) -> tuple[Stage, str]:
            url = stores.url(opponent.store)
            stage = Stage(opponent, url, home, "")
            stack.callback(stage.stop)
            await stage.start()
            return stage, url

        for opponent, sessions in ((NODES, idle_sessions), (SDK, min(idle_sessions, 2000))):
            stage, url = await started(opponent)
            found["idle"].append(await idle(stage, url, sessions, tell))
            stage.stop()
        stage, url = await started(NODES)
        found["resume"] = await resume(stage, tell)
        found["listening"] = await listening(stage, url, streams, tell)
        stage.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=5000, help="sessions")
    parser.add_argument("--streams", type=int, default=500)
    options = parser.parse_args()
    found = asyncio.run(run(options.idle, options.streams, lambda what: print(what, file=sys.stderr)))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
