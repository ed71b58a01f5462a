"""Kind `composite`: several simple conditions on the metrics of one device, all, any or at least k of them.

Each condition is a threshold (`above`, `below`, with a deadband) or a code (`codes` meet it, `clear` end it, others
change nothing), judged when a value of its metric arrives and remembered until the next. One that was never told, or
whose last value is older than `fresh`, is *unknown*:

- it does not help to begin. Where that would be the dangerous choice (a rescue that waits to hear that the car stands
  still) `unknown: met` turns it round;
- one that was met when it went stale does not help to end either: silence is no recovery.

Events overtake telemetry, by an hour after an outage, so values of two metrics need not come in order. A value older
than the last of another condition can end the whole, and never begin it: what it was then says nothing about now.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.config import Duration, duration_text
from citybrain.model import Evidence
from citybrain.units import METRICS
from streams.kinds.holding import I8, MAIN, U16, Batch, Count, Links, Structured, count_problems
from streams.log import F64

JUDGES = True
MOST = 8
UNTOLD, UNMET, MET = range(3)
# A condition's numbers: which metric, unknown counts as met, sign (0: codes), limit, where it ends, fresh in ms, where
# its codes stand behind the conditions, how many begin and how many end it.
TERM, ASSUMED, SIGN, LIMIT, BACK, FRESH, FIRST, CODES, CLEAR, WIDTH = range(10)
SAMPLE = """\
when:
  kind: composite
  all:
    - {metric: pressure_mpa, above: 0.45, deadband: 0.03}
    - {metric: fault_code, codes: [1], clear: [0], fresh: 1h}
  on_delay: 10min
"""
TABLE = np.dtype([("base", "i8"), ("conditions", "i8"), ("needed", "i8")])
# By condition: untold, unmet or met, and the time of its last value. Zeros are what it is before the first.
MEMORY = np.dtype([("at", "i8", (MOST,)), ("state", "i1", (MOST,))])


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly one of `above`, `below` and `codes` (with `clear`), on one metric of the device.

    `fresh`: how old its last value may be, as old as it likes where 0. `unknown`: what it counts as before the first
    value and when that is too old.
    """

    metric: str
    above: float | None = None
    below: float | None = None
    deadband: float = 0.0
    codes: tuple[float, ...] = ()
    clear: tuple[float, ...] = ()
    fresh: Duration = msgspec.field(default_factory=Duration)
    unknown: Literal["unmet", "met"] = "unmet"


