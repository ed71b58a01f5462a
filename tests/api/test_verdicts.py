"""The verdict intake: only what is signed, small, young and known gets in; and whatever comes again is taken once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from api.platforms.webhook import new_secret, read_secret, sign
from api.routes.platforms import command_id
from citybrain.clock import real_unix_s
from citybrain.db.schema import commands
from citybrain.mailbox import Command, Mailbox
from tests.conftest import eventually
from tests.seeded_site import Seeded, process, seeded

CASE = "CB20261124-000001"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, shared_database: str) -> Iterator[Seeded]:
    made = seeded(tmp_path_factory.mktemp("site"), shared_database)
    made.seed_night()
    made.beat()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        yield made


@pytest.fixture
def api(site: Seeded) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, trust_env=False, timeout=5) as client:
        yield client


def event(verdict: str | None = "confirmed", **data: Any) -> dict[str, Any]:
    kind = "verdict" if verdict else "progress"
    told = {"case": CASE, "stage": "closed", "external_id": "G1", **({"verdict": verdict} if verdict else {}), **data}
    return {
        "specversion": "1.0",
        "id": "x",
        "source": "urn:grid",
        "type": f"cn.citybrain.platform.{kind}",
        "data": told,
    }


def send(
    api: httpx.Client, site: Seeded, id: str, body: dict[str, Any] | bytes, *, secret: str = "", age_s: int = 0
) -> httpx.Response:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    key = secret or read_secret(site.layout.secrets / "verdict.key")
    assert key is not None
    return api.post("/v1/platforms/grid/events", content=content, headers=sign(key, id, real_unix_s() - age_s, content))


def waiting(site: Seeded) -> list[Command]:
    return [item for _, item in Mailbox(site.layout.mailbox("desk")).take()[0]]


def dropped(api: httpx.Client, site: Seeded) -> dict[str, int]:
    found: dict[str, int] = api.get("/v1/status").json()["dropped"]
    return found


def test_a_verdict_is_a_durable_command_before_it_is_answered(api: httpx.Client, site: Seeded) -> None:
    answer = send(api, site, "w-1", event("false_alarm", reason="现场正常", stage=""))
    assert answer.status_code == 202
    assert answer.json() == {"command": command_id("w-1"), "state": "pending"}
    item = next(item for item in waiting(site) if item.id == command_id("w-1"))
    assert (item.kind, item.actor, item.reason) == ("verdict", "platform:grid", "现场正常")
    assert item.body == {"case": CASE, "stage": "", "external_id": "G1", "verdict": "false_alarm"}
    progress = send(api, site, "w-2", event(None, stage="到场"))
    assert progress.status_code == 202
    item = next(item for item in waiting(site) if item.id == command_id("w-2"))
    assert (item.kind, item.body) == ("progress", {"case": CASE, "stage": "到场", "external_id": "G1"})


def test_a_repeat_is_answered_200_and_taken_once(api: httpx.Client, site: Seeded) -> None:
    first = send(api, site, "again", event())
    second = send(api, site, "again", event())
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["command"] == second.json()["command"]
    assert sum(item.id == command_id("again") for item in waiting(site)) == 1


def test_a_repeat_after_the_desk_decided_says_what_it_decided(api: httpx.Client, site: Seeded) -> None:
    id = command_id("decided")
    row = {"id": id, "kind": "verdict", "actor": "platform:grid", "at": 1, "applied_at": 2, "message": "", "reason": ""}
    site.rows(commands, {**row, "result": "applied"})
    answer = send(api, site, "decided", event())
    assert (answer.status_code, answer.json()) == (200, {"command": id, "state": "applied"})
    assert not any(item.id == id for item in waiting(site))


def test_repeats_at_the_same_moment_are_one_command(api: httpx.Client, site: Seeded) -> None:
    codes: list[int] = []

    def once() -> None:
        codes.append(send(api, site, "race", event()).status_code)

    threads = [threading.Thread(target=once) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(codes) == [200] * 11 + [202]
    assert sum(item.id == command_id("race") for item in waiting(site)) == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"secret": new_secret()}, "wrong"),
        ({"age_s": 301}, "old"),
        ({"age_s": -301}, "old"),
    ],
)
def test_a_wrong_or_old_signature_is_refused_and_counted(
    api: httpx.Client, site: Seeded, how: dict[str, Any], reason: str
) -> None:
    before = len(waiting(site))
    answer = send(api, site, "bad", event(), **how)
    assert answer.status_code == 401
    assert answer.json()["error"] == f"signature_{reason}"
    assert answer.json()["what"]
    assert len(waiting(site)) == before
    assert send(api, site, f"good-after-{reason}-{how}", event()).status_code == 202, "the next one is taken"
    eventually(lambda: dropped(api, site).get(f"webhook_signature_{reason}", 0) >= 1)


def test_an_unsigned_or_changed_body_is_refused(api: httpx.Client, site: Seeded) -> None:
    content = msgspec.json.encode(event())
    unsigned = api.post("/v1/platforms/grid/events", content=content)
    assert (unsigned.status_code, unsigned.json()["error"]) == (401, "signature_missing")
    key = read_secret(site.layout.secrets / "verdict.key")
    assert key is not None
    headers = sign(key, "changed", real_unix_s(), content)
    changed = api.post(
        "/v1/platforms/grid/events", content=content.replace(b"confirmed", b"duplicate"), headers=headers
    )
    assert (changed.status_code, changed.json()["error"]) == (401, "signature_wrong")


@pytest.mark.parametrize(
    ("body", "status", "error", "where"),
    [
        (b"{", 400, "malformed", "body"),
        (b"[]", 400, "malformed", "body"),
        ({**event(), "type": "cn.other"}, 400, "malformed", "type"),
        ({**event(), "specversion": "0.3"}, 400, "malformed", "specversion"),
        (event("perhaps"), 400, "malformed", "verdict"),
        ({**event(None), "type": "cn.citybrain.platform.verdict"}, 400, "malformed", "verdict"),
        (event(case=""), 400, "malformed", "case"),
        (event(reason=7), 400, "malformed", "reason"),
        (event(reason="x" * 501), 400, "malformed", "reason"),
        (event(case="CB-nobody"), 404, "not_found", "CB-nobody"),
    ],
)
def test_a_bad_event_says_what_and_where(
    api: httpx.Client, site: Seeded, body: dict[str, Any] | bytes, status: int, error: str, where: str
) -> None:
    before = len(waiting(site))
    answer = send(api, site, "bad-body", body)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert where in answer.json()["where"]
    assert len(waiting(site)) == before


def test_a_body_that_is_too_long_is_not_even_read(api: httpx.Client, site: Seeded) -> None:
    answer = send(api, site, "long", b"x" * (64 * 1024 + 1))
    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            yield b"x" * 4096

    try:
        streamed = api.post("/v1/platforms/grid/events", content=endless())
        assert streamed.status_code == 413
    except httpx.TransportError:
        pass  # the connection was ended under a sender who would not stop
    assert send(api, site, "after-long", event()).status_code == 202


def test_without_a_secret_nothing_is_taken(api: httpx.Client, site: Seeded) -> None:
    path = site.layout.secrets / "verdict.key"
    text = path.read_text()
    path.unlink()
    try:
        answer = send(api, site, "no-secret", event(), secret=new_secret())
        assert (answer.status_code, answer.json()["error"]) == (503, "no_secret")
    finally:
        path.write_text(text)
