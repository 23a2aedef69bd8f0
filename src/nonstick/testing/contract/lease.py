"""The contract of leases, and of the store as a whole."""

from __future__ import annotations

import threading

import anyio.to_thread

from nonstick.store import Store
from nonstick.testing.contract.base import ContractFixtures
from nonstick.testing.contract.tools import Clock, eventually

__all__ = ["LeaseContract"]


class LeaseContract(ContractFixtures):
    """A node lives while its lease does."""

    async def test_lease_holds_until_it_lapses_by_the_stores_clock(
        self, a: Store, b: Store, key: str, clock: Clock
    ) -> None:
        """`lapsed`: nodes whose lease has run out, or that never had one (P7)."""
        long, short, never = f"{key}-long", f"{key}-short", f"{key}-never"
        lease = a.lease(long)
        brief = a.lease(short)
        try:
            await anyio.to_thread.run_sync(lease.renew, 60.0)
            await anyio.to_thread.run_sync(brief.renew, 0.05)

            async def lapsed() -> bool:
                await clock.advance(0.01)
                return await b.lapsed([long, short, never]) == {short, never}

            await eventually(lapsed)
            await anyio.to_thread.run_sync(brief.renew, 60.0)
            assert await b.lapsed([long, short, never]) == {never}
            assert await b.lapsed([]) == set()
        finally:
            await anyio.to_thread.run_sync(lambda: lease.close(release=True))
            await anyio.to_thread.run_sync(lambda: brief.close(release=True))

    async def test_released_lease_has_lapsed_and_a_closed_one_runs_on(self, a: Store, b: Store, key: str) -> None:
        """`Lease.close`: with `release` ends the lease first; without, it holds for what was granted."""
        released, left = a.lease(f"{key}1"), a.lease(f"{key}2")
        for lease in (released, left):
            await anyio.to_thread.run_sync(lease.renew, 60.0)
        await anyio.to_thread.run_sync(lambda: released.close(release=True))
        await anyio.to_thread.run_sync(lambda: left.close(release=False))
        assert await b.lapsed([f"{key}1", f"{key}2"]) == {f"{key}1"}

    async def test_lease_that_was_never_renewed_can_be_closed(self, a: Store, key: str) -> None:
        """`lease` does not connect yet; `Lease.close` never raises."""
        for release in (True, False):
            await anyio.to_thread.run_sync(lambda release: a.lease(key).close(release=release), release)
        assert await a.lapsed({key}) == {key}

    async def test_lease_is_renewed_while_the_event_loop_stands_still(self, a: Store, key: str) -> None:
        """`Lease`: shares nothing with the event loop, so a node with a blocking tool stays alive (P7)."""
        lease = a.lease(key)
        try:
            thread = threading.Thread(target=lease.renew, args=(60.0,))
            thread.start()
            thread.join(10)  # blocks the event loop, on purpose
            assert not thread.is_alive()
            assert await a.lapsed({key}) == set()
        finally:
            await anyio.to_thread.run_sync(lambda: lease.close(release=True))

    async def test_store_answers_a_ping_and_names_itself(self, a: Store) -> None:
        """`ping` is one round trip; `url` is fit for logs."""
        await a.ping()
        assert a.url
        assert a.url.isprintable()
