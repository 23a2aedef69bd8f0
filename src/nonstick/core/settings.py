"""What can be set of an MCP endpoint: each setting once, with its default and its bounds. The same on every node.

`nonstick.app()`, `nonstick.adopt()` and `SessionManager()` take settings as arguments of these names, `nonstick serve`
as `--set NAME=VALUE`. `settings_of` is the only check of them: pydantic holds each value to what its annotation says,
and the error says it in the words of that annotation. `Options` has the same names once more, because type checkers
read nothing else; a test holds it to `Settings`, and another one the tables in docs/limits.md and docs/cli.md.

Settings are grouped for the reader, and flat in use: `settings.window`, whichever group `window` belongs to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Final, Literal, NamedTuple, TypedDict, get_args, get_type_hints

from mcp.server.connection import Connection
from mcp.server.streamable_http import MCP_SESSION_ID_HEADER
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, Strict, TypeAdapter, ValidationError

from nonstick.core.principals import principal_group
from nonstick.errors import ConfigurationError, close_to

__all__ = [
    "EVERYBODY",
    "OF_THE_SDK",
    "Answer",
    "Must",
    "Options",
    "Placement",
    "Rehydrate",
    "Settings",
    "arguments_of",
    "check_arguments",
    "must",
    "said_as",
    "settings_of",
]

Answer = Literal["auto", "sse", "json"]
"""How requests are answered: `auto` JSON if the handler ends soon and silently, else a stream; `sse` always a stream;
`json` never."""

Placement = Literal["any", "stateless", "owner"]
"""Which nodes serve a session: any; there are none; or the one that opened it, which others relay to."""

Rehydrate = Callable[[Connection], Awaitable[None]]
"""Builds what a session holds anew on the node that takes it: fills `Connection.state`, owes to `exit_stack`."""

EVERYBODY: Final = "all"
"""The group that every session is counted in."""

OF_THE_SDK: Final = {
    "lifetime": "session_idle_timeout",
    "max_sessions": "max_sessions",
    "retry_interval": "retry_interval",
}
"""Settings that are given by an argument of the SDK's, and its name. So `Options` does not have them."""


# ---- what a value must be


SaidAs = Literal["text", "json", "nothing"]


class Must(NamedTuple):
    """What the value of a setting must be: "max_streams must be " + this.

    Attributes:
        be: With the unit.
        said_as: How a command line says it: as a text, as JSON, or not at all.
    """

    be: str
    said_as: SaidAs = "json"


