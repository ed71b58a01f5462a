"""`citybrain gateway run`: the process, its configuration, its own readings, its clock, and what systemd is told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

import gateway.doctor
import gateway.ports
from citybrain.cli import main
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.i18n import catalogue
from citybrain.model import Lane
from citybrain.storage import OS_FILES
from citybrain.wire import About
from gateway.config import read_config
from gateway.times import BoxClock
from tests.certificates import Authority
from tests.conftest import end, eventually, unused_port
from tests.gateway.test_gateway_service import Answering
from tests.gateway_box import GATEWAY, Process, config_text

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "citybrain-gateway.service"


@pytest.fixture
def platform(mosquitto: int) -> Iterator[Answering]:
    answering = Answering(mosquitto)
    yield answering
    answering.close()


@pytest.fixture
def folder(tmp_path: Path, mosquitto: int) -> Path:
    made = tmp_path / "box"
    made.mkdir()
    (made / "gateway.yaml").write_text(config_text(mosquitto))
    return made


def notifications(address: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(address))
    sock.settimeout(10)
    return sock


def test_it_says_ready_tells_its_vitals_lives_and_ends_cleanly(
    tmp_path: Path, folder: Path, platform: Answering
) -> None:
    with notifications(tmp_path / "notify") as systemd:
        box = Process(folder, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="600000")
        try:
            told = [systemd.recv(1000).decode()]
            while "WATCHDOG=1" not in told or not any("online" in text and "offline" not in text for text in told):
                told.append(systemd.recv(1000).decode())
            assert "READY=1" in told[:2]
            eventually(lambda: platform.logged(GATEWAY, Lane.TELEMETRY), what="its own readings")
        finally:
            code = box.stop()
        assert code == 0
        while "STOPPING=1" not in told:
            told.append(systemd.recv(1000).decode())
    statuses = [status for name, status in platform.statuses if name == GATEWAY]
    assert [status.online for status in statuses] == [True, False]
    config = hashlib.sha256((folder / "gateway.yaml").read_bytes()).hexdigest()
    assert [status.about for status in statuses] == 2 * [About(version("citybrain-senses"), config)]


# --- the process --------------------------------------------------------------------------------------------------


def lines_driver(port: int) -> str:
    return f"drivers:\n  meters: {{driver: json_lines, connect: '127.0.0.1:{port}', devices: {{h1: hyd-1}}}}\n"


def test_what_the_drivers_gave_before_a_stop_is_there_after_it(
    tmp_path: Path, mosquitto: int, platform: Answering
) -> None:
    """SIGTERM: the last readings are durable though their sync was not due; the next process sends them."""
    folder = tmp_path / "box"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        text = config_text(unused_port(), lines_driver(server.getsockname()[1]))
        (folder / "gateway.yaml").write_text(text.replace("commit_every: 200ms", "commit_every: 1min"))
        box = Process(folder)
        try:
            line, _ = server.accept()
            with line:
                line.sendall(b"".join(b'{"d":"h1","m":{"pressure_mpa":0.%d}}\n' % (300 + n) for n in range(50)))
                eventually(lambda: box.beat() is not None, 20)
                line.shutdown(socket.SHUT_WR)
                line.recv(1)  # it has read everything, and closes
        finally:
            assert box.stop() == 0
        (folder / "gateway.yaml").write_text(config_text(mosquitto))
        box = Process(folder)
        try:
            box.wait_online()
            eventually(lambda: box.beat().gauges["spooled"] == 0)  # type: ignore[union-attr]
        finally:
            box.stop()
    values = [
        reading for reading in platform.readings if reading.device == "hyd-1" and "pressure_mpa" in reading.values
    ]
    assert [round(one.values["pressure_mpa"] * 1000) for one in values] == list(range(300, 350))


def test_two_processes_never_share_a_folder(folder: Path, platform: Answering) -> None:
    first = Process(folder)
    try:
        first.wait_online()
        second = Process(folder)
        assert second.process.wait(20) == 4
        assert "another `citybrain gateway run` works in this folder" in second.said()
    finally:
        first.stop()


def lines_of(*places: str, device: str = "") -> str:
    """Return a configuration with drivers `m`, `n` for lines that come from these places."""
    names = [
        f"  {name}: {{driver: json_lines, {place}, devices: {{a: '{device or name}'}}}}"
        for name, place in zip("mn", places, strict=False)
    ]
    return config_text(1883, "\n".join(["drivers:", *names, ""]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "gateway.yaml: there is none: `citybrain gateway enrol` writes it"),
        ("gateway: gw-1\nshard: 1\nbroker: {host: 127.0.0.1}\ndriver: {}\n", "gateway.yaml:4 driver: unknown field"),
        (
            config_text(1883, "drivers:\n  bus: {driver: modbus_rtv}\n"),
            "gateway.yaml:8 drivers.bus.driver: no driver 'modbus_rtv'; did you mean 'modbus_rtu'?",
        ),
        (
            config_text(1883, "drivers:\n  m: {driver: json_lines, listen: 7000, devices: {a: b}, metric: {}}\n"),
            "gateway.yaml:8 drivers.m.metric: unknown field 'metric'; did you mean 'metrics'?",
        ),
        (
            config_text(
                1883,
                "drivers:\n  m: {driver: json_lines, listen: 7000, devices: {a: hyd-1}}\n"
                "  n: {driver: json_lines, listen: 7001, devices: {a: hyd-1}}\n",
            ),
            "gateway.yaml:9 drivers.n: device 'hyd-1' belongs to 'm' already",
        ),
        (config_text(0), "gateway.yaml:5 broker.port: expected 1 to 65535, got 0"),
        (config_text(1883, host="mqtt.example.city"), "'mqtt.example.city' is not this machine: `tls` must be given"),
        (config_text(1883, gateway="a/b"), "gateway.yaml:1 gateway: 'a/b'"),
        (
            config_text(
                1883, "drivers:\n  m: {driver: json_lines, listen: 1, devices: {a: b}, limits: [{metric: x}]}\n"
            ),
            "gateway.yaml:8 drivers.m.limits",
        ),
        (lines_of("listen: 7000", "listen: 7000"), "yaml:9 drivers.n.listen: 7000 belongs to driver 'm' already"),
        (
            lines_of("port: /dev/ttyUSB7", "port: /dev/../dev/ttyUSB7"),
            "yaml:9 drivers.n.port: /dev/ttyUSB7 belongs to driver 'm' already",
        ),
        (lines_of("port: ttyUSB0"), "yaml:8 drivers.m.port: 'ttyUSB0': want its path, such as /dev/serial/by-id/"),
        (lines_of("listen: 7000", device=GATEWAY), "device 'gw-0007' belongs to the gateway itself already"),
        (lines_of("listen: 7000", device=" "), "drivers.m: device ' ': want a name of 1 to 128 visible characters"),
        (lines_of("listen: 7000, baud: -1"), "drivers.m: baud: expected 300 to 4000000, got -1"),
        (lines_of("listen: 7000, silence: 0s"), "drivers.m: silence: expected 100ms to 1d"),
        (lines_of("connect: 'host:99999'"), "drivers.m: connect: expected host:port, got 'host:99999'"),
        (lines_of("listen: 1, metrics: {p: {metric: flow_lps, scale: .nan}}"), "drivers.m.metrics.p: scale, offset"),
        (lines_of("lisen: 7000"), "yaml:8 drivers.m.lisen: unknown field 'lisen'; did you mean 'listen'?"),
        (config_text(1883, "drivers:\n"), "yaml:7 drivers: Expected `object`, got `null`: nothing is written there"),
        (
            config_text(1883, "drivers:\n\tm: {}\n"),
            "yaml:8: not YAML: found character '\\t' that cannot start any token; ",
        ),
        (
            config_text(1883, "drivers: {1: {driver: camera}}\n"),
            "drivers: Expected `str`, got `int` as a key: put it in",
        ),
        (config_text(1883).replace("200ms", "200ms, age: 1s"), "yaml:6 spool.age: expected 1h or more"),
        (config_text(1883, host="' '"), "yaml:4 broker.host: expected the broker's name or address, got nothing"),
        (config_text(1883) + "# \0\n", "yaml:8: not YAML: the character U+0000 may not stand in it"),
        ("a: &a [*a]\n" + config_text(1883), "yaml:1 a: unknown field 'a'"),
        ("a: " + 3000 * "[", "yaml:1: nested too deeply"),
    ],
)
def test_a_wrong_configuration_ends_with_code_3_and_says_where(tmp_path: Path, text: str | None, says: str) -> None:
    folder = tmp_path / "box"
    folder.mkdir()
    if text is not None:
        (folder / "gateway.yaml").write_text(text)
    with pytest.raises(ConfigError) as wrong:
        read_config(folder / "gateway.yaml")
    assert wrong.value.exit_code == 3
    assert says in str(wrong.value)
    assert main(["gateway", "doctor", "--data", str(folder)]) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (config_text(1883).encode("utf-16"), "gateway.yaml:1: not UTF-8 (byte FF): save it as UTF-8"),
        (config_text(1883, "# 阀门\n").encode("gbk"), "gateway.yaml:7: not UTF-8 (byte B7): save it as UTF-8"),
    ],
)
def test_a_file_of_another_encoding_is_refused_with_its_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "gateway.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_config(tmp_path / "gateway.yaml")


def test_what_an_editor_elsewhere_adds_does_no_harm(tmp_path: Path) -> None:
    text = config_text(1883, lines_of("listen: 7000").partition("drivers:")[2].join(["drivers:", ""]))
    (tmp_path / "gateway.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_config(tmp_path / "gateway.yaml").drivers[0].name == "m"


def test_the_process_itself_ends_with_code_3(tmp_path: Path) -> None:
    box = Process(tmp_path / "mistyped")
    assert box.process.wait(20) == 3
    assert "there is none" in box.said()
    assert not (tmp_path / "mistyped").exists()


def test_a_disk_that_fails_ends_the_process_with_code_5(folder: Path) -> None:
    (folder / "spool").write_text("a file where the spool should be")
    box = Process(folder)
    assert box.process.wait(20) == 5
    assert str(folder / "spool") in box.said()


# --- its clock ----------------------------------------------------------------------------------------------------

T0 = 1_790_000_000_000


class Times:
    """A system clock that can be set, and a monotonic one that only runs."""

    def __init__(self, wall_ms: int = T0) -> None:
        self.wall_ms, self.mono_s = wall_ms, 1000.0

    def run(self, clock: BoxClock, seconds: float) -> list[int]:
        """Let time pass, following once a second; return what the clock says five times a second."""
        told = []
        for step in range(round(seconds * 5)):
            self.mono_s += 0.2
            self.wall_ms += 200
            if step % 5 == 0:
                clock.follow()
            told.append(clock.now_ms())
        return told

    def clock(self, folder: Path) -> BoxClock:
        return BoxClock(folder / "clock", Counters("gateway"), OS_FILES, lambda: self.wall_ms, lambda: self.mono_s)


def rising(times: list[int]) -> bool:
    return all(before < after for before, after in pairwise(times))


@pytest.mark.parametrize(("step_s", "way"), [(3600, "forward"), (0.4, "forward"), (-30, "slewed"), (-7200, "back")])
def test_a_step_of_the_clock_is_followed_and_said(tmp_path: Path, step_s: float, way: str) -> None:
    times = Times()
    clock = times.clock(tmp_path)
    before = times.run(clock, 5)
    times.wall_ms += round(step_s * 1000)
    after = times.run(clock, 90)
    clock.follow()
    assert rising(before)
    assert rising(before + after) == (way != "back"), "only where it must it goes back"
    assert rising(after[5:]), "once it has stepped it runs on"
    assert abs(clock.now_ms() - times.wall_ms) <= 250
    assert clock.offset_s == pytest.approx((clock.now_ms() - times.wall_ms) / 1000, abs=0.001)
    assert dict(clock._counters.values) == {f"clock_steps_total{{way={way}}}": 1}
    assert len(clock._counters.warnings) == 1
    assert way in clock._counters.warnings[0]


def test_the_offset_is_reported_while_it_is_made_up(tmp_path: Path) -> None:
    times = Times()
    clock = times.clock(tmp_path)
    times.run(clock, 2)
    times.wall_ms -= 30_000
    times.run(clock, 2)
    assert 28 < clock.offset_s <= 30


def test_small_differences_are_left_to_ntp(tmp_path: Path) -> None:
    times = Times()
    clock = times.clock(tmp_path)
    times.run(clock, 2)
    times.wall_ms += 100
    assert rising(times.run(clock, 10))
    assert not clock._counters.warnings


def test_a_clock_at_1970_goes_on_from_what_was_told_last_until_it_is_set(tmp_path: Path) -> None:
    first = Times()
    last = first.run(first.clock(tmp_path), 130)[-1]
    times = Times(5_000)  # the power was gone; no battery, no NTP yet
    clock = times.clock(tmp_path)
    told = times.run(clock, 60)
    before = clock.unset
    assert last - 60_000 <= told[0], "the mark is at most a minute old"
    times.wall_ms = T0 + 3_600_000  # NTP
    told += times.run(clock, 10)
    assert (before, clock.unset) == (True, False)
    assert rising(told)
    assert abs(clock.now_ms() - times.wall_ms) <= 250
    assert clock._counters.values["clock_steps_total{way=set}"] == 1


def test_a_first_start_at_1970_counts_from_2024(tmp_path: Path) -> None:
    times = Times(5_000)
    assert times.clock(tmp_path).now_ms() == 1_704_067_200_000


@pytest.mark.parametrize("mark", [b"\xff" * 8, (T0 + 400 * 86_400_000).to_bytes(8, "little")])
def test_a_mark_that_lies_is_not_believed(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "clock").write_bytes(mark)
    clock = Times().clock(tmp_path)
    assert (clock.now_ms(), clock.unset) == (T0, False)


# --- status, doctor, systemd --------------------------------------------------------------------------------------


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["gateway", *words])
    return code, capsys.readouterr().out


def test_status_says_how_it_is_in_both_languages(
    folder: Path, platform: Answering, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(capsys, "status", "--data", str(folder)) == (
        4,
        f"the gateway process does not run (data folder {folder})\n",
    )
    box = Process(folder)
    try:
        box.wait_online()
        code, out = cli(capsys, "status", "--json", "--data", str(folder))
        told = json.loads(out)
        assert (code, told["online"], told["gateway"], told["wrong"]) == (0, True, GATEWAY, {})
        page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
        assert {key for key in told if f"`{key}`" not in page} == set()
        assert "online (127.0.0.1:" in cli(capsys, "status", "--data", str(folder))[1]
        monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
        assert "在线" in cli(capsys, "status", "--data", str(folder))[1]
    finally:
        box.stop()


def test_doctor_finds_nothing_wrong_with_a_well_box(
    folder: Path, mosquitto: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = cli(capsys, "doctor", "--json", "--data", str(folder))
    told = json.loads(out)
    assert (code, told["well"]) == (0, True), told
    assert {one["code"] for one in told["findings"]} >= {"disk_well", "config_well", "spool", "broker_well", "process"}
    assert all(one["zh"] and one["en"] for one in told["findings"])


def test_doctor_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = Authority(tmp_path / "pki")
    mine = authority.sign("gw-other", -20, -2)
    mine.with_suffix(".key").chmod(0o644)
    text = config_text(
        unused_port(),
        "drivers:\n  m: {driver: json_lines, port: /dev/ttyUSB77, devices: {a: hyd-1}}\n",
        tls=f"{{ca: {authority.ca}, certificate: {mine}, key: {mine.with_suffix('.key')}}}",
    )
    (tmp_path / "gateway.yaml").write_text(text)
    (tmp_path / "spool" / "event").mkdir(parents=True)
    (tmp_path / "spool" / "event" / "00000000000000000001.damaged").write_bytes(b"x")
    code, out = cli(capsys, "doctor", "--json", "--data", str(tmp_path))
    found = {one["code"]: one["level"] for one in json.loads(out)["findings"]}
    assert code == 1
    wrong = {code for code, level in found.items() if level == "wrong"}
    assert wrong == {"port_missing", "certificate_dates", "certificate_name", "broker"}
    assert found["key_open"] == found["spool_damaged"] == found["process"] == "mind"
    (tmp_path / "gateway.yaml").write_text(text.replace("127.0.0.1", "no-such-host.invalid"))
    assert '"dns"' in cli(capsys, "doctor", "--json", "--data", str(tmp_path))[1]


def test_every_finding_of_the_doctor_has_its_words() -> None:
    source = "".join(Path(str(one.__file__)).read_text(encoding="utf-8") for one in (gateway.doctor, gateway.ports))
    codes = set(re.findall(r'(?:good|mind|wrong|level|\))\("([a-z_]+)"', source))
    codes |= set(re.findall(r'return "(?:good|mind|wrong)", "([a-z_]+)"', source)) | {"driver", "device"}
    assert codes == {key.removeprefix("doctor.") for key in catalogue() if key.startswith("doctor.")}


def test_the_unit_is_what_systemd_understands(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is not installed")
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "citybrain-gateway.service"
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/citybrain/venv/bin/citybrain", sys.executable))
    ran = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in ran.stderr.splitlines() if unit.name in line]
    assert complaints == []
    assert "Type=notify" in text
    assert "ExecStart=/opt/citybrain/venv/bin/citybrain gateway run" in text


# --- the doctor and the ports -------------------------------------------------------------------------------------


@pytest.fixture
def by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter as `ttyUSB1`, and udev's names for it, in a folder of their own."""
    for kind in ("by-id", "by-path"):
        (tmp_path / "serial" / kind).mkdir(parents=True)
    (tmp_path / "ttyUSB1").touch()
    named = tmp_path / "serial" / "by-id" / "usb-FTDI_A50285BI-if00-port0"
    named.symlink_to(tmp_path / "ttyUSB1")
    monkeypatch.setattr(gateway.ports, "SERIAL", tmp_path / "serial")
    return named


