"""`citybrain replay`: mapping files, bad rows and cells, and recorded files through the whole real path."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import simulators.mapping
from citybrain import cli
from citybrain.errors import ConfigError
from citybrain.units import CONVERSIONS, METRICS
from simulators.mapping import CsvReader, Source, load_mapping, parse_time, registry_of, sources_of

MAPPINGS = Path(simulators.mapping.__file__).parent / "mappings"

MAPPING = """\
delimiter: ";"
time: {column: when}
step: 1s
rules: rules.yaml
label: {column: broken}
devices:
  - id: "pump-{file}"
    kind: pump
    series:
      - {column: p, metric: pressure_mpa, unit: bar}
      - {column: q, metric: flow_lps, unit: L/min}
  - id: "motor-{file}"
    kind: motor
    series:
      - {column: a, metric: current_a}
"""

RULES = """\
rules:
  - id: pump_dry
    title: {zh: 空转, en: Dry}
    select: {kind: pump}
    when: {kind: threshold, metric: flow_lps, below: 0.5, deadband: 0.1, on_delay: 5s}
    urgency: normal
    correlate: {by: device, cause: pump, within: 5min}
    confirm: {policy: at_once}
    case: {kind: case, category: hydrant_damaged}
    source: test
    owner: test
"""


def write(folder: Path, mapping: str = MAPPING, rules: str = RULES) -> Path:
    (folder / "rules.yaml").write_text(rules)
    path = folder / "mapping.yaml"
    path.write_text(mapping)
    return path


def recording(folder: Path, name: str, rows: list[str]) -> Path:
    path = folder / name
    path.write_text("\n".join(["when;p;q;a;broken", *rows, ""]))
    return path


def seconds(first: int, last: int, *, dry: bool) -> list[str]:
    return [
        f"2026-03-01T10:{s // 60:02d}:{s % 60:02d};3.0;{6 if dry else 60};1.5;{int(dry)}" for s in range(first, last)
    ]


def reader(folder: Path, rows: list[str]) -> CsvReader:
    path = recording(folder, "one.csv", rows)
    return CsvReader(load_mapping(write(folder)), Source(path, "one"))


# --- mapping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric: flow_lps", "metric: flow", "mapping.yaml:11 devices[0].series[1].metric: unknown metric 'flow'"),
        ("unit: L/min", "unit: bar", "mapping.yaml:11 devices[0].series[1].unit: flow_lps is in L/s; expected one of"),
        ("metric: flow_lps, unit: L/min", "metric: pressure_mpa", "'pressure_mpa' is given twice for 'pump-{file}'"),
        ('delimiter: ";"', 'delimiter: "tab"', "mapping.yaml:1 delimiter: expected one character"),
        ("step: 1s", "step: 0s", "mapping.yaml:3 step: expected more than 0"),
        ("step: 1s", "speed: -1", "mapping.yaml:3 speed: expected 0 or more"),
        ("step: 1s", "pace: 1", "mapping.yaml:3 pace: unknown field 'pace'"),
        ("rules: rules.yaml", "rules: none.yaml", "none.yaml: cannot be read"),
    ],
)
def test_a_wrong_mapping_names_file_line_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    path = write(tmp_path, MAPPING.replace(old, new))
    data = recording(tmp_path, "one.csv", seconds(0, 2, dry=False))
    assert cli.main(["replay", str(path), str(data), "--data", str(tmp_path / "data")]) == 3
    assert message in capsys.readouterr().err


def test_a_file_without_the_columns_is_refused_before_anything_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("when;p;x\n")
    with pytest.raises(ConfigError, match=r"other\.csv:1: no column a, q; there are when, p, x"):
        CsvReader(load_mapping(write(tmp_path)), Source(path, "other")).check()


def test_files_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / "valve1" / "0.csv", tmp_path / "valve2" / "0.csv", tmp_path / "other" / "a b.csv"]
    assert [source.name for source in sources_of(paths)] == ["valve1-0", "valve2-0", "other-a-b"]
    with pytest.raises(ConfigError, match="given twice"):
        sources_of([paths[0], paths[0]])


def test_every_file_is_a_gateway_with_its_devices(tmp_path: Path) -> None:
    registry = registry_of(load_mapping(write(tmp_path)), sources_of([tmp_path / "a.csv", tmp_path / "b.csv"]), {"u"})
    assert [device.id for device in registry.devices] == ["pump-a", "motor-a", "pump-b", "motor-b"]
    assert {device.gateway for device in registry.devices} == {"replay-a", "replay-b"}
    assert [unit.code for unit in registry.units] == ["u", "street-001"]


# --- cells and rows ---------------------------------------------------------------------------------------------


def test_units_become_canonical(tmp_path: Path) -> None:
    (row,) = reader(tmp_path, ["2026-03-01T10:00:00Z;3.0;90;1.5;1"]).rows()
    assert row.at_ms == 1772359200000
    assert row.faulty is True
    assert {reading.device: reading.values for reading in row.readings} == {
        "pump-one": {"pressure_mpa": pytest.approx(0.3), "flow_lps": pytest.approx(1.5)},
        "motor-one": {"current_a": 1.5},
    }


def test_what_cannot_be_used_is_counted_and_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = reader(
        tmp_path,
        [
            "2026-03-01T10:00:00;;60;1.5;0",
            "2026-03-01T10:00:01;off;60;1.5;0",
            "2026-03-01T10:00:02;3.0;nan;inf;0",
            "yesterday;3.0;60;1.5;0",
            "2026-03-01T10:00:04;3.0;60",
            "",
            "2026-03-01T10:00:05;3.0;60;1.5;maybe",
        ],
    )
    rows = list(bad.rows())
    table = bad.table
    assert dict(table.skipped) == {"empty": 1, "not_a_number": 1, "not_finite": 2, "time": 3, "columns": 3}
    assert table.rows == 6
    assert table.cells == 18
    assert sum(len(r.values) for row in rows for r in row.readings) + sum(table.skipped.values()) == table.cells
    assert rows[-1].faulty is None
    path = tmp_path / "one.csv"
    assert table.warnings == [
        f"{path}:2 p: empty: ''",
        f"{path}:3 p: not a number: 'off'",
        f"{path}:4 q: not finite: 'nan'",
        f"{path}:4 a: not finite: 'inf'",
        f"{path}:5: Invalid isoformat string: 'yesterday'",
        f"{path}:6: 3 cells, the header has 5",
    ]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=30), max_size=20))
def test_no_file_crashes_it_and_its_counts_add_up(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    any_reader = reader(tmp_path_factory.mktemp("any"), lines)
    values = sum(len(reading.values) for row in any_reader.rows() for reading in row.readings)
    assert values + sum(any_reader.table.skipped.values()) == any_reader.table.cells


@pytest.mark.parametrize(
    ("text", "format_"),
    [
        ("2020-03-01 15:44:06", "iso"),
        ("2020-03-01T23:44:06+08:00", "iso"),
        ("01.03.2020 15:44", "%d.%m.%Y %H:%M"),
        ("1583077446", "unix_s"),
        ("1583077446000", "unix_ms"),
    ],
)
def test_times_in_many_formats(text: str, format_: str) -> None:
    assert abs(parse_time(text, format_) - 1583077446000) <= 6000


def test_every_conversion_leads_to_a_unit_of_ours() -> None:
    assert {unit for unit, _, _ in CONVERSIONS.values()} <= {m.unit for m in METRICS.values()}
    fahrenheit = CONVERSIONS["°F"]
    assert 212 * fahrenheit[1] + fahrenheit[2] == pytest.approx(100)
    assert not doctest.testmod(simulators.mapping).failed


# --- the whole way ----------------------------------------------------------------------------------------------


def replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path, *files: Path) -> dict[str, object]:
    argv = ["replay", str(write(tmp_path)), *map(str, files), "--data", str(tmp_path / "data"), "--json", "--per-file"]
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result, dict)
    return result


def test_a_recorded_fault_becomes_one_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    well = recording(tmp_path, "well.csv", seconds(0, 120, dry=False))
    rows = seconds(0, 60, dry=False) + seconds(60, 90, dry=True) + seconds(90, 120, dry=False)
    rows[10] = rows[10].replace("3.0", "broken")
    rows[20] = rows[20].replace("3.0", "900")  # 90 MPa comes from no working sensor
    ill = recording(tmp_path, "ill.csv", rows)
    result = replayed(capsys, tmp_path, well, ill)
    per_file = {line["file"]: line for line in result["per_file"]}  # type: ignore[attr-defined]
    assert result["readings"] == 480
    assert result["values"] == 719
    assert result["cells"] == 720
    assert result["skipped"] == {"not_a_number": 1}
    assert (result["stored"], result["dropped"]) == (718, {"out_of_range": 1})
    assert (result["waiting"], result["alarms"], result["incidents"], result["cases"]) == (0, 1, 1, 1)
    assert per_file["well"] == {**per_file["well"], "faults": 0, "alarms": 0, "cases": 0, "delay_s": None}
    assert per_file["ill"] == {**per_file["ill"], "faults": 1, "found": 1, "alarms": 1, "cases": 1, "delay_s": 5.0}


def test_replayed_again_it_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ill = recording(tmp_path, "ill.csv", seconds(0, 30, dry=True))
    assert replayed(capsys, tmp_path, ill) == replayed(capsys, tmp_path, ill)


def test_a_long_step_sets_no_time_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is sent arrives after it was observed, so ingest has no future to clamp and a delay is what it was."""
    write(tmp_path, MAPPING.replace("step: 1s", "step: 30s"))
    rows = seconds(0, 61, dry=False) + seconds(61, 120, dry=True)
    argv = ["replay", str(tmp_path / "mapping.yaml"), str(recording(tmp_path, "ill.csv", rows)), "--per-file", "--json"]
    assert cli.main([*argv, "--data", str(tmp_path / "data")]) == 0
    told = capsys.readouterr()
    assert "future" not in told.err
    assert json.loads(told.out)["per_file"][0]["delay_s"] == 5.0


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(write(tmp_path)), str(tmp_path / "no.csv"), "--data", str(tmp_path / "data")]) == 2
    assert "no.csv: no such CSV file" in capsys.readouterr().err


def test_the_examples_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skab = tmp_path / "1.csv"
    skab.write_text(
        "datetime;Accelerometer1RMS;Accelerometer2RMS;Current;Pressure;Temperature;Thermocouple;Voltage;"
        "Volume Flow RateRMS;anomaly;changepoint\n"
        + "".join(f"2020-03-01 15:44:{s:02d};0.7;0.13;1.2;0.05;92.2;22.2;209.6;76.0;1.0;0.0\n" for s in range(40))
    )
    argv = ["replay", str(MAPPINGS / "skab.yaml"), str(skab), "--data", str(tmp_path / "data"), "--json", "--per-file"]
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["per_file"][0]["faults"] == result["per_file"][0]["cases"] == 1
    nab = tmp_path / "art.csv"
    nab.write_text("timestamp,value\n2014-04-01 00:00:00,20.0\n2014-04-01 00:05:00,-1.5\n")
    assert cli.main(["replay", str(MAPPINGS / "nab.yaml"), str(nab), "--data", str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alarms"] == 1
