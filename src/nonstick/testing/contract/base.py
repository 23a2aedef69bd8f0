"""The fixtures of the contract: what an implementer's subclass provides, and what the tests take."""

from __future__ import annotations

import secrets

import pytest

from nonstick.store import Store
from nonstick.testing.contract.checks import empty_log
from nonstick.testing.contract.tools import Clock, Opener, RealClock

__all__ = ["ContractFixtures"]


class ContractFixtures:
    """Two nodes, a session key that nobody used before, and the store's clock.

    A subclass defines `opener`; one whose store takes a clock as an argument defines `clock` too, as a `ManualClock`.
    """

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        """Stores run on asyncio."""
        return "asyncio"

    @pytest.fixture
    def opener(self) -> Opener:
        """Gives a new instance on the same data each time; empty data for each test."""
        raise NotImplementedError("define the fixture `opener`: see nonstick.testing.opening")

    @pytest.fixture
    def clock(self) -> Clock:
        """The store's clock."""
        return RealClock()

    @pytest.fixture
    def key(self) -> str:
        """Short enough to be made longer."""
        return secrets.token_hex(16)

    @pytest.fixture
    async def a(self, opener: Opener) -> Store:
        """A node."""
        return await opener()

    @pytest.fixture
    async def b(self, opener: Opener) -> Store:
        """Another node, on the same data."""
        return await opener()

    @pytest.fixture
    async def log(self, a: Store, key: str) -> str:
        """The key of a session with an empty log."""
        return await empty_log(a, key)
