"""How long a condition must hold: the life of one rule instance, the same for every kind that judges single values.

A kind's `judge` says of each value whether the condition begins (+1), ends (-1) or stays as it is (0); what follows
from that is here: on-delay, off-delay, count in a window, guards and mutes.

    idle ──begins──▶ pending ──on-delay──▶ raised ──ends──▶ clearing ──off-delay──▶ idle
                        │                     ▲                │
                      ends, guarded          n-th        begins again
                        ▼                     │
                       idle    pending ──▶ held (fewer than n within the window) ──ends──▶ idle

A deadline fires when the gateway's stream time reaches it, or at a value of the series itself that is as late; always
before that value is judged. Sequential per value, + - and comparisons only: batches never change a result.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.config import Duration
from streams.log import F64, I64, U32

I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
U16 = npt.NDArray[np.uint16]
Structured = npt.NDArray[np.void]

NEVER = np.int64(2**63 - 1)
MAX_COUNT = 16
IDLE, PENDING, HELD, RAISED, CLEARING = range(5)
MAIN, UNLESS, ONLY_WHILE = range(3)

# One row per rule. `unless`, `only_while`: the guards' limits, NaN where there is none.
RULE = np.dtype([("on_delay", "i8"), ("off_delay", "i8"), ("n", "i8"), ("within", "i8"), ("unless", "f8"),
                 ("only_while", "f8")])  # fmt: skip
# One row per instance. `since`: when the condition began (or ended, while clearing), so the deadline of one that is
# pending or clearing is `since` and the rule's delay. `term`: which of the kind's metrics `value` is of.
STATE = np.dtype([("since", "i8"), ("value", "f8"), ("term", "i1")])
# What a kernel hands back: the position of the value that caused it, the instance, and the evidence.
OUT = np.dtype([("position", "i8"), ("instance", "i8"), ("raised", "i8"), ("at", "i8"), ("value", "f8"),
                ("since", "i8"), ("count", "i8"), ("term", "i8")])  # fmt: skip


class Batch(NamedTuple):
    """The values of many records, in order. `stream`, `live`: their gateway's times once the value was taken, in ms."""

    gateway: I32
    t: I64
    value: F64
    series: U32
    used: I8
    stream: I64
    live: I64


class Links(NamedTuple):
    """Which instances a series feeds: entries `start[s]..start[s+1]` of `instance`, each in a role.

    `term[e]`: which of `kind.metrics(parameters)` the entry's series is; 0 for a guard's. plain: every entry is a MAIN
    one of term 0, and `instance[e]` is e, so a kernel in a hurry need not look it up (in random order worth a third).
    """

    start: I32
    instance: I32
    role: I8
    term: I8
    plain: bool


class Gateways(NamedTuple):
    """Instances are numbered by gateway: `first[g]..first[g+1]`; `due[g]`: none of them needs a look before."""

    first: I64
    due: I64


class Mutes(NamedTuple):
    """Overrides: entry m mutes `instance[m]` in [begin, end); sorted by instance and begin."""

    instance: I32
    begin: I64
    end: I64


class Life(NamedTuple):
    """What the instances of one table remember of their condition; a few bytes each, so that a city stays in the cache.

    Only instances of rules with a guard or a count have a place beside: `side[i]`, -1 for the others (or no `side` at
    all where the table has no such rule). `gate[k]`: last values of the guards (unless, only_while), NaN while unknown;
    `ring[k]`: times at which the condition began last; `seen[k]`: how many of them, at most 2n - 1.
    """

    phase: I8
    state: Structured
    side: I32
    gate: F64
    ring: I64
    seen: I8


