"""Mutual TLS with a real mosquitto: what connects, and how a refusal is named by the gateway's own log."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from citybrain.clock import monotonic_s, real_unix_ms
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from gateway.broker.certificate import read_certificate
from gateway.config import Tls
from gateway.service import Broker, GatewayService
from gateway.spool import Spool
from gateway.uplink import Uplink
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.broker import mosquitto_configuration
from streams.runtimes.supervisor import accepts
from tests.certificates import Authority
from tests.conftest import end, eventually, unused_port
from tests.gateway.test_gateway_service import Answering, polled

GATEWAY = "gw-0007"
ROLLED_MS = 86_400_000 * 3  # 1970-01-04


class Site:
    """An authority, a broker that asks for certificates, and a plain listener for the platform."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "pki")
        self.foreign = Authority(folder / "foreign", "another CA")
        self.good = self.authority.sign(GATEWAY)
        self.port, self.plain = unused_port(), unused_port()

    def configuration(self, server: Path, crl: Path | None = None) -> str:
        lines = [
            mosquitto_configuration(self.plain),
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            f"cafile {self.authority.ca}",
            f"certfile {server}",
            f"keyfile {server.with_suffix('.key')}",
            "require_certificate true",
            "use_identity_as_username true",
        ]
        lines += [f"crlfile {crl}"] if crl is not None else []
        return "\n".join([*lines, ""])

    def tls(self, certificate: Path | None = None, ca: Path | None = None) -> Tls:
        shown = certificate or self.good
        return Tls(str(ca or self.authority.ca), str(shown), str(shown.with_suffix(".key")))


@contextmanager
def broker(site: Site, folder: Path, server: Path | None = None, crl: Path | None = None) -> Iterator[None]:
    program = find_mosquitto()
    assert program is not None, "mosquitto is not installed: apt-get install mosquitto (or run .ci/run)"
    path = folder / "tls.conf"
    path.write_text(site.configuration(server or site.authority.sign("broker", server=True), crl))
    with (folder / "tls.log").open("wb") as log, subprocess.Popen([program, "-c", str(path)], stderr=log) as process:
        try:
            eventually(lambda: accepts("127.0.0.1", site.port), what="mosquitto listening")
            yield
        finally:
            end(process)


def opened(
    folder: Path, site: Site, tls: Tls, host: str = "127.0.0.1", wall_ms: Callable[[], int] = real_unix_ms
) -> GatewayService:
    spool = Spool(folder / "spool", "board-1")
    spool.start()
    uplink = Uplink(spool, GATEWAY, 1, timeout_s=0.5)
    return GatewayService(uplink, GATEWAY, 1, Broker(host, site.port, tls=tls), wall_ms=wall_ms)


def refused(service: GatewayService) -> str:
    """Poll until the log says why there is no connection; return that."""

    def known() -> bool:
        service.poll(0.05)
        return bool(service.uplink.counters.warnings)

    eventually(known, 15, "a reason in the log")
    assert not service.ready
    service.close()
    return service.uplink.counters.warnings[0]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_everything_arrives_over_mutual_tls_and_bytes_are_counted(tmp_path: Path, site: Site) -> None:
    with broker(site, tmp_path):
        platform = Answering(site.plain)
        service = opened(tmp_path, site, site.tls())
        for number in range(300):
            reading = Reading("d", number, {"value": float(number)})
            service.spool.append(Lane.TELEMETRY, [reading], number)
        service.spool.commit()

        def idle() -> bool:
            service.poll(0.02)
            return service.ready and service.uplink.idle()

        eventually(idle, 15, "an empty spool")
        service.count_bytes()
        counters = service.uplink.counters.values
        assert platform.logged(GATEWAY, Lane.TELEMETRY) == list(range(1, 301))
        assert counters["sent_bytes_total"] > 300 * 100  # a message of one reading has more than 100 bytes
        assert 300 < counters["received_bytes_total"] < counters["sent_bytes_total"]
        sent = counters["sent_bytes_total"]
        service.close()
        assert counters["sent_bytes_total"] > sent, "the farewell counts too"
        platform.close()


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        ("expired", "the broker refused our certificate: it has expired; our certificate expired 20"),
        ("foreign", "the broker refused our certificate: unknown authority"),
        ("revoked", "the broker refused our certificate: it has been revoked"),
        ("future", "our certificate is valid from 20"),
    ],
)
def test_the_log_names_why_the_broker_refuses(tmp_path: Path, site: Site, certificate: str, says: str) -> None:
    shown = {
        "expired": lambda: site.authority.sign(GATEWAY, -20, -2),
        "foreign": lambda: site.foreign.sign(GATEWAY),
        "revoked": lambda: site.good,
        "future": lambda: site.authority.sign(GATEWAY, 2, 20),
    }[certificate]()
    crl = site.authority.revoke(site.good) if certificate == "revoked" else None
    with broker(site, tmp_path, crl=crl):
        assert says in refused(opened(tmp_path, site, site.tls(shown)))