class AtLeast(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At least `k` of the conditions in `of`."""

    k: int
    of: tuple[Condition, ...]


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly one of `all`, `any` and `at_least`, of 2 to 8 conditions."""

    kind: str
    all: tuple[Condition, ...] = ()
    any: tuple[Condition, ...] = ()
    at_least: AtLeast | None = None
    on_delay: Duration = msgspec.field(default_factory=Duration)
    off_delay: Duration = msgspec.field(default_factory=Duration)
    count: Count | None = None


def conditions(parameters: Parameters) -> tuple[Condition, ...]:
    """Return the conditions, in the order they are written."""
    return parameters.all or parameters.any or (parameters.at_least.of if parameters.at_least else ())


def needed(parameters: Parameters) -> int:
    """Return how many of them must be met."""
    if parameters.at_least is not None:
        return parameters.at_least.k
    return len(parameters.all) or 1


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    found = count_problems(parameters.count)
    given = [name for name in ("all", "any", "at_least") if getattr(parameters, name)]
    if len(given) != 1:
        found.append((given[1] if given else "", "expected exactly one of all, any, at_least"))
        return found
    field = "at_least.of" if parameters.at_least else given[0]
    written = conditions(parameters)
    if not 2 <= len(written) <= MOST:
        found.append((field, f"expected 2..{MOST} conditions, got {len(written)}"))
    if parameters.at_least and not 1 <= parameters.at_least.k <= len(written):
        found.append(("at_least.k", f"expected 1..{len(written)}, got {parameters.at_least.k}"))
    for number, condition in enumerate(written):
        found += [(f"{field}[{number}]{inner}", what) for inner, what in _condition_problems(condition)]
    return found


def _condition_problems(condition: Condition) -> list[tuple[str, str]]:
    found = []
    limits = [it for it in (condition.above, condition.below) if it is not None]
    if len(limits) + bool(condition.codes) != 1:
        found.append(("", "expected exactly one of above, below, codes"))
    if not all(math.isfinite(it) for it in limits):
        found.append((".above" if condition.above is not None else ".below", "expected a number"))
    if not 0 <= condition.deadband < math.inf:
        found.append((".deadband", f"expected 0 or more, got {condition.deadband:g}"))
    if bool(condition.codes) != bool(condition.clear):
        found.append((".clear", "expected codes and clear together: what begins the trouble, and what ends it"))
    both = sorted(set(condition.codes) & set(condition.clear))
    if both:
        found.append((".clear", f"{both[0]:g} stands in codes too; a code either begins or ends the trouble"))
    return found


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return the metrics whose values are judged, each once, in the order they are written."""
    return tuple(dict.fromkeys(condition.metric for condition in conditions(parameters)))


def places(parameters: Parameters) -> tuple[str, ...]:
    """Return, for every metric, the field that first names it."""
    field = "at_least.of" if parameters.at_least else "all" if parameters.all else "any"
    first: dict[str, str] = {}
    for number, condition in enumerate(conditions(parameters)):
        first.setdefault(condition.metric, f"{field}[{number}].metric")
    return tuple(first.values())


def enough(parameters: Parameters, has: list[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """Return which devices the rule can ever hold for, given which have each of its metrics."""
    names = metrics(parameters)
    can = [has[names.index(it.metric)] | (it.unknown == "met") for it in conditions(parameters)]
    possible: npt.NDArray[np.bool_] = (np.sum(can, axis=0) >= needed(parameters)) & np.any(has, axis=0)
    return possible


def row(parameters: Parameters) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """Return a rule's row of TABLE (its base is added by the plan), its conditions' numbers and then their codes."""
    names, written = metrics(parameters), conditions(parameters)
    numbers: list[float] = []
    codes: list[float] = []
    for it in written:
        sign = 1.0 if it.above is not None else -1.0 if it.below is not None else 0.0
        limit_ = it.above if it.above is not None else it.below if it.below is not None else 0.0
        numbers += [names.index(it.metric), it.unknown == "met", sign, limit_, limit_ - sign * it.deadband, it.fresh]
        numbers += [len(written) * WIDTH + len(codes), len(it.codes), len(it.clear)]
        codes += [*it.codes, *it.clear]
    return (0, len(written), needed(parameters)), (*map(float, numbers), *codes)


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return None: there are several, and the explanation names them."""
    return None


def judge(
    batch: Batch, links: Links, table: Structured, rule: U16, numbers: F64, memory: Structured, verdict: I8
) -> None:
    """Write into `verdict`, for every used value and instance it feeds: begins +1, ends -1, neither 0."""
    judged = 0
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, t, value = batch.series[p], batch.t[p], batch.value[p]
        for entry in range(links.start[series], links.start[series + 1]):
            if links.role[entry] != MAIN:
                continue
            i, term = links.instance[entry], links.term[entry]
            own, m = table[rule[i]], memory[i]
            met, stale, latest = 0, 0, t
            for c in range(own.conditions):
                at = own.base + c * WIDTH
                sign = numbers[at + SIGN]
                if numbers[at + TERM] == term:
                    state = max(m.state[c], UNMET)
                    if sign == 0:
                        first = own.base + int(numbers[at + FIRST])
                        codes = int(numbers[at + CODES])
                        for k in range(codes + int(numbers[at + CLEAR])):
                            if numbers[first + k] == value:
                                state = MET if k < codes else UNMET
                    elif sign * value > sign * numbers[at + LIMIT]:
                        state = MET
                    elif sign * value <= sign * numbers[at + BACK]:
                        state = UNMET
                    m.state[c], m.at[c] = state, t
                latest = max(latest, m.at[c])
                fresh = numbers[at + FRESH]
                if m.state[c] == UNTOLD or (fresh > 0 and t - m.at[c] > fresh):
                    met += numbers[at + ASSUMED] == 1
                    stale += m.state[c] == MET and numbers[at + ASSUMED] == 0
                else:
                    met += m.state[c] == MET
            begins = met >= own.needed and t >= latest
            verdict[judged] = 1 if begins else 0 if met + stale >= own.needed else -1
            judged += 1


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`: what completed it, and all that must hold."""
    english = language == "en"
    last = _said(evidence.metric, evidence.value, english=english)
    told = (", " if english else "、").join(_told(condition, english=english) for condition in conditions(parameters))
    delay = duration_text(parameters.on_delay) if parameters.on_delay else ""
    number = needed(parameters)
    every = number == len(conditions(parameters))
    if english:
        text = f"{last}; {'all' if every else number} of: {told}" + (f"; held {delay}" if delay else "")
        return text + (f", {evidence.count} times" if evidence.count > 1 else "")
    text = f"{last}；{'同时满足' if every else f'满足其中 {number} 项'}：{told}" + (f"；持续 {delay}" if delay else "")
    return text + (f"，{evidence.count} 次" if evidence.count > 1 else "")


def _said(metric: str, value: float | None, *, english: bool) -> str:
    known = METRICS.get(metric)
    if known is None or value is None:
        return f"{metric} {'?' if value is None else f'{value:g}'}".strip()
    name = known.en if english else known.zh
    if known.unit == "0/1":
        return f"{name} {_yes(value > 0.5, english=english)}"
    return f"{name} {value:g}{known.suffix}"


def _told(condition: Condition, *, english: bool) -> str:
    known = METRICS[condition.metric]
    name = known.en if english else known.zh
    if condition.codes:
        return f"{name} {'/'.join(f'{code:g}' for code in condition.codes)}"
    if known.unit == "0/1":
        return f"{name} {_yes(condition.above is not None, english=english)}"
    at = condition.above if condition.above is not None else condition.below
    return f"{name} {'>' if condition.above is not None else '<'} {at:g}{known.suffix}"


def _yes(holds: bool, *, english: bool) -> str:
    if english:
        return "yes" if holds else "no"
    return "是" if holds else "否"
