"""Where a PostgreSQL store is and how it is to be used, read from a URL. The credentials never leave by repr."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from nonstick.errors import ConfigurationError

__all__ = ["Address"]

_FORM: Final = "postgresql://[user[:password]@]host[:port]/database"
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:@/\[\]]*)(:\d+)?")
_SCHEMA: Final = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,47}")
_YES: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _text(value: str) -> str:
    return value


def _number(value: str) -> int:
    return int(value) if value.isascii() and value.isdigit() else 0


def _flag(value: str) -> bool | None:
    return _YES.get(value.lower())


_OWN: Final[dict[str, Callable[[str], Any]]] = {
    "schema": _text,
    "listen_dsn": _text,
    "unlogged": _flag,
    "prepared": _flag,
    "pool_size": _number,
    "migrate": _flag,
}


@dataclass(frozen=True, slots=True)
class Address:
    """One database and how the store uses it. `PostgresStore` describes the options.

    Attributes:
        dsn: What the driver connects to: the URL without the store's own options.
        url: The place alone, without credentials and options: fit for logs.
    """

    dsn: str = field(repr=False)
    url: str
    schema: str = "nonstick"
    listen_dsn: str | None = field(default=None, repr=False)
    unlogged: bool = False
    prepared: bool = True
    pool_size: int = 10
    migrate: bool = True

    def __post_init__(self) -> None:
        if not _SCHEMA.fullmatch(self.schema):
            raise ConfigurationError("the store's schema must be a name of a-z, 0-9 and _, at most 48 characters")
        if self.listen_dsn is not None:
            _place(self.listen_dsn)
        for name in ("unlogged", "prepared", "migrate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} in the store URL must be true or false")
        if self.pool_size < 1:
            raise ConfigurationError("the store's pool_size must be a number from 1")

    @classmethod
    def parse(cls, url: str, **given: Any) -> Self:
        """The address that `url` names; options that are `given`, and not None, take the place of the URL's.

        Raises:
            ConfigurationError: The URL or an option cannot work. The message never quotes the URL (P13).
        """
        place = _place(url)
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
        options = {name: _OWN[name](value) for name, value in query if name in _OWN}
        options |= {name: value for name, value in given.items() if value is not None}
        rest = urlencode([(name, value) for name, value in query if name not in _OWN])
        return cls(parts._replace(query=rest).geturl(), place, **options)

    def direct(self) -> Self:
        """The address for what needs a connection of its own: past a pooler, if there is one."""
        return replace(self, dsn=self.listen_dsn or self.dsn)


def _place(url: str) -> str:
    """The URL without credentials and options."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigurationError(f"the store URL is malformed; it must look like {_FORM}") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"the store URL must look like {_FORM}")
    hosts = parts.netloc.rpartition("@")[2]
    # Typically a password with an unescaped '/', '#' or '?': what follows it is taken for a path.
    if parts.fragment or "@" in parts.path + parts.query or not all(map(_HOST.fullmatch, hosts.split(","))):
        raise ConfigurationError(
            "the store URL has no valid host and port; percent-encode special characters in the password"
        )
    return f"postgresql://{hosts}{parts.path}"
