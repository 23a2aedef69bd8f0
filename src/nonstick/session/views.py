"""The views of sessions on one node: those that live, and the latest that rest.

A view in which nothing runs is *parked* for the session's next request, if its record alone would make the same again.
It is no live view: nothing is done for its session, nothing of the session is known by it, and the store is asked as
without it. A parked view is brought up to date from the record like any other, or made anew if it is not as the
record says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mcp.server.connection import Connection

from nonstick.core.record import Record
from nonstick.session.connection import is_introduced
from nonstick.session.live import LiveSession
from nonstick.session.runner import Runner
from nonstick.store import Loaded

__all__ = ["SessionViews"]

_MOST: Final = 256
"""Views that are parked. Each takes some KiB: only those with a short record are."""


class SessionViews(dict[str, LiveSession]):
    """The live views, each by its session's key; and the parked ones, which are not in the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        # The oldest first.
        self._parked: dict[str, LiveSession] = {}
        self._parked_before: dict[str, LiveSession] = {}

    @property
    def parked(self) -> list[str]:
        """The keys of the sessions whose views are parked, the one that was used least recently first."""
        return [*self._parked_before, *self._parked]

    def decode(self, key: str, fields: Mapping[str, bytes]) -> Record:
        """The session's record, of which these are the fields.

        Raises:
            StoreUnavailable: As `Record.from_fields`.
        """
        view = self.get(key) or self._parked.get(key) or self._parked_before.get(key)
        if view is not None and (known := view.loaded) is not None and known[0] == fields:
            return known[1]
        return Record.from_fields(fields)

    def take(self, key: str, loaded: Loaded, record: Record) -> LiveSession | None:
        """The view that is there of a session, as its record is now. One that was parked lives from now on."""
        view = self.get(key)
        if view is None:
            view = self._unpark(key)
            if view is None:
                return None
            # Something that began in it may have gone on, and the record may be an older one than it was.
            as_recorded = _is_as_recorded(view) and loaded.head >= view.log.head
            if not as_recorded or (not record.initialized and view.connection.initialized.is_set()):
                _drop(view)
                return None
            self[key] = view
            if record is view.record:
                view.log.refresh(loaded)
                return view
        view.refresh(loaded, record)
        return view

    def park(self, view: LiveSession) -> bool:
        """Keeps this view, in which nothing runs, for the session's next request, if it may be kept. Whether it was."""
        key = view.key
        if self.get(key) is not view or not _is_as_recorded(view):
            return False
        del self[key]
        view.log.rest()
        self._parked[key] = view
        if len(self._parked) + len(self._parked_before) > _MOST:
            oldest = self._parked_before or self._parked
            _drop(oldest.pop(next(iter(oldest))))
        return True

    def forget(self, view: LiveSession) -> None:
        """This view is none of a session that lives here any more."""
        key = view.key
        for views in (self, self._parked, self._parked_before):
            if views.get(key) is view:
                del views[key]

    def forget_parked(self, key: str) -> None:
        """There is no such session any more."""
        view = self._unpark(key)
        if view is not None:
            _drop(view)

    def _unpark(self, key: str) -> LiveSession | None:
        return self._parked.pop(key, None) or self._parked_before.pop(key, None)

    def age(self) -> None:
        """Drops the parked views that were not used since this was called before."""
        old, self._parked_before, self._parked = self._parked_before, self._parked, {}
        for view in old.values():
            _drop(view)


def _is_as_recorded(view: LiveSession) -> bool:
    """Whether a view that is made from the record alone would be the same: nothing is kept here, or waits.

    Then nobody can tell whether a request gets this view or another one.
    """
    own, state = vars(view), view.state
    connection: Connection | None = own.get("connection")
    return (
        view.loaded is not None
        and connection is not None
        and connection.state is state
        and not (view.users or view.ended or view.exchanges)
        and view.pin is None
        and view.opening is None
        and "inbox" not in own
        and "backchannel" not in own
        and "follower" not in vars(view.log)
        and state.is_new
        and (vars(connection) == view.as_made or _is_made(view, connection))
        and not connection.exit_stack.holds  # type: ignore[attr-defined]
    )


def _is_made(view: LiveSession, connection: Connection) -> bool:
    """Whether connection and runner are as they are made; remembers it, for as long as they are."""
    runner: Runner | None = vars(view).get("runner")
    if runner is None or not getattr(runner, "keeps_nothing", False):
        return False
    if not is_introduced(connection, view.record, view.id, view.state):
        return False
    view.as_made = dict(vars(connection))
    return True


def _drop(view: LiveSession) -> None:
    # One that is in use parts when that ends.
    if not view.users:
        view.part()
