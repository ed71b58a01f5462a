"""clouds.yaml and what it makes of operators' messages."""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.cli import main
from citybrain.errors import ConfigError, WireError
from citybrain.model import Lane
from gateway.clouds.config import Clouds, make_keys, read_clouds, read_keys
from gateway.clouds.mapping import MOST_PROBLEMS, Decoder, Taken
from tests.cloud_site import CONFIG, message

NOW = 1_767_225_600_000


def written(folder: Path, text: str) -> Path:
    path = folder / "clouds.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def clouds(tmp_path: Path) -> Clouds:
    return read_clouds(written(tmp_path, CONFIG))


@pytest.fixture
def ctwing(clouds: Clouds) -> Decoder:
    return Decoder(clouds.operators["ctwing"])


@pytest.fixture
def onenet(clouds: Clouds) -> Decoder:
    return Decoder(clouds.operators["onenet"])


def decoded(decoder: Decoder, content: Any) -> Taken:
    return decoder.decode(content if isinstance(content, bytes) else msgspec.json.encode(content))


# --- the file ---


@pytest.mark.parametrize(
    ("old", "new", "where", "what"),
    [
        ("    device: IMEI", "    devise: IMEI", ":5 operators.ctwing", "did you mean 'device'"),
        ("    device: IMEI\n", "", "operators.ctwing", "missing required field `device`"),
        (
            "pressure_mpa, factor: 0.001",
            "presure_mpa",
            ":12 operators.ctwing.fields.water_pressure.metric",
            "not one of",
        ),
        ("factor: 0.001", "factor: kPa", ":12 operators.ctwing.fields.water_pressure.factor", "`float`"),
        ("factor: 0.001", "factor: 0", ":12 operators.ctwing.fields.water_pressure.factor", "not 0"),
        ("lane: event", "lane: fast", ":14 operators.ctwing.fields.tilt.lane", "fast"),
        ('"3323_0_5700"', "3323_0_5700", ":25 operators.onenet.fields", "in quotes"),
        ("gateways: cloud-1", "gateways: cloud-", ":24 operators.onenet.gateways", "has one operator"),
        ("gateways: cloud-1", "gateways: gw-1", ":24 operators.onenet.gateways", "begin with 'cloud-'"),
        ("token: ctwing.token", "token: ../platform.key", ":3 operators.ctwing.token", "without a folder"),
        ("  ctwing:", "  CT Wing:", ":2 operators.CT Wing", "small letters"),
        ("    time: timestamp", "    time: ''", ":6 operators.ctwing.time", "a path"),
        ("    ignore: [crc]", "    pull: {url: 'ftp://x'}", ":9 operators.ctwing.pull.url", "http(s)"),
        (
            "    ignore: [crc]",
            "    pull: {url: 'http://x', every: 1s}",
            ":9 operators.ctwing.pull.every",
            "at least 10s",
        ),
        ("    ignore: [crc]", "    alive: 0s", ":9 operators.ctwing.alive", "more than 0s"),
        ("    ignore: [crc]", "    alive: 90", ":9 operators.ctwing.alive", "a duration"),
    ],
)
def test_what_is_wrong_in_the_file_is_told_by_its_line(
    tmp_path: Path, old: str, new: str, where: str, what: str
) -> None:
    assert old in CONFIG
    path = written(tmp_path, CONFIG.replace(old, new, 1))
    with pytest.raises(ConfigError) as raised:
        read_clouds(path)
    assert where in raised.value.where
    assert what in raised.value.what


@pytest.mark.parametrize(
    "text", ["", "operators: {}", "operators: [1]", "operators: {a: 5}", "operators: {7: {}}", "{"]
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"clouds\.yaml"):
        read_clouds(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_clouds(tmp_path / "none.yaml")


def test_a_file_is_checked_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, CONFIG)
    assert main(["cloud", "--check", str(path), "--json", "--data", str(tmp_path / "data")]) == 0
    said = msgspec.json.decode(capsys.readouterr().out)
    assert said["onenet"]["path"] == "/push/onenet"
    path.write_text(CONFIG.replace("pressure_mpa", "presure_mpa"))
    assert main(["cloud", "--check", str(path)]) == 3
    assert ":12 operators.ctwing.fields.water_pressure.metric" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_the_example_in_the_docs_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cloud.md").read_text(encoding="utf-8")
    example = page.partition("```yaml\n")[2].partition("```")[0]
    assert set(read_clouds(written(tmp_path, example)).operators) == {"ctwing", "onenet"}


