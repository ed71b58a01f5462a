"""The wire contract, version 1 (docs/wire.md): topics, frames up, acknowledgements down.

A message is a header (epoch, seq, floor, sent_at) and a body that never changes once it is spooled; only `floor` and
`sent_at` may differ between two sendings, so the body's checksum tells a repeat from a conflict. Two encodings, told
apart by the first byte: JSON for anyone, *columns* from our gateway. Bodies decode to readings here; the platform's
fast path to arrays is `streams.decode`.
"""

from __future__ import annotations

import array
import hashlib
import math
import re
import struct
import sys
from collections.abc import Sequence

import google_crc32c
import msgspec
import zstandard

from citybrain.errors import WireError
from citybrain.model import Lane, Reading

MAX_MESSAGE = 256 * 1024
MAX_INFLATED = 1024 * 1024
WINDOW_MESSAGES = 32
WINDOW_BYTES = 512 * 1024
MAX_SEQ = 2**53 - 1  # JSON's exact integers: any client can count that far

MAX_FAILING, MAX_WHY = 16, 200  # drivers named in a status, and characters of each reason

MAX_BLOB = 1024 * 1024
CHUNK_BYTES = 63 * 1024  # of content in one message of the blob lane: with both headers below 64 KiB

COLUMNS_MAGIC = 0xCB
VERSION = 1
FLAG_ZSTD = 1
HEAD = struct.Struct("<BBBBIQQQq")  # magic, version, flags, 0, inflated body bytes, epoch, seq, floor, sent_at
BODY = struct.Struct("<HHIIIq")  # devices, metrics, values, names bytes (padded to 8), 0, base time
CHUNK = struct.Struct("<32sIIB7x")  # SHA-256 of the whole blob, its bytes, where this chunk begins, flags, 7 × 0
FLAG_UNMASKED = 1
assert sys.byteorder == "little", "the packed arrays are little-endian"


def topic(shard: int, gateway: str, channel: str) -> str:
    """Return `cb/v1/{shard}/{gateway}/{channel}`."""
    return f"cb/v1/{shard}/{gateway}/{channel}"


def parse_topic(text: str) -> tuple[int, str, str]:
    """Return (shard, gateway, channel); raises WireError(`topic`)."""
    parts = text.split("/")
    if len(parts) != 5 or parts[:2] != ["cb", "v1"] or not parts[2].isdecimal():
        raise WireError("topic", f"{text[:120]!r} is not cb/v1/<shard>/<gateway>/<channel>")
    return int(parts[2]), parts[3], parts[4]


class Header(msgspec.Struct, frozen=True):
    """What numbers a message. `floor` is the lowest seq still spooled; `sent_at` is the gateway's clock.

    Where `seq` is one below `floor` and the body empty, it only asks where ingest stands: nothing is ever taken.
    """

    epoch: int
    seq: int
    floor: int
    sent_at: int

    @property
    def asks(self) -> bool:
        return self.seq < self.floor


class Message(msgspec.Struct, frozen=True):
    """A message taken apart but not yet decoded: `body` is columns (inflated) or the JSON array of readings."""

    header: Header
    columns: bool
    body: bytes
    checksum: int  # crc32c of `body`


class Ack(msgspec.Struct, frozen=True):
    """Everything of `lane` up to and including `seq` is in the log; 0 where nothing is."""

    lane: str
    epoch: int
    seq: int
    v: int = VERSION


class About(msgspec.Struct, frozen=True):
    """What a box says of itself with its status; all of it may be missing, as from an earlier release.

    version: of its software. config: SHA-256 of the gateway.yaml in force, in hex. failing: its drivers that do not
    work, with why; at most `MAX_FAILING`.
    """

    version: str = ""
    config: str = ""
    failing: dict[str, str] = {}


class Status(msgspec.Struct, frozen=True):
    """A gateway's birth, told again where something changed, or its will.

    `connection` counts its connections; an older one is ignored.
    """

    connection: int
    online: bool
    at: int
    serial: str = ""
    spool: str = ""  # what the gateway's spool found damaged when it started
    v: int = VERSION
    about: About = About()


