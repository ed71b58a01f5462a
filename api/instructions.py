"""Commands to the desk: what operators and the grid platform want, done or refused with a reason that helps.

A command is looked at whole before anything is written, so a refusal has no effects. Both outcomes are recorded in
`commands`, under the command's id, by which a repeat is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from api import orders
from api.assets import office
from api.cases.cases import CASE, FINISHED, judged, mirror, parse_stage
from api.clerk import Clerk
from api.ledger import Row
from citybrain.db.schema import alarms, cases, incidents
from citybrain.errors import CityBrainError, NotFound, TransitionError, UsageError
from citybrain.mailbox import Command
from streams import alarms as alarm_life
from streams import incidents as incident_life

T = TypeVar("T")


class _Alarm(msgspec.Struct, frozen=True):
    alarm: int


class _Incident(msgspec.Struct, frozen=True):
    incident: int


class _Case(msgspec.Struct, frozen=True):
    case: str


class _Done(msgspec.Struct, frozen=True):
    case: str
    work: str


class _Reassign(msgspec.Struct, frozen=True):
    case: str
    unit: str


class _Progress(msgspec.Struct, frozen=True):
    case: str
    stage: str
    external_id: str | None = None


class _Verdict(msgspec.Struct, frozen=True):
    case: str
    verdict: str
    stage: str | None = None
    external_id: str | None = None


def follow(clerk: Clerk, command: Command) -> bool:
    """Do what a command says, or refuse it, and record which; return whether it was done."""
    try:
        handle = HANDLERS.get(command.kind)
        if handle is None:
            raise UsageError(f"kind {command.kind[:40]!r}: expected one of {', '.join(HANDLERS)}")
        message, result = handle(clerk, command), "applied"
    except CityBrainError as error:
        message, result = str(error), "refused"
    clerk.ledger.counts[f"commands_{result}"] += 1
    clerk.ledger.decided(
        id=command.id,
        kind=command.kind,
        actor=command.actor,
        at=command.at,
        applied_at=clerk.now_ms,
        result=result,
        message=message,
        reason=command.reason,
    )
    return result == "applied"


def _body(command: Command, kind: type[T]) -> T:
    try:
        return msgspec.convert(command.body, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"body of {command.kind!r}: {error}") from None


# --- operators --------------------------------------------------------------------------------------------------


def _acknowledge(clerk: Clerk, command: Command) -> str:
    id = _body(command, _Alarm).alarm
    row = clerk.ledger.get(alarms, id)
    if row is None:
        raise NotFound(f"alarm {id}: no such alarm")
    if row["acknowledged_at"] is not None and row["state"] in ("acked", "latched", alarm_life.CLOSED):
        raise TransitionError(f"alarm {id}: {row['acknowledged_by']} has acknowledged it already")
    if row["state"] == alarm_life.CLOSED:
        raise TransitionError(f"alarm {id}: it is over, there is nothing left to acknowledge")
    facts = alarm_life.Facts(life=row["urgency"] == "life")
    change = alarm_life.decide(
        row["state"], "acknowledge", facts, clerk.now_ms, clerk.setting.quiet_ms, due_at=row["due_at"]
    )
    clerk.ledger.set(
        alarms,
        id,
        state=change.moved.after,
        open=int(change.open),
        due_at=change.due_at,
        acknowledged_at=clerk.now_ms,
        acknowledged_by=command.actor,
    )
    clerk.ledger.note(clerk.now_ms, "alarm", id, change.moved, command.actor, why=command.reason)
    return f"alarm {id} acknowledged"


def _undecided(clerk: Clerk, command: Command) -> Row:
    id = _body(command, _Incident).incident
    row = clerk.ledger.get(incidents, id)
    if row is None:
        raise NotFound(f"incident {id}: no such incident")
    if not row["open"]:
        raise TransitionError(f"incident {id}: it is over ({row['state']}: {row['reason']})")
    return row


def _confirm(clerk: Clerk, command: Command) -> str:
    row = _undecided(clerk, command)
    if row["state"] == "confirmed":
        raise TransitionError(f"incident {row['id']}: confirmed already, by {row['confirmed_by']}")
    if incident_life.case_subject(clerk.members(row["id"])) is None:
        raise TransitionError(f"incident {row['id']}: its alarms are rescues, and each has its own case already")
    clerk.advance(row, "operator", command.actor, command.reason)
    clerk.review(row["id"])
    return f"incident {row['id']} confirmed"


def _reject(clerk: Clerk, command: Command) -> str:
    row = _undecided(clerk, command)
    if not command.reason.strip():
        raise UsageError(f"incident {row['id']}: a rejection needs a reason")
    if row["state"] == "confirmed":
        case = clerk.ledger.case_of(row["id"])
        what = f"case {case['number']} belongs to {case['owner_system']}" if case is not None else "it has its case"
        raise TransitionError(f"incident {row['id']}: confirmed already; {what}, and only its owner ends it")
    clerk.advance(row, "reject", command.actor, command.reason)
    return f"incident {row['id']} rejected"


def _rescued(clerk: Clerk, command: Command) -> str:
    case = _case(clerk, _body(command, _Case).case)
    if case["kind"] != "rescue":
        raise TransitionError(f"case {case['number']}: it is a {case['kind']}; only a rescue can be rescued")
    if case["rescued_at"] is not None:
        raise TransitionError(f"case {case['number']}: rescued already")
    clerk.casework.rescued(case, clerk.now_ms, "said_by_operator", command.actor)
    return f"case {case['number']}: rescued"


# --- the contractors' maintenance orders -------------------------------------------------------------------------


def _take(clerk: Clerk, command: Command) -> str:
    order = _order(clerk, _body(command, _Case).case)
    clerk.casework.move(order["id"], CASE.move(order["stage"], "take", "native"), command.actor, details=_why(command))
    return f"case {order['number']}: taken"


def _done(clerk: Clerk, command: Command) -> str:
    body = _body(command, _Done)
    order = _order(clerk, body.case)
    if not body.work.strip():
        raise UsageError(f"case {order['number']}: say what was done")
    moved = CASE.move(order["stage"], "done", "native")
    clerk.casework.move(order["id"], moved, command.actor, details={"work": body.work, **_why(command)})
    if moved.after in FINISHED:
        clerk.case_ended(order, None)
        return f"case {order['number']}: done, and its device is well: {moved.after}"
    return f"case {order['number']}: done; it closes when its device is well"


def _not_needed(clerk: Clerk, command: Command) -> str:
    order = _order(clerk, _body(command, _Case).case)
    if not command.reason.strip():
        raise UsageError(f"case {order['number']}: that nothing is needed needs a reason")
    moved = CASE.move(order["stage"], "not_needed", "native")
    clerk.casework.move(order["id"], moved, command.actor, details=_why(command), verdict_reason=command.reason)
    clerk.case_ended(order, None)
    return f"case {order['number']}: not needed"


def _reassign(clerk: Clerk, command: Command) -> str:
    body = _body(command, _Reassign)
    order = _order(clerk, body.case)
    if body.unit not in clerk.setting.atlas.units:
        raise NotFound(f"unit {body.unit[:40]!r}: not in the registry")
    if body.unit == order["unit"]:
        raise TransitionError(f"case {order['number']}: {body.unit} has it already")
    if not command.reason.strip():
        raise UsageError(f"case {order['number']}: giving it to another needs a reason")
    moved = CASE.move(order["stage"], "reassign", "native")
    details = {"unit": [order["unit"], body.unit], **_why(command)}
    clerk.casework.move(order["id"], moved, command.actor, details=details, unit=body.unit)
    return f"case {order['number']}: given to {body.unit}"


def _order(clerk: Clerk, number: str) -> Row:
    case = _case(clerk, number)
    if case["kind"] != "maintenance":
        raise TransitionError(f"case {case['number']}: it is a {case['kind']}, and belongs to {case['owner_system']}")
    return case


def _why(command: Command) -> dict[str, str]:
    return {"why": command.reason} if command.reason else {}


# --- the grid platform ------------------------------------------------------------------------------------------


def _progress(clerk: Clerk, command: Command) -> str:
    body = _body(command, _Progress)
    case = _case(clerk, body.case)
    moved = mirror(case["stage"], case["owner_system"], parse_stage(body.stage))
    _external_id(clerk, case, body.external_id)
    if moved is None:
        return f"case {case['number']}: at {case['stage']} already"
    clerk.casework.move(case["id"], moved, command.actor)
    if moved.after in FINISHED:
        clerk.case_ended(case, None)
    return f"case {case['number']}: {moved.after}"


def _verdict(clerk: Clerk, command: Command) -> str:
    body = _body(command, _Verdict)
    case = _case(clerk, body.case)
    if case["verdict"] is not None and case["stage"] in FINISHED:
        if case["verdict"] == body.verdict:
            return f"case {case['number']}: {body.verdict} already"
        raise TransitionError(f"case {case['number']}: closed as {case['verdict']}, {body.verdict!r} comes too late")
    to = parse_stage(body.stage) if body.stage else None
    if case["stage"] == "closed" and body.verdict == "confirmed":
        moved = None  # closed by its progress, and now we learn why
    else:
        moved = judged(case["stage"], case["owner_system"], body.verdict, to)
    _external_id(clerk, case, body.external_id)
    columns: dict[str, Any] = {"verdict": body.verdict, "verdict_reason": command.reason}
    if moved is None:
        clerk.ledger.set(cases, case["id"], **columns)
    else:
        clerk.casework.move(case["id"], moved, command.actor, **columns)
        if moved.after in FINISHED:
            clerk.case_ended(case, body.verdict)
    clerk.ledger.counts[f"verdicts_{body.verdict}"] += 1
    return f"case {case['number']}: {body.verdict}"


def _case(clerk: Clerk, number: str) -> Row:
    case = clerk.ledger.case_numbered(number)
    if case is None:
        raise NotFound(f"case {number[:40]!r}: no such case")
    return case


def _external_id(clerk: Clerk, case: Row, external_id: str | None) -> None:
    if external_id and external_id != case["external_id"]:
        clerk.ledger.set(cases, case["id"], external_id=external_id)


Handler = Callable[[Clerk, Command], str]
HANDLERS: dict[str, Handler] = {
    "acknowledge": _acknowledge,
    "confirm": _confirm,
    "reject": _reject,
    "rescued": _rescued,
    "take": _take,
    "done": _done,
    "not_needed": _not_needed,
    "reassign": _reassign,
    "progress": _progress,
    "verdict": _verdict,
    **office.HANDLERS,
    **orders.HANDLERS,
}
