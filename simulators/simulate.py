"""`citybrain simulate`: the virtual district, live behind its gateways, or `--offline` at full speed."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from api.assets.store import ledger_version
from citybrain.cli import Subcommand, emit
from citybrain.clock import HOUR_MS
from citybrain.counters import Counters
from citybrain.db.place import layout_of
from citybrain.errors import DiskFull, UsageError
from citybrain.layout import Layout, Run
from citybrain.mailbox import Command, Mailbox
from citybrain.model import Gateway
from citybrain.storage import OS_FILES
from edge.agent import Agent
from gateway.service import Broker, GatewayService, poll_all
from gateway.spool import Spool
from gateway.uplink import Uplink
from rules.files import library
from simulators.causes import ANNOUNCED_MS, BY_PERMIT, Cause, permits
from simulators.district import SIZES, District, Size, build
from simulators.faults import Schedule, truth_of
from simulators.sensors import Sensors, SkewedClock, Vitals, is_cloud
from streams.registry import encode_registry
from streams.ruleset import encode_ruleset

ACTOR = "simulator"
WAIT_S = 0.05
TOLD_MS = 6 * HOUR_MS  # a cause that began before, while we were down, touches nobody any more and is not told


# --- provisioning -----------------------------------------------------------------------------------------------


def provision(layout: Layout, district: District, now_ms: int) -> dict[str, object]:
    """Ask ingest to activate the district's registry and the library's rules; nothing where both are in force.

    Where the ledger has been changed its registry stays: a later start must not undo what somebody entered.
    """
    wanted = {
        "registry": layout.put_blob(encode_registry(district.registry)),
        "ruleset": layout.put_blob(encode_ruleset(library())),
    }
    active = layout.read_active()
    changed = [what for what, content in wanted.items() if active is None or getattr(active, what) != content]
    if "registry" in changed and ledger_version(layout):
        changed.remove("registry")
    box = layout.mailbox("ingest")
    waiting = "".join(OS_FILES.names(box))
    for position, what in enumerate(changed):
        name = f"{what}-{wanted[what][:20]}"
        if name not in waiting:
            body = {"content": wanted[what]}
            # A millisecond apart: commands are taken in the order of their times, and rules follow the registry.
            Mailbox(box).put(Command(name, what, ACTOR, now_ms + position, body, "provisioning"))
    return {**wanted, "changed": changed}


# --- live -------------------------------------------------------------------------------------------------------


class Host:
    """One gateway of the district, hosted in this process: its sensors, agent, spool and connection."""

    def __init__(self, layout: Layout, run: Run, schedule: Schedule, gateway: Gateway, counters: Counters) -> None:
        folder = layout.gateway(gateway.id)
        self.id = gateway.id
        self.spool = Spool(folder, f"virtual-{gateway.id}", counters=counters)
        self._sensors = Sensors(schedule.district, gateway.id, schedule, folder / "simulated")
        self._clock = SkewedClock(run.clock, self._sensors.skew_ms)
        self._broker = Broker(run.host, run.mqtt_port)
        self._schedule = schedule
        self._shard = gateway.shard
        self._counters = counters
        self._cut = False
        self._agent: Agent | None = None
        self.service: GatewayService | None = None

    def start(self) -> GatewayService:
        """Recover the spool and return what connects it; raises StorageError."""
        self.spool.start()
        uplink = Uplink(self.spool, self.id, self._shard, counters=self._counters)
        self._agent = Agent([Vitals(self.id, self.spool), self._sensors], self.spool)
        self.service = GatewayService(uplink, self.id, self._shard, self._broker, self._clock)
        return self.service

    def step(self, now_ms: int) -> None:
        """Move what is due into the spool; cut or restore the line as the schedule says. Platform time."""
        if self._agent is None or self.service is None:
            return
        try:
            self._counters.add("readings_total", self._agent.step(self._clock.now_ms()))
        except DiskFull as error:  # the spool has counted what it could not take; the line still empties it
            self._full(error)
        cut = self._schedule.offline(self.id, now_ms)
        if cut != self._cut:
            self._cut = cut
            (self.service.cut if cut else self.service.restore)()

    def _full(self, error: DiskFull) -> None:
        self._counters.add("errors_total", stage="disk_full")
        self._counters.warn(str(error))

    def close(self) -> None:
        """Hand over what waits, say goodbye, close the files."""
        if self._agent is not None:
            try:
                self._agent.flush(self._clock.now_ms())
            except DiskFull as error:
                self._full(error)
        if self.service is not None:
            self.service.close(0.2)
        self.spool.close()


class Diary:
    """Tells what happens: each cause to the truth file once it begins, each permit to ingest before its use begins."""

    def __init__(self, layout: Layout, schedule: Schedule) -> None:
        self._layout = layout
        self._schedule = schedule
        self._told: set[str] = set()
        self._permitted: set[str] = set()

    def start(self) -> None:
        """Find out what an earlier process told; what it left half written is cut."""
        path = self._layout.truth
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            OS_FILES.replace(path, whole)
        self._told = {str(msgspec.json.decode(line)["id"]) for line in whole.splitlines()}

    def step(self, now_ms: int) -> None:
        """Tell what is new at `now_ms` (platform time)."""
        for cause in self._schedule.causes(now_ms - TOLD_MS, now_ms + ANNOUNCED_MS):
            if cause.id in self._told:
                continue
            if cause.kind in BY_PERMIT and cause.id not in self._permitted:
                self._permitted.add(cause.id)
                for command in entries(cause, self._schedule.district):
                    Mailbox(self._layout.mailbox("ingest")).put(command)
            if cause.start_ms <= now_ms < cause.end_ms:
                self._told.add(cause.id)
                with self._layout.truth.open("ab") as file:
                    file.write(msgspec.json.encode(truth_of(cause, self._schedule.district)) + b"\n")


def entries(cause: Cause, district: District) -> list[Command]:
    """Return the commands that enter what is permitted; their ids make a repeat harmless."""
    found = []
    for one in permits(cause, district):
        body = {"subject": one.subject, "rule": one.rule, "from_ms": one.from_ms, "until_ms": one.until_ms}
        found.append(Command(cause.id, "override", ACTOR, cause.start_ms - ANNOUNCED_MS, body, one.reason))
    return found


def live(layout: Layout, run: Run, schedule: Schedule, gateways: Sequence[Gateway], stop: threading.Event) -> None:
    """Run gateways until `stop` is set; raises StorageError where a spool does."""
    counters = Counters("simulate", layout.run)
    counters.resume()
    diary = Diary(layout, schedule)
    diary.start()
    hosts = [Host(layout, run, schedule, gateway, counters) for gateway in gateways]
    try:
        services = [host.start() for host in hosts]
        while not stop.is_set():
            now_ms = run.clock.now_ms()
            diary.step(now_ms)
            for host in hosts:
                host.step(now_ms)
            poll_all(services, WAIT_S)
            counters.gauges["spooled"] = float(sum(host.spool.spooled() for host in hosts))
            counters.gauges["online"] = float(sum(service.ready for service in services))
            counters.publish()
    finally:
        for host in hosts:
            host.close()
        counters.publish(force=True)


# --- command line -----------------------------------------------------------------------------------------------


def chosen(district: District, names: Sequence[str]) -> list[Gateway]:
    """Return the gateways named; where none is, all but the operators' clouds. Raises UsageError."""
    known = {gateway.id: gateway for gateway in district.registry.gateways}
    for name in names:
        if name not in known:
            raise UsageError(f"--gateway {name}: expected one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or (name for name in known if not is_cloud(name)))]


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--provision", action="store_true", help="activate the district's registry and rules, and end")
    parser.add_argument("--gateway", action="append", default=[], metavar="ID", help="host this gateway only")
    parser.add_argument("--scenario", choices=("demo", "random"), default="demo", help="what happens (default: demo)")
    parser.add_argument("--seed", type=int, metavar="N", help="what everything is drawn from (default: the run's)")
    parser.add_argument(
        "--size", choices=SIZES, help="how large the district is (default: the run's; --offline: reference)"
    )
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the district's lists and map layers, and end")
    parser.add_argument("--offline", action="store_true", help="all of the product in one process, at full speed")
    parser.add_argument("--days", type=float, default=2.0, metavar="N", help="with --offline: how long (default: 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --offline: where stores and truth go")


def _run(args: argparse.Namespace) -> int:
    layout = layout_of(args)
    run = layout.read_run()
    size: Size = args.size or ("reference" if args.offline else run.size)
    district = build(run.seed if args.seed is None else args.seed, size)
    if args.export is not None:
        from simulators.export import export  # noqa: PLC0415  maps and workbooks: no simulator that runs needs them

        emit(export(district, args.export), as_json=args.json)
        return 0
    if args.offline:
        if args.out is None:
            raise UsageError("--offline: give an empty folder with --out DIR")
        from simulators.offline import run_offline  # noqa: PLC0415  engine and desk: no gateway that runs needs them

        emit(run_offline(Layout(args.out), district, args.days), as_json=args.json)
        return 0
    layout.make()
    if args.provision:
        emit(provision(layout, district, run.clock.now_ms()), as_json=args.json)
        return 0
    origin_ms = run.clock.origin_ms or run.clock.now_ms()  # without a run this process is its own
    stop = _stop_on_signals()
    schedule = Schedule(district, district.seed, origin_ms, args.scenario)
    live(layout, run, schedule, chosen(district, args.gateway), stop)
    return 0


command = Subcommand("simulate a district: live behind its gateways, or offline at full speed", _arguments, _run)
