"""`citybrain score`: what was found of what was due, from the truth file and the desk's database.

An order (case, rescue, maintenance) *matches* a cause when one of the members of its incident, or its own subject, is
one of the cause's subjects and it was observed between 2 minutes before the cause began and 30 minutes after it ended.
It is true when a cause it matches is due an order of its kind; a rescue only for the very car it is for.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from sqlalchemy import select

from citybrain.cli import Subcommand, emit
from citybrain.clock import MINUTE_MS
from citybrain.db.place import add_database, layout_of
from citybrain.db.schema import alarms, cases
from citybrain.db.store import open_store
from simulators.faults import Truth, read_truth

BEFORE_MS, AFTER_MS = 2 * MINUTE_MS, 30 * MINUTE_MS
MOST_NAMED = 20  # of what was wrong, on a screen
Z95 = 1.959964  # two-sided 95 %


class Order(msgspec.Struct, frozen=True):
    """One row of `cases` with the subjects of its incident. Times are Unix ms."""

    id: int
    kind: str
    subject: str
    members: frozenset[str]
    category: str
    cell: str
    street: str
    grid: str
    unit: str
    observed_at: int
    opened_at: int


class Found(msgspec.Struct, frozen=True):
    """A due cause and the true orders it got."""

    truth: Truth
    orders: tuple[Order, ...]

    @property
    def complete(self) -> bool:
        """Whether everything that is due is there."""
        if self.truth.due.rescues:
            return set(self.truth.due.rescues) <= {order.subject for order in self.orders}
        return bool(self.orders)

    @property
    def single(self) -> bool:
        """Whether nothing that is due came twice."""
        return len(self.orders) == max(len(self.truth.due.rescues), 1)

    @property
    def delay_s(self) -> float:
        """Seconds from the cause's beginning until the last thing that is due was ordered (platform time)."""
        first: dict[str, int] = {}
        for order in self.orders:
            key = order.subject if self.truth.due.rescues else ""
            first[key] = min(order.opened_at, first.get(key, order.opened_at))
        return (max(first.values()) - self.truth.start_ms) / 1000


def matches(order: Order, truth: Truth) -> bool:
    """Return whether an order may be about a cause: shared subject, and observed around it."""
    if not truth.start_ms - BEFORE_MS <= order.observed_at <= truth.end_ms + AFTER_MS:
        return False
    return bool(({order.subject} | order.members) & set(truth.subjects))


def is_due(order: Order, truth: Truth) -> bool:
    """Return whether an order of this kind (a rescue: for this car) is due for a cause."""
    match order.kind:
        case "case":
            return truth.due.case == 1
        case "rescue":
            return order.subject in truth.due.rescues
        case "maintenance":
            return truth.due.maintenance == 1
        case _:
            return False


def wants(truth: Truth) -> bool:
    """Return whether anything is due for a cause."""
    return bool(truth.due.case or truth.due.rescues or truth.due.maintenance)


def match(truths: Sequence[Truth], orders: Sequence[Order]) -> tuple[list[Found], list[Order], list[Order]]:
    """Return (due causes with their orders, false orders, those of the false ones that match a look-alike).

    A true order belongs to the matching due cause that began last before it was observed.
    """
    owned: dict[str, list[Order]] = defaultdict(list)
    false: list[Order] = []
    lured: list[Order] = []
    for order in orders:
        around = [truth for truth in truths if matches(order, truth)]
        due = [truth for truth in around if is_due(order, truth)]
        if due:
            owner = max(due, key=lambda truth: (truth.start_ms <= order.observed_at + BEFORE_MS, truth.start_ms))
            owned[owner.id].append(order)
            continue
        false.append(order)
        if any(truth.lookalike for truth in around):
            lured.append(order)
    return [Found(truth, tuple(owned[truth.id])) for truth in truths if wants(truth)], false, lured


def place_right(found: Found, order: Order) -> bool:
    """Return whether an order went to the right street and grid, and cell where the cause is at one device only."""
    place = found.truth.place
    area = (order.street, order.grid) == (place.street, place.grid)
    return area and (len(found.truth.subjects) > 1 or order.cell == place.cell)


def wilson_low(hits: int, of: int) -> float:
    """Return the lower end of Wilson's 95 % interval for a share (Wilson 1927); 0 of 0 gives 0.

    >>> round(wilson_low(70, 70), 3)
    0.948
    """
    if of == 0:
        return 0.0
    share, z2 = hits / of, Z95 * Z95
    spread = Z95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return (share + z2 / (2 * of) - spread) / (1 + z2 / of)


