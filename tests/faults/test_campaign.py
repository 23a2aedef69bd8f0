"""A short campaign of faults on each store (P3 to P9). Longer ones: `make faults SECONDS=600`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, StoreKind, report

pytestmark = pytest.mark.anyio

SECONDS = 6.0


SLOW = [
    pytest.param(store, losing, marks=pytest.mark.slow)
    for store, losing in (
        ("sqlite", False),
        ("valkey", True),
        ("postgres", False),
        ("postgres", True),
        ("valkey-cluster", True),
    )
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("store", "losing"), [("valkey", False), *SLOW])
async def test_no_promise_breaks_under_faults(store: StoreKind, losing: bool, tmp_path: Path) -> None:
    """The seed is new each time, and shown: `python -m tests.faults.campaign --seed` takes it."""
    campaign = Campaign(store, random.randrange(10**6), SECONDS, tmp_path, losing=losing, vanishing=losing)
    print(f"seed {campaign.seed}")
    await campaign.run()
    told = report(campaign)
    print(told)
    assert campaign.violations == [], told
    assert sum(campaign.faults.values()) > 0
    assert sum("'result'" in str(record) for record in campaign.records) > 10, told
