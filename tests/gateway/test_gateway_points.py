"""`gateway points` and `status`: what a technician sees over SSH; and that a card does not wear by it."""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge.latest
import gateway.journal
import gateway.points
import gateway.status
from citybrain.cli import main
from citybrain.counters import Counters
from gateway.journal import LIVE, JournalCounters, last_heartbeat
from simulators.lines.modbus import RtuBus, hydrant
from tests.conftest import eventually
from tests.gateway_box import Process, config_text

DRIVERS = """drivers:
  bus-0:
    driver: modbus_rtu
    port: {port}
    baud: 115200
    interval: 200ms
    timeout: 50ms
    report: {{heartbeat: 5min}}
    devices:
      - {{device: hyd-000123, unit_id: 1, map: hydrant}}
      - {{device: hyd-000124, unit_id: 2, map: hydrant}}
      - {{device: hyd-000125, unit_id: 3, map: hydrant}}
"""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[RtuBus]:
    made = RtuBus(tmp_path / "bus-0", [hydrant(1), hydrant(2)])
    made.start()
    yield made
    made.stop()


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """What systemd gives as `RuntimeDirectory=`."""
    made = tmp_path / "live"
    made.mkdir()
    return made


@pytest.fixture
def box(tmp_path: Path, mosquitto: int, bus: RtuBus, live: Path) -> Iterator[Process]:
    folder = tmp_path / "box"
    folder.mkdir()
    (folder / "gateway.yaml").write_text(config_text(mosquitto, DRIVERS.format(port=bus.wire.port)))
    process = Process(folder, RUNTIME_DIRECTORY=str(live), LC_ALL="C.UTF-8")
    yield process
    process.stop()


def points(box: Process, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = main(["gateway", "points", *words, "--data", str(box.folder)])
    return code, capsys.readouterr().out.splitlines()


def of(lines: list[str], device: str, metric: str) -> list[str]:
    return next((line.split() for line in lines if line.split()[:2] == [device, metric]), [])


def test_each_point_is_a_line_and_a_silent_device_says_since_when(
    box: Process, bus: RtuBus, capsys: pytest.CaptureFixture[str]
) -> None:
    eventually(lambda: "good" in of(points(box, capsys)[1], "hyd-000123", "pressure_mpa"), 20, "a value")
    code, lines = points(box, capsys)
    assert code == 0
    assert all(len(line) <= 80 for line in lines)
    assert of(lines, "hyd-000124", "temperature_c")[2:4] == ["12", "°C"]
    bus.slaves[1].registers[0] = 333  # report by exception tells it at once, the table whatever was told
    eventually(lambda: of(points(box, capsys)[1], "hyd-000123", "pressure_mpa")[2] == "0.333", 5, "the new value")
    eventually(lambda: of(points(box, capsys)[1], "hyd-000125", "-")[-2:] == ["no", "answer"], 5, "the dead device")
    bus.slaves[2].fault = "dead"
    eventually(lambda: "no answer" in points(box, capsys, "hyd-000124")[1][0], 5, "the silent device")
    aged = of(points(box, capsys, "hyd-000124")[1], "hyd-000124", "pressure_mpa")
    eventually(lambda: of(points(box, capsys)[1], "hyd-000124", "pressure_mpa")[4] > aged[4], 5, "it grows older")
    main(["gateway", "status", "--data", str(box.folder)])
    said = capsys.readouterr().out
    assert "✗ device hyd-000124: no answer: unit 2: nothing within 50 ms (last value" in said
    assert "✗ device hyd-000125: no answer: unit 3: nothing within 50 ms\n" in said, "it never had a value"


def test_one_device_json_and_one_that_is_not_there(box: Process, capsys: pytest.CaptureFixture[str]) -> None:
    eventually(lambda: of(points(box, capsys)[1], "hyd-000123", "pressure_mpa"), 20, "a value")
    code, (line,) = points(box, capsys, "hyd-000123", "--json")
    told = json.loads(line)
    assert (code, set(told["devices"])) == (0, {"hyd-000123"})
    assert {one["metric"] for one in told["points"]} >= {"pressure_mpa", "battery_v"}
    assert all(0 <= one["age_s"] < 60 for one in told["points"])
    assert main(["gateway", "points", "hyd-9", "--data", str(box.folder)]) == 1
    assert "hyd-9" in capsys.readouterr().err


def test_a_box_that_does_not_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "points", "--data", str(tmp_path / "none")]) == 4
    assert "does not run" in capsys.readouterr().err


def test_what_changes_every_second_is_written_in_memory_only(box: Process, live: Path) -> None:
    path = live / "gateway.heartbeat.json"
    eventually(path.exists, 20, "a heartbeat")
    first = path.read_bytes()
    eventually(lambda: path.read_bytes() != first, 5, "the next one")
    run = box.folder / "run"
    assert {one.name for one in run.iterdir()} == {"clock", "clock.boot", "gateway.lock", LIVE}
    beat = last_heartbeat(run)
    assert beat is not None
    assert beat.pid == box.process.pid
    box.stop()
    assert (run / "gateway.heartbeat.json").exists(), "the counters are kept at the end"


def test_counters_go_on_after_the_memory_was_lost(tmp_path: Path, live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(live))
    run = tmp_path / "run"
    before = JournalCounters("gateway", run)
    before.add("lost_total", 3, reason="evicted")
    before.publish(force=True)
    for path in live.iterdir():
        path.unlink()  # the power was away
    after = JournalCounters("gateway", run)
    after.resume()
    assert after.values == Counters("gateway").values + before.values
    (run / "gateway.heartbeat.json").write_text("half a he")
    assert JournalCounters("gateway", run).resume() is None, "a damaged one counts nothing and ends nothing"


def test_what_came_from_outside_makes_no_second_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = JournalCounters("gateway", tmp_path)
    journal.warn("kit: no_json_line: \x1b[2J\x0b\x85阀\n<3>forged")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"warning kit: no_json_line: \x1b[2J\x0b\x85阀\x0a<3>forged")
    assert len(journal.warnings) == 1


@pytest.mark.parametrize(
    "module", [edge.latest, gateway.journal, gateway.points, gateway.status], ids=lambda one: str(one.__name__)
)
def test_examples(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0
