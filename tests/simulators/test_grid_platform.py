"""The reference grid platform: it takes what is signed, once; fails at times; and reports back until it is heard."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from api.platforms import events
from api.platforms.webhook import new_secret, read_secret, sign
from citybrain.cli import main
from citybrain.clock import real_unix_s
from citybrain.counters import Counters, read_heartbeats
from citybrain.mailbox import Command, Mailbox
from simulators.grid_cases import PROGRESS, VERDICT, WAY, Book, draw, is_due
from simulators.grid_platform import Platform
from tests.conftest import eventually
from tests.seeded_site import Seeded, process, seeded, stops_within

NOW = 1_800_000_000_000
HOUR = 3_600_000


def data(number: str = "CB1", device: str = "hyd-000001", at: int = NOW, **other: Any) -> dict[str, Any]:
    """Return a case as the desk's events carry it."""
    row = {
        "number": number, "kind": "case", "category": "hydrant_damaged", "edition": "", "code": "", "title_zh": "损坏",
        "title_en": "damaged", "urgency": "normal", "subject": device, "lon": 120.15, "lat": 31.2, "cell": "c",
        "grid": "g", "street": "001", "address": "", "unit": "water", "area_owner": "street-001", "incident": 1,
        "workstation": "w", "community": "m", "road": "r", "road_chief": "王",
        "stage": "reported", "observed_at": at, "opened_at": at, "deadline": at, "rescued_at": None,
        "evidence": '[{"device":"hyd-000001","why":"first"}]', **other,
    }  # fmt: skip
    return events.case_data(row, ("供水公司", "Water"), ("街道", "Street"), active=True)


def cause(kind: str = "case", start: int = NOW, **other: Any) -> dict[str, Any]:
    due = {"case": int(kind == "case"), "rescues": [], "maintenance": 0}
    return {"id": "c", "start_ms": start, "end_ms": start + HOUR, "subjects": ["hyd-000001"], "due": due, **other}


# --- what it decides ----------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    made = Book(tmp_path / "platform", seed=7)
    made.start()
    with contextlib.closing(made):
        yield made


def told(book: Book) -> list[tuple[str, dict[str, Any]]]:
    """Deliver everything that is waiting; return it."""
    found = []
    while notices := book.due_notices(1):
        for notice in notices:
            found.append((notice.type, notice.data))
            book.sent(notice.id)
    return found


def test_a_case_goes_the_whole_way_and_ends_confirmed(book: Book, tmp_path: Path) -> None:
    book.take("w1", events.CASE_CREATED, data(), NOW)
    book.work(NOW, tmp_path / "truth.jsonl")
    assert told(book) == [], "nothing happens at once"
    book.work(NOW + HOUR, tmp_path / "truth.jsonl")
    found = told(book)
    assert [item["stage"] for _, item in found] == [name for name, _ in WAY]
    assert [kind for kind, _ in found] == [PROGRESS] * (len(WAY) - 1) + [VERDICT]
    assert found[-1][1]["verdict"] == "confirmed"
    assert {item["case"] for _, item in found} == {"CB1"}
    assert book.listed()[0]["verdict"] == "confirmed"
    assert book.work(NOW + 9 * HOUR, tmp_path / "truth.jsonl") == 0


def test_a_rescue_is_faster(book: Book, tmp_path: Path) -> None:
    book.take("w1", events.RESCUE_CREATED, data("R", kind="rescue"), NOW)
    book.take("w2", events.CASE_CREATED, data("C"), NOW)
    book.work(NOW + 10_000, tmp_path / "none")
    stages = {case["number"]: case["stage"] for case in book.listed()}
    assert [name for name, _ in WAY].index(stages["R"]) > [name for name, _ in WAY].index(stages["C"] or "accepted")


