"""The configured drivers as the box sees them: readings, evidence, and requests that are answered once or in time."""

from __future__ import annotations

import msgspec

from citybrain.clock import Clock, monotonic_s
from citybrain.counters import Counters
from citybrain.errors import NotFound, UsageError
from citybrain.model import Lane, Reading
from citybrain.orders import Order
from citybrain.wire import MAX_FAILING, MAX_WHY
from edge.driver import Request
from edge.host import Hosts
from gateway.config import GatewayConfig

ANSWER_S = {"sample": 10.0, "frame": 30.0}  # of a driver; a camera may have to open its stream first


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    device: str = ""


class _Waiting(msgspec.Struct):
    what: str
    of: int  # how many drivers were asked
    until_s: float
    said: list[tuple[bool, str]] = []


class Lines:
    """All drivers of a configuration. `sources` are what the agent asks; `ask` is for the orders of the centre."""

    def __init__(self, config: GatewayConfig, counters: Counters, clock: Clock) -> None:
        self.hosts = Hosts(config.drivers, counters, clock)
        self._devices = {device for one in config.drivers for device in one.config.devices()}  # type: ignore[attr-defined]
        self._waiting: dict[str, _Waiting] = {}

    def poll(self, now_ms: int) -> list[tuple[Lane, Reading]]:
        """Return what the drivers said, as `edge.agent.Source`."""
        return self.hosts.poll(now_ms)

    def ask(self, order: Order) -> None:
        """Pass `sample` or `frame` on, to the driver of `body.device` or to all; raises UsageError, NotFound."""
        try:
            device = msgspec.convert(order.body, _Asked).device
        except msgspec.ValidationError as error:
            raise UsageError(f"body of {order.what}: {error}") from None
        if device and device not in self._devices:
            raise NotFound(f"device {device[:80]!r}: not in gateway.yaml")
        running = 1 if device else len(self.hosts.names()) - len(self.hosts.troubles())
        if not self.hosts.ask(Request(order.id, order.what, device, order.body)):
            raise NotFound(f"{order.what}: no driver runs that could do it")
        self._waiting[order.id] = _Waiting(order.what, max(running, 1), monotonic_s() + ANSWER_S[order.what])

    def answers(self) -> list[tuple[str, bool, str]]:
        """Return (order, ok, text) of those that every driver has answered, or whose time is over."""
        for answer in self.hosts.answers():
            waiting = self._waiting.get(answer.request)
            if waiting is not None:
                waiting.said.append((answer.ok, answer.text))
        over = [
            (id, one) for id, one in self._waiting.items()
            if len(one.said) >= one.of or monotonic_s() >= one.until_s
        ]  # fmt: skip
        for id, _ in over:
            del self._waiting[id]
        return [(id, *_summed(one)) for id, one in over]

    def wrong(self) -> dict[str, str]:
        """Return what is wrong now, by driver or device."""
        found = {f"driver {name}": why for name, why in self.hosts.troubles().items()}
        return found | {f"device {device}": why for device, why in self.hosts.reasons().items()}

    def failing(self) -> dict[str, str]:
        """Return the drivers that do not work, with why, as a status has room for."""
        troubles = sorted(self.hosts.troubles().items())[:MAX_FAILING]
        return {name: why[:MAX_WHY] for name, why in troubles}


def _summed(one: _Waiting) -> tuple[bool, str]:
    texts = [text for _, text in one.said if text]
    missing = one.of - len(one.said)
    if missing > 0:
        texts.append(f"{missing} of {one.of} drivers did not answer in {ANSWER_S[one.what]:g} s")
    return missing <= 0 and all(ok for ok, _ in one.said), "; ".join(texts)
