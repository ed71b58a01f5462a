"""Kind `shift`: a value that leaves the series' own recent level, and comes back at once (`spike`) or stays (`level`).

The level is the exact median of the last nine reports that were not away from it, and it is judged from the fifth on:
a median follows a daily rhythm, and up to four wild values of nine cannot move it (breakdown point 4/9, Rousseeuw and
Croux 1993). Away is further above than `up` or further below than `down`, and, where `spreads` is given, than so many
robust standard deviations (1.4826 times the median distance from the median). A value is back within `back` of that.
Nothing is learned while a value is away, so a fault never becomes the normal level; `accept`, where given, is the time
after which a level is taken for the new one all the same.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from citybrain.config import Duration, duration_text
from citybrain.model import Evidence
from citybrain.units import METRICS
from streams.kinds.holding import I8, MAIN, U16, Batch, Count, Links, Structured, count_problems
from streams.log import F64

JUDGES = True
RING, LEARNED = 9, 5
GAUSSIAN = 1.4826  # median distance from the median to standard deviation, for normal noise
SAMPLE = """\
when:
  kind: shift
  metric: pressure_mpa
  shape: level
  up: 0.2
  down: 0.35
  reports: 3
"""
TABLE = np.dtype([("up", "f8"), ("down", "f8"), ("spreads", "f8"), ("back", "f8"), ("reports", "i8"),
                  ("accept", "i8"), ("spike", "i8")])  # fmt: skip
# The last `known` values in the order they came (`next` is the oldest's place once all nine are there) and in order of
# size; how many reports it has been away by now, and since when. Zeros are what it is before the first value.
MEMORY = np.dtype([("ring", "f8", (RING,)), ("ordered", "f8", (RING,)), ("since", "i8"), ("away", "i4"),
                   ("known", "i2"), ("next", "i2")])  # fmt: skip


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`up`, `down` (one or both): how far away, in the metric's unit. `spreads`: and so many standard deviations.

    `shape`: `level` stays away for `reports` reports; `spike` comes back within so many. `back`: share of the distance
    within which it has come back. `accept`: after this time the level is the new one, never where 0.
    """

    kind: str
    metric: str
    shape: Literal["level", "spike"]
    up: float | None = None
    down: float | None = None
    spreads: float = 0.0
    back: float = 0.5
    reports: int = 3
    accept: Duration = msgspec.field(default_factory=Duration)
    on_delay: Duration = msgspec.field(default_factory=Duration)
    off_delay: Duration = msgspec.field(default_factory=Duration)
    count: Count | None = None


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    found = count_problems(parameters.count)
    if parameters.up is None and parameters.down is None:
        found.append(("", "expected at least one of up, down"))
    for name in ("up", "down"):
        amount = getattr(parameters, name)
        if amount is not None and not 0 < amount < math.inf:
            found.append((name, f"expected an amount above 0, got {amount:g}"))
    if not 0 <= parameters.spreads < math.inf:
        found.append(("spreads", f"expected 0 or more, got {parameters.spreads:g}"))
    if not 0 < parameters.back <= 1:
        found.append(("back", f"expected a share above 0, at most 1, got {parameters.back:g}"))
    if not 1 <= parameters.reports <= 1000:
        found.append(("reports", f"expected 1..1000 reports, got {parameters.reports}"))
    if parameters.accept and parameters.shape == "spike":
        found.append(("accept", "a spike that stays is a level at once: expected it only with shape level"))
    return found


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return the metrics whose values are judged: one."""
    return (parameters.metric,)


def row(parameters: Parameters) -> tuple[tuple[float, float, float, float, int, int, int], tuple[float, ...]]:
    """Return a rule's row of TABLE, and no further numbers."""
    up = math.inf if parameters.up is None else parameters.up
    down = math.inf if parameters.down is None else parameters.down
    spike = int(parameters.shape == "spike")
    spreads = parameters.spreads * GAUSSIAN
    return (up, down, spreads, parameters.back, parameters.reports, parameters.accept, spike), ()


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return None: the limit moves with the series."""
    return None


def judge(
    batch: Batch, links: Links, table: Structured, rule: U16, numbers: F64, memory: Structured, verdict: I8
) -> None:
    """Write into `verdict`, for every used value and instance it feeds: begins +1, ends -1."""
    judged = 0
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, t, value = batch.series[p], batch.t[p], batch.value[p]
        for entry in range(links.start[series], links.start[series + 1]):
            if links.role[entry] != MAIN:
                continue
            i = links.instance[entry]
            own, m = table[rule[i]], memory[i]
            says, learns = -1, True
            if m.known >= LEARNED:
                middle = m.known // 2
                median = m.ordered[middle]
                spread = 0.0
                if own.spreads > 0:  # the distances grow outwards from the median: take them one by one
                    low, high = middle, middle + 1
                    for _ in range(middle + 1):
                        below = median - m.ordered[low] if low >= 0 else np.inf
                        above = m.ordered[high] - median if high < m.known else np.inf
                        spread = min(below, above)
                        if below <= above:
                            low -= 1
                        else:
                            high += 1
                up, down = max(own.up, own.spreads * spread), max(own.down, own.spreads * spread)
                off = value - median
                if m.away == 0:
                    if off > up or off < -down:
                        m.away, m.since, learns = 1, t, False
                elif off <= own.back * up and off >= -own.back * down:
                    if own.spike == 1 and m.away <= own.reports:
                        says = 1
                    m.away = 0
                else:
                    m.away, learns = min(m.away + 1, 1_000_000), False
                stays = own.spike == 1 and m.away > own.reports
                if m.away > 0 and (stays or (own.accept > 0 and t - m.since >= own.accept)):
                    m.known, m.next, m.away, learns = 0, 0, 0, True
                elif m.away > 0 and own.spike == 0 and m.away >= own.reports:
                    says = 1
            if learns:
                size = m.known
                if size == RING:  # the oldest leaves both
                    oldest, size = m.ring[m.next], RING - 1
                    k = 0
                    while m.ordered[k] != oldest:
                        k += 1
                    while k < size:
                        m.ordered[k] = m.ordered[k + 1]
                        k += 1
                k = size
                while k > 0 and m.ordered[k - 1] > value:
                    m.ordered[k] = m.ordered[k - 1]
                    k -= 1
                m.ordered[k] = value
                m.ring[m.next] = value
                m.next = (m.next + 1) % RING
                m.known = size + 1
            verdict[judged] = says
            judged += 1


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    known = METRICS[parameters.metric]
    value = "?" if evidence.value is None else f"{evidence.value:g}"
    signed = [f"{sign}{by:g}" for sign, by in (("+", parameters.up), ("-", parameters.down)) if by is not None]
    by = f"{' / '.join(signed)}{known.suffix}"
    times = evidence.count > 1
    if language == "en":
        what = "jumped and stayed" if parameters.shape == "level" else "jumped and came back"
        text = f"{known.en} {value}{known.suffix}: it {what}, {by} or more from its recent level"
        return text + (f", {evidence.count} times within {_within(parameters)}" if times else "")
    what = "跳变后未恢复" if parameters.shape == "level" else "瞬时跳变"
    text = f"{known.zh} {value}{known.suffix}，相对近期水平{what}（{by} 以上）"
    return text + (f"，{_within(parameters)} 内 {evidence.count} 次" if times else "")


def _within(parameters: Parameters) -> str:
    return duration_text(parameters.count.within) if parameters.count else "?"
