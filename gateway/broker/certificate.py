"""What a certificate says of itself: from when until when, and whose it is.

Read from its DER by hand: the library that reads all of X.509 costs the gateway more memory than the rest of it, and
`ssl` only shows the certificates of others. Nothing is verified here; OpenSSL does that in the handshake.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec

from citybrain.errors import ConfigError

SEQUENCE, SET, OID, INTEGER, UTC_TIME, GENERALIZED_TIME, VERSION = 0x30, 0x31, 0x06, 0x02, 0x17, 0x18, 0xA0
COMMON_NAME = bytes((0x55, 0x04, 0x03))  # 2.5.4.3


class Certificate(msgspec.Struct, frozen=True):
    """Validity in Unix s, and the subject's common name ("" where it has none)."""

    not_before: int
    not_after: int
    name: str


def read_certificate(path: Path) -> Certificate:
    """Return what the first certificate of a PEM file says; raises ConfigError where there is none."""
    try:
        text = path.read_text(encoding="ascii")
        start, end = text.index(ssl.PEM_HEADER), text.index(ssl.PEM_FOOTER) + len(ssl.PEM_FOOTER)
        return parse(ssl.PEM_cert_to_DER_cert(text[start:end]))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from None
    except (ValueError, IndexError):
        raise ConfigError(str(path), "expected a certificate in PEM (-----BEGIN CERTIFICATE-----)") from None


def parse(der: bytes) -> Certificate:
    """Read a DER certificate (RFC 5280, 4.1); raises ValueError or IndexError where it is none."""
    fields = list(_items(_inner(_inner(der))))  # Certificate → TBSCertificate → its fields
    if fields[0][0] == VERSION:
        del fields[0]
    _serial, _algorithm, _issuer, validity, subject = fields[:5]
    begin, end = (_time(kind, content) for kind, content in _items(validity[1]))
    return Certificate(begin, end, _common_name(subject[1]))


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (tag, content) of the elements that stand one behind the other."""
    at = 0
    while at < len(data):
        kind, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[at : at + size])
            at += size
        if at + length > len(data):
            raise ValueError("an element is longer than what holds it")
        yield kind, data[at : at + length]
        at += length


def _inner(data: bytes) -> bytes:
    kind, content = next(_items(data))
    if kind != SEQUENCE:
        raise ValueError("no certificate")
    return content


def _time(kind: int, content: bytes) -> int:
    text = content.decode("ascii")
    if kind == UTC_TIME:  # two digits: 50..99 are the last century's
        text = ("19" if text[:2] >= "50" else "20") + text
    moment = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC)
    return int(moment.timestamp())


def _common_name(subject: bytes) -> str:
    for _, name in _items(subject):
        for _, pair in _items(name):
            (_, key), (_, value) = list(_items(pair))[:2]
            if key == COMMON_NAME:
                return value.decode("utf-8", errors="replace")
    return ""
