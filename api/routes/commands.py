"""What an operator wants: stored as a durable command, answered 202; the desk (or ingest) decides and says so.

Who asks stands in the header `X-Actor` or in the body's `actor`. That is a name, not a proof: until authentication
comes the API listens on loopback only.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Header
from pydantic import BaseModel, Field
from sqlalchemy import select

from api.problem import Problem
from api.routes import answers, rows
from api.routes.alarms import MISSING
from api.site import Here, Site
from citybrain.db.schema import alarms, cases, commands, incidents
from citybrain.mailbox import Command, Mailbox, command
from citybrain.storage import OS_FILES
from citybrain.wire import crc32c

router = APIRouter(prefix="/v1", tags=["commands"])

Actor = Annotated[str | None, Header(alias="X-Actor", max_length=200, description="who asks; percent-encoded UTF-8")]
TO_INGEST = "in-"
REFUSED = {**MISSING, 400: {"model": answers.Refusal}}


class Asked(BaseModel):
    """Who asks (unless `X-Actor` says so), and why."""

    actor: str = Field(default="", max_length=100)
    reason: str = Field(default="", max_length=500)


class Rejected(BaseModel):
    """Who rejects, and why: a reason is mandatory."""

    actor: str = Field(default="", max_length=100)
    reason: str = Field(min_length=1, max_length=500)


class Override(BaseModel):
    """A rule (or `*`, all) is silent for a device in [from, until), Unix ms: authorised use, works, inspection."""

    device: str = Field(max_length=100)
    rule: str = Field(default="*", max_length=100)
    from_ms: int = Field(alias="from", ge=0, description="Unix ms")
    until_ms: int = Field(alias="until", ge=0, description="Unix ms, after `from`")
    reason: str = Field(min_length=1, max_length=500)
    actor: str = Field(default="", max_length=100)


@router.post("/alarms/{id}/acknowledge", status_code=202, responses=REFUSED)
def acknowledge(site: Here, id: int, asked: Asked | None = None, x_actor: Actor = None) -> answers.Accepted:
    """An operator has seen the alarm."""
    asked = asked or Asked()
    actor = actor_of(x_actor, asked.actor)
    with site.database() as db:
        rows.one(db, alarms, alarms.c.id, id, "alarm")
    return put(site, site.desk, "acknowledge", actor, body={"alarm": id}, reason=asked.reason)


@router.post("/incidents/{id}/confirm", status_code=202, responses=REFUSED)
def confirm(site: Here, id: int, asked: Asked | None = None, x_actor: Actor = None) -> answers.Accepted:
    """An operator confirms the incident: it becomes a case now."""
    asked = asked or Asked()
    actor = actor_of(x_actor, asked.actor)
    with site.database() as db:
        rows.one(db, incidents, incidents.c.id, id, "incident")
    return put(site, site.desk, "confirm", actor, body={"incident": id}, reason=asked.reason)


@router.post("/incidents/{id}/reject", status_code=202, responses=REFUSED)
def reject(site: Here, id: int, rejected: Rejected, x_actor: Actor = None) -> answers.Accepted:
    """An operator rejects the incident: it becomes no case, because of `reason`."""
    actor = actor_of(x_actor, rejected.actor)
    with site.database() as db:
        rows.one(db, incidents, incidents.c.id, id, "incident")
    return put(site, site.desk, "reject", actor, body={"incident": id}, reason=rejected.reason)


@router.post("/cases/{number}/rescued", status_code=202, responses=REFUSED)
def rescued(site: Here, number: str, asked: Asked | None = None, x_actor: Actor = None) -> answers.Accepted:
    """The passengers are out (解困); the repair has its own clock."""
    asked = asked or Asked()
    actor = actor_of(x_actor, asked.actor)
    with site.database() as db:
        row = rows.one(db, cases, cases.c.number, number, "case")
    if row["kind"] != "rescue":
        raise Problem(409, "not_a_rescue", f"case {number}", f"it is a {row['kind']}; only a rescue can be rescued")
    return put(site, site.desk, "rescued", actor, body={"case": number}, reason=asked.reason)


@router.post("/overrides", status_code=202, responses=REFUSED)
def override(site: Here, asked: Override, x_actor: Actor = None) -> answers.Accepted:
    """Silence a rule for a device (or an area: `zone:CODE`) and a time; it goes into the log as a control record."""
    actor = actor_of(x_actor, asked.actor)
    if not site.latest.means(asked.device):
        raise rows.not_found("device or area", asked.device)
    if asked.until_ms <= asked.from_ms:
        raise Problem(400, "empty_time", "body until", "`until` must come after `from`, both in Unix ms")
    _known_rule(site, asked.rule)
    body = {
        "subject": asked.device,
        "rule": asked.rule,
        "from_ms": asked.from_ms,
        "until_ms": asked.until_ms,
        "reason": asked.reason,
        "actor": actor,
    }
    made = Command(ingest_id(secrets.token_hex(8)), "override", actor, site.clock.now_ms(), body, asked.reason)
    store(site, site.ingest, made)
    return answers.Accepted(command=made.id)


@router.get("/commands/{id}", responses=MISSING)
def get_command(site: Here, id: str) -> answers.CommandState:
    """Return what became of a command: pending, applied, or refused with a message."""
    if id.startswith(TO_INGEST):
        return _ingest_state(site, id)
    waiting = pending(site.desk, id)
    known = decided(site, id)
    if known is not None:
        return known
    if waiting:
        return answers.CommandState(command=id, state="pending")
    raise rows.not_found("command", id)


def _ingest_state(site: Site, id: str) -> answers.CommandState:
    """Ingest removes a command once it stands in the log, or keeps it aside as refused; it writes nothing else.

    So an id says by itself that we gave it out: what is neither waiting nor refused was applied.
    """
    if ingest_id(id.removeprefix(TO_INGEST)[:16]) != id:
        raise rows.not_found("command", id)
    if pending(site.ingest, id):
        return answers.CommandState(command=id, state="pending", kind="override")
    if pending(site.ingest, id, ".refused"):
        what = "ingest could not do it; its warnings in /v1/status say why"
        return answers.CommandState(command=id, state="refused", kind="override", message=what)
    return answers.CommandState(command=id, state="applied", kind="override")


def ingest_id(token: str) -> str:
    """Return the id of a command to ingest: `token` and its checksum."""
    return f"{TO_INGEST}{token}{crc32c(token.encode()):08x}"


def actor_of(header: str | None, body: str) -> str:
    """Return who asks; raises Problem 400 where nobody says so."""
    actor = (unquote(header) if header else body).strip()
    if not actor:
        raise Problem(400, "no_actor", "header X-Actor or body actor", "say who asks: every change names its actor")
    return actor


def put(site: Site, box: Mailbox, kind: str, actor: str, *, body: dict[str, Any], reason: str) -> answers.Accepted:
    """Store a command durably and return its id."""
    made = command(kind, actor, site.clock.now_ms(), body, reason)
    store(site, box, made)
    return answers.Accepted(command=made.id)


def store(site: Site, box: Mailbox, made: Command) -> None:
    """Store a command durably; raises StorageError."""
    box.put(made)
    site.counters.add("sent_total")


def pending(box: Mailbox, id: str, suffix: str = ".json") -> bool:
    """Return whether the command still waits to be taken; with `.refused`, whether it was put aside."""
    return any(name.endswith(f"-{id}{suffix}") for name in OS_FILES.names(box.folder))


def decided(site: Site, id: str) -> answers.CommandState | None:
    """Return what was decided about a command, None where nothing was yet.

    Who takes a command writes what became of it before removing it from the mailbox: ask the mailbox first.
    """
    with site.database() as db:
        row = db.execute(select(commands).where(commands.c.id == id)).mappings().first()
    if row is None:
        return None
    return answers.CommandState(**{**row, "command": row["id"], "state": row["result"]})


def _known_rule(site: Site, rule: str) -> None:
    active = site.layout.read_active()
    if rule != "*" and active is not None and site.rule(active.ruleset, rule) is None:
        raise rows.not_found("rule", rule)
