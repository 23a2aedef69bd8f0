"""The scripts that the store runs on a Redis-compatible server, and which of their answers are believed (P15)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, Final, NamedTuple

from nonstick.errors import (
    AlreadyExists,
    Diverged,
    Fenced,
    NotPending,
    SessionNotFound,
    StoreError,
    StoreUnavailable,
    StreamClosed,
)
from nonstick.store import CANCEL_SECONDS, MAX_CANCELS, WRITER_SECONDS
from nonstick.stores.redis.proof import Proof
from nonstick.stores.redis.replies import ScriptMissing
from nonstick.stores.redis.servers import Answer, Servers
from nonstick.stores.redis.sockets import Arg

__all__ = [
    "APPEND",
    "CREATE",
    "DELETE",
    "INLINE_BYTES",
    "LOAD",
    "READ",
    "TOUCH",
    "TRIM",
    "UPDATE",
    "Script",
    "Scripts",
    "is_list",
    "is_trimmed",
    "is_zero",
]

INLINE_BYTES: Final = 8 * 1024
"""Up to this many bytes of event data, an append's wake carries its events."""


class Script(NamedTuple):
    """One script, as it is on one server and as it is on a Cluster."""

    alone: _Source
    on_cluster: _Source


class _Source(NamedTuple):
    sha: str
    text: str


def _script(name: str) -> Script:
    return Script(_source(name, alone="true"), _source(name, alone="false"))


def _source(name: str, *, alone: str) -> _Source:
    folder = resources.files("nonstick.stores.redis") / "lua"
    constants = (
        f"local CANCEL_MS, WRITER_MS, INLINE_BYTES = {CANCEL_SECONDS * 1000}, {WRITER_SECONDS * 1000}, {INLINE_BYTES}\n"
        f"local MAX_CANCELS, ALONE = {MAX_CANCELS}, {alone}\n"
    )
    text = constants + (folder / "shared.lua").read_text() + (folder / f"{name}.lua").read_text()
    return _Source(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), text)


CREATE: Final = _script("create")
LOAD: Final = _script("load")
TOUCH: Final = _script("touch")
UPDATE: Final = _script("update")
DELETE: Final = _script("delete")
APPEND: Final = _script("append")
READ: Final = _script("read")
TRIM: Final = _script("trim")
_GROUP: Final = _script("group")

_REFUSALS: Final[dict[bytes, type[StoreError]]] = {
    b"gone": SessionNotFound,
    b"exists": AlreadyExists,
    b"closed": StreamClosed,
    b"fenced": Fenced,
    b"not pending": NotPending,
    b"diverged": Diverged,
}


