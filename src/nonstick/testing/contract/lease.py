"""The contract of leases, and of the store as a whole."""

from __future__ import annotations

import threading
import time

import anyio.to_thread

from nonstick.errors import StoreUnavailable
from nonstick.store import Lease, Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.tools import DEADLINE, Clock, eventually

__all__ = ["LeaseContract"]

_RELEASES = 5


def renew(lease: Lease, seconds: float) -> None:
    """Renews it, as often as a node would while its store is slow to answer."""
    limit = time.monotonic() + DEADLINE
    while True:
        try:
            return lease.renew(seconds)
        except StoreUnavailable:
            if time.monotonic() > limit:
                raise


class LeaseContract(ContractFixtures):
    """A node lives while its lease does."""

    async def test_lease_lapses_by_the_stores_clock(self, a: Store, b: Store, key: str, clock: Clock) -> None:
        """`lapsed`: nodes whose lease has run out, or that never had one (P7)."""
        long, short, never = f"{key}-long", f"{key}-short", f"{key}-never"
        lease = a.lease(long)
        brief = a.lease(short)
        try:
            await anyio.to_thread.run_sync(renew, lease, 60.0)
            await anyio.to_thread.run_sync(renew, brief, 0.05)

            async def lapsed() -> bool:
                await clock.advance(0.01)
                return await b.lapsed([long, short, never]) == {short, never}

            await eventually(lapsed)
            await anyio.to_thread.run_sync(renew, brief, 60.0)
            assert await b.lapsed([long, short, never]) == {never}
            assert await b.lapsed([]) == set()
        finally:
            await anyio.to_thread.run_sync(lambda: lease.close(release=True))
            await anyio.to_thread.run_sync(lambda: brief.close(release=True))

    async def test_released_lease_lapses_closed_lease_holds(self, a: Store, b: Store, key: str) -> None:
        """`Lease.close`: with `release` ends the lease first; without, it holds for what was granted."""
        left = a.lease(f"{key}-left")
        await anyio.to_thread.run_sync(renew, left, 60.0)
        await anyio.to_thread.run_sync(lambda: left.close(release=False))
        # A node that ends waits only so long for its store: one of these is heard in time.
        names = [f"{key}-{n}" for n in range(_RELEASES)]
        for released in map(a.lease, names):
            await anyio.to_thread.run_sync(renew, released, 60.0)
            await anyio.to_thread.run_sync(lambda lease: lease.close(release=True), released)
        lapsed = await b.lapsed([f"{key}-left", *names])
        assert lapsed
        assert lapsed <= {*names}

    async def test_lease_never_renewed_can_be_closed(self, a: Store, key: str) -> None:
        """`lease` does not connect yet; `Lease.close` never raises."""
        for release in (True, False):
            await anyio.to_thread.run_sync(lambda release: a.lease(key).close(release=release), release)
        assert await a.lapsed({key}) == {key}

    async def test_lease_is_renewed_beside_blocked_loop(self, a: Store, key: str) -> None:
        """`Lease`: shares nothing with the event loop, so a node with a blocking tool stays alive (P7)."""
        lease = a.lease(key)
        try:
            thread = threading.Thread(target=renew, args=(lease, 60.0))
            thread.start()
            thread.join(DEADLINE)  # blocks the event loop, on purpose
            assert not thread.is_alive()
            assert await a.lapsed({key}) == set()
        finally:
            await anyio.to_thread.run_sync(lambda: lease.close(release=True))

    async def test_store_answers_ping_and_has_url(self, a: Store) -> None:
        """`ping` is one round trip; `url` is fit for logs."""
        await a.ping()
        assert a.url
        assert a.url.isprintable()
