"""A commissioning sheet at the centre: its signature is checked, it is kept, and the desk is told.

The sheet is JSON; the signature beside it is a JWS (RFC 7515, ES256) with detached content, made with the key of the
box's certificate, so that years later one can still prove which box said it.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from pydantic import BaseModel, Field

from api.assets.book import IN_SERVICE, Book
from api.assets.coordinates import gcj02_to_cgcs2000
from api.fleet import Commissioned
from api.pki import certificates
from api.pki.ca import Authority
from api.pki.journal import Issued
from api.readings import Latest
from api.routes.commands import store
from api.site import Site
from citybrain.errors import NotFound, UsageError
from citybrain.layout import Layout, blob_name
from citybrain.mailbox import Command
from citybrain.model import Place
from citybrain.pictures import MAX_PHOTO, media_type

MOST_OFF_M = 1000.0  # [U] our choice


class Sealed(BaseModel):
    """A sheet as it was signed, byte for byte, and the signature."""

    sheet: str = Field(max_length=512 * 1024, description="JSON text")
    signature: str = Field(max_length=4096, description="JWS, ES256, content detached: header..signature")
    photo: str = Field(default="", max_length=MAX_PHOTO * 4 // 3 + 4, description="the picture it names, in base64")


class Point(msgspec.Struct, frozen=True):
    """A device as it stood on the sheet: `seen_at` is null where the platform had not seen it."""

    device: str
    seen_at: int | None = None


class Sheet(msgspec.Struct, frozen=True):
    """What the technician confirms: who, where (degrees, WGS-84), when (Unix ms), and each point.

    accuracy_m: how far the position may be off, 0 where nobody knows.
    """

    gateway: str
    technician: str
    at: int
    lon: float
    lat: float
    points: tuple[Point, ...]
    note: str = ""
    photo: str = ""
    accuracy_m: float = 0.0


class Taken(BaseModel):
    """A sheet that was taken, and how its place compares with the ledger's."""

    command: str = Field(description="id of the command that the desk has been given")
    distance_m: float | None = Field(description="from where the ledger has the gateway; null where it has no place")
    misplaced: bool = Field(description="farther than 100 m and the position's own uncertainty")
    gcj02: bool = Field(description="the position fits the ledger's if it is a public map's (GCJ-02), not a receiver's")


def points(book: Book, latest: Latest, gateway: str) -> list[dict[str, Any]]:
    """Return the assets behind a gateway: state, sensor, and of each metric the latest value and its time.

    `seen_at` is the newest of those times, null where nothing of it has been seen.
    """
    found = []
    for asset in sorted(book.assets.values(), key=lambda one: one.code):
        if asset.gateway != gateway or asset.state not in IN_SERVICE or asset.kind == "gateway":
            continue
        device = latest.find(asset.code)
        values = latest.values(device) if device is not None else {}
        shown = {name: {"value": one.value, "at": one.at} for name, one in values.items()}
        point: dict[str, Any] = {"device": asset.code, "sensor": book.sensor_of(asset.code), "kind": asset.kind}
        point |= {"name": asset.name, "state": asset.state, "values": shown}
        found.append(point | {"seen_at": max((one.at for one in values.values()), default=None)})
    return found


def commissioned(site: Site, authority: Authority, box: Issued, sealed: Sealed, place: Place) -> Taken:
    """Check and keep a sheet, and hand it to the desk; return the command's id, the same for the same sheet.

    place: where the ledger has the gateway; a sheet that contradicts it is taken, and said. Raises UsageError where the
    signature or the sheet is not right.
    """
    verify(sealed, certificates.read_certificate(authority.pem(box.serial), box.serial).public_key())
    try:
        sheet = msgspec.json.decode(sealed.sheet, type=Sheet)
    except msgspec.DecodeError as error:
        raise UsageError(f"sheet: {error}") from None
    if sheet.gateway != box.name:
        raise UsageError(f"sheet gateway: it is {sheet.gateway[:64]}'s, your certificate is {box.name}'s")
    if not sheet.technician.strip():
        raise UsageError("sheet technician: say who commissions")
    check_position(sheet)
    photo = photo_of(sheet, sealed)
    if photo:
        site.layout.put_blob(photo)
    kept = {**sealed.model_dump(exclude={"photo"}), "serial": box.serial}
    content = site.layout.put_blob(msgspec.json.encode(kept))
    seen = [point.device for point in sheet.points if point.seen_at is not None]
    body: dict[str, Any] = {"gateway": box.name, "sheet": content, "devices": seen, "lon": sheet.lon, "lat": sheet.lat}
    body |= {"photo": sheet.photo, "accuracy_m": sheet.accuracy_m}
    made = Command(content[:24], "gateway_commission", sheet.technician, site.clock.now_ms(), body, sheet.note)
    store(site, site.desk, made)
    return compared(made.id, sheet, place)


