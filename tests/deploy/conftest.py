"""What of the proxies' tests is slow."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nodes are replaced behind one proxy; to the other it is the same."""
    for item in items:
        if item.name == "test_session_survives_replacing_every_node[nginx]":
            item.add_marker(pytest.mark.slow)
