"""What a session record holds."""

from __future__ import annotations

import pytest
from mcp_types import InitializeRequestParams

from nonstick.core.record import Record, opening_fields, subscription_field
from nonstick.errors import StoreUnavailable

CLIENT = InitializeRequestParams.model_validate(
    {
        "protocolVersion": "2025-11-25",
        "capabilities": {"sampling": {}, "experimental": {"x": {"y": 1}}},
        "clientInfo": {"name": "ü", "version": "1"},
        "_meta": {"kept": [1]},
    },
    by_name=False,
)


def test_record_is_what_was_opened() -> None:
    """P2."""
    record = Record.from_fields(opening_fields("2025-06-18", CLIENT, b"ada"))
    assert record.protocol_version == "2025-06-18"
    assert record.client_params == CLIENT
    assert record.principal == b"ada"
    assert (record.initialized, record.log_level, record.subscriptions, record.state) == (False, None, frozenset(), {})


def test_record_passes_over_unknown_fields() -> None:
    """P2, P12."""
    fields = opening_fields("2025-11-25", CLIENT, b"") | {
        "initialized": b"1",
        "level": b"error",
        subscription_field("memo://ü"): "memo://ü".encode(),
        "state:user": b'"ada"',
        "of a later version": b"\xff",
    }
    record = Record.from_fields(fields)
    assert record.initialized
    assert record.log_level == "error"
    assert record.subscriptions == {"memo://ü"}
    assert record.state == {"user": b'"ada"'}


@pytest.mark.parametrize("version", [b"2", b"", b"\x00NE1 ciphertext", None])
def test_record_of_other_format_is_unreadable(version: bytes | None) -> None:
    """P9, P12: of a newer release, or encrypted. The session lives, so it is 503 and never 404."""
    fields = opening_fields("2025-11-25", CLIENT, b"")
    if version is None:
        del fields["v"]
    else:
        fields["v"] = version
    with pytest.raises(StoreUnavailable, match="another version of nonstick"):
        Record.from_fields(fields)


def test_subscriptions_field_fits_any_uri() -> None:
    """A field's name is visible ASCII, at most 512 characters."""
    for uri in ("memo://a", "memo://" + "x" * 10_000, "memo://ü\n"):
        name = subscription_field(uri)
        assert name.isascii()
        assert name.isprintable()
        assert len(name) <= 512
    assert subscription_field("memo://a") != subscription_field("memo://b")
