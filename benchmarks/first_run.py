"""The first minutes of a new user: `citybrain run --simulate`, Ctrl-C, and again.

    python -m benchmarks.first_run --json

live_s, stop_s, second_live_s, second_stop_s: seconds. delivered: every case of the first run that its grid platform
took, with the seconds from the cause's beginning (`cause_s`) and from the moment the rule's delays were over (`rule_s`;
for a rescue: from the alarm button). pss_mb: the memory of all processes together. raised_again: alarms or cases of the
second start that the first had already.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select

from benchmarks.system import System
from citybrain.db.schema import alarms, cases, outbox
from citybrain.db.store import open_store
from citybrain.layout import Layout
from rules.files import library


def pss_mb(pids: list[int]) -> float:
    """Return the proportional set size of processes together, in MB."""
    total_kb = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total_kb += int(line.split()[1])
    return round(total_kb / 1024, 1)


def deliveries(layout: Layout) -> list[dict[str, Any]]:
    """Return the first delivery of every case, with its delays in seconds."""
    hold_ms = {rule.id: int(rule.confirm.hold) for rule in library().rules if rule.confirm.policy != "at_once"}
    truth = [json.loads(line) for line in layout.truth.read_text().splitlines()]
    query = (
        select(
            cases.c.kind, cases.c.category, cases.c.subject, alarms.c.rule, alarms.c.raised_at, outbox.c.delivered_at
        )
        .join(alarms, alarms.c.id == cases.c.alarm)
        .join(outbox, outbox.c.case_id == cases.c.id)
        .where(outbox.c.type.like("%created"), outbox.c.delivered_at.is_not(None))
        .order_by(outbox.c.n)
    )
    found = []
    with open_store(layout.database, readonly=True).connect() as db:
        for row in db.execute(query):
            starts = [cause["start_ms"] for cause in truth if row.subject in cause["subjects"]]
            due_ms = row.raised_at + hold_ms.get(row.rule, 0)
            found.append(
                {
                    "category": row.category,
                    "subject": row.subject,
                    "cause_s": round((row.delivered_at - min(starts)) / 1000, 1) if starts else None,
                    "rule_s": round((row.delivered_at - due_ms) / 1000, 1),
                }
            )
    return found


def numbers(layout: Layout) -> tuple[set[str], set[tuple[str, str]]]:
    """Return the case numbers, and (rule, subject) of the open alarms."""
    with open_store(layout.database, readonly=True).connect() as db:
        names = {str(row.number) for row in db.execute(select(cases.c.number))}
        rows = db.execute(select(alarms.c.rule, alarms.c.subject).where(alarms.c.open == 1)).all()
        assert len(rows) == len(set(rows)), "an alarm is open twice"
        return names, {(row.rule, row.subject) for row in rows}


def again(layout: Layout, since_ms: int) -> int:
    """Return how many alarms opened since then stand for something that was open already."""
    with open_store(layout.database, readonly=True).connect() as db:
        rows = db.execute(select(alarms.c.rule, alarms.c.subject, alarms.c.opened_at, alarms.c.open)).all()
    before = {(row.rule, row.subject) for row in rows if row.opened_at <= since_ms}
    return sum(1 for row in rows if row.opened_at > since_ms and (row.rule, row.subject) in before)


def measure(root: Path, watch_s: float) -> dict[str, Any]:
    """Run twice; `watch_s` is how long the first run goes on after it is live."""
    first = System(root)
    result: dict[str, Any] = {"live_s": round(first.start(), 1)}
    try:
        time.sleep(watch_s)
        result["pss_mb"] = pss_mb([*first.children().values(), first.process.pid if first.process else 0])
    finally:
        result["stop_s"] = round(first.stop(), 1)
    result["delivered"] = deliveries(first.layout)
    before, _ = numbers(first.layout)
    since_ms = first.layout.read_run().clock.now_ms()
    second = System(root)
    result["second_live_s"] = round(second.start(), 1)
    try:
        time.sleep(15)
    finally:
        result["second_stop_s"] = round(second.stop(), 1)
    after, _ = numbers(second.layout)
    result |= {"cases": len(before), "cases_kept": before <= after, "raised_again": again(second.layout, since_ms)}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch-s", type=float, default=100.0, help="how long the first run lasts (default: 100)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-") as folder:
        result = measure(Path(folder), options.watch_s)
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    return 0 if result["cases_kept"] and not result["raised_again"] else 1


if __name__ == "__main__":
    sys.exit(main())
