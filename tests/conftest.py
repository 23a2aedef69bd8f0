"""Fixtures and settings for every test."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # One server's workers are told by their parent and their command line: those of pytest are not of one server.
    sys.argv = [*sys.argv, worker]

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
