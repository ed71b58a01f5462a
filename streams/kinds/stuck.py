"""Kind `stuck`: a sensor that says the same over and over.

A run is a row of reports whose highest and lowest lie within `tolerance`; the first report outside begins a new run.
The condition holds when the run is `reports` long *and* has lasted `lasting`: reports alone would call a hydrant stuck
that speaks each minute for ten minutes, time alone one that speaks once a day. Silence adds nothing: reports count.

Never by chance: let p be the share of healthy reports that equal the most frequent value (noise of 0.005 MPa read to
0.001 MPa gives 0.08, read to 0.01 MPa at most 0.68). A run of n begins at a report with probability at most p^(n-1).
Choose `reports` so that p^(n-1) times all reports of all devices in a year stays below one, and `lasting` so long that
what is measured must move by more than a step of the sensor (for water pressure: the daily rhythm, 6 h).
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
MOST = 10_000
SAMPLE = """\
when:
  kind: stuck
  metric: pressure_mpa
  tolerance: 0.0005
  reports: 8
  lasting: 6h
"""
TABLE = np.dtype([("tolerance", "f8"), ("lasting", "i8"), ("reports", "i8")])
# The present run: its lowest and highest value, its first report, its length (0 before the first value).
MEMORY = np.dtype([("low", "f8"), ("high", "f8"), ("since", "i8"), ("reports", "i8")])


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No change by more than `tolerance` (in the metric's unit) over `reports` reports and a time of `lasting`."""

    kind: str
    metric: str
    reports: int
    lasting: Duration
    tolerance: float = 0.0
    on_delay: Duration = msgspec.field(default_factory=Duration)
    off_delay: Duration = msgspec.field(default_factory=Duration)
    count: Count | None = None


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    found = count_problems(parameters.count)
    if not 3 <= parameters.reports <= MOST:
        found.append(("reports", f"expected 3..{MOST} reports, got {parameters.reports}: fewer are equal by chance"))
    if parameters.lasting <= 0:
        found.append(("lasting", "expected a duration longer than 0"))
    if not 0 <= parameters.tolerance < math.inf:
        found.append(("tolerance", f"expected 0 or more, got {parameters.tolerance:g}"))
    return found


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return the metrics whose values are judged: one."""
    return (parameters.metric,)


def row(parameters: Parameters) -> tuple[tuple[float, int, int], tuple[float, ...]]:
    """Return a rule's row of TABLE, and no further numbers."""
    return (parameters.tolerance, parameters.lasting, parameters.reports), ()


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return None: no value is a limit."""
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
            if m.reports == 0 or max(m.high, value) - min(m.low, value) > own.tolerance:
                m.low, m.high, m.since, m.reports = value, value, t, 1
            else:
                m.low, m.high = min(m.low, value), max(m.high, value)
                m.reports = min(m.reports + 1, MOST)
            verdict[judged] = 1 if m.reports >= own.reports and t - m.since >= own.lasting else -1
            judged += 1


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    known = METRICS[parameters.metric]
    value = "?" if evidence.value is None else f"{evidence.value:g}"
    lasting = duration_text(parameters.lasting)
    if language == "en":
        return f"{known.en} says {value}{known.suffix} without a change over {parameters.reports} reports and {lasting}"
    return f"{known.zh} 连续 {parameters.reports} 次上报且 {lasting} 以上均为 {value}{known.suffix}，无变化"
