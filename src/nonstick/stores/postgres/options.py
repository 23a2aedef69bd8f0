"""The options of a PostgreSQL URL, as hosts and other libraries print them: each is taken, or refused by its name.

Source: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS for libpq's;
https://www.prisma.io/docs/orm/overview/databases/postgresql#arguments for Prisma's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from nonstick.errors import ConfigurationError
from nonstick.stores.common.options import unknown_option

__all__ = ["OWN", "Options", "read"]

_YES: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _text(value: str) -> str:
    return value


def _number(value: str) -> int:
    return int(value) if value.isascii() and value.isdigit() else 0


def _seconds(value: str) -> float:
    return float(value) if value.isascii() and value.replace(".", "", 1).isdigit() else -1.0


def _flag(value: str) -> bool | None:
    return _YES.get(value.lower())


OWN: Final[dict[str, Callable[[str], Any]]] = {
    "schema": _text,
    "listen_dsn": _text,
    "unlogged": _flag,
    "prepared": _flag,
    "pool_size": _number,
    "migrate": _flag,
    "empty_grace": _seconds,
}
"""The store's own, and how each is read."""

_DRIVERS: Final[dict[str, tuple[str, ...]]] = {
    "host": (),
    "port": (),
    "user": (),
    "password": (),
    "dbname": (),
    "database": (),
    "passfile": (),
    "service": (),
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslrootcert": (),
    "sslcert": (),
    "sslkey": (),
    "sslpassword": (),
    "sslcrl": (),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "target_session_attrs": ("any", "primary", "standby", "prefer-standby", "read-write", "read-only"),
    "krbsrvname": (),
    "gsslib": (),
}
"""What the driver understands, with the values that it may have; () for any."""

_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_WITH_SYSTEM: Final = ("sslcert", "sslkey", "sslpassword", "sslcrl")

_SETTINGS: Final = (
    "application_name",
    "options",
    "search_path",
    "role",
    "timezone",
    "datestyle",
    "jit",
    "work_mem",
    "synchronous_commit",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
    "tcp_keepalives_idle",
    "tcp_keepalives_interval",
    "tcp_keepalives_count",
)
"""Settings of the server's that go there as they are. Any other may stand in `options`."""

_NUMBER: Final = ("a number",)

_HELD_ANYWAY: Final[dict[str, tuple[str, ...]]] = {
    # Whether the other side is still there, the store finds out by its own deadlines.
    "keepalives": _NUMBER,
    "keepalives_idle": _NUMBER,
    "keepalives_interval": _NUMBER,
    "keepalives_count": _NUMBER,
    "tcp_user_timeout": _NUMBER,
    # The driver has none of these, which is what these values ask for, or allow.
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "gssdelegation": ("0",),
    "sslcompression": ("0",),
    "sslsni": ("1",),
    "sslcertmode": ("allow",),
    "load_balance_hosts": ("disable",),
    "client_encoding": ("auto", "utf8", "utf-8", "unicode"),
    "min_protocol_version": ("3.0",),
    "max_protocol_version": ("3.0", "3.2", "latest"),
    # Marks for other libraries.
    "supa": (),
    "uselibpqcompat": (),
}
"""What is so without being said, for these values; () for any."""

_REFUSED: Final = {
    "channel_binding": "the driver has no channel binding. sslmode=verify-full&sslrootcert=system keeps out the same "
    "attackers, by the server's certificate; or leave it out",
    "gssencmode": "the driver has no encryption by GSSAPI: use TLS, with sslmode",
    "gssdelegation": "the driver does not delegate: leave it out",
    "load_balance_hosts": "hosts are tried in the order of the URL: leave it out",
    "sslsni": "the name of the server is always sent: leave it out",
    "sslcompression": "TLS is never compressed: leave it out",
    "sslcertmode": "leave it out; a client certificate is sent where sslcert names one",
    "client_encoding": "it is always UTF-8: leave it out",
    "require_auth": "the driver cannot insist on a method: leave it out, and demand it in the server's pg_hba.conf",
    "requirepeer": "the driver cannot check it: leave it out, and protect the socket's directory",
    "requiressl": "write sslmode=require",
    "ssl": "write sslmode=require, or sslmode=verify-full to have the server's certificate checked",
    "sslaccept": "write sslmode=verify-full for strict, sslmode=require for accept_invalid_certs",
    "sslidentity": "name the certificate with sslcert, and its key with sslkey, both in PEM",
    "hostaddr": "put the address in the host's place, in front of the database",
    "pool_timeout": "leave it out: a call that gets no connection within the store's timeout, 2 s, fails",
    "socket_timeout": "leave it out: a call that is not answered within the store's timeout, 2 s, fails",
    "replication": "a store needs an ordinary connection: leave it out",
}
"""What cannot be had, and what to do instead."""


