"""Judges a recorded history: what clients sent and got, and what the tools ran, against the promises. Pure.

A *call* is one request to a tool, named by a label that is used nowhere else. What the tool says carries the token
`label:attempt:step`, so that a message that strays is known by its text. A *chain* is everything that a client
received of one stream over all of its connections, each of which went on after the last event id that it had; the
chain of a call is named by its label, the standalone stream's by "".

What the store has lost (`Lost`) may be missing, but only where the client was told: by an error for its request, or by
404 where the session itself was lost. On the standalone stream, where no message could say so, there may be a gap.
Nothing is ever allowed to come twice, or after a gap in a request's own stream.
"""

from nonstick.testing.oracle.records import (
    Answered,
    Called,
    Caught,
    Ending,
    Fault,
    GaveUp,
    Got,
    Lost,
    Opened,
    Place,
    Ran,
    Record,
    Replayed,
    Replied,
    Restarted,
    Token,
    Vanished,
    Violation,
    token_of,
)
from nonstick.testing.oracle.verdict import judge

__all__ = [
    "Answered",
    "Called",
    "Caught",
    "Ending",
    "Fault",
    "GaveUp",
    "Got",
    "Lost",
    "Opened",
    "Place",
    "Ran",
    "Record",
    "Replayed",
    "Replied",
    "Restarted",
    "Token",
    "Vanished",
    "Violation",
    "judge",
    "token_of",
]
