"""What boxes ask the centre: enrolment, renewal, and commissioning. Served on the box listener only (api/boxes.py).

A box is known by the certificate of its TLS connection; without one only `enrol` and `trust` answer.
"""

from __future__ import annotations

from typing import Annotated, Any

from cryptography import x509
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from api import commissioning as sheets
from api import enrolment
from api.assets.book import Book
from api.assets.store import read_behind
from api.assets.views import registry_in_force
from api.pki import certificates
from api.pki.ca import Authority
from api.pki.journal import Issued
from api.problem import Problem
from api.site import Here, Site
from citybrain.errors import NotFound, TransitionError, UsageError
from citybrain.model import Gateway

router = APIRouter(prefix="/v1", tags=["boxes"])


class Enrol(BaseModel):
    """A box's first word: its code, a request with the key it has made, and its board's serial."""

    code: str = Field(min_length=1, max_length=100)
    request: str = Field(max_length=8192, description="certificate request, PEM")
    board: str = Field(default="", max_length=100, description="serial of the board")


class Renewal(BaseModel):
    """The request for the next certificate."""

    request: str = Field(max_length=8192, description="certificate request, PEM")


class Trust(BaseModel):
    """The authorities to trust, PEM."""

    trust: str


class Enrolled(Trust):
    """What a box needs: certificate, trust, and (at enrolment) its gateway.yaml. `at`: our time, Unix ms."""

    gateway: str
    certificate: str
    config: str = ""
    at: int


def _authority(request: Request) -> Authority:
    found: Authority = request.app.state.authority
    return found


Ours = Annotated[Authority, Depends(_authority)]


def _box(request: Request, authority: Ours) -> Issued:
    """Return the certificate of the box that asks; raises Problem 401 where it shows none of ours that is valid."""
    shown: bytes | None = request.scope.get("extensions", {}).get("tls", {}).get("client_cert")
    if shown is None:
        raise Problem(401, "no_certificate", "TLS", "show your certificate: it is in the box's pki folder")
    serial = f"{x509.load_der_x509_certificate(shown).serial_number:x}"
    try:
        found = authority.issued(serial)
    except NotFound as error:
        raise Problem(401, "unknown_certificate", "TLS", str(error)) from None
    if (state := found.state(authority.clock.now_ms())) != "valid" or found.kind != "gateway":
        raise Problem(401, "not_valid", "TLS", f"the certificate is {state}; ask the centre for a new code")
    return found


Box = Annotated[Issued, Depends(_box)]


@router.get("/enrol/trust")
def trust(authority: Ours) -> Trust:
    """Return the authorities; a box that enrols compares one with the fingerprint in its code."""
    return Trust(trust=authority.trust().decode())


@router.post("/enrol")
def enrol(request: Request, site: Here, authority: Ours, asked: Enrol) -> Enrolled:
    """Sign a box's certificate for its one-time code; the same key may fetch the answer again for 15 minutes."""
    source, now_ms = request.client.host if request.client else "", authority.clock.now_ms()
    throttle: enrolment.Throttle = request.app.state.throttle
    known = authority.book().codes.get(enrolment.code_hash(asked.code))
    if known is None and throttle.waits(
        source, now_ms
    ):  # a good code is never kept waiting by its neighbours behind a NAT
        raise _refused(site, 429, "enrol_throttled", "too many wrong codes; wait ten minutes", "body code")
    try:
        csr = certificates.read_request(asked.request.encode())
    except UsageError as error:
        raise _refused(site, 400, "enrol_request", str(error), "body request") from None
    shard = _gateway(site, known.gateway).shard if known is not None else 0
    try:
        config = enrolment.configuration(site.layout, authority, known.gateway, shard) if known is not None else ""
        issued, again = enrolment.enrol(authority, asked.code, csr, asked.board)
    except NotFound as error:
        throttle.wrong(source, now_ms)
        raise _refused(site, 404, "enrol_unknown_code", str(error), "body code") from None
    except TransitionError as error:
        raise _refused(site, 409, "enrol_not_open", str(error), "body code") from None
    site.counters.add("enrolments_total", how="again" if again else "signed")
    return _answer(authority, issued, config)


@router.post("/enrol/renew")
def renew(site: Here, authority: Ours, box: Box, asked: Renewal) -> Enrolled:
    """Sign the next certificate of the box that asks."""
    try:
        csr = certificates.read_request(asked.request.encode())
        _gateway(site, box.name)
        issued, again = enrolment.renew(authority, box.serial, csr)
    except UsageError as error:
        raise _refused(site, 400, "enrol_request", str(error), "body request") from None
    except TransitionError as error:
        raise _refused(site, 409, "enrol_not_open", str(error), "TLS") from None
    site.counters.add("enrolments_total", how="again" if again else "renewed")
    return _answer(authority, issued, "")


@router.get("/gateways/{id}/points")
def points(site: Here, box: Box, id: str) -> dict[str, Any]:
    """Return what the ledger expects behind a gateway, and when each value was last seen here."""
    _own(box, id)
    return {"gateway": id, "at": site.clock.now_ms(), "points": sheets.points(_behind(site, id), site.latest, id)}


@router.post("/gateways/{id}/commissioning", status_code=202)
def commissioning(site: Here, authority: Ours, box: Box, id: str, sealed: sheets.Sealed) -> sheets.Taken:
    """Take a commissioning sheet that the box has signed; the desk notes it and puts what was on trial in service.

    One whose place is not where the ledger has the gateway is taken too, and the answer says so.
    """
    _own(box, id)
    place = _gateway(site, id).place
    try:
        return sheets.commissioned(site, authority, box, sealed, place)
    except UsageError as error:
        raise _refused(site, 422, "commissioning_sheet", str(error), "body") from None


def _own(box: Issued, gateway: str) -> None:
    if box.name != gateway:
        raise Problem(403, "not_yours", f"gateway {gateway[:60]}", f"your certificate is {box.name}'s")


def _behind(site: Site, gateway: str) -> Book:
    with site.database() as db:
        return read_behind(db, lambda: registry_in_force(site.layout), gateway, site.clock.now_ms())


def _gateway(site: Site, gateway: str) -> Gateway:
    """Return a gateway as the ledger has it; raises Problem 409 where it is not in use any more."""
    book = _behind(site, gateway)
    asset = book.assets.get(gateway)
    if gateway not in book.gateways or (asset is not None and asset.state == "retired"):
        raise _refused(
            site, 409, "enrol_no_gateway", f"gateway {gateway} is not in use any more; ask the centre", "ledger"
        )
    return book.gateways[gateway]


def _answer(authority: Authority, issued: Issued, config: str) -> Enrolled:
    certificate, trusted = authority.pem(issued.serial).decode(), authority.trust().decode()
    at = authority.clock.now_ms()
    return Enrolled(gateway=issued.name, certificate=certificate, trust=trusted, config=config, at=at)


def _refused(site: Site, status: int, code: str, what: str, where: str) -> Problem:
    site.counters.drop(code)
    return Problem(status, code, where, what)
