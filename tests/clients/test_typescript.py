"""The official TypeScript client against nonstick on three nodes. What it checks is in `typescript.mjs`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nonstick.testing.servers.balancer import Balancer
from tests.clients.conftest import NODES
from tests.conformance import npm
from tests.conformance.nodes import SDK, balanced, serving

pytestmark = pytest.mark.anyio

HOME = Path(__file__).resolve().parent
SECONDS = 240.0

VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
"""Every version that opens a session."""


@pytest.fixture(scope="session")
def node() -> str:
    """A Node.js that the client runs on, with the client installed."""
    try:
        return npm.node(npm.install(HOME), at_least=20)
    except npm.NpmMissing as missing:
        pytest.skip(str(missing))


async def drive(node: str, url: str, mode: str, nodes: int) -> tuple[int | None, str]:
    """Runs the program; its exit status and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        node, "typescript.mjs", f"{url}/mcp", mode, str(nodes),
        cwd=HOME, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(SECONDS):
            said, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process.returncode, said.decode()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_session_works_on_three_nodes(node: str, nodes: Balancer, version: str) -> None:
    """P1, P3, P4, P6: the client opens a session by the handshake and uses all of it."""
    status, said = await drive(node, nodes.url, version, NODES)
    assert status == 0, said


async def test_sessionless_client_works_on_three_nodes(node: str, nodes: Balancer) -> None:
    """P11, and the shared request state: the client finds out by itself that the server speaks 2026-07-28."""
    status, said = await drive(node, nodes.url, "auto", NODES)
    assert status == 0, said


@pytest.mark.slow
async def test_checks_hold_on_one_sdk_node(node: str) -> None:
    """What is checked is what the protocol promises, not something of ours."""
    async with serving(SDK) as port:
        for mode in (*VERSIONS, "auto"):
            status, said = await drive(node, f"http://127.0.0.1:{port}", mode, 1)
            assert status == 0, said


@pytest.mark.slow
async def test_checks_fail_on_nodes_sharing_nothing(node: str) -> None:
    """The balancer does scatter a session's requests, and the program does notice."""
    async with balanced(NODES, SDK) as balancer:
        for mode in (VERSIONS[-1], "auto"):
            status, said = await drive(node, balancer.url, mode, NODES)
            assert status == 1, said
            assert "FAIL" in said
