"""Clients at work while nodes die, freeze and drain, and the store and the network to it fail; an oracle judges it all.

    python -m tests.faults.campaign --seconds 60 --seed 7 --store valkey
    python -m tests.faults.campaign --requests 20000 --calm 4 --seed 7 --store postgres

What is done, when and to whom follows from the seed; what that leads to also depends on the machine. Exits with 1 and
shows the records that matter when a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from math import inf
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
    Lost,
    Record,
    Replayed,
    Vanished,
    Violation,
    judge,
)
from nonstick.testing.servers.processes import NodeProcess
from tests.faults.client import Patience
from tests.faults.grounds import GROUNDS, Ground, StoreKind
from tests.faults.stage import Stage
from tests.faults.work import Worker
from tests.pace import in_time

__all__ = ["Campaign", "StoreKind", "report"]

NODES: Final = 3
PATIENT: Final = 6
"""Clients whose tools take their time."""
HURRIED: Final = 8
"""Clients that send one short request after the other, unless told otherwise."""
VANISHING: Final = 1
"""Clients that go away in the middle, one after the other."""
LEASE: Final = 2.0
GRACE: Final = 2.0
LIFETIME: Final = 30.0
"""Seconds without a sign of its client that a session lives."""
CALL_SECONDS: Final = 45.0
"""A call must have ended by then: several times what a freeze, a lease and the polls take together."""
LOST_SECONDS: Final = 75.0
"""Where a store may have lost a call's end: it is found out by asking its node, which takes half a minute."""
STALL: Final = 5.0
AROUND: Final = 0.05
"""Seconds before and after a SIGTERM within which every request of every client goes to the node that gets it."""
GONE_SECONDS: Final = GRACE + 2.0
"""All that a node does after the grace period, whatever its clients, handlers and the store do."""
SLACK: Final = 15.0
"""Seconds until the end of a session whose client went away has come, at most, on a busy machine."""
SHOWN: Final = 30
"""Records of an excerpt."""
OPTIONS: Final[dict[str, Any]] = {
    "lease": LEASE,
    "grace": GRACE,
    "max_stall": STALL,
    "reexecute": "idempotent",
    "session_idle_timeout": LIFETIME,
}
"""Of `nonstick.app`, on each node."""


