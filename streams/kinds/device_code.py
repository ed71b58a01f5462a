"""Kind `device_code`: the device itself says what is wrong, by a code.

The condition begins with a code in `codes` and ends with one in `clear`; other codes change nothing. A repeated report
of the same trouble is no new occurrence: `count` counts beginnings, so the trouble must have cleared in between.
"""

from __future__ import annotations

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
  kind: device_code
  metric: fault_code
  codes: [90, 93]
  clear: [0, 40]
"""
# Where a rule's codes stand among the numbers: codes[first..middle], clear[middle..last] behind `base`.
TABLE = np.dtype([("base", "i8"), ("codes", "i8"), ("clear", "i8")])


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`codes` begin the condition, `clear` end it. `count`: it must begin n times within a window."""

    kind: str
    metric: str
    codes: tuple[float, ...]
    clear: tuple[float, ...]
    on_delay: Duration = msgspec.field(default_factory=Duration)
    off_delay: Duration = msgspec.field(default_factory=Duration)
    count: Count | None = None


def problems(parameters: Parameters) -> list[tuple[str, str]]:
    """Return what is wrong with the parameters, as (field, what)."""
    found = count_problems(parameters.count)
    found += [(name, "expected at least one code") for name in ("codes", "clear") if not getattr(parameters, name)]
    both = sorted(set(parameters.codes) & set(parameters.clear))
    if both:
        found.append(("clear", f"{both[0]:g} stands in codes too; a code either begins or ends the trouble"))
    return found


def metrics(parameters: Parameters) -> tuple[str, ...]:
    """Return the metric whose values are judged."""
    return (parameters.metric,)


def row(parameters: Parameters) -> tuple[tuple[int, int, int], tuple[float, ...]]:
    """Return a rule's row of TABLE (its base is added by the plan), and its codes."""
    return (0, len(parameters.codes), len(parameters.clear)), (*parameters.codes, *parameters.clear)


def limit(parameters: Parameters, *, raised: bool) -> float | None:
    """Return None: a code passes no limit."""
    return None


def judge(
    batch: Batch, links: Links, table: Structured, rule: U16, numbers: F64, memory: Structured, verdict: I8
) -> None:
    """Write into `verdict`, for every used value and instance it feeds: begins +1, ends -1, neither 0."""
    judged = 0
    for p in range(len(batch.t)):
        if batch.used[p] == 0:
            continue
        series, value = batch.series[p], batch.value[p]
        for entry in range(links.start[series], links.start[series + 1]):
            if links.role[entry] == MAIN:
                own = table[rule[links.instance[entry]]]
                change = 0
                for c in range(own.codes + own.clear):
                    if numbers[own.base + c] == value:
                        change = 1 if c < own.codes else -1
                verdict[judged] = change
                judged += 1


def explain(parameters: Parameters, evidence: Evidence, language: str) -> str:
    """Say why in a sentence, in `zh` or `en`."""
    code = "?" if evidence.value is None else f"{evidence.value:g}"
    means = METRICS[parameters.metric].meaning(evidence.value, language) if evidence.value is not None else ""
    within = duration_text(parameters.count.within) if parameters.count else ""
    if language == "en":
        code += f" ({means})" if means else ""
        return f"the device reports code {code}" + (f", {evidence.count} times within {within}" if within else "")
    code += f"（{means}）" if means else ""
    return f"设备上报代码 {code}" + (f"，{within} 内 {evidence.count} 次" if within else "")
