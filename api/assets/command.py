"""`citybrain devices`: the ledger on the command line. It reads; what it is asked to change the desk does."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from sqlalchemy import Connection, select

from api.assets import views
from api.assets.book import Book
from api.assets.changes import asset_of, encode_changes, near
from api.assets.findings import errors, report
from api.assets.importing import Result, read_import, sources_of
from api.calls import Api
from citybrain.cli import Subcommand, emit
from citybrain.clock import from_iso, iso, monotonic_s, wait_s
from citybrain.config import duration_ms
from citybrain.counters import read_heartbeats, takes_of
from citybrain.db.place import add_database, layout_of
from citybrain.db.schema import commands, orders
from citybrain.db.store import exists, open_store, refusals
from citybrain.errors import EXIT_CONFIG, EXIT_FAILED, NotFound, UsageError
from citybrain.i18n import text
from citybrain.layout import Run, blob_name
from citybrain.mailbox import Command, Mailbox
from citybrain.orders import WHATS
from citybrain.storage import OS_FILES

POLL_S = 0.05
SHOWN = 20  # findings on the screen; the report has them all


class Desk:
    """The ledger as this command sees it, and the way to the desk."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.layout = layout_of(args)
        self.run: Run = self.layout.read_run()
        self.now_ms = self.run.clock.now_ms()

    @contextmanager
    def database(self) -> Iterator[Connection | None]:
        """Give a read-only connection, None while there is no database."""
        if not exists(self.layout.place):
            yield None
            return
        store = open_store(self.layout.place, readonly=True)
        try:
            with refusals(store), store.connect() as connection:
                yield connection
        finally:
            store.dispose()

    def book(self) -> Book:
        """Return the ledger as it stands."""
        with self.database() as connection:
            return views.read_ledger(self.layout, connection, self.now_ms)

    def tell(self, kind: str, body: dict[str, Any]) -> int:
        """Hand the desk a command, wait for what it says, print that; return the exit code."""
        told = self.told(kind, body)
        emit(told, as_json=self.args.json)
        return EXIT_FAILED if told["state"] == "refused" else 0

    def told(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Hand the desk a command, and return what it says."""
        made = Command(secrets.token_hex(12), kind, self.args.actor, self.now_ms, body, self.args.reason)
        self.layout.make()
        Mailbox(self.layout.mailbox("desk")).put(made)
        result, message = self._decided(made.id)
        return {"command": made.id, "state": result, "message": message}

    def answer(self, order: str) -> dict[str, Any]:
        """Wait for a gateway's answer to an order; return its state and words."""
        until_s = monotonic_s() + self.args.wait
        while True:
            with self.database() as connection:
                query = select(orders.c.state, orders.c.answer).where(orders.c.command == order)
                row = connection.execute(query).first() if connection is not None else None
            if row is not None and (row.state != "asked" or monotonic_s() >= until_s):
                return {"state": row.state, "answer": row.answer}
            wait_s(POLL_S)

    def _decided(self, id: str) -> tuple[str, str]:
        live = any(takes_of(beat.process, 1)[0] == "desk" for beat in read_heartbeats(self.layout.run))
        until_s = monotonic_s() + (self.args.wait if live else 0.0)
        while True:
            with self.database() as connection:
                query = select(commands.c.result, commands.c.message).where(commands.c.id == id)
                row = connection.execute(query).first() if connection is not None else None
            if row is not None:
                return row.result, row.message
            if monotonic_s() >= until_s:
                return "pending", text("ledger.pending", "zh") + " / " + text("ledger.pending", "en")
            wait_s(POLL_S)


# --- import -----------------------------------------------------------------------------------------------------


def _import(desk: Desk) -> int:
    args, book = desk.args, desk.book()
    result = read_import(
        sources_of(args.paths), book, crs=args.crs, shards=range(desk.run.shards), at_ms=desk.now_ms, reason=args.reason
    )
    if args.report is not None:
        OS_FILES.replace(args.report, report(result.findings).encode())
    if result.wrong or args.dry_run or not result.changes.counts:
        return _said(result, args)
    if not args.json:
        _print_findings(result)
    content = desk.layout.put_blob(encode_changes(result.changes))
    return desk.tell("ledger_import", {"content": content})


def _said(result: Result, args: argparse.Namespace) -> int:
    wrong, changed = len(result.wrong), sum(result.changes.counts.values())
    outcome = "refused" if wrong else "dry_run" if args.dry_run else "unchanged"
    if not args.json:
        _print_findings(result)
    told: dict[str, Any] = {"state": outcome, "errors": wrong, "warnings": len(result.findings) - wrong}
    told |= {"changed": changed, "rows": result.counts}
    if args.json:
        told["findings"] = [one.line() for one in result.findings]
    emit(told, as_json=args.json)
    return EXIT_CONFIG if wrong else 0


def _print_findings(result: Result) -> None:
    shown = [*errors(result.findings), *(one for one in result.findings if one.level != "error")]
    for one in shown[:SHOWN]:
        sys.stderr.write(f"{one.where}: {one.told('zh')} / {one.told('en')}\n")
    if len(shown) > SHOWN:
        sys.stderr.write(f"… +{len(shown) - SHOWN} (--report FILE)\n")


# --- changes ----------------------------------------------------------------------------------------------------


def _adopt(desk: Desk) -> int:
    args, book = desk.args, desk.book()
    body: dict[str, Any] = {"sensor": args.sensor, "asset": args.asset, "state": args.state}
    body |= {name: getattr(args, name) for name in ("kind", "name", "zone", "building", "maintainer")}
    body["tags"] = [tag for tag in args.tags.split(",") if tag]
    heard = [one.gateway for one in views.quarantined(desk.layout, desk.run.shards) if one.sensor == args.sensor]
    body["gateway"] = args.gateway or (heard[0] if heard else "")
    if args.lon is not None and args.lat is not None:
        place = views.place_at(book, args.lon, args.lat, args.crs, args.address)
        body["place"] = msgspec.to_builtins(place)
    return desk.tell("asset_adopt", body)


def _enrol_code(desk: Desk) -> int:
    """Make a one-time code for a gateway of the ledger. The authority's journal has it, not the desk."""
    from api import enrolment  # noqa: PLC0415  no other action needs keys
    from api.pki.ca import Authority  # noqa: PLC0415

    args, book = desk.args, desk.book()
    if args.gateway not in book.gateways:
        raise NotFound(f"gateway {args.gateway!r}: not in the ledger; there are {near(book.gateways)}")
    try:
        ttl_ms = duration_ms(args.ttl)
    except ValueError as error:
        raise UsageError(f"--ttl: {error}") from None
    made = enrolment.invite(Authority(desk.layout), args.gateway, ttl_ms, args.actor, args.reason)
    if args.qr:
        sys.stdout.write(enrolment.draw(made.text, args.qr))
    told = {"gateway": made.gateway, "code": made.code, "until": iso(made.until_ms), "url": made.url}
    emit({**told, "fingerprint": made.fingerprint, "qr": made.text}, as_json=args.json)
    return 0


def _replace(desk: Desk) -> int:
    return desk.tell("asset_replace", {"asset": desk.args.asset, "sensor": desk.args.sensor})


def _order(desk: Desk) -> int:
    """Have an order sent to a gateway, and wait for what it answers."""
    args = desk.args
    body = parse_body(args.body)
    if args.config is not None:
        config = read_text(args.config)
        body |= {"config": config, "sha256": blob_name(config.encode())}
    until = moment(args.until, desk.now_ms, "--until")
    made = desk.told("gateway_order", {"gateway": args.gateway, "what": args.what, "until": until, "body": body})
    if made["state"] == "applied":
        made |= desk.answer(made["command"])
    emit(made, as_json=args.json)
    return EXIT_FAILED if made["state"] in ("refused", "failed") else 0


def parse_body(text: str) -> dict[str, Any]:
    """Return the JSON object an order's body is; raises UsageError."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UsageError(f'--body: expected a JSON object such as {{"device": "hyd-1"}}: {error}') from None


def read_text(path: Path) -> str:
    """Return a file's text; raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None


def _mover(kind: str) -> Callable[[Desk], int]:
    return lambda desk: desk.tell(f"asset_{kind}", {"asset": desk.args.asset})


def _register(kind: str) -> Callable[[Desk], int]:
    def enter(desk: Desk) -> int:
        args, active = desk.args, desk.layout.read_active()
        from_ms = moment(args.from_, desk.now_ms, "--from")
        body = {
            "kind": kind,
            "subject": args.subject,
            "from_ms": from_ms,
            "until_ms": moment(args.until, from_ms, "--until"),
            "ruleset": active.ruleset if active is not None else "",
            "also_life": getattr(args, "also_life", False),
        }
        return desk.tell("register_enter", body)

    return enter


def _cancel(desk: Desk) -> int:
    return desk.tell("register_cancel", {"register": desk.args.register})


def moment(said: str, base_ms: int, option: str) -> int:
    """Return `now`, `+2h` (after `base_ms`) or an ISO 8601 time as Unix ms; raises UsageError.

    >>> moment("+90min", 0, "--until")
    5400000
    """
    try:
        if said == "now":
            return base_ms
        return base_ms + duration_ms(said[1:]) if said.startswith("+") else from_iso(said)
    except ValueError:
        what = 'expected "now", "+2h", or an ISO 8601 time such as 2026-01-01T08:00:00+08:00'
        raise UsageError(f"{option} {said!r}: {what}") from None


# --- reading ----------------------------------------------------------------------------------------------------


def _list(desk: Desk) -> int:
    args, book = desk.args, desk.book()
    asked = {name: getattr(args, name) for name in (*views.FILTERS, "street", "grid")}
    found = views.listed(book, asked)
    if args.json:
        emit({"version": book.version, "assets": [views.shown(book, one) for one in found]}, as_json=True)
        return 0
    lines = [(one.code, one.kind, one.state, book.sensor_of(one.code), one.gateway, one.name) for one in found]
    _table(("code", "kind", "state", "sensor", "gateway", "name"), lines)
    return 0


def _show(desk: Desk) -> int:
    book = desk.book()
    emit(views.shown(book, asset_of(book, desk.args.asset)), as_json=desk.args.json)
    return 0


def _history(desk: Desk) -> int:
    with desk.database() as connection:
        book = views.read_ledger(desk.layout, connection, desk.now_ms)
        told = views.history(connection, book, desk.args.asset)
    if desk.args.json:
        emit(told, as_json=True)
        return 0
    _table(
        ("sensor", "from", "until", "reason"),
        [(s["id"], iso(s["installed_at"]), _time(s["removed_at"]), s["reason"]) for s in told["sensors"]],
    )
    steps = [(iso(s["at"]), s["event"], s["after"], s["actor"], s["details"].get("why", "")) for s in told["steps"]]
    _table(("at", "event", "state", "actor", "reason"), steps)
    return 0


def _quarantine(desk: Desk) -> int:
    found = views.quarantined(desk.layout, desk.run.shards)
    if desk.args.json:
        emit({"sensors": [msgspec.to_builtins(one) for one in found]}, as_json=True)
        return 0
    rows = [(one.sensor, one.gateway, one.readings, iso(one.last_at), ",".join(one.metrics)) for one in found]
    _table(("sensor", "gateway", "readings", "last", "metrics"), rows)
    return 0


def _registers(desk: Desk) -> int:
    found = views.registers_of(desk.book(), desk.now_ms, all_of_them=desk.args.all)
    if desk.args.json:
        emit({"registers": found}, as_json=True)
        return 0
    rows = [
        (r["n"], r["kind"], r["subject"], r["phase"], iso(r["from_ms"]), iso(r["until_ms"]), r["actor"], r["reason"])
        for r in found
    ]
    _table(("n", "kind", "subject", "phase", "from", "until", "actor", "reason"), rows)
    return 0


def _gateways(desk: Desk) -> int:
    """The boxes of a live run at a glance."""
    found: list[dict[str, Any]] = []
    asked = "limit=200" + (f"&wants={quote(desk.args.wants)}" if desk.args.wants else "")
    query: str | None = asked
    while query is not None:
        told = Api(desk.layout).get(f"/v1/gateways?{query}")
        found += told["items"]
        query = f"{asked}&cursor={quote(told['next_cursor'])}" if told["next_cursor"] else None
    if desk.args.json:
        emit({"gateways": found}, as_json=True)
        return 0
    rows = [
        (one["id"], "yes" if one["online"] else "no", _time(one["since"]), one["version"], one["config"][:12],
         *("–" if one[name] is None else one[name] for name in ("spooled", "clock_offset_s", "certificate_days")),
         ",".join(one["failing"]), _time((one["commissioned"] or {}).get("at")),
         ",".join(want["code"] for want in one["wants"]))
        for one in found
    ]  # fmt: skip
    _table(
        ("gateway", "online", "since", "version", "config", "spooled", "clock_s", "cert_days", "failing",
         "commissioned", "wants"),
        rows,
    )  # fmt: skip
    return 0


def _time(at_ms: int | None) -> str:
    return iso(at_ms) if at_ms is not None else "–"


def _table(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print rows under their names, as wide as they need."""
    cells = [names, *[tuple(str(value) for value in row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    for row in cells:
        sys.stdout.write("  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip())
        sys.stdout.write("\n")


# --- arguments --------------------------------------------------------------------------------------------------

ACTIONS: dict[str, Callable[[Desk], int]] = {
    "import": _import,
    "list": _list,
    "show": _show,
    "history": _history,
    "gateways": _gateways,
    "quarantine": _quarantine,
    "adopt": _adopt,
    "replace": _replace,
    "enrol-code": _enrol_code,
    "commission": _mover("commission"),
    "activate": _mover("activate"),
    "retire": _mover("retire"),
    "permit": _register("use"),
    "maintenance": _register("maintenance"),
    "registers": _registers,
    "order": _order,
    "cancel": _cancel,
}
CHANGING = frozenset(ACTIONS) - {"list", "show", "history", "gateways", "quarantine", "registers"}


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_database(parser)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {name: actions.add_parser(name) for name in ACTIONS}
    for name, one in made.items():
        one.add_argument("--data", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="data folder")
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
        if name in CHANGING:
            one.add_argument("--actor", default="operator", help="who asks, for the audit")
            one.add_argument("--reason", default="", help="why, for the audit")
            one.add_argument("--wait", type=float, default=30.0, metavar="S", help="how long to wait for the desk")
    _import_arguments(made["import"])
    _adopt_arguments(made["adopt"])
    made["enrol-code"].add_argument("gateway", help="its id in the ledger")
    made["enrol-code"].add_argument("--ttl", default="7d", help="how long the code is valid, such as 7d")
    made["enrol-code"].add_argument("--qr", default="", metavar="FILE", help=".svg, .png, or `terminal`")
    made["replace"].add_argument("asset")
    made["replace"].add_argument("sensor", metavar="wire_id")
    for name in ("show", "history", "commission", "activate", "retire"):
        made[name].add_argument("asset")
    for name in (*views.FILTERS, "street", "grid"):
        made["list"].add_argument(f"--{name}")
    for name in ("permit", "maintenance"):
        made[name].add_argument("subject", help="an asset, or grid:CODE, zone:CODE, building:CODE, street:CODE")
        made[name].add_argument("--from", dest="from_", default="now", metavar="TIME", help="now, +2h, or ISO 8601")
        made[name].add_argument("--until", required=True, metavar="TIME", help="+2h after --from, or ISO 8601")
    made["maintenance"].add_argument("--also-life", action="store_true", help="silence life-safety rules too")
    made["gateways"].add_argument(
        "--wants", default="", metavar="WHAT", help="care, or one kind of it (docs/enrolment.md)"
    )
    made["order"].add_argument("gateway")
    made["order"].add_argument("what", choices=WHATS)
    made["order"].add_argument("--body", default="{}", metavar="JSON", help="what the order takes (docs/gateway.md)")
    made["order"].add_argument("--config", type=Path, metavar="FILE", help="the gateway.yaml of `configure`")
    made["order"].add_argument("--until", default="+10min", metavar="TIME", help="+10min, or ISO 8601")
    made["registers"].add_argument("--all", action="store_true", help="also those that are over")
    made["cancel"].add_argument("register", type=int, metavar="N")


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=".xlsx, .csv, .geojson, .shp, or a folder")
    parser.add_argument("--crs", default="cgcs2000", help="coordinate system where a sheet names none")
    parser.add_argument("--dry-run", action="store_true", help="check only")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was found as CSV")


def _adopt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sensor", metavar="wire_id")
    parser.add_argument("--asset", required=True, metavar="CODE")
    parser.add_argument("--state", choices=("active", "commissioning"), default="active")
    for name in ("gateway", "kind", "name", "zone", "building", "maintainer", "tags", "address"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--lon", type=float)
    parser.add_argument("--lat", type=float)
    parser.add_argument("--crs", default="cgcs2000")


def _run(args: argparse.Namespace) -> int:
    return ACTIONS[args.action](Desk(args))


command = Subcommand("the ledger: assets, sensors, imports, registers", _arguments, _run)