@dataclass(slots=True)
class Options:
    """What a URL's options say.

    Attributes:
        own: The store's own, by their names in `Address`.
        rest: What the driver is told.
    """

    own: dict[str, Any] = field(default_factory=dict[str, Any])
    rest: dict[str, str] = field(default_factory=dict[str, str])


def read(pairs: Iterable[tuple[str, str]]) -> Options:
    """What these options say.

    Raises:
        ConfigurationError: One is not known, cannot be had, or has a value that it cannot have. The message names the
            option, never its value (P13).
    """
    options = Options()
    for name, value in dict(pairs).items():
        if not value:
            raise ConfigurationError(f"{_shown(name)} in the store URL has no value: give it one, or leave it out")
        _take_option(options, name, value)
    for name, value in options.own.items():
        if value is None:
            raise ConfigurationError(f"{name} in the store URL must be true or false")
    _check_files(options)
    return options


def _take_option(options: Options, name: str, value: str) -> None:
    own, rest = options.own, options.rest
    match name:
        case "pgbouncer":
            # Prisma's: a pooler that hands a server to each transaction, which knows no prepared statements.
            if (pooled := _flag(value)) is None:
                raise ConfigurationError("pgbouncer in the store URL must be true or false")
            own.setdefault("prepared", not pooled)
        case "statement_cache_size" | "prepared_statement_cache_size":
            own.setdefault("prepared", _at_least(0, name, value) > 0)
        case "connection_limit":
            own.setdefault("pool_size", _at_least(1, name, value))
        case "connect_timeout":
            # None, or anything below: for ever, by libpq. The store's own timeout holds in any case.
            if not value.lstrip("-").isdigit():
                raise _refused(name, "give it in whole seconds")
            if int(value) > 0:
                own["connect_timeout"] = int(value)
        case "fallback_application_name":
            rest.setdefault("application_name", value)
        case _ if name in OWN:
            own[name] = OWN[name](value)
        case _ if name in _DRIVERS:
            rest[name] = _one_of(_DRIVERS[name], name, value)
        case _ if name in _HELD_ANYWAY:
            _one_of(_HELD_ANYWAY[name], name, value)
        case _ if name.lower() in _SETTINGS or "." in name:  # a dot: a setting of an extension
            rest[name] = value
        case _ if name in _REFUSED:
            raise _refused(name, _REFUSED[name])
        case _:
            known = (*OWN, *_DRIVERS, *_SETTINGS, *_HELD_ANYWAY, *_REFUSED, "connect_timeout", "connection_limit")
            raise unknown_option(name, known, "A setting of the server goes into options=-c%20NAME%3DVALUE.")


def _one_of(values: tuple[str, ...], name: str, value: str) -> str:
    if not values or value in values or (values is _NUMBER and value.lstrip("-").isdigit()):
        return value
    if name == "sslmode" and value == "no-verify":
        raise _refused(name, "write sslmode=require, which checks no certificate either, unless sslrootcert names one")
    raise _refused(
        name, _REFUSED.get(name, f"it may be {', '.join(values[:-1])}{' or ' if values[:-1] else ''}{values[-1]}")
    )


def _at_least(least: int, name: str, value: str) -> int:
    if value.isascii() and value.isdigit() and int(value) >= least:
        return int(value)
    raise _refused(name, f"give a number from {least}")


def _refused(name: str, advice: str) -> ConfigurationError:
    return ConfigurationError(f"{name} in the store URL cannot be as it is: {advice}")


def _shown(name: str) -> str:
    return name if name in (*OWN, *_DRIVERS, *_SETTINGS, *_HELD_ANYWAY, *_REFUSED) else "an option"


def _check_files(options: Options) -> None:
    rest = options.rest
    if rest.get("sslrootcert") == "system":
        if rest.get("sslmode", "verify-full") != "verify-full":
            raise _refused(
                "sslrootcert", "system goes with sslmode=verify-full only: anybody can have a certificate of those"
            )
        if mixed := [name for name in _WITH_SYSTEM if name in rest]:
            raise _refused(mixed[0], "it does not go with sslrootcert=system: name a file of authorities there")
        del rest["sslrootcert"]
        rest.pop("sslmode", None)
        options.own["system_authorities"] = True
    for name in _FILES:
        if name in rest and not os.access(rest[name], os.R_OK):
            raise _refused(name, "there is no file of that name that this user may read")