def test_what_the_field_does_not_find_is_a_false_alarm(book: Book, tmp_path: Path) -> None:
    truth = tmp_path / "truth.jsonl"
    truth.write_bytes(msgspec.json.encode(cause()) + b"\n" + b'{"half a line')
    book.take("w1", events.CASE_CREATED, data("true"), NOW)
    book.take("w2", events.CASE_CREATED, data("false", device="hyd-000150", evidence="[]"), NOW)
    book.work(NOW + HOUR, truth)
    assert {case["number"]: case["verdict"] for case in book.listed()} == {"true": "confirmed", "false": "false_alarm"}
    verdict = next(item for kind, item in told(book) if kind == VERDICT and item["case"] == "false")
    assert verdict["stage"] == ""
    assert verdict["reason"]


@pytest.mark.parametrize(
    ("planted", "rescue", "expected"),
    [
        (cause(), False, True),
        (cause(start=NOW - 2 * HOUR), False, False),
        (cause(start=NOW + HOUR), False, False),
        (cause("none"), False, False),
        (cause(subjects=["other"]), False, False),
        (cause(subjects=["member"]), False, True),
        (cause(), True, False),
        (cause(due={"case": 0, "rescues": ["hyd-000001"], "maintenance": 0}), True, True),
        (cause(due={"case": 1, "rescues": ["other"], "maintenance": 0}), True, False),
    ],
)
def test_what_is_due(planted: dict[str, Any], *, rescue: bool, expected: bool) -> None:
    assert is_due([planted], "hyd-000001", {"member"}, NOW, rescue=rescue) is expected


def test_the_same_thing_reported_twice_is_a_duplicate(book: Book, tmp_path: Path) -> None:
    book.take("w1", events.CASE_CREATED, data("first"), NOW)
    book.take("w2", events.CASE_CREATED, data("second"), NOW + 1000)
    book.take("w3", events.CASE_CREATED, data("elsewhere", device="hyd-000002"), NOW + 1000)
    book.take("w4", events.CASE_CREATED, data("far", lat=31.2006), NOW + 1000)
    book.take("w5", events.RESCUE_CREATED, data("rescue", kind="rescue"), NOW + 1000)
    book.work(NOW + HOUR, tmp_path / "none")
    verdicts = {case["number"]: case["verdict"] for case in book.listed()}
    assert verdicts == {"first": "confirmed", "second": "duplicate", "elsewhere": "confirmed", "far": "confirmed",
                        "rescue": "confirmed"}  # fmt: skip


def test_a_repeat_gets_the_same_answer_and_a_double_is_seen(book: Book) -> None:
    first = book.take("w1", events.CASE_CREATED, data(), NOW)
    again = book.take("w1", events.CASE_CREATED, data(), NOW + 5)
    assert (first.status, again.status) == (201, 200)
    assert (again.repeat, again.body) == (True, first.body)
    assert [(case["accepted"], case["received"]) for case in book.listed()] == [(1, 2)]
    book.take("w2", events.CASE_CREATED, data(), NOW + 6)
    assert [(case["accepted"], case["received"]) for case in book.listed()] == [(2, 3)]


def test_an_update_and_a_recovery_change_the_case(book: Book) -> None:
    book.take("w1", events.CASE_CREATED, data(), NOW)
    book.take("w2", events.CASE_UPDATED, data(category="water_main_burst"), NOW)
    assert [(c["category"], c["recovered_at"]) for c in book.listed()] == [("water_main_burst", None)]
    book.take("w3", events.CASE_RECOVERED, data(category="water_main_burst"), NOW + 1)
    assert [(c["accepted"], c["recovered_at"]) for c in book.listed()] == [(1, NOW + 1)]


