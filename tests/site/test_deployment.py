"""What we ship for deployment is what the real programs take: containers, units, and every server's configuration."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
import yaml
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

from citybrain.cli import commands, parser_for
from streams.projection.config import read_target
from streams.runtimes.broker import mosquitto as find_mosquitto
from streams.runtimes.broker import mosquitto_configuration
from streams.runtimes.supervisor import accepts
from tests import kafka_cluster
from tests.conftest import end, eventually, unused_port

ROOT = Path(__file__).parents[2]
DOCKER, UNITS = ROOT / "docker", ROOT / "deploy" / "systemd"
FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
ROOT_USER = {"victoria"}  # its image has no user of its own that could write a new volume; it has no capability either


def missing(what: str, package: str) -> NoReturn:
    """Skip, or fail where this is CI."""
    why = f"{what} is not installed (apt-get install {package})"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def program(name: str, package: str) -> str:
    return shutil.which(name) or missing(name, package)


# --- docker-compose.yml -----------------------------------------------------------------------------------------


def of(profile: str) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in SERVICES.items() if profile in service["profiles"]}


def test_each_service_belongs_to_a_profile_and_needs_only_its_own() -> None:
    for profile in ("small", "city"):
        services = of(profile)
        for name, service in services.items():
            assert set(service.get("depends_on", {})) <= set(services), name
    assert set(of("small")) | set(of("city")) == set(SERVICES)
    assert set(of("small")) & set(of("city")) == {"mosquitto"}


def test_the_city_has_several_of_what_may_fail_or_grow() -> None:
    for role in ("ingest", "worker", "desk"):
        assert len([name for name in of("city") if name.startswith(f"city-{role}-")]) >= 2
    taken = [
        shard for name, service in of("city").items() if name.startswith("city-ingest-") for shard in shards(service)
    ]
    command = SERVICES["city-prepare"]["command"]
    assert sorted(taken) == list(range(int(command[command.index("--shards") + 1])))


def shards(service: dict[str, Any]) -> list[int]:
    command = service["command"]
    return [int(shard) for shard in command[command.index("--shards") + 1].split(",")]


def test_containers_are_reached_through_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert all(service["network_mode"] == "service:mosquitto" for name, service in OURS.items() if name in of("small"))


def test_who_has_no_business_with_a_link_is_not_on_it() -> None:
    on: dict[str, set[str]] = {name: set() for name in FILE["networks"]}
    for name, service in of("city").items():
        beside = service.get("network_mode", "").removeprefix("service:")
        assert (beside == "mosquitto") is name.startswith("city-ingest")
        for network in service.get("networks", ()):
            on[network].add(re.sub(r"-[0-9a-z]$", "", name.removeprefix("city-")))
    assert on["database"] == {"postgres", "desk", "api", "history", "migrate"}
    assert on["log"] == {"kafka", "mosquitto", "worker", "desk", "api", "history", "influx"}
    assert on["field"] == {"mosquitto"}
    assert on["metrics"] == {"victoria", "prometheus", "grafana", "influx"}
    for network in ("database", "log", "metrics"):
        assert FILE["networks"][network]["internal"] is True


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_may_do_as_little_as_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["stop_grace_period"]
    if name not in OURS and name not in ROOT_USER:
        assert re.fullmatch(r"[1-9]\d*:\d+", service["user"])
    if name in OURS or name not in ("kafka", "grafana"):  # these write beside their data
        assert service["read_only"] is True
    if name in of("city") and name != "mosquitto":
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    if service["restart"] != "no":
        assert service["healthcheck"]["test"]


def test_secrets_are_files_that_git_and_images_do_not_have() -> None:
    for secret in FILE["secrets"].values():
        assert secret["file"].startswith("./docker/secrets/")
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            assert "PASSWORD" not in key or key.endswith("_FILE"), name
            assert not re.search(r"://[^/@]+:[^/@]+@", str(value)), f"{name}: a password in {key}"
    assert all(not line.startswith(("COPY . ", "ADD ")) for line in (DOCKER / "Dockerfile").read_text().splitlines())


def test_what_is_mounted_is_there() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (ROOT / source).exists() if source.startswith("./") else source in FILE["volumes"]
            assert there, f"{name}: {volume}"


def test_images_are_pinned_and_ours_is_not_root() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    images = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    images += [service["image"] for service in SERVICES.values()]
    assert all(re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)*$", image) for image in images)
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", dockerfile, re.MULTILINE)
    assert "--require-hashes" in dockerfile


def parsed(words: list[str]) -> Any:
    """Parse a command line with the parser that the program has for it; fail with what it says."""
    options = parser_for(words[0], commands()[words[0]].load())
    try:
        return options.parse_args(words[1:])
    except SystemExit:
        pytest.fail(f"citybrain {shlex.join(words)}: {options.format_usage()}")


@pytest.mark.parametrize("name", OURS)
def test_containers_run_commands_that_exist_and_say_how_they_are(name: str) -> None:
    service = OURS[name]
    command = service["command"]
    assert parsed(command).data == Path("/data")
    if service["restart"] != "no":
        beat = re.search(r"/data/run/(\S+)\.heartbeat\.json", service["healthcheck"]["test"][1])
        assert beat
        named = command[command.index("--name") + 1] if "--name" in command else ""
        split = f"-{'-'.join(map(str, shards(service)))}" if "--shards" in command else ""
        assert beat[1] == (named or f"{command[0]}{split}")


def test_only_what_prepares_runs_once() -> None:
    once = {name for name, service in OURS.items() if service["restart"] == "no"}
    assert once == {"prepare", "migrate", "provision", "contract", "city-prepare", "city-migrate"}


def test_the_check_of_a_heartbeat_can_tell(tmp_path: Path) -> None:
    beat = tmp_path / "worker-a.heartbeat.json"
    check = SERVICES["city-worker-a"]["healthcheck"]["test"][1].replace("/data/run", str(tmp_path))

    def healthy() -> bool:
        return subprocess.run(["sh", "-c", check], capture_output=True, check=False).returncode == 0

    assert not healthy()
    beat.write_text("{}")
    assert healthy()
    os.utime(beat, (0, 0))
    assert not healthy()


# --- the servers' configuration ---------------------------------------------------------------------------------


def test_mosquitto_starts_with_ours(tmp_path: Path) -> None:
    port = unused_port()
    path = tmp_path / "mosquitto.conf"
    path.write_text((DOCKER / "mosquitto.conf").read_text().replace("listener 1883", f"listener {port} 127.0.0.1"))
    found = find_mosquitto() or missing("mosquitto", "mosquitto")
    log = tmp_path / "log"
    with log.open("wb") as said, subprocess.Popen([found, "-c", str(path)], stdout=said, stderr=said) as process:
        try:
            eventually(lambda: accepts("127.0.0.1", port), what="mosquitto listening")
        finally:
            end(process)
    assert b"Error" not in log.read_bytes()


def test_the_brokers_configuration_is_that_of_a_run_but_for_its_listener() -> None:
    kept = (DOCKER / "mosquitto.conf").read_text().splitlines()
    kept = [line for line in kept if line and line[0] != "#" and not line.startswith("listener")]
    live = mosquitto_configuration(1883).splitlines()
    assert set(kept) == {line for line in live if line.split()[0] not in {"listener", "user", "log_timestamp_format"}}


def postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    there = shutil.which("initdb")
    if found:
        return found[-1].parent
    return Path(there).parent if there else missing("PostgreSQL", "postgresql")


def not_root() -> dict[str, Any]:
    """PostgreSQL runs as anybody but root."""
    return {} if os.getuid() else {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}


@contextmanager
def folder_of_postgres() -> Iterator[Path]:
    """A data folder that who is not root may reach as well."""
    with tempfile.TemporaryDirectory(prefix="citybrain-postgres-") as made:
        folder = Path(made)
        if not os.getuid():
            shutil.chown(folder, "nobody")
        yield folder


def answered(port: int) -> tuple[list[Any], int] | None:
    """Return what PostgreSQL finds wrong in its files, and how many switches of durability are on; None: not yet."""
    try:
        with psycopg.connect(host="127.0.0.1", port=port, user="citybrain", dbname="postgres") as connection:
            wrong = connection.execute("SELECT name, error FROM pg_file_settings WHERE error IS NOT NULL").fetchall()
            names = ["fsync", "synchronous_commit", "full_page_writes"]
            on = connection.execute("SELECT 1 FROM pg_settings WHERE setting = 'on' AND name = ANY(%s)", (names,))
            return wrong, len(on.fetchall())
    except psycopg.OperationalError:
        return None


def test_postgresql_starts_with_ours() -> None:
    programs, port = postgres_programs(), unused_port()
    with folder_of_postgres() as folder:
        text = (DOCKER / "postgresql.conf").read_text()
        changed = {"listen_addresses = '*'": "listen_addresses = '127.0.0.1'", "port = 5432": f"port = {port}"}
        for old, new in (changed | {"shared_buffers = 512MB": "shared_buffers = 16MB"}).items():
            assert old in text
            text = text.replace(old, new)
        (folder / "ours.conf").write_text(text)
        (folder / "ours.conf").chmod(0o644)
        data = folder / "data"
        make = [str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "citybrain", "-N", "--locale=C"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **not_root())
        argv = [str(programs / "postgres"), "-D", str(data), "-c", f"config_file={folder / 'ours.conf'}"]
        asked = [*argv, "-C", "synchronous_commit"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=folder, **not_root())
        assert (told.returncode, told.stdout.strip(), told.stderr) == (0, "on", "")
        argv += ["-c", "unix_socket_directories="]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL, cwd=folder, **not_root()) as process:
            try:
                eventually(lambda: answered(port) is not None, 20, "PostgreSQL answering")
                assert answered(port) == ([], 3)
            finally:
                process.send_signal(2)  # a fast shutdown
                process.wait(10)


def test_kafka_starts_with_ours(tmp_path: Path) -> None:
    port, controller = unused_port(), unused_port()
    broker = kafka_cluster.Broker(tmp_path / "kafka", 1, port, controller, kafka_cluster.artifacts())
    broker.folder.mkdir()
    text = (DOCKER / "kafka.properties").read_text()
    changed = {"kafka:9093": f"127.0.0.1:{controller}", "kafka:9092": f"127.0.0.1:{port}"}
    changed |= {"//:9092": f"//127.0.0.1:{port}", "//:9093": f"//127.0.0.1:{controller}"}
    changed |= {"/var/lib/kafka/data": str(broker.folder / "log")}
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    broker.properties.write_text(text)
    broker.format(SERVICES["kafka"]["environment"]["CLUSTER_ID"])
    broker.start()
    address = f"127.0.0.1:{port}"
    try:
        eventually(lambda: kafka_cluster.serving(address) == 1, 60, "Kafka serving")
        client, resource = AdminClient({"bootstrap.servers": address}), ConfigResource(ConfigResource.Type.BROKER, "1")
        used = {name: entry.value for name, entry in client.describe_configs([resource])[resource].result(10).items()}
    finally:
        broker.end()
    written = dict(line.split("=", 1) for line in text.splitlines() if line and line[0] != "#")
    assert {name: used.get(name) for name in written} == written


@pytest.mark.parametrize(("verb", "file"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_prometheus_takes_ours(verb: str, file: str) -> None:
    argv = [program("promtool", "prometheus"), "check", verb, str(DOCKER / file)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_alerts_are_raised_when_they_should_be(tmp_path: Path) -> None:
    cases = {
        "rule_files": [str(DOCKER / "alerts.yml")],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": 'citybrain_health{job="citybrain"}', "values": "0x4 2x20 0x20 1x60"},
                    {"series": 'up{job="citybrain"}', "values": "1x200"},
                    {"series": "citybrain_influx_lag_s", "values": "0x40 1000x60"},
                ],
                "alert_rule_test": [
                    {
                        "eval_time": at,
                        "alertname": name,
                        "exp_alerts": [{"exp_labels": {"severity": severity}}] if on else [],
                    }
                    for at, name, severity, on in (
                        ("1m", "CitybrainDown", "page", False),
                        ("3m", "CitybrainDown", "page", True),
                        ("9m", "CitybrainDown", "page", False),
                        ("12m", "CitybrainDegraded", "ticket", False),
                        ("24m", "CitybrainDegraded", "ticket", True),
                        ("10m", "CitybrainProjectionBehind", "ticket", False),
                        ("20m", "CitybrainProjectionBehind", "ticket", True),
                        ("3m", "CitybrainUnseen", "page", False),
                    )
                ],
            },
            {
                "interval": "15s",
                "input_series": [{"series": "other", "values": "1x40"}],
                "alert_rule_test": [
                    {
                        "eval_time": "5m",
                        "alertname": "CitybrainUnseen",
                        "exp_alerts": [{"exp_labels": {"severity": "page", "job": "citybrain"}}],
                    }
                ],
            },
        ],
    }
    summaries = {
        rule["alert"]: rule["annotations"]
        for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"]
        for rule in group["rules"]
    }
    for test in cases["tests"]:
        for expected in test["alert_rule_test"]:  # type: ignore[index]
            for alert in expected["exp_alerts"]:
                alert["exp_annotations"] = summaries[expected["alertname"]]
    path = tmp_path / "alerts_test.yml"
    path.write_text(yaml.safe_dump(cases))
    argv = [program("promtool", "prometheus"), "test", "rules", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_projection_takes_ours() -> None:
    target = read_target(DOCKER / "influx.yaml")
    assert target.url == "http://victoria:8428"
    assert target.token is None
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/citybrain.yaml").read_text())
    written = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["remote_write"][0]["url"]
    assert source["datasources"][0]["url"] == target.url
    assert written.startswith(target.url)


# --- systemd ----------------------------------------------------------------------------------------------------

SERVICE_UNITS = sorted(UNITS.glob("*.service"))


def commands_of(unit: Path) -> list[str]:
    line = re.search(r"^ExecStart=/opt/citybrain/(?:venv/)?bin/citybrain (.*)$", unit.read_text(), re.MULTILINE)
    assert line, unit.name
    return shlex.split(line[1].replace("%I", "0,1").replace("$CITYBRAIN_LOG", "--log kafka --kafka kafka-1:9092"))


@pytest.mark.parametrize("unit", SERVICE_UNITS, ids=lambda path: path.stem)
def test_units_run_commands_that_exist(unit: Path) -> None:
    words = commands_of(unit)
    assert unit.name.startswith(f"citybrain-{words[0]}")
    assert parsed(words).data == Path("/var/lib/citybrain")


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """Where they say our program stands there is one, so that nothing but a fault of the unit is left to be said."""
    analyze = program("systemd-analyze", "systemd")
    paths = []
    for unit in (*SERVICE_UNITS, UNITS / "citybrain.target"):
        copy = tmp_path / unit.name
        copy.write_text(re.sub(r"/opt/citybrain/(venv/)?bin/citybrain", sys.executable, unit.read_text()))
        paths.append(str(copy))
    done = subprocess.run([analyze, "verify", "--man=no", *paths], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, ours(done.stderr)) == (0, "", [])


def ours(said: str) -> list[str]:
    return [line for line in said.splitlines() if "citybrain" in line]


@pytest.mark.parametrize("unit", SERVICE_UNITS, ids=lambda path: path.stem)
def test_units_expose_little(unit: Path) -> None:
    argv = [
        program("systemd-analyze", "systemd"),
        "security",
        "--offline=yes",
        "--threshold=20",
        "--no-pager",
        str(unit),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_every_server_process_has_its_unit() -> None:
    names = {unit.stem.removeprefix("citybrain-").rstrip("@") for unit in SERVICE_UNITS}
    box = {"gateway", "gateway-renew"}
    assert names - box == {"ingest", "worker", "desk", "api", "history", "influx", "cloud", "migrate"}