class _JsonFrame(msgspec.Struct):
    v: int
    epoch: int
    seq: int
    floor: int
    readings: msgspec.Raw
    sent_at: int = 0


class JsonReading(msgspec.Struct):
    """One element of a JSON frame's `readings`: device, Unix ms, metric values."""

    d: str
    t: int
    m: dict[str, float]


# What the decoder raises for bytes from outside: bad syntax or types, a string that is no UTF-8, nesting without end.
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_json_frame = msgspec.json.Decoder(_JsonFrame)
_json_readings = msgspec.json.Decoder(list[JsonReading])
_inflater = zstandard.ZstdDecompressor()
_deflater = zstandard.ZstdCompressor(level=1)
_nothing = re.compile(rb"(\[\s*\])?")  # the body of a question, in either encoding
encode_json = msgspec.json.encode


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `data`."""
    return int(google_crc32c.value(data))


# --- up ---------------------------------------------------------------------------------------------------------


def columns_body(readings: Sequence[Reading]) -> bytes:
    """Pack readings as columns: names once, then arrays of value (f64), time (u32 ms after the base), device and
    metric (u16 indexes into the names). Raises ValueError where the frame would span more than 49 days, hold more than
    65,535 names, or a name holds a line break.
    """
    devices: dict[str, int] = {}
    metrics: dict[str, int] = {}
    value, time_, device, metric = array.array("d"), array.array("I"), array.array("H"), array.array("H")
    base = min((reading.observed_at for reading in readings), default=0)
    for reading in readings:
        index = devices.setdefault(reading.device, len(devices))
        after = reading.observed_at - base
        for name, number in reading.values.items():
            value.append(number)
            time_.append(after)
            device.append(index)
            metric.append(metrics.setdefault(name, len(metrics)))
    names = "\n".join([*devices, *metrics]).encode()
    if names.count(b"\n") != max(len(devices) + len(metrics) - 1, 0):
        raise ValueError("a device or metric name holds a line break")
    names += b"\0" * (-len(names) % 8)
    head = BODY.pack(len(devices), len(metrics), len(value), len(names), 0, base)
    return b"".join((head, names, value.tobytes(), time_.tobytes(), device.tobytes(), metric.tobytes()))


def json_body(readings: Sequence[Reading]) -> bytes:
    """Encode readings as the JSON array that a frame's `readings` holds."""
    return encode_json([JsonReading(r.device, r.observed_at, r.values) for r in readings])


def columns_message(header: Header, body: bytes, *, compress: bool = False) -> bytes:
    """Put the header before a columns body; `compress` pays where bytes cost more than time."""
    flags = FLAG_ZSTD if compress else 0
    head = HEAD.pack(COLUMNS_MAGIC, VERSION, flags, 0, len(body), *msgspec.structs.astuple(header))
    return head + (_deflater.compress(body) if compress else body)


def json_message(header: Header, body: bytes) -> bytes:
    """Put the header before a JSON body."""
    return b'{"v":1,"epoch":%d,"seq":%d,"floor":%d,"sent_at":%d,"readings":%b}' % (
        header.epoch,
        header.seq,
        header.floor,
        header.sent_at,
        body,
    )


def open_message(payload: bytes) -> Message:
    """Take a message apart; raises WireError with reason `oversized`, `malformed` or `version`."""
    if len(payload) > MAX_MESSAGE:
        raise WireError("oversized", f"{len(payload)} bytes, at most {MAX_MESSAGE} are taken")
    if not payload:
        raise WireError("malformed", "empty message")
    if payload[0] == COLUMNS_MAGIC:
        return _open_columns(payload)
    return _open_json(payload)


