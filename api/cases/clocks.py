"""Deadlines: urgent_hour, work_hour, work_day and natural_day, on a calendar of holidays and make-up days (调休).

Hours count from the minute the case is opened. Days do not count the day it is opened and end with the last one: at
its last working minute for work_day, at midnight for natural_day (Civil Code of the PRC, art. 201 and 203 [M]).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from citybrain.clock import DAY_MS, HOUR_MS, MINUTE_MS
from citybrain.config import load_yaml
from citybrain.errors import ConfigError
from rules.categories import Clock

FILE = Path(__file__).with_name("calendar.yaml")
EPOCH = datetime.date(1970, 1, 1)
MOST_DAYS = 3660  # a deadline further away than ten years is a mistake in a file


class Holiday(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Days off, both ends included."""

    first: datetime.date = msgspec.field(name="from")
    last: datetime.date = msgspec.field(name="to")
    name: str = ""


class Calendar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Working time: `sessions` are local times of day, `weekend` weekdays off (Monday is 0)."""

    utc_offset_min: int
    sessions: tuple[tuple[str, str], ...]
    weekend: tuple[int, ...] = (5, 6)
    holidays: tuple[Holiday, ...] = ()
    make_up_days: tuple[datetime.date, ...] = ()


def load_calendar(path: Path = FILE) -> Calendar:
    """Return a calendar from YAML; raises ConfigError with file and line, or naming the session that makes no sense."""
    calendar = load_yaml(path, Calendar)
    if not calendar.sessions or len(set(calendar.weekend)) > 6:
        raise ConfigError(str(path), "expected at least one session, and a weekend of at most six days")
    before = 0
    for session in calendar.sessions:
        start, end = (_minutes(text, f"{path} sessions") for text in session)
        if not before <= start < end <= 24 * 60:
            raise ConfigError(f"{path} sessions", f"{list(session)} does not follow what stands before it")
        before = end
    for holiday in calendar.holidays:
        if holiday.last < holiday.first:
            raise ConfigError(f"{path} holidays", f"{holiday.name or holiday.first} ends before it begins")
    return calendar


@cache
def _minutes(text: str, where: str) -> int:
    hours, _, minutes = text.partition(":")
    if not (hours.isdecimal() and minutes.isdecimal() and len(minutes) == 2 and int(minutes) < 60):
        raise ConfigError(where, f'expected a time of day such as "08:00", got {text!r}')
    return int(hours) * 60 + int(minutes)


@cache
def _off(calendar: Calendar) -> tuple[frozenset[datetime.date], frozenset[datetime.date]]:
    off = {
        holiday.first + datetime.timedelta(days=days)
        for holiday in calendar.holidays
        for days in range((holiday.last - holiday.first).days + 1)
    }
    return frozenset(off), frozenset(calendar.make_up_days)


def is_working_day(calendar: Calendar, day: datetime.date) -> bool:
    """Return whether people work on a (local) day: make-up days do count, holidays and weekends do not."""
    off, make_up = _off(calendar)
    return day in make_up or (day not in off and day.weekday() not in calendar.weekend)


def local_date(calendar: Calendar, at_ms: int) -> datetime.date:
    """Return the local day of a time."""
    return EPOCH + datetime.timedelta(days=(at_ms + calendar.utc_offset_min * MINUTE_MS) // DAY_MS)


def _midnight_ms(calendar: Calendar, day: datetime.date) -> int:
    return (day - EPOCH).days * DAY_MS - calendar.utc_offset_min * MINUTE_MS


def _working_days(calendar: Calendar, first: datetime.date) -> Iterator[datetime.date]:
    for days in range(MOST_DAYS):
        day = first + datetime.timedelta(days=days)
        if is_working_day(calendar, day):
            yield day
    raise ConfigError("calendar", f"no end of working time found within {MOST_DAYS} days of {first}")


def _sessions(calendar: Calendar, from_ms: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of working time from `from_ms` on."""
    for day in _working_days(calendar, local_date(calendar, from_ms)):
        midnight = _midnight_ms(calendar, day)
        for session in calendar.sessions:
            start, end = (midnight + _minutes(text, "sessions") * MINUTE_MS for text in session)
            if end > from_ms:
                yield max(start, from_ms), end


def deadline(start_ms: int, clock: Clock, calendar: Calendar) -> int:
    """Return when a clock that starts at `start_ms` runs out (Unix ms); raises ConfigError for days that are no number.

    >>> calendar = Calendar(480, (("08:00", "12:00"), ("14:00", "18:00")))
    >>> deadline(0, Clock("urgent_hour", 0.5), calendar)
    1800000
    """
    if clock.amount <= 0:
        raise ConfigError("clock", f"expected an amount above 0, got {clock.amount:g}")
    if clock.type == "urgent_hour":
        return start_ms + round(clock.amount * HOUR_MS)
    if clock.type == "work_hour":
        return _after_working_time(start_ms, round(clock.amount * HOUR_MS), calendar)
    if clock.amount != int(clock.amount):
        raise ConfigError("clock", f"expected whole days, got {clock.amount:g}")
    days, opened = int(clock.amount), local_date(calendar, start_ms)
    if clock.type == "natural_day":
        return _midnight_ms(calendar, opened + datetime.timedelta(days=days + 1))
    following = _working_days(calendar, opened + datetime.timedelta(days=1))
    last = [next(following) for _ in range(days)][-1]
    return _midnight_ms(calendar, last) + _minutes(calendar.sessions[-1][1], "sessions") * MINUTE_MS


def _after_working_time(start_ms: int, need_ms: int, calendar: Calendar) -> int:
    for start, end in _sessions(calendar, start_ms):
        if end - start >= need_ms:
            return start + need_ms
        need_ms -= end - start
    raise ConfigError("calendar", "working time does not end")
