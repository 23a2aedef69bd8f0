"""The published contract: a store that passes it keeps what `nonstick.store` promises."""

from nonstick.testing.contract.suite import StoreContract

__all__ = ["StoreContract"]
