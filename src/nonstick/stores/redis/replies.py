"""What the error replies of a Redis-compatible server mean."""

from __future__ import annotations

import re
from typing import Final

from nonstick.errors import StoreUnavailable, StoreUnusable

__all__ = [
    "Demoted",
    "Forbidden",
    "Redirected",
    "ScriptMissing",
    "ServerError",
    "TryAgain",
    "UnknownCommand",
    "is_alive",
    "refusal",
]

_ADVICE: Final = {
    "LOADING": "the store is still loading its data",
    "READONLY": "the store is a read-only replica: point the URL at the primary",
    "MASTERDOWN": "the store is a replica that has lost its primary",
    "TRYAGAIN": "the store is moving these keys: try again",
    "CLUSTERDOWN": "the store's cluster is down",
    "MOVED": "the store is a member of a Cluster: write redis+cluster:// instead of redis:// in its URL",
    "BUSY": "the store is busy with a slow script",
    "NOREPLICAS": "the store has too few replicas to accept writes",
    "OOM": "the store is out of memory: raise its maxmemory",
    "MISCONF": "the store refuses writes because it cannot save to disk: see the server's log",
    "DENIED": "the store's server is in protected mode, for its own machine only: give it and the URL a password",
    "NOAUTH": "the store wants a login: put user and password into its URL",
    "WRONGPASS": "the store refused the login: check user and password in its URL",
    "NOPERM": "the store's user lacks a permission: docs/stores.md has the ACL line that it needs",
}
# Up to Redis 6.2 an error raised inside a script arrives wrapped: "ERR Error running script … -OOM command not …".
_CODE: Final = re.compile(rf"(?:^|[\s:-])({'|'.join(_ADVICE)})\b")


# "MOVED 3999 127.0.0.1:6381"; the host may be missing, or be an IPv6 address.
_REDIRECTION: Final = re.compile(r"(MOVED|ASK) \d+ (.*):(\d+)$")


class ServerError(Exception):
    """An error reply, as the server wrote it. It may quote a payload, and does not leave this package (P13)."""


class ScriptMissing(StoreUnavailable):
    """The server does not know this script, so it has not run: send the source with EVAL."""


class Redirected(StoreUnavailable):
    """The command has not run: another server of the cluster has its keys.

    Attributes:
        host: "" for the host that answered.
        asking: Only this one command is to be sent there, after ASKING: the slot is being moved (ASK, not MOVED).
    """

    def __init__(self, message: str, host: str, port: int, *, asking: bool) -> None:
        super().__init__(message)
        self.host = host
        self.port = port
        self.asking = asking


class TryAgain(StoreUnavailable):
    """The command has not run: its keys are being moved, and lie on two servers at this moment."""


class Demoted(StoreUnavailable):
    """The command has not run: this server is a replica."""


class Forbidden(StoreUnusable):
    """The command has not run: the user may not run it."""


class UnknownCommand(StoreUnusable):
    """The server has no such command, or has renamed it."""


_KINDS: Final[dict[str, type[StoreUnavailable]]] = {
    "TRYAGAIN": TryAgain,
    "READONLY": Demoted,
    "NOPERM": Forbidden,
    **dict.fromkeys(("DENIED", "NOAUTH", "WRONGPASS"), StoreUnusable),
}

_UNUSABLE: Final = {
    "ERR ACL failure in script": _ADVICE["NOPERM"],
    "ERR AUTH": "the store has no password for this user: check user and password in its URL",
    "ERR Client sent AUTH": "the store has no password: leave it out of the URL",
    "ERR DB index": "the store has no database of that number: correct it in the URL, or see `databases` in the "
    "server's configuration",
    "ERR invalid DB index": "the database in the store's URL is no number that the server takes",
    "ERR SELECT is not allowed in cluster mode": _ADVICE["MOVED"],
    "ERR This instance has cluster support disabled": "the store is one server, no Cluster: write redis:// instead of "
    "redis+cluster:// in its URL",
}
"""By how the server's error begins."""

_UNKNOWN: Final = re.compile(r"ERR unknown (?:sub)?command '?`?([A-Za-z|]{1,40})")


def is_alive(reply: ServerError) -> bool:
    """Whether a PING was answered so: a server that cannot save to disk refuses it, and answers every read."""
    return str(reply).startswith("MISCONF")


def refusal(message: str) -> StoreUnavailable:
    """What to raise for the server's error reply. Says what to do; quotes no argument of the command (P13)."""
    if message.startswith("NOSCRIPT"):
        return ScriptMissing("the store does not know the script")
    if (to := _REDIRECTION.match(message)) is not None:
        # "?" is said by a server that was told to give host names, and knows none.
        return Redirected(_ADVICE["MOVED"], to[2].removeprefix("?"), int(to[3]), asking=to[1] == "ASK")
    if (code := _CODE.search(message)) is not None:
        return _KINDS.get(code[1], StoreUnavailable)(_ADVICE[code[1]])
    for start, advice in _UNUSABLE.items():
        if message.startswith(start):
            return StoreUnusable(advice)
    if (unknown := _UNKNOWN.match(message)) is not None:
        return UnknownCommand(f"the store's server does not know {unknown[1].upper()}, or has it renamed")
    # "ERR unknown command 'X', with args beginning with: …" would quote a payload.
    return StoreUnavailable(f"the store answered: {message.split(', with args', 1)[0][:200]}")
