"""Several desks on one PostgreSQL: one writes, the others take over; killed, stopped or cut off, never two writers."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.desk import Desk
from api.lease import Lease
from citybrain.clock import system_clock
from citybrain.counters import Heartbeat, read_heartbeats
from citybrain.db.schema import alarms, commands, consumed, journal, lease, outbox
from citybrain.db.store import writing
from citybrain.errors import Fenced
from citybrain.layout import Run
from citybrain.mailbox import Command
from citybrain.model import Edge
from citybrain.webhook import new_secret
from tests.api.test_outbox import Platform
from tests.conftest import end, eventually
from tests.desk_city import T0, City, S, invariants

WITHIN_S = 10.0  # what is promised


@pytest.fixture
def city(tmp_path: Path, postgres: str) -> Iterator[City]:
    made = City(tmp_path, database=postgres)
    made.layout.write_run(Run(clock=system_clock(), shards=2))
    yield made
    made.close()


def desk_process(city: City, name: str, *words: str, url: str = "") -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "citybrain", "desk", "--data", str(city.layout.root), "--name", name, *words]
    with (city.layout.root / f"{name}.log").open("ab") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, env=environment(url or city.layout.store))


def environment(url: str) -> dict[str, str]:
    return os.environ | {"CITYBRAIN_DATABASE": url}


def beat_of(city: City, name: str, running: subprocess.Popen[bytes]) -> Heartbeat | None:
    beats = read_heartbeats(city.layout.run)
    return next((beat for beat in beats if beat.process == name and beat.pid == running.pid), None)


def standing_by(city: City, name: str, running: subprocess.Popen[bytes]) -> bool:
    beat = beat_of(city, name, running)
    return beat is not None and beat.gauges.get("standby") == 1.0


def working(city: City, name: str, running: subprocess.Popen[bytes]) -> bool:
    beat = beat_of(city, name, running)
    return beat is not None and "lag_s" in beat.gauges


def open_transactions(city: City) -> int:
    """How many desks have begun a transaction and say nothing more."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    with city.store.connect() as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


def holder(city: City) -> str:
    return str(city.one(lease)["holder"])


class Load:
    """Transitions of many devices, put into both shards' logs: each opens one alarm, and one case or rescue."""

    def __init__(self, city: City) -> None:
        self.city = city
        self.put = 0

    def add(self, amount: int) -> None:
        for _ in range(amount):
            n = self.put
            hydrant, lift = f"hyd-x{n:05d}", f"lift-x{n:05d}"
            self.city.put(self.city.transition("hydrant_tilted", hydrant, Edge.RAISE, n))
            self.city.put(self.city.transition("elevator_trapped", lift, Edge.RAISE, n))
            self.put += 1

    def taken(self) -> int:
        """How many transitions the desks have committed."""
        return sum(row["offset"] for row in self.city.rows(consumed))

    def check(self) -> None:
        """Nothing lost, nothing twice: by the journal, the offsets, the alarms, the cases and the outbox."""
        city, total = self.city, 2 * self.put
        written = city.rows(journal)
        assert [row["n"] for row in written] == list(range(1, len(written) + 1)), "the journal's numbers are dense"
        inputs = [(row["shard"], row["offset"]) for row in written if row["source"] == "transition"]
        assert len(inputs) == len(set(inputs)) == total, "each (shard, offset) once"
        assert len({row["subject"] for row in city.rows(alarms)}) == len(city.rows(alarms)) == total
        assert city.kinds() == {"case": self.put, "rescue": self.put}
        assert [row["n"] for row in city.rows(outbox)] == list(range(1, total + 1))
        invariants(city)


# --- the lease itself ---------------------------------------------------------------------------------------------


