"""What operators have told us already, so that what they repeat adds nothing: a table of keys in SQLite.

A key is the hour of `observed_at` and 45 bits of a hash of (device, metric, observed_at, value): what is new lies side
by side in the table. Where 8,000 values have one hour (2,000 hydrants with four each), one new value in 4 * 10**9 is
taken for a repeat. Keys are kept until a week after they were last told, about 20 bytes each: in that case 1.3 million
of them, 27 MB.

The spools come first; `marks` say up to which of their messages the table knows, so that after a crash the rest is
learnt from them (`gateway.clouds.intake`).
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS
from citybrain.counters import Counters
from citybrain.errors import Damaged, DiskFull, StorageError
from citybrain.model import Lane
from citybrain.storage import OS_FILES

VERSION = 1
KEEP_DAYS = 7  # operators repeat within hours; a week is what a spool holds, too
SWEPT_AT_ONCE = 5000  # about 1 ms
HASH_BITS, HOUR_BITS = 45, 18  # 30 years; together not beyond SQLite's signed 64
_TOLD = struct.Struct("<qd")
_HASH = struct.Struct("<Q")
_HASH_MASK, _HOUR_MASK = (1 << HASH_BITS) - 1, (1 << HOUR_BITS) - 1
_SCHEMA = """
CREATE TABLE seen (key INTEGER PRIMARY KEY, day INTEGER NOT NULL);
CREATE TABLE marks (gateway TEXT NOT NULL, lane TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (gateway, lane));
CREATE TABLE cursors (operator TEXT PRIMARY KEY, cursor TEXT NOT NULL);
"""
Marks = Mapping[tuple[str, Lane], int]


def key_of(device: str, metric: str, observed_at: int, value: float) -> int:
    """Return the key of one value, 0 .. 2**63 - 1; the same in every process."""
    told = f"{device}\n{metric}\n".encode() + _TOLD.pack(observed_at, value + 0.0)  # -0.0 is 0.0
    number: int = _HASH.unpack(blake2b(told, digest_size=8).digest())[0]
    return (observed_at // HOUR_MS & _HOUR_MASK) << HASH_BITS | number & _HASH_MASK


class Seen:
    """The table. `known` asks; `hold` remembers in memory, `save` on disk. Days are those of platform time."""

    def __init__(self, path: Path, counters: Counters) -> None:
        self.path = path
        self.rows = 0
        self.full = False  # the last `save` found no room: nothing new may be taken before one does
        self._counters = counters
        self._db: sqlite3.Connection | None = None
        self._owed: set[int] = set()  # in a spool, and not on disk here yet
        self._owed_marks: dict[tuple[str, Lane], int] = {}
        self._owed_cursors: dict[str, str] = {}
        self._again: set[int] = set()  # told again on a later day: kept longer
        self._swept = -1  # `expire` has looked at the keys up to this one

    @property
    def owing(self) -> int:
        """How much `save` has to do."""
        return len(self._owed) + len(self._owed_marks) + len(self._owed_cursors) + len(self._again)

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

    def hold(self, keys: Iterable[int], marks: Marks, cursors: Mapping[str, str]) -> None:
        """Remember keys, how far each lane's are remembered, and pull cursors, until `save`."""
        self._owed.update(keys)
        self._owed_marks.update(marks)
        self._owed_cursors.update(cursors)

    def save(self, day: int) -> None:
        """Make what is held durable, all together.

        Raises DiskFull: then it is kept in memory, and the next call saves it too; and StorageError.
        """
        if not self.owing:
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
            self.full = _is_full(error)
            raise self._error(error) from None
        self.full = False
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
        if operator in self._owed_cursors:
            return self._owed_cursors[operator]
        row = self._connection.execute("SELECT cursor FROM cursors WHERE operator = ?", (operator,)).fetchone()
        return str(row[0]) if row else ""

    def expire(self, day: int) -> int:
        """Forget, of the next 5,000 keys, those told for the last time more than a week before `day`; return how many.

        Called again and again it goes round the table.
        """
        db = self._connection
        try:
            query = "SELECT key, day FROM seen WHERE key > ? ORDER BY key LIMIT ?"
            rows = db.execute(query, (self._swept, SWEPT_AT_ONCE)).fetchall()
            old = [(key,) for key, told in rows if told < day - KEEP_DAYS]
            if old:
                db.execute("BEGIN IMMEDIATE")
                db.executemany("DELETE FROM seen WHERE key = ?", old)
                db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if _is_full(error):
                return 0  # what is not forgotten now is in the next round
            raise self._error(error) from None
        self._swept = rows[-1][0] if len(rows) == SWEPT_AT_ONCE else -1
        self.rows -= len(old)
        return len(old)

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
