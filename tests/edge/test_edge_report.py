"""Report by exception and local limits: what is left out can be told from what is told, and no alarm stays open."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.config import Duration, convert, parse_yaml
from citybrain.errors import ConfigError
from citybrain.model import Reading
from edge.limits import Limit, Limits
from edge.report import Report, Reporter

STEPS = st.lists(st.tuples(st.integers(1, 40_000), st.floats(-1, 1, allow_nan=False)), min_size=1, max_size=60)


@given(STEPS, st.sampled_from([0.0, 0.05, 0.4]))
def test_what_was_told_last_is_never_far_off_nor_old(steps: list[tuple[int, float]], deadband: float) -> None:
    reporter = Reporter(Report(Duration(60_000), {"level_m": deadband}))
    at_ms, told = 0, list[Reading]()
    for step_ms, value in steps:
        at_ms += step_ms
        reading = Reading("d", at_ms, {"level_m": value})
        found = reporter.filter(reading)
        if found is not None:
            assert found == reading
            told.append(found)
        assert abs(told[-1].values["level_m"] - value) <= deadband
        assert at_ms - told[-1].observed_at < 60_000
    for before, after in pairwise(told):
        changed = abs(before.values["level_m"] - after.values["level_m"]) > deadband
        assert changed or after.observed_at - before.observed_at >= 60_000


def test_only_what_changed_is_told_by_device_and_metric() -> None:
    reporter = Reporter(Report(Duration(60_000)))
    assert reporter.filter(Reading("a", 0, {"level_m": 1, "tilt_deg": 2})) is not None
    assert reporter.filter(Reading("b", 0, {"level_m": 1})) == Reading("b", 0, {"level_m": 1})
    assert reporter.filter(Reading("a", 10, {"level_m": 1, "tilt_deg": 3})) == Reading("a", 10, {"tilt_deg": 3})
    assert reporter.filter(Reading("a", 20, {"level_m": 1})) is None


def test_a_clock_that_is_set_back_silences_nothing() -> None:
    reporter = Reporter(Report(Duration(60_000)))
    assert reporter.filter(Reading("a", 1_000_000, {"level_m": 1})) is not None
    assert reporter.filter(Reading("a", 5, {"level_m": 1})) is not None
    assert reporter.filter(Reading("a", 6, {"level_m": 1})) is None


def codes(limits: Limits, *values: tuple[int, float], device: str = "d") -> list[tuple[int, float]]:
    events = (limits.judge(Reading(device, at_ms, {"pressure_mpa": value})) for at_ms, value in values)
    return [(event.observed_at, event.values["local_alarm"]) for event in events if event is not None]


def test_a_limit_is_passed_for_long_enough_and_over_with_its_deadband() -> None:
    low = Limit("pressure_mpa", 1, below=0.14, deadband=0.005, hold=Duration(10_000))
    told = codes(
        Limits([low]),
        (0, 0.3), (1000, 0.1), (9000, 0.15), (10_000, 0.1), (19_000, 0.1), (20_000, 0.1),
        (21_000, 0.142), (22_000, 0.2),
    )  # fmt: skip
    assert told == [(0, 0), (20_000, 1), (22_000, 0)]


@pytest.mark.parametrize("step_ms", [7_200_000, -7_200_000])
def test_a_step_of_the_clock_makes_nothing_last_longer_or_shorter(step_ms: int) -> None:
    low = Limit("pressure_mpa", 1, below=0.14, hold=Duration(10_000))
    limits, reporter = Limits([low]), Reporter(Report(Duration(60_000)))
    begin = 10_000_000
    assert codes(limits, (begin, 0.3), (begin + 1000, 0.1)) == [(begin, 0)]
    assert codes(limits, (begin + 1000, 0.1), device="own") == []
    assert reporter.filter(Reading("d", begin, {"level_m": 1})) is not None
    limits.moved(step_ms, {"own"})
    reporter.moved(step_ms)
    after = begin + step_ms
    assert codes(limits, (after + 10_000, 0.1), (after + 11_000, 0.1)) == [(after + 11_000, 1)]
    assert codes(limits, (begin + 10_000, 0.1), (begin + 11_000, 0.1), device="own") == [(begin + 11_000, 1)]
    assert reporter.filter(Reading("d", after + 59_000, {"level_m": 1})) is None
    assert reporter.filter(Reading("d", after + 60_000, {"level_m": 1})) is not None


def test_two_limits_of_one_device() -> None:
    limits = Limits([Limit("pressure_mpa", 1, below=0.14), Limit("pressure_mpa", 2, below=0.07)])
    assert codes(limits, (0, 0.3), (1, 0.1), (2, 0.05), (3, 0.06), (4, 0.1), (5, 0.3)) == [
        (0, 0), (1, 1), (2, 2), (4, 1), (5, 0),
    ]  # fmt: skip


def test_after_a_restart_the_first_judgement_is_told() -> None:
    low = Limit("pressure_mpa", 1, below=0.14, hold=Duration(10_000))
    assert codes(Limits([low]), (0, 0.1), (10_000, 0.1)) == [(10_000, 1)]  # not 0 while it may still hold
    assert codes(Limits([low]), (0, 0.1), (5000, 0.3)) == [(5000, 0)]


def test_limits_of_one_device_only_and_of_metrics_that_are_there() -> None:
    limits = Limits([Limit("pressure_mpa", 1, above=1.0, device="a")])
    assert codes(limits, (0, 2.0), device="b") == []
    assert codes(limits, (0, 2.0), device="a") == [(0, 1)]
    assert limits.judge(Reading("a", 1, {"tilt_deg": 3})) is None


def test_a_clock_that_is_set_back_does_not_hold_an_alarm_up() -> None:
    low = Limit("pressure_mpa", 1, below=0.14, hold=Duration(10_000))
    assert codes(Limits([low]), (1_000_000, 0.1), (0, 0.1), (10_000, 0.1)) == [(10_000, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{metric: presure_mpa, below: 1, code: 1}", r"g\.yaml:1 \[0\]: unknown metric 'presure_mpa'"),
        ("{metric: pressure_mpa, code: 1}", "expected one of `below` and `above`"),
        ("{metric: pressure_mpa, below: 1, above: 2, code: 1}", "expected one of `below` and `above`"),
        ("{metric: pressure_mpa, below: .nan, code: 1}", "expected one of `below` and `above`"),
        ("{metric: pressure_mpa, below: 1, code: 0}", "code: expected 1 to 999, got 0"),
        ("{metric: pressure_mpa, below: 1, code: 1, deadband: -1}", "deadband: expected 0 or more"),
        ("{metric: pressure_mpa, below: 1, code: 1, hold: 1s}", "unknown field 'hold'"),
    ],
)
def test_a_wrong_limit_is_refused(text: str, message: str) -> None:
    value, lines = parse_yaml(f"- {text}\n", "g.yaml")
    with pytest.raises(ConfigError, match=message):
        convert(value, tuple[Limit, ...], lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "missing required field `heartbeat`"),
        ("{heartbeat: 0s}", "heartbeat: expected more than 0"),
        ("{heartbeat: 1min, deadband: {level: 1}}", "deadband: unknown metric 'level'"),
        ("{heartbeat: 1min, deadband: {level_m: -1}}", "deadband of level_m: expected 0 or more"),
    ],
)
def test_a_wrong_report_is_refused(text: str, message: str) -> None:
    value, lines = parse_yaml(text, "g.yaml")
    with pytest.raises(ConfigError, match=message):
        convert(value, Report, lines)
