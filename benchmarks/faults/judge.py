"""What became of planted causes: pure comparison of the book with alarms, cases and what the grid platform holds.

Every finding is one sentence that names its subject, so that whoever reads the count can look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.faults.load import FAULT, TRAPPED, Said, is_rescue, subject
from citybrain.model import Transition


class Findings(msgspec.Struct):
    """What is wrong: what there is twice, what there is not, what nobody planted, what InfluxDB has not, and rows that
    the desk's journal makes otherwise.
    """

    doubled: list[str] = []
    forgotten: list[str] = []
    invented: list[str] = []
    missing: list[str] = []
    replayed: list[str] = []

    def all(self) -> list[str]:
        return self.doubled + self.forgotten + self.invented + self.missing + self.replayed


class Books(msgspec.Struct, frozen=True):
    """What the desk's database holds (rows of the tables), and the grid platform's list."""

    alarms: Sequence[Mapping[str, Any]]
    cases: Sequence[Mapping[str, Any]]
    undelivered: Sequence[str]
    platform: Sequence[Mapping[str, Any]]


def judge(said: Iterable[Said], books: Books) -> Findings:
    """Compare every planted cause with its alarm, its case or rescue, and the platform's case."""
    found = Findings()
    planted = {one.n: one for one in said if not one.ended}
    ended = {one.n for one in said if one.ended}
    names = {subject(n): n for n in planted}
    alarms, cases, held = by(books.alarms, "subject"), by(books.cases, "subject"), by(books.platform, "device")
    for name, n in names.items():
        _judge_alarms(found, n, alarms.get(name, []), over=n in ended)
        kind = "rescue" if is_rescue(n) else "case"
        _judge_count(found, f"{kind} of {name}", [row for row in cases.get(name, []) if row["kind"] == kind])
        _judge_count(found, f"platform's case of {name}", held.get(name, []))
        found.invented += [
            f"a {row['kind']} of {name}, planted for a {kind}" for row in cases.get(name, []) if row["kind"] != kind
        ]
    for what, rows in (("alarm", alarms), ("case", cases), ("platform's case", held)):
        found.invented += [f"{what} of {name}" for name in rows.keys() - names.keys()]
    for row in books.platform:
        if int(row["accepted"]) > 1:
            found.doubled.append(f"{row['number']} was taken by the platform {row['accepted']} times")
    found.forgotten += [f"message {id} was not delivered" for id in books.undelivered]
    return found


def _judge_alarms(found: Findings, n: int, rows: Sequence[Mapping[str, Any]], *, over: bool) -> None:
    name, rule = subject(n), TRAPPED if is_rescue(n) else FAULT
    mine = [row for row in rows if row["rule"] == rule]
    found.invented += [f"{row['rule']} of {name}, planted for {rule}" for row in rows if row["rule"] != rule]
    _judge_count(found, f"alarm of {name}", mine)
    if over and any(row["active"] for row in mine):
        found.forgotten.append(f"end of {name}: its alarm still holds")
    if not over and mine and not any(row["open"] and row["active"] for row in mine):
        found.forgotten.append(f"open alarm of {name}: its condition holds, and the alarm does not")


def _judge_count(found: Findings, what: str, rows: Sequence[object]) -> None:
    if not rows:
        found.forgotten.append(what)
    if len(rows) > 1:
        found.doubled.append(f"{what}: {len(rows)} times")


def by(rows: Iterable[Mapping[str, Any]], column: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return rows by the value of a column."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row[column]), []).append(row)
    return found


def judge_transitions(found: Findings, expected: Sequence[Transition], written: Sequence[Transition]) -> None:
    """Compare what the workers wrote of a shard with what an undisturbed engine makes of the same log."""
    count = Counter((one.shard, one.source, one.index) for one in written)
    found.doubled += [f"transition {place} is there {times} times" for place, times in count.items() if times > 1]
    due = {(one.shard, one.source, one.index): one for one in expected}
    have = {(one.shard, one.source, one.index): one for one in written}
    found.forgotten += [f"transition {place} of {due[place].subject}" for place in due.keys() - have.keys()]
    found.invented += [
        f"transition {place} of {one.subject}: an undisturbed engine makes {due.get(place)}"
        for place, one in have.items()
        if due.get(place) != one
    ]
