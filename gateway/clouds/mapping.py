"""From an operator's JSON to readings: paths, units, times. Pure: no clock, no socket, no disk.

What cannot be used is told by its place and reason, and the rest goes on: an operator repeats a refused batch three
times and then throws all of it away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import msgspec

from citybrain.clock import from_iso
from citybrain.errors import WireError
from citybrain.model import Lane
from citybrain.wire import MAX_SEQ, NOT_JSON
from gateway.clouds.config import Field, Operator

LONGEST_NAME = 128  # as ingest keeps them in quarantine
MOST_PROBLEMS = 10
MOST_DEEP = 4  # levels of objects inside `values`
ABSENT = msgspec.UNSET
Values = tuple[dict[str, float], dict[str, float]]  # by metric, indexed by Lane
_NUMBERS = frozenset((int, float, bool))


class Said(msgspec.Struct, frozen=True):
    """What one device said at one time: values by metric, by lane."""

    device: str
    observed_at: int
    values: Values


class Taken(msgspec.Struct):
    """What a body held: `said`, what was dropped by reason, and the first problems by place.

    received: messages. Message reasons (`other_message`, `bad_device`, `bad_time`, `empty`) count messages; value
    reasons (`unknown_metric`, `not_a_number`) count values.
    """

    said: list[Said]
    received: int = 0
    dropped: Counter[str] = msgspec.field(default_factory=Counter)
    problems: list[dict[str, str]] = []

    def drop(self, reason: str, where: str, what: str) -> None:
        """Count something that is not used, and tell the first ten."""
        self.dropped[reason] += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append({"reason": reason, "where": where, "what": what})


def path_of(text: str) -> Callable[[Any], Any]:
    """Return what finds `a.b.c` in nested objects, `ABSENT` where it is not there; "" finds the whole.

    >>> path_of("payload.t")({"payload": {"t": 5}})
    5
    """
    steps = text.split(".") if text else []

    def find(value: Any) -> Any:
        for step in steps:
            if not isinstance(value, dict) or step not in value:
                return ABSENT
            value = value[step]
        return value

    return find


class Decoder:
    """Reads one operator's messages."""

    def __init__(self, operator: Operator) -> None:
        self._messages = path_of(operator.messages)
        self._device = path_of(operator.device)
        self._time = path_of(operator.time)
        self._values = path_of(operator.values)
        self._stream = path_of(operator.stream) if operator.stream else None
        self._only = [(path_of(path), wanted) for path, wanted in operator.only.items()]
        self._ignore = frozenset(operator.ignore)
        self._fields = {name: _Use(field) for name, field in operator.fields.items()}
        self._operator = operator
        self._root = operator.messages

    def decode(self, body: bytes) -> Taken:
        """Read a pushed body; raises WireError (`not_json`, `no_messages`) where there is no telling what it holds."""
        try:
            content = msgspec.json.decode(body)
        except NOT_JSON as error:
            raise WireError("not_json", str(error)) from None
        found = self._messages(content)
        if found is ABSENT:
            raise WireError("no_messages", f"the body has no {self._root!r}")
        return self.take(found, self._root)

    def take(self, messages: Any, where: str = "") -> Taken:
        """Read a list of messages, or one; raises WireError(`no_messages`)."""
        if isinstance(messages, dict):
            messages = [messages]
        if not isinstance(messages, list):
            raise WireError(
                "no_messages", f"{where or 'the body'}: expected a list of messages or one, got {messages!r:.80}"
            )
        taken = Taken([], len(messages))
        for number, message in enumerate(messages):
            said = self._message(message, f"{where}[{number}]", taken)
            if said is not None:
                taken.said.append(said)
        return taken

    def _message(self, message: Any, where: str, taken: Taken) -> Said | None:
        if self._only and any(find(message) != wanted for find, wanted in self._only):
            taken.dropped["other_message"] += 1  # expected, such as a device that goes online: no problem
            return None
        device, observed_at = self._device(message), self._time(message)
        name = device if isinstance(device, str) else str(device) if type(device) is int else ""
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            taken.drop(
                "bad_device", f"{where}.{self._operator.device}", f"expected a device's name, got {_shown(device)}"
            )
            return None
        at_ms = self._at_ms(observed_at)
        if at_ms is None:
            unit = self._operator.time_unit
            taken.drop(
                "bad_time", f"{where}.{self._operator.time}", f"expected a time in {unit}, got {_shown(observed_at)}"
            )
            return None
        values = self._numbers(message, where, taken)
        if not (values[0] or values[1]):
            taken.drop("empty", where, f"no value of {name!r} can be used")
            return None
        return Said(name, at_ms, values)

    def _at_ms(self, value: Any) -> int | None:
        unit = self._operator.time_unit
        try:
            if unit == "iso":
                at_ms = from_iso(value) if isinstance(value, str) else 0
            elif type(value) not in (int, float):
                return None
            else:
                at_ms = round(value if unit == "ms" else value * 1000)
        except (ValueError, OverflowError):
            return None
        return at_ms if 0 < at_ms <= MAX_SEQ else None

    def _numbers(self, message: Any, where: str, taken: Taken) -> Values:
        found: Values = ({}, {})
        values = self._values(message)
        if self._stream is not None:
            values = {str(self._stream(message))[:LONGEST_NAME]: values}
        if not isinstance(values, dict):
            return found
        for name, value in _flat(values) if dict in map(type, values.values()) else values.items():
            field = self._fields.get(name)
            number = None if field is None else field.number(value)
            if field is not None and number is not None:
                found[field.lane][field.metric] = number
            else:
                self._tell(name, value, where, taken)
        return found

    def _tell(self, name: str, value: Any, where: str, taken: Taken) -> None:
        """Count and tell a value that is not used."""
        at = f"{where}.{self._operator.values}" + ("" if self._stream is not None else f".{name[:LONGEST_NAME]}")
        field = self._fields.get(name)
        if field is not None:
            taken.drop("not_a_number", at, f"expected a number for {field.metric}, got {_shown(value)}")
        elif name not in self._ignore:
            taken.drop("unknown_metric", at, f"{name!r:.80} is neither in `fields` nor in `ignore`")


class _Use:
    """A field, ready to be applied."""

    __slots__ = ("_factor", "_offset", "lane", "metric")

    def __init__(self, field: Field) -> None:
        self.metric = field.metric
        self.lane = Lane[field.lane.upper()]
        self._factor = field.factor
        self._offset = field.offset

    def number(self, value: Any) -> float | None:
        """Return the value in the metric's unit, None where it is no number."""
        if type(value) not in _NUMBERS:
            return None
        try:
            number: float = value * self._factor + self._offset
        except OverflowError:
            return None
        return number if isfinite(number) else None


def _flat(values: Mapping[str, Any], before: str = "", deep: int = 1) -> list[tuple[str, Any]]:
    """Return the values of nested objects under names such as `battery.voltage`."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and deep < MOST_DEEP:
            found += _flat(value, f"{before}{name}.", deep + 1)
        else:
            found.append((before + name, value))
    return found


def _shown(value: Any) -> str:
    return "nothing" if value is ABSENT else f"{value!r:.60}"