def test_a_name_that_changes_is_told_the_one_that_stays(tmp_path: Path, by_id: Path) -> None:
    assert gateway.ports.look_at(tmp_path / "ttyUSB1", 0) == ("mind", "port_name", {"lasting": str(by_id)})
    assert gateway.ports.look_at(by_id, 0) == ("good", "port", {})
    assert gateway.ports.look_at(tmp_path / "ttyUSB0", 0) == ("wrong", "port_missing", {"there": str(by_id)})


def test_who_else_has_a_port_is_found(tmp_path: Path) -> None:
    port = tmp_path / "ttyS7"
    port.touch()
    with port.open() as held, subprocess.Popen(["sleep", "60"], stdin=held) as other:
        try:
            found = gateway.ports.look_at(port, os.getpid() + 1)
            assert found[:2] == ("wrong", "port_held")
            assert {found[2]["program"]} <= {"sleep", "pytest", "python", "python3"}
            assert gateway.ports.look_at(port, os.getpid()) == ("good", "port", {}), "the gateway itself, its processes"
        finally:
            end(other)
    assert gateway.ports.look_at(port, 0) == ("good", "port", {})


def test_the_systems_console_is_no_port_for_sensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "consoles").write_text("ttyAMA0              -W- (EC p a)  204:64\ntty0  -WU (E  p  )    4:7\n")
    monkeypatch.setattr(gateway.ports, "CONSOLES", tmp_path / "consoles")
    (tmp_path / "ttyAMA0").touch()
    (tmp_path / "serial0").symlink_to(tmp_path / "ttyAMA0")
    assert gateway.ports.look_at(tmp_path / "serial0", 0) == ("wrong", "port_console", {})


def test_a_folder_of_another_user_is_not_worked_in_as_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be more than its user")
    folder = tmp_path / "box"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for action in ("run", "renew", "commission"):
        assert main(["gateway", action, "--data", str(folder)]) == 2
        assert (
            f"{folder} is nobody's, who could not read what root writes there; use: sudo -u nobody"
            in capsys.readouterr().err
        )
    assert list(folder.iterdir()) == []
    main(["gateway", "doctor", "--json", "--data", str(folder)])
    assert '"as_root"' in capsys.readouterr().out
