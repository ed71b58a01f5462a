"""Deliveries: a platform that fails, repeats, is slow or gone, as a real HTTP server; and what each answer means."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.desk_process import Loop, make_deliverer
from api.lease import Lease
from api.outbox import MOST_MS, MOST_URGENT_MS, Deliverer, Outgoing, backoff_ms, judge, retry_after_ms, unreachable
from api.platforms.webhook import new_secret, verify
from citybrain.clock import real_unix_ms, real_unix_s, system_clock
from citybrain.counters import Counters
from citybrain.db.schema import outbox
from citybrain.layout import Run
from tests.conftest import eventually, unused_port
from tests.desk_city import HYDRANTS, City, S, invariants

NOW = 1_800_000_000_000
ITEM = Outgoing("CB1.1", b"{}", urgent=False, attempts=0)


# --- what an answer means -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "attempts", "outcome"),
    [
        (200, 0, "delivered"), (201, 0, "delivered"), (204, 3, "delivered"), (409, 0, "delivered"),
        (410, 0, "dead"),
        (400, 0, "retry"), (400, 6, "retry"), (400, 7, "dead"), (401, 7, "dead"), (404, 7, "dead"), (302, 7, "dead"),
        (408, 99, "retry"), (425, 99, "retry"), (429, 99, "retry"), (500, 99, "retry"), (503, 99, "retry"),
    ],
)  # fmt: skip
def test_what_each_answer_means(status: int, attempts: int, outcome: str) -> None:
    attempt = judge(msgspec.structs.replace(ITEM, attempts=attempts), status, None, NOW)
    assert attempt.outcome == outcome
    assert attempt.gone == (status == 410)
    assert (attempt.error is None) == (outcome == "delivered")
    assert (attempt.next_at > NOW) == (outcome == "retry")


@given(st.integers(0, 200), st.booleans(), st.text(min_size=1, max_size=30))
def test_the_wait_doubles_to_its_most_and_is_the_same_every_time(attempts: int, urgent: bool, id: str) -> None:
    item = Outgoing(id, b"", urgent, attempts)
    wait = backoff_ms(item)
    whole = min(1000 * 2**attempts, MOST_URGENT_MS if urgent else MOST_MS)
    assert 0.8 * whole <= wait <= 1.2 * whole
    assert wait == backoff_ms(item)
    assert unreachable(item, "no route", NOW).next_at == NOW + wait


def test_the_jitter_spreads() -> None:
    waits = {backoff_ms(Outgoing(f"CB{n}.1", b"", urgent=False, attempts=5)) for n in range(50)}
    assert len(waits) > 40


@pytest.mark.parametrize(
    ("header", "wait_ms"),
    [(None, 0), ("", 0), ("7", 7000), (" 7 ", 7000), ("0", 0), ("-3", 0), ("soon", 0), ("999999999999", 86_400_000),
     (formatdate(NOW / 1000 + 90, usegmt=True), 90_000), (formatdate(NOW / 1000 - 90, usegmt=True), 0)],
)  # fmt: skip
def test_retry_after_in_seconds_and_as_a_date(header: str | None, wait_ms: int) -> None:
    assert retry_after_ms(header, NOW) == wait_ms
    assert judge(ITEM, 503, header, NOW).next_at == NOW + max(wait_ms, backoff_ms(ITEM))


# --- a real platform ----------------------------------------------------------------------------------------------


class Platform(http.server.ThreadingHTTPServer):
    """Answers what `answer(id, times)` says: (status, headers), or None to hang up."""

    daemon_threads = True

    def __init__(self, secret: str, answer: Callable[[str, int], tuple[int, dict[str, str]] | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.secret = secret
        self.answer = answer
        self.got: list[str] = []
        self.bodies: dict[str, bytes] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/cases"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Platform

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        id = verify([self.server.secret], dict(self.headers.items()), body, real_unix_s())
        assert self.headers["content-type"] == "application/cloudevents+json"
        with self.server.lock:
            self.server.got.append(id)
            assert self.server.bodies.setdefault(id, body) == body, "a repeat has the same bytes"
            times = self.server.got.count(id)
        answer = self.server.answer(id, times)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer[0])
        for name, value in {**answer[1], "content-length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Office:
    """A desk with a platform: `go(until)` runs the process's own loop body until something holds."""

    def __init__(self, city: City, platform: Platform) -> None:
        self.city = city
        self.platform = platform
        self.deliverer = Deliverer(platform.url, platform.secret)
        self.counters = city.desk.counters
        self.loop = Loop(city.desk, Lease(city.store, "desk"), self.deliverer, Run(clock=system_clock()), self.counters)
        self.deliverer.start()

    def go(self, holds: Callable[[], object], within_s: float = 15) -> None:
        def once() -> bool:
            self.loop.once()
            return bool(holds())

        eventually(once, within_s)

    def states(self) -> dict[str, str]:
        return {row["id"].rpartition("-")[2]: row["state"] for row in self.city.rows(outbox)}


