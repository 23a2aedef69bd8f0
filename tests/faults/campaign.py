"""Clients at work while nodes die, freeze and drain, and the store and the network to it fail; an oracle judges it all.

    python -m tests.faults.campaign --seconds 60 --seed 7 --store valkey

What is done, when and to whom follows from the seed; what that leads to also depends on the machine. Exits with 1 and
shows the records that matter when a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx2

from nonstick.testing import FaultProxy
from nonstick.testing.oracle import (
    Answered,
    Called,
    Fault,
    GaveUp,
    Got,
    Record,
    Replayed,
    Violation,
    judge,
)
from nonstick.testing.processes import NodeProcess
from tests.faults.client import Call, Patience, Session
from tests.faults.grounds import GROUNDS, Ground, StoreKind
from tests.faults.stage import Stage

__all__ = ["Campaign", "StoreKind", "report"]

NODES: Final = 3
CLIENTS: Final = 6
LEASE: Final = 2.0
GRACE: Final = 2.0
CALL_SECONDS: Final = 45.0
"""A call must have ended by then: several times what a freeze, a lease and the polls take together."""
LOST_SECONDS: Final = 75.0
"""Where a store may have lost a call's end: it is found out by asking its node, which takes half a minute."""
STALL: Final = 5.0
GONE_SECONDS: Final = GRACE + 6.0
"""The last words of what is ended after the grace period, and 2 s each for a store that is away: to say the end of what
runs, and to give the lease back."""
SHOWN: Final = 30
"""Records of an excerpt."""


