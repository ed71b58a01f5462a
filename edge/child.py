"""A driver in a process of its own: both ends of the pipe, `python -m edge.child` being the far one.

A frame on the pipe is four bytes of length (big-endian) and a msgpack message: `edge.mailbox` upward, `Start`,
`Clocked`, `Asked` and `Stop` downward. The child ends when its pipe does, so that none outlives the gateway.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

import msgspec

from citybrain.clock import Clock, monotonic_s, wait_s
from citybrain.config import Duration
from citybrain.errors import CityBrainError, Unavailable
from citybrain.model import Lane, Reading
from edge.driver import Quality, Request
from edge.drivers import DRIVERS
from edge.mailbox import Alive, Answer, Blob, Dropped, Failed, Mailbox, Put, Said, Upward, blob_name
from edge.steps import ahead_ms

SIGN_OF_LIFE_S = 0.25  # at most that often, a call that says nothing is told
IMPORT_S = 60.0  # numpy and OpenCV from a slow card
LAST_WORDS_S = 2.0  # a driver that does not end by then is ended


class Start(msgspec.Struct, frozen=True, tag=True):
    """Which driver, under which name, with what configuration (JSON)."""

    driver: str
    name: str
    config: bytes


class Clocked(msgspec.Struct, frozen=True, tag=True):
    """The gateway's time is the monotonic clock plus this."""

    ahead_ms: int


class Asked(msgspec.Struct, frozen=True, tag=True):
    """A request."""

    request: Request


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End now."""


Downward = Start | Clocked | Asked | Stop


def send(pipe: IO[bytes], message: Upward | Downward) -> None:
    """Write one frame; raises OSError where the other end is gone."""
    payload = msgspec.msgpack.encode(message)
    pipe.write(len(payload).to_bytes(4, "big") + payload)
    pipe.flush()


def receive(pipe: IO[bytes], kind: Any) -> Any:
    """Read one frame of `kind`; None at the end. Raises msgspec.DecodeError."""
    head = pipe.read(4)
    payload = pipe.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    return msgspec.msgpack.decode(payload, type=kind) if payload else None


# --- the gateway's end ---


class Child:
    """One run of a driver in a process: started here, its messages go into a mailbox until it ends."""

    def __init__(self, driver: str, name: str, config: msgspec.Struct, clock: Clock) -> None:
        encoded = msgspec.json.encode(config, enc_hook=int)  # durations, in ms
        self._first = Start(driver, name, encoded)
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._writing = threading.Lock()
        self._early: list[Downward] | None = []  # what was told before the process was there; None once it is

    def attend(self, mailbox: Mailbox) -> None:
        """Start it, and take what it says until it ends; raises Unavailable with its last words."""
        argv = [sys.executable, "-m", "edge.child"]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            self._process = process
            self._begin(process)
            if mailbox.stopping:
                self.tell(Stop())
            why = self._listen(mailbox)
            assert process.stdin is not None
            with suppress(OSError):  # it did not take all that was told
                process.stdin.close()
        if not mailbox.stopping:
            raise Unavailable(why or f"its process ended with code {process.returncode}")

    def _begin(self, process: subprocess.Popen[bytes]) -> None:
        """Tell it what time it is and what it is to do, then what was told meanwhile."""
        assert process.stdin is not None
        with self._writing, suppress(OSError):  # gone at once: `_listen` says why
            early, self._early = self._early or [], None
            for message in (Clocked(ahead_ms(self._clock)), self._first, *early):
                send(process.stdin, message)

    def _listen(self, mailbox: Mailbox) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        why = ""
        try:
            while (message := receive(self._process.stdout, Upward)) is not None:
                if isinstance(message, Failed):
                    why = message.why
                else:
                    mailbox.take(message)
        except msgspec.DecodeError as error:
            self._process.kill()
            return f"its process says what is no message: {error}"
        return why

    def tell(self, message: Downward) -> None:
        """Send a message down, once the process is there; where it is gone, nobody listens."""
        with self._writing:
            if self._early is not None:
                self._early.append(message)
            elif self._process is not None and self._process.stdin is not None:
                with suppress(OSError, ValueError):
                    send(self._process.stdin, message)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()


# --- the child's end ---


class PipeHost:
    """What a driver in a process is given: `edge.driver.Host` on a pipe."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self.inbox = Mailbox()  # of requests and the end only
        self.ahead_ms = 0
        self._pipe = pipe
        self._sending = threading.Lock()
        self._told_s = 0.0

    def send(self, message: Upward) -> None:
        """Send a message up; without a gateway there is nothing left to do: the process ends."""
        with self._sending:
            try:
                send(self._pipe, message)
            except OSError:
                os._exit(1)
            self._told_s = monotonic_s()

    def now_ms(self) -> int:
        return round(self.mono_s() * 1000) + self.ahead_ms

    def mono_s(self) -> float:
        now_s = monotonic_s()
        if now_s - self._told_s > SIGN_OF_LIFE_S:
            self.send(Alive(0.0))
        return now_s

    def put(self, lane: Lane, reading: Reading, *, own_time: bool = False) -> None:
        self.send(Put(lane, reading, own_time))

    def blob(self, content: bytes, *, unmasked: bool = False) -> str:
        self.send(Blob(content, unmasked))
        return blob_name(content)

    def quality(self, device: str, quality: Quality, why: str = "") -> None:
        self.send(Said(device, quality, why))

    def drop(self, reason: str, amount: int = 1, sample: str = "") -> None:
        self.send(Dropped(reason, amount, sample))

    def wait(self, seconds: float) -> bool:
        if seconds > SIGN_OF_LIFE_S:
            self.send(Alive(seconds))
        else:
            self.mono_s()
        ended = self.inbox.wait(seconds)
        if seconds > SIGN_OF_LIFE_S:
            self.send(Alive(0.0))
        return ended

    def requests(self) -> list[Request]:
        self.mono_s()
        return self.inbox.requests()

    def answer(self, request: str, ok: bool, text: str = "") -> None:
        self.send(Answer(request, ok, text))


def _duration(_kind: type, value: Any) -> Any:
    return Duration(value)


def _take_orders(pipe: IO[bytes], host: PipeHost) -> None:
    """Pass on what comes down; the end of the pipe is the end."""
    while (message := receive(pipe, Downward)) is not None and not isinstance(message, Stop):
        if isinstance(message, Clocked):
            host.ahead_ms = message.ahead_ms
        elif isinstance(message, Asked):
            host.inbox.ask(message.request)
    host.inbox.stop()
    wait_s(LAST_WORDS_S)
    os._exit(1)


def main() -> int:
    """Run the driver that the first frames name; what it prints goes to stderr, since stdout is the pipe."""
    up = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    down = sys.stdin.buffer
    host = PipeHost(up)
    while not isinstance(first := receive(down, Downward), Start):
        if first is None:
            return 1
        if isinstance(first, Clocked):
            host.ahead_ms = first.ahead_ms
    host.send(Alive(IMPORT_S))
    threading.Thread(target=_take_orders, args=(down, host), daemon=True, name="orders").start()
    module = import_module(DRIVERS.get(first.driver, first.driver))
    config = msgspec.json.decode(first.config, type=module.Config, dec_hook=_duration)
    try:
        module.make(first.name, config).run(host)
    except (CityBrainError, OSError) as error:
        host.send(Failed(str(error)))
        return 1
    except Exception as error:  # noqa: BLE001  (the supervisor's far end: it says why and ends)
        host.send(Failed(f"{type(error).__name__}: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