def _whole(value: object) -> object:
    """1e6 is as good as 1000000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _header_names(value: object) -> tuple[str, ...]:
    """These names, in lower case."""
    names: list[Any] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [None]
    if not all(isinstance(name, str) and _HEADER_NAME.fullmatch(name) for name in names):
        raise ValueError
    lower = tuple(name.lower() for name in names)
    if MCP_SESSION_ID_HEADER in lower:
        raise ConfigurationError(f"leave {MCP_SESSION_ID_HEADER} out of relay_headers: handlers see it anyway")
    return lower


def _async_function(value: Any) -> Any:
    if inspect.isfunction(value) and not inspect.iscoroutinefunction(value):
        raise ValueError
    return value


_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

_Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
_Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Seconds = Annotated[_Number, Field(gt=0), Must("a positive, finite number of seconds")]
SecondsOrZero = Annotated[_Number, Field(ge=0), Must("zero or a positive, finite number of seconds")]
Share = Annotated[_Number, Field(gt=0, le=1), Must("a share, more than 0 and at most 1")]
Count = Annotated[_Whole, Field(gt=0), Must("a positive number without a fraction")]
Bytes = Annotated[_Whole, Field(gt=0), Must("a positive number of bytes, without a fraction")]
Milliseconds = Annotated[_Whole, Field(ge=0), Must("zero or a positive number of milliseconds, without a fraction")]
Flag = Annotated[bool, Strict(), Must("True or False")]
Name = Annotated[str, Strict(), Field(min_length=1), Must("a text that is not empty", "text")]
HeaderNames = Annotated[Collection[str], PlainValidator(_header_names), Must('names of headers, as in ["x-api-key"]')]
Rebuilds = Annotated[
    Rehydrate, AfterValidator(_async_function), Must("an async function that takes a Connection", "nothing")
]


# ---- the settings


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How a request is answered, and where its handler runs."""

    answer: Answer = "auto"
    window: SecondsOrZero = 0.5
    """How long a silent handler may take before its request is promoted to a stream."""
    retry_interval: Milliseconds = 1000
    """After which a client whose stream was closed is to come back."""
    ping_interval: Seconds = 15.0
    """Between comments on a silent stream, which keep proxies from closing it."""
    placement: Placement = "any"
    rehydrate: Rebuilds | None = None
    """Builds what an owner holds of a session anew, on the node that takes its place."""
    relay_headers: HeaderNames = ()
    """Headers, by their names in lower case, that handlers of a session see which one node holds, beside harmless ones:
    they are written into the log, which has to be encrypted for it."""
    relay_query: Flag = False
    """Whether these handlers see the query string: as for `relay_headers`."""
    reexecute: Literal["never", "idempotent"] = "never"
    """Whether requests of a lost node are run again on another one, where their tools are declared idempotent."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long things may take."""

    lifetime: Annotated[_Number, Field(gt=0), Must("a positive, finite number of seconds, or None")] = 1800.0
    """An idle session's expiry. `SessionManager` makes ten years of None."""
    unconfirmed_lifetime: Seconds | None = 60.0
    """How long a session lives that was opened and not used yet: until `notifications/initialized` or its first
    successful request. None for as long as any other."""
    unattended_timeout: Seconds | None = None
    """How long a handler that works on after its client left keeps the session, from the client's last sign. None, and
    whatever is less, for as long as an idle session lives."""
    server_request_timeout: Seconds = 3600.0
    """How long a handler waits for the client's reply to a server request, if it does not say so itself."""
    connection_lifetime: Seconds = 86_400.0
    """After so long a stream's connection is closed, with a hint to come back, and no longer shows that its client is
    there: a client that does not read never comes back."""
    send_timeout: Seconds = 30.0
    """A client that takes nothing for so long is cut off."""
    receive_timeout: Seconds = 60.0
    """A client whose request has not arrived whole after so long is cut off."""
    grace: SecondsOrZero = 20.0
    """How long a drain lets running requests finish."""
    lease: Seconds = 12.0
    """How long a node that is not heard of counts as alive."""
    max_stall: Seconds = 60.0
    """How long the event loop may hang, in a blocking tool say, before the node gives up its lease."""

    @property
    def first_lifetime(self) -> float:
        """The lifetime of a session that was just opened, in seconds."""
        return self.lifetime if self.unconfirmed_lifetime is None else min(self.unconfirmed_lifetime, self.lifetime)

    @property
    def confirms(self) -> bool:
        """Whether a session gets its full lifetime only once it is used."""
        return self.first_lifetime < self.lifetime


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """How many sessions there may be, and what one of them may hold (P10)."""

    max_sessions: Count | None = 10_000
    """Live sessions in the store."""
    max_sessions_per_principal: Count | None = 1000
    """Live sessions in the store of one authenticated principal."""
    max_streams: Count = 128
    """Requests of one session that run on this node at once; and of its GETs, those that resume a request's stream."""
    max_listeners: Count = 32
    """GETs of one session that are connections to its standalone stream on this node."""
    max_log_events: Count = 10_000
    max_log_bytes: Bytes = 16 * 1024 * 1024
    """A session's log; over it, finished streams and then the standalone stream's oldest events are dropped."""
    max_subscriptions: Count = 1000
    """Resources that one session is subscribed to."""
    max_state_bytes: Bytes = 1024 * 1024
    """Session state of one session, names and values: every request of the session loads it."""
    max_state_records: Count | None = 100_000
    """Values that FastMCP keeps outside of sessions, in the store: of `UserSession`, say. Each has its record."""
    max_state_records_per_principal: Count | None = 1000
    """Such values of one authenticated principal."""
    max_initialize_bytes: Bytes = 64 * 1024
    """What a client says of itself when it opens a session, which the record keeps."""

    def session_limits(self, principal: bytes) -> dict[str, int]:
        """The groups that a session of this principal is counted in, and how many each may hold."""
        limits: dict[str, int] = {}
        if principal and self.max_sessions_per_principal is not None:
            limits[principal_group(principal)] = self.max_sessions_per_principal
        if self.max_sessions is not None:
            limits[EVERYBODY] = self.max_sessions
        return limits


@dataclass(frozen=True, kw_only=True)
class NodeLimits:
    """What a node does at once, and what it takes of one request (P10)."""

    max_principal_share: Share = 0.5
    """The share of this node's places that one authenticated principal may have."""
    max_streams_per_node: Count = 4096
    """Requests, of all sessions, that run on this node at once or whose answers are on their way out."""
    max_listeners_per_node: Count = 4096
    """GETs, of all sessions, that are open on this node."""
    max_json_depth: Count = 64
    """Levels of a message's JSON."""
    max_header_bytes: Bytes = 32 * 1024
    """All headers of a request together."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """How servers, nodes and sessions are told apart, and shown."""

    namespace: Name | None = None
    """With the endpoint: whose sessions these are. None for the server's name."""
    node_name: Name | None = None
    """In logs and in the store. None for `$NONSTICK_NODE`, or the host's name and the process id."""
    node_header: Flag = False
    """Whether every answer has the node's name in the header `nonstick-node`."""
    trace_session_ids: Literal["hashed", "raw"] = "hashed"
    """What FastMCP's spans say of a session: 12 characters of its hash, as the logs do; or the id, which opens it."""


@dataclass(frozen=True, kw_only=True)
class Settings(Answering, Times, SessionLimits, NodeLimits, Names):
    """All that can be set. `settings_of` checks it."""


