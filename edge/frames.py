"""The frame of our serial sensors and lift terminals: found again after any noise, never taken when damaged; pure.

    7E A5 | length | type | station | sequence | payload (length bytes) | CRC-16

The checksum is CRC-16/CCITT-FALSE (polynomial 1021, beginning with FFFF, high byte first) over length to payload.
Nothing is escaped: a start inside a payload costs a wrong try, not a frame. Numbers in payloads are big-endian.
"""

from __future__ import annotations

import binascii
from collections import deque

import msgspec

START = b"\x7e\xa5"
HEAD_BYTES, TAIL_BYTES = 6, 2
MOST_PAYLOAD = 255
REMEMBERED = 8  # frames that a repeated one is compared with; far fewer than the 256 numbers
SEQUENCES = 256


class Frame(msgspec.Struct, frozen=True):
    """One frame: `type` says what its payload is, `station` who sends it, `sequence` counts its frames, 0–255."""

    type: int
    station: int
    sequence: int
    payload: bytes

    def encode(self) -> bytes:
        """Return the frame as it goes over the line; raises ValueError where a number is no byte.

        >>> Frame(1, 7, 0, b"ok").encode().hex(" ")
        '7e a5 02 01 07 00 6f 6b b8 f5'
        """
        body = bytes((len(self.payload), self.type, self.station, self.sequence)) + self.payload
        return START + body + checksum(body).to_bytes(2, "big")


class Heard(msgspec.Struct):
    """What bytes turned out to be. noise: bytes outside frames; spoilt: starts whose checksum is wrong; half: starts
    whose frame never came to its end."""

    frames: list[Frame]
    noise: int = 0
    spoilt: int = 0
    half: int = 0


def checksum(data: bytes) -> int:
    """Return the CRC-16/CCITT-FALSE, whose check value is that of its catalogue.

    >>> hex(checksum(b"123456789"))
    '0x29b1'
    """
    return binascii.crc_hqx(data, 0xFFFF)


class Deframer:
    """Finds frames in bytes as they come. `most` is the longest payload there is on this line: no start with a longer
    one can hold up what comes behind it."""

    def __init__(self, most: int = MOST_PAYLOAD) -> None:
        self._most = most
        self._waiting = b""

    def feed(self, data: bytes) -> Heard:
        """Return what is whole now."""
        return self._scan(self._waiting + data, silent=False)

    def rest(self) -> Heard:
        """Return what is in the bytes that waited for more: the line has fallen silent, nothing will come."""
        return self._scan(self._waiting, silent=True)

    def _scan(self, data: bytes, *, silent: bool) -> Heard:
        heard, at, used = Heard([]), 0, 0
        while (start := data.find(START, at)) >= 0:
            heard.noise += start - used
            at = used = start
            length = data[start + 2] if len(data) > start + 2 else 0
            end = start + HEAD_BYTES + length + TAIL_BYTES
            if length <= self._most and end > len(data) and not silent:
                self._waiting = data[start:]
                return heard
            frame = _frame(data[start:end]) if length <= self._most and end <= len(data) else None
            if frame is not None:
                heard.frames.append(frame)
                at = used = end
                continue
            if length <= self._most:
                heard.half += end > len(data)
                heard.spoilt += end <= len(data)
            at = start + 1
        keep = 1 if data.endswith(START[:1]) and not silent and len(data) > used else 0
        heard.noise += len(data) - keep - used
        self._waiting = data[len(data) - keep :]
        return heard


def _frame(data: bytes) -> Frame | None:
    body = data[len(START) : -TAIL_BYTES]
    if checksum(body) != int.from_bytes(data[-TAIL_BYTES:], "big"):
        return None
    return Frame(body[1], body[2], body[3], body[4:])


class Succession:
    """The numbers of one station's frames: which are repeated, and how many did not come."""

    def __init__(self) -> None:
        self._recent: deque[Frame] = deque(maxlen=REMEMBERED)

    def repeated(self, frame: Frame) -> bool:
        """Return whether a frame came already; the sender repeats one whose acknowledgement it missed."""
        return frame in self._recent

    def missed(self, frame: Frame) -> int:
        """Take a frame; return how many are missing before it. A step backwards is a sender that began anew: 0."""
        last = self._recent[-1].sequence if self._recent else frame.sequence - 1
        self._recent.append(frame)
        gap = (frame.sequence - last - 1) % SEQUENCES
        return gap if gap < SEQUENCES // 2 else 0