@dataclass
class Campaign:
    """One run.

    Attributes:
        seconds: How long faults are injected; what is under way then is seen through.
        losing: Also have the store lose what it has acknowledged. To see that through takes longer.
        violations: What the oracle found.
    """

    store: StoreKind
    seed: int
    seconds: float
    home: Path
    losing: bool = True
    violations: list[Violation] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    records: list[Record] = field(default_factory=list)
    logs: str = ""

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            self._stage = await stack.enter_async_context(Stage("", self.home))
            ground = GROUNDS[self.store](self.home, self._stage.history.add)
            self._ground: Ground = await stack.enter_async_context(ground)
            self._loses = self.losing and bool(ground.losses())
            for _ in range(NODES):
                node = self._stage.node(lease=LEASE, grace=GRACE, max_stall=STALL, reexecute="idempotent")
                node.store = await ground.way(node.name)
            await asyncio.gather(*(node.start() for node in self._stage.nodes))
            await self._fight()
            self.logs = "".join(node.written for node in self._stage.nodes)
            # While the store is there: nodes are killed before it is.
            await self._stage.close()
        self.records = [*self._stage.history.records, *self._stage.runs()]
        self.violations += judge(self.records, outages=True)

    async def _fight(self) -> None:
        self._over = time.monotonic() + self.seconds
        work = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        locks = {node.name: asyncio.Lock() for node in self._stage.nodes}
        harm = [asyncio.create_task(self._harm_nodes(number, locks)) for number in range(2)]
        harm.append(asyncio.create_task(self._harm_store()))
        if self._ground.proxies:
            harm.append(asyncio.create_task(self._harm_network()))
        await asyncio.gather(*harm)
        await asyncio.gather(*work)

    @property
    def _goes_on(self) -> bool:
        return time.monotonic() < self._over

    @property
    def _call_seconds(self) -> float:
        return LOST_SECONDS if self._loses else CALL_SECONDS

    # ---- what clients do

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} client {number}")
        while self._goes_on:
            session = self._stage.client(
                seed=rng.randrange(2**32), cuts=0.3, patience=Patience(idle=2.5, call=self._call_seconds)
            )
            await session.open()
            session.listen()
            await self._use(session, rng)
            await session.close()

    async def _use(self, session: Session, rng: random.Random) -> None:
        running: set[asyncio.Task[None]] = set()
        for _ in range(rng.randint(3, 12)):
            if not self._goes_on or session.gone:
                break
            running.add(asyncio.create_task(self._call(session, rng)))
            if len(running) > 2:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if rng.random() < 0.3:
            await session.delete()
            for node in self._stage.nodes:
                try:
                    await session.ping(node)
                except (httpx2.TransportError, TimeoutError):
                    pass  # it is down: what it says is not known
        for task in running:
            await task
        if not (session.ended or session.gone):
            await session.catch_up()

    async def _call(self, session: Session, rng: random.Random) -> None:
        match rng.randrange(8):
            case 0 | 1:
                call = session.call("count", steps=rng.randint(3, 20), pause=rng.uniform(0.01, 0.15))
            case 2:
                steps = rng.randint(3, 20)
                call = session.call("recount", steps=steps, pause=rng.uniform(0.01, 0.15), repeatable=True)
            case 3:
                steps = rng.randint(2, 10)
                call = session.call("announce", steps=steps, pause=rng.uniform(0.01, 0.15), standalone=True)
            case 4:
                call = session.call("ask", steps=rng.randint(1, 3), **self._patience)
            case 5:
                call = session.call("plain")
            case 6:
                call = session.call("wait", seconds=rng.uniform(0.0, 1.0))
            case _:
                call = await self._cancelled(session, rng)
        await call.end()
        if rng.random() < 0.3 and not session.ended:
            await session.replay(call)

    @property
    def _patience(self) -> dict[str, Any]:
        """How long a tool waits for a reply: a store that loses writes may lose it after it was accepted."""
        return {"patience": 20.0} if self._loses else {}

    async def _cancelled(self, session: Session, rng: random.Random) -> Call:
        # Longer than anybody waits: it ends because it is cancelled.
        # If its cancel may be lost, it ends at last.
        call = session.call("count", steps=200 if self._loses else 10_000, pause=0.05)
        await asyncio.sleep(rng.choice([0.0, 0.05, 0.5]))
        await session.cancel(call)
        return call

    # ---- what is done to nodes

    async def _harm_nodes(self, number: int, locks: dict[str, asyncio.Lock]) -> None:
        rng = random.Random(f"{self.seed} nodes {number}")
        deeds = [self._kill, self._freeze, self._drain]
        while self._goes_on:
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            node = rng.choice(self._stage.nodes)
            deed = rng.choice(deeds)
            async with locks[node.name]:
                if self._goes_on:
                    await deed(node, rng)

    def _note(self, kind: str, target: str) -> None:
        self.faults[kind] += 1
        self._stage.history.add(Fault(time.monotonic(), kind, target))

    async def _kill(self, node: NodeProcess, rng: random.Random) -> None:
        self._note("kill", node.name)
        node.kill()
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        await node.start()

    async def _freeze(self, node: NodeProcess, rng: random.Random) -> None:
        seconds = rng.choice([0.5, LEASE + 4.0])
        self._note("freeze" if seconds < LEASE else "freeze beyond the lease", node.name)
        node.freeze()
        await asyncio.sleep(seconds)
        node.thaw()

    async def _drain(self, node: NodeProcess, rng: random.Random) -> None:
        self._note("drain", node.name)
        node.terminate()
        if not await node.wait(GONE_SECONDS):
            self.violations.append(Violation("P8", f"{node.name} was not gone {GONE_SECONDS:g} s after SIGTERM"))
            node.kill()
        await node.start()

    # ---- what is done to the store

    async def _harm_store(self) -> None:
        rng = random.Random(f"{self.seed} store")
        deeds = self._ground.deeds() | (self._ground.losses() if self.losing else {})
        while self._goes_on:
            await asyncio.sleep(rng.uniform(1.0, 5.0))
            kind = rng.choice(sorted(deeds))
            self._note(kind, self.store)
            await deeds[kind](rng)

    # ---- what is done between nodes and the store

    async def _harm_network(self) -> None:
        rng = random.Random(f"{self.seed} network")
        while self._goes_on:
            await asyncio.sleep(rng.uniform(0.2, 1.2))
            name, proxy = rng.choice(list(self._ground.proxies.items()))
            kind, deed = rng.choice(self._deeds(proxy, rng))
            self._note(kind, name)
            await deed()
            await asyncio.sleep(rng.uniform(0.2, 1.5))
            await proxy.heal()

    def _deeds(self, proxy: FaultProxy, rng: random.Random) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        async def lose() -> None:
            proxy.drop_replies(rng.randint(1, 5))

        async def late() -> None:
            proxy.delay(rng.choice([0.05, 0.2, 0.5, 2.0]))

        async def hole() -> None:
            requests, replies = rng.choice([(True, True), (True, False), (False, True)])
            proxy.black_hole(requests=requests, replies=replies)

        return [
            ("store connections reset", proxy.reset),
            ("store cut off", proxy.cut),
            ("replies of the store lost", lose),
            ("store slow", late),
            ("store silent", hole),
        ]


