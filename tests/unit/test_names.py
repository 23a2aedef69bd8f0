"""Session ids, keys and names: what must not repeat does not, whatever a handler or a server does to the process."""

from __future__ import annotations

import random
import string
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonstick.core.names import (
    identity,
    is_session_id,
    is_session_of,
    new_attempt,
    new_name,
    new_session_id,
    new_tag,
    session_key,
)

SHOP, BANK = identity("shop", "/mcp"), identity("bank", "/mcp")


def test_seeded_random_numbers_repeat_no_names() -> None:
    """Nor does a handler that seeds the generator of the module `random`."""
    drawn = []
    for _ in range(2):
        random.seed(7)
        drawn.append((new_name(), new_tag(), new_attempt()))
    assert drawn[0] != drawn[1]


def test_names_and_tags_have_their_length() -> None:
    assert {len(new_name()) for _ in range(200)} == {16}
    assert {len(new_tag()) for _ in range(200)} == {8}


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_forked_workers_draw_own_names() -> None:
    """A server that loads the app before it forks gives its workers one generator."""
    program = """
import os
from nonstick.core.names import new_name
new_name()
for _ in range(2):
    if (child := os.fork()) == 0:
        print(new_name(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print(new_name())
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert len(set(said.stdout.split())) == 3


def test_new_ids_differ_and_name_server() -> None:
    """P1: 192 bits."""
    ids = {new_session_id(SHOP) for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len({one[at] for one in ids}) > 30 for at in range(32))
    assert all(is_session_of(SHOP, one) and len(one) == 40 for one in ids)
    assert not any(is_session_of(other, one) for one in ids for other in (BANK, ""))


@given(st.text(string.ascii_letters + string.digits + "-_.é", min_size=30, max_size=42))
def test_ids_have_their_length_and_alphabet(text: str) -> None:
    """P1: 32 or 40 characters, of those for URLs."""
    allowed = set(string.ascii_letters + string.digits + "-_")
    assert is_session_id(text) == (len(text) in (32, 40) and set(text) <= allowed)


@given(st.text(string.ascii_letters + string.digits + "-_", min_size=32, max_size=32))
def test_old_version_id_fits_any_server(text: str) -> None:
    """P12: it is of any, for one release."""
    assert is_session_of(SHOP, text)
    assert is_session_of(BANK, text)


@pytest.mark.parametrize(
    "text", ["a" * 32 + "\n", "a" * 31, "a" * 33, "ａ" * 32, "a" * 31 + "\0", "", "a" * 40, "a" * 64]
)
def test_look_alikes_are_no_ids(text: str) -> None:
    assert not is_session_of(SHOP, text)


def test_changed_id_fits_no_server() -> None:
    """P1: nor is one with something after it, as the name of an endpoint was once."""
    session_id = new_session_id(SHOP)
    for at in (0, 15, 31, 32, 39):
        changed = session_id[:at] + ("a" if session_id[at] != "a" else "b") + session_id[at + 1 :]
        assert not is_session_of(SHOP, changed)
    assert not is_session_of(SHOP, session_id + "localhost")
    assert not is_session_of(SHOP, session_id[:-1])


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_identity_keeps_its_parts_apart(one: list[str], other: list[str]) -> None:
    """However they are joined."""
    assert (identity(*one) == identity(*other)) == (one == other)


def test_key_does_not_show_the_id() -> None:
    """P13: visible ASCII, at most 64 characters, the same everywhere."""
    session_id = new_session_id()
    key = session_key(session_id)
    assert key == session_key(session_id) != session_key(new_session_id())
    assert key.isalnum()
    assert len(key) <= 64
    assert session_id not in key
