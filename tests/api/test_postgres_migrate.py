"""From the embedded database to PostgreSQL: killed in the middle, run again, and the desk goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psycopg
import pytest
from sqlalchemy import delete, func, select

from api.desk import Desk, replay
from api.migrate import Mark
from citybrain.cli import main
from citybrain.db.schema import MOVED, MOVING, cases, journal, lease, meta, timeline
from citybrain.db.store import open_store
from citybrain.errors import StorageError
from citybrain.layout import Layout
from citybrain.model import Edge
from rules.categories import load_categories
from simulators.district import build
from simulators.offline import run_offline
from tests.conftest import eventually
from tests.desk_city import City, everything

DAYS, SEED = 0.5, 506


def moving(url: str) -> str:
    """How far a copy into this database is: the table it is at, "" where there is none."""
    store = open_store(url, readonly=True)
    try:
        with store.connect() as connection:
            found = connection.execute(select(meta.c.value).where(meta.c.key == MOVING)).scalar()
    finally:
        store.dispose()
    return msgspec.json.decode(found, type=Mark).table if found else ""


def migrate(source: Path, folder: Path, url: str, *words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "citybrain", "migrate", "--data", str(folder), "--from", str(source), *words]
    environment = os.environ | {"CITYBRAIN_DATABASE": url}
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def blocked(url: str, table: str) -> Iterator[None]:
    """Hold a table, so that a copy waits in front of it."""
    with psycopg.connect(url) as connection:
        connection.execute(f"LOCK TABLE {table} IN SHARE MODE".encode())
        yield
        connection.rollback()


def half(database: Path, to: Path, *, first: bool) -> None:
    """Copy a database's journal, one half of it."""
    to.write_bytes(database.read_bytes())
    store = open_store(to)
    with store.begin() as connection:
        middle = connection.execute(select(func.count()).select_from(journal)).scalar_one() // 2
        connection.execute(delete(journal).where(journal.c.n > middle if first else journal.c.n <= middle))
    store.dispose()


def told(place: Path | str) -> dict[str, list[dict[str, object]]]:
    store = open_store(place, readonly=True)
    try:
        found = everything(store)
    finally:
        store.dispose()
    return {name: rows for name, rows in found.items() if name != lease.name}


def play(source: Path, desk: Desk) -> None:
    """Give a desk what a journal says."""
    desk.start()
    store = open_store(source, readonly=True)
    replay(store, desk)
    store.dispose()
    desk.store.dispose()


def test_half_a_day_here_and_the_rest_there_is_the_same_as_all_of_it_here(tmp_path: Path, empty_postgres: str) -> None:
    layout = Layout(tmp_path / "city")
    run_offline(layout, build(SEED), DAYS)
    for name, first in (("first", True), ("second", False)):
        half(layout.database, tmp_path / name, first=first)
    embedded = tmp_path / "moves" / "city.db"
    shards, categories = range(layout.read_run().shards), load_categories()
    play(tmp_path / "first", Desk(open_store(embedded), layout, shards, categories))

    assert main(["migrate", "--data", str(tmp_path), "--database", with_file(empty_postgres, tmp_path)]) == 0
    for table in ("timeline", "cases"):  # in the order in which they are copied
        with blocked(empty_postgres, table):
            running = migrate(embedded, tmp_path, empty_postgres)
            eventually(lambda at=table: waits_for(empty_postgres, at), 20, f"the copy at {table}")  # type: ignore[misc]
            running.kill()
            running.communicate()
        assert moving(empty_postgres)
        with pytest.raises(StorageError, match="a copy into it has not ended"):
            Desk(open_store(empty_postgres), layout, shards, categories).start()
    running = migrate(embedded, tmp_path, empty_postgres, "--json")
    said, wrong = running.communicate(timeout=60)
    assert running.returncode == 0, wrong
    tables = msgspec.json.decode(said)["tables"]
    assert tables["cases"]["rows"] > 5
    assert tables["timeline"]["rows"] == len(told(embedded)["timeline"])

    play(tmp_path / "second", Desk(open_store(empty_postgres), layout, shards, categories))
    there, here = told(empty_postgres), told(layout.database)
    for name, rows in here.items():
        assert there[name] == rows, name
    with pytest.raises(StorageError, match="it has moved to postgresql at 127"):
        Desk(open_store(embedded), layout, shards, categories).start()


def waits_for(url: str, table: str) -> bool:
    """Whether a session waits for a lock on a table."""
    with psycopg.connect(url) as connection:
        query = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
        row = connection.execute(query, (table,)).fetchone()
    return bool(row and row[0])


def with_file(url: str, folder: Path) -> str:
    """The same URL with its password in a file, as it may stand on a command line."""
    head, _, tail = url.partition("://")[2].partition("@")
    user, _, password = head.partition(":")
    (folder / "password").write_text(password + "\n")
    return f"postgresql://{user}@{tail}?password_file={folder / 'password'}"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def city(tmp_path: Path) -> Iterator[City]:
    made = City(tmp_path / "city")
    made.put(made.transition("hydrant_tilted", "hyd-000", Edge.RAISE, 0))
    made.step(1000)
    yield made
    made.close()


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert main(["migrate", *words]) == code
    return capsys.readouterr().err


def test_a_source_under_a_desk_is_left_alone(
    city: City, tmp_path: Path, postgres: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from api.lease import Lease

    words = ("--data", str(tmp_path), "--from", str(city.layout.database), "--database", with_file(postgres, tmp_path))
    working = Lease(city.store, "desk")
    assert working.take()
    assert "a desk works on it" in refused(capsys, 4, *words)
    working.release()
    other = open_store(postgres)
    there = Lease(other, "desk-b")
    assert there.take()
    assert "a desk, or another copy, works on it" in refused(capsys, 4, *words)
    there.release()
    other.dispose()
    assert main(["migrate", *words]) == 0
    assert "cases " in capsys.readouterr().out
    assert told(postgres)[cases.name] == city.rows(cases)
    assert "rows in" in refused(capsys, 5, *words), "a second time there is no empty database"


def test_a_source_that_changed_meanwhile_is_found_out(
    city: City, tmp_path: Path, postgres: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--data", str(tmp_path), "--from", str(city.layout.database), "--database", with_file(postgres, tmp_path))
    with blocked(postgres, timeline.name):
        running = migrate(city.layout.database, tmp_path, postgres)
        eventually(lambda: waits_for(postgres, timeline.name), 20, "the copy at the timeline")
        running.kill()
        running.communicate()
    city.command("a1", "acknowledge", {"alarm": 1}, at=2000)
    assert "has changed since the copy began" in refused(capsys, 5, *words)
    assert moving(postgres), "no desk may work on it"
    assert MOVED not in {row["key"] for row in city.rows(meta)}


def test_from_needs_a_server_and_a_database(tmp_path: Path, postgres: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, to = str(tmp_path / "nowhere.db"), with_file(postgres, tmp_path)
    assert "say where to" in refused(capsys, 2, "--data", str(tmp_path), "--from", source)
    assert "no such database" in refused(capsys, 1, "--data", str(tmp_path), "--from", source, "--database", to)
