"""One SQLite file and how it is opened: where it may lie, its schema, its clock, and what its errors mean.

Source: https://sqlite.org/wal.html, https://sqlite.org/howtocorrupt.html
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Final, TypeVar

from nonstick.errors import ConfigurationError, StoreUnavailable, StoreUnusable
from nonstick.store import EMPTY_GRACE_SECONDS
from nonstick.stores.common.upkeep import Plan, Step

__all__ = [
    "BUSY_SECONDS",
    "SQL",
    "DatabaseFile",
    "checkpoints_race",
    "is_busy",
    "is_misuse",
    "is_passing",
    "network_filesystem",
    "transact",
]

T = TypeVar("T")

_log = logging.getLogger("nonstick.stores.sqlite")

BUSY_SECONDS: Final = 2.0
"""How long a call waits for another process's write lock before it raises `StoreUnavailable`."""

SCHEMA_VERSION: Final = 1
_APPLICATION: Final = 0x6E6F6E73
"""SQLite's `application_id` of our files: "nons"."""

_SETTINGS: Final = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {SCHEMA_VERSION};"

MOUNTS = Path("/proc/self/mountinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")

_NETWORK: Final = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|coda|lustre|beegfs|gpfs|ncpfs|gfs2|ocfs2|fuse|fuse\..*"
)
_BUSY: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_MODE: Final = 0o600
"""Of the file: what clients sent is nobody else's (P13)."""

_COMPANIONS: Final = ("-wal", "-shm", "-journal")
"""What SQLite puts beside a file, with the file's own mode."""

_FORBIDDEN: Final = "this user may not write the store's file, or not in its directory: see `nonstick doctor`"

_making = threading.Lock()

_warned = False


def _statements() -> dict[str, str]:
    """The statements of `store.sql`, by name."""
    text = resources.files("nonstick.stores.sqlite").joinpath("store.sql").read_text(encoding="utf-8")
    blocks = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: sql.strip() for name, sql in zip(blocks[::2], blocks[1::2], strict=True)}


SQL: Final = _statements()