# ---- telling


def report(campaign: Campaign) -> str:
    """What was done and what came of it; the violations with what surrounds them."""
    records = campaign.records
    terminals = [record.message for record in records if isinstance(record, Got) and "method" not in record.message]
    gave_up = Counter(record.why for record in records if isinstance(record, GaveUp))
    statuses = Counter(record.status for record in records if isinstance(record, Answered))
    reasons = Counter(
        (message["error"].get("data") or {}).get("reason", message["error"]["message"])
        for message in terminals
        if "error" in message
    )
    calls = sum(isinstance(record, Called) for record in records)
    results = sum("result" in message for message in terminals)
    events = sum(isinstance(record, Got) and record.place is not None for record in records)
    replays = sum(isinstance(record, Replayed) for record in records)
    lines = [
        f"{campaign.store}, seed {campaign.seed}, {campaign.seconds:g} s of faults",
        f"  faults      {sum(campaign.faults.values())}: {_counts(campaign.faults)}",
        f"  calls       {calls}: {results} results, errors: {_counts(reasons)}; no end known: {_counts(gave_up)}",
        f"  HTTP        {statuses.total()}: {_counts(statuses)}",
        f"  events      {events}, and {replays} streams replayed",
        f"  violations  {len(campaign.violations)}",
    ]
    for violation in campaign.violations[:5]:
        lines += _excerpt(violation, records)
    return "\n".join(lines)


def _counts(counter: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items(), key=str)) or "none"


def _excerpt(violation: Violation, records: list[Record]) -> list[str]:
    """The violation, its records, and the faults shortly before and among them."""
    lines = ["", f"  {violation.promise}: {violation.text}"]
    shown = list(violation.records[:SHOWN])
    if shown:
        first, last = min(record.at for record in shown), max(record.at for record in shown)
        shown += [r for r in records if isinstance(r, Fault) and first - 10 < r.at < last + 1]
        start = min(record.at for record in records)
        lines += [f"    {one.at - start:8.3f}  {one}" for one in sorted(shown, key=lambda record: record.at)]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--store", choices=list(GROUNDS), default="valkey")
    parser.add_argument("--lossless", action="store_true", help="the store loses nothing that it acknowledged")
    parser.add_argument("--keep", type=Path, help="directory for the logs and the tools' records")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        home = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nonstick-faults-")))
        home.mkdir(parents=True, exist_ok=True)
        for old in home.iterdir():
            old.unlink()
        campaign = Campaign(arguments.store, arguments.seed, arguments.seconds, home, losing=not arguments.lossless)
        asyncio.run(campaign.run())
        print(report(campaign))
        if arguments.keep:
            start = min(record.at for record in campaign.records)
            lines = (f"{one.at - start:8.3f} {one}" for one in sorted(campaign.records, key=lambda one: one.at))
            (home / "history.txt").write_text("\n".join(lines))
    return 1 if campaign.violations else 0


if __name__ == "__main__":
    sys.exit(main())
