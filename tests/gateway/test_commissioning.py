"""A box is commissioned: its points are looked at on the platform, the sheet is signed, the desk acts on it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
import tty
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from api import enrolment
from api.commissioning import Sealed, verify
from api.pki.ca import Authority, Setting
from citybrain.cli import main
from citybrain.clock import DAY_MS, real_unix_ms
from citybrain.errors import TransitionError, Unavailable, UsageError
from citybrain.pictures import MAX_PHOTO
from citybrain.wire import blob_sha256
from gateway.enrolment.commission import Accepted, parse_gps, points_of, read_photo, send, sheet
from gateway.enrolment.enrol import enrol, read_invitation
from gateway.enrolment.identity import Identity
from gateway.enrolment.nmea import parse, position_of
from gateway.enrolment.renew import caller_of
from streams.evidence import EvidenceStore
from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually, unused_port
from tests.seeded_site import Seeded, process, seeded

GPS = ("--gps", "120.15,31.2")
GGA = "$GPGGA,092750.000,3112.3400,N,12128.4220,E,1,8,1.03,61.7,M,55.2,M,,*67\r\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    """A live API and desk, with an authority; the log has a value of every device of gw-01 but one."""
    made = seeded(tmp_path_factory.mktemp("site"))
    devices = [one for one in made.district.registry.devices if one.gateway == "gw-01" and one.kind == "hydrant"]
    made.frame([(one.id, "pressure_mpa", made.now_ms, 0.31) for one in devices[1:]])
    authority = Authority(made.layout)
    port = unused_port()
    authority.init(Setting(("127.0.0.1",), listen=f"127.0.0.1:{port}"), "li", "test")
    argv = [sys.executable, "-m", "citybrain", "desk", "--data", str(made.layout.root)]
    with (made.layout.root / "desk.log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as desk:
        try:
            with process(made.layout, "api", ready=made.url + "/healthz"):
                eventually((made.layout.run / "desk.heartbeat.json").exists, 20)
                eventually(lambda: accepts("127.0.0.1", port), what="the listener for boxes")
                yield made
        finally:
            end(desk)


@pytest.fixture(scope="module")
def box(site: Seeded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of gw-01, enrolled."""
    return enrolled(site, tmp_path_factory.mktemp("box"), "gw-01")


def enrolled(site: Seeded, folder: Path, gateway: str) -> Path:
    made = enrolment.invite(Authority(site.layout), gateway, DAY_MS, "li", "x")
    enrol(folder, read_invitation(made.text), real_unix_ms(), "board-1")
    return folder


def hydrants(site: Seeded) -> list[str]:
    return [one.id for one in site.district.registry.devices if one.gateway == "gw-01" and one.kind == "hydrant"]


