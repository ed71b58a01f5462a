"""Scenarios: golden examples beside rules. A device says this and that at such times; the rule raises, clears then.

They run through the engine itself, with a gateway that speaks each few seconds, so what holds here holds live. Files
are YAML (docs/rules.md, "Scenarios"); a script is a list of lines:

    at 0s pressure_mpa 0.30 battery_v 3.6
    every 60s from 0s to 10min pressure_mpa 0.30..0.12~0.005
    mute from 5min to 20min | cut from 5min to 7min | report at 10s
    want raise between 2min and 3min | want clear between 20min and 25min | want nothing
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from citybrain.clock import HOUR_MS, SECOND_MS
from citybrain.config import Lines, convert, duration_ms, duration_text, parse_yaml
from citybrain.errors import ConfigError
from citybrain.layout import Layout
from citybrain.model import Device, Edge, Gateway, Lane, Place, Registry, Transition
from citybrain.segments import Record
from citybrain.units import METRICS
from rules.files import LIBRARY, load_rules
from streams.engine import Engine
from streams.log import Control, FrameHead, Kind, Tick, pack_frame
from streams.registry import Index, encode_registry
from streams.ruleset import Rule, RuleSet, encode_ruleset, nearest

SCENARIOS = LIBRARY / "scenarios"
ORIGIN_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
PULSE_MS, SLOW_PULSE_MS = 10 * SECOND_MS, 30 * SECOND_MS  # the gateway's heartbeat; in a scenario of many hours
FRAME_VALUES = 500
GATEWAY, DEVICE = "gw", "device"
PLACE = Place(0.0, 0.0, "0" * 15)


class DeviceKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a scenario is about: a device's kind, tags, telemetry and event metrics."""

    kind: str
    tags: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One example: which rule, on which device of the file, what is said, and what is wanted."""

    name: str
    rule: str
    device: str
    script: tuple[str, ...]


class Examples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of them. `rules`: the rule file or folder they are about, beside this file; what we ship where empty."""

    devices: dict[str, DeviceKind]
    scenarios: tuple[Scenario, ...]
    rules: str = ""


class Said(NamedTuple):
    """A value, ms after the beginning."""

    at: int
    device: str
    metric: str
    value: float


class Want(NamedTuple):
    """A transition that must come between two times, in ms; written in `line` of the script."""

    edge: Edge
    low: int
    high: int
    line: int


class Script(msgspec.Struct):
    """A script as it was read."""

    said: list[Said]
    wants: list[Want]
    mutes: list[tuple[int, int]]
    cuts: list[tuple[int, int]]
    reports: list[int]
    quiet: bool = False  # `want nothing`
    end: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """What became of one scenario: where it stands, and everything that came otherwise than wanted."""

    name: str
    rule: str
    where: str
    wrong: tuple[str, ...]


# --- reading --------------------------------------------------------------------------------------------------------

_TIME = r"(\d+(?:\.\d+)?(?:ms|s|min|h|d))"
_VALUE = re.compile(r"([a-z][a-z0-9_]*) +(-?\d+(?:\.\d+)?)(?:\.\.(-?\d+(?:\.\d+)?))?(?:~(\d+(?:\.\d+)?))?(?: +|$)")
_LINES = {
    "at": re.compile(rf"at {_TIME} +(.+)"),
    "every": re.compile(rf"every {_TIME} from {_TIME} to {_TIME} +(.+)"),
    "mute": re.compile(rf"mute from {_TIME} to {_TIME}"),
    "cut": re.compile(rf"cut from {_TIME} to {_TIME}"),
    "report": re.compile(rf"report at {_TIME}"),
    "want": re.compile(rf"want (raise|clear) between {_TIME} and {_TIME}"),
}
_FORMS = (
    '"at TIME METRIC VALUE …", "every TIME from TIME to TIME METRIC VALUE …", "mute|cut from TIME to TIME", '
    '"report at TIME", "want raise|clear between TIME and TIME" or "want nothing"'
)


def read_script(lines: Sequence[str]) -> Script:
    """Return what the lines of a script say; raises ValueError (line number, what) for the first that says nothing."""
    script = Script([], [], [], [], [])
    for number, text in enumerate(lines):
        try:
            _read_line(script, number, text.strip())
        except ValueError as error:
            raise ValueError(number, str(error)) from None
    if not script.wants and not script.quiet:
        raise ValueError(len(lines) - 1, 'says nothing of what is wanted: expected "want …" or "want nothing"')
    if script.wants and script.quiet:
        raise ValueError(len(lines) - 1, 'wants something and "want nothing": expected one of them')
    script.said.sort(key=lambda said: said.at)  # stable: what is said at one time keeps its order
    return script


