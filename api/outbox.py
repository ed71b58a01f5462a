"""Delivering the outbox: threads that post signed webhooks, and what becomes of each attempt.

The desk hands over what is due and writes what came of it; nothing here touches the database. Life safety has threads
of its own, so a slow platform never holds up a rescue, nor the desk. All times are real time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from email.utils import parsedate_to_datetime
from typing import Literal

import httpx
import msgspec

from api.platforms.events import CONTENT_TYPE
from api.platforms.webhook import sign
from citybrain.clock import real_unix_ms, real_unix_s
from citybrain.wire import crc32c

FIRST_MS, MOST_MS, MOST_URGENT_MS = 1_000, 300_000, 15_000
REFUSALS = 8  # a 4xx that stays the same is a defect on one of the sides: trying for ever does not mend it
ASK_AGAIN = frozenset({408, 425, 429})
TIMEOUT = httpx.Timeout(10.0, connect=2.0)


class Outgoing(msgspec.Struct, frozen=True):
    """One message to deliver. `attempts` is how often it has been tried."""

    id: str
    body: bytes
    urgent: bool
    attempts: int


class Attempt(msgspec.Struct, frozen=True):
    """What became of one try. `next_at`: when to try again (real time, Unix ms); `gone`: the endpoint wants no more."""

    id: str
    outcome: Literal["delivered", "retry", "dead"]
    next_at: int = 0
    error: str | None = None
    gone: bool = False


def backoff_ms(item: Outgoing) -> int:
    """Return how long to wait after this try failed: doubling, at most 5 min (urgent: 15 s), ±20 % by id and try.

    The jitter is taken from the id: it spreads the load as chance would, and two runs agree.
    """
    most = MOST_URGENT_MS if item.urgent else MOST_MS
    base = min(FIRST_MS << min(item.attempts, 20), most)
    return base * (800 + crc32c(f"{item.id}/{item.attempts}".encode()) % 401) // 1000


def retry_after_ms(header: str | None, now_ms: int) -> int:
    """Return how long a `Retry-After` header asks us to wait (seconds or a date), at most a day, 0 where it is none."""
    if not header:
        return 0
    if header.strip().isdecimal():
        wait_ms = int(header.strip()[:9]) * 1000
    else:
        try:
            wait_ms = int(parsedate_to_datetime(header).timestamp() * 1000) - now_ms
        except (ValueError, TypeError, OverflowError):
            return 0
    return min(max(wait_ms, 0), 86_400_000)


def judge(item: Outgoing, status: int, retry_after: str | None, now_ms: int) -> Attempt:
    """Return what an answer means.

    2xx, and 409 (known already): delivered. 410: the endpoint is gone. 408, 425, 429, 5xx: again, for ever. Any other:
    again, and dead after 8 tries.
    """
    if 200 <= status < 300 or status == 409:
        return Attempt(item.id, "delivered")
    if status == 410:
        return Attempt(item.id, "dead", error="HTTP 410: the platform wants no more messages", gone=True)
    if status < 500 and status not in ASK_AGAIN and item.attempts + 1 >= REFUSALS:
        return Attempt(item.id, "dead", error=f"HTTP {status}, {REFUSALS} times")
    wait_ms = max(backoff_ms(item), retry_after_ms(retry_after, now_ms))
    return Attempt(item.id, "retry", now_ms + wait_ms, f"HTTP {status}")


def unreachable(item: Outgoing, what: str, now_ms: int) -> Attempt:
    """Return what a failed connection means: again, for ever."""
    return Attempt(item.id, "retry", now_ms + backoff_ms(item), what)


class Deliverer:
    """Posts to one endpoint. `start()` starts `threads` for ordinary messages and one for urgent ones."""

    def __init__(self, endpoint: str, secret: str, threads: int = 2) -> None:
        self.endpoint = endpoint
        self._secret = secret
        self._threads = threads
        self._lanes: dict[bool, queue.SimpleQueue[Outgoing | None]] = {
            True: queue.SimpleQueue(),
            False: queue.SimpleQueue(),
        }
        self._done: queue.SimpleQueue[Attempt] = queue.SimpleQueue()
        self._in_flight: set[str] = set()  # the desk's thread alone touches it

    def start(self) -> None:
        """Start the threads; they are daemons, so a hanging platform never holds up the end of the process."""
        for urgent, count in ((True, 1), (False, self._threads)):
            for index in range(count):
                name = f"deliver-{'urgent' if urgent else 'ordinary'}-{index}"
                threading.Thread(target=self._work, args=(self._lanes[urgent],), name=name, daemon=True).start()

    def stop(self) -> None:
        """Tell the threads to end; a message in flight is sent again by the next process, under the same id."""
        for urgent, count in ((True, 1), (False, self._threads)):
            for _ in range(count):
                self._lanes[urgent].put(None)

    def offer(self, items: Sequence[Outgoing]) -> int:
        """Hand over what is due; what is on its way already is left out. Returns how many were new."""
        fresh = [item for item in items if item.id not in self._in_flight]
        for item in fresh:
            self._in_flight.add(item.id)
            self._lanes[item.urgent].put(item)
        return len(fresh)

    def withdraw(self) -> int:
        """Take back what no thread has begun to post; return how much that was."""
        waiting: list[Outgoing] = []
        for lane in self._lanes.values():
            while not lane.empty():
                if (item := lane.get()) is not None:
                    waiting.append(item)
        self._in_flight.difference_update(item.id for item in waiting)
        return len(waiting)

    def results(self) -> list[Attempt]:
        """Return the attempts that ended since the last call."""
        ended: list[Attempt] = []
        while not self._done.empty():
            ended.append(self._done.get())
        return ended

    def written(self, ids: Iterable[str]) -> None:
        """Say that the desk has written what became of these: only now may they be offered again."""
        self._in_flight.difference_update(ids)

    def _work(self, lane: queue.SimpleQueue[Outgoing | None]) -> None:
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            while (item := lane.get()) is not None:
                self._done.put(self._post(client, item))

    def _post(self, client: httpx.Client, item: Outgoing) -> Attempt:
        headers = {"content-type": CONTENT_TYPE, **sign(self._secret, item.id, real_unix_s(), item.body)}
        try:
            answer = client.post(self.endpoint, content=item.body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return unreachable(item, f"{self.endpoint}: {error or type(error).__name__}", real_unix_ms())
        return judge(item, answer.status_code, answer.headers.get("retry-after"), real_unix_ms())
