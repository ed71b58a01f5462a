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
Structured = npt.NDArray[np.void]

NEVER = np.int64(2**63 - 1)
MAX_COUNT = 16
IDLE, PENDING, HELD, RAISED, CLEARING = range(5)
MAIN, UNLESS, ONLY_WHILE = range(3)

# One row per rule instance. `unless`, `only_while`: the guards' limits, NaN where there is none.
RULE = np.dtype([("on_delay", "i8"), ("off_delay", "i8"), ("n", "i8"), ("within", "i8"), ("unless", "f8"),
                 ("only_while", "f8")])  # fmt: skip
# `since`: when the condition began (or ended, while clearing). `gate_*`: the guards' last values, NaN while unknown.
STATE = np.dtype([("phase", "i8"), ("deadline", "i8"), ("since", "i8"), ("value", "f8"), ("seen", "i8"),
                  ("gate_unless", "f8"), ("gate_only", "f8")])  # fmt: skip
# What a kernel hands back: the position of the value that caused it, the instance, and the evidence.
OUT = np.dtype([("position", "i8"), ("instance", "i8"), ("raised", "i8"), ("at", "i8"), ("value", "f8"),
                ("since", "i8"), ("count", "i8")])  # fmt: skip


class Batch(NamedTuple):
    """The values of many records, in order. `stream`, `live`: their gateway's times once the value was taken, in ms."""

    t: I64
    value: F64
    series: U32
    used: I8
    stream: I64
    live: I64


class Links(NamedTuple):
    """Which instances a series feeds: entries `start[s]..start[s+1]` of `instance`, each in a role."""

    start: I64
    instance: I64
    role: I8


class Gateways(NamedTuple):
    """Instances are numbered by gateway: `first[g]..first[g+1]`; `due[g]`: none of them needs a look before."""

    of_series: I32
    first: I64
    due: I64


class Mutes(NamedTuple):
    """Overrides: entries `start[i]..start[i+1]` mute instance i in [begin, end), sorted by `begin`."""

    start: I64
    begin: I64
    end: I64


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
    batch: Batch, links: Links, gateways: Gateways, mutes: Mutes, verdict: I8, rule: Structured, state: Structured,
    ring: I64, out: Structured,
) -> tuple[Structured, int]:  # fmt: skip
    """Carry every instance over the batch; return (out, rows used). One function: numba's cache cannot see into two.

    `verdict` holds one entry per (used value, entry of its series in the role MAIN), in order; `ring[i]` the times at
    which the condition began last.
    """
    rows = 0
    judged = 0
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, t, value = batch.series[p], batch.t[p], batch.value[p]
        gateway = gateways.of_series[series]
        low = links.start[series]
        own = links.start[series + 1] - low
        base = gateways.first[gateway]
        scanned = gateways.first[gateway + 1] - base if batch.stream[p] >= gateways.due[gateway] else 0
        least = NEVER
        if rows + 2 * (scanned + own) > len(out):
            bigger = np.empty(2 * len(out) + 2 * (scanned + own), out.dtype)
            bigger[:rows] = out[:rows]
            out = bigger
        for j in range(scanned + own):
            role = -1 if j < scanned else links.role[low + j - scanned]
            i = base + j if j < scanned else links.instance[low + j - scanned]
            now = batch.stream[p] if j < scanned else t
            s = state[i]
            if role == UNLESS:
                s.gate_unless = value
                continue
            if role == ONLY_WHILE:
                s.gate_only = value
                continue
            if role == MAIN and s.phase == IDLE and verdict[judged] <= 0:  # nearly every value of a healthy city
                judged += 1
                continue
            for step in range(2):
                blocked = s.gate_unless >= rule[i].unless or (
                    rule[i].only_while == rule[i].only_while and not s.gate_only >= rule[i].only_while
                )
                if s.deadline <= now:  # only pending and clearing instances have one
                    at = s.deadline
                    s.deadline = NEVER
                    silent = blocked
                    for m in range(mutes.start[i], mutes.start[i + 1]):
                        silent = silent or mutes.begin[m] <= at < mutes.end[m]
                    raises = s.phase == PENDING
                    if raises and silent:
                        s.phase = IDLE
                    else:
                        since, n = s.since, rule[i].n
                        if raises:
                            ring[i, s.seen % n] = since
                            s.seen += 1
                            since = ring[i, s.seen % n] if s.seen >= n else since
                        if raises and (s.seen < n or since < s.since - rule[i].within):
                            s.phase = HELD
                        else:
                            s.phase = RAISED if raises else IDLE
                            row = out[rows]
                            row.position, row.instance, row.raised = p, i, raises
                            row.at, row.value, row.since = at, s.value, since
                            row.count = n if raises else 1
                            rows += 1
                if step == 1 or role != MAIN:
                    break
                change = verdict[judged]
                judged += 1
                s.value = value
                if s.phase == PENDING and (blocked or change < 0):
                    s.phase, s.deadline = IDLE, NEVER
                elif s.phase == IDLE and change > 0 and not blocked:
                    s.phase, s.since, s.deadline = PENDING, t, t + rule[i].on_delay
                elif s.phase == HELD and change < 0:
                    s.phase = IDLE
                elif s.phase == RAISED and change < 0:
                    s.phase, s.since, s.deadline = CLEARING, t, t + rule[i].off_delay
                elif s.phase == CLEARING and change > 0:
                    s.phase, s.deadline = RAISED, NEVER
            if j < scanned:
                least = min(least, s.deadline)
                if j == scanned - 1:
                    gateways.due[gateway] = least
            else:
                gateways.due[gateway] = min(gateways.due[gateway], s.deadline)
    return out, rows
