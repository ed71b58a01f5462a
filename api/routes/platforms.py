"""What the grid platform tells us: progress and verdicts, as signed Standard Webhooks carrying CloudEvents.

docs/integration.md is this route's contract for the integrator.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Meta
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from api.platforms import webhook
from api.problem import Problem
from api.routes import answers
from api.routes.commands import decided, pending, store
from api.routes.rows import not_found
from api.site import Here, Site
from citybrain.clock import real_unix_s
from citybrain.db.schema import cases
from citybrain.errors import SignatureError
from citybrain.mailbox import Command

router = APIRouter(prefix="/v1/platforms", tags=["platforms"])

MAX_BYTES = 64 * 1024
ACTOR = "platform:grid"
Words = Annotated[str, Meta(max_length=500)]
Name = Annotated[str, Meta(min_length=1, max_length=100)]


class Report(msgspec.Struct, frozen=True):
    """The `data` of an event: which case, where it is now, and what the field found out."""

    case: Name
    stage: Annotated[str, Meta(max_length=100)] = ""
    verdict: Literal["confirmed", "false_alarm", "duplicate"] | None = None
    reason: Words = ""
    external_id: Annotated[str, Meta(max_length=100)] = ""


class Event(msgspec.Struct, frozen=True):
    """A CloudEvent 1.0 in structured mode; fields that we do not need are not looked at."""

    specversion: Literal["1.0"]
    id: Name
    source: Name
    type: Literal["cn.citybrain.platform.progress", "cn.citybrain.platform.verdict"]
    data: Report


_event = msgspec.json.Decoder(Event)
# Whole, without references: FastAPI's components hold its own models only.
_SCHEMA = {**msgspec.json.schema(Event)["$defs"]["Event"]}
_SCHEMA["properties"] = {**_SCHEMA["properties"], "data": msgspec.json.schema(Report)["$defs"]["Report"]}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "a CloudEvent 1.0 (structured mode), at most 64 KiB, signed as Standard Webhooks says",
        "content": {"application/cloudevents+json": {"schema": _SCHEMA}},
    },
    "parameters": [
        {"name": name, "in": "header", "required": True, "schema": {"type": "string"}, "description": text}
        for name, text in (
            (webhook.ID, "names this event for ever: a repeat is taken once"),
            (webhook.TIMESTAMP, "Unix seconds, real time, at most 300 s away from ours"),
            (webhook.SIGNATURE, "`v1,` and the base64 of the HMAC-SHA256 of `{id}.{timestamp}.{body}`"),
        )
    ],
}


@router.post(
    "/grid/events",
    status_code=202,
    openapi_extra=_BODY,
    responses={
        200: {"model": answers.Accepted, "description": "this webhook-id is known: nothing was done again"},
        **{code: {"model": answers.Refusal} for code in (400, 401, 404, 413, 503)},
    },
)
async def take_event(site: Here, request: Request, response: Response) -> answers.Accepted:
    """Take a progress report or a verdict: it is stored durably before 202 is answered; a repeat is answered 200."""
    site.counters.add("events_total")
    try:
        body = await _limited(request)
        accepted, repeat = await run_in_threadpool(_take, site, dict(request.headers), body)
    except Problem as problem:
        site.counters.drop(f"webhook_{problem.error}")
        raise
    response.status_code = 200 if repeat else 202
    return accepted


async def _limited(request: Request) -> bytes:
    """Return the body; raises Problem 413 as soon as it is too long, however long it claims to be."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise Problem(413, "too_large", "body", f"an event has at most {MAX_BYTES} bytes", Connection="close")
    return bytes(body)


def _take(site: Site, headers: dict[str, str], body: bytes) -> tuple[answers.Accepted, bool]:
    webhook_id = _verified(site, headers, body)
    event = _decoded(body)
    id = command_id(webhook_id)
    with site.intake:
        waiting = pending(site.desk, id)
        known = decided(site, id)
        if waiting or known:
            return answers.Accepted(command=id, state=known.state if known else "pending"), True
        _expect_case(site, event.data.case)
        store(site, site.desk, _command(id, event, site.clock.now_ms()))
    return answers.Accepted(command=id), False


def _verified(site: Site, headers: dict[str, str], body: bytes) -> str:
    secret = webhook.read_secret(site.layout.secrets / "verdict.key")
    if secret is None:
        raise Problem(
            503, "no_secret", "verdict.key", "no secret is agreed with the platform yet; `citybrain run` makes it"
        )
    try:
        return webhook.verify([secret], headers, body, real_unix_s())
    except SignatureError as error:
        raise Problem(401, f"signature_{error.reason}", "header webhook-signature", str(error)) from None


def _decoded(body: bytes) -> Event:
    try:
        return _event.decode(body)
    except msgspec.DecodeError as error:
        what, _, where = str(error).partition(" - at `")
        raise Problem(400, "malformed", f"body {where.rstrip('`') or '$'}", what) from None


def command_id(webhook_id: str) -> str:
    """Return the command's id: it follows from the webhook-id, so that whoever takes it sees a repeat as one."""
    return "wh-" + hashlib.sha256(webhook_id.encode()).hexdigest()[:24]


def _expect_case(site: Site, number: str) -> None:
    with site.database() as db:
        if db.execute(select(cases.c.id).where(cases.c.number == number)).first() is None:
            raise not_found("case", number)


def _command(id: str, event: Event, now_ms: int) -> Command:
    kind = event.type.rpartition(".")[2]
    data = event.data
    if kind == "verdict" and data.verdict is None:
        raise Problem(400, "malformed", "body $.data.verdict", "a verdict is confirmed, false_alarm or duplicate")
    body: dict[str, Any] = {"case": data.case, "stage": data.stage, "external_id": data.external_id}
    if kind == "verdict":
        body["verdict"] = data.verdict
    return Command(id, kind, ACTOR, now_ms, body, data.reason)