def test_the_log_names_why_we_refuse_the_broker(tmp_path: Path, site: Site) -> None:
    with broker(site, tmp_path):
        said = refused(opened(tmp_path, site, site.tls(ca=site.foreign.ca)))
        assert "the broker's certificate is not signed by our CA" in said
        said = refused(opened(tmp_path / "2", site, site.tls(), host="localhost"))
        assert "the broker's certificate is not for 'localhost'" in said
    with broker(site, tmp_path, site.authority.sign("old", -20, -1, server=True)):
        assert "the broker's certificate has expired" in refused(opened(tmp_path / "3", site, site.tls()))


def test_a_clock_that_is_not_set_is_named_as_the_cause(tmp_path: Path, site: Site) -> None:
    """To a clock at 1970 every certificate is one of the future, which OpenSSL only sees of the real clock."""
    with broker(site, tmp_path, site.authority.sign("young", 1, 20, server=True)):
        said = refused(opened(tmp_path, site, site.tls(), wall_ms=lambda: ROLLED_MS))
        assert "our clock says 1970-01-04: it is not set" in said
        assert "not valid yet" in refused(opened(tmp_path / "2", site, site.tls()))


def test_files_that_are_missing_or_wrong_are_named(tmp_path: Path, site: Site) -> None:
    other = site.authority.sign("other")
    with broker(site, tmp_path):
        tls = site.tls()
        missing = Tls(tls.ca, str(tmp_path / "none.pem"), tls.key)
        assert f"{tmp_path / 'none.pem'}: cannot be read: No such file" in refused(
            opened(tmp_path / "1", site, missing)
        )
        mixed = Tls(tls.ca, tls.certificate, str(other.with_suffix(".key")))
        assert f"is not the key of {tls.certificate}" in refused(opened(tmp_path / "2", site, mixed))
        rubbish = tmp_path / "rubbish.pem"
        rubbish.write_text("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n")
        assert str(rubbish) in refused(opened(tmp_path / "3", site, Tls(str(rubbish), tls.certificate, tls.key)))


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path, site: Site) -> None:
    expired = site.authority.sign(GATEWAY, -20, -2)
    with broker(site, tmp_path):
        service = opened(tmp_path, site, site.tls(expired))
        refused_once = service.uplink.counters.warnings
        eventually(lambda: polled(service) and refused_once, 15)
        site.authority.sign(GATEWAY)  # the same files
        eventually(lambda: polled(service) and service.ready, 15, "a connection with the new certificate")
        assert len(refused_once) == 1, "the same reason is said once"
        service.close()


def test_a_broker_that_says_nothing_holds_nobody_up(tmp_path: Path, site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.port)):
        service = opened(tmp_path, site, site.tls())
        longest_s = 0.0
        while not service.uplink.counters.warnings:
            began_s = monotonic_s()
            service.poll(0.02)
            longest_s = max(longest_s, monotonic_s() - began_s)
        assert "does not answer the TLS handshake" in service.uplink.counters.warnings[0]
        assert longest_s < 1.5, "TLS waits for 2 s, but not here"
        service.close()


def test_what_is_dialled_when_the_line_is_cut_is_given_up(tmp_path: Path, site: Site) -> None:
    with socket.create_server(("127.0.0.1", site.port)) as server:
        service = opened(tmp_path, site, site.tls())
        service.poll(0.0)
        line, _ = server.accept()
        service.cut()
        line.close()
        service.poll(0.05)
        assert not service.uplink.counters.warnings
        service.close()


def test_a_name_that_is_not_known_is_said(tmp_path: Path, site: Site) -> None:
    said = refused(opened(tmp_path, site, site.tls(), host="no-such-host.invalid"))
    assert "its name is not known" in said


def test_a_plain_port_is_named(tmp_path: Path, site: Site) -> None:
    with broker(site, tmp_path):
        site.port = site.plain
        assert "is it a TLS port?" in refused(opened(tmp_path, site, site.tls()))


def test_a_certificate_is_read_as_the_library_reads_it(site: Site) -> None:
    for path in (site.good, site.authority.ca, site.authority.sign("far", -1, 365 * 40)):  # beyond 2050: another type
        whole = x509.load_pem_x509_certificate(path.read_bytes())
        mine = read_certificate(path)
        assert mine.not_before == whole.not_valid_before_utc.timestamp()
        assert mine.not_after == whole.not_valid_after_utc.timestamp()
        assert f"CN={mine.name}" == whole.subject.rfc4514_string()


@pytest.mark.parametrize("text", ["", "no PEM", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.pem"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a certificate in PEM"):
        read_certificate(path)