def _open_columns(payload: bytes) -> Message:
    if len(payload) < HEAD.size:
        raise WireError("malformed", f"columns header needs {HEAD.size} bytes, got {len(payload)}")
    _, version, flags, _, inflated, epoch, seq, floor, sent_at = HEAD.unpack_from(payload)
    if version != VERSION:
        raise WireError("version", f"columns version {version}, this platform speaks {VERSION}")
    if inflated > MAX_INFLATED:
        raise WireError("oversized", f"{inflated} bytes inflated, at most {MAX_INFLATED} are taken")
    body = payload[HEAD.size :]
    if flags & FLAG_ZSTD:
        try:
            body = _inflater.decompress(body, max_output_size=inflated, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError("malformed", f"zstd body: {error}") from None
    if len(body) != inflated:
        raise WireError("malformed", f"body has {len(body)} bytes, its header says {inflated}")
    return Message(_checked(epoch, seq, floor, sent_at, body), True, body, crc32c(body))


def _open_json(payload: bytes) -> Message:
    try:
        frame = _json_frame.decode(payload)
    except NOT_JSON as error:
        raise WireError("malformed", f"JSON frame: {error}") from None
    if frame.v != VERSION:
        raise WireError("version", f"JSON frame version {frame.v}, this platform speaks {VERSION}")
    body = bytes(frame.readings)
    return Message(_checked(frame.epoch, frame.seq, frame.floor, frame.sent_at, body), False, body, crc32c(body))


def _checked(epoch: int, seq: int, floor: int, sent_at: int, body: bytes) -> Header:
    question = seq == floor - 1 and _nothing.fullmatch(body) is not None
    if not (0 < epoch <= MAX_SEQ and seq <= MAX_SEQ and 0 < floor <= seq + question and abs(sent_at) <= MAX_SEQ):
        what = "want 0 < floor <= seq, epoch > 0; of a question (no readings) floor = seq + 1"
        raise WireError("malformed", f"epoch {epoch}, seq {seq}, floor {floor}: {what}")
    return Header(epoch, seq, floor, sent_at)


def readings_of(message: Message) -> list[Reading]:
    """Decode a body to readings, a value at a time: the plain path, and what the fast one is tested against.

    Consecutive values of one device and time are one reading. NaN and infinities pass: ingest counts them.
    Raises WireError(`malformed`).
    """
    if not message.columns:
        try:
            return [Reading(r.d, r.t, r.m) for r in _json_readings.decode(message.body)]
        except NOT_JSON as error:
            raise WireError("malformed", f"JSON readings: {error}") from None
    names, arrays = columns_of(message.body)
    devices, metrics = names
    base, value, time_, device, metric = arrays
    readings: list[Reading] = []
    for number, after, d, m in zip(value, time_, device, metric, strict=True):
        if d >= len(devices) or m >= len(metrics):
            raise WireError("malformed", f"value names device {d}, metric {m} of {len(devices)}, {len(metrics)}")
        at = base + after
        last = readings[-1] if readings else None
        if last is None or last.device != devices[d] or last.observed_at != at or metrics[m] in last.values:
            readings.append(last := Reading(devices[d], at, {}))
        last.values[metrics[m]] = number
    return readings


class Arrays(tuple[int, "memoryview[float]", "memoryview[int]", "memoryview[int]", "memoryview[int]"]):
    """(base time, value, time, device, metric) of a columns body, as views of its bytes."""

    __slots__ = ()


def columns_of(body: bytes) -> tuple[tuple[list[str], list[str]], Arrays]:
    """Return ((devices, metrics), arrays) of a columns body without copying; raises WireError(`malformed`)."""
    if len(body) < BODY.size:
        raise WireError("malformed", f"columns body needs {BODY.size} bytes, got {len(body)}")
    n_devices, n_metrics, n, names_bytes, _, base = BODY.unpack_from(body)
    start = BODY.size + names_bytes
    if names_bytes % 8 or len(body) != start + 16 * n:
        raise WireError("malformed", f"{n} values and {names_bytes} bytes of names do not fill {len(body)} bytes")
    try:
        names = body[BODY.size : start].rstrip(b"\0").decode().split("\n") if n_devices + n_metrics else []
    except UnicodeDecodeError as error:
        raise WireError("malformed", f"names: {error}") from None
    if len(names) != n_devices + n_metrics:
        raise WireError("malformed", f"{len(names)} names, the body says {n_devices} + {n_metrics}")
    view = memoryview(body)
    arrays = Arrays(
        (
            base,
            view[start : start + 8 * n].cast("d"),
            view[start + 8 * n : start + 12 * n].cast("I"),
            view[start + 12 * n : start + 14 * n].cast("H"),
            view[start + 14 * n :].cast("H"),
        )
    )
    return (names[:n_devices], names[n_devices:]), arrays


def finite(number: float) -> bool:
    """Return whether a value is a number at all."""
    return math.isfinite(number)


class Chunk(msgspec.Struct, frozen=True):
    """A part of a blob. `sha256` (hex) and `size` are the whole blob's; `content` begins at byte `offset` of it.

    unmasked: persons or plates may be recognised in it, so whoever looks at it has to say why.
    """

    sha256: str
    size: int
    offset: int
    unmasked: bool
    content: bytes


def blob_chunks(content: bytes, *, unmasked: bool = False) -> list[bytes]:
    """Cut a blob into bodies of the blob lane; raises ValueError where it is empty, or larger than 1 MiB."""
    if not 0 < len(content) <= MAX_BLOB:
        raise ValueError(f"a blob of {len(content)} bytes: want 1 .. {MAX_BLOB}")
    digest, flags = hashlib.sha256(content).digest(), FLAG_UNMASKED if unmasked else 0
    return [
        CHUNK.pack(digest, len(content), offset, flags) + content[offset : offset + CHUNK_BYTES]
        for offset in range(0, len(content), CHUNK_BYTES)
    ]


def blob_sha256(content: bytes) -> str:
    """Return what a blob is named by: its SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


def open_chunk(message: Message) -> Chunk:
    """Return the chunk that a message of the blob lane holds; raises WireError(`malformed`)."""
    if not message.columns or len(message.body) <= CHUNK.size:
        raise WireError("malformed", f"{len(message.body)} bytes are no chunk of a blob")
    digest, size, offset, flags = CHUNK.unpack_from(message.body)
    content = message.body[CHUNK.size :]
    if not 0 < size <= MAX_BLOB or offset % CHUNK_BYTES or len(content) != min(CHUNK_BYTES, size - offset):
        raise WireError("malformed", f"{len(content)} bytes at {offset} are no chunk of a blob of {size} bytes")
    return Chunk(digest.hex(), size, offset, bool(flags & FLAG_UNMASKED), content)


def evidence_number(sha256: str) -> float:
    """Return the value of the metric `evidence` that names a blob: the first 52 bits of its hash, exact as a float.

    >>> evidence_number("00000000000ff" + 51 * "0")
    255.0
    """
    return float(int(sha256[:13], 16))


# --- down and beside --------------------------------------------------------------------------------------------

_ack = msgspec.json.Decoder(Ack)
_status = msgspec.json.Decoder(Status)
LANES = {lane.topic: lane for lane in Lane}


def decode_ack(payload: bytes) -> Ack:
    """Decode an acknowledgement; raises WireError(`malformed`)."""
    try:
        ack = _ack.decode(payload)
    except NOT_JSON as error:
        raise WireError("malformed", f"ack: {error}") from None
    if ack.lane not in LANES or ack.seq < 0:
        raise WireError("malformed", f"ack: lane {ack.lane!r}, seq {ack.seq}")
    return ack


def decode_status(payload: bytes) -> Status:
    """Decode a birth or will; raises WireError(`malformed`)."""
    try:
        status = _status.decode(payload)
    except NOT_JSON as error:
        raise WireError("malformed", f"status: {error}") from None
    long = any(len(text) > most for text, most in ((status.serial, 128), (status.spool, 500)))
    if not 0 <= status.connection <= MAX_SEQ or abs(status.at) > MAX_SEQ or long:
        raise WireError(
            "malformed",
            "status: want 0 <= connection <= 2^53, a time in ms, a serial of up to 128 characters, spool of up to 500",
        )
    failing = status.about.failing.items()
    if (
        max(len(status.about.version), len(status.about.config)) > 64
        or len(failing) > MAX_FAILING
        or any(len(driver) > 64 or len(why) > MAX_WHY for driver, why in failing)
    ):
        what = f"want version and config of up to 64 characters, up to {MAX_FAILING} failing drivers"
        raise WireError("malformed", f"status: {what}, each with a reason of up to {MAX_WHY}")
    return status
