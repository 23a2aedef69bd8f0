"""The multiplexed connection: whose reply is whose, and what happens when none comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from nonstick.errors import StoreUnavailable
from nonstick.stores.common.backoff import backoff
from nonstick.stores.redis.connection import Connection
from nonstick.stores.redis.replies import Redirected, ScriptMissing, refusal
from nonstick.stores.redis.url import Address
from nonstick.testing.contract.tools import eventually
from nonstick.testing.servers.proxy import FaultProxy
from nonstick.testing.servers.valkey import ValkeyServer
from tests.pace import in_time

pytestmark = pytest.mark.anyio

PATIENT = 10.0
"""Longer than anything here takes on a busy machine."""


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
async def proxy(server: ValkeyServer) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(server.url) as proxy:
        yield proxy


@asynccontextmanager
async def connected(
    url: str,
    *,
    timeout: float = PATIENT,
    connect_timeout: float = PATIENT,
    max_waiting: int = 1000,
    max_bytes: int = 1 << 20,
) -> AsyncIterator[Connection]:
    connection = Connection(
        Address.parse(url),
        timeout=timeout,
        connect_timeout=connect_timeout,
        max_waiting=max_waiting,
        max_bytes=max_bytes,
    )
    try:
        yield connection
    finally:
        await connection.close()


async def nobody_is_connected(proxy: FaultProxy) -> bool:
    return proxy.connections == 0


async def test_every_caller_gets_its_own_reply(server: ValkeyServer) -> None:
    """The n-th reply belongs to the n-th command."""
    async with connected(server.url) as connection:
        words = [b"%d" % n for n in range(500)]
        assert await asyncio.gather(*(connection.call("ECHO", word) for word in words)) == words


async def test_cancelled_caller_disturbs_no_neighbours(server: ValkeyServer) -> None:
    """A cancelled call must not disturb any other call: its reply is dropped, whenever it comes."""
    async with connected(server.url) as connection:
        for turns in range(6):
            tasks = [asyncio.ensure_future(connection.call("ECHO", b"%d" % n)) for n in range(60)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks[::3]:
                task.cancel()
            replies = await asyncio.gather(*tasks, return_exceptions=True)
            for n, reply in enumerate(replies):
                assert reply == b"%d" % n or (n % 3 == 0 and isinstance(reply, asyncio.CancelledError))
        assert await connection.call("ECHO", "last") == b"last"


async def test_late_reply_is_dropped(proxy: FaultProxy) -> None:
    """A call past its deadline fails alone; the reply that comes later is not taken for another's."""
    async with connected(proxy.url) as connection:
        await connection.call("PING")
        proxy.black_hole(requests=False)
        with pytest.raises(StoreUnavailable, match="in time"):
            await connection.call("ECHO", "late", timeout=0.1)
        next_reply = asyncio.ensure_future(connection.call("ECHO", "next"))
        await asyncio.sleep(0)
        await proxy.heal()
        assert await next_reply == b"next"
        assert proxy.connections == 1


async def test_black_hole_fails_within_deadline(proxy: FaultProxy) -> None:
    """A connection on which nothing arrives is torn down, so that the next call opens another (P9)."""
    async with connected(proxy.url, timeout=0.3, connect_timeout=0.3) as connection:
        await connection.call("PING")
        proxy.black_hole()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await connection.call("PING")
        assert in_time(time.monotonic() - began, 2)
        with pytest.raises(StoreUnavailable):
            await connection.call("PING")
        await proxy.heal()
        assert await connection.call("ECHO", "back", timeout=PATIENT) == b"back"


async def test_connection_that_falls_silent_is_replaced() -> None:
    """A black hole that never ends costs one deadline: the next call goes another way (P9)."""
    opened = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        silent = opened == 1
        while data := await reader.read(65536):
            if not silent or b"ECHO" not in data:
                writer.write(b"+PONG\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        async with connected(f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}", timeout=0.5) as connection:
            await connection.call("PING", timeout=PATIENT)
            with pytest.raises(StoreUnavailable):
                await connection.call("ECHO", "x")
            assert await connection.call("ECHO", "x", timeout=PATIENT) == b"PONG"
        await asyncio.sleep(0)
    assert opened == 2


