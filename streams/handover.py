"""From one registry and rule set to the next: what is remembered goes on by gateway, device, metric and rule id."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streams.batch import Times
from streams.log import I64
from streams.plan import Plan, Table
from streams.registry import METRIC_NAMES, Index
from streams.watches import Watch


class InForce(NamedTuple):
    """What the engine runs with, and what it remembers by it."""

    registry: Index | None
    plan: Plan | None
    watches: dict[str, Watch]


def carry_times(times: Times, before: Index | None, index: Index) -> Times:
    """Return the times of gateways and series under another registry; by gateway id, by (device, metric)."""
    fresh = Times.fresh(len(index.gateways), index.n_series)
    if before is None or not before.devices:
        return fresh
    for g, gateway in enumerate(index.gateways):
        old = before.gateway_index.get(gateway.id)
        if old is not None:
            fresh.stream[g], fresh.live[g] = times.stream[old], times.live[old]
    olds, news = shared_series(before, index)
    fresh.last_t[news], fresh.last_v[news] = times.last_t[olds], times.last_v[olds]
    return fresh


def shared_series(before: Index, after: Index) -> tuple[I64, I64]:
    """Return the numbers of the series that both have, (device, metric) by (device, metric)."""
    places, count = before.device_index, len(after.devices)
    device = np.fromiter((places.get(d.id, -1) for d in after.devices), np.int64, count)[after.series_device]
    metrics = len(METRIC_NAMES)
    keys = before.series_device.astype(np.int64) * metrics + before.series_metric
    wanted = np.where(device >= 0, device * metrics + after.series_metric, -1)
    if not len(keys):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    sorter = np.argsort(keys)
    found = sorter[np.minimum(np.searchsorted(keys, wanted, sorter=sorter), len(keys) - 1)]
    new = np.flatnonzero(keys[found] == wanted)
    return found[new], new


class Gone(NamedTuple):
    """What was raised and exists no longer; they sort as transitions do."""

    device: int
    order: int
    rule: str
    subject: str


def carry_over(old: InForce, new: InForce) -> list[Gone]:
    """Carry state over by table, rule id and subject; return what was raised and is gone."""
    if old.registry is None or old.plan is None:
        return []
    gone: list[Gone] = []
    for name, watch in old.watches.items():
        table, kept = watch.table, np.zeros(len(watch.table.rule), np.bool_)
        if name in new.watches and new.plan is not None and new.registry is not None:
            adopting = new.watches[name]
            now = instances_now(old, table, new, adopting.table)
            kept = now >= 0
            theirs, mine = np.flatnonzero(kept), now[kept]
            known: dict[bytes, int] = {}
            before, after = key_numbers(old.plan, known), key_numbers(new.plan, known)
            same = before[table.rule[theirs]] == after[adopting.table.rule[mine]]
            adopting.adopt(mine, watch, theirs, same)
        for j in np.flatnonzero(watch.raised() & ~kept).tolist():
            device, rule = int(table.device[j]), old.plan.rules[table.rule[j]]
            gone.append(Gone(device, rule.order, rule.rule.id, old.registry.devices[device].id))
    return gone


def key_numbers(plan: Plan, known: dict[bytes, int] | None = None) -> I64:
    """Return, by row, a number that is equal where the condition is; `known`: the numbers given so far."""
    known = {} if known is None else known
    return np.array([known.setdefault(it.key, len(known)) for it in plan.rules], np.int64)


def instances_now(old: InForce, before: Table, new: InForce, after: Table) -> I64:
    """Return, by old instance, the new one of the same device and rule, -1 where there is none."""
    assert old.registry is not None
    assert old.plan is not None
    assert new.registry is not None
    assert new.plan is not None
    places, rules = new.registry.device_index, {it.rule.id: it.order for it in new.plan.rules}
    device = np.fromiter((places.get(d.id, -1) for d in old.registry.devices), np.int64, len(old.registry.devices))
    order = np.array([rules.get(it.rule.id, -1) for it in old.plan.rules], np.int64)
    d, r = device[before.device], order[before.rule]
    wanted = np.where((d >= 0) & (r >= 0), d * len(new.plan.rules) + r, -1)
    keys = after.device.astype(np.int64) * len(new.plan.rules) + new.plan.orders[after.rule]
    sorter = np.argsort(keys)
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    found = sorter[np.minimum(np.searchsorted(keys, wanted, sorter=sorter), len(keys) - 1)]
    return np.where(keys[found] == wanted, found, -1)
