"""The template for a store of your own keeps the contract. Copy this file beside your store, and change two lines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from examples.store_template import DocumentStore

from nonstick.commands.doctor import diagnose
from nonstick.testing import ManualClock, Opener, opening
from nonstick.testing.contract import StoreContract


class TestDocumentStore(StoreContract):
    """Two instances on one file, as two nodes would open it, with a clock that the tests move by hand."""

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    async def opener(self, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Opener]:
        path = str(tmp_path / "sessions.db")
        async with opening(lambda: DocumentStore(path, clock=clock)) as opener:
            yield opener


@pytest.mark.anyio
async def test_doctor_finds_nothing_wrong(tmp_path: Path) -> None:
    """`diagnose` tries any store, by the methods of the protocol alone, on the real clock."""
    findings = await diagnose(lambda: DocumentStore(str(tmp_path / "sessions.db")))
    assert {finding.level for finding in findings} == {"ok"}
