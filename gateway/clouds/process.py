"""`citybrain cloud`: operators' platforms push readings here; they go up by virtual gateways like any others.

One thread and one event loop: HTTP connections take bodies, one commit makes durable what came together, then they are
answered; in between the gateways' connections to the broker are driven. docs/cloud.md is what an integrator reads.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from pathlib import Path

from citybrain.cli import Subcommand, emit
from citybrain.clock import SECOND_MS, monotonic_s, real_unix_ms, real_unix_s
from citybrain.counters import Counters
from citybrain.errors import CityBrainError, SignatureError, StorageError, Unavailable, WireError
from citybrain.layout import Layout, Run
from citybrain.model import Gateway, Reading
from citybrain.storage import OS_FILES, Files
from gateway.clouds.config import Clouds, make_keys, read_clouds
from gateway.clouds.devices import Watch
from gateway.clouds.http import HttpServer, Limits, Reply, Request, problem
from gateway.clouds.intake import Intake, Receipt
from gateway.clouds.mapping import Taken
from gateway.clouds.operators import Peer, peers_of
from gateway.clouds.pull import Page, Schedule, fetch, in_background
from gateway.clouds.seen import Seen, day_of
from gateway.service import Broker, GatewayService, poll_all
from gateway.spool import Spool
from gateway.uplink import Uplink

STEP_S = 0.02  # an acknowledgement is at most that late
BUSY_STEP_S = 0.1  # while pushes come: pushes of so long share one sync of the table
SLOW_STEP_S = 1.0  # between two looks at the registry and at what has expired
VITALS_MS = 10 * SECOND_MS
RETRY_AFTER_S = 30


class CloudProcess:
    """The intake of one data folder. `run` returns when `stop` was called, and raises where a disk fails."""

    def __init__(
        self, layout: Layout, run: Run, clouds: Clouds, limits: Limits | None = None, files: Files = OS_FILES
    ) -> None:
        self.layout = layout
        self.counters = Counters("cloud", layout.run)
        self.peers = peers_of(clouds, layout.secrets)
        self.intake = Intake(Seen(layout.clouds / "seen.db", self.counters), self.counters)
        self._run = run
        self._files = files
        self._server = HttpServer(self.answer, self.counters, limits)
        self._watch = Watch(layout, self.counters)
        self._services: dict[str, GatewayService] = {}
        self._opened: dict[str, Gateway] = {}
        self._pulls = {
            name: Schedule(peer.operator.pull.every) for name, peer in self.peers.items() if peer.operator.pull
        }
        self._round: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._failure: CityBrainError | None = None
        self._slow_s = self._drive_s = 0.0
        self._since_ms = self._vitals_ms = run.clock.now_ms()

    def stop(self) -> None:
        """End `run`; also a signal handler."""
        self._stop.set()

    async def run(self, port: int) -> None:
        """Recover, listen, serve; raises Unavailable where the port is taken, StorageError where the disk fails."""
        self.counters.resume()
        self.intake.seen.start()
        self._slow_step()
        await self._server.start(self._run.host, port)
        try:
            while not self._stop.is_set():
                self._step()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), STEP_S)
        finally:
            await self._server.stop()
            self._close()
        if self._failure is not None:
            raise self._failure

    # --- pushes ---

    async def answer(self, request: Request) -> Reply:
        """Answer one request."""
        path = request.path.partition("?")[0]
        name = path.removeprefix("/push/")
        if path == "/healthz" and request.method == "GET":
            return Reply(200, {"live": True})
        if name == path or "/" in name:
            return problem(404, "not_found", path[:80], "POST /push/OPERATOR is what there is")
        peer = self.peers.get(name)
        if peer is None:
            return problem(404, "unknown_operator", path[:80], "clouds.yaml names no such operator")
        if request.method != "POST":
            return problem(405, "method", request.method[:20], "readings are POSTed")
        return await self._push(peer, request)

    async def _push(self, peer: Peer, request: Request) -> Reply:
        taken = self._read(peer, request)
        if isinstance(taken, Reply):
            return taken
        try:
            receipt = self._take(peer, taken)
            await self._committed()
        except Unavailable as error:
            return problem(503, "unavailable", "platform", str(error), retry_after_s=RETRY_AFTER_S)
        except StorageError as error:
            self._fail(error)
            return problem(503, "storage", "platform", str(error), retry_after_s=RETRY_AFTER_S)
        if not receipt.stored:
            what = "no space left on the platform's disk; nothing of this body counts, push it again"
            return problem(503, "disk_full", "platform", what, retry_after_s=RETRY_AFTER_S)
        return Reply(200, _summary(receipt))

    def _read(self, peer: Peer, request: Request) -> Taken | Reply:
        """Return what a push holds, or why it is refused."""
        try:
            peer.check(request.headers, request.body, real_unix_s())
        except SignatureError as error:
            self.counters.drop(f"signature_{error.reason}")
            where = "header authorization" if error.reason == "token" else "header webhook-signature"
            return problem(401, f"signature_{error.reason}", where, str(error))
        now_ms = self._run.clock.now_ms()
        peer.lives(now_ms)
        peer.pushed_ms = now_ms
        try:
            taken = peer.decoder.decode(request.body)
        except WireError as error:
            self.counters.drop(error.reason)
            return problem(400, error.reason, "body", str(error))
        if not taken.said and taken.problems:
            return self._useless(taken)
        return taken

    def _useless(self, taken: Taken) -> Reply:
        """Refuse a body in which nothing can be used, saying why."""
        self.counters.add("received_total", taken.received)
        for reason, amount in taken.dropped.items():
            self.counters.drop(reason, amount)
        first = taken.problems[0]
        reply = problem(400, first["reason"], first["where"], first["what"])
        return Reply(400, reply.body | {"problems": taken.problems})

    def _take(self, peer: Peer, taken: Taken, cursor: str | None = None) -> Receipt:
        devices = self._watch.devices
        own = [gateway for gateway in devices.of(peer.operator.gateways) if gateway in self._services]
        return self.intake.take(peer.name, own, devices, taken, self._run.clock.now_ms(), cursor)

    async def _committed(self) -> None:
        """Wait for the commit that is next: whatever came in the same turn of the loop shares it."""
        loop = asyncio.get_running_loop()
        if self._round is None:
            self._round = loop.create_future()
            loop.call_soon(self._commit)
        await asyncio.shield(self._round)

    def _commit(self) -> None:
        done, self._round = self._round, None
        try:
            self.intake.commit(self._run.clock.now_ms())
        except StorageError as error:  # nobody is told that anything is stored
            self._fail(error)
            if done is not None:
                done.cancel()
            return
        if done is not None and not done.done():
            done.set_result(None)

    def _fail(self, error: StorageError) -> None:
        """A disk failed otherwise than by being full: the process must end."""
        self._failure = error
        self._stop.set()

    # --- pulls ---

    def _pull(self, peer: Peer, schedule: Schedule) -> None:
        """Ask an operator for what is behind his cursor, in a thread: he may be slow."""
        assert peer.operator.pull is not None
        schedule.busy = True
        loop, url, cursor = asyncio.get_running_loop(), peer.operator.pull.url, self.intake.seen.cursor(peer.name)

        def work() -> None:
            found: Page | Unavailable
            try:
                found = fetch(url, cursor, peer.keys, f"pull-{real_unix_ms()}", real_unix_s())
            except Unavailable as error:
                found = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._start, peer, schedule, cursor, found)

        in_background(work)

    def _start(self, peer: Peer, schedule: Schedule, cursor: str, found: Page | Unavailable) -> None:
        task = asyncio.ensure_future(self._pulled(peer, schedule, cursor, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pulled(self, peer: Peer, schedule: Schedule, cursor: str, found: Page | Unavailable) -> None:
        try:
            more = await self._take_page(peer, cursor, found)
        except Unavailable as error:
            self.counters.add("errors_total", stage="pull")
            if schedule.failed(self._run.clock.now_ms()):
                self.counters.warn(f"pull: {error}; trying ever more seldom")
        else:
            schedule.done(self._run.clock.now_ms(), more=more)

    async def _take_page(self, peer: Peer, cursor: str, found: Page | Unavailable) -> bool:
        """Store a page and, with it, its cursor; return whether there is more. Raises Unavailable."""
        if isinstance(found, Unavailable):
            raise found
        if found.more and found.next == cursor:
            raise Unavailable(f"operator {peer.name!r} says that there is more, and his cursor {cursor!r} stands still")
        peer.lives(self._run.clock.now_ms())
        receipt = self._take(peer, peer.decoder.take(found.messages, "messages"), found.next)
        await self._committed()
        if not receipt.stored:
            raise Unavailable(f"operator {peer.name!r}: no space left for what was pulled")
        return found.more

    # --- everything else ---

    def _step(self) -> None:
        now_ms, now_s = self._run.clock.now_ms(), monotonic_s()
        self._vitals(now_ms)
        if self.intake.waiting and self._round is None:
            self._commit()
        if not self.intake.seen.owing or not 0 <= now_s - self._drive_s < BUSY_STEP_S:
            self._drive_s = now_s
            self.intake.save(now_ms)
            poll_all(list(self._services.values()), 0.0)
        for name, schedule in self._pulls.items():
            if self._services and schedule.due(now_ms):
                self._pull(self.peers[name], schedule)
        if not 0 <= now_s - self._slow_s < SLOW_STEP_S:
            self._slow_s = now_s
            self._slow_step()
        self._tell(now_ms)

    def _slow_step(self) -> None:
        now_ms = self._run.clock.now_ms()
        if self._watch.changed():
            for gateway in self._watch.devices.gateways.values():
                self._open(gateway, now_ms)
        self.intake.seen.expire(day_of(now_ms))

    def _open(self, gateway: Gateway, now_ms: int) -> None:
        """Bring a virtual gateway up, once, or again where it has another shard."""
        if not any(gateway.id.startswith(peer.operator.gateways) for peer in self.peers.values()):
            self.counters.warn(f"gateway {gateway.id}: no operator in clouds.yaml speaks for it")
            return
        known = self._opened.get(gateway.id)
        if known is not None:
            if known.shard == gateway.shard:
                return
            self._close_line(gateway.id)
        folder = self.layout.gateway(gateway.id)
        spool = Spool(folder, f"cloud-{gateway.id}", self._files, counters=self.counters, evicts=False)
        self.intake.open(gateway.id, spool, now_ms)
        uplink = Uplink(spool, gateway.id, gateway.shard, counters=self.counters)
        broker = Broker(self._run.host, self._run.mqtt_port)
        self._services[gateway.id] = GatewayService(uplink, gateway.id, gateway.shard, broker, self._run.clock)
        self._opened[gateway.id] = gateway

    def _vitals(self, now_ms: int) -> None:
        """Let the gateways' time go on while their operator is alive; a dead cloud ages nobody."""
        at_ms = now_ms - now_ms % VITALS_MS
        if at_ms <= self._vitals_ms and self._vitals_ms - now_ms < VITALS_MS:
            return
        self._vitals_ms = at_ms
        for peer in self.peers.values():
            for gateway in self._watch.devices.of(peer.operator.gateways) if peer.alive(now_ms) else ():
                spooled = float(self.intake.spools[gateway].spooled())
                uptime_s = max(at_ms - self._since_ms, 0) / SECOND_MS
                self.intake.vital(gateway, Reading(gateway, at_ms, {"uptime_s": uptime_s, "spooled": spooled}))

    def _tell(self, now_ms: int) -> None:
        gauges = self.counters.gauges
        gauges["spooled"] = float(sum(spool.spooled() for spool in self.intake.spools.values()))
        gauges["online"] = float(sum(service.ready for service in self._services.values()))
        gauges["seen"] = float(self.intake.seen.rows)
        for name, peer in self.peers.items():
            gauges[f"alive{{operator={name}}}"] = float(peer.alive(now_ms))
            if peer.pushed_ms:
                gauges[f"push_age_s{{operator={name}}}"] = max(now_ms - peer.pushed_ms, 0) / SECOND_MS
        self.counters.publish()

    def _close_line(self, gateway: str) -> None:
        self._services.pop(gateway).close(0.2)
        self.intake.spools.pop(gateway).close()
        del self._opened[gateway]

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._failure is None:
            self.intake.save(self._run.clock.now_ms())
        for gateway in list(self._services):
            self._close_line(gateway)
        self.intake.seen.close()
        self.counters.publish(force=True)


