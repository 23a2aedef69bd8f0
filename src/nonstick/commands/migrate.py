"""`nonstick migrate`: makes or upgrades a store's tables, or says what that would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from nonstick.store import Store

__all__ = ["Migratable", "Plan", "Step", "run"]


class Step(NamedTuple):
    """Something to execute: what it is for, in a few words, and the SQL."""

    name: str
    sql: str


class Plan(NamedTuple):
    """What separates a store's tables from those that this release uses.

    Attributes:
        place: What holds the tables, in a few words.
        version: Of the tables that are there; 0 if there are none.
        target: The version that this release makes. A higher `version` that is not refused works too (P12).
        steps: What leads from one to the other, in order, as one transaction; empty if nothing has to be done.
    """

    place: str
    version: int
    target: int
    steps: Sequence[Step]

    def __str__(self) -> str:
        there = f"version {self.version}" if self.version else "no tables yet"
        return f"{self.place}: {there}; this release uses version {self.target}"


@runtime_checkable
class Migratable(Protocol):
    """A store whose tables have versions. Optional: one without tables has nothing to migrate."""

    async def plan(self) -> Plan:
        """Looks at what is there. Changes nothing, and may be called whether or not the store is entered.

        Raises:
            ConfigurationError: The tables are newer than this release can use.
            StoreUnavailable: They could not be looked at.
        """
        ...

    async def migrate(self, done: Callable[[Step], None]) -> None:
        """Executes the plan, all or nothing; `done` is called after each step.

        Several at once are fine: one does it, the others wait and find it done. Nodes may be running meanwhile (P12).

        Raises:
            As `plan`.
        """
        ...


async def run(store: Store, *, say: Callable[[str], None], dry_run: bool = False, print_sql: bool = False) -> None:
    """Brings the store's tables to this release's version; tells what happens, line by line.

    Args:
        dry_run: Only tells what would be done.
        print_sql: Says nothing but the SQL that would be executed, for somebody else to execute.

    Raises:
        As `Migratable.migrate`.
    """
    if not isinstance(store, Migratable):
        say(("-- " if print_sql else "") + f"{store.url}: nothing to migrate, this store has no tables")
        return
    plan = await store.plan()
    if print_sql:
        _print_sql(store.url, plan, say)
        return
    say(f"{store.url}, {plan}")
    if not plan.steps:
        say("nothing to do")
    elif dry_run:
        for step in plan.steps:
            say(f"  would be executed: {step.name}")
    else:
        await store.migrate(lambda step: say(f"  {step.name}: done"))
        say(f"the tables have version {(await store.plan()).version} now")


def _print_sql(url: str, plan: Plan, say: Callable[[str], None]) -> None:
    say(f"-- {url}, {plan}")
    if not plan.steps:
        say("-- nothing to do")
        return
    say("BEGIN;")
    for step in plan.steps:
        say(f"\n-- {step.name}\n{step.sql.strip()}")
    say("\nCOMMIT;")
