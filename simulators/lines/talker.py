"""A device that sends frames by itself on a pseudo-terminal: at line speed, and badly on request."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from citybrain.clock import monotonic_s, wait_s
from edge.frames import SEQUENCES, Frame
from simulators.lines.wire import Wire

Fault = Literal["", "dead", "crc", "half", "noise", "preceded", "repeated"]
Told = tuple[int, int, bytes]  # station, type, payload
LOOK_S = 0.02


class Talker:
    """Sends what `source` returns, asked with the seconds since the start every `every_s`, and what is said between.

    fault: `crc` and `half` damage a frame; `noise` replaces it; `preceded` puts noise before it; `repeated` sends it
    twice; `dead` says nothing.
    """

    def __init__(self, port: Path, baud: int, source: Callable[[float], list[Told]], every_s: float) -> None:
        self.wire = Wire(port, baud)
        self.fault: Fault = ""
        self._source = source
        self._every_s = every_s
        self._sequences: dict[int, int] = {}
        self._random = random.Random(port.name)
        self._plugged = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def start(self) -> None:
        """Plug in and talk."""
        self.wire.plug()
        self._thread.start()

    def stop(self) -> None:
        """End and pull out."""
        self._stop.set()
        self._thread.join()
        self.unplug()

    def unplug(self) -> None:
        """Pull the adapter out."""
        with self._plugged:
            self.wire.unplug()

    def plug(self) -> None:
        """Plug it in again, under the same name."""
        with self._plugged:
            self.wire.plug()

    def say(self, *told: Told) -> None:
        """Send frames now, whole; their stations' numbers go on."""
        self._send(b"".join(self._frame(one) for one in told))

    def skip(self, station: int, frames: int) -> None:
        """Count frames of a station as sent that are not."""
        self._sequences[station] = self._sequences.get(station, 0) + frames

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._send(data)

    def _talk(self) -> None:
        begin_s, number = monotonic_s(), 0
        while not self._stop.is_set():
            due_s = begin_s + number * self._every_s
            if monotonic_s() < due_s:
                wait_s(min(LOOK_S, due_s - monotonic_s()))
                continue
            number += 1
            told = self._source(due_s - begin_s)
            if self.fault != "dead":
                self._send(b"".join(self._spoilt(self._frame(one)) for one in told))

    def _frame(self, told: Told) -> bytes:
        station, kind, payload = told
        number = self._sequences.get(station, 0)
        self._sequences[station] = number + 1
        return Frame(kind, station, number % SEQUENCES, payload).encode()

    def _send(self, data: bytes) -> None:
        with self._plugged:
            if data and self.wire.plugged:
                self.wire.write(data, monotonic_s())

    def _spoilt(self, frame: bytes) -> bytes:
        noise = self._random.randbytes(len(frame))
        damaged = {
            "crc": frame[:-1] + bytes([frame[-1] ^ 0x10]),
            "half": frame[: len(frame) // 2],
            "noise": noise,
            "preceded": noise[:7] + frame,
            "repeated": frame + frame,
        }
        return damaged.get(self.fault, frame)


def serve(name: str, baud: int, source: Callable[[float], list[Told]], every_s: float) -> int:
    """Talk on a new port until the input ends, for a counterpart's command line; print the port as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        talker = Talker(Path(folder) / name, baud, source, every_s)
        talker.start()
        print(json.dumps({"port": str(talker.wire.port), "baud": baud}), flush=True)
        sys.stdin.read()
        talker.stop()
    return 0
