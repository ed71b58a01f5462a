"""`citybrain ingest`: the process between the broker and the log.

One thread: take the messages that are there, check and append them, sync once for all of them, acknowledge, again. The
longer a sync takes, the more messages share the next one.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import ssl
from collections.abc import Sequence
from types import FrameType
from typing import IO

from citybrain.cli import Subcommand
from citybrain.clock import monotonic_s, wait_s
from citybrain.counters import Counters, process_name, read_heartbeats
from citybrain.errors import (
    CityBrainError,
    ConfigError,
    Damaged,
    NotFound,
    ProtocolError,
    StorageError,
    Unavailable,
    UsageError,
)
from citybrain.layout import Layout, Run
from citybrain.mailbox import Command, Mailbox
from citybrain.storage import OS_FILES
from streams.decode import warm
from streams.ingest import SEGMENT_BYTES, Ingest
from streams.log import Control
from streams.logs import LogStore
from streams.orders import Orders
from streams.runtimes.mqtt import Link
from streams.runtimes.stores import add_arguments, open_place

BURST_MESSAGES = 2000
BURST_S = 0.010
RECONNECT_S = 20.0  # real seconds: nobody is missed so soon after we listen again: gateways back off up to 8 s [U]
TICK_MS = 5_000  # platform time
MAILBOX_S = 0.2
IDLE_S = 0.1  # how long a quiet loop waits: a signal, a command, a tick or a heartbeat is at most that late
BACK_OFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
MOST_QUARANTINED = 20  # devices that the heartbeat names
CHANNELS = ("telemetry", "event", "blob", "status", "reply")


def control_of(command: Command, now_ms: int) -> Control:
    """Return the control record that a command asks for; raises ConfigError where it is none of ours."""
    body, where = command.body, f"command {command.id} {command.kind}"
    if command.kind in ("registry", "ruleset"):
        content = body.get("content")
        if not isinstance(content, str) or not content:
            raise ConfigError(f"{where} content", "expected a content hash")
        return Control(command.kind, now_ms, command.actor, content, reason=command.reason)
    if command.kind == "override":
        subject, rule, from_ms, until_ms = (body.get(name) for name in ("subject", "rule", "from_ms", "until_ms"))
        if not (isinstance(subject, str) and isinstance(rule, str) and subject and rule):
            raise ConfigError(where, 'expected a subject, and a rule or "*"')
        if not (isinstance(from_ms, int) and isinstance(until_ms, int) and from_ms <= until_ms):
            # as long as nothing: it takes back the one of the same subject, rule and beginning
            raise ConfigError(where, f"expected from_ms <= until_ms, got {from_ms!r} and {until_ms!r}")
        actor = str(body.get("actor") or command.actor)
        reason = str(body.get("reason") or command.reason)
        return Control("override", now_ms, actor, "", subject, rule, from_ms, until_ms, reason)
    raise ConfigError(where, "expected one of registry, ruleset, override")


def take_shard(layout: Layout, role: str, shard: int) -> IO[str]:
    """Take a shard for this process alone, until it ends; raises Unavailable where another of its role has it."""
    path = layout.run / f"{role}-shard-{shard}.lock"
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Unavailable(f"{path}: another {role} has shard {shard}; stop it, or give other --shards") from None
    return file


class IngestProcess:
    """The loop around `Ingest`. `run` returns when `stop` has been called."""

    def __init__(
        self,
        layout: Layout,
        run: Run,
        shards: Sequence[int],
        port: int,
        logs: LogStore | None = None,
        *,
        host: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.layout = layout
        self.shards = tuple(shards)
        # Where several processes share the shards each has a heartbeat and a mailbox of its own.
        name = process_name("ingest", self.shards, run.shards)
        self.counters = Counters(name, layout.run)
        self.ingest = Ingest(layout, self.shards, self.counters, logs=logs)
        if logs is not None:
            logs.waiting = self._waiting
        self.counters.probes.append(self._quarantined)
        self._clock = run.clock
        self._reconnect_ms = round(RECONNECT_S * 1000 * run.clock.speed)
        self._mailbox = Mailbox(layout.mailbox(name))
        self._orders = Orders(layout, self.shards, self.counters)
        self._topics = [f"cb/v1/{shard}/+/{channel}" for shard in self.shards for channel in CHANNELS]
        self._link = Link(host or run.host, port, name, tls=tls)
        self._stopping = False
        self._up_since = 0
        self._failures = 0
        self._try_at_s = self._mailbox_at_s = 0.0
        self._ticked_ms = 0

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """End the loop; also a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Recover, then serve until stopped; raises StorageError where the disk fails.

        Raises Unavailable where another ingest has one of the shards: two would spoil the quarantine that they share.
        """
        taken = [take_shard(self.layout, "ingest", shard) for shard in self.shards]
        try:
            self._serve()
        finally:
            for file in taken:
                file.close()

    def _serve(self) -> None:
        self.counters.resume()
        for beat in read_heartbeats(self.layout.run):
            if beat.process == self.counters.process:
                self.ingest.resume(beat.details)
        self.ingest.start()
        warm()
        self.counters.publish(force=True)
        while not self._stopping:
            try:
                self._step()
            except (Unavailable, ProtocolError) as error:
                self._lost(error)
            self.counters.publish()
        self._link.close()
        self.ingest.close()
        self.counters.publish(force=True)

    def _step(self) -> None:
        now_s = monotonic_s()
        if now_s >= self._mailbox_at_s:
            self._mailbox_at_s = now_s + MAILBOX_S
            self._commands()
        if not self._link.is_open and not self._connect(now_s):
            wait_s(min(IDLE_S, max(0.0, self._try_at_s - now_s)))
            return
        self._link.wait(IDLE_S)
        began_s = monotonic_s()
        taken = self._burst()
        self._tick()
        self._commit()
        self._publish_orders()
        self._link.flush()
        self.counters.delayed("lag_s", monotonic_s() - began_s, taken)  # until durable and acknowledged
        self._link.keep_alive()

    def _commit(self) -> None:
        acks = self.ingest.commit()
        self.counters.gauges.pop("log_waiting_s", None)
        for topic, payload in acks:
            self._link.publish(topic, payload)
        self.counters.values["sent_total"] += len(acks)

    def _waiting(self, waited_s: float) -> None:
        """Live on while the log does not answer; raises StorageError once we are told to stop.

        Nothing is taken meanwhile, so for what comes next the link counts as new: nobody was silent.
        """
        self.counters.gauges["log_waiting_s"] = waited_s
        self.counters.publish()
        self._up_since = self._clock.now_ms() + self._reconnect_ms
        if self._stopping:
            raise StorageError(
                f"stopped while the log did not answer for {waited_s:.0f} s: nothing of it is acknowledged"
            )

    def _burst(self) -> int:
        """Take the messages that are there: they will share one sync. Return how many that were."""
        until_s, left = monotonic_s() + BURST_S, BURST_MESSAGES
        while left > 0:
            messages = self._link.receive()
            if not messages:
                break
            now_ms = self._clock.now_ms()
            take = self.ingest.message
            for topic, payload in messages:
                if topic.endswith("/reply"):
                    self._orders.reply(topic, payload, now_ms)
                else:
                    take(topic, payload, now_ms)
            left -= len(messages)
            if monotonic_s() >= until_s:
                break
        return BURST_MESSAGES - left

    def _publish_orders(self) -> None:
        for gateway in self.ingest.births:
            self._orders.born(gateway)
        self.ingest.births.clear()
        for topic, payload in self._orders.due(self._clock.now_ms()):
            self._link.publish(topic, payload)

    def _quarantined(self) -> None:
        self.counters.details["quarantine"] = self.ingest.quarantined(MOST_QUARANTINED)

    def _tick(self) -> None:
        now_ms = self._clock.now_ms()
        if not 0 <= now_ms - self._ticked_ms < TICK_MS:
            self._ticked_ms = now_ms
            self.ingest.tick(now_ms, self._up_since)

    def _connect(self, now_s: float) -> bool:
        """Try to connect, unless the last failure was a moment ago."""
        if now_s < self._try_at_s:
            return False
        self._link.open(self._topics)
        self._failures = 0
        self._up_since = self._clock.now_ms() + self._reconnect_ms
        self.counters.gauges["connected"] = 1
        return True

    def _lost(self, error: CityBrainError) -> None:
        """Say once that the broker is away; there are no ticks until it is back, so nobody ages meanwhile."""
        if not self._failures:
            self.counters.warn(f"{error}; trying again")
            self.counters.add("errors_total", stage="broker")
        self.counters.gauges["connected"] = 0
        self._commit()  # what was taken before the line broke; its acknowledgement goes with the repeats
        back_off_s = BACK_OFF_S[min(self._failures, len(BACK_OFF_S) - 1)]
        self._failures += 1
        self._try_at_s = monotonic_s() + back_off_s

    def _commands(self) -> None:
        """Bring the commands of the mailbox into the log; each is removed once that is durable."""
        commands, broken = self._mailbox.take()
        for one in broken:
            self.counters.drop("malformed_command")
            self.counters.warn(f"{one.what}; kept as {one.path}")
        for name, command in commands:
            now_ms = self._clock.now_ms()
            try:
                self.ingest.control(control_of(command, now_ms), now_ms)
            except (ConfigError, NotFound, Damaged) as error:
                self._refuse(name, error)
                continue
            self._commit()
            if not self.ingest.complete:
                return  # the disk is full: it stays in the mailbox
            self._mailbox.done(name)
            self.counters.add("commands_total")

    def _refuse(self, name: str, error: CityBrainError) -> None:
        """Keep a command that cannot be done aside, and say why."""
        path = self._mailbox.folder / name
        aside = path.with_suffix(".refused")
        OS_FILES.rename(path, aside)
        self.counters.add("errors_total", stage="command")
        self.counters.warn(f"{error}; the command is kept as {aside}")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", metavar="LIST", help="shards to take, such as 0,1 (default: all of the run)")
    parser.add_argument("--port", type=int, help="the broker's port (default: the run's)")
    parser.add_argument("--mqtt-host", metavar="HOST", help="the broker's machine (default: this one)")
    parser.add_argument(
        "--mqtt-tls", metavar="CA,CERT,KEY", help="within TLS: our authorities, our certificate, its key"
    )
    add_arguments(parser)


def tls_context(given: str | None, host: str | None) -> ssl.SSLContext | None:
    """Return a context for `CA,CERT,KEY` (PEM files); raises UsageError, ConfigError.

    Another machine is only reached within TLS.
    """
    if given is None:
        if host and host != "localhost" and not host.startswith("127."):
            raise UsageError(f"--mqtt-host {host}: another machine needs --mqtt-tls CA,CERT,KEY")
        return None
    files = given.split(",")
    if len(files) != 3:
        raise UsageError(f"--mqtt-tls {given!r}: expected three files, CA,CERT,KEY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(files[0])
        context.load_cert_chain(files[1], files[2])
    except OSError as error:  # ssl.SSLError too
        raise ConfigError(f"--mqtt-tls {given}", f"cannot be read as certificates: {error}") from None
    return context


def parse_shards(given: str | None, count: int) -> list[int]:
    """Return the shards to take; raises UsageError."""
    if given is None:
        return list(range(count))
    try:
        shards = sorted({int(one) for one in given.split(",")})
    except ValueError:
        shards = []
    if not shards or shards[0] < 0:
        raise UsageError(f"--shards {given!r}: expected numbers such as 0,1")
    return shards


def _run(args: argparse.Namespace) -> int:
    layout = Layout(args.data)
    layout.make()
    run = layout.read_run()
    shards = parse_shards(args.shards, run.shards)
    place = open_place(args, layout, run.shards, SEGMENT_BYTES)
    tls = tls_context(args.mqtt_tls, args.mqtt_host)
    port = args.port or run.mqtt_port
    process = IngestProcess(place.layout, run, shards, port, place.logs, host=args.mqtt_host or "", tls=tls)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, process.stop)
    process.run()
    return 0


command = Subcommand("take messages from the broker into the log, and acknowledge them", _arguments, _run)
