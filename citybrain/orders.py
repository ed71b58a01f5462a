"""What the centre asks of a gateway on `…/command`, and what it answers on `…/reply` (docs/gateway.md)."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import msgspec

from citybrain.errors import WireError
from citybrain.wire import NOT_JSON

What = Literal["configure", "sample", "frame", "restart_driver", "log_level"]
WHATS: tuple[str, ...] = get_args(What)
MOST_BYTES = 128 * 1024  # of an order: a configuration and what is around it
MOST_TEXT = 2000  # characters of an answer


class Order(msgspec.Struct, frozen=True):
    """One order: `what` with its `body`, to be run once, and not any more after `until` (Unix ms)."""

    id: str
    what: str
    body: dict[str, Any] = {}
    until: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What became of the order `id`, in words, at the gateway's time `at` (Unix ms)."""

    id: str
    ok: bool
    text: str = ""
    at: int = 0


T = TypeVar("T")
_order = msgspec.json.Decoder(Order)
_answer = msgspec.json.Decoder(Answer)


def decode_order(payload: bytes) -> Order:
    """Decode what came on `…/command`; raises WireError(`malformed`)."""
    order = _decoded(_order, payload, "command")
    _checked(order.id, "command")
    return order


def decode_answer(payload: bytes) -> Answer:
    """Decode what came on `…/reply`; raises WireError(`malformed`)."""
    answer = _decoded(_answer, payload, "reply")
    _checked(answer.id, "reply")
    return msgspec.structs.replace(answer, text=answer.text[:MOST_TEXT])


def _decoded(decoder: msgspec.json.Decoder[T], payload: bytes, what: str) -> T:
    if len(payload) > MOST_BYTES:
        raise WireError("malformed", f"{what}: {len(payload)} bytes, at most {MOST_BYTES} are taken")
    try:
        return decoder.decode(payload)
    except NOT_JSON as error:
        raise WireError("malformed", f"{what}: {error}") from None


def _checked(id: str, what: str) -> None:
    if not 0 < len(id) <= 64 or not id.isascii() or not id.replace("-", "").isalnum():
        raise WireError("malformed", f"{what}: id {id[:80]!r}: want 1 to 64 letters, digits and hyphens")
