"""What can be wrong with an SQLite file: the library, the place, the permissions, the room, and what is in it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from pathlib import Path
from typing import Final

from nonstick.errors import ConfigurationError
from nonstick.stores.common.upkeep import Finding
from nonstick.stores.sqlite.file import DatabaseFile, checkpoints_race

__all__ = ["examine"]

_LITTLE: Final = 256 << 20
"""Bytes of free disk below which it is worth a word."""

_NEXT_TO_NOTHING: Final = 16 << 20
"""Below this it will not be long before nothing can be written."""

_LONG_LOG: Final = 256 << 20
"""Bytes of write-ahead log that no working checkpoint leaves."""


def examine(file: DatabaseFile) -> list[Finding]:
    """Everything about the file and where it lies. Opens it for reading only, and makes none. Blocks.

    Raises:
        sqlite3.Error: The file cannot be read.
    """
    findings = [_version(), _place(file), _clock(), _permissions(file.path)]
    if any(finding.blocks for finding in findings):
        return findings
    findings.append(_room(file.path))
    findings.append(_schema(file))
    if file.path.exists() and not findings[-1].blocks:
        findings += [_journal(file.path), _privacy(file.path)]
    return findings


def _version() -> Finding:
    text = f"SQLite {sqlite3.sqlite_version}"
    if checkpoints_race():
        return Finding(
            "warning",
            "version",
            f"{text} has the WAL-reset bug (https://sqlite.org/wal.html#walresetbug)",
            "Take a Python whose SQLite is 3.51.3 or newer. Until then nonstick stays clear of the bug; let no other "
            "program checkpoint the file.",
        )
    return Finding("ok", "version", text)


def _place(file: DatabaseFile) -> Finding:
    try:
        file.check_place()
    except ConfigurationError as error:
        advice = "Name a file on a local disk, or a Redis or PostgreSQL store for several machines."
        return Finding("error", "place", str(error), advice, blocks=True)
    return Finding("ok", "place", f"{file.path.parent} is on a local file system")


def _clock() -> Finding:
    return Finding("ok", "clock", "the store's clock is this machine's")


def _permissions(path: Path) -> Finding:
    folder = path.parent
    if not folder.is_dir():
        advice = f"mkdir -p {folder}, for the user that runs the nodes."
        return Finding("error", "permissions", f"there is no directory {folder}", advice, blocks=True)
    # SQLite makes files beside the database, so that its directory has to be writable too.
    beside = [path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")]
    refused = [one for one in (folder, *beside) if one.exists() and not os.access(one, os.R_OK | os.W_OK)]
    if refused:
        names = ", ".join(map(str, refused))
        advice = "Run this as the user that runs the nodes; else chown or chmod what is named."
        return Finding("error", "permissions", f"this user may not read and write {names}", advice, blocks=True)
    return Finding("ok", "permissions", "this user may read and write the file and its directory")


def _room(path: Path) -> Finding:
    free = shutil.disk_usage(path.parent).free
    text = f"{free >> 20} MiB free"
    if free >= _LITTLE:
        return Finding("ok", "disk", text)
    advice = "Make room on the disk: when it is full, clients get 503."
    return Finding("error" if free < _NEXT_TO_NOTHING else "warning", "disk", text, advice)


def _schema(file: DatabaseFile) -> Finding:
    try:
        plan = file.plan()
    except ConfigurationError as error:
        return Finding("error", "schema", str(error), "Upgrade nonstick, or name another file.", blocks=True)
    if plan.steps:
        advice = "Run `nonstick migrate --store URL`, or let the first node do it."
        return Finding("warning", "schema", str(plan), advice, blocks=True)
    return Finding("ok", "schema", str(plan))


def _journal(path: Path) -> Finding:
    log = path.with_name(path.name + "-wal")
    size = log.stat().st_size if log.exists() else 0
    text = f"{path.stat().st_size >> 10} KiB, and {size >> 10} KiB of write-ahead log"
    if size > _LONG_LOG:
        advice = "Look for a program that keeps a transaction open on the file, such as a shell or a backup."
        return Finding("warning", "size", f"{text}, which is not being emptied", advice)
    return Finding("ok", "size", text)


def _privacy(path: Path) -> Finding:
    others = path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    folder = path.parent.stat().st_mode
    reachable = (others & stat.S_IRGRP and folder & stat.S_IXGRP) or (others & stat.S_IROTH and folder & stat.S_IXOTH)
    if reachable:
        text = "other users of this machine may read the file, and so what clients sent"
        return Finding("warning", "privacy", text, f"chmod 700 {path.parent}, or chmod 600 the file.")
    return Finding("ok", "privacy", "only this user may read the file")
