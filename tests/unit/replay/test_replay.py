"""Connections to standalone streams do what they did before the rules were written as tables, to the byte (P3, P9).

The tapes are of the tests of listening, leaving, waking, telling everyone and losing entries, and of campaigns on
SQLite and Valkey. Of all that were recorded, those are kept that differ in what happens.
"""

from __future__ import annotations

import json
import lzma
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nonstick.core.events import Kind
from nonstick.waiting import retry
from tests.unit.replay.player import Clock, Player

with lzma.open(Path(__file__).parent / "standalone.jsonl.xz", "rt", encoding="utf-8") as file:
    TAPES: list[list[list[Any]]] = [json.loads(line) for line in file]


async def at_once(_seconds: float) -> None:
    """In place of a pause."""


def play(tape: list[list[Any]]) -> None:
    clock = Clock()
    player = Player(tape, clock)
    try:
        clock.run_until_complete(player.play())
    finally:
        clock.now = None
        clock.run_until_complete(player.stop())
        clock.close()


@pytest.mark.parametrize("number", range(len(TAPES)))
def test_a_connection_does_what_was_recorded(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: it reads, says, puts and waits for the same, in the same order."""
    monkeypatch.setattr(retry, "asyncio", SimpleNamespace(sleep=at_once))
    play(TAPES[number])


def test_tapes_have_all_that_happens() -> None:
    """Losses, questions, hang-ups, broadcasts, silence and lapsed nodes are among what they tell."""
    appended: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    for tape in TAPES:
        for kind, *rest in tape:
            happened[f"{kind} {rest[1]}" if kind == "start" else f"{kind} {rest[0]}" if kind == "in" else kind] += 1
            if kind == "end" and "error" in rest[1]:
                happened[rest[1]["error"]] += 1
            if kind == "start" and rest[1] == "append":
                appended[Kind(ord(rest[2][0][1])).name] += 1
            if kind == "start" and rest[1] == "append" and '"lost"' in rest[2][0]:
                happened["lost"] += 1
    assert set(appended) == {"LISTENING", "LEFT", "ASKING", "CARRYING"}
    for what in ("Diverged", "Trimmed", "lost", "in hear", "in cancelled", "start lapsed", "start room", "put", "skip"):
        assert happened[what], what


def test_other_behaviour_than_taped_is_noticed() -> None:
    """One entry of a tape is changed: what was put, what was said, or where it follows."""
    tape = next(tape for tape in TAPES if any(entry[0] == "put" for entry in tape))
    for kind in ("put", "follow", "start"):
        changed = json.loads(json.dumps(tape))
        entry = next(entry for entry in changed if entry[0] == kind and (kind != "start" or entry[2] == "append"))
        if kind == "start":
            entry[3][0] = entry[3][0].replace('"since":', '"since":1')
        else:
            entry[1] = ["other"]
        with pytest.raises(AssertionError):
            play(changed)
