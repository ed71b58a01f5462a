"""Deadlines against a minute-by-minute model, and against days worked out by hand."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.cases.clocks import Calendar, Holiday, deadline, is_working_day, load_calendar
from citybrain.clock import MINUTE_MS, from_iso
from citybrain.errors import ConfigError
from rules.categories import Clock

CALENDAR = load_calendar()


def ms(local: str) -> int:
    """A local time of Shanghai, e.g. `2026-09-30T17:00`."""
    return from_iso(f"{local}+08:00")


@pytest.mark.parametrize(
    ("start", "type", "amount", "end"),
    [
        ("2026-11-24T16:30", "urgent_hour", 2, "2026-11-24T18:30"),
        ("2026-09-30T23:00", "urgent_hour", 2, "2026-10-01T01:00"),
        ("2026-11-24T03:00", "urgent_hour", 0.5, "2026-11-24T03:30"),
        ("2026-11-24T09:00", "work_hour", 2, "2026-11-24T11:00"),
        ("2026-11-24T11:00", "work_hour", 1, "2026-11-24T12:00"),  # done by noon, not by two
        ("2026-11-24T11:00", "work_hour", 2, "2026-11-24T15:00"),  # the noon break does not count
        ("2026-11-24T12:30", "work_hour", 1, "2026-11-24T15:00"),
        ("2026-11-24T17:00", "work_hour", 4, "2026-11-25T11:00"),
        ("2026-11-27T17:00", "work_hour", 4, "2026-11-30T11:00"),  # over a weekend
        ("2026-11-28T10:00", "work_hour", 4, "2026-11-30T12:00"),  # opened on a Saturday
        ("2026-09-30T17:00", "work_hour", 4, "2026-10-08T11:00"),  # over the National Day holidays
        ("2026-10-09T17:00", "work_hour", 4, "2026-10-10T11:00"),  # into a Saturday that is made up
        ("2026-11-24T09:00", "work_day", 1, "2026-11-25T18:00"),
        ("2026-11-24T23:00", "work_day", 3, "2026-11-27T18:00"),
        ("2026-11-27T09:00", "work_day", 1, "2026-11-30T18:00"),
        ("2026-09-30T09:00", "work_day", 3, "2026-10-10T18:00"),
        ("2026-02-13T09:00", "work_day", 2, "2026-02-24T18:00"),  # Feb 14 is made up, then the Spring Festival
        ("2026-11-24T09:00", "natural_day", 1, "2026-11-26T00:00"),
        ("2026-09-30T09:00", "natural_day", 3, "2026-10-04T00:00"),
    ],
)
def test_deadlines_worked_out_by_hand(start: str, type: str, amount: float, end: str) -> None:
    assert deadline(ms(start), Clock(type, amount), CALENDAR) == ms(end)  # type: ignore[arg-type]


SMALL = Calendar(
    480,
    (("08:00", "12:00"), ("14:00", "18:00")),
    holidays=(Holiday(datetime.date(2026, 10, 1), datetime.date(2026, 10, 7)),),
    make_up_days=(datetime.date(2026, 9, 27), datetime.date(2026, 10, 10)),
)


def works(at_ms: int) -> bool:
    """The model: whether people work in the minute that begins at `at_ms`."""
    local = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.timezone(datetime.timedelta(hours=8)))
    day = local.date()
    if day in SMALL.make_up_days:
        open_day = True
    else:
        open_day = local.weekday() < 5 and not datetime.date(2026, 10, 1) <= day <= datetime.date(2026, 10, 7)
    return open_day and (8 <= local.hour < 12 or 14 <= local.hour < 18)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 16 * 24 * 60), st.integers(1, 30))
def test_work_hours_count_the_minutes_people_work(start_min: int, hours: int) -> None:
    start = ms("2026-09-24T00:00") + start_min * MINUTE_MS
    end = deadline(start, Clock("work_hour", hours), SMALL)
    worked = sum(works(at) for at in range(start, end, MINUTE_MS))
    assert worked == hours * 60
    assert works(end - MINUTE_MS), "it ends with the last minute of work, not in a break after it"


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 400 * 24 * 60), st.sampled_from(["urgent_hour", "work_hour", "work_day", "natural_day"]),
    st.integers(1, 40), st.integers(0, 5_000),
)  # fmt: skip
def test_later_starts_and_larger_amounts_never_end_earlier(
    start_min: int, type: str, amount: int, later_min: int
) -> None:
    start = ms("2026-01-01T00:00") + start_min * MINUTE_MS
    first = deadline(start, Clock(type, amount), CALENDAR)  # type: ignore[arg-type]
    assert first > start
    assert deadline(start + later_min * MINUTE_MS, Clock(type, amount), CALENDAR) >= first  # type: ignore[arg-type]
    assert deadline(start, Clock(type, amount + 1), CALENDAR) > first  # type: ignore[arg-type]


def test_holidays_and_made_up_days_of_the_shipped_calendar() -> None:
    assert not is_working_day(CALENDAR, datetime.date(2026, 10, 1))
    assert is_working_day(CALENDAR, datetime.date(2026, 10, 10))
    assert not is_working_day(CALENDAR, datetime.date(2026, 10, 11))
    assert all(day.weekday() in CALENDAR.weekend for day in CALENDAR.make_up_days)


@pytest.mark.parametrize(
    ("clock", "says"),
    [(Clock("work_day", 1.5), "whole days, got 1.5"), (Clock("urgent_hour", 0), "above 0, got 0"),
     (Clock("natural_day", -1), "above 0, got -1")],
)  # fmt: skip
def test_amounts_that_make_no_sense_are_refused(clock: Clock, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        deadline(0, clock, CALENDAR)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("utc_offset_min: 480\nsessions: []\n", "at least one session"),
        ('utc_offset_min: 480\nsessions: [["18:00", "08:00"]]\n', "does not follow"),
        ('utc_offset_min: 480\nsessions: [["8 am", "12:00"]]\n', "such as \"08:00\", got '8 am'"),
        ('utc_offset_min: 480\nsessions: [["08:00", "12:00"]]\nholiday: []\n', "unknown field 'holiday'"),
        (
            'utc_offset_min: 480\nsessions: [["08:00", "12:00"]]\nholidays: [{from: "2026-01-03", to: "2026-01-01"}]\n',
            "ends before it begins",
        ),
    ],
)
def test_a_wrong_calendar_is_refused_and_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "calendar.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_calendar(path)
    assert "calendar.yaml" in str(caught.value)


def test_a_calendar_without_working_days_ends() -> None:
    never = Calendar(
        480, (("08:00", "12:00"),), holidays=(Holiday(datetime.date(1970, 1, 1), datetime.date(1990, 1, 1)),)
    )
    with pytest.raises(ConfigError, match="no end of working time"):
        deadline(0, Clock("work_day", 1), never)
