"""Stores that two releases share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonstick.testing import PostgresServer, ValkeyServer
from tests.rolling.releases import unpacked


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One Valkey for all tests; each takes a prefix of its own."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests; each takes a schema of its own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def last_release(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which a process runs the last release."""
    return unpacked(tmp_path_factory.mktemp("last-release"))


@pytest.fixture(params=["sqlite", "valkey", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/sessions.db"
    if request.param == "postgres":
        database: PostgresServer = request.getfixturevalue("postgres")
        return f"{database.url}?schema=s{random.randrange(10**9)}"
    server: ValkeyServer = request.getfixturevalue("valkey")
    return f"{server.url}?prefix={tmp_path.name}-{random.randrange(10**9)}"