def cli(capsys: pytest.CaptureFixture[str], box: Path, *words: str) -> tuple[int, Any, str]:
    code = main(["gateway", "commission", *words, "--data", str(box), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


def state_of(site: Seeded, asset: str) -> str:
    answer = httpx.get(f"{site.url}/v1/assets/{asset}", trust_env=False)
    return str(answer.json()["state"])


def on_trial(site: Seeded, asset: str) -> None:
    who = {"X-Actor": quote("王工")}
    assert httpx.post(f"{site.url}/v1/assets/{asset}/commission", headers=who, trust_env=False).status_code == 202
    eventually(lambda: state_of(site, asset) == "commissioning")


def test_what_was_seen_is_put_in_service_and_the_rest_stays_on_trial(
    site: Seeded, box: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unseen, seen, _ = hydrants(site)[:3]
    on_trial(site, unseen)
    on_trial(site, seen)
    code, told, err = cli(capsys, box)
    assert (code, told["sent"], unseen in told["missing"], seen in told["missing"]) == (1, False, True, False), err
    code, told, err = cli(capsys, box, "--technician", "王工", *GPS)
    assert (code, told["sent"]) == (1, False), "a point was not seen"
    code, told, err = cli(capsys, box, "--technician", "王工", *GPS, "--partial", "--note", "井内进水")
    assert (code, told["sent"], told["on_trial"]) == (0, True, [unseen]), err
    assert (state_of(site, seen), state_of(site, unseen)) == ("active", "commissioning")
    decided = httpx.get(f"{site.url}/v1/commands/{told['command']}", trust_env=False).json()
    assert (decided["state"], decided["actor"]) == ("applied", "王工"), decided
    step = httpx.get(f"{site.url}/v1/assets/{seen}", trust_env=False).json()["steps"][-1]
    assert (step["event"], step["actor"], step["details"]["why"]) == ("activate", "王工", "井内进水")
    kept = msgspec.json.decode(site.layout.get_blob(step["details"]["sheet"]), type=dict[str, Any])
    sealed = Sealed(sheet=kept["sheet"], signature=kept["signature"])
    certificate = Identity(box).certificate
    assert kept["serial"] == f"{certificate.serial_number:x}"
    verify(sealed, certificate.public_key())  # years later: who said so
    gateway = httpx.get(f"{site.url}/v1/assets/gw-01", trust_env=False).json()["steps"][-1]
    assert (gateway["event"], gateway["details"]["lon"]) == ("edit", 120.15)


def test_a_sheet_for_people(site: Seeded, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["gateway", "commission", "--data", str(box)])
    out = capsys.readouterr().out
    assert "NOT SEEN" in out
    assert "seen on the platform at 20" in out


def test_a_sheet_that_was_sent_twice_is_one(site: Seeded, box: Path) -> None:
    identity = Identity(box)
    caller = caller_of(identity, real_unix_ms())
    text = sheet(points_of(caller, "gw-01"), "li", (120.0, 31.0), "")
    first = send(caller, identity, box, text)
    sealed = msgspec.json.decode(max((box / "commissioning").iterdir()).read_bytes(), type=dict[str, str])
    again = caller.call("POST", "/v1/gateways/gw-01/commissioning", Accepted, sealed)
    assert again.command == first


def test_a_sheet_that_was_changed_or_is_anothers_is_refused(site: Seeded, box: Path, tmp_path: Path) -> None:
    identity = Identity(box)
    caller = caller_of(identity, real_unix_ms())
    found = points_of(caller, "gw-01")
    text = sheet(found, "li", (120.0, 31.0), "").decode()
    path = "/v1/gateways/gw-01/commissioning"

    def refused(sheet_: str, signature: str) -> str:
        with pytest.raises(TransitionError) as caught:
            caller.call("POST", path, Accepted, {"sheet": sheet_, "signature": signature})
        return str(caught.value)

    signature = identity.seal(text.encode())
    assert "it is not the box's" in refused(text.replace('"li"', '"wang"'), signature)
    assert "expected a JWS" in refused(text, "nonsense")
    assert "expected a JWS" in refused(text, signature.replace("..", ".x."))
    other = text.replace("gw-01", "gw-02")
    assert "it is gw-02's" in refused(other, identity.seal(other.encode()))
    nobody = text.replace('"li"', '" "')
    assert "say who commissions" in refused(nobody, identity.seal(nobody.encode()))
    moon = text.replace("120.0", "1200.0")
    assert "are not degrees" in refused(moon, identity.seal(moon.encode()))
    assert "sheet: " in refused("{}", identity.seal(b"{}"))
    stranger = Identity(enrolled(site, tmp_path, "gw-02"))
    with pytest.raises(TransitionError, match="your certificate is gw-02's"):
        points_of(caller_of(stranger, real_unix_ms()), "gw-01")


def test_a_photo_is_kept_with_its_sheet_and_shown_to_a_named_person(
    site: Seeded, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "cabinet.jpg"
    picture.write_bytes(b"\xff\xd8\xff" + os.urandom(300_000))
    words = ("--technician", "王工", *GPS, "--partial", "--photo", str(picture))
    code, told, err = cli(capsys, box, *words)
    assert (code, told["sent"]) == (0, True), err
    details = httpx.get(f"{site.url}/v1/assets/gw-01", trust_env=False).json()["steps"][-1]["details"]
    assert details["photo"] == blob_sha256(picture.read_bytes())
    url = f"{site.url}/v1/evidence/commissioning/{details['sheet']}"
    assert httpx.get(url, trust_env=False).status_code == 400, "nobody says who asks"
    shown = httpx.get(url, params={"actor": "li"}, trust_env=False)
    assert (shown.status_code, shown.headers["content-type"]) == (200, "image/jpeg")
    assert shown.content == picture.read_bytes()
    assert [view.actor for view in EvidenceStore(site.layout.evidence).views(details["photo"])] == ["li"]
    for unknown in ("0" * 64, details["photo"], "../run/run.json"):
        answer = httpx.get(f"{site.url}/v1/evidence/commissioning/{quote(unknown, safe='')}?actor=li", trust_env=False)
        assert answer.status_code == 404, unknown
    size = len(json.dumps(msgspec.json.decode(site.layout.get_blob(details["sheet"]))))
    assert size < 100_000, "the sheet is kept without the picture, which stands beside it"


def test_a_photo_that_is_another_or_none_is_refused(site: Seeded, box: Path, tmp_path: Path) -> None:
    identity = Identity(box)
    caller = caller_of(identity, real_unix_ms())
    found, jpeg = points_of(caller, "gw-01"), b"\xff\xd8\xff one"
    path = "/v1/gateways/gw-01/commissioning"

    def refused(named: bytes, photo: str) -> str:
        text = sheet(found, "li", (120.0, 31.0), "", named)
        with pytest.raises(TransitionError) as caught:
            caller.call(
                "POST", path, Accepted, {"sheet": text.decode(), "signature": identity.seal(text), "photo": photo}
            )
        return str(caught.value)

    other = b64encode(b"\xff\xd8\xff other").decode()
    assert "not the one that the sheet names" in refused(jpeg, other)
    assert "not the one that the sheet names" in refused(jpeg, "")
    assert "not the one that the sheet names (none)" in refused(b"", other)
    assert "expected base64" in refused(jpeg, "%%%")
    assert "expected a JPEG or PNG" in refused(b"GIF89a", b64encode(b"GIF89a").decode())
    large = tmp_path / "large.png"
    large.write_bytes(b"\x89PNG" + bytes(MAX_PHOTO))
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for file, says in ((large, "at most 2097152"), (text, "expected a JPEG or PNG"), (tmp_path / "gone", "No such")):
        with pytest.raises(UsageError, match=says):
            read_photo(file)


def test_a_position_is_needed(site: Seeded, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = cli(capsys, box, "--technician", "li", "--partial")
    assert (code, "--gps LON,LAT" in err) == (2, True)
    for wrong in ("here", "31.2,121.5", "1,2,3"):
        with pytest.raises(UsageError, match="--gps"):
            parse_gps(wrong)


def test_a_receiver_on_a_serial_line_says_where_we_are() -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    silent = threading.Event()

    def receiver() -> None:
        """Speak as a receiver does, again and again: noise, no fix yet, then one."""
        while not silent.wait(0.05):
            os.write(master, b"\xff\x00noise\r\n$GPGGA,,,,,,0,,,,,,,,*66\r\n" + GGA.encode())

    speaking = threading.Thread(target=receiver)
    speaking.start()
    try:
        assert position_of(os.ttyname(slave), 10.0) == (121.4737, 31.205667)
        silent.set()
        speaking.join()
        with pytest.raises(Unavailable, match="no position within"):
            position_of(os.ttyname(slave), 0.1)
    finally:
        silent.set()
        speaking.join()
        os.close(master)
        os.close(slave)
    with pytest.raises(Unavailable, match="/dev/no-such-port"):
        position_of("/dev/no-such-port", 0.1)


def test_sentences_that_say_nothing() -> None:
    assert parse(GGA) == (121.4737, 31.205667)
    assert parse(GGA.replace("*67", "*68")) is None
    assert parse("$GPRMC,092751.000,V,,,,,,,,,,N*41") is None
    assert parse("") is None
