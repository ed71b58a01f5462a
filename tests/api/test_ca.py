"""The certificate authority: what it makes, what it refuses, and that its files follow from the journal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from api.pki import certificates
from api.pki.broker import BrokerFolder
from api.pki.ca import AUTHORITY_MS, Authority, Setting, due
from api.pki.journal import Journal, Step
from citybrain.cli import main
from citybrain.clock import DAY_MS, ManualClock, real_unix_ms
from citybrain.errors import ConfigError, Damaged, NotFound, TransitionError, UsageError
from citybrain.layout import Layout
from tests.authority import Box, made


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(real_unix_ms())


@pytest.fixture
def authority(tmp_path: Path, clock: ManualClock) -> Authority:
    return made(tmp_path / "centre", clock)


def cli(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> tuple[int, Any, str]:
    code = main(["ca", *words, "--data", str(root), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


# --- certificates -----------------------------------------------------------------------------------------------


def test_openssl_verifies_what_was_signed_and_what_was_revoked(tmp_path: Path, authority: Authority) -> None:
    box = Box(tmp_path, authority, "gw-1")
    check = ["openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", str(box.trust)]
    done = subprocess.run([*check, str(box.certificate)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    authority.revoke([box.issued.serial], "li", "lost")
    with_list = [*check, "-crl_check", "-CRLfile", str(authority.folder / "crl.pem"), str(box.certificate)]
    done = subprocess.run(with_list, capture_output=True, text=True, check=False)
    assert "certificate revoked" in done.stderr


def test_a_certificate_names_the_box_for_a_year_and_is_renewed_at_two_thirds(
    tmp_path: Path, authority: Authority, clock: ManualClock
) -> None:
    box = Box(tmp_path, authority, "gw-1")
    made_ = certificates.read_certificate(box.certificate.read_bytes(), "x")
    assert certificates.common_name(made_.subject) == "gw-1"
    assert box.issued.until_ms - box.issued.from_ms == 365 * DAY_MS
    assert made_.serial_number.bit_length() > 100, "serials are random"
    assert not due(box.issued, clock.now_ms() + 243 * DAY_MS)
    assert due(box.issued, clock.now_ms() + 244 * DAY_MS)


@pytest.mark.parametrize("name", ["", "gw/1", "gw+1", "#", "gw 1", "x" * 65, "网关", "-x"])
def test_a_name_that_could_be_more_than_a_topic_level_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(UsageError, match="expected up to 64"):
        authority.sign("gateway", name, certificates.new_key().public_key(), "li", "x")


def test_a_gateway_cannot_take_a_services_name(authority: Authority) -> None:
    with pytest.raises(UsageError, match="our own services"):
        authority.sign("gateway", "service-ingest", certificates.new_key().public_key(), "li", "x")


def test_requests_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="certificate request in PEM"):
        certificates.read_request(b"hello")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    from cryptography.hazmat.primitives import hashes, serialization

    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(UsageError, match="P-256"):
        certificates.read_request(pem)
    good = x509.load_pem_x509_csr(certificates.request_for(certificates.new_key(), "gw-1"))
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(UsageError, match=r"not signed by its own key|expected a certificate request"):
        certificates.read_request(forged)


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_second_authority_is_refused(authority: Authority) -> None:
    with pytest.raises(TransitionError, match="ca rotate"):
        authority.init(Setting(("x",)), "li", "again")


def test_keys_are_the_owners_alone_and_closed_by_the_passphrase(tmp_path: Path, authority: Authority) -> None:
    root = authority.layout.root
    for path in (authority.folder / "authority-1.key", authority.folder / "server.key", root / "secrets/ca.passphrase"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert b"ENCRYPTED" in (authority.folder / "authority-1.key").read_bytes()
    (root / "secrets/ca.passphrase").write_text("guess")
    fresh = Authority(authority.layout)
    with pytest.raises(ConfigError, match="is the passphrase right"):
        Box(tmp_path, fresh, "gw-1")
    with pytest.raises(ConfigError, match="is the passphrase right"):
        fresh.rotate("li", "two passphrases would be one too many")
    (root / "secrets/ca.passphrase").unlink()
    with pytest.raises(ConfigError, match="there is none"):
        Box(tmp_path, Authority(authority.layout), "gw-1")


def test_a_passphrase_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CA_WORDS", "correct horse")
    authority = Authority(Layout(tmp_path))
    authority.init(Setting(("x",), passphrase="env:CA_WORDS"), "li", "test")
    Box(tmp_path / "box", authority, "gw-1")
    with pytest.raises(ConfigError, match=r"expected file:PATH or env:NAME"):
        Authority(Layout(tmp_path / "other")).init(Setting(("x",), passphrase="words"), "li", "test")


def test_an_authority_that_has_ended_signs_nothing(tmp_path: Path, authority: Authority, clock: ManualClock) -> None:
    clock.set_ms(clock.now_ms() + AUTHORITY_MS + 1)
    with pytest.raises(TransitionError, match=r"ended on .*ca rotate"):
        Box(tmp_path, authority, "gw-1")


def test_a_certificate_ends_no_later_than_its_authority(
    tmp_path: Path, authority: Authority, clock: ManualClock
) -> None:
    clock.set_ms(clock.now_ms() + AUTHORITY_MS - 30 * DAY_MS)
    assert Box(tmp_path, authority, "gw-1").issued.until_ms == authority.book().authorities[1]


# --- rotation ---------------------------------------------------------------------------------------------------


def test_a_rotation_overlaps(tmp_path: Path, authority: Authority, clock: ManualClock) -> None:
    Box(tmp_path, authority, "gw-1")
    clock.set_ms(clock.now_ms() + DAY_MS)
    assert authority.rotate("li", "planned") == 2
    assert authority.trust().count(b"BEGIN CERTIFICATE") == 2
    assert Box(tmp_path, authority, "gw-2").issued.authority == 2
    server = certificates.read_certificate((authority.folder / "server.pem").read_bytes(), "server")
    assert server.issuer == authority.root(1).subject, "gw-1 knows the old authority only"
    Box(tmp_path, authority, "gw-1")  # it renews, and learns of the new one
    authority.tend()
    server = certificates.read_certificate((authority.folder / "server.pem").read_bytes(), "server")
    assert server.issuer == authority.root(2).subject
    assert (authority.folder / "crl.pem").read_bytes().count(b"BEGIN X509 CRL") == 2, "each authority has its list"
    clock.set_ms(authority.book().authorities[1] + 1)
    assert authority.trust().count(b"BEGIN CERTIFICATE") == 1


def test_the_server_waits_for_our_services_too(authority: Authority, clock: ManualClock) -> None:
    authority.make_service("service-ingest", "li", "x")
    clock.set_ms(clock.now_ms() + DAY_MS)
    authority.rotate("li", "planned")
    server = certificates.read_certificate((authority.folder / "server.pem").read_bytes(), "server")
    assert server.issuer == authority.root(1).subject
    authority.make_service("service-ingest", "li", "signed anew")
    authority.tend()
    server = certificates.read_certificate((authority.folder / "server.pem").read_bytes(), "server")
    assert server.issuer == authority.root(2).subject


def test_a_brokers_folder_that_is_gone_is_said_and_stops_nothing(tmp_path: Path, authority: Authority) -> None:
    authority.serve_broker(BrokerFolder(str(tmp_path / "broker")))
    shutil.rmtree(tmp_path / "broker")
    box = Box(tmp_path, authority, "gw-1")
    authority.revoke([box.issued.serial], "li", "lost")
    assert any("the broker's folder is gone" in note for note in authority.notes)


# --- journal ----------------------------------------------------------------------------------------------------


def test_every_step_says_who_and_why(tmp_path: Path, authority: Authority) -> None:
    box = Box(tmp_path, authority, "gw-1")
    authority.revoke([box.issued.serial], "wang", "被盗")
    steps = authority.journal.read()
    assert [step.event for step in steps] == ["init", "sign", "sign", "revoke"]
    assert (steps[-1].actor, steps[-1].reason, steps[-1].serial) == ("wang", "被盗", box.issued.serial)
    with pytest.raises(TransitionError, match="被盗"):
        authority.revoke([box.issued.serial], "wang", "again")
    with pytest.raises(UsageError, match="say why"):
        authority.revoke([box.issued.serial], "wang", " ")


def test_a_torn_line_is_cut_off_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add([Step(1, "init", "li", authority=1, until=9)])
    with journal.path.open("ab") as file:
        file.write(b'{"at":2,"event":"rot')
    assert len(journal.read()) == 1
    journal.add([Step(3, "rotate", "li", authority=2, until=9)])
    assert [step.at for step in journal.read()] == [1, 3]
    journal.path.write_bytes(journal.path.read_bytes().replace(b"init", b"xxxx"))
    with pytest.raises(Damaged, match="line 1"):
        journal.book()


def test_lost_files_are_made_anew_from_the_journal(authority: Authority) -> None:
    names = ("trust.pem", "crl.pem", "server.pem")
    for name in names:
        (authority.folder / name).unlink()
    authority.tend()
    assert all((authority.folder / name).exists() for name in names)


def test_two_who_sign_at_once_do_not_tear_the_journal(tmp_path: Path, authority: Authority) -> None:
    def sign(number: int) -> None:
        own = Authority(authority.layout, authority.clock)
        for n in range(5):
            Box(tmp_path, own, f"gw-{number}-{n}")

    threads = [threading.Thread(target=sign, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(authority.book().latest("gateway")) == 20


# --- command line -----------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    code, _, err = cli(capsys, root, "list")
    assert (code, "ca init --host" in err) == (1, True)
    code, told, _ = cli(capsys, root, "init", "--host", "iot.example.city", "--host", "10.0.0.5", "--listen", "")
    assert (code, told["authority"], len(told["fingerprint"])) == (0, 1, 64)
    assert cli(capsys, root, "init", "--host", "x")[0] == 1
    key = certificates.new_key()
    csr = tmp_path / "gw-1.csr"
    csr.write_bytes(certificates.request_for(key, "gw-1"))
    assert cli(capsys, root, "sign", "gw-2", "--csr", str(csr), "--out", str(out))[0] == 2
    code, told, _ = cli(capsys, root, "sign", "gw-1", "--csr", str(csr), "--out", str(out))
    assert (code, told["name"], sorted(path.name for path in out.iterdir())) == (0, "gw-1", ["ca.pem", "gw-1.pem"])
    assert cli(capsys, root, "sign", "service-ingest", "--out", str(out))[1]["kind"] == "service"
    assert (out / "service-ingest.key").stat().st_mode & 0o077 == 0
    code, _, err = cli(capsys, root, "revoke", "abcd", "--reason", "x")
    assert (code, "no such serial" in err) == (1, True)
    assert cli(capsys, root, "revoke", "--reason", "x")[0] == 2
    assert cli(capsys, root, "revoke", "--gateway", "gw-9", "--reason", "x")[0] == 1
    assert cli(capsys, root, "revoke", "--gateway", "gw-1", "--reason", "lost")[1]["revoked"][0]["state"] == "revoked"
    assert [one["name"] for one in cli(capsys, root, "list", "--state", "revoked")[1]["certificates"]] == ["gw-1"]
    assert cli(capsys, root, "rotate", "--reason", "planned")[1]["authority"] == 2
    assert cli(capsys, root, "broker", "--out", str(out / "b"), "--user", "nobody-at-all")[0] == 3
    assert main(["ca", "list", "--data", str(root)]) == 0
    assert "service-ingest" in capsys.readouterr().out


def test_there_is_a_command(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "citybrain", "ca", "list", "--data", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, "no certificate authority" in done.stderr) == (1, True)


def test_what_is_not_there_is_said(authority: Authority) -> None:
    with pytest.raises(NotFound, match="ca list"):
        authority.issued("abc")
