"""PostgreSQL where SQLite cannot stand for it: who is let in, what is said when it is away, restarts, time-outs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import insert, text

from api.desk import Desk, replay
from api.desk_process import Loop
from api.lease import Lease
from citybrain.cli import main
from citybrain.clock import system_clock
from citybrain.counters import Counters
from citybrain.db.migrations import HEAD, revision, upgrade
from citybrain.db.place import VARIABLE, layout_of, shown
from citybrain.db.schema import alarms, commands, metadata, timeline
from citybrain.db.store import open_store, reading, writing
from citybrain.errors import DiskFull, StorageError, Unavailable, UsageError
from citybrain.layout import Run
from citybrain.mailbox import Command
from citybrain.model import Edge
from tests.api.test_desk import HISTORY, play
from tests.api.test_postgres_migrate import with_file
from tests.conftest import end, eventually, unused_port
from tests.desk_city import T0, City, S, everything, invariants
from tests.postgres import PASSWORD, Cluster

# --- where it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u@h/d", "expected postgresql://"),
        ("postgresql://h", "expected postgresql://"),
        ("postgresql:///city", "expected postgresql://"),
        ("postgresql://u@h:port/city", "expected postgresql://"),
        ("postgresql://u@h/city?sslmod=require", "unknown option 'sslmod'"),
        ("city.db", "expected postgresql://"),
        ("postgresql://u:hunter2@h/city", "seen by everybody"),
        ("postgresql://u:hunter2@h:port/city", "expected postgresql://"),
    ],
)
def test_a_wrong_url_is_refused_and_no_password_is_said(
    url: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", "--data", str(tmp_path), "--database", url]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "hunter2" not in said


def test_the_environment_may_hold_the_password_and_the_command_line_goes_first(tmp_path: Path) -> None:
    known = {VARIABLE: "postgresql://u:hunter2@h/city"}
    assert layout_of(Namespace(data=tmp_path, database=None), known).place == known[VARIABLE]
    other = "postgresql://u@elsewhere/city"
    assert layout_of(Namespace(data=tmp_path, database=other), known).place == other
    assert layout_of(Namespace(data=tmp_path, database=None), {}).place == tmp_path / "city.db"
    assert shown(known[VARIABLE]) == "postgresql at h:5432/city"
    with pytest.raises(UsageError, match="postgresql at h"):
        layout_of(Namespace(data=tmp_path, database=None), {VARIABLE: "http://u:hunter2@h/city"})


def test_a_missing_password_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"postgresql://u@127.0.0.1/city?password_file={tmp_path / 'none'}"
    assert main(["migrate", "--data", str(tmp_path), "--database", url]) == 3
    assert f"{tmp_path / 'none'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["desk", "migrate"])
@pytest.mark.parametrize("wrong", ["port", "password", "database"])
def test_a_server_that_does_not_let_us_in_is_named_without_the_password(
    command: str, wrong: str, tmp_path: Path, postgres: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    address, _, name = postgres.rpartition("@")[2].partition("/")
    if wrong == "port":
        address = f"127.0.0.1:{unused_port()}"
    secret = "hunter2" if wrong == "password" else PASSWORD
    name = "nowhere" if wrong == "database" else name
    monkeypatch.setenv(VARIABLE, f"postgresql://citybrain:{secret}@{address}/{name}")
    assert main([command, "--data", str(tmp_path)]) == 4
    said = capsys.readouterr().err
    assert f"postgresql at {address}/{name}" in said
    assert secret not in said


def test_nothing_shows_the_password_of_a_desk_that_works(tmp_path: Path, postgres: str) -> None:
    city = City(tmp_path, database=postgres)
    url = with_file(postgres, tmp_path)
    argv = [sys.executable, "-m", "citybrain", "desk", "--data", str(tmp_path), "--database", url]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as running:
        try:
            eventually((tmp_path / "run" / "desk.heartbeat.json").exists, 20)
            assert PASSWORD not in Path(f"/proc/{running.pid}/cmdline").read_text()
        finally:
            end(running)
        assert running.stderr is not None
        assert PASSWORD.encode() not in running.stderr.read()
    assert PASSWORD not in (tmp_path / "run" / "desk.heartbeat.json").read_text()
    assert PASSWORD not in repr(city.store)
    city.close()


def test_a_newer_schema_is_refused(empty_postgres: str) -> None:
    store = open_store(empty_postgres)
    upgrade(store)
    with store.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match=r"postgresql at .*: schema 9999 is newer than this program's"):
        upgrade(store)
    store.dispose()


def test_desks_that_start_at_once_make_the_schema_once(empty_postgres: str) -> None:
    stores = [open_store(empty_postgres) for _ in range(3)]
    failed: list[BaseException] = []

    def start(number: int) -> None:
        try:
            upgrade(stores[number])
        except BaseException as error:  # noqa: BLE001  the test tells it
            failed.append(error)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert revision(stores[0]) == HEAD
    for store in stores:
        store.dispose()


def test_every_table_numbers_its_rows_without_gaps() -> None:
    """A sequence leaves gaps where a transaction fails: a replay of the journal would give other rows."""
    for table in metadata.tables.values():
        for column in table.primary_key:
            if column.name in ("id", "n") and column.type.python_type is int:
                assert column.default is not None, f"{table.name}: use _number() of citybrain.db.schema"


@settings(max_examples=8, deadline=None, suppress_health_check=[*HealthCheck])
@given(history=HISTORY)
def test_any_history_keeps_the_invariants_and_its_journal_tells_it_again(
    history: list[tuple[int, tuple[str, object]]], tmp_path_factory: pytest.TempPathFactory, cluster: Cluster
) -> None:
    """As in test_desk.py; and told again to SQLite, where it must give the very same rows."""
    name = cluster.lend()
    city = City(tmp_path_factory.mktemp("city"), database=cluster.url(name))
    play(city, history)
    invariants(city)
    again = open_store(city.layout.root / "again.db")
    desk = city.make_desk(again)
    desk.start()
    replay(city.store, desk)
    told, retold = everything(city.store), everything(again)
    again.dispose()
    city.close()
    cluster.take_back(name)
    for table, rows in told.items():
        assert rows == retold[table], table


# --- while it works -----------------------------------------------------------------------------------------------


def test_readers_only_read_and_are_not_waited_for_for_ever(postgres: str) -> None:
    reader = open_store(postgres, readonly=True)
    with pytest.raises(Unavailable, match="read-only"), reading(reader) as connection:
        connection.execute(insert(alarms).values(id=1))
    with pytest.raises(Unavailable, match="statement timeout"), reading(reader) as connection:
        connection.execute(text("SELECT set_config('statement_timeout', '100', false); SELECT pg_sleep(5)"))
    with reader.connect() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar() == "5s"
        assert connection.execute(text("SHOW transaction_isolation")).scalar() == "repeatable read"
    reader.dispose()
    writer = open_store(postgres)
    with writing(writer) as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"
    writer.dispose()


def test_a_character_that_it_cannot_hold_stops_nobody(tmp_path: Path, postgres: str) -> None:
    city = City(tmp_path, database=postgres)
    city.step(0)
    city.mailbox.put(Command("c1", "acknowledge", "wa\x00ng", T0, {"alarm": 1}, "\x00"))
    city.step(S)
    assert [row["actor"] for row in city.rows(commands)] == ["wa\ufffdng"]
    city.close()


def test_a_full_disk_there_is_waited_out(tmp_path: Path, postgres: str) -> None:
    """The server says 53100 (here by a trigger): nothing is written, and the next step writes it all."""
    city = City(tmp_path, database=postgres)
    with city.store.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE 'could not extend file' USING ERRCODE = '53100'; END $$"
        )
        connection.exec_driver_sql("CREATE TRIGGER full_disk BEFORE INSERT ON timeline EXECUTE FUNCTION full_disk()")
    city.put(*(city.transition("hydrant_tilted", f"hyd-{n:03d}", Edge.RAISE, n) for n in range(30)))
    with pytest.raises(DiskFull, match="could not extend file"):
        city.step(S)
    assert city.rows(alarms) == city.rows(timeline) == []
    with city.store.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER full_disk ON timeline")
        connection.exec_driver_sql("DROP FUNCTION full_disk()")
    city.step(S)
    assert len(city.rows(alarms)) == 30
    city.close()


@pytest.mark.parametrize("number", [signal.SIGQUIT, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_server_that_restarts_in_the_middle_loses_and_doubles_nothing(
    tmp_path: Path, mortal_cluster: Cluster, postgres: str, number: signal.Signals
) -> None:
    city = City(tmp_path, database=postgres)
    counters = Counters("desk")
    store = open_store(postgres)
    lease = Lease(store, "desk")
    desk = Desk(store, city.layout, (0, 1), city.desk.categories, counters=counters, logs=city.logs, lease=lease)
    desk.start()
    city.put(*(city.transition("hydrant_tilted", f"hyd-{n:05d}", Edge.RAISE, n) for n in range(1200)))
    loop = Loop(desk, lease, None, Run(clock=system_clock(), shards=2), counters)
    running = threading.Thread(target=loop)
    running.start()
    try:
        eventually(lambda: counters.values["alarms_total"] >= 500, 30, "the first step")
        mortal_cluster.stop(number)
        eventually(lambda: counters.values["errors_total{stage=log}"] >= 1, 20, "the loss is counted")
        assert any("postgresql at" in warning for warning in counters.warnings)
        mortal_cluster.start()
        eventually(lambda: counters.values["alarms_total"] == 1200, 60, "it goes on")
    finally:
        loop.stop.set()
        running.join(20)
    city.store.dispose()  # its connections were to the server that is gone
    assert len(city.rows(alarms)) == 1200
    invariants(city)
    store.dispose()
    city.close()


def test_pages_of_a_large_database_use_an_index(postgres: str) -> None:
    """What `/v1/alarms` and a case's timeline ask for, with 100 000 rows: no scan of the table."""
    from sqlalchemy import func, literal, select

    store = open_store(postgres)
    numbers = select(func.generate_series(1, 100_000).label("n")).subquery()
    columns = ["id", "entity_id", "at", "entity", "event", "before", "after", "reason", "actor"]
    values = [numbers.c.n, numbers.c.n % 20_000, numbers.c.n, *(literal("case") for _ in columns[3:])]
    with writing(store) as connection:
        connection.execute(insert(timeline).from_select(columns, select(*values), include_defaults=False))
    with store.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE timeline"))
        for query in (
            "SELECT * FROM timeline WHERE entity = 'case' AND entity_id = 77 ORDER BY id",
            "SELECT * FROM timeline WHERE id < 50000 ORDER BY id DESC LIMIT 50",
        ):
            plan = "\n".join(connection.execute(text(f"EXPLAIN {query}")).scalars())
            assert "Index" in plan, plan
            assert "Seq Scan" not in plan, plan
    store.dispose()
