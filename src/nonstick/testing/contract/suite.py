"""The published contract: a store that passes it keeps what `nonstick.store` promises.

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def opener(self, tmp_path) -> AsyncIterator[Opener]:
            async with opening(lambda: MyStore(tmp_path / "data")) as opener:
                yield opener

The fixture gives a NEW instance on the same data each time, so that the tests act as two nodes, and starts each test
with data that no other test has seen. See `docs/writing-a-store.md`.
"""

from __future__ import annotations

from nonstick.testing.contract.append import AppendContract
from nonstick.testing.contract.expiry import ExpiryContract
from nonstick.testing.contract.generated import StoreModelContract
from nonstick.testing.contract.lease import LeaseContract
from nonstick.testing.contract.racing import RaceContract
from nonstick.testing.contract.reading import ReadContract
from nonstick.testing.contract.record import RecordContract
from nonstick.testing.contract.staleness import StaleContract
from nonstick.testing.contract.streams import StreamContract
from nonstick.testing.contract.waking import WatchContract
from nonstick.testing.contract.writers import WriterContract

__all__ = ["StoreContract"]


class StoreContract(
    RecordContract,
    ExpiryContract,
    LeaseContract,
    AppendContract,
    WriterContract,
    StreamContract,
    ReadContract,
    StaleContract,
    WatchContract,
    RaceContract,
    StoreModelContract,
):
    """Every sentence of the specification, as tests; subclass it, name the subclass `Test...`, and give it `opener`.

    Where the store takes its clock as an argument, define the fixture `clock` as a `ManualClock` too: expiry is then
    tested exactly and without waiting. Otherwise the expiry tests take some seconds of the real clock.
    """