def test_keys_are_made_once_and_never_shown(tmp_path: Path, clouds: Clouds) -> None:
    secrets = tmp_path / "secrets"
    assert make_keys(secrets, clouds) == ["ctwing.token", "ctwing.key", "onenet.token", "onenet.key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()} == {0o600}
    keys = read_keys(secrets, clouds.operators["ctwing"])
    assert make_keys(secrets, clouds) == []
    assert read_keys(secrets, clouds.operators["ctwing"]) == keys
    (secrets / "ctwing.token").write_text("short")
    with pytest.raises(ConfigError, match=r"ctwing\.token: .*at least 16") as raised:
        read_keys(secrets, clouds.operators["ctwing"])
    assert "short" not in str(raised.value)
    (secrets / "ctwing.key").unlink()
    with pytest.raises(ConfigError, match=r"ctwing\.key: no such file.*--new-keys"):
        read_keys(secrets, clouds.operators["ctwing"])


# --- messages ---


def test_a_message_in_the_style_of_ctwing(ctwing: Decoder) -> None:
    content = message("8640", NOW, water_pressure=310, battery={"voltage": 3.6}, tilt=2, crc=320)
    taken = decoded(ctwing, content)  # one message alone, as that platform pushes
    (said,) = taken.said
    assert (said.device, said.observed_at) == ("8640", NOW)
    assert said.values[Lane.TELEMETRY] == {"pressure_mpa": 0.31, "battery_v": 3.6}
    assert said.values[Lane.EVENT] == {"tilt_deg": 2.0}
    assert (taken.received, dict(taken.dropped)) == (1, {})


def test_messages_in_the_style_of_onenet(onenet: Decoder) -> None:
    point = {"type": 1, "imei": 8640, "at": NOW, "ds_id": "3323_0_5700", "value": 0.3}
    others = [{"type": 2, "imei": 8640, "at": NOW, "status": 1}, {**point, "ds_id": "3303_0_5700"}]
    taken = decoded(onenet, {"msg": [point, *others], "msg_signature": "x", "nonce": "y"})
    (said,) = taken.said
    assert (said.device, said.values) == ("8640", ({"pressure_mpa": 0.3}, {}))
    assert taken.received == 3
    assert dict(taken.dropped) == {"other_message": 1, "unknown_metric": 1, "empty": 1}
    assert taken.problems[0]["where"] == "msg[2].value"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("bad_device", {"IMEI": None}, "[1].IMEI"),
    ("bad_device", {"IMEI": 1.5}, "[1].IMEI"),
    ("bad_device", {"IMEI": ""}, "[1].IMEI"),
    ("bad_device", {"IMEI": "x" * 129}, "[1].IMEI"),
    ("bad_device", {"IMEI": "two\nlines"}, "[1].IMEI"),
    ("bad_time", {"timestamp": "yesterday"}, "[1].timestamp"),
    ("bad_time", {"timestamp": None}, "[1].timestamp"),
    ("bad_time", {"timestamp": True}, "[1].timestamp"),
    ("bad_time", {"timestamp": -5}, "[1].timestamp"),
    ("bad_time", {"timestamp": 10**40}, "[1].timestamp"),
    ("empty", {"payload": {}}, "[1]"),
    ("empty", {"payload": [1]}, "[1]"),
    ("not_a_number", {"payload": {"water_pressure": "NaN", "tilt": 1}}, "[1].payload.water_pressure"),
    ("not_a_number", {"payload": {"water_pressure": None, "tilt": 1}}, "[1].payload.water_pressure"),
    ("not_a_number", {"payload": {"water_pressure": [300], "tilt": 1}}, "[1].payload.water_pressure"),
    ("unknown_metric", {"payload": {"smell": 5, "tilt": 1}}, "[1].payload.smell"),
]


