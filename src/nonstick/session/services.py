"""What a node gives to all that runs on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from nonstick.core.settings import Settings
from nonstick.log.cluster_log import ClusterLog
from nonstick.log.guard import GuardedStore
from nonstick.log.session_log import Logs
from nonstick.session.quotas import Quota
from nonstick.session.runner import Runner
from nonstick.waiting.deadline import Deadline
from nonstick.waiting.tasks import Tasks

__all__ = ["DrainState", "Owners", "Reading", "Served", "Services", "Views"]


@dataclass(frozen=True, slots=True)
class Served:
    """The server that the node runs.

    Attributes:
        new_runner: Makes what runs the requests of a session, for the session's live view.
        identity: What the cluster knows it by.
    """

    new_runner: Callable[[Any], Runner]
    identity: str


class Views(Protocol):
    """The sessions' live views on this node, each by its session's key."""

    def get(self, key: str, /) -> object: ...

    def __setitem__(self, key: str, view: Any, /) -> None: ...

    def forget(self, view: Any, /) -> None:
        """This view is none of a session that lives here any more."""
        ...

    def park(self, view: Any, /) -> bool:
        """Keeps this view, in which nothing runs, for the session's next request, if it may be kept. Whether it was."""
        ...


class Reading(Protocol):
    """A client's connection that reads a stream on this node."""

    stays: bool
    """Its client could not come back, so that a drain waits for its end."""
    began: float
    """In the loop's time."""

    @property
    def key(self) -> str:
        """Of its session."""
        ...

    def shows_client(self, now: float) -> bool:
        """Whether the client is there, as far as its connection tells."""
        ...

    def hand_over(self) -> None:
        """The node stops: the client is told to come back, and the connection is closed (P8)."""
        ...

    def cut_off(self) -> None:
        """The grace period is over: one that `stays` ends now."""
        ...


class DrainState(Protocol):
    """How far this node's drain has come (P8)."""

    begun: bool
    """Other nodes are to take what comes."""
    until_closing: dict[Deadline, None]
    """What waits for somebody else, and ends when the grace period does: requests that arrive, responses that are taken
    slowly, GETs that are being prepared."""

    @property
    def is_closing(self) -> bool:
        """The grace period is over: what began now would be ended at once."""
        ...

    def left(self) -> None:
        """A request, or the handler of a notification, has finished."""
        ...

    async def next_to_leave(self) -> None:
        """Waits until a request, or the handler of a notification, has finished."""
        ...


class Owners(Protocol):
    """Which node holds a session, where one does (`placement="owner"`). Sessions are named by their keys."""

    def opening_fields(self) -> dict[str, bytes]:
        """What the record of a session that is opened here says of its owner."""
        ...

    def opened(self, key: str, /) -> None:
        """The session is in the store: if it is to have an owner, this node is it."""
        ...

    async def is_owned(self, key: str, /) -> bool:
        """Whether this session has, or is to have, an owner.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.load`.
        """
        ...

    async def settle(self, key: str, /, *, gone: str = "") -> None:
        """Sees to a session that nobody holds: has it built anew on this node if it can be, else ends it.

        Args:
            gone: A node that is known to be dead.

        Raises:
            SessionNotFound, StoreUnavailable: As the store's methods.
        """
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Services:
    """What runs on a node has these from it, and knows nothing else of it."""

    node_id: str
    """The name of the process, and a random incarnation."""
    served: Served
    store: GuardedStore
    settings: Settings
    tasks: Tasks
    drain: DrainState
    views: Views
    readers: set[Reading] = field(default_factory=set[Reading])
    requests: Quota
    """Requests, of all sessions, that run on this node or whose answers are on their way out."""
    logs: Logs
    cluster_log: ClusterLog
    owners: Owners = field(init=False)
    """Set once, by the node, after the services are made: what holds sessions needs them itself."""
