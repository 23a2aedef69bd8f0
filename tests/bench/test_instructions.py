"""What a request costs in machine instructions, on a real server, is at most what was committed."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from bench import instructions

ROOT = Path(__file__).parents[2]
HOW = "If that is meant, say why in the commit and run: python -m bench.instructions --commit"


@pytest.mark.anyio
@pytest.mark.filterwarnings("default:Other versions:UserWarning")
async def test_requests_need_no_more_instructions() -> None:
    """As ratios to the limit of the same run: closely with the committed versions, roughly with others."""
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind: apt-get install valgrind")
    counted = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.instructions", "--json"), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await counted.communicate()
    assert counted.returncode == 0
    found, committed = json.loads(told), instructions.committed()
    assert found.keys() == committed["thousands"].keys(), f"other requests are counted than were committed. {HOW}"
    tolerance = instructions.TOLERANCE
    if others := instructions.differences(instructions.environment(), committed["environment"]):
        tolerance = instructions.OTHER_TOLERANCE
        warnings.warn(
            f"Other versions than the committed instructions were counted with, so {tolerance:.0%} more pass: "
            f"{'; '.join(others)}. With these versions, run: python -m bench.instructions --commit",
            stacklevel=1,
        )
    worse = list(instructions.worse(found, committed["thousands"], tolerance))
    assert not worse, "\n".join([*worse, HOW])


def test_committed_kinds_are_those_counted() -> None:
    committed = instructions.committed()
    assert list(committed["thousands"]) == [kind.name for kind in instructions.KINDS]
    assert committed["environment"].keys() == instructions.environment().keys()


def test_dearer_ratio_is_told() -> None:
    """Not the count: a limit that grew as much has grown for another reason."""
    kept = {"the limit": 400.0, "echo": 800.0}
    assert not list(instructions.worse({"the limit": 400.0, "echo": 820.0}, kept, 0.03))
    assert not list(instructions.worse({"the limit": 500.0, "echo": 1000.0}, kept, 0.03))
    told = list(instructions.worse({"the limit": 400.0, "echo": 830.0}, kept, 0.03))
    assert told == ["echo: 2.08 times the limit (830 thousand instructions), committed 2.00 (800)"]


def test_other_versions_are_named() -> None:
    committed = {"python": "3.11.7", "mcp": "2.3.0"}
    assert instructions.differences(committed, committed) == []
    assert instructions.differences({**committed, "mcp": "2.4.0"}, committed) == ["mcp 2.4.0, not 2.3.0"]
