"""What a driver is: code that talks to one bus, line or camera, and the few calls it is given to do that.

A driver is written as if it were alone: it opens its port, reads, waits, and raises when it cannot go on. Whoever runs
it (`edge.host`: a thread, or a process of its own where it needs numpy or may hang in native code) starts it again with
back-off, says so once, and lets nobody else wait for it.
"""

from __future__ import annotations

import enum
from typing import Any, Protocol

import msgspec

from citybrain.model import Lane, Reading


class Quality(enum.IntEnum):
    """How far a device's readings can be trusted now; sent as the metric `quality` when it changes."""

    GOOD = 0
    NO_ANSWER = 1  # it does not answer in time
    GARBLED = 2  # checksums or frames are wrong: noise, baud rate, wiring
    REFUSED = 3  # it answers with an exception: wrong register or function
    IMPLAUSIBLE = 4  # it answers with what no working sensor says
    FOREIGN = 5  # another device answers in its place
    UNPLUGGED = 6  # the adapter, port or stream is gone
    CLOCK_UNSET = 7  # the gateway does not know what time it is


class Request(msgspec.Struct, frozen=True):
    """What the platform asks of a running driver: `sample` (a reading of each device now) or `frame` (an image)."""

    id: str
    what: str
    device: str = ""
    body: dict[str, Any] = {}


class Host(Protocol):
    """What a driver is given. Times: Unix ms for what is observed, monotonic seconds for what is waited for."""

    def now_ms(self) -> int:
        """Return the gateway's time."""

    def mono_s(self) -> float:
        """Return seconds that no step of the clock moves."""

    def put(self, lane: Lane, reading: Reading, *, own_time: bool = False) -> None:
        """Hand over a reading; never blocks for the network. What was not measured is left out, never 0.

        own_time: its time is the device's own, and no step of our clock concerns it.
        """

    def blob(self, content: bytes, *, unmasked: bool = False) -> str:
        """Hand over evidence (a JPEG) for the blob lane; return its SHA-256 in hex, which the event names.

        unmasked: persons or plates may be recognised in it, so whoever looks at it has to say why.
        """

    def quality(self, device: str, quality: Quality, why: str = "") -> None:
        """Say how far a device can be trusted: told on change only, to the log and upstream."""

    def drop(self, reason: str, amount: int = 1, sample: str = "") -> None:
        """Count what came and was not used, and why; `sample` is one of them to look at."""

    def wait(self, seconds: float) -> bool:
        """Wait; return True as soon as the driver is to end, False at once when a request comes.

        A driver that calls nothing of its host for its `DEADLINE_S` hangs; waiting here does not count.
        """

    def requests(self) -> list[Request]:
        """Return what was asked since the last call."""

    def answer(self, request: str, ok: bool, text: str = "") -> None:
        """Answer a request by its id."""


class Driver(Protocol):
    """One instance of a driver, made from its part of the configuration."""

    def run(self, host: Host) -> None:
        """Work until `host.wait` says True; raise what cannot be mended here (a port that is gone)."""