async def test_lost_reply_repeats_no_command(proxy: FaultProxy, server: ValkeyServer) -> None:
    """A command is written at most once: whether to repeat it is the caller's decision."""
    async with connected(proxy.url) as connection, connected(server.url) as direct:
        await connection.call("PING")
        proxy.lose_next_reply(after=b"INCR")
        with pytest.raises(StoreUnavailable, match="lost the connection"):
            await connection.call("INCR", "lost-reply")
        assert await connection.call("PING") == b"PONG"
        assert await direct.call("GET", "lost-reply") == b"1"


async def test_abandoned_unwritten_command_is_never_sent(proxy: FaultProxy, server: ValkeyServer) -> None:
    """What nobody waits for any more when the connection comes about is left unsent."""
    async with connected(proxy.url) as connection:
        proxy.black_hole()
        with pytest.raises(StoreUnavailable):
            await connection.call("INCR", "unsent", timeout=0.1)
        await proxy.heal()
        assert await connection.call("GET", "unsent") is None


async def test_late_call_gets_its_own_attempt(proxy: FaultProxy) -> None:
    """A fault that was over when a call was made is no reason to fail it (P9)."""
    async with connected(proxy.url, connect_timeout=0.5) as connection:
        proxy.black_hole()
        first = asyncio.ensure_future(connection.call("ECHO", "first"))
        while not proxy.connections:  # noqa: ASYNC110
            await asyncio.sleep(0)
        second = asyncio.ensure_future(connection.call("ECHO", "second"))
        with pytest.raises(StoreUnavailable):
            await first
        await proxy.heal()
        assert await second == b"second"


async def test_refused_connection_fails_at_once(proxy: FaultProxy) -> None:
    """Recovery needs no restart (P9)."""
    async with connected(proxy.url) as connection:
        await connection.call("PING")
        await proxy.cut()
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r"cannot connect|lost the connection"):
                await connection.call("PING")
        await proxy.heal()
        assert await connection.call("PING") == b"PONG"


async def test_too_many_calls_fail_at_once(proxy: FaultProxy) -> None:
    """What waits is bounded (P10), those that gave up included: the server still has to answer them."""
    async with connected(proxy.url, max_waiting=5) as connection:
        await connection.call("PING")
        proxy.black_hole(requests=False)
        waiting = [asyncio.ensure_future(connection.call("ECHO", b"%d" % n)) for n in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        with pytest.raises(StoreUnavailable, match="too slow"):
            await connection.call("PING")
        await proxy.heal()
        assert await asyncio.gather(*waiting[1:]) == [b"1", b"2", b"3", b"4"]
        assert await connection.call("PING") == b"PONG"


async def test_too_many_bytes_fail_at_once(proxy: FaultProxy) -> None:
    """What waits is bounded by bytes too (P10)."""
    async with connected(proxy.url, max_bytes=3000) as connection:
        await connection.call("PING")
        proxy.black_hole(requests=False)
        waiting = asyncio.ensure_future(connection.call("ECHO", bytes(2000)))
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="too slow"):
            await connection.call("ECHO", bytes(2000))
        await proxy.heal()
        assert await waiting == bytes(2000)
        assert await connection.call("ECHO", bytes(2000)) == bytes(2000)


async def test_close_fails_waiting_calls(proxy: FaultProxy) -> None:
    """No task, socket or timer is left, whether connected or still connecting."""
    for wait_for_connection in (True, False):
        async with connected(proxy.url) as connection:
            if wait_for_connection:
                await connection.call("PING")
            proxy.black_hole()
            waiting = asyncio.ensure_future(connection.call("PING"))
            await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="closed"):
            await waiting
        with pytest.raises(StoreUnavailable, match="closed"):
            await connection.call("PING")
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("nonstick")]
        await proxy.heal()
        await eventually(lambda: nobody_is_connected(proxy))


