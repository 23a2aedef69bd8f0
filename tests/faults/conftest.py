"""Real processes over a real store, and clients that expect the worst."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nonstick.log.guard import GuardedStore
from nonstick.testing import FaultProxy, PostgresServer, ValkeyServer
from tests.faults.places import Place
from tests.faults.stage import Stage


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One Valkey for all tests; each takes a prefix of its own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("valkey", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sessions.db"
    server: ValkeyServer = request.getfixturevalue("valkey")
    return f"{server.url}?prefix={tmp_path.name}-{random.randrange(10**9)}"


@pytest.fixture
async def stage(store_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """No node yet: each test starts its own, with its own settings."""
    async with Stage(store_url, tmp_path) as stage:
        yield stage


@pytest.fixture(scope="session")
def harmed_valkey() -> Iterator[ValkeyServer]:
    """One for all tests that harm it and put it right again. What it has answered survives its death."""
    with ValkeyServer(appendonly=True) as server:
        yield server


@pytest.fixture(scope="session")
def harmed_postgres() -> Iterator[PostgresServer]:
    """As `harmed_valkey`."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["valkey", "postgres"])
def place(request: pytest.FixtureRequest) -> Place:
    """A deployment of its own, on each kind of server."""
    return Place(request.param, request.getfixturevalue(f"harmed_{request.param}"))


@pytest.fixture
async def proxy(place: Place) -> AsyncIterator[FaultProxy]:
    """A bad network before the server."""
    async with FaultProxy(place.server.url) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls to a store that is away end soon."""
    defaults = GuardedStore.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "patience", 0.7)