class DatabaseFile:
    """Opens connections to one file. Opens nothing by itself, so it may be made before a fork.

    Args:
        path: The file; its directory must exist. Kept as an absolute path.
        clock: The store's clock; by default the machine's time since boot, which all its processes share and which
            no correction of the wall clock moves.
        grace: Seconds for which another file of this name is not taken for the store.

    Attributes:
        generation: Goes up when another file is taken for the store: connections made before lead to the old one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        clock: Callable[[], float] | None = None,
        *,
        grace: float = EMPTY_GRACE_SECONDS,
    ) -> None:
        name = os.fspath(path)
        if not name or name.startswith((":memory:", "file:")):
            raise ConfigurationError(f"{name!r} is not the path of a file; for a store in memory use the URL memory:")
        self.url = f"sqlite:///{name}"
        self.path = Path(os.path.realpath(name))
        self._boot, self._clock = ("", clock) if clock is not None else _machine_clock()
        self._shift = 0.0
        self.generation = 0
        self._grace = grace
        # Device and inode. While a connection is open no other file can get them.
        self._known: tuple[int, int] | None = None
        self._missed_at: float | None = None
        self._looking = threading.Lock()

    def now(self) -> float:
        """Seconds by the store's clock. Correct once a connection has been opened."""
        return self._clock() + self._shift

    def check_place(self) -> None:
        """Raises `ConfigurationError` if the file lies where SQLite's locks or its shared memory do not work."""
        try:
            mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return  # not Linux
        if (kind := network_filesystem(self.path, mounts)) is not None:
            raise ConfigurationError(
                f"{self.path} lies on a network file system ({kind}), where SQLite would corrupt it: "
                "use a local disk, or a Redis store for several machines"
            )

    def connect(self, busy: float = 0.0) -> sqlite3.Connection:
        """A new connection in autocommit mode, of a file that has our schema. Blocks for `BUSY_SECONDS` at most or so.

        Args:
            busy: Seconds for which each statement waits for another connection's lock.

        Raises:
            sqlite3.Error: The file cannot be opened or written.
            ConfigurationError: It can never be used: wrong place, wrong kind of file, or a newer schema.
        """
        self.check_place()
        _warn_of_old_sqlite()
        _make_private(self.path)
        # Handed from the thread that opens it to the one that uses it; never used by two at a time.
        db = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
        )
        try:
            self._prepare(db)
            db.execute(f"PRAGMA busy_timeout = {int(busy * 1000)}")
            if self._known is None:
                self._known = self._named()
        except BaseException:
            db.close()
            raise
        return db

    def look(self) -> bool:
        """Whether the file that has this name is the one that was opened. After the grace period another one may be it.

        A file that was removed or replaced lives on in the processes that have it open, and in no other (P15).
        """
        with self._looking:
            if self._known is None or self._named() == self._known:
                self._missed_at = None
                return True
            now = time.monotonic()
            if self._missed_at is None:
                self._missed_at = now
                _log.error(
                    "%s was removed or replaced while this process uses it. For %g s what it does not have is answered "
                    "503. Move the file back now if it was moved (a copy is another file), or stop every node. Else "
                    "this process goes on with the file that has this name then",
                    self.path,
                    self._grace,
                )
            if now - self._missed_at >= self._grace:
                self._missed_at, self._known = None, None
                self.generation += 1
                _log.error("%s: this process goes on with the file that has this name now", self.path)
            return False

    def check_loss(self) -> None:
        """Returns if the file that is open can know that something is not there.

        Raises:
            StoreUnavailable: It was removed or replaced.
        """
        if not self.look():
            raise StoreUnavailable(f"{self.path} was removed or replaced while this process uses it")

    def _named(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def plan(self) -> Plan:
        """What separates the file from one that this code uses. Opens it for reading; makes none.

        Raises:
            ConfigurationError: It has a newer schema, or is another application's.
            sqlite3.Error: It cannot be read.
        """
        version = 0
        if self.path.exists():
            with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as db:
                version = self._schema_version(db)
        steps = [] if version else [Step(f"version {SCHEMA_VERSION}", f"{SQL['schema']}\n{_SETTINGS}")]
        return Plan(f"the file {self.path}", version, SCHEMA_VERSION, steps)

    def unavailable(self, error: sqlite3.Error) -> StoreUnavailable:
        """What to raise for an SQLite error; logs a damaged file."""
        if _code(error) in _DAMAGED:
            _log.error("%s is damaged: %s", self.path, error)
        if (why := self._mistake(_code(error))) is not None:
            return StoreUnusable(why)
        return StoreUnavailable(f"{self.path}: {error}")

    def _mistake(self, code: int) -> str | None:
        """What somebody has to change before the file can be used; None where another try may find it in order."""
        if code in _DAMAGED:
            return "the store's file is damaged, or no SQLite database: put a sound one in its place, or name another"
        if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return None
        folder = self.path.parent
        if not folder.is_dir():
            return "the directory of the store's file does not exist: make it, or correct the URL"
        if self.path.is_dir():
            return "the store's URL names a directory: add a file's name"
        # SQLite makes files beside the database.
        refused = [one for one in (folder, self.path) if one.exists() and not os.access(one, os.R_OK | os.W_OK)]
        return _FORBIDDEN if refused else None

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = self._schema_version(db)
        _keep_private(self.path)  # not before it is known to be ours
        self._use_wal(db)
        db.execute("PRAGMA synchronous = NORMAL")
        # A checkpoint syncs the disk, so it must not happen inside somebody's append: see keeper.py.
        db.execute("PRAGMA wal_autocheckpoint = 0")
        if version < SCHEMA_VERSION:
            self._create_schema(db)
        if self._boot:
            self._shift = self._find_shift(db)

    def _schema_version(self, db: sqlite3.Connection) -> int:
        # In this order, because another process may create all of it in between.
        tables: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application: int = db.execute("PRAGMA application_id").fetchone()[0]
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION and tables:
            raise ConfigurationError(f"{self.path} is a database of another application")
        if version > SCHEMA_VERSION:
            raise ConfigurationError(
                f"{self.path} has schema version {version}, made by a newer nonstick; this one knows {SCHEMA_VERSION}"
            )
        return version

    def _use_wal(self, db: sqlite3.Connection) -> None:
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                mode: str = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError as error:
                # The switch does not wait for processes that open the file at the same time.
                if not is_busy(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.005)
        if mode != "wal":
            raise ConfigurationError(f"{self.path}: its file system cannot do write-ahead logging")

    def _create_schema(self, db: sqlite3.Connection) -> None:
        """All or nothing. Several processes may do it at once: one does, the others find it done."""
        try:
            db.executescript(f"BEGIN IMMEDIATE;\n{SQL['schema']}\n{_SETTINGS}\nCOMMIT;")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _find_shift(self, db: sqlite3.Connection) -> float:
        boot, shift = db.execute(SQL["clock"]).fetchone()
        if boot == self._boot:
            return float(shift)
        return transact(db, self._clock, self._rebase)

    def _rebase(self, db: sqlite3.Connection, clock: float) -> float:
        """After a reboot the machine's clock begins anew: goes on from the wall clock, but never back."""
        boot, shift = db.execute(SQL["clock"]).fetchone()
        if boot == self._boot:
            return float(shift)
        latest: float = db.execute(SQL["latest_renewal"]).fetchone()[0]
        shift = max(time.time(), latest) - clock
        db.execute(SQL["set_clock"], (self._boot, shift))
        return shift


def _make_private(path: Path) -> None:
    """Makes the file for this user only, if it is not there. Whether it can be used, SQLite says."""
    # Not by the umask, which is the whole process's. Closing any file handle drops the locks that SQLite holds in this
    # process, so nobody here may have the new file open yet.
    with _making:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, _MODE))
        except OSError:
            pass


