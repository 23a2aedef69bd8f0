"""`nonstick demo`: real node processes, a balancer without affinity, the official client, and kill -9.

It is a list of acts. The first line of an act's docstring is its title; it takes the stage, drives the client, says
what it sees, and raises `Problem` if something is not as it must be. Every exchange is told by the stage itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mcp import Client
from mcp.client import ClientRequestContext
from mcp.shared.exceptions import MCPError
from mcp_types import ElicitRequestParams, ElicitResult

from nonstick.commands.demo.stage import CLIENT_NAME, LEASE, DemoNodes, Narrator, Problem, Stage, served, text_of
from nonstick.stores import open_store

__all__ = ["run"]

_ACT_SECONDS: Final = 40.0
_COUNT_TO: Final = 4
_COUNT_ON_TO: Final = 16
"""A count that takes more than twice as long as the client waits before it comes back for the rest."""
_STRIKE_AT: Final = 3
_POLL_SECONDS: Final = 3.0
"""A node is found dead by two looks, each after 1.5 s of silence."""
_SLACK_SECONDS: Final = 3.0
_COLOUR: Final = "teal"

Act = Callable[[Stage], Awaitable[None]]


def run(*, store: str | None, sdk: bool, nodes: int) -> int:
    """Plays the demo; returns 0 if all went as it must, 1 if not, 130 if it was interrupted.

    Raises:
        ConfigurationError: `store` names no store.
    """
    logging.getLogger("mcp.client").setLevel(logging.CRITICAL)  # what it would say is told here
    tell = Narrator()
    with tempfile.TemporaryDirectory(prefix="nonstick-demo-") as home, _stopped_like_ctrl_c():
        shared = open_store(store).url if store else "a temporary SQLite file"
        store = store or f"sqlite:///{Path(home) / 'sessions.db'}"
        started = DemoNodes(Path(home), store, nodes, sdk=sdk)
        _introduce(tell, started, shared)
        try:
            return asyncio.run(_play(tell, started))
        except KeyboardInterrupt:
            tell.line("\ninterrupted; the nodes are stopped")
            return 130


@contextlib.contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does, so that no node is left behind."""
    before = signal.signal(signal.SIGTERM, lambda _signum, _frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _introduce(tell: Narrator, nodes: DemoNodes, shared: str) -> None:
    names = [node.name for node in nodes.members]
    how = "each serves with the SDK alone" if nodes.sdk else f"they share {shared}"
    tell.line(f"{len(names)} nodes, {names[0]} to {names[-1]}, each a process of its own; {how}.")
    tell.line("In front of them a proxy sends every request to the next node: nothing is sticky.")
    tell.line("The client is the official Python client in its handshake mode, which has sessions.")


async def _play(tell: Narrator, nodes: DemoNodes) -> int:
    try:
        async with nodes, Stage(tell, nodes) as stage:
            for number, act in enumerate(SDK_ACTS if nodes.sdk else ACTS, 1):
                tell.title(f"{number}. {(act.__doc__ or '').splitlines()[0]}")
                async with asyncio.timeout(_ACT_SECONDS):
                    await stage.restart()
                    await act(stage)
                if stage.unexpected:
                    raise Problem("; ".join(stage.unexpected))
    except Exception as error:  # whatever it is, the demo has not shown what it is to show
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # Ctrl-C: the client, which it cut short, turned it into an error of its own.
            raise asyncio.CancelledError from error
        tell.verdict(False, _reason(error))
        return 1
    tell.verdict(True, _summary(stage))
    return 0


def _summary(stage: Stage) -> str:
    lost = sum(exchange.status == 404 for exchange in stage.exchanges)
    total = len(stage.exchanges)
    if stage.nodes.sdk:
        return f"failed as it must without nonstick: {lost} of {total} requests got 404"
    return (
        f"{total} requests ({served(stage.exchanges)}), {stage.progress} progress notifications, "
        f"{len(stage.killed)} kill -9, {stage.cuts} cut connection; "
        "no request failed but the one that a killed node ran"
    )


def _reason(error: BaseException) -> str:
    """What went wrong first: the client wraps it in groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return f"an act did not end within {_ACT_SECONDS:.0f} s"
    return str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"


# ---- the acts


async def one_session_on_every_node(stage: Stage) -> None:
    """One session, served by every node

    P1, P2, P3 and P6, as one client sees them.
    """
    async with stage.client() as client:
        await client.list_tools()
        for _ in stage.nodes.members:
            await _where(stage, client)
        await _count(stage, client)
    session_id = stage.session_id()
    with stage.expecting(404):
        status = await stage.ping(session_id)
    if status != 404:
        raise Problem(f"a request in the ended session got {status}, not 404")
    stage.tell.aside("404, as it must be: the session has ended, and every node knows")
    idle = {node.name for node in stage.nodes.members} - {exchange.backend for exchange in stage.exchanges}
    if idle:
        raise Problem(f"{', '.join(sorted(idle))} served nothing")


async def kill_the_node_that_opened_the_session(stage: Stage) -> None:
    """A new session, and kill -9 for the node that opened it

    P1 and P2 again: nothing of a session is only on one node.
    """
    async with stage.client() as client:
        await _where(stage, client)
        victim = stage.last("initialize").backend
        streams = stage.streams()
        stage.kill(victim)
        for _ in range(2 * len(stage.nodes.members)):
            await _where(stage, client)
        await _count(stage, client)
        if streams[-1].backend == victim:
            await stage.until(lambda: len(stage.streams()) > len(streams))  # the client opens it again by itself


async def cut_off_in_the_middle(stage: Stage) -> None:
    """Streaming calls, cut off in the middle: first the connection, then the node (kill -9)

    P3 and P7. Only the client's own resumption is at work here: it comes back with the last event id that it got.
    """
    async with stage.client() as client:
        await _lose_the_connection(stage, client)
        await _lose_the_node(stage, client)
        await _where(stage, client)


async def answer_through_another_node(stage: Stage) -> None:
    """A tool asks the user, and the answer comes in at another node

    P4: it reaches the tool, which waits for it on its own node.
    """

    async def answer(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:  # noqa: ARG001
        stage.tell.aside(f'"{params.message}" The client answers: {_COLOUR}')
        return ElicitResult(action="accept", content={"colour": _COLOUR})

    async with stage.client(elicitation=answer) as client:
        said = text_of(await client.call_tool("paint"))
        stage.tell.aside(f'"{said}"')
    asked, replied = stage.last("tools/call").backend, stage.last("response").backend
    if said != f"{asked} was told {_COLOUR}":
        raise Problem(f"{asked} answered: {said}")
    if replied == asked:
        raise Problem(f"the reply went to {replied}, which had asked: that shows nothing")


async def the_sdk_alone(stage: Stage) -> None:
    """The same client and server without nonstick"""
    with stage.expecting(404):
        try:
            async with stage.client() as client:
                for _ in stage.nodes.members:
                    await _where(stage, client)
        except Exception as error:
            stage.tell.aside(f"the client gives up: {_reason(error)}")
    if not any(exchange.status == 404 for exchange in stage.exchanges):
        raise Problem("no request was lost: that was not to be expected")
    opener = stage.last("initialize").backend
    stage.tell.aside(f"The SDK keeps a session in the memory of the process that opened it, here {opener}.")
    stage.tell.aside("Every other node answers 404, which tells a client that its session is gone.")
    stage.tell.aside("nonstick keeps it in a store that all nodes share: run this again without --sdk.")


ACTS: Final[tuple[Act, ...]] = (
    one_session_on_every_node,
    kill_the_node_that_opened_the_session,
    cut_off_in_the_middle,
    answer_through_another_node,
)
SDK_ACTS: Final[tuple[Act, ...]] = (the_sdk_alone,)


async def _where(stage: Stage, client: Client) -> None:
    """A call whose answer says which node ran it, and that this node knows the client."""
    said = text_of(await client.call_tool("where"))
    stage.tell.aside(f'"{said}"')
    node = stage.last("tools/call").backend
    if said != f"{node} here, serving {CLIENT_NAME}":
        raise Problem(f"{node} answered: {said}")


@dataclass
class _Count:
    """A call that reports progress while it runs.

    Attributes:
        at: The step after which `strike` is called; 0 for never.
        steps: What came so far, each with the node through which it came.
    """

    stage: Stage
    to: int
    at: int = 0
    strike: Callable[[], None] = lambda: None
    steps: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])

    async def call(self, client: Client) -> None:
        """Makes the call. All progress must come once, in order, before the result."""
        said = text_of(await client.call_tool("count", {"to": self.to}, progress_callback=self._take))
        self.stage.tell.aside(f'"{said}"')
        self.check(self.to)

    def check(self, to: int) -> None:
        """Every step up to this one came once and in order.

        Raises:
            Problem: The condition does not hold.
        """
        numbers = [number for number, _ in self.steps]
        if numbers != list(range(1, to + 1)):
            raise Problem(f"progress came as {numbers}")

    async def _take(self, progress: float, total: float | None, message: str | None) -> None:
        through = self.stage.carriers()[-1].backend
        self.steps.append((progress, through))
        self.stage.progress += 1
        how = f", read through {through}" if self.at else ""
        self.stage.tell.aside(f"progress {progress:.0f} of {total or 0:.0f}: {message}{how}")
        if progress == self.at:
            self.strike()


async def _count(stage: Stage, client: Client) -> None:
    await _Count(stage, _COUNT_TO).call(client)


async def _lose_the_connection(stage: Stage, client: Client) -> None:
    """A call whose connection is cut goes on, and the client reads the rest of it through another node."""
    count = _Count(stage, _COUNT_ON_TO, _STRIKE_AT, lambda: stage.cut(stage.carriers()[-1]))
    await count.call(client)
    through = Counter(node for _, node in count.steps)
    shares = " and ".join(f"{share} through {node}" for node, share in through.items())
    stage.tell.aside(f"each of the {_COUNT_ON_TO} steps came once, in order: {shares}")
    if len(through) == 1:
        raise Problem("the client did not come back through another node")


async def _lose_the_node(stage: Stage, client: Client) -> None:
    """A call whose node is killed gets one clear error, on another node, in time."""
    killed = 0.0

    def strike() -> None:
        nonlocal killed
        stage.kill(stage.carriers()[-1].backend)
        killed = time.monotonic()

    count = _Count(stage, _COUNT_ON_TO, _STRIKE_AT, strike)
    try:
        await count.call(client)
    except MCPError as error:
        took = time.monotonic() - killed
        stage.tell.aside(f'the call failed {took:.1f} s after the kill: "{error.message}"')
        stage.tell.aside(f"(a node of this demo is taken for dead when it was not heard of for {LEASE:.0f} s)")
        if not isinstance(error.data, dict) or error.data.get("reason") != "node_lost":
            raise Problem(f"the error came with {error.data}, not with the reason node_lost") from error
    else:
        raise Problem("the call was answered, although its node was killed")
    count.check(len(count.steps))
    if took > LEASE + _POLL_SECONDS + _SLACK_SECONDS:
        raise Problem(f"the error came after {took:.1f} s, for a lease of {LEASE:.0f} s")
