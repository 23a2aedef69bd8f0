"""A node's lease as a row, on a connection of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from nonstick.errors import ConfigurationError
from nonstick.store import Lease
from nonstick.stores.common.lease import LEASE_SECONDS, BlockingLease
from nonstick.stores.postgres.pool import TROUBLE, connect, refusal
from nonstick.stores.postgres.url import Address

if TYPE_CHECKING:
    from nonstick.stores.postgres.pool import Connection

__all__ = ["lease_on"]

_RELEASE_SECONDS: Final = 2.0


def lease_on(address: Address, node: str) -> Lease:
    """The lease of this node. Does not connect yet."""
    return BlockingLease(_LeaseRow(address, node), url=address.url, release_seconds=_RELEASE_SECONDS)


class _LeaseRow:
    """See `nonstick.stores.common.lease.LeaseClient`. Never repeats a statement: the next renewal will."""

    def __init__(self, address: Address, node: str) -> None:
        self._address = address
        self._node = node
        self._connection: Connection | None = None

    async def grant(self, seconds: float) -> None:
        await self._execute("grant_lease($1, $2)", self._node, seconds)

    async def release(self) -> None:
        await self._execute("release_lease($1)", self._node)

    async def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()
            # One turn more, in which the socket is closed and what the driver began is ended.
            await asyncio.sleep(0)

    async def _execute(self, call: str, *args: object) -> None:
        try:
            if self._connection is None:
                self._connection = await connect(self._address, timeout=LEASE_SECONDS)
            await self._connection.execute(f'SELECT "{self._address.schema}".{call}', *args)
        except (*TROUBLE, ConfigurationError) as error:
            await self.disconnect()
            raise refusal(error) from None
        except BaseException:
            await self.disconnect()
            raise
