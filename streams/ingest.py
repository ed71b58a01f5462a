"""Ingest: the platform side of the wire. What gateways say is checked, numbered, made durable, then acknowledged.

It is a core: no sockets, no clock. Live (`streams.runtimes.ingest`), offline simulation and tests run this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from citybrain import wire
from citybrain.counters import Counters
from citybrain.errors import DiskFull, WireError
from citybrain.layout import Active, Layout
from citybrain.model import Lane
from citybrain.storage import OS_FILES, Files
from streams.complaints import Complaints
from streams.decode import Decoder, salvage
from streams.intake import Intake, Route
from streams.log import Control
from streams.logs import LogStore, SegmentStore
from streams.registry import Index, decode_registry

STATUS = "status"
KEPT_REGISTRIES = 4
SEGMENT_BYTES = 32 * 1024 * 1024  # of the log: recovery reads one; full of the smallest frames that takes about 2 s


class GatewayStatus(msgspec.Struct, frozen=True):
    """What a gateway last said about its connection: its number, whether it is up, since when (its clock, Unix ms)."""

    connection: int
    online: bool
    at: int
    serial: str = ""
    spool: str = ""  # what its spool found damaged when it started
    since: int = 0  # when we heard that first (Unix ms); 0 where an earlier release heard it
    about: wire.About = wire.About()


class Ingest:
    """Takes messages, ticks and controls for some shards.

    Call `start` once; then any number of `message`, `tick`, `control`; then `commit`, which returns what to publish as
    (topic, payload). Nothing is acknowledged before `commit` has synced it, and nothing counts: where a disk is full,
    that shard's part is taken back (`complete` is then False) and the gateways send it again. `logs` is where the
    shards' logs are kept, by default the data folder.
    """

    def __init__(
        self,
        layout: Layout,
        shards: Sequence[int],
        counters: Counters,
        files: Files = OS_FILES,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        logs: LogStore | None = None,
        publishes: bool = True,
    ) -> None:
        self.layout = layout
        self.shards = tuple(shards)
        self.counters = counters
        self.complete = True  # whether the last commit stored everything
        self.gateways: dict[str, GatewayStatus] = {}
        self.births: set[str] = set()  # gateways that connected since whoever reads this cleared it
        self._complaints = Complaints(counters)
        self._registries: dict[str, Decoder] = {}
        self._logs = logs or SegmentStore(layout, files, segment_bytes)
        self._intakes = {
            shard: Intake(layout, shard, counters, self._decoder, self._complaints, self._logs, files)
            for shard in self.shards
        }
        self._routes: dict[str, tuple[Intake, Route]] = {}
        self._active: Active | None = None
        self._publishes = publishes  # what is in force; of several ingests on one clock only their owner can say it

    def start(self) -> None:
        """Recover the logs of all shards; raises StorageError, and NotFound where content they name is missing."""
        for intake in self._intakes.values():
            intake.start()
        self._publish_active()

    def resume(self, details: dict[str, Any]) -> None:
        """Go on with the statuses of the last heartbeat: gateways say theirs only when they connect."""
        try:
            self.gateways = msgspec.convert(details.get("gateways", {}), dict[str, GatewayStatus])
        except msgspec.ValidationError:
            return
        self.counters.details["gateways"] = self.gateways

    def _decoder(self, name: str) -> Decoder:
        """Return the decoder of the registry with this content hash; raises NotFound, Damaged, ConfigError."""
        known = self._registries.get(name)
        if known is None:
            known = Decoder(Index(decode_registry(self.layout.get_blob(name)), name))
            while len(self._registries) >= KEPT_REGISTRIES:
                del self._registries[next(iter(self._registries))]
            self._registries[name] = known
        return known

    def message(self, topic: str, payload: bytes, now_ms: int) -> None:
        """Take one MQTT message (`cb/v1/{shard}/{gateway}/{telemetry|event|blob|status}`), received at `now_ms`.

        Nothing that comes from outside raises: it is counted under a reason, and said.
        """
        self.counters.values["received_total"] += 1
        way = self._routes.get(topic)
        try:
            if way is None:
                way = self._route(topic, payload, now_ms)
                if way is None:
                    return
            intake, route = way
            intake.take(route, wire.open_message(payload), now_ms)
        except WireError as fault:
            self._rubbish(topic, payload, now_ms, fault)

    def _route(self, topic: str, payload: bytes, now_ms: int) -> tuple[Intake, Route] | None:
        """Return the way of a data topic, or take a status message; raises WireError where it leads nowhere."""
        shard, gateway, channel = wire.parse_topic(topic)
        if channel != STATUS and channel not in wire.LANES:
            raise WireError("topic", f"{topic[:120]!r}: ingest takes {', '.join(wire.LANES)} and {STATUS}")
        intake = self._intakes.get(shard)
        if intake is None:
            raise WireError("wrong_shard", f"shard {shard} is not one of ours: {self.shards}")
        if channel == STATUS:
            intake.route(gateway, Lane.TELEMETRY)  # only to know that it is ours
            self._status(gateway, payload, now_ms)
            return None
        way = self._routes[topic] = (intake, intake.route(gateway, wire.LANES[channel]))
        return way

    def _status(self, gateway: str, payload: bytes, now_ms: int) -> None:
        """Keep a gateway's birth or will, unless it is an older connection's.

        A birth that is told again, because something in it has changed, is no new one.
        """
        status = wire.decode_status(payload)
        last = self.gateways.get(gateway)
        if last is not None and status.serial == last.serial and status.connection < last.connection:
            self.counters.drop("stale_status")
            return
        if status.online and last is not None and last.serial not in ("", status.serial):
            self.counters.add("boards_total")
            what = "it was replaced, or its card was cloned: two that take turns are a clone (docs/security.md)"
            self.counters.warn(f"gateway {gateway}: board {status.serial!r}, before it {last.serial!r}: {what}")
        self.counters.add("status_total")
        again = last is not None and _connection(status) == _connection(last)
        since = last.since if again and last is not None else now_ms
        self.gateways[gateway] = GatewayStatus(
            status.connection, status.online, status.at, status.serial, status.spool, since, status.about
        )
        self.counters.details["gateways"] = self.gateways
        if status.online and not again:
            self.births.add(gateway)

    def _rubbish(self, topic: str, payload: bytes, now_ms: int, fault: WireError) -> None:
        """Count a message that is none; if its header can be read take its number, or it blocks its lane for ever."""
        way = self._routes.get(topic)
        message = salvage(payload) if way is not None and fault.reason != "version" else None
        if way is not None and message is not None:
            way[0].take(way[1], message, now_ms, fault)
            return
        self.counters.drop(fault.reason)
        self._say(topic, now_ms, fault)

    def _say(self, topic: str, now_ms: int, fault: WireError) -> None:
        if self._complaints.due(fault.reason, now_ms):
            self._complaints.say(fault.reason, now_ms, f"{topic[:120]}: {str(fault)[:300]}")

    def tick(self, now_ms: int, up_since: int) -> None:
        """Note in every shard that platform time passed, and since when (Unix ms) the broker link is up."""
        for intake in self._intakes.values():
            intake.tick(now_ms, up_since)

    def control(self, control: Control, now_ms: int) -> None:
        """Write a control record to every shard; a `registry` is in force for the messages after it.

        Raises NotFound, Damaged or ConfigError, with nothing written, where its content is not there or no registry.
        """
        if control.what == "registry":
            self._decoder(control.content)
        elif control.content:
            self.layout.get_blob(control.content)
        if control.content:
            self._logs.share(control.content)
        for intake in self._intakes.values():
            intake.control(control, now_ms)
        self._routes.clear()

    def commit(self) -> list[tuple[str, bytes]]:
        """Sync all shards and return the acknowledgements that are true now, as (topic, payload).

        Raises StorageError where a disk failed otherwise than by being full: the process must end.
        """
        acks: list[tuple[str, bytes]] = []
        self.complete = True
        for intake in self._intakes.values():
            if intake.commit():
                acks += intake.answers()
            else:
                self.complete = False
                self._routes.clear()
        self._publish_active()
        self.counters.gauges["quarantined"] = sum(intake.quarantine.waiting for intake in self._intakes.values())
        return acks

    def quarantined(self, most: int) -> dict[str, int]:
        """Return the `gateway/device`s that wait to be adopted, and how many messages each; those with most first."""
        waiting = {
            f"{gateway}/{device}": len(keys)
            for intake in self._intakes.values()
            for (gateway, device), keys in intake.quarantine.pending.items()
        }
        return dict(sorted(waiting.items(), key=lambda item: (-item[1], item[0]))[:most])

    def _publish_active(self) -> None:
        """Tell the other processes which registry and rule set every shard has by now."""
        settled = {intake.settled for intake in self._intakes.values()}
        active = settled.pop()
        unknown = settled or active == self._active or not (active.registry and active.ruleset)
        if unknown or not self._publishes:
            return
        try:
            self.layout.write_active(active)
        except DiskFull as error:  # the log has it; the others are told with a later commit
            self.counters.add("errors_total", stage="active")
            self.counters.warn(str(error))
            return
        self._active = active

    def close(self) -> None:
        """Close the logs; what was not committed is lost."""
        for intake in self._intakes.values():
            intake.close()


def _connection(status: wire.Status | GatewayStatus) -> tuple[str, int, bool]:
    return status.serial, status.connection, status.online
