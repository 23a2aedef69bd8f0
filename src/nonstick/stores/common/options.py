"""What the options of all stores have in common.

A mistake in a URL is told without quoting it, because it may hold a password.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from nonstick.errors import ConfigurationError, close_to

__all__ = ["checked_grace", "grace_in", "unknown_option"]

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z_.]{0,39}")
"""What is taken for an option's name; other things may be a part of a password with an unescaped '?' or '&'."""


def checked_grace(seconds: float) -> float:
    """These seconds, if they can be an `empty_grace`.

    Raises:
        ConfigurationError: They cannot.
    """
    if not 0 <= seconds < math.inf:
        raise ConfigurationError("the store's empty_grace must be a number of seconds, such as 15")
    return seconds


def grace_in(text: str) -> float:
    """The seconds that a URL gives as `empty_grace`.

    Raises:
        ConfigurationError: It gives none.
    """
    if not (text.isascii() and text.replace(".", "", 1).isdigit()):
        raise ConfigurationError("empty_grace in the store URL must be a number of seconds, such as 15")
    return float(text)


def unknown_option(name: str, known: Iterable[str], advice: str = "") -> ConfigurationError:
    """What to raise for an option that does not exist."""
    names = list(known)
    close = close_to(name, names)
    shown = f" {name!r}" if _NAME.fullmatch(name) else ""
    hint = f"Did you mean {close}?" if close else advice or f"Known are {', '.join(names)}."
    return ConfigurationError(f"the store URL has an option{shown} that is not known. {hint}")
