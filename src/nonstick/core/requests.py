"""A request while it runs on its node, as two machines side by side: what its handler does, and how it is answered.

The rules of the handler:

- The first reason to stop it stays. A second one never replaces it, and none counts once the handler has ended.
- A handler that was told to stop may be abandoned: the request's end is then told without it. A handler that nobody
  told to stop is not.
- The request's last word follows from where the handler was when it ended or was abandoned, and from nothing else.
- The end is told once. To the end, whatever happens changes nothing.

The rules of the answer:

- It is a body, a refusal or a stream, and what it is once, it remains: the response's head has been written.
- It becomes a stream with the first append that the store acknowledged, never before.
- A stream ends once: with the result, or without one. What is refused or lost while it streams ends the stream.

Here is no clock, no loop and no store. This file does not know what asks, what waits, or what writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

__all__ = ["ANSWER", "HANDLER", "LAST_WORD", "AnswerEvent", "AnswerState", "HandlerEvent", "HandlerState", "LastWord"]


class HandlerState(IntEnum):
    """Where a request's handler is.

    All from `DONE` on are closed: the handler has no say any more.
    """

    RUNNING = 0
    CANCELLED = 1
    """It was told to stop, because its client cancelled the request."""
    FAILED = 2
    """It was told to stop, because the request ends with an error of this side."""
    FENCED = 3
    """It was told to stop, because another node has the stream."""
    ENDED = 4
    """It was told to stop, because the session ended."""
    DONE = 5
    """It has ended; the request's end is to be told."""
    ABANDONED = 6
    """It did not stop when it was told to; the request's end is told without it."""
    TOLD = 7


class HandlerEvent(IntEnum):
    """What happens to a request's handler."""

    RETURNED = 0
    """It ended, in any way."""
    CANCEL = 1
    FAIL = 2
    FENCE = 3
    SESSION_ENDED = 4
    ABANDON = 5
    TELL = 6
    """The request's end was told, or is another node's to tell."""


_STOPPED: Final[Mapping[HandlerEvent, HandlerState]] = {
    HandlerEvent.RETURNED: HandlerState.DONE,
    HandlerEvent.ABANDON: HandlerState.ABANDONED,
    HandlerEvent.TELL: HandlerState.TOLD,
}

HANDLER: Final[Mapping[HandlerState, Mapping[HandlerEvent, HandlerState]]] = {
    HandlerState.RUNNING: {
        HandlerEvent.RETURNED: HandlerState.DONE,
        HandlerEvent.CANCEL: HandlerState.CANCELLED,
        HandlerEvent.FAIL: HandlerState.FAILED,
        HandlerEvent.FENCE: HandlerState.FENCED,
        HandlerEvent.SESSION_ENDED: HandlerState.ENDED,
        HandlerEvent.TELL: HandlerState.TOLD,
    },
    HandlerState.CANCELLED: _STOPPED,
    HandlerState.FAILED: _STOPPED,
    HandlerState.FENCED: _STOPPED,
    HandlerState.ENDED: _STOPPED,
    HandlerState.DONE: {HandlerEvent.TELL: HandlerState.TOLD},
    HandlerState.ABANDONED: {HandlerEvent.TELL: HandlerState.TOLD},
    HandlerState.TOLD: {},
}
"""What follows on what. An event that is not there changes nothing."""


class LastWord(IntEnum):
    """What a request's client is told last."""

    RESULT = 0
    """What the handler returned or raised."""
    CANCELLED = 1
    """The error of a cancelled request: in this era only a response ends a request."""
    FAILURE = 2
    """The error with which this side ended the request."""
    NOT_FOUND = 3
    """The session is over: 404, or no more than the end of the stream."""
    NOTHING = 4
    """The end is another node's to tell."""


LAST_WORD: Final[Mapping[HandlerState, LastWord]] = {
    HandlerState.RUNNING: LastWord.RESULT,
    HandlerState.CANCELLED: LastWord.CANCELLED,
    HandlerState.FAILED: LastWord.FAILURE,
    HandlerState.FENCED: LastWord.NOTHING,
    HandlerState.ENDED: LastWord.NOT_FOUND,
}
"""By the state in which the handler returned, or was abandoned."""


class AnswerState(IntEnum):
    """What a request's response is."""

    OPEN = 0
    """Not decided yet."""
    STREAM = 1
    BODY = 2
    REFUSED = 3
    ENDED = 4
    """A stream that has ended, with or without the result."""


class AnswerEvent(IntEnum):
    """What decides a request's response, or ends it."""

    STREAMED = 0
    """The store acknowledged the first append of the request's stream."""
    RESULT = 1
    REFUSE = 2
    LOSE = 3
    """The stream is another node's, or lost."""
    HAND_OVER = 4
    """The client is to come back for the rest, to any node."""


ANSWER: Final[Mapping[AnswerState, Mapping[AnswerEvent, AnswerState]]] = {
    AnswerState.OPEN: {
        AnswerEvent.STREAMED: AnswerState.STREAM,
        AnswerEvent.RESULT: AnswerState.BODY,
        AnswerEvent.REFUSE: AnswerState.REFUSED,
        AnswerEvent.LOSE: AnswerState.ENDED,
    },
    AnswerState.STREAM: {
        AnswerEvent.RESULT: AnswerState.ENDED,
        AnswerEvent.REFUSE: AnswerState.ENDED,
        AnswerEvent.LOSE: AnswerState.ENDED,
        AnswerEvent.HAND_OVER: AnswerState.ENDED,
    },
    AnswerState.BODY: {},
    AnswerState.REFUSED: {},
    AnswerState.ENDED: {},
}
"""What follows on what. An event that is not there changes nothing."""