def test_who_lost_the_lease_can_write_nothing(tmp_path: Path, database: str) -> None:
    """On both databases: a transaction of an old generation is refused whole."""
    city = City(tmp_path, database=database)
    late = Lease(city.store, "desk", 0.0)
    assert late.take()
    stopped = Desk(city.store, city.layout, (0, 1), city.desk.categories, logs=city.logs, lease=late)
    stopped.start()
    city.put(city.transition("hydrant_tilted", "hyd-000", Edge.RAISE, 0))
    assert stopped.step(T0) == 2
    if not database:
        late._lock.release()  # type: ignore[union-attr]  # as the system does when a process ends
    quick = Lease(city.store, "desk-b", 5.0)
    eventually(quick.take)
    before = city.rows(journal)
    city.mailbox.put(Command("c1", "acknowledge", "wang", T0, {"alarm": 1}))
    city.put(city.transition("hydrant_tilted", "hyd-001", Edge.RAISE, S))
    with pytest.raises(Fenced, match="desk had the lease as number 1; desk-b has it as number 2"):
        stopped.step(T0 + S)
    assert city.rows(journal) == before
    assert not late.held
    working = Desk(city.store, city.layout, (0, 1), city.desk.categories, logs=city.logs, lease=quick)
    working.start()
    assert working.step(T0 + S) == 2, "what the fenced desk had taken is taken by the other"
    assert [row["state"] for row in city.rows(alarms)] == ["acked", "unack"]
    city.close()


def test_a_lease_is_not_taken_while_it_is_renewed_nor_inside_a_transaction(city: City) -> None:
    first, second = Lease(city.store, "desk", 2.0), Lease(city.store, "desk-b", 2.0)
    assert first.take()
    assert not second.take()
    with writing(city.store) as connection:
        first.hold(connection)
        time.sleep(2.1)  # the lease itself: longer than it lasts, and the row is locked
        assert not second.take()
    eventually(second.take, 5, "the second takes it")
    with pytest.raises(Fenced), writing(city.store) as connection:
        first.hold(connection)
    second.release()
    assert first.take(), "one that ends in order is not waited for"


class Relay:
    """A line to the server that can be cut: nothing goes through any more, and neither side is told."""

    def __init__(self, host: str, port: int) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.target = (host, port)
        self.whole = threading.Event()
        self.whole.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(self.target)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self.whole.wait()
                other.sendall(data)
        for side in (one, other):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.whole.set()
        self.server.close()


def test_a_command_that_another_desk_took_meanwhile_is_passed_over(city: City) -> None:
    """One that was stopped while it read the mailbox sees names whose files are gone."""
    (city.mailbox.folder).mkdir(parents=True)
    (city.mailbox.folder / "000000000000001-gone.json").symlink_to("nowhere")
    city.mailbox.put(Command("c1", "acknowledge", "wang", T0, {"alarm": 1}))
    assert [command.id for _, command in city.mailbox.take()[0]] == ["c1"]


# --- two real processes -------------------------------------------------------------------------------------------


