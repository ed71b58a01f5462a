"""The simulated operator, and the pull that fills what its pushes lost."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from citybrain.clock import HOUR_MS, MINUTE_MS, real_unix_s
from citybrain.counters import Counters
from citybrain.errors import Unavailable
from citybrain.layout import Layout, Run
from citybrain.model import Lane, Reading
from citybrain.webhook import new_secret
from gateway.clouds.config import Keys, read_clouds, read_keys
from gateway.clouds.mapping import Decoder
from gateway.clouds.operators import Peer
from gateway.clouds.pull import Page, Schedule, fetch
from simulators.cloud import (
    FAILURES_TO_PAUSE,
    NAME,
    PAGE_MESSAGES,
    PAUSE_MS,
    RETRY_MS,
    TRIES,
    Batch,
    Client,
    Habits,
    Operator,
    PullServer,
    contract,
    message_of,
    step,
)
from simulators.cloud_book import KEEP_MS, Book
from tests.cloud_site import CloudSite, imei, registry
from tests.conftest import eventually, unused_port

NOW = 1_767_225_600_000
RELIABLE = Habits(0, 0, 0, 0, outages=0)
KEYS = Keys("t" * 20, new_secret())


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    made = Book(tmp_path / "operator")
    made.start()
    yield made
    made.close()


def operator_of(book: Book, habits: Habits = RELIABLE, seed: int = 7) -> Operator:
    return Operator(book, seed, habits, Counters("operator"))


def messages(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [message_of(Reading(f"hyd-{n}", NOW + n, {"pressure_mpa": 0.3})) for n in range(first, first + count)]


def pushes(operator: Operator, now_ms: int, error: str = "") -> list[Batch]:
    found = []
    while (batch := operator.due(now_ms)) is not None:
        found.append(batch)
        operator.pushed(batch, error, now_ms)
    return found


# --- its habits ---


def test_a_reliable_operator_pushes_everything_once(book: Book) -> None:
    operator = operator_of(book)
    operator.told(messages(250), NOW)
    bodies = [msgspec.json.decode(batch.body) for batch in pushes(operator, NOW)]
    assert [len(body) for body in bodies] == [100, 100, 50]
    assert [message for body in bodies for message in body] == messages(250)
    assert operator.queued == 0


def test_it_tries_three_times_and_is_then_silent(book: Book) -> None:
    operator = operator_of(book)
    operator.told(messages(1), NOW)
    tries = 0
    for number in range(10):
        tries += len(pushes(operator, NOW + number * RETRY_MS, "refused"))
    assert tries == TRIES
    assert operator.counters.values["given_up_total"] == 1
    assert operator.counters.details["last_error"] == "refused"
    assert book.page(0, 10)[0], "but whoever asks is told"


def test_after_many_failures_it_pauses(book: Book) -> None:
    operator = operator_of(book)
    for number in range(FAILURES_TO_PAUSE):
        operator.told(messages(1, number), NOW)
    assert len(pushes(operator, NOW, "refused")) == FAILURES_TO_PAUSE
    assert operator.counters.values["pauses_total"] == 1
    operator.told(messages(5), NOW + RETRY_MS)
    assert operator.counters.values["unpushed_total{reason=away}"] == 5
    assert pushes(operator, NOW + PAUSE_MS - 1) == []
    assert pushes(operator, NOW + PAUSE_MS)


def test_what_it_does_follows_from_the_seed(tmp_path: Path) -> None:
    def told(seed: int) -> list[Batch]:
        book = Book(tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}")
        book.start()
        operator = operator_of(book, Habits(lost=0.2, repeated=0.2, outages=0.0), seed)
        for number in range(50):
            operator.told(messages(20, number), NOW + number)
        book.close()
        return pushes(operator, NOW + HOUR_MS)

    assert told(1) == told(1)
    assert told(1) != told(2)
    assert 40 * 0.6 < len(told(1)) < 75


def test_it_is_away_now_and_then_and_answers_nobody(book: Book) -> None:
    operator = operator_of(book, Habits(0, 0, 0, 0))
    away = [minute for minute in range(7 * 24 * 60) if operator.away(NOW + minute * MINUTE_MS)]
    assert 0 < len(away) < 7 * 4 * 20
    now_ms = NOW + away[0] * MINUTE_MS
    operator.told(messages(3), now_ms)
    assert pushes(operator, now_ms) == []
    assert len(book.page(0, 10)[0]) == 3


def test_the_book_pages_and_forgets_after_a_week(book: Book) -> None:
    book.add(messages(5), NOW)
    found, last, more = book.page(0, 3)
    assert (len(found), more) == (3, True)
    found, last, more = book.page(last, 3)
    assert (len(found), more) == (2, False)
    assert book.page(last, 3) == ([], last, False)
    book.add(messages(1, 5), NOW + KEEP_MS + 1)
    assert len(book.page(0, 10)[0]) == 1


def test_its_contract_is_a_configuration_that_changes_no_number(tmp_path: Path) -> None:
    path = tmp_path / "simulated.yaml"
    run = Layout(tmp_path).read_run()
    path.write_text(yaml.safe_dump(contract(registry(), run)))
    operator = read_clouds(path).operators[NAME]
    assert operator.pull is not None
    decoder = Decoder(operator)
    reading = Reading("8640", NOW, {"pressure_mpa": 0.1 + 0.2, "battery_v": 1 / 3})
    (said,) = decoder.decode(msgspec.json.encode([message_of(reading)])).said
    assert (said.device, said.observed_at, said.values[0]) == ("8640", NOW, reading.values)


# --- the pull ---


class Answering:
    """An operator's HTTP side that answers as it is told."""

    def __init__(self) -> None:
        self.reply: tuple[int, bytes, dict[str, str]] = (200, b"{}", {})
        self.asked: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, {name.lower(): text for name, text in self.headers.items()}))
                status, content, headers = outer.reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/out/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def answering() -> Iterator[Answering]:
    made = Answering()
    yield made
    made.server.shutdown()
    made.server.server_close()


