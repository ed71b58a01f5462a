"""Opening the desk's database: SQLite or PostgreSQL, durable for its one writer, read-only for everybody else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from citybrain.errors import DiskFull, NotFound, StorageError, Unavailable

BUSY_MS = 5000


def open_store(place: Path | str, readonly: bool = False) -> Engine:
    """Return the database at `place`: a file of SQLite, or a `postgresql://` URL; `readonly` for all but the desk.

    SQLite: WAL, synchronous=FULL, 5 s of patience. A writer's file is created where it is missing
    (`citybrain.db.migrations.upgrade` makes its tables); a reader's must exist: raises NotFound. Every transaction of a
    writer is `BEGIN IMMEDIATE`, so it never fails half way because somebody else began to write.
    PostgreSQL: `citybrain.db.postgres`; raises UsageError, ConfigError.
    """
    if isinstance(place, str):
        from citybrain.db.postgres import open_server  # noqa: PLC0415  the embedded runtime needs no client of it

        return open_server(place, readonly)
    if readonly and not place.exists():
        raise NotFound(f"{place}: no database yet; the desk creates it when it starts")
    if not readonly:
        place.parent.mkdir(parents=True, exist_ok=True)
    mode = "ro" if readonly else "rwc"
    engine = create_engine(f"sqlite:///file:{place.absolute()}?mode={mode}&uri=true")
    event.listen(engine, "connect", _connect_reader if readonly else _connect_writer)
    event.listen(engine, "begin", _begin_reader if readonly else _begin_writer)
    return engine


def file_of(engine: Engine) -> Path | None:
    """Return the file of a SQLite database, None for a server's."""
    return None if engine.dialect.name == "postgresql" else Path(str(engine.url.database).removeprefix("file:"))


def named(engine: Engine) -> str:
    """Return what to call a database in a message: its file, or host, port and name; never a password."""
    url = engine.url
    return str(file_of(engine) or f"postgresql at {url.host}:{url.port}/{url.database}")


def exists(place: Path | str) -> bool:
    """Return whether there is a database to read; a server's is looked for by asking it."""
    return isinstance(place, str) or place.exists()


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
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection to read by; raises what `refusals` says."""
    with refusals(engine), engine.connect() as connection:
        yield connection


@contextmanager
def refusals(engine: Engine) -> Iterator[None]:
    """Raise DiskFull; Unavailable where the server is away; StorageError for what else the database refuses."""
    driver: type[Exception] = engine.dialect.loaded_dbapi.Error  # where statements go straight to it
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable(f"{named(engine)}: all connections are in use: {error}") from error
    except (DBAPIError, driver) as error:
        raise _refusal(engine, getattr(error, "orig", None) or error) from error


def _refusal(engine: Engine, error: BaseException) -> StorageError | Unavailable:
    if engine.dialect.name == "postgresql":
        from citybrain.db.postgres import refusal  # noqa: PLC0415  see open_store

        return refusal(named(engine), error)
    kind = DiskFull if "full" in str(error) else StorageError
    return kind(f"{named(engine)}: {error}")


def upsert(
    dialect: str, table: Table, columns: Sequence[str], keys: Sequence[str]
) -> sqlite.Insert | postgresql.Insert:
    """Return an INSERT that changes `columns` of the row that has the same `keys` where there is one."""
    make = postgresql.insert if dialect == "postgresql" else sqlite.insert
    statement = make(table)
    new = {name: statement.excluded[name] for name in columns if name not in keys}
    return statement.on_conflict_do_update(index_elements=list(keys), set_=new)
