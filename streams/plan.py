"""A rule set compiled against a registry: rule instances as numbered rows, and which series feed them.

An instance is (rule, device). Instances are numbered by (gateway, device, rule), so those of a gateway stand together;
within one shard that number, not the kind, orders transitions that one value causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from citybrain.errors import ConfigError
from citybrain.model import Device
from streams.kinds import Kind, absence, holding
from streams.kinds.holding import MAIN, ONLY_WHILE, UNLESS, Links, Mutes, Structured
from streams.log import F64, I64, Control
from streams.registry import METRIC_INDEX, Index
from streams.ruleset import Rule, RuleSet, Selector, kind_of, problems

DAY_MS = 86_400_000
NAN = float("nan")


class Compiled(NamedTuple):
    """A rule, its kind and parameters, the table its instances stand in, and what must be equal to carry state over."""

    rule: Rule
    kind: Kind
    parameters: Any
    table: str
    key: bytes


class Table(NamedTuple):
    """One kind's instances. rule, device, number: by instance; first: by gateway; links: by series (or gateway)."""

    name: str
    kind: Kind
    rule: I64
    device: I64
    number: I64
    first: I64
    links: Links
    settings: Structured  # delays, count, guards; or the time-out
    judged: Structured  # what `judge` compares with
    numbers: F64


class Plan(NamedTuple):
    """Every rule and table of one rule set on one registry, for one shard."""

    rules: tuple[Compiled, ...]
    tables: dict[str, Table]


def matches(select: Selector, device: Device) -> bool:
    """Return whether a rule watches a device: every field that is given must match."""
    return (
        select.kind in ("", device.kind)
        and select.zone in ("", device.zone)
        and select.building in ("", device.building)
        and select.device in ("", device.id)
        and (not select.tag or select.tag in device.tags)
    )


def compile_plan(ruleset: RuleSet, index: Index, shard: int) -> Plan:
    """Compile; raises ConfigError with the first thing wrong."""
    rules = compile_rules(ruleset)
    rows: dict[str, list[tuple[int, int, int]]] = {rule.table: [] for rule in rules if rule.table}
    by_kind: dict[str, list[int]] = {}
    number = 0
    for d, device in enumerate(index.devices):
        if index.gateways[index.device_gateway[d]].shard != shard:
            continue
        if device.kind not in by_kind:
            by_kind[device.kind] = [r for r, it in enumerate(rules) if it.rule.select.kind in ("", device.kind)]
        for r in by_kind[device.kind]:
            if rules[r].table and matches(rules[r].rule.select, device) and _feeds(rules[r], index, d):
                rows[rules[r].table].append((r, d, number))
                number += 1
    return Plan(rules, {name: _table(name, rows[name], rules, index) for name in sorted(rows)})


def compile_rules(ruleset: RuleSet) -> tuple[Compiled, ...]:
    """Compile every rule; raises ConfigError with the first thing wrong, an id given twice included."""
    names = [rule.id for rule in ruleset.rules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"rule {name} id", "is given twice")
    return tuple(_compile_rule(rule) for rule in ruleset.rules)


def _compile_rule(rule: Rule) -> Compiled:
    wrong = problems(rule)
    if wrong:
        raise wrong[0]
    kind, parameters = kind_of(rule)
    name = str(rule.when["kind"])
    table = "" if name == "reported" else name
    if getattr(parameters, "clock", "") == "platform":
        table = "absence_platform"
    return Compiled(rule, kind, parameters, table, msgspec.json.encode(rule.when, order="deterministic"))


def _feeds(rule: Compiled, index: Index, device: int) -> bool:
    """Return whether the device has what the rule judges."""
    if rule.kind.JUDGES:
        return bool(index.series_of[device, METRIC_INDEX[rule.kind.metric(rule.parameters)]] >= 0)
    if rule.table == "absence_platform":
        return index.devices[device].id in index.gateway_index
    return bool(index.devices[device].metrics)


