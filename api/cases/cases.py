"""The life of a case: its stages, who may move them, its number and class code. Pure decisions with reason codes.

Each case has one owner system. An *external* case (owned by the grid platform) is moved only by what the platform says;
it may leave stages out, because messages may be lost to us that were not to it. A *native* one (maintenance) is moved
by the desk alone: by what its contractor does, and by its device, which alone says that it is well.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import msgspec

from citybrain.clock import DAY_MS, MINUTE_MS
from citybrain.errors import TransitionError
from citybrain.machine import Machine, Moved, Step
from rules.categories import Category

STAGES = {
    "reported": "上报",
    "accepted": "受理",
    "verify_report": "核实",
    "filed": "立案",
    "dispatched": "派遣",
    "returned": "退单",
    "taken": "接单",
    "arrived": "到场",
    "handled": "处置",
    "feedback": "反馈",
    "reviewed": "审核",
    "verify_fix": "核查",
    "closed": "结案",
    "void": "作废",
}
FINISHED = frozenset({"closed", "void"})
_BY_CHINESE = {zh: stage for stage, zh in STAGES.items()}
_LINE = tuple(stage for stage in STAGES if stage not in ("returned", "void"))  # the way without detours
WITH_CONTRACTOR = ("dispatched", "taken", "handled", "feedback")  # the stages of an open maintenance order
VERDICTS = ("confirmed", "false_alarm", "duplicate")


def _external(owner: str) -> bool:
    return owner == "external"


def _native(owner: str) -> bool:
    return owner == "native"


def _maintenance() -> list[Step]:
    """What the contractor does with a maintenance order; that the device is well, only the device says."""
    steps = [
        Step("dispatched", "take", "taken", "taken_by_contractor", _native),
        Step("dispatched", "done", "handled", "done_by_contractor", _native),
        Step("taken", "done", "handled", "done_by_contractor", _native),
        Step("feedback", "done", "closed", "done_and_well", _native),
        Step("taken", "recovered", "feedback", "device_recovered", _native),
        Step("handled", "recovered", "feedback", "device_recovered", _native),
    ]
    steps += [Step(stage, "reassign", "dispatched", "given_to_another", _native) for stage in ("dispatched", "taken")]
    return steps + [Step(stage, "not_needed", "void", "not_needed", _native) for stage in WITH_CONTRACTOR]


def _steps() -> list[Step]:
    steps = [Step("new", "report", "reported", "confirmed")]
    for index, stage in enumerate(_LINE[:-1]):
        later = _LINE[index + 1 :]
        steps += [
            Step(stage, to, to, "said_by_platform" if to == later[0] else "stages_left_out", _external) for to in later
        ]
    steps += [Step(stage, "returned", "returned", "unit_returned_it", _external) for stage in ("dispatched", "taken")]
    steps += [
        Step("returned", to, to, "dispatched_again" if to == "dispatched" else "stages_left_out", _external)
        for to in _LINE[_LINE.index("dispatched") :]
    ]
    steps += [
        Step("verify_fix", to, to, "rework", _external) for to in ("dispatched", "handled")
    ]  # 返工: the check was not passed
    for stage in (*_LINE[:-1], "returned"):
        steps += [
            Step(stage, "false_alarm", "void", "found_false", _external),
            Step(stage, "duplicate", "void", "known_elsewhere", _external),
            Step(stage, "void", "void", "withdrawn", _external),
            Step(stage, "void", "void", "incident_rejected", _native),
        ]
    steps += [
        Step("reported", "order", "dispatched", "sent_to_contractor", _native),
        Step("dispatched", "recovered", "feedback", "device_recovered", _native),
        Step("feedback", "came_back", "dispatched", "came_back", _native),
        Step("feedback", "quiet", "closed", "stayed_well", _native),
        *_maintenance(),
    ]
    return steps


CASE = Machine("case", "new", _steps())


def parse_stage(text: str) -> str:
    """Return the stage named by its id or its Chinese name; raises TransitionError, naming all of them."""
    stage = _BY_CHINESE.get(text, text)
    if stage not in STAGES:
        raise TransitionError(f"stage {text[:40]!r}: expected one of {', '.join(STAGES)}")
    return stage


def mirror(stage: str, owner: str, to: str) -> Moved | None:
    """Return how a case follows the platform to stage `to`, or None where it is there already.

    Raises TransitionError where the platform does not own the case, or says what is behind us: a late message.
    """
    if owner != "external":
        raise TransitionError(f"case: its owner system is {owner}, the platform does not move it")
    if to == stage:
        return None
    if to in ("dispatched", "handled") and stage == "verify_fix":
        return CASE.move(stage, to, owner)
    if stage in FINISHED or (to in _LINE and stage in _LINE and _LINE.index(to) < _LINE.index(stage)):
        raise TransitionError(f"case: {to!r} comes too late, it is at {stage!r}")
    return CASE.move(stage, to, owner)


def judged(stage: str, owner: str, verdict: str, to: str | None) -> Moved | None:
    """Return how a verdict moves a case: a refusal ends it, a confirmation goes to the stage said, or closes it.

    Raises TransitionError as `mirror` does, and for a verdict nobody knows.
    """
    if verdict not in VERDICTS:
        raise TransitionError(f"verdict {verdict[:40]!r}: expected one of {', '.join(VERDICTS)}")
    if verdict == "confirmed":
        return mirror(stage, owner, to or "closed")
    if owner != "external" or stage in FINISHED:
        mirror(stage, owner, "void")
        return None
    return CASE.move(stage, verdict, owner)


def number(case_id: int, opened_at: int, utc_offset_min: int) -> str:
    """Return the case's number: the local day it was opened on, and the running number of all cases.

    >>> number(12, 1795536000000, 480)
    'CB20261125-000012'
    """
    days = (opened_at + utc_offset_min * MINUTE_MS) // DAY_MS
    day = datetime.date(1970, 1, 1) + datetime.timedelta(days=days)
    return f"CB{day:%Y%m%d}-{case_id:06d}"


class ClassCode(msgspec.Struct, frozen=True):
    """A class code and the edition of the standard it belongs to; both empty where no edition has one."""

    edition: str
    code: str


def classify(category: Category, editions: Sequence[str]) -> ClassCode:
    """Return the category's code in the first of `editions` that has one: a code is never taken without its edition."""
    for edition in editions:
        if edition in category.codes:
            return ClassCode(edition, category.codes[edition])
    return ClassCode("", "")
