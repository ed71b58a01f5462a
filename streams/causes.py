"""What the kernels hand back, as columns; put into order they become transitions.

The order is that of the log: by record, by the value in it, and, where one value causes several, by (device, rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from citybrain.model import Edge, Evidence, Transition
from citybrain.segments import Record
from streams.kinds.holding import Structured
from streams.log import I64
from streams.plan import Plan, Table
from streams.registry import Index


class Causes(NamedTuple):
    """Rows of OUT and where they belong. `position`: of the value in its frame, -1 where the record as a whole did it.

    order: the rule's place in its rule set; rule: the row it ran with.
    """

    record: I64
    position: I64
    device: npt.NDArray[np.int32]
    order: I64
    rule: npt.NDArray[np.uint16]
    rows: Structured


def causes_of(plan: Plan, table: Table, rows: Structured, record: I64, position: I64) -> Causes:
    """Return one table's rows with their place among the records of the batch."""
    rule = table.rule[rows["instance"]]
    return Causes(record, position, table.device[rows["instance"]], plan.orders[rule], rule, rows)


def in_order(parts: Sequence[Causes]) -> Causes:
    """Return all of them in order; an instance's rows of one value keep theirs."""
    all_of = Causes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    order = np.lexsort((all_of.order, all_of.device, all_of.position, all_of.record))
    columns: list[Any] = [column[order] for column in all_of]
    return Causes(*columns)


def transitions(
    shard: int, ruleset: str, plan: Plan, index: Index, records: Sequence[Record], causes: Causes
) -> list[Transition]:
    """Return a transition for every cause, numbered within its record."""
    parts: list[npt.NDArray[Any]] = [causes.record, causes.device, causes.rule]
    parts += [causes.rows[name] for name in ("raised", "at", "value", "since", "count", "term")]
    edges = (Edge.CLEAR, Edge.RAISE)
    names: dict[int, tuple[str, tuple[str, ...], tuple[float | None, float | None]]] = {}
    found: list[Transition] = []
    last, number = -1, 0
    for place, device, rule, raised, at, value, since, count, term in zip(*(p.tolist() for p in parts), strict=True):
        number = number + 1 if place == last else 0
        last = place
        if rule not in names:
            it = plan.rules[rule]
            limits = (it.kind.limit(it.parameters, raised=False), it.kind.limit(it.parameters, raised=True))
            names[rule] = it.rule.id, it.kind.metrics(it.parameters), limits
        name, metrics, limits = names[rule]
        record, subject = records[place], index.devices[device].id
        evidence = Evidence(metrics[term], value, limits[raised], since, count)
        where = (shard, record.offset, number, name, subject)
        found.append(Transition(*where, edges[raised], at, record.received_at, evidence, ruleset))
    return found