def test_notices_of_a_case_keep_their_order_and_others_go_on(book: Book, tmp_path: Path) -> None:
    book.take("w1", events.CASE_CREATED, data("A"), NOW)
    book.take("w2", events.CASE_CREATED, data("B", device="hyd-000002"), NOW)
    book.work(NOW + HOUR, tmp_path / "none")
    heads = book.due_notices(1)
    assert {notice.data["case"] for notice in heads} == {"A", "B"}
    assert all(notice.data["stage"] == "accepted" for notice in heads)
    stuck = next(notice for notice in heads if notice.data["case"] == "A")
    book.failed(stuck.id, next_at=1000)
    assert {notice.data["case"] for notice in book.due_notices(1)} == {"B"}
    assert {notice.data["case"]: notice.attempts for notice in book.due_notices(1000)} == {"A": 1, "B": 0}


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    first = Book(tmp_path, seed=7)
    first.start()
    first.take("w1", events.CASE_CREATED, data(), NOW)
    first.work(NOW + 20_000, tmp_path / "none")
    before, notices = first.listed(), first.due_notices(1)
    first.close()
    second = Book(tmp_path, seed=7)
    second.start()
    with contextlib.closing(second):
        assert second.listed() == before
        assert second.due_notices(1) == notices
        assert second.take("w1", events.CASE_CREATED, data(), NOW).repeat
    assert len((tmp_path / "received.jsonl").read_text().splitlines()) == 1


def test_how_it_fails_follows_from_the_seed_and_ends(folder: Seeded) -> None:
    def fates(name: str) -> list[int]:
        book = Book(folder.layout.root / name, seed=7)
        book.start()
        with contextlib.closing(book):
            platform = Platform(folder.layout, folder.run, book, Counters("platform"))
            found = []
            for number in range(200):
                content = message(f"w{number}", data(f"C{number}", device=f"d{number}"))
                while True:
                    answer = platform.receive(signed(folder, f"w{number}", content), content)
                    found.append(599 if answer.drop else answer.status)
                    if answer.status < 300 and not answer.drop:
                        break
            assert {case["accepted"] for case in book.listed()} == {1}
            assert len(book.listed()) == 200
            return found

    first = fates("one")
    assert first == fates("two")
    assert 3 <= first.count(503) <= 25
    assert 1 <= first.count(599) <= 15
    assert first.count(200) == first.count(599), "whatever was dropped came again and was known"
    assert draw(7, "a") != draw(8, "a")


# --- on the wire ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Seeded:
    return seeded(tmp_path)


def message(id: str, content: dict[str, Any], kind: str = events.CASE_CREATED) -> bytes:
    return events.encode(id, kind, NOW, content)


def signed(folder: Seeded, id: str, content: bytes, *, secret: str = "", age_s: int = 0) -> dict[str, str]:
    key = secret or read_secret(folder.layout.secrets / "platform.key")
    assert key is not None
    return sign(key, id, real_unix_s() - age_s, content)


@pytest.fixture
def url(folder: Seeded) -> Iterator[str]:
    base = f"http://127.0.0.1:{folder.run.platform_port}"
    with process(folder.layout, "platform", "--pace", "0.01", "--reliable", ready=base + "/healthz"):
        yield base


def test_what_is_not_signed_small_and_known_is_refused(folder: Seeded, url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False) as client:

        def post(content: bytes, **how: Any) -> tuple[int, str]:
            answer = client.post("/cases", content=content, headers=signed(folder, "w", content, **how))
            assert answer.json()["what"]
            return answer.status_code, answer.json()["error"]

        good = message("w", data())
        assert post(good, secret=new_secret()) == (401, "signature_wrong")
        assert post(good, age_s=301) == (401, "signature_old")
        assert client.post("/cases", content=good).json()["error"] == "signature_missing"
        assert post(b"{") == (400, "malformed")
        assert post(message("w", {"number": "CB1"})) == (400, "malformed")
        assert post(message("w", data(), "cn.other")) == (400, "unknown_type")
        assert client.get("/nothing").status_code == 404
        assert client.post("/cases", content=b"x" * (1024 * 1024 + 1)).status_code == 413
        assert client.get("/cases").json() == {"cases": [], "repeats": 0}