def check_position(sheet: Sheet) -> None:
    """Refuse a position that is none; raises UsageError."""
    for name, value, most in (("lon", sheet.lon, 180), ("lat", sheet.lat, 90)):
        if not -most <= value <= most:
            raise UsageError(f"sheet {name}: {value:g} is not within ±{most} degrees; expected WGS-84, longitude first")
    if sheet.lon == sheet.lat == 0.0:
        raise UsageError("sheet lon, lat: 0, 0 is what a receiver without a fix says; wait for one, or give --gps")
    if not 0 <= sheet.accuracy_m <= MOST_OFF_M:
        what = f"expected 0 to {MOST_OFF_M:g} m: a position that is off by more says nothing"
        raise UsageError(f"sheet accuracy_m: {sheet.accuracy_m:g}: {what}")


def compared(command: str, sheet: Sheet, place: Place) -> Taken:
    """Return how a sheet's place compares with the ledger's, as the list of gateways has it from then on."""
    said = Commissioned(sheet.at, sheet.technician, "", sheet.lon, sheet.lat, sheet.accuracy_m)
    away_m, misplaced = said.away_m(place), said.misplaced(place)
    lon, lat = gcj02_to_cgcs2000(np.array([sheet.lon]), np.array([sheet.lat]))
    as_map = msgspec.structs.replace(said, lon=float(lon[0]), lat=float(lat[0]))
    distance_m = None if away_m is None else round(away_m, 1)
    gcj02 = misplaced and not as_map.misplaced(place)
    return Taken(command=command, distance_m=distance_m, misplaced=misplaced, gcj02=gcj02)


def photo_of(sheet: Sheet, sealed: Sealed) -> bytes:
    """Return the picture that a sheet names, empty where it names none; raises UsageError where it is another."""
    try:
        photo = base64.b64decode(sealed.photo, validate=True)
    except binascii.Error:
        raise UsageError("photo: expected base64") from None
    if bool(photo) != bool(sheet.photo) or (photo and blob_name(photo) != sheet.photo):
        raise UsageError(f"photo: it is not the one that the sheet names ({sheet.photo[:64] or 'none'})")
    if photo and media_type(photo) is None:
        raise UsageError("photo: expected a JPEG or PNG picture")
    return photo


def kept_photo(layout: Layout, sheet: str) -> bytes:
    """Return the photo of a kept sheet, by the sheet's hash; raises NotFound, also where it has none."""
    if len(sheet) != 64 or not set(sheet) <= set("0123456789abcdef"):
        raise NotFound(f"sheet {sheet[:80]!r}: want a SHA-256 in hex")
    try:
        kept = msgspec.json.decode(layout.get_blob(sheet), type=dict[str, Any])
        said = msgspec.json.decode(str(kept["sheet"]), type=Sheet)
    except (msgspec.DecodeError, KeyError):
        raise NotFound(f"sheet {sheet}: that content is no commissioning sheet") from None
    if not said.photo:
        raise NotFound(f"sheet {sheet}: it came without a photo")
    return layout.get_blob(said.photo)


def verify(sealed: Sealed, key: Any) -> None:
    """Check a detached ES256 signature; raises UsageError."""
    header, _, rest = sealed.signature.partition(".")
    middle, _, signature = rest.partition(".")
    try:
        said = msgspec.json.decode(_decoded(header), type=dict[str, Any])
        raw = _decoded(signature)
    except (msgspec.DecodeError, binascii.Error, ValueError):
        raise UsageError("signature: expected a JWS with detached content") from None
    if said.get("alg") != "ES256" or middle or len(raw) != 64 or not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError("signature: expected a JWS with alg ES256 and detached content")
    signed = f"{header}.{_encoded(sealed.sheet.encode())}".encode()
    proof = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    try:
        key.verify(proof, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise UsageError("signature: it is not the box's for this sheet") from None


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
