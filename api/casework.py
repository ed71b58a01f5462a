"""Opening, changing and ending cases: decisions of `api.cases` written down, and told to the platform in the outbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from api.cases.cases import CASE, FINISHED, classify, number
from api.cases.clocks import Calendar, deadline
from api.cases.places import Atlas
from api.ledger import Ledger, Row, text
from api.platforms import events
from citybrain.db.schema import cases
from citybrain.machine import Moved
from rules.categories import Category, Clock
from streams.incidents import Member, Subject

EVIDENCE_MOST = 200  # members named in a case's evidence; the incident has them all
RESPONDING = frozenset({"arrived", "handled", "feedback", "reviewed", "verify_fix"})  # somebody is there: place stays


class CaseConfig(msgspec.Struct, frozen=True):
    """`editions`: where class codes come from, the first that has one; `calendar`: working time."""

    editions: tuple[str, ...]
    calendar: Calendar


class Casework:
    """The cases of one input: written into `ledger` at `now_ms`."""

    def __init__(
        self, ledger: Ledger, atlas: Atlas, categories: Mapping[str, Category], config: CaseConfig, now_ms: int
    ) -> None:
        self.ledger = ledger
        self.atlas = atlas
        self.categories = categories
        self.config = config
        self.now_ms = now_ms

    # --- opening

    def open(self, kind: str, incident: Row, subject: Subject, evidence: Sequence[Mapping[str, Any]]) -> None:
        """Open the case that an incident has become, or a rescue; an external one goes to the platform."""
        id = self.ledger.next_case()
        category, lead = self._category(subject.category), subject.lead
        class_code = classify(category, self.config.editions)
        self.ledger.add(
            cases,
            id=id,
            number=number(id, self.now_ms, self.config.calendar.utc_offset_min),
            kind=kind,
            incident=incident["id"],
            alarm=lead.alarm,
            subject=lead.subject,
            category=subject.category,
            edition=class_code.edition,
            code=class_code.code,
            title_zh=category.zh,
            title_en=category.en,
            urgency="life" if kind == "rescue" else lead.rule.urgency,
            unit=self.atlas.handler(category.unit, subject.place.subject),
            stage="reported",
            owner_system="native" if kind == "maintenance" else "external",
            observed_at=lead.raised_at,
            opened_at=self.now_ms,
            deadline=deadline(self.now_ms, category.clock, self.config.calendar),
            evidence=text(evidence[:EVIDENCE_MOST]),
            **self._where(subject.place.subject),
        )
        self.ledger.counts[{"rescue": "rescues", "maintenance": "maintenance"}.get(kind, "cases")] += 1
        moved = CASE.move("new", "report")
        self.ledger.note(self.now_ms, "case", id, moved, category=subject.category, chosen=subject.reason)
        if kind == "maintenance":
            self.move(id, CASE.move("reported", "order", "native"))
        else:
            self._tell(id, events.RESCUE_CREATED if kind == "rescue" else events.CASE_CREATED, active=True)

    def _category(self, name: str) -> Category:
        """Return a category; one that nobody configured still makes a case, for a person to class."""
        known = self.categories.get(name)
        if known is None:
            self.ledger.warnings.append(f"category {name!r}: not configured; its case has no class and no unit")
            return Category(zh=name, en=name, unit="", clock=Clock("urgent_hour", 2), source="not configured")
        return known

    def _where(self, subject: str) -> dict[str, Any]:
        located = self.atlas.locate(subject)
        if not located.complete:
            self.ledger.counts["unplaced"] += 1
            self.ledger.warnings.append(f"device {subject!r}: no cell, grid, street or owner; a person has to place it")
        place = located.place
        return {
            "lon": place.lon,
            "lat": place.lat,
            "cell": place.cell,
            "address": place.address,
            "grid": located.grid,
            "street": located.street,
            "workstation": located.workstation,
            "community": located.community,
            "road": place.road,
            "road_chief": located.road_chief,
            "area_owner": located.area_owner,
        }

    # --- changing

    def move(
        self, id: int, moved: Moved, actor: str = "desk", *, details: Mapping[str, Any] | None = None, **values: Any
    ) -> None:
        """Take a step of a case's life and note it with `details`; `values` are further columns."""
        if moved.after in FINISHED:
            values["closed_at"] = self.now_ms
            self.ledger.counts["closed"] += 1
        self.ledger.set(cases, id, stage=moved.after, **values)
        self.ledger.note(self.now_ms, "case", id, moved, actor, **(details or {}))

    def native(self, incident: int, event: str) -> None:
        """Move an incident's maintenance order, where it has one and the event means something to it."""
        case = self.ledger.case_of(incident)
        if case is None or case["owner_system"] != "native":
            return
        moved = CASE.find(case["stage"], event, "native")
        if moved is not None:
            self.move(case["id"], moved)

    def refresh(self, case: Row, subject: Subject | None, evidence: Sequence[Mapping[str, Any]]) -> None:
        """Bring an unfinished case up to what its incident has become: evidence, wider category, worse place."""
        if case["stage"] in FINISHED:
            return
        values: dict[str, Any] = {}
        told = text(evidence[:EVIDENCE_MOST])
        if told != case["evidence"]:
            values["evidence"] = told
        changes = self._widened(case, subject) if subject is not None and subject.reason == "widened" else {}
        if values or changes:
            self.ledger.set(cases, case["id"], **values, **changes)
        if changes:
            wider = "category" in changes
            moved = Moved(case["stage"], "updated", case["stage"], "cause_is_wider" if wider else "worse_elsewhere")
            details: dict[str, Any] = {
                name: [case[name], changes[name]] for name in ("category", "cell") if name in changes
            }
            self.ledger.note(self.now_ms, "case", case["id"], moved, **details)
            self._tell(case["id"], events.CASE_UPDATED, active=True)

    def _widened(self, case: Row, subject: Subject) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if case["category"] == subject.lead.rule.case.category != subject.category:
            category = self._category(subject.category)
            class_code = classify(category, self.config.editions)
            changes = {
                "category": subject.category,
                "edition": class_code.edition,
                "code": class_code.code,
                "title_zh": category.zh,
                "title_en": category.en,
                "unit": self.atlas.handler(category.unit, subject.place.subject),
                "deadline": min(case["deadline"], deadline(self.now_ms, category.clock, self.config.calendar)),
            }
        elif case["category"] != subject.category:
            return {}  # led by another rule
        if case["stage"] not in RESPONDING:
            where = self.atlas.locate(subject.place.subject)
            if where.complete and (where.place.lon, where.place.lat) != (case["lon"], case["lat"]):
                unit = self.atlas.handler(self._category(subject.category).unit, subject.place.subject)
                changes |= self._where(subject.place.subject) | {"unit": unit}
        return changes

    # --- what the sensors say of it

    def recovered(self, case: Row) -> None:
        """The sensors say that a case's cause is over: tell its owner, who alone closes it."""
        if case["stage"] in FINISHED:
            return
        self._say(case, "recovered", "sensors_are_normal")
        self._tell(case["id"], events.CASE_RECOVERED, active=False)

    def came_back(self, case: Row) -> None:
        """What had ended holds again."""
        if case["stage"] in FINISHED:
            return
        self._say(case, "came_back", "sensors_say_so_again")
        self._tell(case["id"], events.CASE_UPDATED, active=True)

    def rescued(self, case: Row, at_ms: int, reason: str, actor: str = "desk") -> None:
        """The passenger is out (解困); the case goes on until its owner closes it."""
        if case["rescued_at"] is None:
            self.ledger.set(cases, case["id"], rescued_at=at_ms)
            self._say(case, "rescued", reason, actor)
            if case["stage"] not in FINISHED:
                self._tell(case["id"], events.CASE_RECOVERED, active=False)

    def joined(self, case: Row, alarm: Row) -> None:
        """Another rule says so too: the rescue has its clock already, which runs on where it looked over."""
        moved = Moved(case["stage"], "joined", case["stage"], "another_rule_says_so")
        self.ledger.note(self.now_ms, "case", case["id"], moved, alarm=alarm["id"], rule=alarm["rule"])
        if case["rescued_at"] is not None:
            self.trapped_again(case)

    def trapped_again(self, case: Row) -> None:
        """A rescue that looked over is not: its clock runs on."""
        if case["rescued_at"] is not None:
            self.ledger.set(cases, case["id"], rescued_at=None)
        self.came_back(case)

    def _say(self, case: Row, event: str, reason: str, actor: str = "desk") -> None:
        moved = Moved(case["stage"], event, case["stage"], reason)
        self.ledger.note(self.now_ms, "case", case["id"], moved, actor)

    def _tell(self, id: int, kind: str, *, active: bool) -> None:
        case = self.ledger.get(cases, id)
        if case is None or case["owner_system"] != "external":
            return
        n, of_case = self.ledger.next_message(id)
        name = f"{case['number']}.{of_case}"
        data = events.case_data(
            case, self.atlas.unit_name(case["unit"]), self.atlas.unit_name(case["area_owner"]), active=active
        )
        self.ledger.post(
            id=name,
            n=n,
            case_id=id,
            type=kind,
            body=events.encode(name, kind, self.now_ms, data).decode(),
            urgent=int(case["kind"] == "rescue"),
            created_at=self.now_ms,
            state="pending",
            attempts=0,
            next_at=0,
        )
        self.ledger.counts["messages"] += 1


def evidence_line(row: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """Return one member of an incident as a case's evidence names it."""
    evidence = msgspec.json.decode(row["evidence"])
    return {
        "alarm": member.alarm,
        "rule": member.rule.id,
        "device": member.subject,
        "why": row["why"],
        "at": member.raised_at,
        "active": member.active,
        "metric": evidence["metric"],
        "value": member.value,
        "limit": member.limit,
    }
