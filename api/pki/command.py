"""`citybrain ca`: the certificate authority on the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from api.health import LIMITS
from api.pki import certificates
from api.pki.broker import BrokerFolder
from api.pki.ca import Authority, Setting
from api.pki.endings import endings
from api.pki.journal import Issued
from citybrain.cli import Subcommand, emit
from citybrain.clock import DAY_MS, iso
from citybrain.errors import NotFound, UsageError
from citybrain.layout import Layout
from citybrain.storage import OS_FILES


def _init(authority: Authority, args: argparse.Namespace) -> dict[str, Any]:
    made = Setting(
        hosts=tuple(args.host),
        name=args.name,
        listen=args.listen,
        broker_port=args.broker_port,
        passphrase=args.passphrase,
    )
    authority.init(made, args.actor, args.reason)
    return {"authority": 1, "fingerprint": certificates.fingerprint(authority.root(1)), "hosts": list(made.hosts)}


def _sign(authority: Authority, args: argparse.Namespace) -> dict[str, Any]:
    if args.csr is not None:
        request = certificates.read_request(_read(args.csr))
        name = certificates.common_name(request.subject)
        if name != args.name:
            raise UsageError(f"{args.csr}: it asks for {name!r}, not for {args.name!r}")
        one, key = authority.sign("gateway", name, certificates.key(request), args.actor, args.reason), b""
    else:
        one, key = authority.make_service(args.name, args.actor, args.reason)
    OS_FILES.make(args.out)
    OS_FILES.replace(args.out / "ca.pem", authority.trust())
    if key:
        OS_FILES.replace_private(args.out / f"{one.name}.key", key)
    OS_FILES.replace(args.out / f"{one.name}.pem", authority.pem(one.serial))
    return _shown(authority, one) | {"folder": str(args.out)}


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise NotFound(f"{path}: no such file; expected a certificate request in PEM")
    return OS_FILES.read(path)


def _revoke(authority: Authority, args: argparse.Namespace) -> dict[str, Any]:
    if bool(args.serial) == bool(args.gateway):
        raise UsageError("revoke: name a serial, or --gateway ID for all that it has")
    serials = [args.serial] if args.serial else _valid(authority, args.gateway)
    found = authority.revoke(serials, args.actor, args.reason)
    return {"revoked": [_shown(authority, authority.issued(one.serial)) for one in found]}


def _valid(authority: Authority, gateway: str) -> list[str]:
    now_ms = authority.clock.now_ms()
    named = [one for one in authority.book().issued.values() if one.name == gateway and one.kind != "server"]
    valid = [one.serial for one in named if one.state(now_ms) == "valid"]
    if not valid:
        raise NotFound(f"gateway {gateway!r}: it has no valid certificate; `citybrain ca list` names them all")
    return valid


def _list(authority: Authority, args: argparse.Namespace) -> dict[str, Any]:
    """`ending`: a name's last certificate, and it ends soon or has ended: it was not renewed."""
    book, now_ms = authority.book(), authority.clock.now_ms()
    latest = {one.serial for kind in ("gateway", "service", "server") for one in book.latest(kind).values()}
    soon_ms = now_ms + int(LIMITS.certificate_days * DAY_MS)
    ending = {one.serial for one in book.issued.values() if one.serial in latest and one.until_ms < soon_ms}
    shown = [_shown(authority, one) for one in book.issued.values()]
    return {
        "ends": [
            {"kind": one.kind, "name": one.name, "days": round(one.left_s * 1000 / DAY_MS, 1)}
            for one in endings(authority, now_ms)
        ],
        "authorities": [
            {"number": n, "until": iso(until_ms), "fingerprint": certificates.fingerprint(authority.root(n))}
            for n, until_ms in book.authorities.items()
        ],
        "certificates": [
            one
            for one in shown
            if args.state in ("all", one["state"])
            or (args.state == "ending" and one["serial"] in ending and one["state"] != "revoked")
        ],
    }


def _rotate(authority: Authority, args: argparse.Namespace) -> dict[str, Any]:
    number = authority.rotate(args.actor, args.reason)
    return {"authority": number, "fingerprint": certificates.fingerprint(authority.root(number))}


