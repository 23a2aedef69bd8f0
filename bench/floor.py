"""The least that a delivery across nodes takes on this machine: its three hops, with nothing done on the way.

    python -m bench.floor [--events 500] [--rate 100]

A process publishes a stamp on Valkey, another one is subscribed and passes it on over TCP, and this one reads it:
`delivery` of `bench.latency` without the SDK, HTTP, sessions and a log. Also what it costs a process, in CPU, to sleep
for five milliseconds and wake up.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import Any

from bench.figures import share_of
from bench.load import runner
from nonstick.testing import ValkeyServer
from nonstick.testing.servers.valkey import free_port

__all__ = ["main"]

CHANNEL = b"bench"
WARM_UP = 50
WAKE_UPS = 300


async def publish(valkey: int, events: int, rate: float) -> None:
    """Publishes so many stamps, at this rate."""
    reader, writer = await asyncio.open_connection("127.0.0.1", valkey)
    begun = time.monotonic()
    for number in range(events):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        writer.write(b"PUBLISH %b %d\r\n" % (CHANNEL, time.monotonic_ns()))
        await reader.readline()
    writer.close()


async def relay(valkey: int, port: int) -> None:
    """Passes on what is published to whoever connects, until Valkey is gone."""
    clients: list[asyncio.Transport] = []

    class Client(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            clients.append(transport)

    class Subscription(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(b"SUBSCRIBE %b\r\n" % CHANNEL)

        def data_received(self, data: bytes) -> None:
            for stamp in data.split(b"\r\n"):
                if stamp.isdigit():
                    for client in clients:
                        client.write(stamp + b"\n")

        def connection_lost(self, error: Exception | None) -> None:
            over.set()

    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    await loop.create_connection(Subscription, "127.0.0.1", valkey)
    await loop.create_server(Client, "127.0.0.1", port)
    await over.wait()


async def listen(valkey: int, events: int, rate: float) -> list[int]:
    """Nanoseconds that each of so many deliveries took."""
    port = free_port()
    me = [sys.executable, "-m", "bench.floor", "--valkey", str(valkey)]
    relaying = await asyncio.create_subprocess_exec(*me, "--role", "relay", "--port", str(port))
    try:
        reader, writer = await _connected(port)
        count = events + WARM_UP
        how = ("--events", str(count), "--rate", str(rate))
        publishing = await asyncio.create_subprocess_exec(*me, "--role", "publish", *how)
        took: list[int] = []
        while len(took) < count:
            stamp = await reader.readline()
            took.append(time.monotonic_ns() - int(stamp))
        writer.close()
        await publishing.wait()
        return took[WARM_UP:]
    finally:
        relaying.kill()
        await relaying.wait()


async def _connected(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)


async def wake_up() -> float:
    """Seconds of CPU that it takes to sleep and wake up."""
    before = time.process_time()
    for _ in range(WAKE_UPS):
        await asyncio.sleep(0.005)
    return (time.process_time() - before) / WAKE_UPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=500)
    parser.add_argument("--rate", type=float, default=100.0, help="events a second")
    parser.add_argument("--role", choices=("publish", "relay"), help=argparse.SUPPRESS)
    parser.add_argument("--valkey", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with runner() as loop:
        if options.role == "publish":
            loop.run(publish(options.valkey, options.events, options.rate))
        elif options.role == "relay":
            loop.run(relay(options.valkey, options.port))
        else:
            with ValkeyServer() as valkey:
                took = loop.run(listen(valkey.port, options.events, options.rate))
            p50, p99 = share_of(took, 0.5) / 1e6, share_of(took, 0.99) / 1e6
            print(f"delivery: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
            print(f"to sleep for 5 ms and wake up: {loop.run(wake_up()) * 1e6:.0f} µs of CPU")


if __name__ == "__main__":
    main()
