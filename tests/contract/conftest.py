"""Real servers for the stores' contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nonstick.testing import ValkeyServer


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One Valkey for all tests; each takes a prefix of its own."""
    with ValkeyServer() as server:
        yield server
