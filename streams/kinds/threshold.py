"""Kind `threshold`: a value above or below a limit, with a deadband on the way back.

The condition begins above `above` (below `below`) and ends at `above - deadband` or less (`below + deadband` or more).
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
SAMPLE = """\
when:
  kind: threshold
  metric: pressure_mpa
  below: 0.14
  deadband: 0.01
  on_delay: 2min
  off_delay: 5min
"""
# Above a limit with sign 1, below it with sign -1.
TABLE = np.dtype([("sign", "f8"), ("limit", "f8"), ("back", "f8")])


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Exactly one of `above` and `below`, in the metric's unit. `count`: it must begin n times within a window."""

    kind: str
    metric: str
    above: float | None = None
    below: float | None = None
    deadband: float = 0.0
    on_delay: Duration = msgspec.field(default_factory=Duration)
    off_delay: Duration = msgspec.field(default_factory=Duration)
    count: Count | None = None


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    found = count_problems(parameters.count)
    if (parameters.above is None) == (parameters.below is None):
        found.append(("above" if parameters.above is not None else "", "expected exactly one of above, below"))
    if not all(math.isfinite(it) for it in (parameters.above, parameters.below) if it is not None):
        found.append(("above" if parameters.above is not None else "below", "expected a number"))
    if not 0 <= parameters.deadband < math.inf:
        found.append(("deadband", f"expected 0 or more, got {parameters.deadband:g}"))
    return found


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return the metric whose values are judged."""
    return (parameters.metric,)


def row(parameters: Parameters) -> tuple[tuple[float, float, float], tuple[float, ...]]:
    """Return a rule's row of TABLE, and no further numbers."""
    if parameters.above is not None:
        return (1.0, parameters.above, parameters.above - parameters.deadband), ()
    assert parameters.below is not None  # `problems` has seen to it
    return (-1.0, parameters.below, parameters.below + parameters.deadband), ()


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return the limit that a raise (or a clear) passed."""
    _, at, back = row(parameters)[0]
    return at if raised else back


def judge(
    batch: Batch, links: Links, table: Structured, rule: U16, numbers: F64, memory: Structured, verdict: I8
) -> None:
    """Write into `verdict`, for every used value and instance it feeds: begins +1, ends -1, neither 0."""
    judged = 0
    plain = links.plain
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, value = batch.series[p], batch.value[p]
        for entry in range(links.start[series], links.start[series + 1]):
            if plain or links.role[entry] == MAIN:
                own = table[rule[entry if plain else links.instance[entry]]]
                begins = own.sign * value > own.sign * own.limit
                ends = own.sign * value <= own.sign * own.back
                verdict[judged] = 1 if begins else -1 if ends else 0
                judged += 1


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    known = METRICS[parameters.metric]
    value = "?" if evidence.value is None else f"{evidence.value:g}"
    at = f"{evidence.limit:g}" if evidence.limit is not None else "?"
    above = parameters.above is not None
    if language == "en":
        text = f"{known.en} {value}{known.suffix}, limit {'above' if above else 'below'} {at}{known.suffix}"
        text += f", held {duration_text(parameters.on_delay)}" if parameters.on_delay else ""
        return text + (f", {evidence.count} times" if evidence.count > 1 else "")
    text = f"{known.zh} {value}{known.suffix}，{'上限' if above else '下限'} {at}{known.suffix}"
    text += f"，持续 {duration_text(parameters.on_delay)}" if parameters.on_delay else ""
    return text + (f"，{evidence.count} 次" if evidence.count > 1 else "")