async def test_foreign_protocol_is_unavailable() -> None:
    """An answer that is not the protocol's is an error at once, not a wait."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with connected(f"redis://127.0.0.1:{port}") as connection:
            with pytest.raises(StoreUnavailable, match="a web server, no Redis or Valkey"):
                await connection.call("PING")


async def test_impossible_host_name_is_unavailable() -> None:
    """A failure to reach the store raises StoreUnavailable and nothing else."""
    async with connected(f"redis://{'x' * 70}.invalid") as connection:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="cannot connect"):
                await connection.call("PING")


async def test_one_turns_commands_share_a_write(server: ValkeyServer) -> None:
    """One system call for all that is asked in the same turn of the event loop."""
    received: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            received.append(data)
            writer.write(b"+PONG\r\n" * data.count(b"PING"))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        async with connected(f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}") as connection:
            await connection.call("PING")
            received.clear()
            await asyncio.gather(*(connection.call("PING") for _ in range(50)))
            assert len(received) == 1
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading"),
        ("READONLY You can't write against a read only replica.", "primary"),
        ("MASTERDOWN Link with MASTER is down", "lost its primary"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "moving"),
        ("CLUSTERDOWN The cluster is down", "cluster is down"),
        ("MOVED 3999 127.0.0.1:6381", "redis+cluster://"),
        ("BUSY Redis is busy running a script.", "busy"),
        ("NOREPLICAS Not enough good replicas to write.", "replicas"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "out of memory"),
        ("MISCONF Redis is configured to save RDB snapshots", "cannot save"),
        ("NOAUTH Authentication required.", "wants a login"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "check user and password"),
        ("NOPERM this user has no permissions to run the 'evalsha' command", "permission"),
        ("ERR AUTH <password> called without any password configured for the default user.", "no password"),
        ("ERR Error running script (call to f_1): @user_script:9: -OOM command not allowed", "out of memory"),
        ("ERR max number of clients reached", "max number of clients"),
    ],
)
def test_error_reply_says_what_to_do(reply: str, advice: str) -> None:
    """A server that refuses is unavailable, with a message that names the remedy (P9)."""
    error = refusal(reply)
    assert isinstance(error, StoreUnavailable)
    assert not isinstance(error, ScriptMissing)
    assert advice in str(error)


@pytest.mark.parametrize(
    ("reply", "host"),
    [("MOVED 1 10.0.0.1:6381", "10.0.0.1"), ("ASK 1 ::1:6381", "::1"), ("MOVED 1 :6381", ""), ("ASK 1 ?:6381", "")],
)
def test_redirection_may_lack_its_host(reply: str, host: str) -> None:
    """ "?" is what a server says that was told to give host names, and has none."""
    error = refusal(reply)
    assert isinstance(error, Redirected)
    assert (error.host, error.port, error.asking) == (host, 6381, reply.startswith("ASK"))


def test_error_reply_does_not_quote_arguments() -> None:
    """Payloads never appear in logs, so not in errors either (P13)."""
    error = refusal("ERR unknown command 'EVALSHA', with args beginning with: 'abc' 'payload'")
    assert "payload" not in str(error)
    assert "EVALSHA" in str(error)


def test_unknown_script_has_own_error() -> None:
    """It has certainly not run, so its source can be sent."""
    assert isinstance(refusal("NOSCRIPT No matching script."), ScriptMissing)


def test_backoff_grows_is_capped_and_jittered() -> None:
    """Not every node comes back in the same instant."""
    assert 0 < backoff(1) <= 0.1
    waits = [backoff(1000) for _ in range(50)]
    assert all(0.5 <= wait <= 1 for wait in waits)
    assert len(set(waits)) > 1