@pytest.mark.parametrize(("reason", "changed", "where"), BAD)
def test_what_cannot_be_used_is_told_and_the_rest_is_taken(
    ctwing: Decoder, reason: str, changed: dict[str, Any], where: str
) -> None:
    good = message("8640", NOW, water_pressure=310)
    taken = decoded(ctwing, [good, {**good, **changed}, good])
    assert taken.said[0].device == taken.said[-1].device == "8640"
    assert taken.received == 3
    assert taken.dropped[reason] == 1
    assert {"reason": reason, "where": where} == {name: taken.problems[0][name] for name in ("reason", "where")}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"pressure=3", "not_json"),
        (b"", "not_json"),
        (b'[{"IMEI": "1", "timestamp": 5, "payload": {"tilt": NaN}}]', "not_json"),
        (b'[{"IMEI": "1", "timestamp": 5, "payload": {"tilt": 1e999}}]', "not_json"),
        (b"\xff\xfe[]", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'"text"', "no_messages"),
        (b"5", "no_messages"),
    ],
)
def test_a_body_that_tells_nothing_is_refused_as_a_whole(ctwing: Decoder, body: bytes, reason: str) -> None:
    with pytest.raises(WireError) as raised:
        ctwing.decode(body)
    assert raised.value.reason == reason


def test_messages_that_are_not_where_they_should_be(onenet: Decoder) -> None:
    with pytest.raises(WireError, match="no_messages: the body has no 'msg'"):
        decoded(onenet, [{"type": 1}])


def test_only_the_first_problems_are_told(ctwing: Decoder) -> None:
    taken = decoded(ctwing, [5] * 1000)
    assert taken.dropped == {"other_message": 1000}
    taken = decoded(ctwing, [message("", NOW, tilt=1)] * 1000)
    assert taken.dropped == {"bad_device": 1000}
    assert len(taken.problems) == MOST_PROBLEMS


@pytest.mark.parametrize(
    ("unit", "told"), [("s", 1_767_225_600), ("s", 1_767_225_600.0), ("iso", "2026-01-01T08:00:00+08:00"), ("ms", NOW)]
)
def test_units_of_time(tmp_path: Path, unit: str, told: object) -> None:
    text = CONFIG.replace("    time: timestamp", f"    time: timestamp\n    time_unit: {unit}", 1)
    decoder = Decoder(read_clouds(written(tmp_path, text)).operators["ctwing"])
    (said,) = decoded(decoder, {**message("1", 0, tilt=1), "timestamp": told}).said
    assert said.observed_at == NOW


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "messageType": st.just("dataReport") | anything,
        "IMEI": st.just("8640") | anything,
        "timestamp": st.integers(1, NOW) | anything,
        "payload": st.dictionaries(st.sampled_from(["water_pressure", "tilt", "x", "battery"]), anything) | anything,
    },
)


@given(content=st.lists(messages | anything, max_size=6))
def test_whatever_comes_every_message_is_used_or_counted(content: list[Any]) -> None:
    decoder = DECODER
    taken = decoder.take(msgspec.json.decode(msgspec.json.encode(_exact(content))))
    whole = ("other_message", "bad_device", "bad_time", "empty")
    assert taken.received == len(content) == len(taken.said) + sum(taken.dropped[reason] for reason in whole)
    for said in taken.said:
        assert said.values[0] or said.values[1]
        assert all(math.isfinite(value) for lane in said.values for value in lane.values())


def _exact(value: Any) -> Any:
    """Leave out what JSON's integers cannot say."""
    if isinstance(value, int) and not isinstance(value, bool):
        return max(min(value, 2**63), -(2**63))
    if isinstance(value, list):
        return [_exact(one) for one in value]
    return {name: _exact(one) for name, one in value.items()} if isinstance(value, dict) else value


def _decoder() -> Decoder:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return Decoder(read_clouds(written(Path(folder), CONFIG)).operators["ctwing"])


DECODER = _decoder()
