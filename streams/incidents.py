"""Which alarms have one cause, when that becomes a case, and what the case is about: pure decisions with reasons.

    pending    研判中  waits for its confirmation policy
    watching   关注    no member could make it a case: evidence, or rescues that stand for themselves
    confirmed  已立案  it has its case
    rejected   不成立  an operator or the platform found it untrue; what still holds of it stays silent
    closed     已结束  none of its alarms came back

A confirmed incident goes on collecting alarms of its cause while one of them holds, and a quiet time longer, whatever
became of the case: that is what keeps a chattering or spreading cause from becoming a second case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from citybrain.machine import Machine, Step
from citybrain.model import Device
from streams.ruleset import Rule

INCIDENT = Machine(
    "incident",
    "new",
    (
        Step("new", "wait", "pending", "opened"),
        Step("new", "watch", "watching", "opened_as_evidence"),
        *(
            step
            for state in ("pending", "watching")
            for step in (
                Step(state, "at_once", "confirmed", "its_rule_confirms_at_once"),
                Step(state, "members", "confirmed", "enough_members"),
                Step(state, "held", "confirmed", "held_long_enough"),
                Step(state, "operator", "confirmed", "confirmed_by_operator"),
                Step(state, "reject", "rejected", "rejected_by_operator"),
                Step(state, "quiet", "closed", "did_not_come_back"),
            )
        ),
        Step("pending", "all_clear", "closed", "cleared_before_confirmation"),
        Step("watching", "wait", "pending", "a_member_can_confirm"),
        Step("confirmed", "quiet", "closed", "did_not_come_back"),
        Step("confirmed", "finished", "closed", "its_case_is_finished"),
        Step("confirmed", "found_false", "rejected", "its_case_was_found_false"),
    ),
)

OPEN = frozenset({"pending", "watching", "confirmed"})
CONFIRMING = frozenset({"at_once", "members", "held", "operator"})
URGENCIES = ("watch", "normal", "urgent", "life")
CONFIRMABLE = ("at_once", "after", "members", "operator")

# --- which incident an alarm belongs to -------------------------------------------------------------------------


class Candidate(msgspec.Struct, frozen=True):
    """An open incident that an alarm might belong to.

    first_at, last_at: event times of its earliest and latest raise. active: one of its alarms holds now.
    shares_device: one of its members has the alarm's subject.
    """

    id: int
    kind: str
    cause: str
    key: str
    first_at: int
    last_at: int
    active: bool
    shares_device: bool


class Joined(msgspec.Struct, frozen=True):
    """Where an alarm belongs: an incident, or a new one (None), and why: the reason code of its membership."""

    incident: int | None
    why: str


def kind_of(rule: Rule) -> str:
    """Return what an incident of this rule can become: `maintenance`, or `case` for all that concerns the city."""
    return "maintenance" if rule.case.kind == "maintenance" else "case"


def is_rescue(rule: Rule) -> bool:
    """Return whether an alarm of this rule is a person in danger: a case of its own, at once, whatever else happens."""
    return rule.case.kind == "rescue" or rule.urgency == "life"


def key_of(rule: Rule, subject: str, device: Device | None) -> tuple[str, str]:
    """Return (scope, key) that alarms of one incident share: a zone, building or gateway, else the device itself.

    A device's own trouble is its own: two flat batteries have one cause only by chance.
    """
    by = rule.correlate.by
    if device is None or rule.case.kind == "maintenance" or by == "device":
        return "device", subject
    key = {"zone": device.zone, "building": device.building, "gateway": device.gateway}[by]
    return (by, key) if key else ("device", subject)


def correlate(rule: Rule, key: str, by: str, at_ms: int, candidates: Iterable[Candidate]) -> Joined:
    """Return the incident an alarm raised at `at_ms` (event time) belongs to.

    First choice: same cause, same key, and either an alarm there still holds or the raise lies within the rule's
    `within` of the incident's raises. Second: any incident of the same device. Maintenance never mixes with the rest.
    The latest incident wins a tie.
    """
    kind, within = kind_of(rule), rule.correlate.within
    same = [c for c in candidates if c.kind == kind]
    exact = [c for c in same if c.cause == rule.correlate.cause and c.key == key and _near(c, at_ms, within)]
    if exact:
        return Joined(max(c.id for c in exact), f"same_{by}")
    shared = [c for c in same if c.shares_device and kind != "maintenance"]
    if shared:
        return Joined(max(c.id for c in shared), "same_device")
    return Joined(None, "first")


def _near(candidate: Candidate, at_ms: int, within: int) -> bool:
    if at_ms < candidate.first_at - within:
        return False
    return candidate.active or at_ms <= candidate.last_at + within


# --- when it becomes a case -------------------------------------------------------------------------------------


class Member(msgspec.Struct, frozen=True):
    """An alarm of an incident, as far as decisions need it.

    opened_at: desk time. raised_at, cleared_at: event times of its latest raise and clear. value, limit: what was
    measured against what.
    """

    alarm: int
    rule: Rule
    subject: str
    active: bool
    opened_at: int
    raised_at: int
    cleared_at: int | None = None
    value: float | None = None
    limit: float | None = None

    @property
    def confirmable(self) -> bool:
        """Whether its policy can make the incident a case; a rescue is a case of its own."""
        return not is_rescue(self.rule) and self.rule.confirm.policy in CONFIRMABLE


class Decision(msgspec.Struct, frozen=True):
    """What happens to an incident now: an event of INCIDENT or None, and when to look again."""

    event: str | None
    due_at: int | None


def opening(rule: Rule) -> str:
    """Return the event that opens an incident with an alarm of this rule as the first."""
    return "watch" if is_rescue(rule) or rule.confirm.policy not in CONFIRMABLE else "wait"


def decide(state: str, members: Sequence[Member], quiet_at: int | None, now_ms: int) -> Decision:
    """Return what an open incident does now, given all its alarms; `quiet_at` is set while none of them holds."""
    quiet = quiet_at is not None and now_ms >= quiet_at
    if state == "confirmed":
        return Decision("quiet" if quiet else None, quiet_at)
    able = [member for member in members if member.confirmable]
    if state == "watching" and able:
        return Decision("wait", now_ms)
    event = _confirmation(able, now_ms)
    if event is None and state == "pending" and _all_clear(members):
        event = "all_clear"
    if event is None and quiet:
        event = "quiet"
    times = [at for at in (_due(able, now_ms), quiet_at) if at is not None]
    return Decision(event, min(times, default=None))


def _confirmation(able: Sequence[Member], now_ms: int) -> str | None:
    if any(member.rule.confirm.policy == "at_once" for member in able):
        return "at_once"
    together = [member for member in able if member.rule.confirm.policy == "members"]
    if together and len(subjects(together)) >= min(member.rule.confirm.members for member in together):
        return "members"
    if any(_held(member, able, now_ms) for member in able):
        return "held"
    return None


def _held(member: Member, able: Sequence[Member], now_ms: int) -> bool:
    """Whether a member held long enough: until now by the desk's clock, or from raise to clear in event time.

    The second counts for what a gateway delivers late: it was true, even if it is over when we hear of it.
    """
    if member.rule.confirm.policy not in ("after", "members"):
        return False
    if member.active:
        return now_ms >= _hold_ends(member, able)
    return member.cleared_at is not None and member.cleared_at - member.raised_at >= member.rule.confirm.hold


def _hold_ends(member: Member, able: Sequence[Member]) -> int:
    """Return when `hold` is over (desk time): after the alarm itself, or for `members` after the first of its rule."""
    if member.rule.confirm.policy == "after":
        return member.opened_at + member.rule.confirm.hold
    return min(m.opened_at for m in able if m.rule.id == member.rule.id) + member.rule.confirm.hold


def _due(able: Sequence[Member], now_ms: int) -> int | None:
    timed = [m for m in able if m.active and m.rule.confirm.policy in ("after", "members")]
    return min((at for m in timed if (at := _hold_ends(m, able)) > now_ms), default=None)


def _all_clear(members: Sequence[Member]) -> bool:
    """Whether nothing holds and nobody is waited for: an operator's decision and a rescue outlast the alarm."""
    waits = any(m.rule.confirm.policy == "operator" or is_rescue(m.rule) for m in members)
    return not waits and not any(member.active for member in members)


