"""Which other users may use the channels of a store on a Redis-compatible server, as far as its ACL may be read.

What nodes announce there is whole events, so that another node need not read them. A user who may subscribe sees what
clients are sent; a user who may publish can show clients what was never appended, and answer in their place. A user who
may read and write the sessions themselves gains nothing by that, so only other users are reported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from nonstick.errors import StoreUnavailable
from nonstick.stores.common.upkeep import Finding

__all__ = ["check_channels"]

_SUBJECT = "channels"


async def check_channels(call: Callable[..., Awaitable[Any]], *, prefix: str, key: str) -> Finding:
    """Whether a user who has no right to the sessions can hear, or send, what is announced. One server's answer.

    Args:
        key: A session key that nobody uses.

    Raises:
        StoreUnavailable: The server cannot be reached.
    """
    try:
        me = (await call("ACL", "WHOAMI")).decode(errors="replace")
        rules = [line.decode(errors="replace").split(" ") for line in await call("ACL", "LIST")]
        outsiders = [
            described for name in _others(rules, me) if (described := await _described(call, name, prefix, key))
        ]
    except StoreUnavailable:
        await call("PING")
        text = "who else may use them is not known: that takes ACL LIST and ACL DRYRUN, of Redis 7 or any Valkey"
        return Finding("ok", _SUBJECT, text)
    if outsiders:
        return Finding(
            "warning",
            _SUBJECT,
            f"users without a right to the sessions may use what nodes tell each other: {', '.join(outsiders)}. "
            "Whoever hears it sees what clients are sent, and whoever sends can show them anything",
            "ACL SETUSER name resetchannels, then only the channels that it needs, on every server; then ACL SAVE or "
            "the same in the server's configuration.",
        )
    if any(_is_open(rule) for rule in rules):
        text = "a user has no password: whoever reaches the server may do as that user, also to the sessions"
        return Finding("ok", _SUBJECT, text)
    return Finding("ok", _SUBJECT, "no user without a right to the sessions may use them")


def _others(rules: list[list[str]], me: str) -> Iterator[str]:
    return (name for _, name, *flags in rules if "on" in flags and name != me)


def _is_open(rule: list[str]) -> bool:
    return "on" in rule and "nopass" in rule


async def _described(call: Callable[..., Awaitable[Any]], user: str, prefix: str, key: str) -> str:
    """The user, with what it may do beyond its rights to the sessions; empty if there is nothing."""

    async def may(*command: str) -> bool:
        return bool(await call("ACL", "DRYRUN", user, *command) == b"OK")

    log, channel = f"{prefix}:{{{key}}}:l", f"{prefix}:{{{key}}}:c0"
    can = []
    if await may("SUBSCRIBE", channel) and not await may("XRANGE", log, "-", "+"):
        can.append("hears")
    if await may("PUBLISH", channel, "") and not await may("XADD", log, "*", "d", ""):
        can.append("sends")
    return f"{user} ({' and '.join(can)})" if can else ""
