"""`nonstick doctor`: whether a store will do, how fast it is, and what to do about what is wrong.

First the store looks at its server, if it is `Examinable`. Then two instances of it act as two nodes would, with the
methods of the store protocol alone, so this works for any store. All that is written is one session under a random key
and one lease, and both are removed again.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from starlette.applications import Starlette

from nonstick.adopt import take_over
from nonstick.app import app
from nonstick.commands import loading
from nonstick.commands.checks import check_shared, check_state
from nonstick.errors import (
    ConfigurationError,
    NonstickError,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StoreUnusable,
)
from nonstick.store import NEW_STREAM, Batch, Cursor, Draft, News, Store
from nonstick.stores.common.upkeep import Examinable, Finding

__all__ = ["as_json", "as_text", "diagnose", "failed", "look_at_server"]

ROUNDS: Final = 40
"""Round trips that a latency is taken from."""

WAKES: Final = 10

WAKE_SECONDS: Final = 2.0
"""How long a wake is waited for. Nodes read on their own after about as long."""

LEASE_SECONDS: Final = (1.0, 5.0, 25.0)
"""Of the lease that is tried: the first that is longer than it takes to see whether it holds."""

LAPSE_SECONDS: Final = 5.0
"""How long after its end a lease may still be seen."""

SLOW_SECONDS: Final = 0.05
"""A median from which on clients feel it: a request takes one round trip at least, a stream one for each message."""

SESSION_SECONDS: Final = 120.0
"""Lifetime of the session that is written, should it not be removed."""

_ALONE: Final = Finding(
    "warning",
    "sharing",
    "nobody shares this store: its sessions are in one process, end with that, and are unknown (404) to every other "
    "worker and node",
    "Name a store that all processes reach: sqlite:///FILE on one machine, redis:// or postgresql:// on several.",
)

_MARKS: Final = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


async def diagnose(make: Callable[[], Store], *, alone: bool = False) -> list[Finding]:
    """What there is to know about the store that `make` makes: a new instance on the same data each time.

    Args:
        alone: Two instances would not share anything (a store in memory): one acts as both nodes, which is said.
    """
    store = make()
    findings: list[Finding] = []
    try:
        if isinstance(store, Examinable):
            findings += await store.examine()
    except (StoreUnavailable, ConfigurationError) as error:
        return [_unreachable(store, error)]
    if any(finding.blocks for finding in findings):
        return [
            *findings,
            Finding("warning", "trial", "nothing was tried", "Put the above right, then run this again."),
        ]
    try:
        async with AsyncExitStack() as stack:
            a = await stack.enter_async_context(store)
            b = a if alone else await stack.enter_async_context(make())
            await a.ping()
            findings.append(Finding("ok", "reach", f"{store.url} answers and takes writes"))
            tried = await _try_session(a, b)
            findings += [_ALONE if alone and one.subject == "sharing" and one.level == "ok" else one for one in tried]
            findings.append(await _try_lease(a, b))
    except (StoreUnavailable, ConfigurationError) as error:
        if not any(finding.subject == "reach" for finding in findings):
            return [*findings, _unreachable(store, error)]
        advice = "Put right what it says, then run this again: the rest was not tried."
        findings.append(Finding("error", "trial", f"the store gave up in the middle: {error}", advice))
    return findings


async def look_at_server(target: str) -> list[Finding]:
    """Whether the server that a target names was built with what its nodes have to share. The server is not run.

    Raises:
        TargetError: The target names no server.
    """
    server = await loading.call(loading.find(target), target)
    if isinstance(server, Starlette):
        adopted = take_over(server, store="memory:", cluster=None, given={}, options={})
    else:
        adopted = app(server, store="memory:").state.nonstick
    return [*await check_shared(adopted), *await check_state(adopted)]


def failed(findings: Sequence[Finding]) -> bool:
    """Whether one of these is an error."""
    return any(finding.level == "error" for finding in findings)


def _unreachable(store: Store, error: NonstickError) -> Finding:
    unusable = isinstance(error, StoreUnusable | ConfigurationError)
    advice = "See whether it runs, can be reached from here, and takes this user and password."
    if unusable:
        advice = "Put that right, then run this again."
    return Finding("error", "reach", f"{store.url} cannot be used: {error}", advice, blocks=True)


# ---- a session


async def _try_session(a: Store, b: Store) -> list[Finding]:
    """One session, written on one node and seen on the other."""
    async with _session(a) as key:
        loads = await _measure(lambda: a.load(key))
        numbers = iter(range(1, ROUNDS + 1))
        appends = await _measure(lambda: a.append(key, Batch([_draft()], writer="doctor", sequence=next(numbers))))
        findings = [_latency("load", loads), _latency("append", appends)]
        findings += [await _try_sharing(a, b, key), await _try_wakes(a, b, key)]
    findings.append(await _try_end(a, b, key))
    return findings


@asynccontextmanager
async def _session(store: Store) -> AsyncIterator[str]:
    key = secrets.token_hex(20)
    try:
        await store.create(key, {"doctor": b"1"}, lifetime=SESSION_SECONDS)
        yield key
    finally:
        try:
            await store.delete(key)
        except StoreError:
            pass  # it expires


def _draft() -> Draft:
    return Draft(secrets.token_bytes(8), b"x" * 200)


async def _measure(call: Callable[[], Awaitable[object]]) -> list[float]:
    """Seconds that this call took, one after the other; the first, which may connect, is not counted."""
    took: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        await call()
        took.append(time.perf_counter() - start)
        await asyncio.sleep(0)  # a call need not suspend
    return took[1:]


def _latency(what: str, took: list[float]) -> Finding:
    p50, p99 = statistics.median(took), statistics.quantiles(took, n=100, method="inclusive")[98]
    text = f"p50 {1000 * p50:.2f} ms, p99 {1000 * p99:.2f} ms of {len(took)}"
    if p50 > SLOW_SECONDS:
        advice = "Every request waits for it. Put the store near the nodes: the same region, the same zone."
        return Finding("warning", what, text, advice)
    return Finding("ok", what, text)


class _Wakes:
    """A watch, whose wakes can be waited for."""

    def __init__(self, store: Store, key: str) -> None:
        self._heard = asyncio.Event()
        self.stop = store.watch(key, self._wake)

    def _wake(self, news: News | None) -> None:
        self._heard.set()

    async def next(self) -> bool:
        """Whether a wake comes in time."""
        try:
            async with asyncio.timeout(WAKE_SECONDS):
                await self._heard.wait()
        except TimeoutError:
            return False
        return True

    def forget(self) -> None:
        self._heard.clear()


async def _try_wakes(a: Store, b: Store, key: str) -> Finding:
    """Whether appends on one node wake a watch on the other, and how soon."""
    wakes = _Wakes(b, key)
    took: list[float] = []
    try:
        if not await wakes.next():
            return Finding("error", "wakes", f"a watch was not in force after {WAKE_SECONDS:.0f} s", _WAKE_ADVICE)
        for sent in range(WAKES):
            wakes.forget()
            start = time.perf_counter()
            await a.append(key, Batch([_draft()]))
            if await wakes.next():
                took.append(time.perf_counter() - start)
            elif sent and not took:
                break  # it will not get better, and each costs its time
    finally:
        wakes.stop()
    if not took:
        return Finding("error", "wakes", "appends on one node do not wake the other", _WAKE_ADVICE)
    where = "on the one node" if a is b else "on another node"
    text = f"{len(took)} of {WAKES} arrived {where}, p50 {1000 * statistics.median(took):.2f} ms after the append"
    return Finding("ok" if len(took) == WAKES else "warning", "wakes", text, "" if len(took) == WAKES else _WAKE_ADVICE)


_WAKE_ADVICE: Final = (
    "Nothing is lost, but messages and replies wait until nodes read by themselves. Look for what stands between: "
    "a pooler, a proxy, a firewall that drops idle connections, a user without rights on the channels."
)


async def _try_sharing(a: Store, b: Store, key: str) -> Finding:
    """Whether the other node sees what was written, and may write every kind of thing itself."""
    try:
        events = await b.read(key, Cursor(0), limit=1000)
        if len(events) != ROUNDS:
            return Finding("error", "sharing", f"{ROUNDS} events were written, {len(events)} are there", _TORN)
        opened = await b.append(key, Batch([_draft()], stream=NEW_STREAM, expect=["asked"], cancel="r"))
        await b.append(key, Batch([_draft()], stream=opened.first, settle="asked", terminal=True, fields={"x": b"1"}))
        await b.update(key, {"y": b"1"}, expect={"x": b"1"})
        await b.trim(key, streams=[opened.first], standalone_before=ROUNDS)
        await b.touch([key])
        if (loaded := await a.load(key)).fields != {"doctor": b"1", "x": b"1", "y": b"1"} or not loaded.cancels:
            return Finding("error", "sharing", "what one node wrote is not what the other one sees", _TORN)
    except StoreUnavailable:
        raise
    except StoreError as error:
        return Finding("error", "sharing", f"the session was lost in the middle: {error}", _TORN)
    return Finding("ok", "sharing", "two nodes see the same session, and may do all that they need to")


_TORN: Final = (
    "Nodes do not reach the same data. Look for replicas that answer reads, a balancer before several servers, "
    "or a server that drops data."
)


async def _try_end(a: Store, b: Store, key: str) -> Finding:
    try:
        await b.load(key)
    except SessionNotFound:
        where = "" if a is b else " on the other"
        return Finding("ok", "end", f"a session that one node ends is gone{where}")
    return Finding("error", "end", "a session that one node ended lives on at another", _TORN)


# ---- a lease


async def _try_lease(a: Store, b: Store) -> Finding:
    """Whether a lease holds on the other node, and lapses there by the store's clock."""
    node = f"doctor-{secrets.token_hex(8)}"
    lease = a.lease(node)
    try:
        for seconds in LEASE_SECONDS:
            start = time.perf_counter()
            await asyncio.to_thread(lease.renew, seconds)
            holds = not await b.lapsed([node])
            if holds or time.perf_counter() - start < seconds:
                break
        if not holds:
            return Finding("error", "lease", "a lease that was taken does not hold on another node", _TORN)
        while not await b.lapsed([node]):
            if time.perf_counter() - start > seconds + LAPSE_SECONDS:
                advice = "The death of a node would not be noticed. See whether the store's clock goes at all."
                return Finding("error", "lease", f"a lease of {seconds:.0f} s did not lapse", advice)
            await asyncio.sleep(0.02)
        took = time.perf_counter() - start
    finally:
        await asyncio.to_thread(lease.close, release=True)
    return Finding("ok", "lease", f"holds, and one of {seconds:.0f} s lapsed after {took:.2f} s")


# ---- what is shown


def as_text(findings: Sequence[Finding], *, width: int = 100) -> str:
    """Aligned lines, with what to do under each finding that needs it, and a last line that sums up."""
    subjects = max((len(finding.subject) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        head = f"{_MARKS[finding.level]}  {finding.subject:{subjects}}  "
        lines += _wrapped(head, " " * len(head), finding.text, width)
        if finding.advice:
            lines += _wrapped(" " * len(head) + "-> ", " " * (len(head) + 3), finding.advice, width)
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning")}
    told = [f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count]
    return "\n".join([*lines, "", ", ".join(told) or "all is well"])


def _wrapped(first: str, rest: str, text: str, width: int) -> list[str]:
    """The text after `first`, broken at blanks; its later lines, such as code, stand as they are."""
    text, _, code = text.partition("\n")
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return [*lines, *(f"{rest}{line}" for line in code.splitlines())]


def as_json(findings: Sequence[Finding]) -> str:
    """An object with `ok`, and `findings` with their level, subject, text and advice."""
    told = [
        {"level": one.level, "subject": one.subject, "text": one.text, "advice": one.advice or None} for one in findings
    ]
    return json.dumps({"ok": not failed(findings), "findings": told}, indent=2)
