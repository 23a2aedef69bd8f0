"""docs/guarantees.md names a test for each row of its tables, and every promise."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()


def test_every_named_test_exists() -> None:
    """A row whose test was renamed or removed says nothing."""
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)}
    assert named
    assert named <= there, named - there


def test_every_fault_row_names_its_test() -> None:
    """The table under "When the store fails"."""
    table = PAGE.partition("## When the store fails")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        assert re.search(r"`test_\w+` \|$", row), row


def test_every_promise_is_told() -> None:
    """P1 to P18, once each, in order."""
    assert re.findall(r"^\| (P\d+) \|", PAGE, re.MULTILINE) == [f"P{n}" for n in range(1, 19)]
