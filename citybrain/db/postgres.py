"""PostgreSQL as the desk's database: durable for the one writer, read-only and bounded for everybody else."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.adapt import Dumper
from psycopg.types.string import StrDumper
from sqlalchemy import Engine, create_engine, event

from citybrain.db.place import connection_parameters
from citybrain.errors import DiskFull, StorageError, Unavailable

CONNECT_S = 3
# A desk that was stopped inside a transaction keeps the lease's row locked: the server ends its session after that
# long, and another desk takes over. Between two statements of a live desk are milliseconds.
IDLE_MS = 4_000
LOCK_MS = 5_000  # as SQLite's busy_timeout
ASK_MS = 5_000  # a page that takes longer is not waited for by anybody
GONE_MS = 4_000  # what was sent and is not acknowledged for so long: the peer is cut off
WRITERS, READERS = 3, 8  # connections of a desk (one writes); of an API process
SESSION = {"tcp_user_timeout": GONE_MS, "tcp_keepalives_idle": 2, "tcp_keepalives_interval": 1}
WRITING = {
    "synchronous_commit": "on",
    "idle_in_transaction_session_timeout": IDLE_MS,
    "lock_timeout": LOCK_MS,
}
READING = {
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "repeatable\\ read",  # what one request reads belongs together
    "statement_timeout": ASK_MS,
    "idle_in_transaction_session_timeout": 60_000,
}


def open_server(url: str, readonly: bool = False) -> Engine:
    """Return the database at a `postgresql://` URL; it is connected to by the first who asks.

    A writer's commits are on the server's disk when they return, whatever the server's default is.
    Raises UsageError, ConfigError.
    """
    settings = SESSION | (READING if readonly else WRITING)
    parameters = connection_parameters(url) | {
        "connect_timeout": CONNECT_S,
        "tcp_user_timeout": GONE_MS,
        "keepalives_idle": 2,
        "keepalives_interval": 1,
        "keepalives_count": 3,
        "application_name": "citybrain reader" if readonly else "citybrain writer",
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
    }
    size = READERS if readonly else WRITERS
    # The password never stands in the engine's URL, which is printed by whoever prints an engine.
    engine = create_engine(
        f"postgresql+psycopg://{parameters['host']}:{parameters['port']}/{parameters['dbname']}",
        connect_args=parameters,
        pool_size=size,
        max_overflow=0,
        pool_timeout=CONNECT_S,
        pool_pre_ping=readonly,
    )
    event.listen(engine, "connect", _adapt)
    return engine


class _Text(StrDumper):
    """PostgreSQL's text cannot hold U+0000, which JSON can: it becomes U+FFFD, as for any character unknown to it."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\x00", "\ufffd") if "\x00" in obj else obj)


def _adapt(connection: psycopg.Connection[Any], _: Any) -> None:
    dumper: type[Dumper] = _Text
    connection.adapters.register_dumper(str, dumper)


# https://www.postgresql.org/docs/15/errcodes-appendix.html
FULL = "53100"
# Connections, resources, the operator; then a server that only reads (a standby after a switch), sessions ended while
# idle, locks, serialization, and what it says to whom it does not let in.
AWAY = ("08", "53", "57", "25006", "25P03", "55P03", "40", "28", "3D")


def refusal(where: str, error: BaseException) -> StorageError | Unavailable:
    """Return what a driver's error means: DiskFull; Unavailable where the same may be asked again; StorageError."""
    what = f"{where}: {' '.join(str(error).split())}"
    code = getattr(error, "sqlstate", None)
    if code is None:  # libpq's own: there is no connection, or it was lost
        return Unavailable(what) if isinstance(error, psycopg.OperationalError) else StorageError(what)
    if code == FULL:
        return DiskFull(what)
    return Unavailable(what) if code.startswith(AWAY) else StorageError(what)