def percentile(numbers: Sequence[float], share: float) -> float | None:
    """Return the smallest number that at least `share` of them do not exceed; None where there are none."""
    ordered = sorted(numbers)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else None


def share(hits: int, of: int) -> float:
    """Return hits / of, 1.0 where there was nothing to hit."""
    return hits / of if of else 1.0


def evaluate(truths: Sequence[Truth], orders: Sequence[Order]) -> dict[str, Any]:
    """Return the score's keys (docs/simulation.md explains each)."""
    due, false, lured = match(truths, orders)
    complete = [found for found in due if found.complete]
    true = [(found, order) for found in due for order in found.orders]
    delays = [found.delay_s for found in complete]
    maintenance = [found for found in due if found.truth.due.maintenance]
    return {
        "causes_due": len(due),
        "found": len(complete),
        "recall": round(share(len(complete), len(due)), 4),
        "recall_low95": round(wilson_low(len(complete), len(due)), 4),
        "cases": len(orders),
        "false_cases": len(false),
        "precision": round(share(len(orders) - len(false), len(orders)), 4),
        "single_case_share": round(share(sum(found.single for found in complete), len(complete)), 4),
        "lookalikes": sum(truth.lookalike for truth in truths),
        "lookalike_cases": len(lured),
        "rescues_due": sum(len(truth.due.rescues) for truth in truths),
        "rescues": sum(order.kind == "rescue" for order in orders),
        "maintenance_due": len(maintenance),
        "maintenance_found": sum(found.complete for found in maintenance),
        "place_right_share": round(share(sum(place_right(f, o) for f, o in true), len(true)), 4),
        "class_right_share": round(share(sum(o.category == f.truth.category for f, o in true), len(true)), 4),
        "unit_right_share": round(share(sum(o.unit == f.truth.unit for f, o in true), len(true)), 4),
        "delay_s_median": round(median(delays), 1) if delays else None,
        "delay_s_p95": percentile(delays, 0.95),
        "by_kind": by_kind(truths, due),
        "wrong": wrong(due, false),
    }


def by_kind(truths: Sequence[Truth], due: Sequence[Found]) -> dict[str, Any]:
    """Return, for each kind of cause: how many there were, what was due and found, and the median delay."""
    happened = Counter(truth.kind for truth in truths)
    rows: dict[str, Any] = {}
    for kind, count in sorted(happened.items()):
        of = [found for found in due if found.truth.kind == kind]
        delays = [found.delay_s for found in of if found.complete]
        rows[kind] = {
            "causes": count,
            "due": len(of),
            "found": sum(found.complete for found in of),
            "single": sum(found.complete and found.single for found in of),
            "delay_s_median": round(median(delays), 1) if delays else None,
        }
    return rows


def wrong(due: Sequence[Found], false: Sequence[Order]) -> dict[str, list[str]]:
    """Return what to look at: causes that were missed or got too much, and the orders nobody was due."""
    return {
        "missed": [found.truth.id for found in due if not found.complete],
        "multiple": [found.truth.id for found in due if found.complete and not found.single],
        "false": [
            f"{order.kind} {order.id} {order.category} {order.subject} at {order.observed_at}" for order in false
        ],
    }


def read_orders(database: Path | str) -> list[Order]:
    """Return every case, rescue and maintenance order with its incident's members; raises NotFound."""
    store = open_store(database, readonly=True)
    try:
        with store.begin() as connection:
            members: dict[int, set[str]] = defaultdict(set)
            named = select(alarms.c.incident, alarms.c.subject).where(alarms.c.incident.is_not(None))
            for incident, subject in connection.execute(named):
                members[incident].add(subject)
            rows = connection.execute(select(cases).order_by(cases.c.id)).mappings().all()
    finally:
        store.dispose()
    return [
        Order(
            members=frozenset(members[row["incident"]]),
            **{name: row[name] for name in Order.__struct_fields__ if name != "members"},
        )
        for row in rows
    ]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a run's data folder (default: --data)")
    add_database(parser)


def _run(args: argparse.Namespace) -> int:
    args.data = args.folder or args.data
    layout = layout_of(args, {})  # the environment names a live run's, which need not be this folder's
    score = evaluate(read_truth(layout.truth), read_orders(layout.place))
    if not args.json:
        score["wrong"] = {name: shortened(ids) for name, ids in score["wrong"].items()}
    emit(score, as_json=args.json)
    return 0


def shortened(names: Sequence[str]) -> list[str]:
    """Return the first of many, and how many more there are."""
    more = len(names) - MOST_NAMED
    return [*names[:MOST_NAMED], *([f"and {more} more; --json names all"] if more > 0 else [])]


command = Subcommand("compare what was ordered with what was due", _arguments, _run)
