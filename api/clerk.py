"""What one input does: a transition, a timer, the end of a case. Asks the pure decisions, writes what they say.

Everything here happens inside the desk's transaction, at one `now_ms`. Alarms lead to incidents, incidents to cases;
an end goes the same way back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from api.assets.store import Shelf
from api.cases.cases import FINISHED
from api.cases.places import Atlas
from api.casework import CaseConfig, Casework, evidence_line
from api.ledger import Ledger, Row, text
from api.rulebook import Rulebook
from citybrain.db.schema import alarms, incidents
from citybrain.machine import Moved
from citybrain.model import Edge, Evidence, Transition
from rules.categories import Category
from streams import alarms as alarm_life
from streams import incidents as incident_life
from streams.incidents import CONFIRMING, INCIDENT, OPEN, Member, Subject, is_rescue
from streams.ruleset import Rule


class Setting(msgspec.Struct, frozen=True):
    """What decisions are made with, besides their inputs. `content` returns a blob by its hash."""

    rulebook: Rulebook
    atlas: Atlas
    categories: Mapping[str, Category]
    cases: CaseConfig
    quiet_ms: int
    shelf: Shelf
    content: Callable[[str], bytes]


class Clerk:
    """Handles one input at `now_ms`, writing into `ledger`."""

    def __init__(self, ledger: Ledger, setting: Setting, now_ms: int) -> None:
        self.ledger = ledger
        self.setting = setting
        self.now_ms = now_ms
        self.casework = Casework(ledger, setting.atlas, setting.categories, setting.cases, now_ms)

    # --- transitions

    def transition(self, transition: Transition) -> None:
        """Take one transition; one of a rule that its rule set does not have is counted and left out."""
        rule = self.setting.rulebook.find(transition.ruleset, transition.rule)
        if rule is None:
            self.ledger.drops["unknown_rule"] += 1
            self.ledger.warnings.append(f"rule {transition.rule!r}: not in rule set {transition.ruleset[:12]}")
            return
        alarm = self.ledger.open_alarm(rule.id, transition.subject)
        if transition.edge is Edge.RAISE:
            if alarm is None:
                self._raised(rule, transition)
            else:
                self._raised_again(rule, alarm, transition)
        elif alarm is None:
            self.ledger.drops["no_open_alarm"] += 1  # closed by its incident's end, or never raised here
        else:
            self._cleared(rule, alarm, transition)

    def _raised(self, rule: Rule, transition: Transition) -> None:
        change = alarm_life.decide("new", "raise", self._facts(rule), self.now_ms, self.setting.quiet_ms)
        on_trial = self.setting.atlas.on_trial(transition.subject)
        incident, why = (
            (None, "on_trial") if on_trial else self._incident_for(rule, transition.subject, transition.at_ms)
        )
        values = {
            "rule": rule.id,
            "subject": transition.subject,
            "urgency": rule.urgency,
            "raised_at": transition.at_ms,
            "opened_at": self.now_ms,
            "count": 1,
            "shard": transition.shard,
            "source": transition.source,
            "incident": incident,
            "why": why,
            **_raise_columns(transition),
        }
        id = self.ledger.add(alarms, state=change.moved.after, open=1, **values)
        self.ledger.counts["alarms"] += 1
        self._note("alarm", id, change.moved, incident=incident)
        if incident is not None:
            self._joined(incident, why, rule, id, transition.subject, transition.at_ms)

    def _joined(self, incident: int, why: str, rule: Rule, alarm: int, subject: str, at_ms: int) -> None:
        self._note("incident", incident, Moved("", "joined", "", why), alarm=alarm, subject=subject)
        row = self._incident(incident)
        self._touch(row, rule, at_ms)
        if is_rescue(rule):
            self._rescue(row, alarm)
        self.review(incident)

    def trial_passed(self, subject: str) -> None:
        """Take the alarms that a device raised on trial and that still hold as if they were raised now."""
        for row in self.ledger.trial_alarms(subject):
            rule = self.setting.rulebook.get(row["ruleset"], row["rule"])
            incident, why = self._incident_for(rule, subject, row["last_at"])
            self.ledger.set(alarms, row["id"], incident=incident, why=why)
            self._joined(incident, why, rule, row["id"], subject, row["last_at"])

    def _incident_for(self, rule: Rule, subject: str, at_ms: int) -> tuple[int, str]:
        cause = rule.correlate.cause
        by, key = incident_life.key_of(rule, subject, self.setting.atlas.device(subject))
        candidates = self.ledger.candidates(cause, key, subject)
        joined = incident_life.correlate(rule, key, by, at_ms, candidates)
        if joined.incident is not None:
            return joined.incident, joined.why
        moved = INCIDENT.move("new", incident_life.opening(rule))
        id = self.ledger.add(
            incidents,
            state=moved.after,
            open=1,
            kind=incident_life.kind_of(rule),
            cause=cause,
            by=by,
            key=key,
            urgency=rule.urgency,
            opened_at=self.now_ms,
            first_at=at_ms,
            last_at=at_ms,
        )
        self.ledger.counts["incidents"] += 1
        self._note("incident", id, moved)
        return id, joined.why

    def _rescue(self, incident: Row, alarm: int) -> None:
        """Open the rescue of a life-safety alarm: now, whatever becomes of the incident it is linked to.

        Where the alarm of another rule is open at this subject, and its rescue goes on, that one is this alarm's too:
        one car is one rescue, however many rules notice it.
        """
        row = self.ledger.get(alarms, alarm)
        assert row is not None
        others = [one for one in self.ledger.open_alarms(row["subject"]) if one["id"] != alarm]
        lasting = [one for one in others if one["due_at"] is None or one["due_at"] > self.now_ms]
        for known in filter(None, map(self._rescue_of, lasting)):
            if known["stage"] not in FINISHED:
                self.casework.joined(known, row)
                return
        member = self._member(row)
        subject = Subject(member, member.rule.case.category, member, "life_safety")
        self.casework.open("rescue", incident, subject, [evidence_line(row, member)])

    def _raised_again(self, rule: Rule, alarm: Row, transition: Transition) -> None:
        change = alarm_life.decide(alarm["state"], "raise", self._facts(rule), self.now_ms, self.setting.quiet_ms)
        came_back = not alarm["active"]
        self.ledger.set(
            alarms,
            alarm["id"],
            state=change.moved.after,
            count=alarm["count"] + 1,
            cleared_at=None,
            due_at=None,
            **_raise_columns(transition),
        )
        self._note("alarm", alarm["id"], change.moved, count=alarm["count"] + 1)
        if alarm["incident"] is None:  # raised on trial
            if not self.setting.atlas.on_trial(transition.subject):
                self.trial_passed(transition.subject)
            return
        incident = self._incident(alarm["incident"])
        rescue = self._rescue_of(alarm)
        if rescue is not None and came_back:
            self.casework.trapped_again(rescue)
        if incident["open"]:
            was_quiet = incident["quiet_at"] is not None
            self._touch(incident, rule, transition.at_ms)
            if was_quiet:
                self._came_back(incident["id"])
            self.review(incident["id"])

    def _came_back(self, incident: int) -> None:
        case = self.ledger.case_of(incident)
        if case is not None and case["owner_system"] == "external":
            self.casework.came_back(case)
        self.casework.native(incident, "came_back")

    def _cleared(self, rule: Rule, alarm: Row, transition: Transition) -> None:
        incident = self._incident(alarm["incident"]) if alarm["incident"] is not None else None
        facts = self._facts(rule, settled=incident is not None and self._settled(alarm, incident))
        change = alarm_life.decide(
            alarm["state"], "clear", facts, self.now_ms, self.setting.quiet_ms, due_at=alarm["due_at"]
        )
        if not alarm["active"]:
            self.ledger.drops["no_active_alarm"] += 1
            return
        self.ledger.set(
            alarms,
            alarm["id"],
            state=change.moved.after,
            open=int(change.open),
            active=0,
            cleared_at=transition.at_ms,
            due_at=change.due_at,
        )
        self._note("alarm", alarm["id"], change.moved, observed_at=transition.at_ms)
        rescue = self._rescue_of(alarm)
        if rescue is not None and not self._still_in_danger(transition.subject):
            self.casework.rescued(rescue, transition.at_ms, "sensors_are_normal")
        if incident is not None and incident["open"]:
            self._ended(incident["id"])
            self.review(incident["id"])

    def _ended(self, incident: int) -> None:
        """Begin the quiet time, where nothing of an incident holds any more."""
        if self.ledger.any_active(incident):
            return
        self.ledger.set(incidents, incident, quiet_at=self.now_ms + self.setting.quiet_ms)
        case = self.ledger.case_of(incident)
        if case is not None and case["owner_system"] == "external":
            self.casework.recovered(case)
        self.casework.native(incident, "recovered")

    def _settled(self, alarm: Row, incident: Row) -> bool:
        """Whether what an alarm led to is finished: a rescue, where it has one, else its incident."""
        rescue = self._rescue_of(alarm)
        return rescue["stage"] in FINISHED if rescue is not None else not incident["open"]

    def _rescue_of(self, alarm: Row) -> Row | None:
        """Return the rescue that an alarm made or joined."""
        own = self.ledger.rescue_of(alarm["id"])
        if own is not None or alarm["incident"] is None or not is_rescue(self._rule_of(alarm)):
            return own
        return self.ledger.rescue_for(alarm["subject"])

    def _still_in_danger(self, subject: str) -> bool:
        """Whether some rule still says that a person is in danger there."""
        return any(row["active"] and is_rescue(self._rule_of(row)) for row in self.ledger.open_alarms(subject))

    def _touch(self, incident: Row, rule: Rule, at_ms: int) -> None:
        self.ledger.set(
            incidents,
            incident["id"],
            first_at=min(incident["first_at"], at_ms),
            last_at=max(incident["last_at"], at_ms),
            urgency=incident_life.urgency_of((incident["urgency"], rule.urgency)),
            quiet_at=None,
        )

    # --- incidents

    def review(self, id: int) -> None:
        """Do with an incident what its members now ask for, until they ask for nothing more."""
        while (incident := self._incident(id))["open"]:
            members = self.members(id)
            decision = incident_life.decide(incident["state"], members, incident["quiet_at"], self.now_ms)
            if decision.event is None:
                if decision.due_at != incident["due_at"]:
                    self.ledger.set(incidents, id, due_at=decision.due_at)
                break
            self.advance(incident, decision.event)
        case = self.ledger.case_of(id) if incident["state"] == "confirmed" else None
        if case is not None:
            self.casework.refresh(case, incident_life.case_subject(members), self._evidence(id))

    def advance(self, incident: Row, event: str, actor: str = "desk", reason: str = "") -> None:
        """Take a step of an incident's life, with all that follows: its case is opened, its alarms are let go."""
        id = incident["id"]
        moved = INCIDENT.move(incident["state"], event)
        values: dict[str, Any] = {"state": moved.after, "reason": reason or moved.reason}
        if event in CONFIRMING:
            values |= {"confirmed_at": self.now_ms, "confirmed_by": actor}
        if moved.after not in OPEN:
            values |= {"open": 0, "due_at": None, "quiet_at": None}
        self.ledger.set(incidents, id, **values)
        self._note("incident", id, moved, actor, **({"why": reason} if reason else {}))
        if event in CONFIRMING:
            self._open_case(id)
        if moved.after not in OPEN:
            self.casework.native(id, "void" if moved.after == "rejected" else "quiet")
            self._let_go(id)

    def _open_case(self, id: int) -> None:
        subject = incident_life.case_subject(self.members(id))
        if subject is not None:
            self.casework.open(subject.lead.rule.case.kind, self._incident(id), subject, self._evidence(id))

    def _let_go(self, incident: int) -> None:
        """Close the alarms that had ended. A rescue's waits for the rescue: a person may be trapped again."""
        over = self._incident(incident)
        for row in self.ledger.members(incident):
            if row["state"] in alarm_life.HELD and self._settled(row, over):
                self.settle(row, "settle")

    def settle(self, alarm: Row, event: str) -> None:
        """Close an alarm that has ended: `settle` with what it led to, `latch_over` because it did not come back."""
        change = alarm_life.decide(
            alarm["state"], event, alarm_life.Facts(), self.now_ms, self.setting.quiet_ms, due_at=alarm["due_at"]
        )
        self.ledger.set(alarms, alarm["id"], state=change.moved.after, open=int(change.open), due_at=change.due_at)
        self._note("alarm", alarm["id"], change.moved)

    def case_ended(self, case: Row, verdict: str | None) -> None:
        """Let go what a case that its owner finished has held.

        An incident whose alarms still hold stays and goes on collecting them, so that they make no second case; one
        that was found false ends at once, so that whatever comes next is looked at afresh.
        """
        if case["kind"] == "rescue":
            for alarm in self.ledger.open_alarms(case["subject"]):
                rescue = self._rescue_of(alarm) if alarm["state"] in alarm_life.HELD else None
                if rescue is not None and rescue["id"] == case["id"]:
                    self.settle(alarm, "settle")
            return
        incident = self._incident(case["incident"])
        if incident["state"] != "confirmed":
            return
        if verdict == "false_alarm":
            self.advance(incident, "found_false")
        elif not self.ledger.any_active(incident["id"]):
            self.advance(incident, "finished")

    # --- timers

    def timer(self, entity: str, id: int) -> None:
        """Do what is due: a cleared alarm is let go, an incident's policy looks again."""
        if entity == "incident":
            self.review(id)
            return
        alarm = self.ledger.get(alarms, id)
        if alarm is not None and alarm["state"] in alarm_life.HELD:
            self.settle(alarm, "latch_over")

    # --- reading

    def members(self, incident: int) -> list[Member]:
        """Return an incident's alarms as decisions need them."""
        return [self._member(row) for row in self.ledger.members(incident)]

    def _member(self, row: Row) -> Member:
        evidence = msgspec.json.decode(row["evidence"], type=Evidence)
        return Member(
            alarm=row["id"],
            rule=self._rule_of(row),
            subject=row["subject"],
            active=bool(row["active"]),
            opened_at=row["opened_at"],
            raised_at=row["last_at"],
            cleared_at=row["cleared_at"],
            value=evidence.value,
            limit=evidence.limit,
        )

    def _rule_of(self, alarm: Row) -> Rule:
        return self.setting.rulebook.get(alarm["ruleset"], alarm["rule"])

    def _evidence(self, incident: int) -> Sequence[Mapping[str, Any]]:
        return [evidence_line(row, self._member(row)) for row in self.ledger.members(incident)]

    def _incident(self, id: int) -> Row:
        row = self.ledger.get(incidents, id)
        assert row is not None, f"incident {id}: its alarm names it, so it is there"
        return row

    @staticmethod
    def _facts(rule: Rule, *, settled: bool = False) -> alarm_life.Facts:
        return alarm_life.Facts(life=is_rescue(rule), settled=settled)

    def _note(self, entity: str, id: int, moved: Moved, actor: str = "desk", /, **details: Any) -> None:
        self.ledger.note(self.now_ms, entity, id, moved, actor, **details)


def _raise_columns(transition: Transition) -> dict[str, Any]:
    return {
        "ruleset": transition.ruleset,
        "active": 1,
        "received_at": transition.received_at,
        "last_at": transition.at_ms,
        "evidence": text(transition.evidence),
    }
