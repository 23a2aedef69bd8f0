"""Where a Redis-compatible server is and how to log in there, read from a URL. The credentials never leave by repr."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from nonstick.errors import ConfigurationError

__all__ = ["Address"]

_TLS_OPTIONS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
_OPTIONS = ("db", "username", "password", *_TLS_OPTIONS)
_FORMS = "redis://[[user]:password@]host[:port][/db], rediss:// likewise with TLS, or unix:///path/to.sock[?db=1]"


@dataclass(frozen=True, slots=True)
class Address:
    """One server, one database, one login. The URL forms are those of redis-py.

    Attributes:
        path: Of the Unix socket; "" for TCP.
        tls: The context for `rediss://`, else None.
        tls_options: The `ssl_…` options of the URL, under the names that redis-py takes as well.
    """

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    tls_options: dict[str, Any] = field(default_factory=dict[str, Any], repr=False, hash=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """The address that `url` names.

        Raises:
            ConfigurationError: The URL is malformed. The message never quotes it: it may hold a password.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "localhost", parts.port or 6379
        except ValueError:
            # Typically a password with an unescaped '/', '#' or '?': what follows it is taken for a path.
            raise ConfigurationError(
                "the store URL has no valid host and port; percent-encode special characters in the password"
            ) from None
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ConfigurationError(f"the store URL must look like {_FORMS}")
        if parts.fragment:
            raise ConfigurationError("the store URL has a '#'; percent-encode special characters in the password")
        options = _options(parts)
        tls_options = _tls_options(parts, options)
        unix = parts.scheme == "unix"
        if unix and not parts.path.strip("/"):
            raise ConfigurationError("a unix:// store URL needs the socket's path: unix:///path/to.sock")
        return cls(
            host="" if unix else unquote(host),
            port=0 if unix else port,
            path=unquote(parts.path) if unix else "",
            db=_db(parts, options),
            username=unquote(parts.username or "") or options.get("username", ""),
            password=unquote(parts.password or "") or options.get("password", ""),
            tls=_context(tls_options) if parts.scheme == "rediss" else None,
            tls_options=tls_options,
        )

    @property
    def url(self) -> str:
        """The same place without any credentials: fit for logs."""
        if self.path:
            return f"unix://{quote(self.path)}" + (f"?db={self.db}" if self.db else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{host}:{self.port}/{self.db}"

    def login(self) -> list[tuple[str, ...]]:
        """The commands that a new connection starts with; the last one proves that the server answers."""
        commands: list[tuple[str, ...]] = []
        if self.username:
            commands.append(("AUTH", self.username, self.password))
        elif self.password:
            commands.append(("AUTH", self.password))
        if self.db:
            commands.append(("SELECT", str(self.db)))
        commands.append(("PING",))
        return commands


def _options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise ConfigurationError(f"the store URL has an unknown option; known are {', '.join(_OPTIONS)}")
    return options


def _db(parts: SplitResult, options: dict[str, str]) -> int:
    in_path = "" if parts.scheme == "unix" else parts.path.strip("/")
    text = options.get("db") or in_path or "0"
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError("the database in the store URL must be a number, as in redis://host:6379/1")
    return int(text)


def _tls_options(parts: SplitResult, options: dict[str, str]) -> dict[str, Any]:
    given: dict[str, Any] = {name: options[name] for name in _TLS_OPTIONS if name in options}
    if given and parts.scheme != "rediss":
        raise ConfigurationError("the store URL has ssl_ options but no TLS: write rediss:// instead of redis://")
    if given.get("ssl_cert_reqs", "required") not in ("required", "optional", "none"):
        raise ConfigurationError("ssl_cert_reqs in the store URL must be required, optional or none")
    if "ssl_check_hostname" in given:
        given["ssl_check_hostname"] = given["ssl_check_hostname"].lower() in ("1", "true", "yes", "on")
    if given.get("ssl_cert_reqs") == "none":
        given["ssl_check_hostname"] = False
    return given


def _context(options: dict[str, Any]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        context.check_hostname = options.get("ssl_check_hostname", True)
        context.verify_mode = {
            "required": ssl.CERT_REQUIRED,
            "optional": ssl.CERT_OPTIONAL,
            "none": ssl.CERT_NONE,
        }[options.get("ssl_cert_reqs", "required")]
        if "ssl_certfile" in options:
            context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    except OSError as error:
        raise ConfigurationError(f"the store URL's certificate files cannot be read: {error.strerror}") from None
    return context
