"""Tasks and timers that belong to no request, and that there are no others in the background."""

from __future__ import annotations

import asyncio
import re
from contextvars import ContextVar
from pathlib import Path

import pytest

import nonstick
from nonstick.waiting import background

SOURCES = Path(nonstick.__file__).parent
TEAM: ContextVar[str] = ContextVar("team")

IN_THE_CALLERS = {
    "waiting/background.py": 2,
    "waiting/tasks.py": 1,
    # Timers of one request, or of one call.
    "session/exchange.py": 1,
    "session/opening.py": 1,
    "session/inbox.py": 1,
    "waiting/deadline.py": 1,
    # Of one call to the store, whose spans belong to the caller's.
    "stores/postgres/pool.py": 1,
    "stores/redis/servers.py": 1,
    "stores/redis/sentinel.py": 1,
    # Of a connection, before a request has come by it; of the process.
    "protocols/bounded_heads.py": 1,
    "protocols/draining.py": 1,
    "node/node.py": 1,
    "protocols/loop.py": 1,
    "stores/postgres/news.py": 1,
}
"""How many tasks and timers of each module begin in the context of their caller, or say in which they begin."""


@pytest.mark.anyio
async def test_background_work_keeps_no_callers_context() -> None:
    """P18."""

    async def see() -> str:
        return TEAM.get("none")

    TEAM.set("mine")
    assert await asyncio.create_task(see()) == "mine"
    assert await background.spawn(see()) == "none"
    seen: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    background.later(0.0, lambda: seen.set_result(TEAM.get("none")))
    assert await seen == "none"


def test_tasks_and_timers_state_their_context() -> None:
    """P18: a new one is begun by `Tasks.spawn` or by `background`; or, for one request alone, is counted here."""
    begins = re.compile(r"(?:create_task|ensure_future|call_later|call_at)\(")
    found = {
        path.relative_to(SOURCES).as_posix(): len(begins.findall(path.read_text()))
        for path in SOURCES.rglob("*.py")
        if path.relative_to(SOURCES).parts[0] != "testing"
    }
    assert {name: count for name, count in found.items() if count} == IN_THE_CALLERS
