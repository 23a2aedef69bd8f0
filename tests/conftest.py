"""Fixtures for every test."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """nonstick runs where uvicorn runs: on asyncio."""
    return "asyncio"
