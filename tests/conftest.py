"""Fixtures and settings for every test."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "any machine",
    # How long an example takes, or takes to make, says how busy the machine is, and nothing of what is tested.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("any machine")


@pytest.fixture
def anyio_backend() -> str:
    """nonstick runs where uvicorn runs: on asyncio."""
    return "asyncio"
