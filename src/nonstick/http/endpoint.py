"""One MCP endpoint: of several servers on one store, each gives its own session ids and serves no others (P1)."""

from __future__ import annotations

import logging

from nonstick.core.names import identity, is_session_id, is_session_of, new_session_id, session_key
from nonstick.errors import SessionNotFound

__all__ = ["Endpoint"]

logger = logging.getLogger(__name__)


class Endpoint:
    """One MCP endpoint of one server, the same on every replica.

    Args:
        namespace: The server's name, or what was given instead of it.
        path: What tells this endpoint from others of the same server.
    """

    def __init__(self, namespace: str, path: str) -> None:
        self.namespace = namespace
        self.path = path
        self._server = identity(namespace, path)
        self._met_stranger = False

    def key(self, session_id: str) -> str:
        """The name of this session in the store.

        Raises:
            SessionNotFound: This can be no id of a session of this server: the store need not be asked.
        """
        if not is_session_of(self._server, session_id):
            self._warn_of_stranger(session_id)
            raise SessionNotFound
        return session_key(session_id)

    def new_session_id(self) -> str:
        """The id of a session that is to be opened at this endpoint."""
        return new_session_id(self._server)

    def _warn_of_stranger(self, session_id: str) -> None:
        """Once: replicas that do not agree on what server they are would send every client away."""
        if not self._met_stranger and is_session_id(session_id):
            self._met_stranger = True
            logger.warning(
                "a request named a session that was not opened at this server, which is %r at %r. If a replica opened "
                "it, give all of them the same name, or the same namespace=",
                self.namespace,
                self.path,
            )
