"""Where a Redis-compatible server is and how to log in there, read from a URL. The credentials never leave by repr."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from nonstick.errors import ConfigurationError
from nonstick.stores.common.options import grace_in, unknown_option

__all__ = ["Address", "Deployment", "Durability"]

Durability = Literal["primary", "replicated"]
"""Whether a write counts once the primary has it, or, where losing it would hurt, once a replica has it too."""

_TLS_OPTIONS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
_OPTIONS = ("db", "username", "password", *_TLS_OPTIONS)
_FORMS = "redis://[[user]:password@]host[:port][/db], rediss:// likewise with TLS, or unix:///path/to.sock[?db=1]"

_GROUP_FORMS = (
    "redis+cluster://[[user]:password@]host[:port][,host[:port]...], "
    "redis+sentinel://[[user]:password@]sentinel[:port][,sentinel[:port]...]/service[/db], "
    "or rediss+cluster:// and rediss+sentinel:// likewise with TLS"
)
_GROUPS: Final[dict[str, Literal["cluster", "sentinel"]]] = {"cluster": "cluster", "sentinel": "sentinel"}
_DEPLOYMENT_OPTIONS: Final = ("durability", "empty_grace", "sentinel_username", "sentinel_password")


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
    def parse(cls, url: str, *, port: int = 6379) -> Address:
        """The address that `url` names, with this port if it names none.

        Raises:
            ConfigurationError: The URL is malformed. The message never quotes it: it may hold a password.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "localhost", parts.port or port
        except ValueError:
            # Typically a password with an unescaped '/', '#' or '?': what follows it is taken for a path.
            raise ConfigurationError(
                "the store URL has no valid host and port; percent-encode special characters in the password"
            ) from None
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ConfigurationError(f"the store URL must look like {_FORMS}; or {_GROUP_FORMS}")
        if parts.fragment or "@" in parts.query:
            raise ConfigurationError(
                "the store URL has a '#' or a late '@'; percent-encode special characters in the password"
            )
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
        return f"redis{'s' if self.tls else ''}://{self.place}/{self.db}"

    @property
    def place(self) -> str:
        """Host and port, as in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def at(self, host: str, port: int) -> Address:
        """Another server of the same deployment."""
        return replace(self, host=host, port=port, path="")

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


@dataclass(frozen=True, slots=True)
class Deployment:
    """One server, a Cluster, or a primary that Sentinels name, with all that a URL says of it.

    Attributes:
        address: The server. Of a Cluster or a Sentinel deployment: what all of its servers have in common, which is
            everything but host and port.
        seeds: The Cluster's members, or the Sentinels, that the URL names; of one server, itself.
        service: The name that the Sentinels know the primary by.
        durability: None if the URL does not say.
        empty_grace: Likewise.
    """

    kind: Literal["server", "cluster", "sentinel"]
    address: Address
    seeds: tuple[Address, ...]
    service: str = ""
    durability: Durability | None = None
    empty_grace: float | None = None

    @classmethod
    def parse(cls, url: str) -> Deployment:
        """The deployment that `url` names.

        Raises:
            ConfigurationError: The URL is malformed. The message never quotes it: it may hold a password.
        """
        url, options = _taken_out(url)
        durability = _durability(options.get("durability"))
        empty_grace = grace_in(options["empty_grace"]) if "empty_grace" in options else None
        scheme, _, rest = url.partition("://")
        base, _, group = scheme.lower().partition("+")
        if not group:
            address = Address.parse(url)
            return cls("server", address, (address,), durability=durability, empty_grace=empty_grace)
        if group not in _GROUPS or base not in ("redis", "rediss"):
            raise ConfigurationError(f"the store URL must look like {_FORMS}; or {_GROUP_FORMS}")
        authority, slash, tail = _halves(rest)
        user, at, hosts = authority.rpartition("@")
        if group == "cluster":
            addresses = [Address.parse(f"{base}://{user}{at}{host}{slash}{tail}") for host in hosts.split(",")]
            if addresses[0].db:
                raise ConfigurationError("a Cluster has one database only: leave the number out of the store URL")
            return cls("cluster", addresses[0], tuple(addresses), durability=durability, empty_grace=empty_grace)
        path, question, query = tail.partition("?")
        service, _, db = path.strip("/").partition("/")
        if slash != "/" or not service:
            raise ConfigurationError(
                f"name the service that the Sentinels watch; the store URL must look like {_GROUP_FORMS}"
            )
        places = [Address.parse(f"{base}://{host}{question}{query}", port=26379) for host in hosts.split(",")]
        user_there, password_there = options.get("sentinel_username", ""), options.get("sentinel_password", "")
        return cls(
            "sentinel",
            Address.parse(f"{base}://{user}{at}sentinel/{db}{question}{query}"),
            tuple(replace(place, db=0, username=user_there, password=password_there) for place in places),
            service=unquote(service),
            durability=durability,
            empty_grace=empty_grace,
        )

    @property
    def url(self) -> str:
        """The same place without any credentials: fit for logs."""
        if self.kind == "server":
            return self.address.url
        scheme = f"redis{'s' if self.address.tls else ''}+{self.kind}://"
        hosts = ",".join(seed.place for seed in self.seeds)
        return scheme + hosts + (f"/{quote(self.service)}/{self.address.db}" if self.kind == "sentinel" else "")


def _taken_out(url: str) -> tuple[str, dict[str, str]]:
    """The URL without the parameters that concern more than one address, and these."""
    start, question, query = url.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    taken = {name: value for name, value in pairs if name in _DEPLOYMENT_OPTIONS}
    if not taken:
        return url, {}
    rest = urlencode([pair for pair in pairs if pair[0] not in taken])
    return start + (question + rest if rest else ""), taken


def _durability(value: str | None) -> Durability | None:
    match value:
        case None | "primary" | "replicated":
            return value
        case _:
            pass
    raise ConfigurationError("durability in the store URL must be primary or replicated")


def _halves(rest: str) -> tuple[str, str, str]:
    """What comes before the first / or ? or #, that character, and what follows it."""
    for i, character in enumerate(rest):
        if character in "/?#":
            return rest[:i], character, rest[i + 1 :]
    return rest, "", ""


def _options(parts: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise unknown_option(name, ("prefix", *_DEPLOYMENT_OPTIONS, *_OPTIONS))
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
