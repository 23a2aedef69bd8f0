"""Real processes over a real store, and clients that expect the worst."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nonstick.testing import ValkeyServer
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
