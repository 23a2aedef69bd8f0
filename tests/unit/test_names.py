"""Names that must not repeat do not, whatever a handler or a server does to the process."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from nonstick.core.names import new_attempt, new_name, new_tag


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
def test_forked_workers_draw_names_of_their_own() -> None:
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