# ---- as arguments


class _Answering(TypedDict, total=False):
    answer: Answer
    window: float
    ping_interval: float
    placement: Placement
    rehydrate: Rehydrate | None
    relay_headers: Collection[str]
    relay_query: bool
    reexecute: Literal["never", "idempotent"]


class _Times(TypedDict, total=False):
    unconfirmed_lifetime: float | None
    unattended_timeout: float | None
    server_request_timeout: float
    connection_lifetime: float
    send_timeout: float
    receive_timeout: float
    grace: float
    lease: float
    max_stall: float


class _SessionLimits(TypedDict, total=False):
    max_sessions_per_principal: int | None
    max_streams: int
    max_listeners: int
    max_log_events: int
    max_log_bytes: int
    max_subscriptions: int
    max_state_bytes: int
    max_state_records: int | None
    max_state_records_per_principal: int | None
    max_initialize_bytes: int


class _NodeLimits(TypedDict, total=False):
    max_principal_share: float
    max_streams_per_node: int
    max_listeners_per_node: int
    max_json_depth: int
    max_header_bytes: int


class _Names(TypedDict, total=False):
    namespace: str | None
    node_name: str | None
    node_header: bool
    trace_session_ids: Literal["hashed", "raw"]


class Options(_Answering, _Times, _SessionLimits, _NodeLimits, _Names, total=False):
    """nonstick's own arguments of `nonstick.app`, `nonstick.adopt` and `SessionManager`. See `Settings`."""

    encryption_keys: Collection[str | bytes] | None
    """No setting, because it is a secret: the store is wrapped in an `EncryptedStore`."""


def arguments_of(door: Callable[..., object]) -> list[str]:
    """The names of all arguments of a function that takes `Options`."""
    named = [one.name for one in inspect.signature(door).parameters.values() if one.kind is not one.VAR_KEYWORD]
    return [*named, *sorted(Options.__optional_keys__)]


def said_as(name: str, door: Callable[..., object]) -> SaidAs:
    """How a command line says this argument of a function that takes `Options`."""
    settings = {OF_THE_SDK.get(field.name, field.name): field.name for field in fields(Settings)}
    if name in settings:
        return must(settings[name]).said_as
    # A default that is a number or a truth value shows what such an argument takes; others take objects.
    one = inspect.signature(door).parameters.get(name)
    return "json" if one is not None and isinstance(one.default, int | float) else "nothing"


def check_arguments(given: Iterable[str], door: Callable[..., object], called: str) -> None:
    """Returns if a function that takes `Options` has arguments of these names.

    Args:
        called: The function's name in the message.

    Raises:
        ConfigurationError: The function has no argument of that name. The message says which one was probably meant,
            or all that there are.
    """
    unknown = next((name for name in given if name not in Options.__optional_keys__), None)
    if unknown is None:
        return
    if unknown in OF_THE_SDK:
        raise ConfigurationError(f"{unknown} is no option: give {OF_THE_SDK[unknown]}= to {called}")
    known = arguments_of(door)
    meant = close_to(unknown, known)
    hint = f"did you mean {meant}?" if meant else f"there are: {', '.join(known)}"
    raise ConfigurationError(f"unknown option {unknown!r} of {called}: {hint}")


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings with these values, and the defaults of all others.

    Args:
        given: Values by names of settings, such that are there.

    Raises:
        ConfigurationError: A value is not what its setting must be, or two do not go together.
    """
    try:
        settings = _adapter().validate_python(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), ConfigurationError):
            raise cause from None
        name = str(first["loc"][0])
        must_be = f"{OF_THE_SDK.get(name, name)} must be {must(name).be}"
        raise ConfigurationError(f"{must_be}, not {_shown(given[name])}") from None
    _check_together(settings)
    return settings


@cache
def must(name: str) -> Must:
    """What the value of this setting must be."""
    return _must(get_type_hints(Settings, include_extras=True)[name])


def _must(hint: Any) -> Must:
    for one in get_args(hint):
        if isinstance(one, Must):
            return one
    if isinstance(get_args(hint)[0], str):
        return Must(f"one of {', '.join(get_args(hint))}", "text")
    found = _must(get_args(hint)[0])
    return found._replace(be=f"{found.be}, or None")


@cache
def _adapter() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)


def _shown(value: object) -> str:
    """A refused value, as a message shows it: a long text or an object by its kind alone, for it may be a secret."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"a text of {len(value)} characters"
    return (
        repr(value)
        if value is None or isinstance(value, bool | int | float)
        else f"a value of type {type(value).__name__}"
    )


_SHOWN: Final = 20


def _check_together(settings: Settings) -> None:
    if settings.rehydrate is not None and settings.placement != "owner":
        raise ConfigurationError('rehydrate= builds what an owner holds anew: it needs placement="owner"')
    if settings.reexecute == "idempotent" and settings.placement == "owner":
        raise ConfigurationError('reexecute="idempotent" does not go with placement="owner": what it ran on is gone')
