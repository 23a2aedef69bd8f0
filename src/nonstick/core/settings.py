"""What can be set: of one MCP endpoint, on every node the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

from mcp.server.connection import Connection

from nonstick.core.principals import principal_group

__all__ = ["EVERYBODY", "SEND_TIMEOUT", "Answer", "Options", "Rehydrate", "Settings"]

Answer = Literal["auto", "sse", "json"]
"""How requests are answered: `auto` JSON if the handler ends soon and silently, else a stream; `sse` always a stream;
`json` never."""

Rehydrate = Callable[[Connection], Awaitable[None]]
"""Builds what a session holds anew on the node that takes it: fills `Connection.state`, owes to `exit_stack`."""

EVERYBODY: Final = "all"
"""The group that every session is counted in."""

SEND_TIMEOUT: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set. Times are in seconds, unless said otherwise."""

    answer: Answer = "auto"
    window: float = 0.5
    """How long a silent handler may take before its request is promoted to a stream."""
    lifetime: float = 1800.0
    """An idle session's expiry."""
    retry_interval: int = 1000
    """Milliseconds after which a client whose stream was closed is to come back."""
    max_sessions: int | None = 10_000
    """Live sessions in the store."""
    max_sessions_per_principal: int | None = 1000
    """Live sessions in the store of one authenticated principal."""
    unconfirmed_lifetime: float | None = 60.0
    """How long a session lives that was opened and not used yet: until `notifications/initialized` or its first
    successful request. None for as long as any other."""
    unattended_timeout: float | None = None
    """How long a handler that works on after its client left keeps the session, from the client's last sign. None, and
    whatever is less, for as long as an idle session lives."""
    server_request_timeout: float = 3600.0
    """How long a handler waits for the client's reply to a server request, if it does not say so itself."""
    connection_lifetime: float = 86_400.0
    """After so long a stream's connection is closed, with a hint to come back, and no longer shows that its client is
    there: a client that does not read never comes back."""
    max_principal_share: float = 0.5
    """The share of this node's places that one authenticated principal may have."""
    max_streams: int = 128
    """Requests of one session that run on this node at once; and of its GETs, those that resume a request's stream."""
    max_streams_per_node: int = 4096
    """Requests, of all sessions, that run on this node at once or whose answers are on their way out."""
    max_listeners: int = 32
    """GETs of one session that are connections to its standalone stream on this node."""
    max_listeners_per_node: int = 4096
    """GETs, of all sessions, that are open on this node."""
    max_log_events: int = 10_000
    max_log_bytes: int = 16 * 1024 * 1024
    """A session's log; over it, finished streams and then the standalone stream's oldest events are dropped."""
    max_json_depth: int = 64
    max_header_bytes: int = 32 * 1024
    """All headers of a request together."""
    max_subscriptions: int = 1000
    """Resources that one session is subscribed to."""
    max_state_bytes: int = 1024 * 1024
    """Session state of one session, names and values: every request of the session loads it."""
    max_state_records: int | None = 100_000
    """Values that FastMCP keeps outside of sessions, in the store: of `UserSession`, say. Each has its record."""
    max_state_records_per_principal: int | None = 1000
    """Such values of one authenticated principal."""
    max_initialize_bytes: int = 64 * 1024
    """What a client says of itself when it opens a session, which the record keeps."""
    send_timeout: float = SEND_TIMEOUT
    """A client that takes nothing for so long is cut off."""
    receive_timeout: float = 60.0
    """A client whose request has not arrived whole after so long is cut off."""
    ping_interval: float = 15.0
    """Between comments on a silent stream, which keep proxies from closing it."""
    grace: float = 20.0
    """How long a drain lets running requests finish."""
    lease: float = 12.0
    """How long a node that is not heard of counts as alive."""
    max_stall: float = 60.0
    """How long the event loop may hang, in a blocking tool say, before the node gives up its lease."""
    placement: Literal["any", "stateless", "owner"] = "any"
    """Which nodes serve a session: any; there are none; or the one that opened it, which others relay to."""
    rehydrate: Rehydrate | None = None
    """Builds what an owner holds of a session anew, on the node that takes its place."""
    relay_headers: Collection[str] = ()
    """Headers, by their names in lower case, that handlers of a session see which one node holds, beside harmless ones:
    they are written into the log, which has to be encrypted for it."""
    relay_query: bool = False
    """Whether these handlers see the query string: as for `relay_headers`."""
    trace_session_ids: Literal["hashed", "raw"] = "hashed"
    """What FastMCP's spans say of a session: 12 characters of its hash, as the logs do; or the id, which opens it."""
    reexecute: Literal["never", "idempotent"] = "never"

    @property
    def first_lifetime(self) -> float:
        """The lifetime of a session that was just opened."""
        return self.lifetime if self.unconfirmed_lifetime is None else min(self.unconfirmed_lifetime, self.lifetime)

    @property
    def confirms(self) -> bool:
        """Whether a session gets its full lifetime only once it is used."""
        return self.first_lifetime < self.lifetime

    def session_limits(self, principal: bytes) -> dict[str, int]:
        """The groups that a session of this principal is counted in, and how many each may hold (P10)."""
        limits: dict[str, int] = {}
        if principal and self.max_sessions_per_principal is not None:
            limits[principal_group(principal)] = self.max_sessions_per_principal
        if self.max_sessions is not None:
            limits[EVERYBODY] = self.max_sessions
        return limits


class Options(TypedDict, total=False):
    """nonstick's own settings, for `nonstick.app` and `SessionManager`. See `Settings` for defaults and units."""

    answer: Answer
    window: float
    max_sessions_per_principal: int | None
    unconfirmed_lifetime: float | None
    unattended_timeout: float | None
    server_request_timeout: float
    connection_lifetime: float
    max_principal_share: float
    max_streams: int
    max_streams_per_node: int
    max_listeners: int
    max_listeners_per_node: int
    max_log_events: int
    max_log_bytes: int
    max_json_depth: int
    max_header_bytes: int
    max_subscriptions: int
    max_state_bytes: int
    max_state_records: int | None
    max_state_records_per_principal: int | None
    max_initialize_bytes: int
    send_timeout: float
    receive_timeout: float
    ping_interval: float
    grace: float
    lease: float
    max_stall: float
    placement: Literal["any", "stateless", "owner"]
    rehydrate: Rehydrate | None
    relay_headers: Sequence[str]
    relay_query: bool
    trace_session_ids: Literal["hashed", "raw"]
    reexecute: Literal["never", "idempotent"]
    node_name: str | None
    node_header: bool
    namespace: str | None
    encryption_keys: Sequence[str | bytes] | None
