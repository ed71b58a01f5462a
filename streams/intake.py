"""One shard's intake: numbers judged, values checked, frames appended; what is taken counts once it is synced.

A shard stands by itself: its log, its quarantine, its cursors and the registry in force there are committed, or taken
back, together. docs/log.md has the records and the recovery.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from citybrain import wire
from citybrain.counters import Counters
from citybrain.errors import Damaged, DiskFull, NotFound, WireError
from citybrain.layout import Active, Layout
from citybrain.model import Lane, Reading
from citybrain.segments import Record
from citybrain.storage import OS_FILES, Files
from streams.complaints import Complaints
from streams.cursors import Cursor, Cursors, Lanes, Saved, Verdict, decode_saved, encode_saved
from streams.decode import FUTURE, Decoded, Decoder, culprit, decode_readings
from streams.evidence import EvidenceStore
from streams.log import Control, FrameHead, Kind, Tick, decode_control, frame_head, pack_frame
from streams.logs import LogStore, records
from streams.quarantine import Held, Quarantine

KEPT_SNAPSHOTS = 4
REPLAYED_EPOCH = 0  # no gateway sends it: a frame out of quarantine, its seq the quarantine's offset
NOTHING = Decoded(np.empty(0, np.int64), np.empty(0), np.empty(0, np.uint32), 0, {}, 0)


class Route(msgspec.Struct, frozen=True, eq=False):
    """Where a topic leads: a gateway, its number in the registry, its lane and the cursors of that lane."""

    gateway: str
    number: int
    lane: Lane
    lanes: Lanes
    ack_topic: str


def named(route: Route, header: wire.Header) -> str:
    """Return what a warning calls a message: gateway, lane, epoch and seq."""
    return f"{route.gateway} {route.lane.topic} epoch {header.epoch} seq {header.seq}"


class Intake:
    """A shard. `load` returns the decoder of a registry by its content hash."""

    def __init__(
        self,
        layout: Layout,
        shard: int,
        counters: Counters,
        load: Callable[[str], Decoder],
        complaints: Complaints,
        logs: LogStore,
        files: Files = OS_FILES,
    ) -> None:
        self.shard = shard
        self.decoder: Decoder | None = None
        self.ruleset = ""
        self.cursors = Cursors()
        self.quarantine = Quarantine(layout.quarantine / str(shard), files)
        self._evidence = EvidenceStore(layout.evidence, files)
        self._completed: set[str] = set()  # blobs that the log says are complete, since its last snapshot of cursors
        self._completing: set[str] = set()
        self._layout = layout
        self._counters = counters
        self._load = load
        self._complaints = complaints
        self._logs = logs
        self._writer = logs.writer("log", shard)
        self._counts: Counter[str] = Counter()
        self._answers: dict[int, tuple[Route, int, Cursor]] = {}
        self._adopted: dict[str, int] = {}
        self._adopting: dict[str, int] = {}
        self._settled: tuple[Decoder | None, str] = (None, "")
        self._snapshots: list[str] = []
        self._snapshot_segment = -1
        self._last_ms = 0

    @property
    def settled(self) -> Active:
        """The registry and rule set that the log has by the last commit, by content hash; "" where none."""
        decoder, ruleset = self._settled
        return Active(decoder.index.name if decoder is not None else "", ruleset)

    # --- recovery -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Recover the log and what it says; raises StorageError, NotFound where content that it names is missing."""
        self._writer.start()
        replayed: set[int] = set()
        for record in self._records(self._last_snapshot()):
            self._last_ms = max(self._last_ms, record.received_at)
            if record.kind == Kind.CONTROL:
                self._recover_control(decode_control(record.payload), replayed)
            elif record.kind == Kind.FRAME:
                self._recover_frame(record, replayed)
        self._settled = (self.decoder, self.ruleset)
        self.quarantine.start(self._adopted, replayed)
        for warning in (*self._writer.warnings, *self.quarantine.warnings):
            self._counters.warn(warning)
            self._counters.add("errors_total", stage="recovery")
        if self._writer.next_offset:
            self._adopt(self._last_ms)
            self.commit()

    def _records(self, first: int) -> Iterator[Record]:
        """Yield all records from `first` on; a segment that cannot be read is said and passed over."""
        reader = self._logs.reader("log", self.shard, first)
        while True:
            try:
                yield from records(reader)
            except Damaged as error:
                self._counters.warn(str(error))
                self._counters.add("errors_total", stage="recovery")
                later = [other for other in self._logs.starts("log", self.shard) if other > reader.offset]
                if not later:
                    return
                reader = self._logs.reader("log", self.shard, min(later))
            else:
                return

    def _last_snapshot(self) -> int:
        """Return the offset of the last snapshot of cursors that can be read, or of the first record."""
        following = self._writer.next_offset
        for first in self._logs.starts("log", self.shard):
            place = -1
            for record in self._records(first):
                if record.offset >= following:
                    break
                if record.kind == Kind.CONTROL and self._saved(decode_control(record.payload)) is not None:
                    place = record.offset
            if place >= 0:
                return place
            following = first
        return following

    def _saved(self, control: Control) -> Saved | None:
        if control.what != "cursors":
            return None
        try:
            return decode_saved(self._layout.get_blob(control.content), control.content)
        except (NotFound, Damaged) as error:
            self._counters.warn(f"{self._logs.where('log', self.shard)}: {error}; an older one is read instead")
            return None

    def _recover_control(self, control: Control, replayed: set[int]) -> None:
        saved = self._saved(control)
        if saved is not None:
            self.cursors.load(saved)
            self.decoder = self._load(saved.registry) if saved.registry else None
            self.ruleset, self._adopted = saved.ruleset, dict(saved.adopted)
            self._snapshots = [control.content, *saved.previous]
            replayed.clear()
            self._completed.clear()
        elif control.what == "registry":
            self.decoder = self._load(control.content)
        elif control.what == "ruleset":
            self.ruleset = control.content
        elif control.what == "fault":
            self.cursors.faulted.add((control.subject, control.epoch))
        elif control.what == "evidence":
            self._completed.add(control.content)

    def _recover_frame(self, record: Record, replayed: set[int]) -> None:
        head = frame_head(record.payload)
        if head.epoch == REPLAYED_EPOCH:
            replayed.add(head.seq)
        elif self.decoder is not None:
            gateway = self.decoder.index.gateways[head.gateway].id
            header = wire.Header(head.epoch, head.seq, head.seq, head.sent_at)
            self.cursors.recovered(gateway, head.lane, header, head.checksum, record.received_at)

    # --- taking -------------------------------------------------------------------------------------------------

    def route(self, gateway: str, lane: Lane) -> Route:
        """Return where a lane of a gateway leads; raises WireError(`unknown_gateway` | `wrong_shard`)."""
        number = self.decoder.index.gateway_index.get(gateway) if self.decoder is not None else None
        if self.decoder is None or number is None:
            raise WireError("unknown_gateway", f"gateway {gateway!r} is not in the registry")
        shard = self.decoder.index.gateways[number].shard
        if shard != self.shard:
            raise WireError("wrong_shard", f"gateway {gateway!r} belongs to shard {shard}, it sent to {self.shard}")
        lanes = self.cursors.lane(gateway, lane)
        return Route(gateway, number, lane, lanes, wire.topic(self.shard, gateway, "ack"))

    def take(self, route: Route, message: wire.Message, now_ms: int, fault: WireError | None = None) -> None:
        """Take a message, or answer it; with `fault` its body is rubbish, and only its number is taken."""
        header = message.header
        cursor = route.lanes.get(header.epoch)
        if cursor is None:
            cursor = self.cursors.begin(route.lanes, header.epoch, header.floor, now_ms)
        self.cursors.touch(cursor)
        if header.floor > cursor.expected:
            self._skip(route, cursor, header, now_ms)
        if header.seq != cursor.expected:
            self._answer(route, cursor, message, now_ms, fault)
            return
        decoded = NOTHING
        if fault is None and self.decoder is not None:
            try:
                decoded = (
                    self._evidenced(route, message, now_ms)
                    if route.lane is Lane.BLOB
                    else self._decoded(self.decoder, route, message, now_ms)
                )
            except WireError as error:
                fault = error
            except DiskFull as error:  # not taken, and not answered: it comes again
                self._counters.add("errors_total", stage="evidence")
                self._counters.warn(str(error))
                return
        self._answers[id(cursor)] = (route, header.epoch, cursor)
        if fault is not None:
            self._refuse(route, header, fault)
        if decoded.unknown:
            self.quarantine.hold(route.gateway, route.lane, header, now_ms, decoded.unknown)
            self._counts["quarantined_total"] += len(decoded.unknown)
        head = FrameHead(
            route.number, route.lane, header.epoch, header.seq, header.sent_at, len(decoded.value), message.checksum
        )
        self._append(head, decoded, now_ms)
        cursor.take(header.seq, message.checksum, now_ms)

    def _decoded(self, decoder: Decoder, route: Route, message: wire.Message, now_ms: int) -> Decoded:
        decoded = decoder.decode(message, route.number, route.lane, now_ms)
        self._count(decoded)
        if decoded.dropped or decoded.clamped:
            self._tell(route, message, decoded, now_ms)
        return decoded

    def _evidenced(self, route: Route, message: wire.Message, now_ms: int) -> Decoded:
        """Make a chunk durable; a blob that is complete with it stands in the log before the chunk's own record does.

        So a log that ends between the two has the chunk come again, and the blob in `_completed`.
        """
        chunk = wire.open_chunk(message)
        complete = self._evidence.put(route.gateway, chunk, now_ms)
        self._counts["accepted_total"] += 1
        if complete and chunk.sha256 not in self._completed | self._completing:
            self._completing.add(chunk.sha256)
            self._counts["evidence_total"] += 1
            reason = "unmasked" if chunk.unmasked else ""
            control = Control("evidence", now_ms, "ingest", chunk.sha256, route.gateway, reason=reason)
            self._writer.append(Kind.CONTROL, now_ms, msgspec.json.encode(control))
        return NOTHING

    def _append(self, head: FrameHead, decoded: Decoded, now_ms: int) -> None:
        payload = pack_frame(head, decoded.observed_at, decoded.value, decoded.series)
        self._writer.append(Kind.FRAME, now_ms, payload)
        self._last_ms = now_ms

    def _count(self, decoded: Decoded) -> None:
        counts = self._counts
        counts["accepted_total"] += 1
        counts["readings_total"] += decoded.readings
        counts["values_total"] += len(decoded.value)
        if decoded.dropped:
            for reason, values in decoded.dropped.items():
                counts[f"dropped_total{{reason={reason}}}"] += values
        if decoded.clamped:
            counts["clamped_total{reason=future}"] += decoded.clamped

    def _skip(self, route: Route, cursor: Cursor, header: wire.Header, now_ms: int) -> None:
        """Count what a gateway says is gone at the edge."""
        expected = cursor.expected
        self._counts["lost_total{reason=evicted}"] += cursor.skip_to(header.floor)
        if self._complaints.due("evicted", now_ms):
            what = f"messages {expected}..{header.floor - 1} are gone at the gateway"
            self._complaints.say("evicted", now_ms, f"{named(route, header)}: {what}")

    def _tell(self, route: Route, message: wire.Message, decoded: Decoded, now_ms: int) -> None:
        """Say which value is not used, or had its time set back, and why; the first of each reason."""
        due = [
            why for why in (*decoded.dropped, *[FUTURE] * bool(decoded.clamped)) if self._complaints.due(why, now_ms)
        ]
        if not due or self.decoder is None:
            return
        readings = wire.readings_of(message)
        for why in due:
            what = culprit(readings, self.decoder.index, route.number, route.lane, now_ms, why)
            self._complaints.say(why, now_ms, f"{named(route, message.header)}: {why}: {what}")

    def _refuse(self, route: Route, header: wire.Header, fault: WireError) -> None:
        self._counters.drop(fault.reason)
        self._counters.warn(f"{named(route, header)}: {str(fault)[:300]}")

    def _answer(
        self, route: Route, cursor: Cursor, message: wire.Message, now_ms: int, fault: WireError | None
    ) -> None:
        """Answer a message that is not the next one with what is there; a conflict gets none."""
        header, verdict = message.header, cursor.judge(message.header, message.checksum)
        if fault is not None:
            self._counters.drop(fault.reason)
        else:
            self._counters.add(f"{verdict.value}_total")
        if verdict is Verdict.GAP and self._complaints.due("gap", now_ms):
            what = f"messages {cursor.expected}..{header.seq - 1} are missing before it; asked to send them again"
            self._complaints.say("gap", now_ms, f"{named(route, header)}: {what}")
        if verdict is not Verdict.CONFLICT:
            self._answers[id(cursor)] = (route, header.epoch, cursor)
            return
        what = f"{route.lane.topic} seq {header.seq} of epoch {header.epoch} came again with other content"
        if self.cursors.fault(route.gateway, header.epoch):
            self._counters.warn(f"{route.gateway}: {what}; it is not acknowledged")
            fault_ = Control(
                "fault", now_ms, "ingest", subject=route.gateway, rule="gateway_conflict", reason=what,
                epoch=header.epoch,
            )  # fmt: skip
            self._writer.append(Kind.CONTROL, now_ms, msgspec.json.encode(fault_))

    def tick(self, now_ms: int, up_since: int) -> None:
        """Append a tick."""
        self._writer.append(Kind.TICK, now_ms, msgspec.json.encode(Tick(now_ms, up_since)))
        self._last_ms = now_ms

    def control(self, control: Control, now_ms: int) -> None:
        """Append a control record; a registry is in force behind it, and its devices leave quarantine."""
        self._writer.append(Kind.CONTROL, now_ms, msgspec.json.encode(control))
        self._last_ms = now_ms
        if control.what == "registry":
            self.decoder = self._load(control.content)
            self._adopt(now_ms)
        elif control.what == "ruleset":
            self.ruleset = control.content

    # --- quarantine ---------------------------------------------------------------------------------------------

    def _adopt(self, now_ms: int) -> None:
        """Replay the quarantined readings of devices that their gateway has by now."""
        if self.decoder is None:
            return
        index = self.decoder.index
        for gateway, device in list(self.quarantine.pending):
            number = index.gateway_index.get(gateway, -1)
            known = index.wire_index.get(device, -1)
            if number < 0 or known < 0 or index.device_gateway[known] != number:
                continue
            self._adopting[f"{gateway}/{device}"] = self.quarantine.next_offset
            for offset, held in self.quarantine.release((gateway, device)):
                # A record whose message never got into the log: it comes again, or has come since.
                if self.cursors.taken(gateway, held.lane, held.epoch, held.seq):
                    self._replay(number, offset, held, now_ms)

    def _replay(self, gateway: int, offset: int, held: Held, now_ms: int) -> None:
        assert self.decoder is not None
        readings = [Reading(held.device, one.observed_at, one.values) for one in held.readings]
        decoded = decode_readings(readings, self.decoder.index, gateway, held.lane, held.received_at)
        self._count(decoded)
        self._counts["accepted_total"] -= 1  # it is no message
        self._counts["replayed_total"] += len(held.readings)
        if len(decoded.value):
            n = len(decoded.value)
            self._append(FrameHead(gateway, held.lane, REPLAYED_EPOCH, offset, held.received_at, n, 0), decoded, now_ms)

    # --- commit -------------------------------------------------------------------------------------------------

    def commit(self) -> bool:
        """Sync; return whether everything since the last commit is there now. If not, all of it is taken back.

        Raises StorageError where the disk failed otherwise: the process must end.
        """
        try:
            gone = self.quarantine.sync()
            self._writer.commit()
        except DiskFull as error:
            self._take_back(error)
            return False
        self._counts["lost_total{reason=quarantine}"] += gone
        self.cursors.settle()
        self.quarantine.settle()
        self._adopted.update(self._adopting)
        self._adopting.clear()
        self._completed |= self._completing
        self._completing.clear()
        self._settled = (self.decoder, self.ruleset)
        self._counters.values.update(+self._counts)
        self._counts.clear()
        if self._writer.segment != self._snapshot_segment and self._writer.next_offset:
            self._snapshot()
        return True

    def _take_back(self, error: DiskFull) -> None:
        self._writer.discard()
        self.quarantine.discard()
        self.cursors.revert()
        self._adopting.clear()
        self._completing.clear()
        self.decoder, self.ruleset = self._settled
        self._counters.add("unstored_total", self._counts["accepted_total"])
        self._counts.clear()
        self._answers.clear()
        self._counters.add("errors_total", stage="log")
        self._counters.warn(f"nothing is acknowledged: {error}")

    def answers(self) -> list[tuple[str, bytes]]:
        """Return the acknowledgements that are true now, one a lane and epoch heard since the last call."""
        acks = [
            (route.ack_topic, wire.encode_json(wire.Ack(route.lane.topic, epoch, cursor.settled - 1)))
            for route, epoch, cursor in self._answers.values()
        ]
        self._answers.clear()
        return acks

    def _snapshot(self) -> None:
        """Write all cursors as content and name it in the log: once a segment, and at every start."""
        cursors, faulted = self.cursors.save()
        registry = self.decoder.index.name if self.decoder is not None else ""
        kept = self._snapshots[: KEPT_SNAPSHOTS - 1]
        saved = Saved(registry, self.ruleset, cursors, faulted, dict(sorted(self._adopted.items())), kept)
        try:
            name = self._layout.put_blob(encode_saved(saved))
            self._logs.share(name)
            control = Control("cursors", self._last_ms, "ingest", name)
            self._writer.append(Kind.CONTROL, self._last_ms, msgspec.json.encode(control))
            self._writer.commit()
        except DiskFull as error:
            self._writer.discard()
            self._counters.add("errors_total", stage="snapshot")
            self._counters.warn(f"cursors not saved, recovery would read more: {error}")
            return
        for old in set(self._snapshots) - {name, *kept}:
            self._logs.forget(old)
        self._snapshots = [name, *kept]
        self._completed.clear()
        self._snapshot_segment = self._writer.segment

    def close(self) -> None:
        self._writer.close()
        self.quarantine.close()
