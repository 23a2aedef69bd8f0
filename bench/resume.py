"""How long a client that lost its connection waits for what it missed: a stream of 1,000 events, resumed elsewhere.

    python -m bench.resume

The client calls a tool that reports its progress, and loses its connection after the first event id. Once the stream
is complete it is resumed from there, again and again, on the other nodes by turns. The SDK, which has its events in a
list in memory, serves that on the node itself. Times run from the request to the first and to the last event, since
the SDK does not end a stream that is resumed after its end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from bench.load import Worker, get, runner
from bench.opponents import OPPONENTS
from bench.requests import company
from bench.stage import Stage

__all__ = ["NAMES", "RESUMES", "run"]

NAMES: Final = (
    "nonstick valkey, 3 nodes",
    "nonstick sqlite, 3 nodes",
    "nonstick postgres, 3 nodes",
    "mcp, event store",
)
EVENTS: Final = 1000
RESUMES: Final = 20
PATIENCE: Final = 10.0
"""Seconds that one resume may take."""
DEADLINE: Final = 60.0
"""Seconds until the tool is done."""

Tell = Callable[[str], None]


class Stream(asyncio.Protocol):
    """The answer to one request, event by event.

    Attributes:
        first_id: Of its events.
        complete: Done with the response.
        events: Notifications that came.
        first_at: When the first of them did, by the clock of `time.perf_counter`.
        last_at: When the response did.
    """

    def __init__(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.first_id: asyncio.Future[str] = loop.create_future()
        self.complete: asyncio.Future[None] = loop.create_future()
        self.events = 0
        self.first_at = self.last_at = 0.0
        self._request = request
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, port: int, request: bytes) -> Stream:
        _, stream = await asyncio.get_running_loop().create_connection(lambda: cls(request), "127.0.0.1", port)
        return stream

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        for waiting in (self.first_id, self.complete):
            if not waiting.done():
                waiting.cancel()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"id: ") and not self.first_id.done():
                self.first_id.set_result(line[4:].strip().decode())
            elif line.startswith(b"data: {"):
                self._heard(line, now)

    def _heard(self, line: bytes, now: float) -> None:
        self.first_at = self.first_at or now
        if b'"method"' in line:
            self.events += 1
        elif not self.complete.done():
            self.last_at = now
            self.complete.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def _lost(stage: Stage) -> tuple[Worker, str]:
    """A client whose connection is gone, and the first event id of the stream that it had."""
    worker = Worker(stage.ports[:1], "sessions")
    await worker.open()
    await worker.initialize()
    worker.close()
    call = {"name": "progress", "arguments": {"count": EVENTS}, "_meta": {"progressToken": 1}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}).encode()
    stream = await Stream.open(stage.ports[0], worker.request(body))
    first = await stream.first_id
    stream.close()
    return worker, first


async def resume(stage: Stage, tell: Tell) -> dict[str, Any]:
    """What it costs, over `RESUMES` resumes."""
    name = stage.opponent.name
    worker, first = await _lost(stage)
    ports = stage.ports[1:] or stage.ports

    async def again(port: int) -> tuple[float, Stream]:
        begun = time.perf_counter()
        stream = await Stream.open(port, get(worker.session, first))
        try:
            async with asyncio.timeout(PATIENCE):
                await stream.complete
        finally:
            stream.close()
        return begun, stream

    async def whole(port: int) -> bool:
        with contextlib.suppress(TimeoutError):
            return (await again(port))[1].events == EVENTS
        return False

    async with asyncio.timeout(DEADLINE):
        # Each node once before it counts. The tool may run until then, and the SDK loses what it sends meanwhile.
        for port in ports:
            tell(f"resume of {EVENTS} events, {name}: once the tool is done")
            while not await whole(port):
                pass
    cpu = stage.cpu()
    took = []
    for number in range(RESUMES):
        tell(f"resume of {EVENTS} events, {name}")
        begun, stream = await again(ports[number % len(ports)])
        if stream.events != EVENTS:
            raise RuntimeError(f"{name}: a resume brought {stream.events} of {EVENTS} events")
        took.append((stream.first_at - begun, stream.last_at - begun))
    used = stage.cpu() - cpu
    firsts, lasts = zip(*took, strict=True)
    return {
        "name": name,
        "events": EVENTS,
        "first_p50_ms": statistics.median(firsts) * 1e3,
        "last_p50_ms": statistics.median(lasts) * 1e3,
        "last_max_ms": max(lasts) * 1e3,
        "cpu_us_per_event": used / RESUMES / EVENTS * 1e6,
    }


async def run(names: Sequence[str], tell: Tell) -> list[dict[str, Any]]:
    """Of each of them, one after the other."""
    async with company([OPPONENTS[name] for name in names]) as stages:
        return [await resume(stage, tell) for stage in stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=OPPONENTS, default=list(NAMES))
    options = parser.parse_args()
    with runner() as loop:
        found = loop.run(run(options.only, lambda what: print(what, file=sys.stderr)))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
