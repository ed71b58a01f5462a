"""The process `citybrain gateway run`: one Box after another, as configurations come, until it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TypeVar

import msgspec

from citybrain.clock import monotonic_s, real_unix_ms
from citybrain.errors import CityBrainError, StorageError, UsageError
from citybrain.layout import Layout
from citybrain.orders import WHATS, Order
from gateway.box import MARK, ORDERS, Box, sole
from gateway.config import GatewayConfig, read_config
from gateway.journal import PROCESS, JournalCounters
from gateway.orders import Orders
from gateway.times import BoxClock
from gateway.trial import MOST_STARTS, Configure, Store, Trial, checked
from gateway.watchdog import Watchdog

T = TypeVar("T")


class _Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: str


class _Driver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    driver: str


class GatewayProcess:
    """A data folder's gateway. `run` returns when `stop` was called; raises ConfigError, StorageError, Unavailable."""

    def __init__(
        self,
        layout: Layout,
        watchdog: Watchdog | None = None,
        clock: Callable[[Path, JournalCounters], BoxClock] = BoxClock,
    ) -> None:
        self.layout = layout
        self._clock = clock
        self.counters = JournalCounters(PROCESS, layout.run)
        self._watchdog = watchdog or Watchdog()
        self._store = Store(layout.root)
        self._orders = Orders(layout.root / ORDERS, self.counters)
        self._stopping = False
        self._trial: Trial | None = None
        self._trial_until_s = 0.0
        self._again = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End `run`; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until stopped, each configuration with a Box of its own."""
        if self._nothing_here():
            read_config(self._store.current)  # says so, and leaves no folder behind where a name was mistyped
        with sole(self.layout):
            self._recover()
            clock = self._clock(self.layout.run / MARK, self.counters)
            while not self._stopping:
                self._again = False
                self._attempt(clock)
            self._watchdog.stopping()

    def _nothing_here(self) -> bool:
        try:
            return not self._store.current.exists()
        except OSError:  # a folder that is not ours to look into: whoever locks it says why
            return False

    def _attempt(self, clock: BoxClock) -> None:
        try:
            self._serve(read_config(self._store.current), clock)
        except CityBrainError as error:
            if self._trial is None:
                raise
            self._decided(self._trial, False, f"rolled back: {error}")

    def _recover(self) -> None:
        self.counters.resume()
        self._trial = self._store.trial()
        self._orders.start(self._trial.id if self._trial is not None else "")
        if self._trial is None:
            return
        said = self._orders.answer_of(self._trial.id)
        if said is not None:  # decided, and then the power went
            self._decided(self._trial, said.ok, "")
        elif not self._store.in_force(self._trial):
            self._decided(self._trial, False, "the power went before it was in force; the one before is kept")
        elif self._trial.starts >= MOST_STARTS:
            self._decided(self._trial, False, f"rolled back: the process ended {MOST_STARTS} times with it")
        else:
            self._trial = self._store.started(self._trial)

    def _serve(self, config: GatewayConfig, clock: BoxClock) -> None:
        box = Box(self.layout.root, config, self.counters, clock, self._orders, self._watchdog)
        box.start()
        try:
            if self._trial is not None:
                self._trial_until_s = monotonic_s() + self._trial.trial_s
            self.counters.say(f"{config.gateway}: broker {config.broker.host}, drivers: {len(config.drivers)}")
            self._watchdog.ready()
            while not (self._stopping or self._again):
                for order in box.step():
                    self._do(box, order)
                self._judge(box)
                self._watchdog.alive()
        finally:
            box.close()

    # --- orders ---

    def _do(self, box: Box, order: Order) -> None:
        """Do an order, or begin to; whoever cannot be done is answered with the reason."""
        self.counters.say(f"order {order.id}: {order.what}")
        try:
            said = self._begun(box, order)
        except CityBrainError as error:
            self._orders.answered(order.id, False, str(error), box.clock.now_ms())
            return
        if said:
            self._orders.answered(order.id, True, said, box.clock.now_ms())

    def _begun(self, box: Box, order: Order) -> str:
        """Return the answer of what is done at once, "" of what goes on; raises CityBrainError."""
        if order.what == "configure":
            return self._configure(box, order)
        if order.what == "log_level":
            level = _body(order, _Level).level
            self.counters.set_level(level)
            return f"log level {level} until the next restart"
        if order.what == "restart_driver":
            driver = _body(order, _Driver).driver
            if not box.lines.hosts.restart(driver):
                known = ", ".join(box.lines.hosts.names()) or "nothing: none is configured"
                raise UsageError(f"driver {driver[:80]!r}: expected one of {known}")
            return f"driver {driver} restarted"
        if order.what in ("sample", "frame"):
            box.lines.ask(order)
            return ""
        raise UsageError(f"{order.what[:40]!r}: expected one of {', '.join(WHATS)}")

    # --- a new configuration ---

    def _configure(self, box: Box, order: Order) -> str:
        if self._trial is not None:
            raise UsageError(f"order {self._trial.id} is on trial; ask again when it is answered")
        wanted = checked(order.body, box.config)
        if wanted.sha256 == self._store.sha256():
            return f"unchanged: {wanted.sha256} was in force already"
        self._trial = self._begin(order, wanted, box.lines.wrong())
        self.counters.say(f"configuration {wanted.sha256[:12]} on trial for {wanted.trial_s:g} s")
        self._again = True
        return ""

    def _begin(self, order: Order, wanted: Configure, wrong: Mapping[str, str]) -> Trial:
        try:
            return self._store.begin(order.id, wanted, wrong)
        except StorageError:
            self._store.abandon()
            raise

    def _judge(self, box: Box) -> None:
        """Keep the configuration on trial, or go back to the one before, when its time is over."""
        if self._trial is None or self._again or monotonic_s() < self._trial_until_s:
            return
        wrong = self._wrong(box, self._trial)
        if not wrong:
            self._decided(self._trial, True, f"kept: {self._trial.sha256}")
            return
        self._decided(self._trial, False, f"rolled back to the one before: {'; '.join(wrong)}")
        self._again = True

    @staticmethod
    def _wrong(box: Box, trial: Trial) -> list[str]:
        wrong = [] if box.service.ready else [f"no connection: {box.service.reason or 'not yet'}"]
        wrong += [f"{name}: {why}" for name, why in box.lines.wrong().items() if name not in trial.wrong_before]
        return wrong

    def _decided(self, trial: Trial, ok: bool, text: str) -> None:
        """Answer, then act on it: if the power goes in between, the answer says what is to be done."""
        if text:
            self._orders.answered(trial.id, ok, text, real_unix_ms())
            self.counters.say(f"order {trial.id}: {text}", "info" if ok else "warning")
        if ok or not self._store.in_force(trial):
            self._store.keep()
        else:
            self._store.roll_back()
        self._trial = None


def _body(order: Order, kind: type[T]) -> T:
    try:
        return msgspec.convert(order.body, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"body of {order.what}: {error}") from None
