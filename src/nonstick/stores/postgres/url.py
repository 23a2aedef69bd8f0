"""Where a PostgreSQL store is and how it is to be used, read from a URL. The credentials never leave by repr."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from nonstick.errors import ConfigurationError
from nonstick.store import EMPTY_GRACE_SECONDS
from nonstick.stores.common.options import checked_grace
from nonstick.stores.postgres.options import OWN, read

__all__ = ["Address"]

_FORM: Final = "postgresql://[user[:password]@]host[:port]/database"
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:@/\[\]]*)(:\d+)?")
_SCHEMA: Final = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,47}")


@dataclass(frozen=True, slots=True)
class Address:
    """One database and how the store uses it. `PostgresStore` describes the options.

    Attributes:
        dsn: What the driver connects to: the URL without the store's own options.
        url: The place alone, without credentials and options: fit for logs.
        connect_timeout: Seconds that connecting may take, if less than a call may.
        system_authorities: The server's certificate has to be of an authority that this machine trusts.
    """

    dsn: str = field(repr=False)
    url: str
    schema: str = "nonstick"
    listen_dsn: str | None = field(default=None, repr=False)
    unlogged: bool = False
    prepared: bool = True
    pool_size: int = 10
    migrate: bool = True
    empty_grace: float = EMPTY_GRACE_SECONDS
    connect_timeout: float | None = None
    system_authorities: bool = False

    def __post_init__(self) -> None:
        if not _SCHEMA.fullmatch(self.schema):
            raise ConfigurationError("the store's schema must be a name of a-z, 0-9 and _, at most 48 characters")
        for name in ("unlogged", "prepared", "migrate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} in the store URL must be true or false")
        if self.pool_size < 1:
            raise ConfigurationError("the store's pool_size must be a number from 1")
        checked_grace(self.empty_grace)

    @classmethod
    def parse(cls, url: str, **given: Any) -> Self:
        """The address that `url` names; options that are `given`, and not None, take the place of the URL's.

        Raises:
            ConfigurationError: The URL or an option cannot work. The message never quotes the URL (P13).
        """
        place, dsn, own = _taken_apart(url)
        own |= {name: value for name, value in given.items() if value is not None}
        if (listen := own.get("listen_dsn")) is not None:
            _, own["listen_dsn"], others = _taken_apart(listen)
            if misplaced := [name for name in others if name in OWN]:
                raise ConfigurationError(f"{misplaced[0]} belongs into the store URL, not into its listen_dsn")
        return cls(dsn, place, **own)

    @property
    def server(self) -> tuple[str, int] | None:
        """Host and port, where there is one server, named in front of the database."""
        parts = urlsplit(self.dsn)
        hosts = parts.netloc.rpartition("@")[2]
        if not hosts or "," in hosts or "host" in dict(parse_qsl(parts.query)):
            return None
        return parts.hostname or "localhost", parts.port or 5432

    @property
    def names_application(self) -> bool:
        """The URL says what the connections are called on the server."""
        return "application_name" in dict(parse_qsl(urlsplit(self.dsn).query))

    def direct(self) -> Self:
        """The address for what needs a connection of its own: past a pooler, if there is one."""
        return replace(self, dsn=self.listen_dsn or self.dsn)


def _place(url: str) -> str:
    """The URL without credentials and options."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigurationError(f"the store URL is malformed; it must look like {_FORM}") from None
    if "://" not in url or parts.scheme not in ("postgresql", "postgres"):
        raise ConfigurationError(f"the store URL must look like {_FORM}")
    hosts = parts.netloc.rpartition("@")[2]
    # Typically a password with an unescaped '/', '#' or '?': what follows it is taken for a path.
    if parts.fragment or "@" in parts.path + parts.query or not all(map(_HOST.fullmatch, hosts.split(","))):
        raise ConfigurationError(
            "the store URL has no valid host and port; percent-encode special characters in the password"
        )
    return f"postgresql://{hosts}{parts.path}"


def _taken_apart(url: str) -> tuple[str, str, dict[str, Any]]:
    """The URL without credentials and options, what the driver is told, and the store's own options."""
    place = _place(url)
    parts = urlsplit(url)
    options = read(parse_qsl(parts.query, keep_blank_values=True))
    return place, parts._replace(query=urlencode(options.rest)).geturl(), options.own
