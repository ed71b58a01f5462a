"""`citybrain gateway renew`: the next certificate, before two thirds of this one's life are over; run daily by a timer.

Also when the centre trusts other authorities than we know of (a rotation). The process in the cabinet takes the new
files with its next connection.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from citybrain.cli import emit
from citybrain.clock import iso, real_unix_ms
from gateway.enrolment.centre import Caller, checked_context
from gateway.enrolment.enrol import Answer, Trust

if TYPE_CHECKING:
    from gateway.enrolment.identity import Identity


def caller_of(identity: Identity, now_ms: int) -> Caller:
    """Return a way to the centre that shows our certificate; raises ConfigError where we are not enrolled."""
    url = identity.centre.url
    return Caller(url, checked_context(identity.trust, now_ms, identity.shown), now_ms)


def renew(identity: Identity, now_ms: int, *, force: bool = False) -> bool:
    """Renew where it is due; return whether it was. Raises as Caller.call does, ConfigError."""
    caller = caller_of(identity, now_ms)
    if not force and not due(identity, now_ms) and caller.call("GET", "/v1/enrol/trust", Trust).trust == identity.trust:
        return False
    answer = caller.call("POST", "/v1/enrol/renew", Answer, {"request": identity.request()})
    identity.adopt(answer.certificate, answer.trust, identity.centre)
    return True


def due(identity: Identity, now_ms: int) -> bool:
    """Return whether two thirds of our certificate's life are over."""
    mine = identity.certificate
    begin, end = mine.not_valid_before_utc.timestamp(), mine.not_valid_after_utc.timestamp()
    return now_ms / 1000 >= begin + (end - begin) * 2 / 3


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `renew`."""
    parser.add_argument("--force", action="store_true", help="although it is not due yet")


def run(args: argparse.Namespace) -> int:
    """Renew where it is due; exit code 0, also where there was nothing to do."""
    from gateway.enrolment.identity import Identity  # noqa: PLC0415  cryptography, which `gateway run` is to do without

    identity = Identity(args.data)
    renewed = renew(identity, real_unix_ms(), force=args.force)
    until = iso(int(identity.certificate.not_valid_after_utc.timestamp() * 1000))
    emit({"gateway": identity.centre.gateway, "renewed": renewed, "until": until}, as_json=args.json)
    return 0
