"""What a simulated operator keeps: every message of its devices for a week, by number, for whoever asks."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from citybrain.clock import DAY_MS
from citybrain.storage import OS_FILES
from citybrain.wire import MAX_SEQ

KEEP_MS = 7 * DAY_MS


class Book:
    """Messages by number, in SQLite; safe for several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def start(self) -> None:
        """Open the book."""
        OS_FILES.make(self._folder)
        self._db = sqlite3.connect(self._folder / "told.db", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS told (id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER, body BLOB)"
        )

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._db is not None, "start() comes first"
        return self._db

    def add(self, messages: Sequence[dict[str, Any]], now_ms: int) -> None:
        """Keep messages, durably; forget what is older than a week."""
        rows = [(now_ms, msgspec.json.encode(message)) for message in messages]
        with self._lock:
            db = self._connection
            db.execute("BEGIN")
            db.executemany("INSERT INTO told (at, body) VALUES (?, ?)", rows)
            db.execute("DELETE FROM told WHERE id <= (SELECT max(id) FROM told WHERE at < ?)", (now_ms - KEEP_MS,))
            db.execute("COMMIT")

    def page(self, after: int, most: int, until_ms: int = MAX_SEQ) -> tuple[list[msgspec.Raw], int, bool]:
        """Return (messages behind number `after` told by `until_ms`, the last one's number, whether there are more)."""
        query = "SELECT id, body FROM told WHERE id > ? AND at <= ? ORDER BY id LIMIT ?"
        with self._lock:
            rows = self._connection.execute(query, (after, until_ms, most + 1)).fetchall()
        given = rows[:most]
        return [msgspec.Raw(body) for _, body in given], given[-1][0] if given else after, len(rows) > most

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