# --- what the case is about -------------------------------------------------------------------------------------


class Subject(msgspec.Struct, frozen=True):
    """What a case will be: the alarm that leads it, the category, the alarm whose place it has, and why."""

    lead: Member
    category: str
    place: Member
    reason: str  # leading_rule | widened


def subjects(members: Iterable[Member]) -> frozenset[str]:
    """Return the distinct devices of members."""
    return frozenset(member.subject for member in members)


def urgency_of(urgencies: Iterable[str]) -> str:
    """Return the most pressing of some urgencies.

    >>> urgency_of(["watch", "urgent", "normal"])
    'urgent'
    """
    return max(urgencies, key=URGENCIES.index)


def case_subject(members: Sequence[Member]) -> Subject | None:
    """Return what the incident's case is about, or None where no member makes one.

    The rule of the highest rank leads, among alarms that hold where any does; of equals the first alarm. Where enough
    devices share that rule, or another that widens to the same, the cause is a wider one; its place is where it is
    worst.
    """
    able = [member for member in members if not is_rescue(member.rule)]
    standing = [member for member in able if member.active] or able
    if not standing:
        return None
    lead = min(standing, key=lambda member: (-member.rule.case.rank, member.alarm))
    widened = lead.rule.case.widened
    same = [member for member in able if _wider(member) == _wider(lead)]
    if widened is None or len(subjects(same)) < widened.members:
        return Subject(lead, lead.rule.case.category, lead, "leading_rule")
    return Subject(lead, widened.category, max(same, key=_badness), "widened")


def _wider(member: Member) -> str:
    """Return what a member's cause is when many share it: two rules that name the same count together."""
    widened = member.rule.case.widened
    return widened.category if widened else member.rule.id


def _badness(member: Member) -> tuple[float, int]:
    """How far beyond its limit a member is; of equals the first alarm."""
    if member.value is None or member.limit is None:
        return (-1.0, -member.alarm)
    return (abs(member.value - member.limit), -member.alarm)