def _read_line(script: Script, number: int, text: str) -> None:
    if text == "want nothing":
        script.quiet = True
        return
    word = text.partition(" ")[0]
    match = _LINES[word].fullmatch(text) if word in _LINES else None
    if match is None:
        raise ValueError(f"expected {_FORMS}, got {text!r}")
    times = [duration_ms(found) for found in match.groups() if re.fullmatch(_TIME, found)]
    script.end = max(script.end, *(times[1:] if word == "every" else times))
    match word:
        case "at":
            script.said += [Said(times[0], DEVICE, *value) for value in _values(match[2], 1, number)[0]]
        case "every":
            step, start, end = times
            if step <= 0 or end <= start:
                raise ValueError(f"expected a step above 0 and an end after the start, got {text!r}")
            moments = range(start, end, step)
            for at, values in zip(moments, _values(match[4], len(moments), number), strict=True):
                script.said += [Said(at, DEVICE, *value) for value in values]
        case "report":
            script.reports.append(times[0])
        case _:
            low, high = times
            if high < low or (high == low and word != "want"):
                raise ValueError(f"expected the second time after the first, got {text!r}")
            if word == "want":
                script.wants.append(Want(Edge(match[1]), low, high, number))
            else:
                (script.mutes if word == "mute" else script.cuts).append((low, high))


def _values(text: str, times: int, seed: int) -> list[list[tuple[str, float]]]:
    """Return, for each time, the values of `metric 0.30..0.12~0.005 …`: from first to last in a line, with noise."""
    found, at = [], 0
    while at < len(text):
        match = _VALUE.match(text, at)
        if match is None:
            raise ValueError(f'expected METRIC VALUE such as "pressure_mpa 0.30..0.12~0.005", got {text[at:]!r}')
        if match[1] not in METRICS:
            raise ValueError(f"unknown metric {match[1]!r}{nearest(match[1], METRICS)}")
        first = float(match[2])
        last = float(match[3]) if match[3] else first
        found.append((match[1], first, last - first, float(match[4] or 0)))
        at = match.end()
    dice = random.Random(seed)  # the same noise each time
    parts = [n / (times - 1) if times > 1 else 0.0 for n in range(times)]
    return [
        [(name, round(first + rise * part + dice.uniform(-noise, noise), 4)) for name, first, rise, noise in found]
        for part in parts
    ]


# --- running --------------------------------------------------------------------------------------------------------


def run_scenarios(path: Path = SCENARIOS) -> list[Outcome]:
    """Run a file of scenarios, or every one in a folder; raises ConfigError where one cannot be read."""
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(str(path), "no scenario files: expected *.yaml")
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        layout.make()
        return [outcome for file in files for outcome in _run_file(file, layout)]


def _run_file(file: Path, layout: Layout) -> Iterator[Outcome]:
    try:
        value, lines = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), f"cannot be read: {error}") from None
    examples = convert(value, Examples, lines)
    ruleset = load_rules(file.parent / examples.rules if examples.rules else LIBRARY)
    rules = {rule.id: rule for rule in ruleset.rules}
    for number, scenario in enumerate(examples.scenarios):
        at = f"scenarios[{number}]"
        rule = _named(scenario.rule, rules, lines, f"{at}.rule", "rule")
        kind = _named(scenario.device, examples.devices, lines, f"{at}.device", "device")
        try:
            script = read_script(scenario.script)
        except ValueError as error:
            line, what = error.args
            raise ConfigError(lines.where(f"{at}.script[{line}]"), what) from None
        missing = {said.metric for said in script.said} - {*kind.metrics, *kind.events}
        if missing:
            raise ConfigError(lines.where(f"{at}.script"), f"device {scenario.device!r} has no {min(missing)}")
        found = run_script(rule, kind, script, layout)
        if found is None:
            what = f"rule {rule.id} does not watch {scenario.device!r}: look at its select, and at the device's metrics"
            raise ConfigError(lines.where(f"{at}.device"), what)
        where = lines.where(f"{at}.name").partition(" ")[0]
        yield Outcome(scenario.name, rule.id, where, tuple(_compare(script, scenario.script, found)))


def _named(name: str, known: dict[str, Any], lines: Lines, field: str, what: str) -> Any:
    if name not in known:
        raise ConfigError(lines.where(field), f"unknown {what} {name!r}{nearest(name, known)}")
    return known[name]


