"""A real PostgreSQL for tests: one cluster a session on a free loopback port, a database of its own for each test.

One that runs already is taken from the environment variable CITYBRAIN_TEST_POSTGRES (a URL of a user who may create
databases); what stops the server is then left out. Where neither is possible the tests are skipped and say why, but
with CI=true they fail.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from citybrain.db.migrations import upgrade
from citybrain.db.schema import lease, metadata
from citybrain.db.store import open_store
from tests.conftest import eventually, unused_port

VARIABLE = "CITYBRAIN_TEST_POSTGRES"
USER, PASSWORD = "citybrain", "not-a-secret-in-tests"
# Little memory, everything durable: what a test of a crash needs.
SETTINGS = ("shared_buffers=32MB", "max_connections=60", "unix_socket_directories=", "fsync=on", "log_min_messages=log")


def impossible(why: str) -> NoReturn:
    """Skip, or fail where this is CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"PostgreSQL is needed: {why}")
    pytest.skip(f"no PostgreSQL: {why}; or set {VARIABLE}=postgresql://USER:PASSWORD@HOST:PORT/postgres")


def programs() -> Path:
    """Return the folder of `initdb` and `postgres`, the newest there is."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    there = shutil.which("initdb")
    if not found and there is None:
        impossible("initdb is not installed (apt-get install postgresql)")
    return found[-1].parent if found else Path(str(there)).parent


EMPTY = "SET lock_timeout = 2000; " + "".join(
    f"DELETE FROM {table.name}; " for table in reversed(metadata.sorted_tables) if table is not lease
) + "UPDATE lease SET holder = '', generation = 0, until = 0"  # fmt: skip


class Cluster:
    """A server. `url(name)` is one of its databases; `folder` is None where it is not ours."""

    def __init__(self, base: str, folder: Path | None = None) -> None:
        self.base = base
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.made = 0
        self.free: list[str] = []

    def url(self, name: str) -> str:
        parts = urlsplit(self.base)
        return f"postgresql://{parts.netloc}/{name}"

    def execute(self, *statements: str | sql.Composed, database: str = "postgres") -> list[Any]:
        """Run statements, each by itself; return the rows of the last."""
        rows: list[Any] = []
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement if isinstance(statement, sql.Composed) else statement.encode())
                rows = cursor.fetchall() if cursor.description else []
        return rows

    def database(self, template: str = "citybrain_template") -> str:
        """Make a database, a copy of `template` (empty: `template0`); return its name."""
        self.made += 1
        name = f"citybrain_{os.getpid()}_{self.made}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def lend(self) -> str:
        """Return a database with this version's schema and no rows: one that was taken back, else a new one."""
        return self.free.pop() if self.free else self.database()

    def take_back(self, name: str) -> None:
        """Empty a database for the next test: much quicker than a new one."""
        self.execute(EMPTY, database=name)
        self.free.append(name)

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    # --- a server of ours

    def initialise(self) -> None:
        assert self.folder is not None
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        options = ["-A", "scram-sha-256", "-U", USER, "--pwfile", str(secret), "-E", "UTF8", "--locale=C", "-N"]
        self._own(secret)
        argv = [str(programs() / "initdb"), "-D", str(self.folder / "data"), *options]
        done = subprocess.run(argv, **self._as(), capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            impossible(f"initdb failed: {done.stderr[-500:]}")

    @property
    def argv(self) -> list[str]:
        """The command line that starts it; to be run by whom the folder belongs to."""
        port = str(urlsplit(self.base).port)
        argv = [str(programs() / "postgres"), "-D", f"{self.folder}/data", "-p", port, "-h", "127.0.0.1"]
        return argv + [word for setting in SETTINGS for word in ("-c", setting)]

    def start(self) -> None:
        assert self.folder is not None
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.argv, **self._as(), stdout=log, stderr=log)
        eventually(self.answers, 30, "PostgreSQL answering")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT ends sessions and closes, SIGQUIT is a crash."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(30)

    def answers(self) -> bool:
        assert self.process is None or self.process.poll() is None, "postgres ended"
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _own(self, path: Path) -> None:
        if os.getuid() == 0:
            user = pwd.getpwnam(self._as()["user"])
            os.chown(path, user.pw_uid, user.pw_gid)

    def _as(self) -> dict[str, Any]:
        """PostgreSQL refuses to run as root."""
        if os.getuid():
            return {}
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = known.get("postgres") or known["nobody"]
        return {"user": user.pw_name, "group": user.pw_gid, "extra_groups": []}

    @classmethod
    def ours(cls) -> Cluster:
        """Return a new one, running."""
        programs()
        folder = Path(tempfile.mkdtemp(prefix="citybrain-postgres-"))
        made = cls(f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{unused_port()}/postgres", folder)
        made._own(folder)
        made.initialise()
        made.start()
        return made

    def remove(self) -> None:
        self.stop()
        if self.folder is not None:
            shutil.rmtree(self.folder)


def with_template(cluster: Cluster) -> Cluster:
    """Make the database that the others are copies of: with this version's schema."""
    cluster.drop("citybrain_template")
    cluster.execute("CREATE DATABASE citybrain_template TEMPLATE template0")
    store = open_store(cluster.url("citybrain_template"))
    upgrade(store)
    store.dispose()
    return cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One server for all tests."""
    if given := os.environ.get(VARIABLE):
        yield with_template(Cluster(given))
        return
    made = Cluster.ours()
    try:
        yield with_template(made)
    finally:
        made.remove()


@pytest.fixture
def mortal_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The server, for a test that stops it; it runs again afterwards."""
    if cluster.folder is None:
        pytest.skip(f"{VARIABLE} names a server that is not ours to stop")
    yield cluster
    if cluster.process is None or cluster.process.poll() is not None:
        cluster.start()


@pytest.fixture
def postgres(cluster: Cluster) -> Iterator[str]:
    """The URL of a database with this version's schema and no rows."""
    name = cluster.lend()
    yield cluster.url(name)
    cluster.take_back(name)


@pytest.fixture
def empty_postgres(cluster: Cluster) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    name = cluster.database("template0")
    yield cluster.url(name)
    cluster.drop(name)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `database`, one for all tests of a file."""
    if request.param == "sqlite":
        yield ""
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    name = cluster.lend()
    yield cluster.url(name)
    cluster.take_back(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """Where a desk keeps its tables: "" is the data folder's own file, else a URL. A suite with it runs on both."""
    return "" if request.param == "sqlite" else str(request.getfixturevalue("postgres"))
