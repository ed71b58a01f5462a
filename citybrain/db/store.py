"""Opening the desk's database: SQLite, durable for its one writer, read-only for everybody else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError

from citybrain.errors import DiskFull, NotFound, StorageError

BUSY_MS = 5000


def open_store(path: Path, readonly: bool = False) -> Engine:
    """Return the database at `path`: WAL, synchronous=FULL, 5 s of patience; `readonly` for all but the desk.

    A writer's file is created where it is missing (`citybrain.db.migrations.upgrade` makes its tables); a reader's
    must exist: raises NotFound. Every transaction of a writer is `BEGIN IMMEDIATE`, so it never fails half way
    because somebody else began to write.
    """
    if readonly and not path.exists():
        raise NotFound(f"{path}: no database yet; the desk creates it when it starts")
    if not readonly:
        path.parent.mkdir(parents=True, exist_ok=True)
    mode = "ro" if readonly else "rwc"
    engine = create_engine(f"sqlite:///file:{path.absolute()}?mode={mode}&uri=true")
    event.listen(engine, "connect", _connect_reader if readonly else _connect_writer)
    event.listen(engine, "begin", _begin_reader if readonly else _begin_writer)
    return engine


def _connect_writer(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: sqlite3's own is too late for a consistent read
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _connect_reader(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    connection.execute("PRAGMA query_only=ON")


def _begin_writer(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_reader(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction of the writer: all of it or nothing; raises what `refusals` says."""
    with refusals(engine), engine.begin() as connection:
        yield connection


@contextmanager
def refusals(engine: Engine) -> Iterator[None]:
    """Raise DiskFull, or StorageError for what else the database refuses (it is locked, damaged, out of step)."""
    try:
        yield
    except (DatabaseError, sqlite3.Error) as error:
        said = str(getattr(error, "orig", error))
        kind = DiskFull if "full" in said else StorageError
        raise kind(f"{engine.url.database}: {said}") from error
