"""The SQLite store keeps the contract, as two processes on one file would use it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nonstick.stores.sqlite import SQLiteStore
from nonstick.testing import ManualClock, Opener, StoreContract, opening
from nonstick.testing.contract.append import AppendContract
from nonstick.testing.contract.record import RecordContract


class TestSQLiteStore(StoreContract):
    """Each node has its own connections to one file."""

    @pytest.fixture
    async def opener(self, tmp_path: Path) -> AsyncIterator[Opener]:
        async with opening(lambda: SQLiteStore(tmp_path / "sessions.db")) as opener:
            yield opener


class TestSQLiteStoreByTheMinute(AppendContract, RecordContract):
    """What takes minutes, under a clock that the test moves."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    async def opener(self, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Opener]:
        async with opening(lambda: SQLiteStore(tmp_path / "sessions.db", clock=clock)) as opener:
            yield opener
