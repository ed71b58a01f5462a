"""`citybrain gateway enrol`: a code becomes a certificate, a trusted centre and a gateway.yaml.

The centre is proved by the fingerprint in the code before anything is told to it: its authorities are asked for without
a check, the one with the fingerprint is taken, and everything after that is checked against it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import ssl
import sys
from pathlib import Path
from urllib.parse import parse_qs, urldefrag

import msgspec

from citybrain.cli import emit
from citybrain.clock import iso, real_unix_ms
from citybrain.errors import ConfigError, ProtocolError, TransitionError, UsageError
from citybrain.storage import OS_FILES
from gateway.box import board_serial
from gateway.config import FILE, parse_config
from gateway.enrolment.centre import Caller, certificates_of, checked_context, clock_is_sound, unchecked_context

LEAST_HEX = 32  # of the fingerprint: 128 bits
CLOCK_OFF_S = 60


class Invitation(msgspec.Struct, frozen=True):
    """What stands in the QR code."""

    url: str
    code: str
    fingerprint: str


class Answer(msgspec.Struct, frozen=True):
    """What the centre gives a box. `at`: the centre's time, Unix ms."""

    gateway: str
    certificate: str
    trust: str
    at: int
    config: str = ""


class Trust(msgspec.Struct, frozen=True):
    """The centre's authorities, PEM."""

    trust: str


def read_invitation(text: str) -> Invitation:
    """Return what a QR code's text says; raises UsageError.

    >>> read_invitation("https://iot.example.city:8443#code=K7QF&ca=" + "ab" * 32).code
    'K7QF'
    """
    url, fragment = urldefrag(text.strip())
    said = parse_qs(fragment)
    if not url.startswith("https://") or "code" not in said or "ca" not in said:
        raise UsageError("--qr-text: expected the text of our QR code, https://…#code=…&ca=…")
    return checked(Invitation(url, said["code"][0], said["ca"][0]))


def checked(invitation: Invitation) -> Invitation:
    """Return an invitation whose fingerprint is long enough to prove anything; raises UsageError."""
    fingerprint = invitation.fingerprint.lower().replace(":", "").replace(" ", "")
    if len(fingerprint) < LEAST_HEX or not all(digit in "0123456789abcdef" for digit in fingerprint):
        raise UsageError(f"--ca: expected at least {LEAST_HEX} hex digits of the authority's fingerprint")
    return msgspec.structs.replace(invitation, fingerprint=fingerprint)


def enrol(root: Path, invitation: Invitation, now_ms: int, board: str) -> Answer:
    """Enrol the box of a data folder and write its identity and gateway.yaml; a repeat after a crash is harmless.

    Raises Unavailable, TransitionError in the centre's words, ProtocolError where it is not the centre, ConfigError
    where its gateway.yaml is not valid: the box is enrolled then, and the file is kept beside.
    """
    from gateway.enrolment.identity import Centre, Identity  # noqa: PLC0415  cryptography, which `gateway run` is to do without

    asked = Caller(invitation.url, unchecked_context(), now_ms).call("GET", "/v1/enrol/trust", Trust)
    anchor = _anchor(asked.trust, invitation)
    identity = Identity(root)
    caller = Caller(invitation.url, checked_context(anchor, now_ms), now_ms)
    body = {"code": invitation.code, "request": identity.request(), "board": board}
    answer = caller.call("POST", "/v1/enrol", Answer, body)
    identity.adopt(answer.certificate, answer.trust, Centre(caller.url, answer.gateway))
    _put_config(root / FILE, answer.config)
    return answer


def _anchor(trust: str, invitation: Invitation) -> str:
    """Return the authority (PEM) that has the fingerprint; raises ProtocolError."""
    ders = certificates_of(trust)
    found = {hashlib.sha256(der).hexdigest(): der for der in ders}
    for fingerprint, der in found.items():
        if fingerprint.startswith(invitation.fingerprint):
            return ssl.DER_cert_to_PEM_cert(der)
    what = f"its authority is {', '.join(found) or 'none'}, the code names {invitation.fingerprint}"
    raise ProtocolError(f"{invitation.url}: it is not the centre that made this code, or the code is old: {what}")


def _put_config(path: Path, text: str) -> None:
    try:
        parse_config(text, str(path))
    except ConfigError as error:
        beside = path.with_name(f"{path.name}.refused")
        OS_FILES.replace(beside, text.encode())
        what = f"{error.what}; the box is enrolled; put the centre's template right, and enrol again with a new code"
        raise ConfigError(error.where.replace(str(path), str(beside)), what) from None
    if path.exists() and OS_FILES.read(path) != text.encode():
        OS_FILES.rename(path, path.with_name(f"{path.name}.before"))
    OS_FILES.replace(path, text.encode())


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `enrol`."""
    parser.add_argument("--qr-text", metavar="TEXT", help="what the QR code says; - reads a line from standard input")
    parser.add_argument("--code", help="the code, typed; with --url and --ca")
    parser.add_argument("--url", help="the centre, such as https://iot.example.city:8443")
    parser.add_argument("--ca", metavar="HEX", help="the authority's fingerprint, at least its first 32 digits")
    parser.add_argument("--again", action="store_true", help="although the box is enrolled already")


def run(args: argparse.Namespace) -> int:
    """Enrol, and say as what; exit code 0."""
    from gateway.enrolment.identity import Identity  # noqa: PLC0415  cryptography, which `gateway run` is to do without

    identity = Identity(args.data)
    if identity.enrolled and not args.again:
        known = identity.centre
        raise TransitionError(f"{args.data}: enrolled as {known.gateway} at {known.url}; --again does it once more")
    invitation = _invitation(args)
    OS_FILES.make(args.data)
    now_ms = real_unix_ms()
    answer = enrol(args.data, invitation, now_ms, board_serial())
    offset_s = round((now_ms - answer.at) / 1000)
    told: dict[str, object] = {"gateway": answer.gateway, "config": str(args.data / FILE), "clock_offset_s": offset_s}
    emit(told, as_json=args.json)
    if abs(offset_s) > CLOCK_OFF_S or not clock_is_sound(answer.trust, now_ms):
        now = iso(answer.at)
        sys.stderr.write(f"the clock is off by {offset_s} s; set it (sudo date -u -s {now}) or see to NTP\n")
    return 0


def _invitation(args: argparse.Namespace) -> Invitation:
    if args.qr_text:
        return read_invitation(sys.stdin.readline() if args.qr_text == "-" else args.qr_text)
    if args.code and args.url and args.ca:
        return checked(Invitation(args.url, args.code, args.ca))
    raise UsageError("give --qr-text TEXT, or --code, --url and --ca")