@dataclass
class Campaign:
    """One run.

    Attributes:
        seconds: How long faults are injected; what is under way then is seen through.
        requests: Until so many HTTP requests were answered instead, if that is sooner.
        calm: Seconds between two faults of a kind, times this.
        losing: Also have the store lose what it has acknowledged. To see that through takes longer.
        vanishing: Also have clients go away for ever. To see their sessions' end takes a lifetime.
        hurried: How many clients send one short request after the other.
        violations: What the oracle found.
    """

    store: StoreKind
    seed: int
    seconds: float
    home: Path
    requests: float = inf
    calm: float = 1.0
    losing: bool = True
    vanishing: bool = True
    hurried: int = HURRIED
    violations: list[Violation] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    records: list[Record] = field(default_factory=list)
    took: float = 0.0
    logs: str = ""

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            self._stage = await stack.enter_async_context(Stage("", self.home))
            ground = GROUNDS[self.store](self.home, self._stage.history.add)
            self._ground: Ground = await stack.enter_async_context(ground)
            self._loses = self.losing and bool(ground.losses())
            for _ in range(NODES):
                node = self._stage.node(**OPTIONS)
                node.store = await ground.way(node.name)
            await asyncio.gather(*(node.start() for node in self._stage.nodes))
            await self._fight()
            await self._look_for_the_vanished()
            self.violations += ground.found
            self.logs = "".join(node.written for node in self._stage.nodes)
            # While the store is there: nodes are killed before it is.
            await self._stage.close()
        self.records = [*self._stage.history.records, *self._stage.runs()]
        self.violations += judge(self.records, outages=True)

    async def _fight(self) -> None:
        self._over = time.monotonic() + self.seconds
        makers = {"client": PATIENT, "hurried": self.hurried, "vanishing": VANISHING * self.vanishing}
        work = [
            asyncio.create_task(self._work(f"{kind} {number}"))
            for kind, count in makers.items()
            for number in range(count)
        ]
        locks = {node.name: asyncio.Lock() for node in self._stage.nodes}
        harm = [asyncio.create_task(self._harm_nodes(number, locks)) for number in range(2)]
        harm.append(asyncio.create_task(self._harm_store()))
        if self._ground.proxies:
            harm.append(asyncio.create_task(self._harm_network()))
        began = time.monotonic()
        await asyncio.gather(*harm)
        self.took = time.monotonic() - began
        await asyncio.gather(*work)

    @property
    def _goes_on(self) -> bool:
        return time.monotonic() < self._over and self._stage.history.requests < self.requests

    async def _pause(self, rng: random.Random, least: float, most: float) -> None:
        """Between two faults."""
        until = time.monotonic() + rng.uniform(least, most) * self.calm
        while self._goes_on and time.monotonic() < until:  # noqa: ASYNC110 - it ends in two ways
            await asyncio.sleep(0.2)

    # ---- what clients do

    async def _work(self, name: str) -> None:
        rng = random.Random(f"{self.seed} {name}")
        kind, _, _ = name.partition(" ")
        call = LOST_SECONDS if self._loses else CALL_SECONDS
        while self._goes_on:
            session = self._stage.client(
                seed=rng.randrange(2**32),
                cuts=0.02 if kind == "hurried" else 0.3,
                patience=Patience(idle=2.5, call=call),
            )
            await session.open()
            worker = Worker(session, rng, self._stage.nodes, goes_on=lambda: self._goes_on, losing=self._loses)
            match kind:
                case "hurried":
                    await worker.hurry()
                case "vanishing":
                    await worker.vanish(LIFETIME + SLACK)
                    await self._pause(rng, 0.5, 2.0)
                case _:
                    await worker.work()
            await session.close()

    async def _look_for_the_vanished(self) -> None:
        """Asks for the sessions whose clients went away, once they must have ended."""
        for vanished in [one for one in self._stage.history.records if isinstance(one, Vanished)]:
            await asyncio.sleep(max(0.0, vanished.by + 0.1 - time.monotonic()))
            session = next(one for one in self._stage.sessions if one.name == vanished.session)
            for node in self._stage.nodes:
                with contextlib.suppress(httpx2.TransportError, TimeoutError):
                    await session.ping(node)

    # ---- what is done to nodes

    async def _harm_nodes(self, number: int, locks: dict[str, asyncio.Lock]) -> None:
        rng = random.Random(f"{self.seed} nodes {number}")
        deeds = [self._kill, self._freeze, self._drain]
        while self._goes_on:
            await self._pause(rng, 0.2, 1.5)
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
        await self._terminate_under_arrivals(node, rng)
        terminated = time.monotonic()
        gone = await node.wait(4 * GONE_SECONDS)
        if not gone or not in_time(time.monotonic() - terminated, GONE_SECONDS):
            self.violations.append(Violation("P8", f"{node.name} was not gone {GONE_SECONDS:g} s after SIGTERM"))
            node.kill()
        await node.start()

    async def _terminate_under_arrivals(self, node: NodeProcess, rng: random.Random) -> None:
        """SIGTERM while GETs, resumes and POSTs arrive, at each await of their start."""
        self._stage.lure = node
        living = [session for session in self._stage.sessions if not (session.ended or session.gone)]
        for session in rng.sample(living, min(6, len(living))):
            session.reconnect()
        await asyncio.sleep(rng.uniform(0.0, AROUND))
        node.terminate()
        await asyncio.sleep(AROUND)
        self._stage.lure = None

    # ---- what is done to the store

    async def _harm_store(self) -> None:
        rng = random.Random(f"{self.seed} store")
        deeds = self._ground.deeds() | (self._ground.losses() if self.losing else {})
        while self._goes_on:
            await self._pause(rng, 1.0, 5.0)
            kind = rng.choice(sorted(deeds))
            if self._goes_on:
                self._note(kind, self.store)
                await deeds[kind](rng)

    # ---- what is done between nodes and the store

    async def _harm_network(self) -> None:
        rng = random.Random(f"{self.seed} network")
        while self._goes_on:
            await self._pause(rng, 0.2, 1.2)
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
    vanished = sum(isinstance(record, Vanished) for record in records)
    lines = [
        f"{campaign.store}, seed {campaign.seed}, {campaign.took:.0f} s of faults",
        f"  faults      {sum(campaign.faults.values())}: {_counts(campaign.faults)}",
        f"  calls       {calls}: {results} results, errors: {_counts(reasons)}; no end known: {_counts(gave_up)}",
        f"  HTTP        {statuses.total()}: {_counts(statuses)}",
        f"  events      {events}, and {replays} streams replayed; {vanished} clients vanished",
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
        shown += [r for r in records if isinstance(r, Fault | Lost) and first - 10 < r.at < last + 1]
        start = min(record.at for record in records)
        lines += [f"    {one.at - start:8.3f}  {one}" for one in sorted(shown, key=lambda record: record.at)]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--seconds", type=float, help="how long faults are injected (60, or without end)")
    parser.add_argument("--requests", type=int, help="until so many HTTP requests were answered")
    parser.add_argument("--hurried", type=int, default=HURRIED, help="clients that send short requests all the time")
    parser.add_argument("--calm", type=float, default=1.0, help="seconds between faults, times this")
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
        seconds = arguments.seconds or (inf if arguments.requests else 60.0)
        campaign = Campaign(
            arguments.store,
            arguments.seed,
            seconds,
            home,
            requests=arguments.requests or inf,
            calm=arguments.calm,
            losing=not arguments.lossless,
            hurried=arguments.hurried,
        )
        asyncio.run(campaign.run())
        print(report(campaign))
        if arguments.keep:
            start = min(record.at for record in campaign.records)
            lines = (f"{one.at - start:8.3f} {one}" for one in sorted(campaign.records, key=lambda one: one.at))
            (home / "history.txt").write_text("\n".join(lines))
    return 1 if campaign.violations else 0


if __name__ == "__main__":
    sys.exit(main())