def _table(name: str, rows: list[tuple[int, int, int]], rules: Sequence[Compiled], index: Index) -> Table:
    columns = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    rule, device, number = columns[0], columns[1], columns[2]
    gateway = index.device_gateway[device] if len(device) else np.zeros(0, np.int32)
    first = np.searchsorted(gateway, np.arange(len(index.gateways) + 1)).astype(np.int64)
    kind = next(it.kind for it in rules if it.table == name)
    if kind.JUDGES:
        settings, judged, numbers = _judging(name, rules, kind)
        entries, size = _series_entries(rule, device, rules, index), index.n_series
    else:
        settings = np.array([(getattr(it.parameters, "timeout", 0),) for it in rules], absence.RULE)
        judged, numbers = np.zeros(len(rules), absence.RULE), np.zeros(0)
        platform = name == "absence_platform"
        entries = _gateway_entries(gateway) if platform else _telemetry_entries(device, index)
        size = len(index.gateways) if platform else index.n_series
    links = _links(entries, size)
    return Table(name, kind, rule, device, number, first, links, settings[rule], judged[rule], numbers)


def _judging(name: str, rules: Sequence[Compiled], kind: Any) -> tuple[Structured, Structured, F64]:
    """Return, by rule: settings, what is compared with; and the numbers that those rows point into."""
    settings = np.zeros(len(rules), holding.RULE)
    judged = np.zeros(len(rules), kind.TABLE)
    numbers: list[float] = []
    for r, it in enumerate(rules):
        if it.table != name:
            continue
        p, rule = it.parameters, it.rule
        n, within = (p.count.n, p.count.within) if p.count else (1, 0)
        unless = rule.unless.at_least if rule.unless else NAN
        settings[r] = (p.on_delay, p.off_delay, n, within, unless, rule.only_while.at_least if rule.only_while else NAN)
        judged[r], more = kind.row(p)
        if more:
            judged[r]["base"] = len(numbers)
            numbers += more
    return settings, judged, np.array(numbers, np.float64)


def _series_entries(rule: I64, device: I64, rules: Sequence[Compiled], index: Index) -> Iterable[tuple[int, int, int]]:
    for i, (r, d) in enumerate(zip(rule.tolist(), device.tolist(), strict=True)):
        it = rules[r]
        yield int(index.series_of[d, METRIC_INDEX[it.kind.metric(it.parameters)]]), i, MAIN
        for guard, role in ((it.rule.unless, UNLESS), (it.rule.only_while, ONLY_WHILE)):
            series = index.series_of[d, METRIC_INDEX[guard.metric]] if guard else -1
            if series >= 0:
                yield int(series), i, role


def _telemetry_entries(device: I64, index: Index) -> Iterable[tuple[int, int, int]]:
    for i, d in enumerate(device.tolist()):
        for name in index.devices[d].metrics:
            yield int(index.series_of[d, METRIC_INDEX[name]]), i, MAIN


def _gateway_entries(gateway: Any) -> Iterable[tuple[int, int, int]]:
    for i, g in enumerate(gateway.tolist()):
        yield g, i, MAIN


def _links(entries: Iterable[tuple[int, int, int]], size: int) -> Links:
    """Sort entries by series and instance; a guard before what it guards, so that it knows the same value."""
    columns = np.array(sorted((key, i, -role) for key, i, role in entries), np.int64).reshape(-1, 3).T
    start = np.searchsorted(columns[0], np.arange(size + 1)).astype(np.int64)
    return Links(start, columns[1].copy(), (-columns[2]).astype(np.int8))


def compile_mutes(overrides: Sequence[Control], table: Table, plan: Plan, index: Index) -> Mutes:
    """Return which instances are muted when."""
    windows: list[tuple[int, int, int]] = []
    subjects = {override.subject for override in overrides}
    wanted = [index.device_index[subject] for subject in sorted(subjects) if subject in index.device_index]
    for i in np.flatnonzero(np.isin(table.device, wanted)).tolist():
        rule, subject = plan.rules[table.rule[i]].rule.id, index.devices[table.device[i]].id
        windows += [(i, o.from_ms, o.until_ms) for o in overrides if o.subject == subject and o.rule in ("*", rule)]
    columns = np.array(sorted(windows), np.int64).reshape(-1, 3).T
    start = np.searchsorted(columns[0], np.arange(len(table.rule) + 1)).astype(np.int64)
    return Mutes(start, columns[1].copy(), columns[2].copy())


def add_override(overrides: Sequence[Control], override: Control) -> tuple[Control, ...]:
    """Return the overrides with one more, which replaces one of equal subject, rule, start; old ones go after 30 days.

    An override whose end is not after its start therefore takes one back.
    """
    same = (override.subject, override.rule, override.from_ms)
    kept = [
        o for o in overrides
        if (o.subject, o.rule, o.from_ms) != same and o.until_ms + 30 * DAY_MS > override.at
    ]  # fmt: skip
    return (*kept, override) if override.until_ms > override.from_ms else tuple(kept)
