"""A rule set compiled against a registry: rule instances as numbered rows, and which series feed them.

An instance is (rule, device). The instances of a table are numbered by device (that is by gateway), then by the first
series they judge, then by rule: those of a series stand together in memory, those of a gateway too. What orders the
transitions that one value causes is (device, rule), not that number and not the kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from citybrain.clock import iso
from citybrain.errors import ConfigError
from streams.kinds import Kind, absence, holding
from streams.kinds.holding import I32, MAIN, ONLY_WHILE, U16, UNLESS, Links, Mutes, Structured
from streams.log import F64, I64, Control
from streams.registry import Index, Mask
from streams.ruleset import Rule, RuleSet, Selector, kind_of, overridden, problems

DAY_MS = 86_400_000
NAN = float("nan")
ANY_RULE = -1
MAX_RULES = 2**16  # an instance names its rule in 16 bits


class Compiled(NamedTuple):
    """A rule, its kind and parameters, the table its instances stand in, and what must be equal to carry state over.

    order: the rule's place in its rule set, which that of its overrides is too.
    """

    rule: Rule
    kind: Kind
    parameters: Any
    table: str
    key: bytes
    order: int


class Variant(NamedTuple):
    """An override of a rule: the row of its parameters, and for whom until when."""

    row: int
    order: int
    select: Selector
    until_ms: int


class Table(NamedTuple):
    """One kind's instances. rule, device: by instance; first: by gateway; links: by series (or gateway).

    settings (delays, count, guards; or the time-out) and judged (what `judge` compares with) have a row per rule and
    per override; `rule[i]` is the row that is in force for instance i.
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
    """Every rule and table of one rule set on one registry, for one shard.

    rules: the rule set's in their order, then what their overrides make of them. orders: by row.
    """

    rules: tuple[Compiled, ...]
    tables: dict[str, Table]
    variants: tuple[Variant, ...]
    orders: I64


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


def compile_plan(ruleset: RuleSet, index: Index, shard: int, at_ms: int = 0) -> Plan:
    """Compile, with the overrides that hold at `at_ms`; raises ConfigError with the first thing wrong."""
    rules, variants = compile_rules(ruleset)
    shards = np.array([gateway.shard for gateway in index.gateways], np.int32)
    ours = shards[index.device_gateway] == shard if len(shards) else np.zeros(0, np.bool_)
    feeds: dict[str, list[Feed]] = {rule.table: [] for rule in rules if rule.table}
    for rule in rules[: len(ruleset.rules)]:
        if rule.table:
            feeds[rule.table].append(_feed(rule, ours & reach(rule, index), index))
    tables = {name: _table(name, feeds[name], rules, index) for name in sorted(feeds)}
    plan = Plan(rules, tables, variants, np.array([rule.order for rule in rules], np.int64))
    for table in tables.values():
        table.rule[:] = rows_in_force(plan, table, index, at_ms)
    return plan


def rows_in_force(plan: Plan, table: Table, index: Index, at_ms: int) -> U16:
    """Return, by instance, the row of its rule, or of the rule's first override that holds for its device then."""
    order = plan.orders[table.rule]
    found = order.astype(np.uint16)
    for variant in reversed(plan.variants):
        if variant.until_ms > at_ms and plan.rules[variant.row].table == table.name:
            found[(order == variant.order) & select_devices(variant.select, index)[table.device]] = variant.row
    return found


def reach(rule: Compiled, index: Index) -> Mask:
    """Return the devices of all shards that a rule selects and that have what it judges."""
    mask = select_devices(rule.rule.select, index)
    if rule.kind.JUDGES:
        has = [index.series_having(name) >= 0 for name in rule.kind.metrics(rule.parameters)]
        enough = getattr(rule.kind, "enough", None)
        possible: Mask = mask & (enough(rule.parameters, has) if enough else np.all(has, axis=0))
        return possible
    return mask & (index.is_gateway if rule.table == "absence_platform" else index.telemetry_series > 0)


def _feed(rule: Compiled, mask: Mask, index: Index) -> Feed:
    names = rule.kind.metrics(rule.parameters) if rule.kind.JUDGES else ()
    series = tuple(index.series_having(name)[mask] for name in names)
    return Feed(rule.order, np.flatnonzero(mask).astype(np.int32), series)


