"""`citybrain gateway commission`: has the platform seen every point, and who says so, signed with the box's key."""

from __future__ import annotations

import argparse
import os
import sys
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from citybrain.cli import emit, language
from citybrain.clock import iso, monotonic_s, real_unix_ms, wait_s
from citybrain.errors import EXIT_FAILED, UsageError
from citybrain.i18n import text as text_of
from citybrain.pictures import MAX_PHOTO, media_type
from citybrain.storage import OS_FILES
from citybrain.wire import blob_sha256
from gateway.enrolment.nmea import Fix, position_of
from gateway.enrolment.renew import caller_of

if TYPE_CHECKING:
    from gateway.enrolment.centre import Caller
    from gateway.enrolment.identity import Identity

APPLIED_S = 10.0  # how long the desk's decision is waited for


class Point(msgspec.Struct, frozen=True):
    """An asset behind the gateway as the platform has it. `seen_at`: Unix ms of its newest value, platform time."""

    device: str
    sensor: str
    kind: str
    name: str
    state: str
    values: dict[str, Any] = {}
    seen_at: int | None = None


class Points(msgspec.Struct, frozen=True):
    """The platform's answer; `at` is its time."""

    gateway: str
    at: int
    points: tuple[Point, ...]


class Accepted(msgspec.Struct, frozen=True):
    """The command that the desk has been given, and how far the sheet's place is from the ledger's.

    misplaced: too far. gcj02: it fits if the position is a public map's. A centre of the release before says neither.
    """

    command: str
    distance_m: float | None = None
    misplaced: bool = False
    gcj02: bool = False


def points_of(caller: Caller, gateway: str) -> Points:
    """Return what the platform expects behind the gateway and has seen of it; raises as Caller.call does."""
    return caller.call("GET", f"/v1/gateways/{gateway}/points", Points)


def sheet(found: Points, technician: str, position: Fix, note: str, photo: bytes = b"") -> bytes:
    """Return a sheet's text; `photo` is named by its SHA-256."""
    points = [{"device": one.device, "sensor": one.sensor, "seen_at": one.seen_at} for one in found.points]
    said: dict[str, Any] = {"gateway": found.gateway, "technician": technician, "at": real_unix_ms(), "note": note}
    said |= {"points": points, "photo": blob_sha256(photo) if photo else ""}
    return msgspec.json.encode(said | position._asdict())


def send(caller: Caller, identity: Identity, root: Path, text: bytes, photo: bytes = b"") -> Accepted:
    """Sign a sheet, keep it with its photo under `commissioning/`, and send both; return the centre's answer."""
    sealed = {"sheet": text.decode(), "signature": identity.seal(text), "photo": b64encode(photo).decode()}
    folder = root / "commissioning"
    OS_FILES.make(folder)
    OS_FILES.replace(folder / f"{real_unix_ms()}.json", msgspec.json.encode(sealed))
    path = f"/v1/gateways/{identity.centre.gateway}/commissioning"
    return caller.call("POST", path, Accepted, sealed)


def read_photo(path: Path) -> bytes:
    """Return a picture's bytes; raises UsageError where it is none, or larger than the centre takes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--photo {path}: {error.strerror or error}") from None
    if media_type(content) is None:
        raise UsageError(f"--photo {path}: expected a JPEG or PNG picture")
    if len(content) > MAX_PHOTO:
        raise UsageError(f"--photo {path}: {len(content)} bytes, at most {MAX_PHOTO} are taken; make it smaller")
    return content


def parse_gps(text: str, accuracy_m: float = 0.0) -> Fix:
    """Return a position as it was typed; raises UsageError.

    >>> parse_gps("121.4737, 31.2304")
    Fix(lon=121.4737, lat=31.2304, accuracy_m=0.0)
    """
    try:
        lon, lat = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--gps {text!r}: expected LON,LAT in degrees such as 121.4737,31.2304") from None
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise UsageError(f"--gps {text!r}: expected longitude (±180), latitude (±90), in this order")
    return Fix(lon, lat, accuracy_m)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `commission`."""
    parser.add_argument("--technician", default="", help="who commissions; without it the points are only shown")
    parser.add_argument("--gps", metavar="LON,LAT", help="where the box stands: degrees, WGS-84 (not a public map's)")
    parser.add_argument("--accuracy", type=float, default=0.0, metavar="M", help="how far --gps may be off, metres")
    parser.add_argument("--nmea", metavar="PORT", help="or the serial port of a GPS receiver")
    parser.add_argument("--partial", action="store_true", help="although some points were not seen: they stay on trial")
    parser.add_argument("--photo", metavar="FILE", type=Path, help="a picture of the cabinet, JPEG or PNG, up to 2 MB")
    parser.add_argument("--note", default="", help="what else the centre should know")


def run(args: argparse.Namespace) -> int:
    """Show the points, and with a technician's name sign and send the sheet; 1 where a point was not seen."""
    from gateway.enrolment.identity import Identity  # noqa: PLC0415  cryptography, which `gateway run` is to do without

    identity = Identity(args.data)
    caller = caller_of(identity, real_unix_ms())
    found = points_of(caller, identity.centre.gateway)
    missing = [one.device for one in found.points if one.seen_at is None]
    told: dict[str, Any] = {"gateway": found.gateway, "points": len(found.points), "missing": missing}
    if not args.json:
        _print(found)
    if not args.technician:
        return _said(told | {"sent": False}, args, EXIT_FAILED if missing else 0)
    if missing and not args.partial:
        return _said(told | {"sent": False, "what": "not seen; see to them, or say --partial"}, args, EXIT_FAILED)
    photo = read_photo(args.photo) if args.photo else b""
    text = sheet(found, args.technician, _position(args), args.note, photo)
    taken = send(caller, identity, args.data, text, photo)
    told |= {"sent": True, "command": taken.command, "distance_m": taken.distance_m, "misplaced": taken.misplaced}
    if taken.misplaced:
        sys.stderr.write(f"! {misplaced(taken, language(os.environ))}\n")
    told["on_trial"] = _on_trial(caller, found)
    return _said(told, args, 0)


def misplaced(taken: Accepted, language: str) -> str:
    """Return in words that the box does not stand where the ledger has it, and what to do."""
    key = "gateway.gcj02" if taken.gcj02 else "gateway.misplaced"
    return text_of(key, language, distance=f"{taken.distance_m or 0.0:.0f}")


def _position(args: argparse.Namespace) -> Fix:
    if args.gps:
        return parse_gps(args.gps, args.accuracy)
    if args.nmea:
        return position_of(args.nmea)
    raise UsageError("say where the box stands: --gps LON,LAT, or --nmea PORT of a GPS receiver")


def _on_trial(caller: Caller, before: Points) -> list[str]:
    """Wait for the desk to put what was seen in service; return what is on trial still."""
    expected = {one.device for one in before.points if one.seen_at is not None}
    until_s = monotonic_s() + APPLIED_S
    while True:
        now = points_of(caller, before.gateway).points
        waiting = [one.device for one in now if one.state == "commissioning"]
        if not expected & set(waiting) or monotonic_s() >= until_s:
            return waiting
        wait_s(0.5)


def _print(found: Points) -> None:
    for one in found.points:
        seen = f"seen on the platform at {iso(one.seen_at)}" if one.seen_at is not None else "NOT SEEN"
        sys.stdout.write(f"{one.device}  {one.sensor}  {one.kind}  {one.state}  {seen}  {one.name}\n")


def _said(told: dict[str, Any], args: argparse.Namespace, code: int) -> int:
    emit(told, as_json=args.json)
    return code
