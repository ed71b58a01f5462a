"""Kind `rate`: a value that has fallen (risen) by an amount within a short time.

What is compared is the value now with the highest (lowest) one of the window behind it, kept as the extremes of eight
equal slices of the window: any number of reports in it costs the same few bytes, and the window is exact to an eighth
(between 7/8 of `within` and all of it). A window counted in reports would mean 80 s for one hydrant and a week for the
next.

A device that speaks each 1 to 24 h, and at once when something passes its own limits, says by its silence that nothing
did. `bridge` puts that to use: the last report, if it is not older, stands until the moment before the next one and
belongs to the window. Without it a report that comes alone has nothing to be compared with, and no rate.

The condition ends when the value has come back by `recover` of the amount, or when the window no longer holds such a
change and `settle` has passed at the new level, which then is the normal one.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from citybrain.config import Duration, duration_text
from citybrain.model import Evidence
from citybrain.units import METRICS
from streams.kinds.holding import I8, MAIN, U16, Batch, Count, Links, Structured, count_problems
from streams.log import F64

JUDGES = True
SLICES = 8
SAMPLE = """\
when:
  kind: rate
  metric: pressure_mpa
  fall: 0.08
  within: 4min
  settle: 10min
"""
# A fall with sign 1, a rise with sign -1, so that both are falls of sign * value. `slice` in ms.
TABLE = np.dtype([("sign", "f8"), ("amount", "f8"), ("back", "f8"), ("slice", "i8"), ("bridge", "i8"),
                  ("settle", "i8")])  # fmt: skip
# Zeros are what it is before the first value (`known` 0). `last`, `highest`, `start` are of sign * value: the last one,
# the slices' highest, and from where it fell; `at` is the time of the last value, `fell` the last time it was so low
# below the window's highest.
MEMORY = np.dtype([("highest", "f8", (SLICES,)), ("last", "f8"), ("start", "f8"), ("at", "i8"), ("slot", "i8"),
                   ("fell", "i8"), ("known", "i1"), ("fallen", "i1")], align=True)  # fmt: skip


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly one of `fall` and `rise`, an amount in the metric's unit, `within` a duration.

    `bridge`: how old the last report may be to stand until the next. `recover`: share of the amount by which it must
    come back. `settle`: how long the new level stands before it is the normal one.
    """

    kind: str
    metric: str
    within: Duration
    fall: float | None = None
    rise: float | None = None
    bridge: Duration = msgspec.field(default_factory=Duration)
    recover: float = 0.5
    settle: Duration = msgspec.field(default_factory=Duration)
    on_delay: Duration = msgspec.field(default_factory=Duration)
    off_delay: Duration = msgspec.field(default_factory=Duration)
    count: Count | None = None


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    found = count_problems(parameters.count)
    if (parameters.fall is None) == (parameters.rise is None):
        found.append(("fall" if parameters.fall is not None else "", "expected exactly one of fall, rise"))
    for name in ("fall", "rise"):
        amount = getattr(parameters, name)
        if amount is not None and not 0 < amount < math.inf:
            found.append((name, f"expected an amount above 0, got {amount:g}"))
    if parameters.within < SLICES:
        found.append(("within", f"expected {SLICES} ms or more"))
    if not 0 < parameters.recover <= 1:
        found.append(("recover", f"expected a share above 0, at most 1, got {parameters.recover:g}"))
    return found


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return the metrics whose values are judged: one."""
    return (parameters.metric,)


def row(parameters: Parameters) -> tuple[tuple[float, float, float, int, int, int], tuple[float, ...]]:
    """Return a rule's row of TABLE, and no further numbers."""
    sign, amount = (1.0, parameters.fall) if parameters.fall is not None else (-1.0, parameters.rise)
    assert amount is not None  # `problems` has seen to it
    back = amount * (1.0 - parameters.recover)
    return (sign, amount, back, parameters.within // SLICES, parameters.bridge, parameters.settle), ()


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return None: it moves with what the value was before."""
    return None


def judge(
    batch: Batch, links: Links, table: Structured, rule: U16, numbers: F64, memory: Structured, verdict: I8
) -> None:
    """Write into `verdict`, for every used value and instance it feeds: begins +1, ends -1."""
    judged = 0
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, t = batch.series[p], batch.t[p]
        for entry in range(links.start[series], links.start[series + 1]):
            if links.role[entry] != MAIN:
                continue
            i = links.instance[entry]
            own, m = table[rule[i]], memory[i]
            value = own.sign * batch.value[p]
            slot = t // own.slice
            if m.known == 0:
                m.known, m.slot, m.at, m.last = 1, slot, t, value
                for k in range(SLICES):
                    m.highest[k] = -np.inf
            elif slot > m.slot:
                for k in range(min(slot - m.slot, SLICES)):
                    m.highest[(slot - k) % SLICES] = -np.inf
                m.slot = slot
            here = m.slot % SLICES
            if t - m.at <= own.bridge:
                m.highest[here] = max(m.highest[here], m.last)
            m.highest[here] = max(m.highest[here], value)
            m.at, m.last = t, value
            highest = value
            for k in range(SLICES):
                highest = max(highest, m.highest[k])
            falls = highest - value >= own.amount
            if falls:
                m.fell = t
                m.start = m.start if m.fallen == 1 else highest
                m.fallen = 1
            elif m.fallen == 1 and t - m.fell >= own.settle:
                m.fallen = 0
            if m.fallen == 1 and m.start - value <= own.back:
                m.fallen = 0
            verdict[judged] = 1 if m.fallen == 1 else -1
            judged += 1


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    known = METRICS[parameters.metric]
    value = "?" if evidence.value is None else f"{evidence.value:g}"
    amount, within = parameters.fall or parameters.rise or 0.0, duration_text(parameters.within)
    falls = parameters.fall is not None
    if language == "en":
        text = f"{known.en} {value}{known.suffix} after {'a fall' if falls else 'a rise'} by {amount:g}{known.suffix}"
        return f"{text} or more within {within}" + (f", {evidence.count} times" if evidence.count > 1 else "")
    text = f"{known.zh} {value}{known.suffix}，{within} 内{'下降' if falls else '上升'} {amount:g}{known.suffix} 或更多"
    return text + (f"，{evidence.count} 次" if evidence.count > 1 else "")