def asked(answering: Answering, cursor: str = "a b&c") -> Page:
    return fetch(answering.url, cursor, KEYS, "pull-1", real_unix_s())


def test_a_page_is_asked_for_by_cursor_and_signed(answering: Answering) -> None:
    answering.reply = (200, b'{"messages": [{"x": 1}], "next": "5", "more": true, "else": 0}', {})
    assert asked(answering) == Page([{"x": 1}], "5", True)
    ((path, headers),) = answering.asked
    assert path == "/out/readings?after=a+b%26c"
    assert headers["authorization"] == f"Bearer {KEYS.token}"
    assert headers["webhook-id"] == "pull-1"


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        ((503, b"", {}), "answered 503"),
        ((302, b"", {"location": "http://127.0.0.1:1/elsewhere"}), "answered 302"),
        ((200, b"<html>", {}), "no page of messages"),
        ((200, b'{"messages": 5, "next": "x"}', {}), "no page of messages"),
        ((200, b'{"messages": []}', {}), "no page of messages"),
        ((200, b'{"messages": [NaN], "next": "x"}', {}), "no page of messages"),
        ((200, b"[" * (9 << 20), {}), "bytes in one page"),
        ((200, b"{}", {"content-length": "500"}), "no page of messages"),
    ],
)
def test_an_answer_that_is_no_page_is_an_error_that_says_so(
    answering: Answering, reply: tuple[int, bytes, dict[str, str]], what: str
) -> None:
    answering.reply = reply
    with pytest.raises(Unavailable, match=what) as raised:
        asked(answering)
    assert KEYS.token not in str(raised.value)


def test_nobody_there_is_an_error_too() -> None:
    with pytest.raises(Unavailable, match="refused"):
        fetch(f"http://127.0.0.1:{unused_port()}", "", KEYS, "pull-1", real_unix_s())


