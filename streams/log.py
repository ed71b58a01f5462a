"""The log: what ingest accepted, shard by shard, in one order for ever. It alone determines the transitions.

A record is a *frame* (values as numbered series), a *tick* (platform time passed, the link is up since), a *control*
(rule set, registry, override: named by content hash) or a *command*'s effect. docs/log.md has the layout.
"""

from __future__ import annotations

import enum
import struct

import msgspec
import numpy as np
import numpy.typing as npt

from citybrain.errors import Damaged
from citybrain.model import Lane, Transition

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


class Kind(enum.IntEnum):
    """What a log record holds."""

    FRAME = 1
    TICK = 2
    CONTROL = 3
    COMMAND = 4
    TRANSITION = 5  # in the transition logs only


# gateway index, lane, 0, epoch, seq, sent_at, values, crc32c of the body as it came (tells a conflict)
FRAME_HEAD = struct.Struct("<IBxHQQqII")


class FrameHead(msgspec.Struct, frozen=True):
    """What stands before a frame's arrays. `gateway` indexes the registry that was in force."""

    gateway: int
    lane: Lane
    epoch: int
    seq: int
    sent_at: int
    values: int
    checksum: int


def pack_frame(head: FrameHead, observed_at: I64, value: F64, series: U32) -> bytes:
    """Return a frame record's payload: head, then times (i64), values (f64), series numbers (u32) of `head.values`."""
    front = FRAME_HEAD.pack(head.gateway, head.lane, 0, head.epoch, head.seq, head.sent_at, head.values, head.checksum)
    return b"".join((front, observed_at.tobytes(), value.tobytes(), series.tobytes()))


def frame_head(payload: bytes) -> FrameHead:
    """Return the head of a frame record; raises struct.error where it is too short to have one."""
    gateway, lane, _, epoch, seq, sent_at, values, checksum = FRAME_HEAD.unpack_from(payload)
    return FrameHead(gateway, Lane(lane), epoch, seq, sent_at, values, checksum)


def frame_arrays(payload: bytes, head: FrameHead) -> tuple[I64, F64, U32]:
    """Return (observed_at, value, series) as read-only views of the payload; raises Damaged."""
    n, at = head.values, FRAME_HEAD.size
    if len(payload) != at + 20 * n:
        raise Damaged("frame record", at, f"{len(payload)} bytes do not hold {n} values")
    return (
        np.frombuffer(payload, np.int64, n, at),
        np.frombuffer(payload, np.float64, n, at + 8 * n),
        np.frombuffer(payload, np.uint32, n, at + 16 * n),
    )


class Tick(msgspec.Struct, frozen=True):
    """Platform time passed. `up_since`: since when (Unix ms) ingest is connected without a break."""

    at: int
    up_since: int


class Control(msgspec.Struct, frozen=True):
    """A change of what the engine runs with; `content` is the hash of a blob.

    what: `registry` | `ruleset` (content), `override` (subject, rule or "*", from_ms, until_ms), `cursors` (content:
    what ingest expects next, so that recovery reads one segment), `fault` (subject, rule, epoch: what ingest itself
    noticed about a gateway), `evidence` (content: SHA-256 of a blob that is complete in DATA/evidence, subject: its
    gateway, reason: `unmasked` where it is).
    """

    what: str
    at: int
    actor: str
    content: str = ""
    subject: str = ""
    rule: str = ""
    from_ms: int = 0
    until_ms: int = 0
    reason: str = ""
    epoch: int = 0


_tick = msgspec.json.Decoder(Tick)
_control = msgspec.json.Decoder(Control)


def decode_tick(payload: bytes) -> Tick:
    return _tick.decode(payload)


def decode_control(payload: bytes) -> Control:
    return _control.decode(payload)


_transition = msgspec.json.Decoder(Transition)


def encode_transition(transition: Transition) -> bytes:
    """Return the payload of a `Kind.TRANSITION` record: one transition as JSON."""
    return msgspec.json.encode(transition)


def decode_transition(payload: bytes) -> Transition:
    """Return the transition of a record; raises msgspec.DecodeError."""
    return _transition.decode(payload)