def pair(city: City, *words: str) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Start a desk that works and one that stands by."""
    first = desk_process(city, "desk", *words)
    eventually(lambda: working(city, "desk", first), 30, "the first desk")
    second = desk_process(city, "desk-b", *words)
    eventually(lambda: standing_by(city, "desk-b", second), 30, "the second desk stands by")
    return first, second


@pytest.mark.soak
def test_a_holder_that_is_cut_off_is_replaced_and_stands_by_when_it_is_back(city: City) -> None:
    load = Load(city)
    address, _, _ = city.layout.store.rpartition("@")[2].partition("/")
    host, _, port = address.partition(":")
    relay = Relay(host, int(port))
    through = city.layout.store.replace(address, f"127.0.0.1:{relay.port}")
    first = desk_process(city, "desk", url=through)
    eventually(lambda: working(city, "desk", first), 30, "the first desk")
    second = desk_process(city, "desk-b")
    try:
        eventually(lambda: standing_by(city, "desk-b", second), 30, "the second desk stands by")
        load.add(30)
        eventually(lambda: load.taken() > 0, 30, "work under way")
        relay.whole.clear()
        eventually(lambda: holder(city) == "desk-b", WITHIN_S, "the takeover")
        load.add(10)
        eventually(lambda: load.taken() == 2 * load.put, 30, "all taken")
        relay.whole.set()
        eventually(lambda: standing_by(city, "desk", first), 20, "it stands by")
    finally:
        end(first)
        end(second)
        relay.close()
    load.check()


def test_a_killed_holder_is_replaced_and_every_message_is_delivered(city: City) -> None:
    """At least once; a repeat has the same id and the same bytes."""
    secret = new_secret()
    (city.layout.secrets / "platform.key").write_text(secret)
    platform = Platform(secret, lambda id, times: (202, {}))
    threading.Thread(target=platform.serve_forever, args=(0.02,), daemon=True).start()
    load = Load(city)
    first, second = pair(city, "--platform", platform.url)
    try:
        load.add(40)
        eventually(lambda: len(set(platform.got)) >= 10, 30, "deliveries under way")
        first.kill()
        eventually(lambda: holder(city) == "desk-b", WITHIN_S, "the takeover")
        eventually(lambda: load.taken() == 2 * load.put, 30, "all taken")
        eventually(lambda: {row["state"] for row in city.rows(outbox)} == {"delivered"}, 60, "all delivered")
    finally:
        end(first)
        end(second)
        platform.shutdown()
        platform.server_close()
    load.check()
    assert set(platform.got) == {row["id"] for row in city.rows(outbox)}


@pytest.mark.soak
def test_a_command_that_was_given_over_a_failover_has_one_effect(city: City) -> None:
    load = Load(city)
    first, second = pair(city)
    try:
        load.add(1)
        eventually(lambda: load.taken() == 2, 30, "an alarm")
        first.send_signal(signal.SIGSTOP)
        city.mailbox.put(Command("c1", "acknowledge", "wang", T0, {"alarm": 1}))
        eventually(lambda: city.rows(commands), WITHIN_S + 5, "the other takes it")
        first.send_signal(signal.SIGCONT)
        city.mailbox.put(Command("c1", "acknowledge", "wang", T0, {"alarm": 1}))  # given twice
        eventually(lambda: standing_by(city, "desk", first), 20, "it stands by")
        eventually(lambda: not city.mailbox.take()[0], 20, "taken")
    finally:
        first.send_signal(signal.SIGCONT)
        end(first)
        end(second)
    assert [row["result"] for row in city.rows(commands)] == ["applied"]
    load.check()


@pytest.mark.parametrize("least", [2, pytest.param(12, marks=pytest.mark.soak)])
def test_never_two_writers(city: City, least: int) -> None:
    """The holder is stopped at random moments of heavy work, replaced, and goes on: it must not write a single row."""
    chance, load = random.Random(11), Load(city)
    desks = dict(zip(("desk", "desk-b"), pair(city, "--lease-s", "2"), strict=True))
    try:
        stops = inside = 0
        while stops < least or (not inside and stops < 8):
            stops += 1
            load.add(60)
            now = holder(city)
            before = load.taken()
            eventually(lambda least=before: load.taken() > least, 30, "work under way")  # type: ignore[misc]
            time.sleep(chance.random() * 0.1)  # a moment, not a wait
            desks[now].send_signal(signal.SIGSTOP)
            inside += open_transactions(city)
            eventually(lambda was=now: holder(city) != was, WITHIN_S, "the takeover")  # type: ignore[misc]
            load.add(10)
            desks[now].send_signal(signal.SIGCONT)
            eventually(lambda was=now: standing_by(city, was, desks[was]), 15, "it stands by")  # type: ignore[misc]
        eventually(lambda: load.taken() == 2 * load.put, 60, "all taken")
    finally:
        for running in desks.values():
            running.send_signal(signal.SIGCONT)
            end(running)
    load.check()
    # a desk that the machine starves for longer than its lease loses it, too
    assert city.one(lease)["generation"] >= 1 + stops
    assert inside, "it was never stopped between its decision and its commit"
