"""What operators have told us already, so that what they repeat adds nothing: a table of keys in SQLite.

A key is 64 bits of a hash of (device, metric, observed_at, value). With 1.3 million of them (2,000 hydrants, four
values an hour, a week) one new value in 10**13 is taken for a repeat. They are kept until a week after they were last
told, about 40 bytes each: 55 MB in that case.

The spool's commit comes first; `marks` say up to which of its messages the table knows, so that after a crash the rest
is learnt from the spool (`gateway.clouds.intake`).
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS
from citybrain.counters import Counters
from citybrain.errors import Damaged, DiskFull, StorageError
from citybrain.model import Lane
from citybrain.storage import OS_FILES

VERSION = 1
KEEP_DAYS = 7  # operators repeat within hours; a week is what a spool holds, too
EXPIRE_AT_ONCE = 5000  # a few ms
_KEY = struct.Struct("<qd")
_INT = struct.Struct("<q")
_SCHEMA = """
CREATE TABLE seen (key INTEGER PRIMARY KEY, day INTEGER NOT NULL);
CREATE INDEX seen_day ON seen (day);
CREATE TABLE marks (gateway TEXT NOT NULL, lane TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (gateway, lane));
CREATE TABLE cursors (operator TEXT PRIMARY KEY, cursor TEXT NOT NULL);
"""
Marks = Mapping[tuple[str, Lane], int]


def key_of(device: str, metric: str, observed_at: int, value: float) -> int:
    """Return the key of one value, a signed 64-bit integer; the same in every process."""
    told = f"{device}\n{metric}\n".encode() + _KEY.pack(observed_at, value + 0.0)  # -0.0 is 0.0
    return int(_INT.unpack(blake2b(told, digest_size=8).digest())[0])


class Seen:
    """The table. `known` asks, `save` remembers; both are given the day in platform time."""

    def __init__(self, path: Path, counters: Counters) -> None:
        self.path = path
        self.rows = 0
        self._counters = counters
        self._db: sqlite3.Connection | None = None
        self._owed: set[int] = set()  # stored in a spool, and the disk had no room to say so here
        self._owed_marks: dict[tuple[str, Lane], int] = {}
        self._owed_cursors: dict[str, str] = {}
        self._again: set[int] = set()  # told again on a later day: kept longer

    @property
    def owing(self) -> bool:
        """Whether the last `save` found no room: call it again before anything new is taken."""
        return bool(self._owed or self._owed_marks or self._owed_cursors)

    def start(self) -> None:
        """Open the table; one that is damaged is set aside, with a warning. Raises StorageError."""
        OS_FILES.make(self.path.parent)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            if _is_full(error):
                raise self._error(error) from None
            self.close()
            aside = self.path.with_suffix(".damaged")
            for suffix in ("-wal", "-shm"):
                OS_FILES.remove(self.path.with_name(self.path.name + suffix))
            OS_FILES.rename(self.path, aside)
            self._counters.add("errors_total", stage="recovery")
            self._counters.warn(f"{self.path}: {error}; kept as {aside}, an operator's repeats may be taken once more")
            self._open()

    def _open(self) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {VERSION};COMMIT")
        elif version != VERSION:
            raise Damaged(str(self.path), 0, f"version {version}, this program knows {VERSION}: use the newer program")
        self.rows = int(self._db.execute("SELECT count(*) FROM seen").fetchone()[0])

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StorageError(f"{self.path}: not open")
        return self._db

    def known(self, keys: Sequence[int], day: int) -> set[int]:
        """Return those of `keys` that are in the table; they will be kept a week from `day` on. Raises StorageError."""
        asked = msgspec.json.encode(keys).decode()
        query = "SELECT seen.key, seen.day FROM json_each(?) AS asked CROSS JOIN seen ON seen.key = asked.value"
        try:
            rows = self._connection.execute(query, (asked,)).fetchall()
        except sqlite3.Error as error:
            raise self._error(error) from None
        self._again.update(key for key, told in rows if told < day)
        return self._owed.intersection(keys).union(key for key, _ in rows)

    def save(self, keys: Iterable[int], marks: Marks, cursors: Mapping[str, str], day: int) -> None:
        """Remember keys, how far each lane's are remembered, and pull cursors, durably and together.

        Raises DiskFull: then they are kept in memory, and the next call saves them too; and StorageError.
        """
        self._owed.update(keys)
        self._owed_marks.update(marks)
        self._owed_cursors.update(cursors)
        if not (self.owing or self._again):
            return
        db = self._connection
        try:
            db.execute("BEGIN IMMEDIATE")
            before = db.total_changes
            db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", [(key, day) for key in sorted(self._owed)])
            added = db.total_changes - before
            db.executemany("UPDATE seen SET day = ? WHERE key = ?", [(day, key) for key in self._again])
            rows = [(gateway, lane.topic, seq) for (gateway, lane), seq in self._owed_marks.items()]
            db.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", rows)
            db.executemany("INSERT OR REPLACE INTO cursors VALUES (?, ?)", self._owed_cursors.items())
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise self._error(error) from None
        self.rows += added
        for owed in (self._owed, self._owed_marks, self._owed_cursors, self._again):
            owed.clear()

    def mark(self, gateway: str, lane: Lane) -> int:
        """Return the seq up to which a lane's messages are remembered, 0 where none is."""
        query = "SELECT seq FROM marks WHERE gateway = ? AND lane = ?"
        row = self._connection.execute(query, (gateway, lane.topic)).fetchone()
        return int(row[0]) if row else 0

    def cursor(self, operator: str) -> str:
        """Return how far an operator's readings were pulled, "" where nothing was."""
        row = self._connection.execute("SELECT cursor FROM cursors WHERE operator = ?", (operator,)).fetchone()
        return str(row[0]) if row else ""

    def expire(self, day: int) -> int:
        """Forget some of what was told for the last time more than a week before `day`; return how many."""
        query = "DELETE FROM seen WHERE key IN (SELECT key FROM seen WHERE day < ? LIMIT ?)"
        try:
            gone = self._connection.execute(query, (day - KEEP_DAYS, EXPIRE_AT_ONCE)).rowcount
        except sqlite3.Error as error:
            if _is_full(error):
                return 0  # what is not forgotten today is tomorrow
            raise self._error(error) from None
        self.rows -= gone
        return gone

    def _error(self, error: sqlite3.Error) -> StorageError:
        if _is_full(error):
            return DiskFull(f"{self.path}: no space left on the device; free some, what is stored is kept")
        return StorageError(f"{self.path}: {error}")

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None


def day_of(now_ms: int) -> int:
    """Return the day of a time in Unix ms."""
    return now_ms // DAY_MS


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