def test_it_works_a_case_and_reports_until_it_is_heard(folder: Seeded, url: str) -> None:
    number = "CB20261124-000001"
    folder.seed_night()
    row = folder.case(1, "case", 1, 1, "hyd-000001")
    content = message(f"{number}.1", data(number, at=row["observed_at"]))
    with httpx.Client(base_url=url, trust_env=False) as client:
        headers = signed(folder, f"{number}.1", content)
        assert client.post("/cases", content=content, headers=headers).status_code == 201
        assert client.post("/cases", content=content, headers=headers).status_code == 200
        assert client.get("/cases").json()["repeats"] == 1
        eventually(lambda: counted(folder, "errors_total{stage=send}") > 0)
        # Nobody listened so far: the API starts only now, and is told everything in order.
        with process(folder.layout, "api", ready=folder.url + "/healthz"):
            eventually(lambda: len(commands_in(folder)) == len(WAY), 20)
        assert client.get("/cases").json()["cases"][0]["verdict"] == "confirmed"
    found = commands_in(folder)
    assert [item.body["stage"] for item in found] == [name for name, _ in WAY]
    assert [item.kind for item in found] == ["progress"] * (len(WAY) - 1) + ["verdict"]
    assert found[-1].body["verdict"] == "confirmed"
    assert found[-1].body["external_id"].startswith("G")


def counted(folder: Seeded, name: str) -> int:
    """Return a counter of the platform's last heartbeat."""
    return sum(beat.counters.get(name, 0) for beat in read_heartbeats(folder.layout.run))


def commands_in(folder: Seeded) -> list[Command]:
    """Return the commands in the order in which they were given."""
    box = folder.layout.mailbox("desk")
    paths = sorted(box.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    known = {item.id: item for _, item in Mailbox(box).take()[0]}
    return [item for path in paths for id, item in known.items() if path.name.endswith(f"-{id}.json")]


def test_a_dropped_connection_has_taken_the_case(folder: Seeded) -> None:
    """Find by the seed a webhook whose answer gets lost, and one that is refused; both end taken once."""
    fates = {f"w{n}": draw(folder.run.seed, f"w{n}", 0) for n in range(500)}
    lost = next(id for id, fate in fates.items() if 0.05 <= fate < 0.07)
    busy = next(id for id, fate in fates.items() if fate < 0.05)
    base = f"http://127.0.0.1:{folder.run.platform_port}"
    with (
        process(folder.layout, "platform", ready=base + "/healthz"),
        httpx.Client(base_url=base, trust_env=False) as client,
    ):
        content = message(lost, data("LOST"))
        with pytest.raises(httpx.TransportError):
            client.post("/cases", content=content, headers=signed(folder, lost, content))
        assert client.post("/cases", content=content, headers=signed(folder, lost, content)).status_code == 200
        content = message(busy, data("BUSY", device="hyd-000009"))
        refused = client.post("/cases", content=content, headers=signed(folder, busy, content))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        eventually(
            lambda: client.post("/cases", content=content, headers=signed(folder, busy, content)).status_code < 300
        )
        assert {case["number"]: case["accepted"] for case in client.get("/cases").json()["cases"]} == {
            "LOST": 1, "BUSY": 1,
        }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_within_two_seconds_and_beats_until_then(folder: Seeded, number: int) -> None:
    base = f"http://127.0.0.1:{folder.run.platform_port}"
    with process(folder.layout, "platform", ready=base + "/healthz") as running, httpx.Client(base_url=base) as client:
        client.get("/cases")
        eventually((folder.layout.run / "platform.heartbeat.json").exists)
        assert stops_within(running, number, 2.0) == 0


def test_a_port_in_use_is_named(folder: Seeded, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", folder.run.platform_port)):
        assert main(["platform", "--data", str(folder.layout.root)]) == 4
    said = capsys.readouterr().err
    assert str(folder.run.platform_port) in said
    assert "--platform-port" in said


def test_a_pace_that_is_none_is_refused(folder: Seeded, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["platform", "--data", str(folder.layout.root), "--pace", "0"]) == 2
    assert "--pace 0" in capsys.readouterr().err


def test_the_contract_is_the_desks_own() -> None:
    """What the desk's events carry is enough for us: if their shape changes, this says so first."""
    content = data(at=NOW)
    assert content["observed_at"] == NOW
    assert {"number", "device", "category", "place", "evidence", "observed_at"} <= set(content)