class Scripts:
    """Runs scripts on whichever server has their keys. A "no" is an answer only from a server that can know it (P15).

    Args:
        prefix: Of all keys.
        timeout: Seconds for which a server that can know is looked for.
        replicated: Whether what is said to matter has to be confirmed by a replica.
        on_cluster: Whether the servers are members of a Cluster.
    """

    def __init__(
        self, servers: Servers, proof: Proof, *, prefix: str, timeout: float, replicated: bool, on_cluster: bool
    ) -> None:
        self._servers = servers
        self._proof = proof
        self._prefix = prefix
        self._timeout = timeout
        self._replicated = replicated
        self._on_cluster = on_cluster

    async def run(
        self,
        script: Script,
        key: str,
        *args: Arg,
        replicated: bool = False,
        says_no: Callable[[Any], bool] | None = None,
    ) -> Any:
        """The script's answer for this session.

        Args:
            replicated: Whether a replica has to confirm what it writes, where the store is one that asks for that.
            says_no: Whether an answer that is no refusal says that something is not so, and has to be proven.

        Raises:
            SessionNotFound, AlreadyExists, StreamClosed, Fenced, NotPending, Diverged: The script refused.
            StoreUnavailable: There is no answer, or none of a server that can know it.
        """
        stem = f"{self._prefix}:{{{key}}}:"
        names = (stem + "r", stem + "w", stem + "l")
        confirmed = replicated and self._replicated
        server = None if confirmed else self._servers.only
        if server is None:
            answer = await self._evaluate(script, names, args, replicated=confirmed)
        else:
            # As `_evaluate`, without its frames: every request comes by here.
            openings = server.openings
            try:
                reply = await server.plain.send(("EVALSHA", script[self._on_cluster].sha, 3, *names, *args))
                answer = reply, server, openings
            except ScriptMissing:
                answer = await self._evaluate(script, names, args)
        reply = answer[0]
        if (
            (type(reply) is bytes and reply in _REFUSALS)
            or (type(reply) is list and reply and reply[0] == b"gone")
            or (says_no is not None and says_no(reply))
        ):
            reply = await self._believed(
                answer,
                names[0],
                lambda: self._evaluate(script, names, args, replicated=confirmed),
                lambda reply: _refusal_in(reply) is not None or (says_no is not None and says_no(reply)),
            )
            if (refusal := _refusal_in(reply)) is not None:
                raise _REFUSALS[refusal]
        return reply

    async def run_for_group(self, name: str, *args: Arg) -> Any:
        """The answer of group.lua for the group with this key."""

        def ask() -> Awaitable[Answer]:
            return self._evaluate(_GROUP, (name,), args)

        return await self._believed(await ask(), name, ask, is_zero)

    async def value_of(self, name: str) -> bytes | None:
        """The value of a plain key, None if it is certainly not there."""

        def ask() -> Awaitable[Answer]:
            return self._servers.ask(name, "GET", name)

        value: bytes | None = await self._believed(await ask(), name, ask, _is_none)
        return value

    async def _believed(
        self,
        answer: Answer,
        key: str,
        again: Callable[[], Awaitable[Answer]],
        says_no: Callable[[Any], bool],
    ) -> Any:
        """The reply, once it comes from a server that can know, if it says no (P15).

        Raises:
            StoreUnavailable: Within the store's timeout none was found, or it is not believed yet.
        """
        loop = asyncio.get_running_loop()
        limit, pause = loop.time() + self._timeout, 0.0
        while says_no(reply := answer[0]):
            if _is_loss(reply):
                proven = await self._proof.of_loss(key, *answer[1:], mark=_mark_in(reply))
            else:
                proven = await self._proof.of_owner(key, *answer[1:])
            if proven:
                break
            if loop.time() >= limit:
                raise StoreUnavailable("the store's servers do not agree on which of them has the session: try again")
            await asyncio.sleep(pause)
            pause = min(2 * pause + 0.01, 0.2)
            answer = await again()
        return reply

    async def _evaluate(
        self, script: Script, keys: tuple[str, ...], args: tuple[Arg, ...], *, replicated: bool = False
    ) -> Answer:
        """The script's answer. A script that the server does not know has not run: it is sent whole."""
        ask, tail, source = self._servers.ask, (len(keys), *keys, *args), script[self._on_cluster]
        try:
            return await ask(keys[0], "EVALSHA", source.sha, *tail, replicated=replicated)
        except ScriptMissing:
            return await ask(keys[0], "EVAL", source.text, *tail, replicated=replicated)


# ---- what an answer says


def is_zero(reply: Any) -> bool:
    return bool(reply == 0)


def is_list(reply: Any) -> bool:
    return type(reply) is list


def is_trimmed(reply: Any) -> bool:
    return bool(reply and reply[0] == b"trimmed")


def _is_none(reply: Any) -> bool:
    return reply is None


def _is_loss(reply: Any) -> bool:
    """Whether it says that something is gone, or was never there; and not only that it is not as it should be."""
    return reply is None or (type(reply) is list and reply[0] in (0, b"gone"))


def _refusal_in(reply: Any) -> bytes | None:
    if type(reply) is list and reply and reply[0] == b"gone":
        return b"gone"
    return reply if type(reply) is bytes and reply in _REFUSALS else None


def _mark_in(reply: Any) -> bytes | None:
    """The mark that goes along with the answer that something is gone, where there is one server."""
    return reply[-1] if reply is not None else None