def _keep_private(path: Path) -> None:
    """Lets no other user read or write a file that was there before, and what is beside it (P13)."""
    for one in (path, *(path.with_name(path.name + end) for end in _COMPANIONS)):
        try:
            if stat.S_IMODE(one.stat().st_mode) & ~_MODE:
                one.chmod(_MODE)
        except OSError:
            pass  # the file is another user's, who gave this user access


def transact(db: sqlite3.Connection, clock: Callable[[], float], work: Callable[[sqlite3.Connection, float], T]) -> T:
    """Does `work` in one write transaction, at the time when it got the lock; if it raises, nothing happened."""
    # Not deferred: a transaction that read before it writes could not wait for the lock.
    db.execute("BEGIN IMMEDIATE")
    try:
        result = work(db, clock())
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite rolls back by itself after some errors
            db.execute("ROLLBACK")
        raise
    return result


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection held a lock: worth another try."""
    return _code(error) in _BUSY


def is_misuse(error: sqlite3.Error) -> bool:
    """A mistake in this program, such as a value that SQLite has no type for: not the store's trouble."""
    return not _code(error)


def is_passing(error: sqlite3.Error) -> bool:
    """Whether the connection is as good as before."""
    return _code(error) in (*_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CONSTRAINT)


def _code(error: sqlite3.Error) -> int:
    # The low byte is the kind, the rest says more about it. An error of the module itself has no code.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def network_filesystem(path: Path, mounts: str) -> str | None:
    """The kind of network file system that `path` lies on, or None. `mounts` is the text of /proc/self/mountinfo."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        place, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), place.split(" ")[4]))
        # Of mounts on one place, the last covers the others.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), source.split(" ")[0]
    return kind if _NETWORK.fullmatch(kind) else None


def checkpoints_race(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Whether this SQLite has the WAL-reset bug, by which two checkpoints and a commit at once can corrupt the file.

    Source: https://sqlite.org/wal.html#walresetbug (fixed in 3.51.3, and in 3.50.7 and 3.44.6 of older branches)
    """
    return version < (3, 44, 6) or (3, 45) <= version < (3, 50, 7) or (3, 51) <= version < (3, 51, 3)


def _warn_of_old_sqlite() -> None:
    global _warned
    if not _warned and checkpoints_race():
        _warned = True
        _log.warning(
            "SQLite %s has the WAL-reset bug (https://sqlite.org/wal.html#walresetbug). nonstick checkpoints in one "
            "process at a time, with writers held off, to stay clear of it; SQLite 3.51.3 or newer is better",
            sqlite3.sqlite_version,
        )


def _machine_clock() -> tuple[str, Callable[[], float]]:
    """The name of this boot and the seconds since it; where that is not known, "" and the wall clock."""
    try:
        return _BOOT.read_text(encoding="ascii").strip(), _since_boot
    except OSError:
        return "", time.time


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
