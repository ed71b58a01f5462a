"""What the desk does with orders to gateways: writes who wants what and why, and what the gateway answered."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from api.clerk import Clerk
from api.ledger import text
from citybrain.clock import DAY_MS
from citybrain.db.schema import asked, orders
from citybrain.errors import NotFound, UsageError
from citybrain.machine import Machine, Step
from citybrain.mailbox import Command
from citybrain.orders import WHATS

T = TypeVar("T")
# `expired` is no state: until somebody answers nobody knows whether it was done; whoever reads compares with `until`.
ORDER = Machine(
    "order",
    "asked",
    (Step("asked", "done", "done", "its_gateway_did_it"), Step("asked", "failed", "failed", "its_gateway_did_not")),
)
LONGEST_MS = 7 * DAY_MS
MOST_BODY = 100 * 1024  # characters; what the gateway takes as a whole is in citybrain/orders.py


class Wanted(msgspec.Struct, frozen=True):
    """Body of `gateway_order`. until: platform time, Unix ms."""

    gateway: str
    what: str
    until: int
    body: dict[str, Any] = {}


class Answered(msgspec.Struct, frozen=True):
    """Body of `order_answered`, which ingest makes of a reply. at: the gateway's clock."""

    order: str
    gateway: str
    ok: bool
    text: str
    at: int


def order(clerk: Clerk, command: Command) -> str:
    """Write an order and have it sent."""
    wanted = _body(command, Wanted)
    shard = next((one.shard for one in clerk.setting.atlas.registry.gateways if one.id == wanted.gateway), None)
    if shard is None:
        raise NotFound(f"gateway {wanted.gateway[:80]!r}: not in the registry")
    if wanted.what not in WHATS:
        raise UsageError(f"order {wanted.what[:40]!r}: expected one of {', '.join(WHATS)}")
    if not command.reason.strip():
        raise UsageError(f"order to {wanted.gateway}: it needs a reason")
    if not clerk.now_ms < wanted.until <= clerk.now_ms + LONGEST_MS:
        raise UsageError(f"order to {wanted.gateway}: until must lie within the next {LONGEST_MS // DAY_MS} days")
    body = text(wanted.body)
    if len(body) > MOST_BODY:
        raise UsageError(f"order to {wanted.gateway}: a body of {len(body)} characters, at most {MOST_BODY} are taken")
    clerk.ledger.add(
        orders,
        command=command.id,
        gateway=wanted.gateway,
        what=wanted.what,
        body=body,
        actor=command.actor,
        reason=command.reason,
        at=clerk.now_ms,
        until=wanted.until,
        state=ORDER.initial,
        answer="",
        answered_at=None,
    )
    sent = {"order": command.id, "shard": shard, **msgspec.to_builtins(wanted)}
    clerk.ledger.add(
        asked, at=clerk.now_ms, kind="order", body=text(sent), actor=command.actor, reason=command.reason, done=0
    )
    clerk.ledger.counts["orders"] += 1
    return f"order {command.id}: {wanted.gateway} is asked for {wanted.what}"


def answered(clerk: Clerk, command: Command) -> str:
    """Write a gateway's answer; the first one counts."""
    answer = _body(command, Answered)
    row = clerk.ledger.row(orders, "command", answer.order)
    if row is None or row["gateway"] != answer.gateway:
        raise NotFound(f"order {answer.order[:64]!r} to {answer.gateway[:80]}: no such order")
    moved = ORDER.find(row["state"], "done" if answer.ok else "failed")
    if moved is None:
        return f"order {answer.order}: {row['state']} already"
    clerk.ledger.set(orders, row["id"], state=moved.after, answer=answer.text, answered_at=clerk.now_ms)
    clerk.ledger.note(clerk.now_ms, "order", row["id"], moved, answer.gateway, answer=answer.text)
    clerk.ledger.counts[f"orders_{moved.after}"] += 1
    return f"order {answer.order}: {moved.after}"


def _body(command: Command, kind: type[T]) -> T:
    try:
        return msgspec.convert(command.body, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"body of {command.kind!r}: {error}") from None


HANDLERS = {"gateway_order": order, "order_answered": answered}
