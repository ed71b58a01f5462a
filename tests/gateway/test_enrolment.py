"""Enrolment over real HTTPS: `citybrain api` with its box listener, and `citybrain gateway enrol` against it."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cryptography import x509

from api import enrolment
from api.pki.ca import Authority, Setting
from citybrain.cli import main
from citybrain.clock import DAY_MS, MINUTE_MS, Clock, ManualClock, real_unix_ms
from citybrain.counters import read_heartbeats
from citybrain.errors import ConfigError, ProtocolError, TransitionError, Unavailable, UsageError
from gateway.enrolment.centre import Caller, checked_context, clock_is_sound, unchecked_context
from gateway.enrolment.enrol import Answer, Trust, enrol, read_invitation
from gateway.enrolment.identity import Identity
from gateway.enrolment.renew import caller_of, renew
from streams.runtimes.supervisor import accepts
from tests.conftest import eventually, unused_port
from tests.seeded_site import Seeded, process, seeded

BOARD = "10000000abcdef01"


class Centre:
    """A seeded site whose API serves boxes."""

    def __init__(self, site: Seeded, authority: Authority) -> None:
        self.site = site
        self.authority = authority

    def code(self, gateway: str = "gw-01", ttl_ms: int = 7 * DAY_MS) -> enrolment.Invitation:
        return enrolment.invite(self.authority, gateway, ttl_ms, "li", "new box")

    def box(self, folder: Path, gateway: str = "gw-01") -> Identity:
        """Return a box that is enrolled."""
        enrol(folder, read_invitation(self.code(gateway).text), real_unix_ms(), BOARD)
        return Identity(folder)


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    site = seeded(tmp_path_factory.mktemp("site"))
    authority = Authority(site.layout)
    listen = f"127.0.0.1:{unused_port()}"
    authority.init(Setting(("127.0.0.1", "localhost"), listen=listen, broker_port=18_883), "li", "test")
    with process(site.layout, "api", ready=site.url + "/healthz"):
        eventually(lambda: accepts("127.0.0.1", int(listen.rpartition(":")[2])), what="the listener for boxes")
        yield Centre(site, authority)


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any, str]:
    code = main([*words, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]) if said.out else None, said.err


# --- the way it goes ----------------------------------------------------------------------------------------------


def test_a_code_becomes_a_box_with_certificate_and_configuration(
    tmp_path: Path, centre: Centre, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", str(centre.site.layout.root))
    templates = centre.site.layout.templates
    templates.mkdir(exist_ok=True)
    (templates / "gw-02.yaml").write_text("spool: {limit_mb: 64}\ndrivers: {}\n")
    qr = tmp_path / "code.svg"
    code, told, _ = cli(capsys, "devices", "enrol-code", "gw-02", "--ttl", "2d", "--qr", str(qr), *data)
    assert (code, told["gateway"]) == (0, "gw-02")
    assert "<svg" in qr.read_text()
    box = tmp_path / "box"
    code, told, err = cli(capsys, "gateway", "enrol", "--qr-text", told["qr"], "--data", str(box))
    assert (code, told["gateway"], abs(told["clock_offset_s"]) < 60) == (0, "gw-02", True), err
    identity = Identity(box)
    assert (identity.folder / "gateway.key").stat().st_mode & 0o077 == 0
    from gateway.config import read_config

    config = read_config(box / "gateway.yaml")
    assert (config.gateway, config.shard, config.broker.port, config.spool.limit_mb) == ("gw-02", 1, 18_883, 64)
    assert config.broker.tls is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(*(str(path) for path in identity.shown))  # key and certificate belong together
    entered = centre.authority.book().latest("gateway")["gw-02"]
    assert f"{identity.certificate.serial_number:x}" == entered.serial
    assert entered.board
    assert enrolment.code_hash("x") not in centre.authority.book().codes
    code, _, err = cli(capsys, "gateway", "enrol", "--qr-text", "x", "--data", str(box))
    assert (code, "--again" in err) == (1, True)


def test_a_code_is_typed_as_people_type(tmp_path: Path, centre: Centre, capsys: pytest.CaptureFixture[str]) -> None:
    made = centre.code("gw-03")
    typed = made.code.lower().replace("-", " ")
    words = ("--code", typed, "--url", made.url, "--ca", made.fingerprint[:32])
    code, told, err = cli(capsys, "gateway", "enrol", *words, "--data", str(tmp_path))
    assert (code, told["gateway"]) == (0, "gw-03"), err


def test_the_codes_are_kept_as_hashes(centre: Centre) -> None:
    made = centre.code()
    assert made.code.encode() not in centre.authority.journal.path.read_bytes()


# --- repeats and crashes ------------------------------------------------------------------------------------------


def test_a_code_is_used_once(tmp_path: Path, centre: Centre) -> None:
    invitation = read_invitation(centre.code().text)
    enrol(tmp_path / "one", invitation, real_unix_ms(), BOARD)
    with pytest.raises(TransitionError, match=r"the code was used on 2\d\d\d-.*ask the centre for another"):
        enrol(tmp_path / "two", invitation, real_unix_ms(), BOARD)
    assert not Identity(tmp_path / "two").enrolled


def test_a_box_that_died_before_it_wrote_the_answer_fetches_it_again(tmp_path: Path, centre: Centre) -> None:
    invitation = read_invitation(centre.code().text)
    identity = Identity(tmp_path)
    caller = Caller(invitation.url, unchecked_context(), real_unix_ms())
    body = {"code": invitation.code, "request": identity.request(), "board": BOARD}
    lost = caller.call("POST", "/v1/enrol", Answer, body)  # and the power goes
    again = enrol(tmp_path, invitation, real_unix_ms(), BOARD)
    assert again.certificate == lost.certificate
    assert Identity(tmp_path).enrolled


def test_a_box_that_died_while_it_wrote_the_answer_goes_on(tmp_path: Path, centre: Centre) -> None:
    """The folder with the serial is there, half of it, the link does not lead to it yet, and the key still waits."""
    invitation = read_invitation(centre.code().text)
    identity = Identity(tmp_path)
    caller = Caller(invitation.url, unchecked_context(), real_unix_ms())
    body = {"code": invitation.code, "request": identity.request(), "board": BOARD}
    lost = caller.call("POST", "/v1/enrol", Answer, body)
    half = tmp_path / f"pki-{x509.load_pem_x509_certificate(lost.certificate.encode()).serial_number:x}"
    half.mkdir()
    (half / "gateway.pem").write_text("half")
    assert not Identity(tmp_path).enrolled
    enrol(tmp_path, invitation, real_unix_ms(), BOARD)
    assert identity.folder.resolve() == half.resolve()
    assert (half / "gateway.pem").read_text() == lost.certificate
    assert not (tmp_path / "pki-new").exists()


def test_the_answer_may_be_fetched_again_for_15_minutes_only(tmp_path: Path) -> None:
    clock = ManualClock(real_unix_ms())
    authority = made_at(tmp_path / "centre", clock)
    code = enrolment.invite(authority, "gw-1", DAY_MS, "li", "x").code
    request = request_of(tmp_path / "box")
    first, again = enrolment.enrol(authority, code, request, BOARD)
    assert not again
    clock.set_ms(clock.now_ms() + 14 * MINUTE_MS)
    assert enrolment.enrol(authority, code, request, BOARD) == (first, True)
    clock.set_ms(clock.now_ms() + 2 * MINUTE_MS)
    with pytest.raises(TransitionError, match="was used"):
        enrolment.enrol(authority, code, request, BOARD)


def test_two_boxes_with_one_code_at_once_are_one_box(tmp_path: Path, centre: Centre) -> None:
    invitation = read_invitation(centre.code().text)
    results: list[str] = []

    def try_it(number: int) -> None:
        try:
            results.append(enrol(tmp_path / str(number), invitation, real_unix_ms(), BOARD).gateway)
        except TransitionError:
            results.append("refused")

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["gw-01", "refused", "refused", "refused"]


# --- what is refused ----------------------------------------------------------------------------------------------


def made_at(root: Path, clock: ManualClock) -> Authority:
    from tests.authority import made

    return made(root, clock)


def request_of(folder: Path) -> Any:
    from api.pki.certificates import read_request

    return read_request(Identity(folder).request().encode())


def test_a_code_that_is_over_superseded_or_of_a_revoked_gateway_is_refused(tmp_path: Path) -> None:
    clock = ManualClock(real_unix_ms())
    authority = made_at(tmp_path / "centre", clock)
    request = request_of(tmp_path / "box")

    def code(ttl_ms: int = DAY_MS) -> str:
        clock.set_ms(clock.now_ms() + 1000)
        return enrolment.invite(authority, "gw-1", ttl_ms, "li", "x").code

    old, new = code(), code()
    with pytest.raises(TransitionError, match="a newer code has been made"):
        enrolment.enrol(authority, old, request, BOARD)
    clock.set_ms(clock.now_ms() + 2 * DAY_MS)
    with pytest.raises(TransitionError, match="was valid until"):
        enrolment.enrol(authority, new, request, BOARD)
    good = code()
    issued, _ = enrolment.enrol(authority, good, request, BOARD)
    unused = code()
    clock.set_ms(clock.now_ms() + 1000)
    authority.revoke([issued.serial], "li", "stolen")
    with pytest.raises(TransitionError, match="was used"):
        enrolment.enrol(authority, good, request, BOARD)
    with pytest.raises(TransitionError, match="has been revoked since"):
        enrolment.enrol(authority, unused, request_of(tmp_path / "thief"), BOARD)
    assert enrolment.enrol(authority, code(), request, BOARD)[0].name == "gw-1", "the centre lets it in again"


@contextlib.contextmanager
def another_centre(root: Path, clock: Clock | None = None) -> Iterator[Centre]:
    """Run a centre of its own, for a test that leaves it changed."""
    site = seeded(root)
    authority = Authority(site.layout, clock)
    port = unused_port()
    authority.init(Setting(("127.0.0.1",), listen=f"127.0.0.1:{port}"), "li", "test")
    with process(site.layout, "api", ready=site.url + "/healthz"):
        eventually(lambda: accepts("127.0.0.1", port), what="the listener for boxes")
        yield Centre(site, authority)


def test_a_wrong_code_is_refused_and_many_have_to_wait(tmp_path: Path) -> None:
    with another_centre(tmp_path / "site") as centre:
        good = read_invitation(centre.code().text)
        wrong = msgspec.structs.replace(good, code="0000-0000-0000-0000")
        for _ in range(enrolment.WRONG):
            with pytest.raises(TransitionError, match="there is no such code"):
                enrol(tmp_path, wrong, real_unix_ms(), BOARD)
        with pytest.raises(TransitionError, match="too many wrong codes"):
            enrol(tmp_path, good, real_unix_ms(), BOARD)
        assert not Identity(tmp_path).enrolled


def test_who_waited_may_try_again() -> None:
    throttle = enrolment.Throttle()
    for at_ms in range(enrolment.WRONG):
        assert not throttle.waits("10.0.0.1", at_ms)
        throttle.wrong("10.0.0.1", at_ms)
    assert throttle.waits("10.0.0.1", 100)
    assert not throttle.waits("10.0.0.2", 100)
    assert not throttle.waits("10.0.0.1", enrolment.WRONG_MS)


def test_another_centre_is_told_nothing(tmp_path: Path, centre: Centre) -> None:
    stranger = msgspec.structs.replace(read_invitation(centre.code().text), fingerprint="ab" * 32)
    with pytest.raises(ProtocolError, match="not the centre that made this code"):
        enrol(tmp_path, stranger, real_unix_ms(), BOARD)
    wrong_host = msgspec.structs.replace(stranger, url="http://127.0.0.1")
    with pytest.raises(UsageError, match="https"):
        enrol(tmp_path, wrong_host, real_unix_ms(), BOARD)
    closed = msgspec.structs.replace(stranger, url=f"https://127.0.0.1:{unused_port()}")
    with pytest.raises(Unavailable, match="refused"):
        enrol(tmp_path, closed, real_unix_ms(), BOARD)


@pytest.mark.parametrize(
    "text", ["", "https://x", "https://x#code=1", "http://x#code=1&ca=" + "ab" * 32, "https://x#code=1&ca=abcd"]
)
def test_a_text_that_is_no_invitation(text: str) -> None:
    with pytest.raises(UsageError):
        read_invitation(text)


def test_a_request_that_is_none_and_an_unknown_gateway(
    centre: Centre, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = centre.code("gw-99")  # past the command's own check: the ledger may change after the code was made
    caller = Caller(made.url, unchecked_context(), real_unix_ms())
    with pytest.raises(TransitionError, match="certificate request in PEM"):
        caller.call("POST", "/v1/enrol", Answer, {"code": made.code, "request": "x", "board": ""})
    with pytest.raises(TransitionError, match="gw-99 is not in use"):
        enrol(tmp_path, read_invitation(made.text), real_unix_ms(), BOARD)
    data = ("--data", str(centre.site.layout.root))
    code, _, err = cli(capsys, "devices", "enrol-code", "gw-99", *data)
    assert (code, "not in the ledger" in err) == (1, True)
    assert cli(capsys, "devices", "enrol-code", "gw-01", "--ttl", "soon", *data)[0] == 2
    assert cli(capsys, "devices", "enrol-code", "gw-01", "--ttl", "400d", *data)[0] == 2
    assert cli(capsys, "devices", "enrol-code", "gw-01", "--qr", "code.gif", *data)[0] == 2


def test_a_template_that_is_wrong_is_said_at_the_centre_and_costs_no_code(tmp_path: Path, centre: Centre) -> None:
    templates = centre.site.layout.templates
    templates.mkdir(exist_ok=True)
    template = templates / "gw-04.yaml"
    template.write_text("shard: 3\n")
    invitation = read_invitation(centre.code("gw-04").text)
    with pytest.raises(Unavailable, match="leave out shard"):
        enrol(tmp_path, invitation, real_unix_ms(), BOARD)
    template.write_text("drivers: {a: {driver: no_such_driver}}\n")
    with pytest.raises(ConfigError, match=r"no driver 'no_such_driver'.*the box is enrolled"):
        enrol(tmp_path, invitation, real_unix_ms(), BOARD)
    assert Identity(tmp_path).enrolled
    assert (tmp_path / "gateway.yaml.refused").exists()


# --- clocks -------------------------------------------------------------------------------------------------------


def test_a_clock_long_before_the_authority_still_enrols(tmp_path: Path) -> None:
    """The box's clock says 1970, the centre's certificates begin later. Here the centre lives ten years from now."""
    with another_centre(tmp_path / "site", ManualClock(real_unix_ms() + 3650 * DAY_MS)) as later:
        invitation, now_ms = later.code(), real_unix_ms()
        trust = Caller(invitation.url, unchecked_context(), now_ms).call("GET", "/v1/enrol/trust", Trust).trust
        assert not clock_is_sound(trust, now_ms)
        strict = checked_context(trust, later.authority.clock.now_ms())  # as by a clock that is right
        with pytest.raises(Unavailable, match="not valid yet"):
            Caller(invitation.url, strict, now_ms).call("GET", "/v1/enrol/trust", Trust)
        answer = enrol(tmp_path / "box", read_invitation(invitation.text), now_ms, BOARD)
    assert answer.gateway == "gw-01"
    assert Identity(tmp_path / "box").enrolled


# --- renewal ------------------------------------------------------------------------------------------------------


def test_a_box_renews_by_itself_and_only_when_it_is_due(
    tmp_path: Path, centre: Centre, capsys: pytest.CaptureFixture[str]
) -> None:
    box = centre.box(tmp_path)
    before, folder = box.certificate, box.folder.resolve()
    assert not renew(box, real_unix_ms())
    assert renew(box, real_unix_ms() + 244 * DAY_MS)
    assert box.certificate.serial_number != before.serial_number
    assert box.certificate.public_key() != before.public_key(), "with a key of its own"
    assert not folder.exists(), "the old key is gone"
    code, told, _ = cli(capsys, "gateway", "renew", "--force", "--data", str(tmp_path))
    assert (code, told["renewed"], told["gateway"]) == (0, True, "gw-01")
    assert cli(capsys, "gateway", "renew", "--data", str(tmp_path / "nobody"))[0] == 3


def test_a_renewal_whose_answer_was_lost_is_the_same_renewal(tmp_path: Path, centre: Centre) -> None:
    box = centre.box(tmp_path)
    lost = caller_of(box, real_unix_ms()).call("POST", "/v1/enrol/renew", Answer, {"request": box.request()})
    assert renew(box, real_unix_ms(), force=True)
    assert box.certificate.serial_number == Identity(tmp_path).certificate.serial_number
    assert lost.certificate == (box.folder / "gateway.pem").read_text()


def test_a_revoked_box_renews_nothing(tmp_path: Path, centre: Centre) -> None:
    box = centre.box(tmp_path)
    serial = f"{box.certificate.serial_number:x}"
    centre.authority.revoke([serial], "li", "stolen")
    with pytest.raises(TransitionError, match="the certificate is revoked; ask the centre for a new code"):
        renew(box, real_unix_ms(), force=True)


def test_without_a_certificate_nothing_but_enrolment_is_open(centre: Centre) -> None:
    caller = Caller(centre.code().url, unchecked_context(), real_unix_ms())
    for method, path in (("POST", "/v1/enrol/renew"), ("GET", "/v1/gateways/gw-01/points")):
        with pytest.raises(TransitionError, match="show your certificate"):
            caller.call(method, path, dict[str, Any], {"request": "x"} if method == "POST" else None)
    for path in ("/v1/alarms", "/v1/status", "/openapi.json", "/"):
        with pytest.raises(TransitionError, match="Not Found"):
            caller.call("GET", path, dict[str, Any])


def test_after_a_rotation_boxes_learn_of_the_new_authority_and_the_server_follows(tmp_path: Path) -> None:
    with another_centre(tmp_path / "site") as centre:
        authority, box = centre.authority, centre.box(tmp_path / "box")
        authority.rotate("li", "planned")
        assert renew(box, real_unix_ms()), "another trust is reason enough"
        assert box.trust.count("BEGIN CERTIFICATE") == 2
        assert box.certificate.issuer == authority.root(2).subject
        authority.tend()
        newest = ssl.PEM_cert_to_DER_cert(authority.pem(authority.book().latest("server")["citybrain"].serial).decode())
        port = int(authority.setting.listen.rpartition(":")[2])

        def served() -> bytes:
            return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port)))

        eventually(lambda: served() == newest, 20, "the API serving the new certificate")
        assert not renew(box, real_unix_ms())


def test_the_api_goes_on_without_boxes_and_serves_them_as_soon_as_it_can(tmp_path: Path) -> None:
    site, port = seeded(tmp_path / "site"), unused_port()
    with process(site.layout, "api", ready=site.url + "/healthz"):
        assert httpx.get(site.url + "/v1/gateways", trust_env=False).status_code == 200, "without an authority"
        authority = Authority(site.layout)
        authority.init(Setting(("127.0.0.1",), listen=f"127.0.0.1:{port}"), "li", "made while the API runs")
        eventually(lambda: accepts("127.0.0.1", port), 20, "the listener for boxes")
    with socket.create_server(("127.0.0.1", port)), process(site.layout, "api", ready=site.url + "/healthz"):

        def warned() -> bool:
            beats = [beat for beat in read_heartbeats(site.layout.run) if beat.process == "api"]
            return any(f"port {port}" in one for beat in beats for one in beat.warnings)

        eventually(warned, 20, "the taken port being said")
        assert httpx.get(site.url + "/v1/gateways", trust_env=False).status_code == 200