def _compare(script: Script, lines: Sequence[str], found: Sequence[Transition]) -> Iterator[str]:
    for want, got in zip_longest(script.wants, found):
        told = "" if got is None else f"{got.edge.value} at {duration_text(got.at_ms - ORIGIN_MS)} ({_measured(got)})"
        if want is None:
            yield f"{told} was not wanted"
        elif got is None:
            yield f"{lines[want.line]}: nothing came"
        elif got.edge != want.edge or not want.low <= got.at_ms - ORIGIN_MS <= want.high:
            yield f"{lines[want.line]}: got {told}"


def _measured(transition: Transition) -> str:
    evidence = transition.evidence
    return f"{evidence.metric} {evidence.value:g}" if evidence.value is not None else evidence.metric or "reported"


def run_script(rule: Rule, kind: DeviceKind, script: Script, layout: Layout) -> list[Transition] | None:
    """Return what one rule makes of a script on one device behind one gateway; None where it does not watch it."""
    is_gateway = kind.kind == "gateway"
    name = GATEWAY if is_gateway else DEVICE
    told = ("uptime_s", *(name for name in kind.metrics if is_gateway and name != "uptime_s"))
    devices = [Device(GATEWAY, "gateway", GATEWAY, PLACE, told)]
    if not is_gateway:
        tags = kind.tags
        devices.append(
            Device(DEVICE, kind.kind, GATEWAY, PLACE, kind.metrics, kind.events, "zone", "building", "", tags)
        )
    registry = Registry((Gateway(GATEWAY, 0, PLACE),), tuple(devices))
    log = _Log(Index(registry, ""), layout)
    log.control(0, "registry", content=layout.put_blob(encode_registry(registry)))
    log.control(0, "ruleset", content=layout.put_blob(encode_ruleset(RuleSet((rule,)))))
    for start, end in script.mutes:
        window = {"from_ms": ORIGIN_MS + start, "until_ms": ORIGIN_MS + end}
        log.control(0, "override", subject=name, rule=rule.id, **window)
    for at in script.reports:
        log.control(at, "fault", subject=name, rule=rule.id)
    log.play(script, tick=is_gateway)
    engine = Engine(0, layout)
    found = engine.process(log.records)
    return found if _watched(engine, log.index.device_index[name]) or rule.when["kind"] == "reported" else None


def _watched(engine: Engine, device: int) -> bool:
    tables = engine.plan.tables.values() if engine.plan is not None else ()
    return any(device in table.device for table in tables)


class _Log:
    """Records as ingest would write them: the gateway's pulse and what the device says, in order of time."""

    def __init__(self, index: Index, layout: Layout) -> None:
        self.index = index
        self.layout = layout
        self.records: list[Record] = []
        self._events = {m for d in index.devices for m in d.event_metrics}

    def add(self, at: int, kind: Kind, payload: bytes) -> None:
        self.records.append(Record(len(self.records), ORIGIN_MS + at, kind, payload))

    def control(self, at: int, what: str, **more: Any) -> None:
        self.add(at, Kind.CONTROL, msgspec.json.encode(Control(what, ORIGIN_MS + at, "scenario", **more)))

    def play(self, script: Script, *, tick: bool) -> None:
        """Add everything that is said until a minute after the last time of the script."""
        end = script.end + 60 * SECOND_MS
        pulse = PULSE_MS if end <= 2 * HOUR_MS else SLOW_PULSE_MS
        beats = [Said(at, GATEWAY, "uptime_s", at / 1000) for at in range(0, end, pulse)]
        waiting: list[Said] = []
        told = [said if not tick else said._replace(device=GATEWAY) for said in script.said]
        for said in sorted([*beats, *told], key=lambda said: said.at):
            lost = any(start <= said.at < stop for start, stop in script.cuts)
            if waiting and (tick or self._lane(said) != self._lane(waiting[0]) or len(waiting) == FRAME_VALUES):
                self._frame(waiting)
                waiting = []
            if not lost:
                waiting.append(said)
            if tick and said.device == GATEWAY:
                self.add(said.at, Kind.TICK, msgspec.json.encode(Tick(ORIGIN_MS + said.at, ORIGIN_MS)))
        self._frame(waiting)

    def _lane(self, said: Said) -> Lane:
        return Lane.EVENT if said.metric in self._events else Lane.TELEMETRY

    def _frame(self, said: list[Said]) -> None:
        if not said:
            return
        at = said[-1].at
        head = FrameHead(0, self._lane(said[0]), 1, len(self.records) + 1, ORIGIN_MS + at, len(said), 0)
        times = np.array([ORIGIN_MS + each.at for each in said], np.int64)
        values = np.array([each.value for each in said], np.float64)
        series = np.array([self.index.series(each.device, each.metric) for each in said], np.uint32)
        self.add(at, Kind.FRAME, pack_frame(head, times, values, series))