def _summary(receipt: Receipt) -> dict[str, object]:
    """Return what a push is answered with."""
    taken = receipt.taken
    return {
        "received": taken.received,
        "accepted": receipt.accepted,
        "repeated": receipt.repeated,
        "dropped": dict(taken.dropped),
        "problems": taken.problems,
    }


# --- command line -----------------------------------------------------------------------------------------------


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="operators and their messages (DATA/clouds.yaml)")
    parser.add_argument("--port", type=int, metavar="N", help="loopback port to listen on (default: the run's)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="check a configuration, and end")
    parser.add_argument("--new-keys", action="store_true", help="make the tokens and secrets that are missing, and end")


async def _serve(layout: Layout, run: Run, clouds: Clouds, port: int) -> None:
    process = CloudProcess(layout, run, clouds)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, process.stop)
    await process.run(port)


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    clouds = read_clouds(args.check or args.config or layout.root / "clouds.yaml")
    if args.check is not None:
        emit({name: _described(clouds, name) for name in clouds.operators}, as_json=args.json)
        return 0
    layout.make()
    if args.new_keys:
        emit({"made": make_keys(layout.secrets, clouds)}, as_json=args.json)
        return 0
    run = layout.read_run()
    asyncio.run(_serve(layout, run, clouds, args.port or run.cloud_port))
    return 0


def _described(clouds: Clouds, name: str) -> dict[str, object]:
    operator = clouds.operators[name]
    metrics = {field.metric: field.lane for field in operator.fields.values()}
    pull = operator.pull.url if operator.pull else None
    return {"path": f"/push/{name}", "gateways": f"{operator.gateways}*", "metrics": metrics, "pull": pull}


command = Subcommand("take the readings that operators' clouds push, and carry them on as gateways", _arguments, _run)
