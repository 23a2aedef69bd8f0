"""What uvicorn runs of ours: an HTTP protocol that drains when its server stops, and an event loop that does first."""

from nonstick.protocols.draining import Draining
from nonstick.protocols.loop import Loop

__all__ = ["Draining", "Loop"]