Answer = Callable[[str, int], tuple[int, dict[str, str]] | None]


@pytest.fixture
def open_office(tmp_path: Path, database: str) -> Iterator[Callable[[Answer], Office]]:
    offices: list[Office] = []

    def make(answer: Answer) -> Office:
        platform = Platform(new_secret(), answer)
        threading.Thread(target=platform.serve_forever, args=(0.02,), daemon=True).start()
        offices.append(Office(City(tmp_path, database=database), platform))
        return offices[-1]

    yield make
    for office in offices:
        office.deliverer.stop()
        office.platform.shutdown()
        office.platform.server_close()
        invariants(office.city)
        office.city.close()


OK: tuple[int, dict[str, str]] = (201, {})


def test_a_platform_that_fails_and_hangs_up_gets_everything_once_it_works(
    open_office: Callable[[Answer], Office],
) -> None:
    office = open_office(lambda id, times: [None, (503, {"retry-after": "1"}), OK][min(times, 3) - 1])
    office.city.raises("hydrant_tilted", *HYDRANTS[:4], at=0)
    office.go(lambda: set(office.states().values()) == {"delivered"})
    assert sorted(office.platform.got) == sorted([id for id in office.platform.bodies for _ in range(3)])
    rows = office.city.rows(outbox)
    assert {row["attempts"] for row in rows} == {3}
    assert office.counters.values["delivered_total"] == 4
    assert all(row["delivered_at"] is not None for row in rows)
    assert any("503" in warning for warning in office.counters.warnings)
    event = msgspec.json.decode(office.platform.bodies[rows[0]["id"]])
    assert {name: event[name] for name in ("specversion", "source", "type", "id", "subject")} == {
        "specversion": "1.0",
        "source": "urn:citybrain:desk",
        "type": "cn.citybrain.case.created",
        "id": "CB20261125-000001.1",
        "subject": "CB20261125-000001",
    }
    assert event["data"]["unit"] == {"code": "water", "zh": "供水公司", "en": "Water company"}


def test_a_platform_that_knows_a_case_already_has_it(open_office: Callable[[Answer], Office]) -> None:
    office = open_office(lambda id, times: (409, {}))
    office.city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    office.go(lambda: office.states() == {"000001.1": "delivered"})
    assert len(office.platform.got) == 1


def test_a_platform_that_is_gone_is_told_no_more_and_somebody_is_warned(
    open_office: Callable[[Answer], Office],
) -> None:
    office = open_office(lambda id, times: (410, {}))
    office.city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    office.go(lambda: office.states() == {"000001.1": "dead"})
    assert any("CB20261125-000001.1: given up: HTTP 410" in warning for warning in office.counters.warnings)
    assert office.counters.values["delivery_dead_total"] == 1


