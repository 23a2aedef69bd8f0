"""What is admitted of a request, to the byte (P10)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from nonstick.core.refusals import Refusal
from nonstick.http.intake import arrived, check_headers

pytestmark = pytest.mark.anyio

LIMIT = 1000


class Client:
    """Sends a body in such pieces, and counts how many were asked for."""

    def __init__(self, *pieces: int) -> None:
        self._pieces: Iterator[tuple[int, int]] = iter(enumerate(pieces, 1))
        self._count = len(pieces)
        self.asked = 0

    async def receive(self) -> Any:
        self.asked += 1
        number, size = next(self._pieces)
        return {"type": "http.request", "body": b"x" * size, "more_body": number < self._count}


async def body_of(client: Client, *, declared: int | None = None) -> bytes:
    headers = [] if declared is None else [(b"content-length", b"%d" % declared)]
    body, _ = await arrived(
        {"type": "http", "headers": headers}, client.receive, limit=LIMIT, seconds=5, until_closing={}
    )
    return body


@pytest.mark.parametrize("pieces", [(LIMIT,), (1, LIMIT - 1), (LIMIT - 1, 1), (LIMIT, 0)])
async def test_body_at_the_limit_is_taken(pieces: tuple[int, ...]) -> None:
    assert len(await body_of(Client(*pieces))) == LIMIT
    assert len(await body_of(Client(*pieces), declared=LIMIT)) == LIMIT


@pytest.mark.parametrize("pieces", [(LIMIT + 1,), (1, LIMIT), (LIMIT, 1)])
async def test_body_above_the_limit_is_refused(pieces: tuple[int, ...]) -> None:
    with pytest.raises(Refusal) as refused:
        await body_of(Client(*pieces))
    assert refused.value.reason.status == 413


async def test_overlong_announced_body_is_not_received() -> None:
    client = Client(LIMIT + 1)
    with pytest.raises(Refusal):
        await body_of(client, declared=LIMIT + 1)
    assert client.asked == 0


async def test_endless_body_is_cut_at_limit() -> None:
    """Whoever sends for ever is not read for ever."""
    client = Client(*[100] * 10_000)
    with pytest.raises(Refusal) as refused:
        await body_of(client)
    assert refused.value.reason.status == 413
    assert client.asked == LIMIT // 100 + 1


@pytest.mark.parametrize("pieces", [(), (b"x",), (b"x" * LIMIT,)], ids=["nothing", "some", "all that may be"])
async def test_client_that_leaves_midway_is_gone(pieces: tuple[bytes, ...]) -> None:
    """Nothing of its body is taken for the whole of it."""
    messages = iter(
        [*({"type": "http.request", "body": p, "more_body": True} for p in pieces), {"type": "http.disconnect"}]
    )

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(ClientDisconnect):
        await arrived({"type": "http", "headers": []}, receive, limit=LIMIT, seconds=5, until_closing={})


def test_headers_at_the_limit_are_taken() -> None:
    """Names and values count."""
    check_headers({"headers": [(b"a" * 400, b"b" * 500), (b"c" * 99, b"d")]}, LIMIT)
    with pytest.raises(Refusal) as refused:
        check_headers({"headers": [(b"a" * 400, b"b" * 500), (b"c" * 99, b"dd")]}, LIMIT)
    assert refused.value.reason.status == 431
