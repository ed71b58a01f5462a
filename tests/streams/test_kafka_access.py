"""`--kafka-config`: a Kafka with TLS and passwords is used by every process, and whoever comes otherwise is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from citybrain.clock import system_clock
from citybrain.counters import Heartbeat
from citybrain.errors import ConfigError, Unavailable
from citybrain.layout import Layout, Run
from streams.runtimes.kafka.access import faust_credentials, read_access, ssl_context
from streams.runtimes.kafka.store import KafkaStore
from tests.conftest import end, eventually, unused_port
from tests.kafka_cluster import Cluster, artifacts

PASSWORD = "right horse"


class Guarded(NamedTuple):
    """A broker with a TLS listener that wants a certificate, and one that wants a password."""

    folder: Path
    certificate: str
    password: str


def openssl(folder: Path, *argv: str) -> None:
    subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True, timeout=60)


def make_certificates(folder: Path) -> None:
    """Make `ca.pem`, `NAME.pem` and `NAME.key` of a broker on loopback and of a client; `stranger` is another CA."""
    ten_years = ("-days", "3650", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    for name in ("ca", "stranger"):
        made = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        openssl(folder, "req", "-x509", *ten_years, "-subj", f"/CN={name}", *made)
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "3650", "-extfile", "names")
    for name in ("broker", "client"):
        openssl(folder, "req", *ten_years[2:], "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    (folder / "broker.store").write_text((folder / "broker.key").read_text() + (folder / "broker.pem").read_text())


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    make_certificates(folder)
    made = Cluster(folder / "kafka", 1, artifacts())
    (broker,) = made.brokers
    tls, sasl = unused_port(), unused_port()
    broker.listeners += [f"SSL://127.0.0.1:{tls}", f"SASL_SSL://127.0.0.1:{sasl}"]
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_citybrain="{PASSWORD}";'
    broker.more = "\n".join([
        "listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL",
        "ssl.keystore.type=PEM",
        f"ssl.keystore.location={folder}/broker.store",
        "ssl.truststore.type=PEM",
        f"ssl.truststore.location={folder}/ca.pem",
        "listener.name.ssl.ssl.client.auth=required",
        "sasl.enabled.mechanisms=PLAIN",
        f"listener.name.sasl_ssl.plain.sasl.jaas.config={login}",
        "",
    ])  # fmt: skip
    try:
        made.start()
        yield Guarded(folder, f"127.0.0.1:{tls}", f"127.0.0.1:{sasl}")
    finally:
        made.end()


def write(folder: Path, name: str, **settings: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{key.replace('_', '.')}: {value}\n" for key, value in settings.items()))
    return path


@pytest.fixture
def by_certificate(guarded: Guarded) -> Path:
    return write(
        guarded.folder, "certificate.yaml",
        ssl_ca_location="ca.pem", ssl_certificate_location="client.pem", ssl_key_location="client.key",
    )  # fmt: skip


def with_protocol(path: Path, protocol: str) -> Path:
    path.write_text(f"security.protocol: {protocol}\n" + path.read_text())
    return path


@pytest.fixture
def by_password(guarded: Guarded) -> Path:
    (guarded.folder / "password").write_text(PASSWORD + "\n")
    path = write(
        guarded.folder, "password.yaml", ssl_ca_location="ca.pem", sasl_mechanism="PLAIN", sasl_username="citybrain",
    )  # fmt: skip
    path.write_text(path.read_text() + "sasl.password.file: password\n")
    return with_protocol(path, "sasl_ssl")


def layout_of(folder: Path) -> Layout:
    layout = Layout(folder)
    layout.make()
    layout.write_run(Run(clock=system_clock(), shards=1))
    return layout


@pytest.mark.parametrize("way", ["certificate", "password"])
@pytest.mark.parametrize("runtime", ["kafka", "faust"])
def test_workers_get_in_with_a_certificate_and_with_a_password(
    guarded: Guarded, by_certificate: Path, by_password: Path, tmp_path: Path, topic_prefix: str, way: str, runtime: str
) -> None:
    config = with_protocol(by_certificate, "ssl") if way == "certificate" else by_password
    address = guarded.certificate if way == "certificate" else guarded.password
    layout = layout_of(tmp_path / "data")
    argv = [sys.executable, "-m", "citybrain", "worker", "--data", str(layout.root), "--runtime", runtime]
    argv += ["--log", "kafka", "--kafka", address, "--kafka-config", str(config), "--topics", topic_prefix]
    with (tmp_path / "words").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            eventually(lambda: assigned(layout) == [0], 60, f"the shard; it said {(tmp_path / 'words').read_text()}")
        finally:
            end(process)
    store = KafkaStore(address, layout, 1, prefix=topic_prefix, settings=read_access(config))
    store.open()
    writer = store.writer("log", 0)
    writer.start()
    writer.append(1, 1, b"in")
    assert writer.commit() == 1
    assert [record.payload for record in store.reader("log", 0).read()] == [b"in"]


def assigned(layout: Layout) -> list[int]:
    path = layout.run / "worker.heartbeat.json"
    found: list[int] = []
    if path.exists():
        found = msgspec.json.decode(path.read_bytes(), type=Heartbeat).details.get("assigned", [])
    return found


def test_who_comes_otherwise_is_told_what_is_wrong(
    guarded: Guarded, by_certificate: Path, by_password: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.runtimes.kafka.store.ANSWER_S", 4.0)
    layout = layout_of(tmp_path / "data")
    with pytest.raises(Unavailable, match="is it running, and does --kafka-config say how to get in"):
        KafkaStore(guarded.certificate, layout, 1).open()
    (guarded.folder / "password").write_text("wrong")
    with pytest.raises(Unavailable, match="uthentication"):
        KafkaStore(guarded.password, layout, 1, settings=read_access(by_password)).open()
    settings = read_access(with_protocol(by_certificate, "ssl"))
    stranger = settings | {"ssl.ca.location": str(guarded.folder / "stranger.pem")}
    with pytest.raises(Unavailable, match="certificate verify failed"):
        KafkaStore(guarded.certificate, layout, 1, settings=stranger).open()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("security.protocol: ssl\nssl.ca.locatoin: ca.pem\n", r"bad.yaml:2.*did you mean 'ssl.ca.location'"),
        ("security.protocol: tls\n", r"bad.yaml:1 .*tls"),
        ("ssl.ca.location: ca.pem\n", "security.protocol"),
        ("security.protocol: ssl\nssl.ca.location: missing.pem\n", "missing.pem cannot be read: No such file"),
        ("security.protocol: sasl_ssl\nsasl.mechanism: PLAIN\nsasl.username: u\n", "needs sasl.password.file"),
        ("security.protocol: ssl\nsasl.username: u\n", "sasl.username has no meaning with security.protocol ssl"),
        ("security.protocol: ssl\nssl.certificate.location: bad.yaml\n", "belong together"),
        ("security.protocol: ssl\nsasl.password: secret\n", "unknown field 'sasl.password'"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_access(tmp_path / "bad.yaml")


def test_faust_is_given_the_same(tmp_path: Path) -> None:
    assert faust_credentials({}) is None
    plain = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "SCRAM-SHA-512"}
    found = faust_credentials(plain | {"sasl.username": "u", "sasl.password": "p"})
    assert (found.username, found.password, found.mechanism.value) == ("u", "p", "SCRAM-SHA-512")
    (tmp_path / "no.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="cannot be used"):
        ssl_context({"ssl.ca.location": str(tmp_path / "no.pem")})
    assert not ssl_context({"ssl.endpoint.identification.algorithm": "none"}).check_hostname
