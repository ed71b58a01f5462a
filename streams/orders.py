"""Orders under way to gateways: published until they are answered, and the answers brought to the desk.

The desk puts an order into the mailbox `orders` and it stays there until its answer lies in the desk's own: whoever is
killed in between finds it again. It is published when it appears, at every birth of its gateway, and every 30 s while
it may still be done. Afterwards the gateway is asked at its births for a day more: it may have done it in time and not
have got its answer out. That it is done once is the gateway's care (gateway/orders.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from citybrain.clock import DAY_MS, monotonic_s
from citybrain.counters import Counters
from citybrain.errors import DiskFull, WireError
from citybrain.layout import Layout
from citybrain.mailbox import Command, Mailbox
from citybrain.orders import Order, decode_answer
from citybrain.wire import parse_topic, topic

LOOK_S = 0.5
REPEAT_S = 30.0
MAILBOX = "orders"


class Body(msgspec.Struct, frozen=True):
    """Body of a command `order` in the mailbox."""

    order: str
    gateway: str
    shard: int
    what: str
    body: dict[str, Any]
    until: int


class _Open(msgspec.Struct):
    name: str
    topic: str
    payload: bytes
    gateway: str
    until: int
    due_s: float = 0.0


class Orders:
    """What is to be said to the gateways of some shards. No socket.

    counters: `orders_published_total`, `replies_total`, `orders_unanswered_total`,
    `dropped_total{reason=reply_malformed|reply_unasked|malformed_order}`.
    """

    def __init__(self, layout: Layout, shards: Sequence[int], counters: Counters) -> None:
        self._box = Mailbox(layout.mailbox(MAILBOX))
        self._desk = Mailbox(layout.mailbox("desk"))
        self._shards = frozenset(shards)
        self._counters = counters
        self._open: dict[str, _Open] = {}  # by order
        self._seen: set[str] = set()  # names in the mailbox that were read
        self._look_s = 0.0

    def born(self, gateway: str) -> None:
        """A gateway has connected: it is told at once what it has not answered."""
        for one in self._open.values():
            if one.gateway == gateway:
                one.due_s = 0.0

    def due(self, now_ms: int) -> list[tuple[str, bytes]]:
        """Return what is to be published now, as (topic, payload)."""
        now_s = monotonic_s()
        if now_s >= self._look_s:
            self._look_s = now_s + LOOK_S
            self._look()
        found: list[tuple[str, bytes]] = []
        for order, one in list(self._open.items()):
            if now_ms > one.until + DAY_MS:
                self._counters.add("orders_unanswered_total")
                self._forget(order, one)
            elif now_s >= one.due_s:
                one.due_s = now_s + REPEAT_S if now_ms <= one.until else float("inf")  # then only when it is born
                found.append((one.topic, one.payload))
        self._counters.add("orders_published_total", len(found))
        return found

    def _look(self) -> None:
        items, broken = self._box.take(besides=self._seen)
        for lost in broken:
            self._counters.drop("malformed_order")
            self._counters.warn(f"{lost.what}; kept as {lost.path}")
        for name, command in items:
            self._seen.add(name)
            try:
                body = msgspec.convert(command.body, Body)
            except msgspec.ValidationError as error:
                self._counters.drop("malformed_order")
                self._counters.warn(f"order {command.id}: {error}")
                continue
            if body.shard in self._shards:
                payload = msgspec.json.encode(Order(body.order, body.what, body.body, body.until))
                where = topic(body.shard, body.gateway, "command")
                self._open[body.order] = _Open(name, where, payload, body.gateway, body.until)

    def reply(self, where: str, payload: bytes, now_ms: int) -> None:
        """Take what came on `…/reply`: bring it to the desk, durably, then ask no more."""
        try:
            _, gateway, _ = parse_topic(where)
            answer = decode_answer(payload)
        except WireError as error:
            self._counters.drop("reply_malformed")
            self._counters.warn(f"{where[:120]}: {error}")
            return
        one = self._open.get(answer.id)
        if one is None or one.gateway != gateway:  # a repeat, or somebody who was not asked
            self._counters.drop("reply_unasked")
            return
        body = {"order": answer.id, "gateway": gateway, "ok": answer.ok, "text": answer.text, "at": answer.at}
        try:
            self._desk.put(Command(f"reply-{answer.id}", "order_answered", gateway, now_ms, body))
        except DiskFull as error:  # the order stays, so the gateway is asked again and answers the same
            self._counters.add("errors_total", stage="reply")
            self._counters.warn(str(error))
            return
        self._counters.add("replies_total")
        self._forget(answer.id, one)

    def _forget(self, order: str, one: _Open) -> None:
        self._box.done(one.name)
        self._seen.discard(one.name)
        del self._open[order]