class Count(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The condition must begin `n` times (at most 16) `within` a duration."""

    n: int
    within: Duration


def count_problems(count: Count | None) -> list[tuple[str, str]]:
    """Return what is wrong with a count, as (field, what)."""
    if count is None:
        return []
    found = []
    if not 2 <= count.n <= MAX_COUNT:
        found.append(("count.n", f"expected 2..{MAX_COUNT}, got {count.n}"))
    if count.within <= 0:
        found.append(("count.within", "expected a duration longer than 0"))
    return found


def hold(
    batch: Batch, links: Links, gateways: Gateways, mutes: Mutes, verdict: I8, rule: U16, settings: Structured,
    life: Life, out: Structured,
) -> tuple[Structured, int]:  # fmt: skip
    """Carry every instance over the batch; return (out, rows used). One function: numba's cache cannot see into two.

    `verdict` holds one entry per (used value, entry of its series in the role MAIN), in order; `rule[i]` is the row of
    `settings` that instance i runs with.
    """
    rows = 0
    judged = 0
    plain = links.plain
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series = batch.series[p]
        low, high = links.start[series], links.start[series + 1]
        gateway = batch.gateway[p]
        base, scanned = 0, 0
        if batch.stream[p] >= gateways.due[gateway]:
            base, scanned = gateways.first[gateway], gateways.first[gateway + 1] - gateways.first[gateway]
            gateways.due[gateway] = NEVER  # the scan finds the next one
        else:  # nearly every value of a healthy city: nothing holds and nothing begins
            while (
                low < high and (plain or links.role[low] == MAIN) and verdict[judged] <= 0
                and life.phase[low if plain else links.instance[low]] == IDLE
            ):  # fmt: skip
                low += 1
                judged += 1
            if low == high:
                continue
        t, value = batch.t[p], batch.value[p]
        for j in range(scanned + high - low):
            entry = low + j - scanned
            role = -1 if j < scanned else links.role[entry]
            i = base + j if j < scanned else links.instance[entry]
            phase = life.phase[i]
            if role in (UNLESS, ONLY_WHILE):
                life.gate[life.side[i], role - UNLESS] = value
                continue
            if role == MAIN and phase == IDLE and verdict[judged] <= 0:
                judged += 1
                continue
            if role == -1 and phase not in (PENDING, CLEARING):
                continue
            now = batch.stream[p] if j < scanned else t
            s, own = life.state[i], settings[rule[i]]
            for step in range(2):
                blocked = False
                if own.unless == own.unless or own.only_while == own.only_while:
                    k = life.side[i]
                    blocked = life.gate[k, 0] >= own.unless or (
                        own.only_while == own.only_while and not life.gate[k, 1] >= own.only_while
                    )
                waits = phase in (PENDING, CLEARING)
                at = s.since + (own.on_delay if phase == PENDING else own.off_delay)
                if waits and at <= now:
                    raises = phase == PENDING
                    silent = blocked
                    if raises and len(mutes.instance) > 0:
                        for m in range(np.searchsorted(mutes.instance, i), len(mutes.instance)):
                            if mutes.instance[m] != i:
                                break
                            silent = silent or mutes.begin[m] <= at < mutes.end[m]
                    if raises and silent:
                        phase = IDLE
                    else:
                        since, enough = s.since, True
                        if raises and own.n > 1:
                            k, n = life.side[i], own.n
                            life.ring[k, life.seen[k] % n] = since
                            seen = life.seen[k] + 1
                            since = life.ring[k, seen % n] if seen >= n else since
                            enough = seen >= n and since >= s.since - own.within
                            life.seen[k] = seen if seen < 2 * n else n
                        if enough:
                            if rows == len(out):
                                bigger = np.empty(2 * len(out), out.dtype)
                                bigger[:rows] = out
                                out = bigger
                            row = out[rows]
                            row.position, row.instance, row.raised = p, i, raises
                            row.at, row.value, row.since = at, s.value, since
                            row.count, row.term = own.n if raises else 1, s.term
                            rows += 1
                            phase = RAISED if raises else IDLE
                        else:
                            phase = HELD
                if step == 1 or role != MAIN:
                    break
                change = verdict[judged]
                judged += 1
                s.value, s.term = value, links.term[entry]
                if phase == PENDING and (blocked or change < 0):
                    phase = IDLE
                elif phase == IDLE and change > 0 and not blocked:
                    phase, s.since = PENDING, t
                elif phase == HELD and change < 0:
                    phase = IDLE
                elif phase == RAISED and change < 0:
                    phase, s.since = CLEARING, t
                elif phase == CLEARING and change > 0:
                    phase = RAISED
            life.phase[i] = phase
            if phase in (PENDING, CLEARING):
                at = s.since + (own.on_delay if phase == PENDING else own.off_delay)
                gateways.due[gateway] = min(gateways.due[gateway], at)
    return out, rows
