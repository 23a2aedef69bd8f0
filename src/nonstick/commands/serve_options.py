"""What the command line of `nonstick serve` said."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from nonstick.commands.log_format import Format
from nonstick.core.settings import Answer, Placement, Settings

__all__ = ["DEFAULT_STORE", "ServeOptions"]

DEFAULT_STORE: Final = "sqlite:///.nonstick/sessions.db"
"""A file in the working directory: all processes that are started there share it."""

_VARIABLE: Final = "NONSTICK_SERVE"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `nonstick serve`. Those that are settings have the settings' defaults."""

    target: str
    store: str
    host: str = "127.0.0.1"
    port: int = 8000
    path: str = "/mcp"
    workers: int = 1
    reload: bool = False
    answer: Answer = Settings.answer
    placement: Placement = Settings.placement
    grace: float = Settings.grace
    lease: float = Settings.lease
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """What `--set` gave, by the names of arguments of `nonstick.app`."""
    log_format: Format = "text"
    log_level: str = "info"

    def hand_over(self) -> None:
        """Leaves these options for the processes that this one will start, where no list of processes shows them."""
        os.environ[_VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def handed_over(cls) -> ServeOptions:
        """The options that the parent process left."""
        return cls(**json.loads(os.environ[_VARIABLE]))
