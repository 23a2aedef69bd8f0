"""The access log of `nonstick serve`: a line is written at once where the log of the process alone would show it.

What uvicorn says of a request goes through `logging` otherwise, as a record that others may see, change or drop. So it
does here too while anybody has put anything in its way: a handler, a filter, a record factory, a patch.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from nonstick.commands.log_format import Lines
from nonstick.protocols import Draining

__all__ = ["ACCESS", "AccessLog", "Logged"]


def _steps() -> tuple[object, ...]:
    """What a record passes in `logging`. Error trackers put functions of their own there."""
    logger = logging.Logger
    return (logger.makeRecord, logger.handle, logger.callHandlers, logging.getLogRecordFactory())


def _is_own(step: object) -> bool:
    return getattr(step, "__module__", "") == "logging" and not hasattr(step, "__wrapped__")


_OWN_STEPS: Final = _steps() if all(map(_is_own, _steps())) else ()
"""The standard library's; none if somebody was there before this module."""


class AccessLog(logging.Logger):
    """What uvicorn takes for its access logger. Says what that would say, in fewer steps where nobody can tell."""

    def __init__(self) -> None:
        super().__init__("uvicorn.access")
        self._shared = logging.getLogger(self.name)

    @property
    def is_wanted(self) -> bool:
        """Whether lines are shown."""
        return self._shared.isEnabledFor(logging.INFO)

    def info(self, msg: object, *args: Any, **more: Any) -> None:
        """Shows a line, which uvicorn gives as client, method, path with query, HTTP version and status."""
        lines = self._alone()
        if lines is None or len(args) != 5 or type(args[4]) is not int or more:
            self._shared.info(msg, *args, **{"stacklevel": 2, **more})
        elif self.is_wanted:
            client, method, path, _, status = args
            try:
                lines.write_access(client, method, path, status)
            except Exception:
                lines.handleError(self._shared.makeRecord(self.name, logging.INFO, "", 0, msg, args, None))

    def _alone(self) -> Lines | None:
        """Our handler, if a record would meet nothing else on its way."""
        logger, root = self._shared, logging.root
        if logger.filters or _steps() != _OWN_STEPS:
            return None
        while logger is not root:
            if logger.handlers or not logger.propagate or logger.parent is None:
                return None
            logger = logger.parent
        handlers = root.handlers
        if len(handlers) == 1 and isinstance(lines := handlers[0], Lines) and lines.is_plain:
            return lines
        return None


ACCESS: Final = AccessLog()


class Logged(Draining):
    """The protocol of `nonstick serve`, whose requests stand in its access log."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.access_logger = ACCESS

    @property
    def access_log(self) -> bool:
        """Whether a request's line is to be made, which uvicorn asks for each."""
        return self._has_handlers and ACCESS.is_wanted

    @access_log.setter
    def access_log(self, value: bool) -> None:
        self._has_handlers = value
