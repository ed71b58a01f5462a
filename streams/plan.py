"""A rule set compiled against a registry: rule instances as numbered rows, and which series feed them.

An instance is (rule, device). The instances of a table are numbered by device (that is by gateway), then by the first
series they judge, then by rule: those of a series stand together in memory, those of a gateway too. What orders the
transitions that one value causes is (device, rule), not that number and not the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from citybrain.errors import ConfigError
from streams.kinds import Kind, absence, holding
from streams.kinds.holding import I32, MAIN, ONLY_WHILE, U16, UNLESS, Links, Mutes, Structured
from streams.log import F64, I64, Control
from streams.registry import Index, Mask
from streams.ruleset import Rule, RuleSet, Selector, kind_of, problems

DAY_MS = 86_400_000
NAN = float("nan")
MAX_RULES = 2**16  # an instance names its rule in 16 bits


class Compiled(NamedTuple):
    """A rule, its kind and parameters, the table its instances stand in, and what must be equal to carry state over."""

    rule: Rule
    kind: Kind
    parameters: Any
    table: str
    key: bytes


class Table(NamedTuple):
    """One kind's instances. rule, device: by instance; first: by gateway; links: by series (or gateway).

    settings (delays, count, guards; or the time-out) and judged (what `judge` compares with) have a row per rule.
    side: by instance, its place beside the others where its rule has a guard or a count; empty where none has.
    """

    name: str
    kind: Kind
    rule: U16
    device: I32
    first: I64
    links: Links
    settings: Structured
    judged: Structured
    numbers: F64
    side: I32


class Plan(NamedTuple):
    """Every rule and table of one rule set on one registry, for one shard."""

    rules: tuple[Compiled, ...]
    tables: dict[str, Table]


class Feed(NamedTuple):
    """One rule on the devices that have what it judges; `series[term]` by device of `device`, -1 where it lacks one."""

    rule: int
    device: I32
    series: tuple[I32, ...]


def select_devices(select: Selector, index: Index) -> Mask:
    """Return which devices a rule watches: every field that is given must match."""
    mask = np.ones(len(index.devices), np.bool_)
    for field in Selector.__struct_fields__:
        wanted = getattr(select, field)
        if wanted:
            mask &= index.having(field, wanted)
    return mask


def compile_plan(ruleset: RuleSet, index: Index, shard: int) -> Plan:
    """Compile; raises ConfigError with the first thing wrong."""
    rules = compile_rules(ruleset)
    shards = np.array([gateway.shard for gateway in index.gateways], np.int32)
    ours = shards[index.device_gateway] == shard if len(shards) else np.zeros(0, np.bool_)
    feeds: dict[str, list[Feed]] = {rule.table: [] for rule in rules if rule.table}
    for r, rule in enumerate(rules):
        if rule.table:
            feeds[rule.table].append(_feed(r, rule, ours & select_devices(rule.rule.select, index), index))
    return Plan(rules, {name: _table(name, feeds[name], rules, index) for name in sorted(feeds)})


def _feed(r: int, rule: Compiled, mask: Mask, index: Index) -> Feed:
    """Return the devices among `mask` that have what the rule judges."""
    if rule.kind.JUDGES:
        series = [index.series_having(name) for name in rule.kind.metrics(rule.parameters)]
        has = [each >= 0 for each in series]
        enough = getattr(rule.kind, "enough", None)
        mask &= enough(rule.parameters, has) if enough else np.all(has, axis=0)
        return Feed(r, _where(mask), tuple(each[mask] for each in series))
    if rule.table == "absence_platform":
        return Feed(r, _where(mask & index.is_gateway), ())
    return Feed(r, _where(mask & (index.telemetry_series > 0)), ())


def _where(mask: Mask) -> I32:
    return np.flatnonzero(mask).astype(np.int32)


def compile_rules(ruleset: RuleSet) -> tuple[Compiled, ...]:
    """Compile every rule; raises ConfigError with the first thing wrong, an id given twice included."""
    names = [rule.id for rule in ruleset.rules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"rule {name} id", "is given twice")
    if len(names) > MAX_RULES:
        raise ConfigError("rule set", f"{len(names)} rules; expected at most {MAX_RULES}")
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


def _table(name: str, feeds: Sequence[Feed], rules: Sequence[Compiled], index: Index) -> Table:
    """Number the instances by device, first series and rule, so that those of a series and a gateway stand together."""
    kind = rules[feeds[0].rule].kind
    device = np.concatenate([feed.device for feed in feeds])
    rule = np.repeat(np.array([feed.rule for feed in feeds], np.uint16), [len(feed.device) for feed in feeds])
    lead = np.concatenate([_lead(feed) for feed in feeds])
    order = np.argsort(lead.astype(np.int64) * len(rules) + rule)
    device, rule = device[order], rule[order]
    place = np.empty(len(order), np.int32)  # where the instances of each feed went
    place[order] = np.arange(len(order), dtype=np.int32)
    first = np.searchsorted(index.device_gateway[device], np.arange(len(index.gateways) + 1)).astype(np.int64)
    side = np.zeros(0, np.int32)
    if kind.JUDGES:
        settings, judged, numbers = _judging(name, rules, kind)
        links = _series_links(feeds, place, rules, index)
        beside = np.array([_has_side(it) for it in rules], np.bool_)[rule]
        if beside.any():
            side = np.where(beside, np.cumsum(beside) - 1, -1).astype(np.int32)
    else:
        settings = np.array([(getattr(it.parameters, "timeout", 0),) for it in rules], absence.RULE)
        judged, numbers = np.zeros(0, absence.RULE), np.zeros(0)
        links = _gateway_links(device, index) if name == "absence_platform" else _telemetry_links(device, index)
    return Table(name, kind, rule, device, first, links, settings, judged, numbers, side)


def _lead(feed: Feed) -> I32:
    """Return by device what numbers its instance: the first series that the rule has of it."""
    if not feed.series:
        return feed.device
    lead = feed.series[0]
    for each in feed.series[1:]:
        lead = np.where(lead >= 0, lead, each)
    return lead


def _has_side(it: Compiled) -> bool:
    return bool(it.rule.unless or it.rule.only_while or getattr(it.parameters, "count", None))


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


def _series_links(feeds: Sequence[Feed], place: I32, rules: Sequence[Compiled], index: Index) -> Links:
    """Link every series to what it feeds; a guard stands before what it guards, so that it knows the same value."""
    parts: list[tuple[I32, I32, int, int]] = []  # series, instance, role, term
    at = 0
    for feed in feeds:
        mine, rule = place[at : at + len(feed.device)], rules[feed.rule].rule
        at += len(feed.device)
        parts += [(series[series >= 0], mine[series >= 0], MAIN, term) for term, series in enumerate(feed.series)]
        for guard, role in ((rule.unless, UNLESS), (rule.only_while, ONLY_WHILE)):
            if guard:
                series = index.series_having(guard.metric)[feed.device]
                parts.append((series[series >= 0], mine[series >= 0], role, 0))
    sizes = [len(part[0]) for part in parts]
    series_of, instance = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    roles, terms = (np.repeat(np.array([part[k] for part in parts], np.int8), sizes) for k in (2, 3))
    key = (series_of.astype(np.int64) * (len(place) + 1) + instance) * 3 + (ONLY_WHILE - roles)
    order = np.argsort(key, kind="stable")
    start = np.searchsorted(series_of[order], np.arange(index.n_series + 1)).astype(np.int32)
    instance, roles, terms = instance[order], roles[order], terms[order]
    plain = len(parts) == len(feeds) and bool((instance == np.arange(len(instance))).all())
    return Links(start, instance, roles, terms, plain)


def _telemetry_links(device: I32, index: Index) -> Links:
    """Link the telemetry series of every device to its instances, which stand together."""
    edge = np.searchsorted(device, np.arange(len(index.devices) + 1))
    own = index.series_device
    many = np.where(index.series_lane == 0, edge[own + 1] - edge[own], 0)
    start = np.concatenate((np.zeros(1, np.int64), np.cumsum(many)))
    instance = np.repeat(edge[own] - start[:-1], many) + np.arange(start[-1])
    return _all_main(start, instance)


def _gateway_links(device: I32, index: Index) -> Links:
    start = np.searchsorted(index.device_gateway[device], np.arange(len(index.gateways) + 1))
    return _all_main(start, np.arange(len(device)))


def _all_main(start: I64, instance: I64) -> Links:
    zeros = np.zeros(len(instance), np.int8)
    return Links(start.astype(np.int32), instance.astype(np.int32), zeros, zeros, False)


def compile_mutes(overrides: Sequence[Control], table: Table, plan: Plan, index: Index) -> Mutes:
    """Return which instances are muted when."""
    parts = [
        (instances, override.from_ms, override.until_ms)
        for override in overrides
        if len(instances := _muted(override, table, plan, index))
    ]
    sizes = [len(part[0]) for part in parts]
    begin, end = (np.repeat(np.array([part[k] for part in parts], np.int64), sizes) for k in (1, 2))
    instance = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int32)
    order = np.lexsort((end, begin, instance))
    return Mutes(instance[order], begin[order], end[order])


def _muted(override: Control, table: Table, plan: Plan, index: Index) -> I32:
    devices = index.under(override.subject)
    low, high = np.searchsorted(table.device, devices), np.searchsorted(table.device, devices, "right")
    many = high - low
    found = np.repeat(low - (np.cumsum(many) - many), many) + np.arange(many.sum())
    if override.rule != "*":
        wanted = [r for r, it in enumerate(plan.rules) if it.rule.id == override.rule]
        found = found[np.isin(table.rule[found], wanted)]
    return found.astype(np.int32)


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