def _broker(authority: Authority, args: argparse.Namespace) -> dict[str, Any]:
    own = args.out is None  # `citybrain run` starts it, as the user that it runs as itself
    out = authority.layout.broker / "boxes" if own else args.out
    user = args.user or ("mosquitto" if os.geteuid() == 0 and not own else "")
    port = args.loopback_port if args.loopback_port is not None else authority.layout.read_run().mqtt_port
    made = BrokerFolder(str(out.absolute()), args.port or authority.setting.broker_port, args.bind, port, user)
    authority.serve_broker(made)
    start = f"citybrain run --data {authority.layout.root}" if own else f"mosquitto -c {made.path}/mosquitto.conf"
    return {"folder": made.path, "start": start}


def _shown(authority: Authority, one: Issued) -> dict[str, Any]:
    shown: dict[str, Any] = {"serial": one.serial, "name": one.name, "kind": one.kind, "authority": one.authority}
    now_ms = authority.clock.now_ms()
    shown |= {"state": one.state(now_ms), "from": iso(one.from_ms), "until": iso(one.until_ms)}
    shown["days"] = round((one.until_ms - now_ms) / DAY_MS, 1)
    if one.revoked_ms is not None:
        shown |= {"revoked": iso(one.revoked_ms), "reason": one.why}
    return shown


ACTIONS: dict[str, Callable[[Authority, argparse.Namespace], dict[str, Any]]] = {
    "init": _init,
    "sign": _sign,
    "revoke": _revoke,
    "list": _list,
    "rotate": _rotate,
    "broker": _broker,
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {name: actions.add_parser(name) for name in ACTIONS}
    for name, one in made.items():
        one.add_argument("--data", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="data folder")
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
        if name != "list":
            one.add_argument("--actor", default="operator", help="who asks, for the journal")
            one.add_argument("--reason", default="", help="why, for the journal")
    _init_arguments(made["init"])
    made["sign"].add_argument("name", help="a gateway with --csr, else one of our services such as service-ingest")
    made["sign"].add_argument("--csr", type=Path, metavar="FILE", help="the gateway's certificate request")
    made["sign"].add_argument("--out", type=Path, required=True, metavar="DIR", help="where certificate and trust go")
    made["revoke"].add_argument("serial", nargs="?", help="of the certificate, in hex")
    made["revoke"].add_argument("--gateway", metavar="ID", help="all valid certificates of a gateway or service")
    made["list"].add_argument("--state", choices=("all", "valid", "ending", "revoked", "expired"), default="all")
    made["broker"].add_argument(
        "--out", type=Path, metavar="DIR", help="for a mosquitto of your own (default: the run's)"
    )
    made["broker"].add_argument("--port", type=int, help="where boxes connect (default: what boxes are told)")
    made["broker"].add_argument("--bind", default="0.0.0.0", help="the address of that listener")
    made["broker"].add_argument(
        "--loopback-port", type=int, help="for this machine's own (default: the run's); 0: none"
    )
    made["broker"].add_argument("--user", default="", help="as whom mosquitto runs")


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", action="append", required=True, help="name or address by which boxes reach the centre"
    )
    parser.add_argument("--name", default="City brain", help="stands in the authority's certificate")
    parser.add_argument("--listen", default="0.0.0.0:8443", help="where `citybrain api` serves boxes; empty: nowhere")
    parser.add_argument("--broker-port", type=int, default=8883, help="the broker's port that boxes are told")
    parser.add_argument("--passphrase", default="file:secrets/ca.passphrase", help="file:PATH or env:NAME")


def _run(args: argparse.Namespace) -> int:
    authority = Authority(Layout(args.data))
    if args.action != "init":
        _ = authority.setting  # says how to make one where there is none
    told = ACTIONS[args.action](authority, args)
    for note in authority.notes:
        sys.stderr.write(f"citybrain ca: {note}\n")
    if args.action == "list" and not args.json:
        _print_list(told)
    else:
        emit(told, as_json=args.json)
    return 0


def _print_list(told: dict[str, Any]) -> None:
    names = ("serial", "name", "kind", "authority", "state", "from", "until", "days")
    rows = [names, *[tuple(str(one[name]) for name in names) for one in told["certificates"]]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    for row in rows:
        sys.stdout.write(
            "  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip() + "\n"
        )
    sys.stdout.write("\n")
    for one in told["ends"]:
        sys.stdout.write(f"{one['kind']} {one['name']}: {one['days']:g} days left\n")


command = Subcommand("the certificate authority: who is who on the wire", _arguments, _run)
