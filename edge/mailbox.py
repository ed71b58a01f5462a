"""Between a driver and whoever runs it: what one says to the other, and the box in which it waits.

The same messages wait in memory for a driver in a thread, and cross a pipe for one in a process of its own.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque

import msgspec

from citybrain.clock import Clock, monotonic_s
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request

MOST_WAITING = 4096  # readings of the telemetry lane: over a minute of 64 points/s while the box is busy
MOST_BLOB_BYTES = 8 << 20


class Put(msgspec.Struct, frozen=True, tag=True):
    """A reading; own_time: the device said when, not we."""

    lane: Lane
    reading: Reading
    own_time: bool = False


class Blob(msgspec.Struct, frozen=True, tag=True):
    """Evidence; unmasked: persons or plates may be recognised in it."""

    content: bytes
    unmasked: bool = False


class Said(msgspec.Struct, frozen=True, tag=True):
    """How far a device can be trusted."""

    device: str
    quality: Quality
    why: str


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The answer to a request, by its id."""

    request: str
    ok: bool
    text: str


class Dropped(msgspec.Struct, frozen=True, tag=True):
    """What was not used, why, and one of them to look at."""

    reason: str
    amount: int
    sample: str = ""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The driver runs, and may say nothing for `for_s` more seconds because it waits."""

    for_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A driver in a process of its own cannot go on; its last word."""

    why: str


Upward = Put | Blob | Said | Answer | Dropped | Alive | Failed


class Mailbox:
    """What one run of a driver has said and not been read yet, and what it was asked. Both sides call it at any time.

    Telemetry beyond `most` drops the oldest, counted `driver_queue_full`; evidence beyond 8 MiB likewise, counted
    `blob_queue_full`; events never. After `close` (the run was given up) nothing is taken any more: `ignored` counts.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self.alive_until_s = monotonic_s()
        self.stopping = False
        self.ignored = 0
        self._most = most
        self._closed = False
        self._changed = threading.Condition()
        self._telemetry: deque[Put] = deque()
        self._blobs: deque[Blob] = deque()
        self._blob_bytes = 0
        self._rest: list[Upward] = []
        self._lost: dict[str, int] = {}
        self._requests: list[Request] = []
        self._woken = False

    # --- the driver's side ---

    def take(self, message: Upward) -> None:
        """Keep what the driver says."""
        with self._changed:
            self.alive_until_s = monotonic_s()
            if self._closed:
                self.ignored += 1
            elif isinstance(message, Alive):
                self.alive_until_s = monotonic_s() + message.for_s
            elif isinstance(message, Blob):
                self._keep_blob(message)
            elif isinstance(message, Put) and message.lane is Lane.TELEMETRY:
                self._telemetry.append(message)
                if len(self._telemetry) > self._most:
                    self._telemetry.popleft()
                    self._lose("driver_queue_full")
            else:
                self._rest.append(message)

    def _keep_blob(self, blob: Blob) -> None:
        self._blobs.append(blob)
        self._blob_bytes += len(blob.content)
        while self._blob_bytes > MOST_BLOB_BYTES:
            self._blob_bytes -= len(self._blobs.popleft().content)
            self._lose("blob_queue_full")

    def _lose(self, reason: str) -> None:
        self._lost[reason] = self._lost.get(reason, 0) + 1

    def wait(self, seconds: float) -> bool:
        """Wait for `seconds`, a request or the end; return whether it is the end."""
        self.take(Alive(max(0.0, seconds)))
        with self._changed:
            self._changed.wait_for(lambda: self.stopping or self._woken, max(0.0, seconds))
            self._woken = False
            self.alive_until_s = monotonic_s()
            return self.stopping

    def requests(self) -> list[Request]:
        """Return what was asked since the last call."""
        with self._changed:
            self.alive_until_s = monotonic_s()
            asked, self._requests = self._requests, []
            return asked

    # --- the box's side ---

    def ask(self, request: Request) -> None:
        """Ask the driver something."""
        with self._changed:
            self._requests.append(request)
            self._woken = True
            self._changed.notify_all()

    def stop(self, *, close: bool = False) -> None:
        """Tell the driver to end; with `close`, listen to it no more."""
        with self._changed:
            self.stopping = True
            self._closed = self._closed or close
            self._changed.notify_all()

    def drain(self) -> list[Upward]:
        """Return what waits: evidence first, then the rest in the order of its saying, then telemetry."""
        with self._changed:
            found: list[Upward] = [*self._blobs, *self._rest, *self._telemetry]
            found += [Dropped(reason, amount) for reason, amount in self._lost.items()]
            self._blobs.clear()
            self._rest.clear()
            self._telemetry.clear()
            self._lost.clear()
            self._blob_bytes = 0
            return found


class MailboxHost:
    """What a driver in a thread is given: `edge.driver.Host` on a mailbox."""

    def __init__(self, mailbox: Mailbox, clock: Clock) -> None:
        self._mailbox = mailbox
        self._clock = clock

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def mono_s(self) -> float:
        self._mailbox.alive_until_s = now_s = monotonic_s()
        return now_s

    def put(self, lane: Lane, reading: Reading, *, own_time: bool = False) -> None:
        self._mailbox.take(Put(lane, reading, own_time))

    def blob(self, content: bytes, *, unmasked: bool = False) -> str:
        self._mailbox.take(Blob(content, unmasked))
        return blob_name(content)

    def quality(self, device: str, quality: Quality, why: str = "") -> None:
        self._mailbox.take(Said(device, quality, why))

    def drop(self, reason: str, amount: int = 1, sample: str = "") -> None:
        self._mailbox.take(Dropped(reason, amount, sample))

    def wait(self, seconds: float) -> bool:
        return self._mailbox.wait(seconds)

    def requests(self) -> list[Request]:
        return self._mailbox.requests()

    def answer(self, request: str, ok: bool, text: str = "") -> None:
        self._mailbox.take(Answer(request, ok, text))


def blob_name(content: bytes) -> str:
    """Return the SHA-256 of evidence in hex: its name."""
    return hashlib.sha256(content).hexdigest()
