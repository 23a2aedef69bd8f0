"""`nonstick migrate`: makes or upgrades a store's tables, or says what that would do."""

from __future__ import annotations

from collections.abc import Callable

from nonstick.store import Store
from nonstick.stores.common.upkeep import Migratable, Plan

__all__ = ["run"]


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