def test_pulls_come_each_minute_at_once_where_there_is_more_and_seldom_on_errors() -> None:
    schedule = Schedule(MINUTE_MS)
    assert schedule.due(NOW)
    schedule.done(NOW, more=False)
    assert not schedule.due(NOW + MINUTE_MS - 1)
    assert schedule.due(NOW + MINUTE_MS)
    schedule.done(NOW, more=True)
    assert schedule.due(NOW)
    news, waits, now_ms = [], [], NOW
    for _ in range(7):
        news.append(schedule.failed(now_ms))
        waits.append((schedule.due_ms - now_ms) // MINUTE_MS)
        now_ms = schedule.due_ms
    assert news == [True] + [False] * 6
    assert waits == [1, 2, 4, 8, 16, 16, 16]
    assert not schedule.due(now_ms - 1)
    assert schedule.due(now_ms - 30 * MINUTE_MS), "the clock was put back"
    schedule.busy = True
    assert not schedule.due(now_ms)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[CloudSite, Operator, Callable[[str], Page]]]:
    """The simulated operator's pull, and what asks it."""
    port = unused_port()
    run = msgspec.structs.replace(Run(CloudSite(tmp_path / "unused").run.clock), operator_port=port)
    site = CloudSite(tmp_path, yaml.safe_dump(contract(registry(), run)), operator_port=port)
    book = Book(tmp_path / "operator")
    book.start()
    operator = operator_of(book)
    configured = site.clouds.operators[NAME]
    keys = read_keys(site.layout.secrets, configured)
    server = PullServer(site.run, operator, Peer(NAME, configured, site.layout.secrets))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield site, operator, lambda cursor: fetch(f"http://127.0.0.1:{port}", cursor, keys, "pull-1", real_unix_s())
    server.shutdown()
    server.server_close()
    book.close()


class Device:
    """A sensor that reports once."""

    def __init__(self, name: str) -> None:
        self._name = name

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        return [(Lane.EVENT, Reading(self._name, NOW, {"tilt_deg": 30.0}))]


def test_a_step_hears_the_devices_and_pushes_or_tries_again(
    served: tuple[CloudSite, Operator, Callable[[str], Page]],
) -> None:
    site, operator, ask = served
    keys = read_keys(site.layout.secrets, site.clouds.operators[NAME])
    client = Client(site.run.host, site.run.cloud_port, keys)
    step(operator, [Device(imei(1)), Device("hyd-1")], client, site.run)  # nobody listens
    kept, _, _ = operator.book.page(0, 10)
    assert [msgspec.json.decode(told)["IMEI"] for told in kept] == [imei(1), "hyd-1"]
    assert ask("").messages == [], "what was told just now is pushed first"
    assert operator.counters.values["told_total"] == 2
    assert "refused" in operator.counters.details["last_error"]
    assert operator.counters.gauges["queued"] == 1
    client.close()


def test_all_that_was_told_can_be_pulled_page_by_page(
    served: tuple[CloudSite, Operator, Callable[[str], Page]],
) -> None:
    site, operator, ask = served
    operator.told(messages(PAGE_MESSAGES + 10), NOW)
    first = ask("")
    assert (len(first.messages), first.more) == (PAGE_MESSAGES, True)
    second = ask(first.next)
    assert (len(second.messages), second.more) == (10, False)
    assert [*first.messages, *second.messages] == messages(PAGE_MESSAGES + 10)
    assert ask(second.next) == Page([], second.next, False)
    with pytest.raises(Unavailable, match="400"):
        ask("none of ours")
    with pytest.raises(Unavailable, match="401"):
        fetch(f"http://127.0.0.1:{site.run.operator_port}", "", KEYS, "pull-1", real_unix_s())


def test_what_was_never_pushed_is_recovered_and_the_cursor_survives(
    served: tuple[CloudSite, Operator, Callable[[str], Page]],
) -> None:
    """The real process pulls on; killed and started again, it asks for nothing twice."""
    site, operator, _ = served
    operator.told(messages(PAGE_MESSAGES + 10), NOW)
    site.activate()
    try:
        site.start("cloud")
        eventually(lambda: site.counted("recovered_total") == PAGE_MESSAGES + 10)
        site.kill("cloud")
        operator.told(messages(5, 5000), NOW)
        site.start("cloud")
        eventually(lambda: site.counted("recovered_total") == PAGE_MESSAGES + 15)
        assert site.counted("received_total") == PAGE_MESSAGES + 15
        assert site.counted("repeated_total") == 0
        assert site.gauge(f"alive{{operator={NAME}}}") == 1
    finally:
        site.stop()
