"""Orders from the centre, each run once: what was begun and what was answered is remembered over restarts.

The centre repeats an order until it knows the answer. A repeat of an answered one is answered again with the same
words; one that was begun and never answered, because the process ended in between, is answered with exactly that: what
it did nobody knows, so it is not done a second time. (`configure` goes on instead: see gateway/trial.py.)
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from citybrain.counters import Counters
from citybrain.errors import StorageError, WireError
from citybrain.orders import Answer, Order, decode_order
from citybrain.storage import OS_FILES, Files

KEPT = 256  # orders remembered; the centre repeats one for a day at most
INTERRUPTED = "the gateway was restarted while it did this; it is not done again: look, and order anew"


class _Known(msgspec.Struct):
    answer: Answer | None = None  # None: begun


class _File(msgspec.Struct):
    known: dict[str, _Known] = {}
    v: int = 1


class Orders:
    """Takes what comes on `…/command`; gives what is to be done, each once; remembers answers.

    counters: `commands_total`, `commands_repeated_total`, `dropped_total{reason=command_malformed}`,
    `errors_total{stage=orders}`.
    """

    def __init__(self, path: Path, counters: Counters, files: Files = OS_FILES) -> None:
        self._path = path
        self._counters = counters
        self._files = files
        self._known: dict[str, _Known] = {}
        self._replies: dict[str, Answer] = {}

    def start(self, goes_on: str = "") -> None:
        """Recover; what was begun and not answered is answered now, unless it is the order that goes on."""
        if self._path.name in self._files.names(self._path.parent):
            try:
                self._known = msgspec.json.decode(self._files.read(self._path), type=_File).known
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self._files.rename(self._path, self._path.with_suffix(".damaged"))
                self._counters.add("errors_total", stage="orders")
                self._counters.warn(f"{self._path}: {error}; set aside: an order that is repeated now is done again")
        for id, known in self._known.items():
            if known.answer is None and id != goes_on:
                self.answered(id, False, INTERRUPTED, 0)  # nobody knows when

    def take(self, payload: bytes, now_ms: int, *, dated: bool = True) -> Order | None:
        """Return the order if it is to be done now; None where it is a repeat, too late or none at all.

        dated: whether we know what time it is; otherwise nothing is too late.
        """
        try:
            order = decode_order(payload)
        except WireError as error:
            self._counters.drop("command_malformed")
            self._counters.warn(str(error))
            return None
        known = self._known.get(order.id)
        if known is not None:
            self._counters.add("commands_repeated_total")
            if known.answer is not None:
                self._replies[order.id] = known.answer
            return None
        self._known[order.id] = _Known()
        if not self._keep():  # nothing was done, and a repeat finds us as ignorant as before
            del self._known[order.id]
            self._replies[order.id] = Answer(order.id, False, f"{self._path} cannot be written: not done", now_ms)
            return None
        self._counters.add("commands_total")
        if dated and order.until and now_ms > order.until:
            self.answered(order.id, False, "expired: it came too late, and was not done", now_ms)
            return None
        return order

    def answered(self, id: str, ok: bool, text: str, now_ms: int) -> None:
        """Remember an answer, durably as far as the disk allows, and have it sent."""
        answer = Answer(id, ok, text, now_ms)
        known = self._known.get(id)
        if known is not None:
            known.answer = answer
            self._keep()
        self._replies[id] = answer

    def answer_of(self, id: str) -> Answer | None:
        """Return what an order was answered with, None where it was not yet."""
        known = self._known.get(id)
        return known.answer if known is not None else None

    def replies(self) -> list[Answer]:
        """Return the answers that wait to be sent; say with `sent` which were."""
        return list(self._replies.values())

    def sent(self, id: str) -> None:
        """An answer was handed to the broker; if it is lost there, the centre asks again."""
        self._replies.pop(id, None)

    def _keep(self) -> bool:
        for id in list(self._known)[:-KEPT]:
            del self._known[id]
        try:
            self._files.replace(self._path, msgspec.json.encode(_File(self._known)))
        except StorageError as error:
            self._counters.add("errors_total", stage="orders")
            self._counters.warn(str(error))
            return False
        return True