def unusual(ruleset: RuleSet, index: Index, at_ms: int) -> Iterator[tuple[str, str, str]]:
    """Yield (rule id, field, what) where a valid rule set is probably not what was meant."""
    rules, variants = compile_rules(ruleset)
    kinds, _ = index.label("kind")
    for rule in rules[: len(ruleset.rules)]:
        if not rule.table:
            continue  # whoever reports names the subject
        mask = reach(rule, index)
        if not mask.any():
            yield rule.rule.id, "select", _reaches_nothing(rule, index)
        if mask.sum() * 2 > len(mask) and len(np.unique(kinds[mask])) > 1:
            yield rule.rule.id, "select", f"selects {mask.sum()} of all {len(mask)} devices, of several kinds"
        for n, variant in enumerate(it for it in variants if it.order == rule.order):
            if variant.until_ms <= at_ms:
                yield rule.rule.id, f"overrides[{n}].until", f"is over since {iso(variant.until_ms)}; it does nothing"
            if not (mask & select_devices(variant.select, index)).any():
                yield rule.rule.id, f"overrides[{n}].select", "selects none of the rule's devices"


def _reaches_nothing(rule: Compiled, index: Index) -> str:
    selected = int(select_devices(rule.rule.select, index).sum())
    if not selected:
        return f"selects none of {len(index.devices)} devices"
    wanted = ", ".join(rule.kind.metrics(rule.parameters)) if rule.kind.JUDGES else "what it listens to"
    return f"selects {selected} of {len(index.devices)} devices, and none of them has {wanted}"


def compile_rules(ruleset: RuleSet) -> tuple[tuple[Compiled, ...], tuple[Variant, ...]]:
    """Compile every rule and override; raises ConfigError with the first thing wrong, an id given twice included."""
    names = [rule.id for rule in ruleset.rules]
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"rule {name} id", "is given twice")
    rows = [_compile_rule(rule, order) for order, rule in enumerate(ruleset.rules)]
    variants = []
    for order, rule in enumerate(ruleset.rules):
        for override in rule.overrides:
            variants.append(Variant(len(rows), order, override.select, override.until_ms))
            rows.append(_compiled(overridden(rule, override), order))
    if len(rows) > MAX_RULES:
        raise ConfigError("rule set", f"{len(rows)} rules and overrides; expected at most {MAX_RULES}")
    return tuple(rows), tuple(variants)


def _compile_rule(rule: Rule, order: int) -> Compiled:
    wrong = problems(rule)
    if wrong:
        raise wrong[0]
    return _compiled(rule, order)


def _compiled(rule: Rule, order: int) -> Compiled:
    kind, parameters = kind_of(rule)
    name = str(rule.when["kind"])
    table = "" if name == "reported" else name
    if getattr(parameters, "clock", "") == "platform":
        table = "absence_platform"
    return Compiled(rule, kind, parameters, table, msgspec.json.encode(rule.when, order="deterministic"), order)


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
        beside = np.isin(rule, [it.order for it in rules if _has_side(it)])  # an override may bring the count
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


class Muted(NamedTuple):
    """Overrides spread over the devices they mean: one row per (override, device). order: of the rule, ANY_RULE all."""

    device: I64
    order: I64
    begin: I64
    end: I64


def spread(overrides: Sequence[Control], plan: Plan, index: Index) -> Muted:
    """Return whom the overrides mute; one of a rule that is not there mutes nobody."""
    orders = {it.rule.id: it.order for it in plan.rules} | {"*": ANY_RULE}
    known = [override for override in overrides if override.rule in orders]
    devices = [index.under(override.subject) for override in known]
    sizes = [len(each) for each in devices]
    rows = np.array([(orders[o.rule], o.from_ms, o.until_ms) for o in known], np.int64).reshape(-1, 3)
    return Muted(np.concatenate([np.zeros(0, np.int64), *devices]), *np.repeat(rows, sizes, axis=0).T)


def compile_mutes(muted: Muted, table: Table, plan: Plan) -> Mutes:
    """Return which instances of a table are muted when."""
    low, high = np.searchsorted(table.device, muted.device), np.searchsorted(table.device, muted.device, "right")
    many = high - low
    instance = np.repeat(low - (np.cumsum(many) - many), many) + np.arange(many.sum())
    order, begin, end = (np.repeat(column, many) for column in (muted.order, muted.begin, muted.end))
    meant = np.flatnonzero((order == ANY_RULE) | (order == plan.orders[table.rule[instance]]))
    meant = meant[np.lexsort((end[meant], begin[meant], instance[meant]))]
    return Mutes(instance[meant].astype(np.int32), begin[meant], end[meant])


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