def test_messages_of_one_case_come_in_order_though_the_first_fails(open_office: Callable[[Answer], Office]) -> None:
    office = open_office(lambda id, times: (500, {}) if id.endswith(".1") and times == 1 else OK)
    office.city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    office.city.clears("hydrant_tilted", HYDRANTS[0], at=S)
    office.go(lambda: set(office.states().values()) == {"delivered"})
    assert [id[-1] for id in office.platform.got] == ["1", "1", "2"]


def test_a_slow_platform_holds_up_neither_rescues_nor_the_desk(open_office: Callable[[Answer], Office]) -> None:
    release = threading.Event()
    slow = {"CB20261125-000001.1", "CB20261125-000002.1", "CB20261125-000003.1"}

    def answer(id: str, times: int) -> tuple[int, dict[str, str]]:
        if id in slow:
            release.wait(8)
        return OK

    office = open_office(answer)
    office.city.raises("hydrant_tilted", *HYDRANTS[:3], at=0)
    office.go(lambda: len(office.platform.got) == 2)  # both ordinary threads hang in there
    office.city.raises("elevator_trapped", "lift-a1", at=S)
    office.go(lambda: office.states()["000004.1"] == "delivered", within_s=5)
    assert {state for id, state in office.states().items() if id != "000004.1"} == {"pending"}
    release.set()
    office.go(lambda: set(office.states().values()) == {"delivered"})


def test_rescues_are_due_first(tmp_path: Path) -> None:
    city = City(tmp_path)
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    city.raises("elevator_trapped", "lift-a1", "lift-b1", at=S)
    due = city.desk.due(real_unix_ms())
    assert [(item.id[-8:], item.urgent) for item in due] == [
        ("000002.1", True), ("000003.1", True), ("000001.1", False)]  # fmt: skip
    city.close()


def test_a_result_that_was_not_written_is_delivered_again_under_the_same_id(
    open_office: Callable[[Answer], Office],
) -> None:
    office = open_office(lambda id, times: OK)
    office.city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    office.deliverer.offer(office.city.desk.due(real_unix_ms()))
    eventually(lambda: office.platform.got, 10)
    eventually(office.deliverer.results, 10)  # and here the process dies: nobody writes it
    office.city.restart()
    second = Deliverer(office.platform.url, office.platform.secret)
    second.start()
    loop = Loop(office.city.desk, Lease(office.city.store, "desk"), second, Run(clock=system_clock()), office.counters)
    eventually(lambda: loop.once() >= 0 and office.states() == {"000001.1": "delivered"}, 10)
    second.stop()
    assert office.platform.got == ["CB20261125-000001.1"] * 2, "the platform knows it by its id"


def test_nobody_there_means_again_and_says_where(tmp_path: Path) -> None:
    city = City(tmp_path)
    deliverer = Deliverer(f"http://127.0.0.1:{unused_port()}/cases", new_secret())
    deliverer.start()
    loop = Loop(city.desk, Lease(city.store, "desk"), deliverer, Run(clock=system_clock()), city.desk.counters)
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    eventually(lambda: loop.once() >= 0 and city.one(outbox)["attempts"] >= 2, 10)
    row = city.one(outbox)
    assert row["state"] == "pending"
    assert row["last_error"].startswith("http://127.0.0.1:")
    deliverer.stop()
    city.close()


def test_without_a_secret_nothing_is_delivered(tmp_path: Path) -> None:
    city = City(tmp_path)
    run = Run(clock=system_clock(), platform_port=8099)
    assert make_deliverer(city.layout, run, None) is None
    (city.layout.secrets / "platform.key").write_text(new_secret())
    made = make_deliverer(city.layout, run, None)
    assert made is not None
    assert made.endpoint == "http://127.0.0.1:8099/cases"
    loop = Loop(city.desk, Lease(city.store, "desk"), None, run, Counters("desk"))
    city.raises("hydrant_tilted", HYDRANTS[0], at=0)
    loop.once()
    assert city.one(outbox)["state"] == "pending"
    city.close()
