"""`citybrain gateway commission`: has the platform seen every point, and who says so, signed with the box's key."""

from __future__ import annotations

import argparse
import sys
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from citybrain.cli import emit
from citybrain.clock import iso, monotonic_s, real_unix_ms, wait_s
from citybrain.errors import EXIT_FAILED, UsageError
from citybrain.pictures import MAX_PHOTO, media_type
from citybrain.storage import OS_FILES
from citybrain.wire import blob_sha256
from gateway.enrolment.nmea import position_of
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
    """The command that the desk has been given."""

    command: str


def points_of(caller: Caller, gateway: str) -> Points:
    """Return what the platform expects behind the gateway and has seen of it; raises as Caller.call does."""
    return caller.call("GET", f"/v1/gateways/{gateway}/points", Points)


def sheet(found: Points, technician: str, position: tuple[float, float], note: str, photo: bytes = b"") -> bytes:
    """Return a sheet's text. `position`: longitude, latitude in degrees (WGS 84); `photo` is named by its SHA-256."""
    points = [{"device": one.device, "sensor": one.sensor, "seen_at": one.seen_at} for one in found.points]
    said = {"gateway": found.gateway, "technician": technician, "at": real_unix_ms(), "note": note}
    return msgspec.json.encode(
        {**said, "lon": position[0], "lat": position[1], "points": points, "photo": blob_sha256(photo) if photo else ""}
    )


def send(caller: Caller, identity: Identity, root: Path, text: bytes, photo: bytes = b"") -> str:
    """Sign a sheet, keep it with its photo under `commissioning/`, and send both; return the command's id."""
    sealed = {"sheet": text.decode(), "signature": identity.seal(text), "photo": b64encode(photo).decode()}
    folder = root / "commissioning"
    OS_FILES.make(folder)
    OS_FILES.replace(folder / f"{real_unix_ms()}.json", msgspec.json.encode(sealed))
    path = f"/v1/gateways/{identity.centre.gateway}/commissioning"
    return caller.call("POST", path, Accepted, sealed).command


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


def parse_gps(text: str) -> tuple[float, float]:
    """Return longitude and latitude; raises UsageError.

    >>> parse_gps("121.4737, 31.2304")
    (121.4737, 31.2304)
    """
    try:
        lon, lat = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--gps {text!r}: expected LON,LAT in degrees such as 121.4737,31.2304") from None
    if not (-180 <= lon <= 180 and -90 <= lat <= 90):
        raise UsageError(f"--gps {text!r}: expected longitude (±180), latitude (±90), in this order")
    return lon, lat


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `commission`."""
    parser.add_argument("--technician", default="", help="who commissions; without it the points are only shown")
    parser.add_argument("--gps", metavar="LON,LAT", help="where the box stands, degrees")
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
    told |= {"sent": True, "command": send(caller, identity, args.data, text, photo)}
    told["on_trial"] = _on_trial(caller, found)
    return _said(told, args, 0)


def _position(args: argparse.Namespace) -> tuple[float, float]:
    if args.gps:
        return parse_gps(args.gps)
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
