"""The stream of a request that runs here: the log has each message before the request's client gets it (P3)."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import pydantic_core
from mcp_types import JSONRPCRequest

from nonstick.core.event_ids import EventId
from nonstick.core.events import Kind, draft
from nonstick.core.jsonrpc import LONGEST_METHOD, error_body
from nonstick.core.names import new_attempt
from nonstick.core.refusals import STREAM_LOST
from nonstick.errors import Diverged, Fenced, SessionNotFound, StoreUnavailable, StreamClosed, without_text
from nonstick.log.trim import Hold
from nonstick.log.writer import Writer
from nonstick.session import ending
from nonstick.session.answer import Answer
from nonstick.session.live import LiveSession
from nonstick.store import NEW_STREAM, Appended, Cursor, Draft

__all__ = ["Stream"]

logger = logging.getLogger(__name__)

_UNSENT: Final = 1000
_UNSENT_BYTES: Final = 1024 * 1024
"""Messages of one request that wait for a store that is away; beyond that the oldest are dropped."""

_RETRY_PAUSE: Final = 1.0
"""Seconds between two tries to write a stream's end."""


class Stream:
    """One request's stream, from its first append to its terminal event.

    Args:
        answer: Is given what the store acknowledged.

    Attributes:
        lock: Held by the task that appends, which is not to be cancelled while it does.
        position: Of the stream's first event, which names the stream; 0 until the store acknowledged it.
        attempt: The attempt at the stream whose appends the store takes from here.
        first_attempt: The attempt at which the request was run first.
        hold: Room in the log for the request, which is kept there whole. Released with the first append.
        trace: What traces the request, if the log is to keep that.
        is_lost: The store lost events of it.
    """

    def __init__(self, session: LiveSession, message: JSONRPCRequest, answer: Answer, hold: Hold | None = None) -> None:
        self.lock = asyncio.Lock()
        self.position = 0
        self.attempt = self.first_attempt = new_attempt()
        self.trace: dict[str, str] = {}
        self.is_lost = False
        self._session = session
        self._message = message
        self._answer = answer
        self.hold = hold
        self._writer = Writer(session.log.append)
        self._unsent: deque[Draft] = deque(maxlen=_UNSENT)

    @property
    def is_begun(self) -> bool:
        """Whether the log has something of it, or may have."""
        return self.position > 0 or self._writer.in_doubt is not None

    @property
    def is_in_doubt(self) -> bool:
        """Whether the store did not acknowledge the last append."""
        return self._writer.in_doubt is not None

    async def take_over(self, position: int, attempt: int, *, first: int) -> bool:
        """As `Exchange.take_over`."""
        writer, patience = self._writer, self._session.services.store.patience
        self.position, self.attempt, self.first_attempt = position, attempt + 1, first
        try:
            if writer.in_doubt is not None:
                await writer.repeat(patience=patience)
            else:
                body = {"node": self._session.services.node_id, "attempt": self.attempt}
                taken = draft(Kind.TAKEN, pydantic_core.to_json(body))
                await writer.write([taken], stream=position, attempt=attempt, take_over=True, patience=patience)
        except (StreamClosed, Fenced):
            return False
        return True

    async def append(
        self,
        drafts: Sequence[Draft],
        *,
        terminal: bool = False,
        expect: Sequence[str] = (),
        fields: Mapping[str, bytes | None] | None = None,
    ) -> None:
        """Appends to the stream, which the first append opens, and gives what was acknowledged to the answer.

        Only under `lock`, and never cancelled. What is in doubt is repeated first. What cannot be appended because
        the store is away is kept for the next append, unless somebody waits to hear of it.

        Raises:
            SessionNotFound, StoreUnavailable: As `Store.append`.
            StreamClosed, Fenced: Another node ended the stream.
            Diverged: The store lost events of the stream.
        """
        writer = self._writer
        try:
            if writer.in_doubt is not None:
                doubted = writer.in_doubt
                try:
                    self._give(doubted.events, await writer.repeat())
                except StoreUnavailable:
                    if not expect and not terminal:
                        self._keep(drafts)
                    raise
                if doubted.terminal:
                    return
            opens = not self.position
            events = [*([self._opened()] if opens else []), *self._unsent, *drafts]
            self._unsent.clear()
            if events:
                appended = await writer.write(
                    events,
                    stream=NEW_STREAM if opens else self.position,
                    attempt=self.attempt,
                    terminal=terminal,
                    expect=expect,
                    fields=fields,
                )
                self._give(events, appended)
        except Diverged:
            # A client that read on would not know what is missing. The request ends here, by a new writer (P9).
            logger.warning("session %s: the store lost events of a request's stream", self._session.key[:12])
            self.is_lost = True
            writer.forget()
            raise

    def _keep(self, drafts: Sequence[Draft]) -> None:
        """Keeps these until the store is back, and of all that are kept the latest."""
        self._unsent.extend(drafts)
        size = sum(len(draft.data) for draft in self._unsent)
        while size > _UNSENT_BYTES:
            size -= len(self._unsent.popleft().data)

    def _give(self, events: Sequence[Draft], appended: Appended) -> None:
        """The store acknowledged these: the client gets them."""
        if not self.position:
            self.position = appended.first
            self._answer.begin_stream()
            if self.hold is not None:
                self.hold.release()
        for offset, event in enumerate(events):
            kind = event.data[1]
            if kind in (Kind.MESSAGE, Kind.TERMINAL, Kind.OPENED):
                cursor = Cursor(appended.first + offset, event.tag)
                event_id = EventId(self.position, cursor, self._message.id).seal(self._session.id)
                if kind == Kind.OPENED:
                    self._answer.prime(event_id)
                else:
                    self._answer.put(event_id, event.data[2:])

    def _opened(self) -> Draft:
        message = self._message.model_dump(mode="json", by_alias=True, exclude_unset=True)
        services = self._session.services
        body = {"node": services.node_id, "attempt": self.attempt, "request": message}
        if services.settings.reexecute == "never":
            # Nobody needs its arguments again, which may be long (P10), and secret.
            name = (self._message.params or {}).get("name")
            message["params"] = {"name": name[:LONGEST_METHOD]} if isinstance(name, str) else {}
            body["partial"] = True
        elif self.trace:
            body["trace"] = self.trace
        return draft(Kind.OPENED, pydantic_core.to_json(body))

    async def end(self, body: bytes, fields: Mapping[str, bytes | None], news: Sequence[Draft] = ()) -> None:
        """Appends the terminal event. Waits as long as it must for the store: without it no resume would end.

        Only under `lock`. Should the store have lost events of the stream, the terminal event says so.

        Raises:
            SessionNotFound, StreamClosed, Fenced: As `append`. The end is another's to tell.
        """
        terminal = draft(Kind.TERMINAL, body)
        while True:
            try:
                await self.append([*news, terminal], terminal=True, fields=fields)
                break
            except Diverged:
                terminal = draft(Kind.TERMINAL, error_body(self._message.id, STREAM_LOST))
            except StoreUnavailable:
                await asyncio.sleep(_RETRY_PAUSE)
            except (SessionNotFound, StreamClosed, Fenced):
                raise
            except Exception as error:
                # A defect of the store's, maybe with what it was to write: the end alone is tried, as another writer.
                logger.error("the end of a stream could not be written", exc_info=without_text(error))
                terminal, news, fields = draft(Kind.TERMINAL, error_body(self._message.id, ending.UNTOLD)), (), {}
                self._writer.forget()
                await asyncio.sleep(_RETRY_PAUSE)
        self._answer.give(body)
