"""Which of several desks writes: the holder of the lease, a row of the database that every transaction locks.

The row has a generation, one more with every change of the holder. A desk compares it with its own inside each of its
transactions, so one that was stopped, cut off or just slow, and goes on after another has taken over, writes nothing:
its transaction ends with `Fenced`. Time plays no part in that. Time only decides when another may take over:

- PostgreSQL: once `until` has passed by the server's own clock and nobody has the row locked. The holder renews it in
  its transactions, and about each second while it has none. A session that hangs inside a transaction is ended by the
  server (`citybrain.db.postgres.IDLE_MS`).
- SQLite, one file on one machine: once the operating system has let go of the lock on `city.db.lock`, which it does
  with the process. An idle desk then writes nothing, which an SD card is grateful for; and a desk that is stopped keeps
  its lock, so nobody takes over before it is ended.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    and_,
    bindparam,
    cast,
    extract,
    func,
    literal,
    or_,
    select,
    update,
)

from citybrain.clock import monotonic_s
from citybrain.db.schema import lease
from citybrain.db.store import file_of, writing
from citybrain.errors import Fenced

NAME = "desk"
LEASE_S = 5.0
RENEW_S = 1.0

_SERVER_MS = cast(extract("epoch", func.clock_timestamp()) * 1000, BigInteger)
_OURS = (lease.c.name == NAME, lease.c.generation == bindparam("ours"))


class FileLock:
    """An exclusive lock on a file; the operating system lets go of it when the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> bool:
        """Take it, or return False where another process has it."""
        if self._file is not None:
            return True
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def lock_of(database: Path) -> FileLock:
    """Return the lock of the desk that writes this file of SQLite."""
    return FileLock(database.with_name(f"{database.name}.lock"))


class Lease:
    """One desk's side of it. `holder`: what this desk is called; `lease_s`: how long a silent holder keeps it."""

    def __init__(self, store: Engine, holder: str, lease_s: float = LEASE_S) -> None:
        self.store = store
        self.holder = holder
        self.generation: int | None = None  # None: another has it, or nobody
        self._lease_ms = int(lease_s * 1000)
        self._renewed_s = 0.0
        file = file_of(store)
        self._lock = None if file is None else lock_of(file)

    @property
    def held(self) -> bool:
        """Whether we had it when we last looked; only a transaction knows (`hold`)."""
        return self.generation is not None

    def take(self, *, again: bool = False) -> bool:
        """Take the lease where it is free; return whether we have it now. Raises StorageError, Unavailable.

        again: it is free as well where its holder has our name; for whoever knows that this one has ended.
        """
        if self._lock is not None and not self._lock.take():
            return False
        with writing(self.store) as connection:
            until = literal(0) if self._lock is not None else _SERVER_MS + self._lease_ms
            free = select(lease.c.generation).where(lease.c.name == NAME)
            if self._lock is None:
                ended = or_(lease.c.until < _SERVER_MS, and_(literal(again), lease.c.holder == self.holder))
                free = free.where(ended).with_for_update(skip_locked=True)
            before = connection.execute(free).scalar()
            if before is None:
                return False
            values = {"holder": self.holder, "generation": before + 1, "until": until}
            connection.execute(update(lease).where(lease.c.name == NAME).values(values))
        self.generation = before + 1
        self._renewed_s = monotonic_s()
        return True

    def hold(self, connection: Connection) -> None:
        """Lock the lease for this transaction, and renew it; raises Fenced where another has taken over."""
        if self._lock is not None:
            mine = connection.execute(select(lease.c.generation).where(*_OURS), {"ours": self.generation}).scalar()
        else:
            later = update(lease).where(*_OURS).values(until=_SERVER_MS + self._lease_ms)
            mine = connection.execute(later.returning(lease.c.generation), {"ours": self.generation}).scalar()
        if mine is None:
            ours, self.generation = self.generation, None
            now = connection.execute(select(lease.c.holder, lease.c.generation).where(lease.c.name == NAME)).one()
            raise Fenced(
                f"{self.holder} had the lease as number {ours}; {now.holder} has it as number {now.generation}"
            )
        self._renewed_s = monotonic_s()

    def renew(self) -> None:
        """Renew it where that is due; raises Fenced."""
        if self._lock is None and monotonic_s() - self._renewed_s >= RENEW_S:
            with writing(self.store) as connection:
                self.hold(connection)

    def release(self) -> None:
        """Let another take over at once: this desk ends. Raises StorageError, Unavailable."""
        if self._lock is not None:
            self._lock.release()
        elif self.generation is not None:
            with writing(self.store) as connection:
                connection.execute(update(lease).where(*_OURS).values(until=0), {"ours": self.generation})
        self.generation = None
