"""The uplink: which spooled message goes out next, and what an acknowledgement means. No socket, no clock.

Go-back-N by lane (docs/wire.md): at most 32 messages or 512 KiB are under way; after a time-out or a reconnect
everything behind the last acknowledgement goes out again. Only ingest's acknowledgement frees the spool.

A process that goes on with an epoch begun by an earlier one first *asks* where ingest stands: with the first message
that an earlier process left unacknowledged, alone; where there is none, with a question that has no body and is never
taken. An answer beyond what was sent means that this card was restored from an older copy: a new epoch. An answer
within what is spooled is believed only once the message it names has been repeated, so that ingest compared the
checksums; a difference is a conflict, which it answers with silence.
"""

from __future__ import annotations

from collections import deque

from citybrain.counters import Counters
from citybrain.errors import DiskFull, WireError
from citybrain.model import Lane
from citybrain.wire import (
    HEAD,
    LANES,
    MAX_MESSAGE,
    WINDOW_BYTES,
    WINDOW_MESSAGES,
    Ack,
    Header,
    columns_message,
    decode_ack,
    topic,
)
from gateway.spool import Spool

TIMEOUT_S = 2.0
MOST_TIMEOUT_S = 8.0  # low, because an event may wait for it; 64 repeats in 8 s are nothing to the line
HANDED_OVER = len(Lane) * WINDOW_MESSAGES  # most messages that a transport is given at a time
ORDER = (Lane.EVENT, Lane.TELEMETRY, Lane.BLOB)
BLOB_MESSAGES = 2  # under way of the blob lane: an event that comes up waits for at most 128 KiB of pictures


class _Flow:
    """One lane's window. Messages up to `acked` are in the log; those in `under_way` were sent and not answered."""

    def __init__(self, floor: int, sent: int, timeout_s: float, *, asking: bool) -> None:
        self.acked = floor - 1
        self.next = floor
        self.sent = sent  # highest seq ever sent in this epoch, or possibly so by an earlier process
        self.high = 0  # highest seq sent by this process
        self.asking = asking  # whether it waits to hear where ingest stands before anything else is sent
        self.compare = 0  # message to ask with, because ingest says that it has it; 0: none
        self.under_way: deque[tuple[int, int]] = deque()  # seq, bytes
        self.bytes = 0
        self.progress_s = 0.0
        self.timeout_s = timeout_s
        self.timed_out = False

    def rewind(self) -> None:
        """Everything behind the last acknowledgement is to be sent again."""
        self.next = self.acked + 1
        self.under_way.clear()
        self.bytes = 0

    def note(self, seq: int, size: int, mono_s: float) -> None:
        """Put a message that is handed over into the window; the time-out runs from the first one on."""
        if not self.under_way:
            self.progress_s = mono_s
        self.under_way.append((seq, size))
        self.bytes += size
        self.high = max(self.high, seq)
        self.sent = max(self.sent, seq)

    def skip(self, seq: int) -> None:
        """Take everything up to `seq` as gone from the spool."""
        self.acked = max(self.acked, seq)
        self.next = max(self.next, seq + 1)

    def accept(self, seq: int, mono_s: float) -> int:
        """Take everything up to `seq` as logged; return how many messages that are."""
        count = seq - self.acked
        self.skip(seq)
        while self.under_way and self.under_way[0][0] <= seq:
            self.bytes -= self.under_way.popleft()[1]
        self.progress_s = mono_s
        return count


class Uplink:
    """The gateway's side of the wire contract, over a started spool.

    counters: `sent_total`, `resent_total`, `acked_total` (messages), `asked_total` (questions without a message),
    `dropped_total{reason=ack_*}` (acknowledgements not used), `epochs_total{reason=restored}`.
    """

    def __init__(
        self,
        spool: Spool,
        gateway: str,
        shard: int,
        compress: bool = False,
        timeout_s: float = TIMEOUT_S,
        *,
        counters: Counters | None = None,
    ) -> None:
        self.spool = spool
        self.ack_topic = topic(shard, gateway, "ack")
        self.online = False
        self.counters = counters if counters is not None else spool.counters
        self._topics = {lane: topic(shard, gateway, lane.topic) for lane in Lane}
        self._compress = compress
        self._timeout_s = timeout_s
        self._flows = {lane: self._flow(lane) for lane in Lane}

    def _flow(self, lane: Lane) -> _Flow:
        spool = self.spool
        return _Flow(spool.floor(lane), spool.resumed[lane], self._timeout_s, asking=spool.continues)

    def connected(self, mono_s: float) -> None:
        """The transport can carry messages: everything unacknowledged goes out again."""
        self.online = True
        for flow in self._flows.values():
            flow.rewind()
            flow.progress_s, flow.timeout_s, flow.timed_out = mono_s, self._timeout_s, False

    def disconnected(self) -> None:
        """The transport is gone, with all it had been given."""
        self.online = False

    def idle(self) -> bool:
        """Return whether everything spooled is acknowledged."""
        return self.spool.spooled() == 0

    @property
    def asking(self) -> bool:
        """Return whether a lane still waits to hear where ingest stands."""
        return any(flow.asking for flow in self._flows.values())

    # --- up ---

    def outgoing(self, now_ms: int, mono_s: float, unsent: int = 0) -> list[tuple[str, bytes]]:
        """Return what to send now, as (topic, payload): events first, as far as the windows are open.

        now_ms: the gateway's clock. unsent: how many messages of earlier calls the transport still holds; on a slow
        line they neither time out nor pile up.
        """
        if not self.online:
            return []
        messages: list[tuple[str, bytes]] = []
        for lane in ORDER:
            flow = self._flows[lane]
            if unsent:
                flow.progress_s = mono_s
            elif flow.under_way and mono_s - flow.progress_s >= flow.timeout_s:
                self._time_out(flow, mono_s)
            room = HANDED_OVER - unsent - len(messages)
            messages += [(self._topics[lane], payload) for payload in self._lane(lane, room, now_ms, mono_s)]
            if flow.under_way and flow.next < self.spool.next_seq(lane):
                break  # what is said of an event must not be told beside older events; and pictures wait for all
        return messages

    def _time_out(self, flow: _Flow, mono_s: float) -> None:
        flow.rewind()
        flow.progress_s, flow.timed_out = mono_s, True
        flow.timeout_s = min(2 * flow.timeout_s, max(MOST_TIMEOUT_S, self._timeout_s))

    def _lane(self, lane: Lane, room: int, now_ms: int, mono_s: float) -> list[bytes]:
        flow = self._flows[lane]
        if flow.asking:
            return self._question(lane, flow, now_ms, mono_s) if room > 0 and not flow.under_way else []
        window = BLOB_MESSAGES if lane is Lane.BLOB else WINDOW_MESSAGES
        most = min(room, window - len(flow.under_way))
        messages = self.spool.read(lane, flow.next, most, WINDOW_BYTES - flow.bytes - most * HEAD.size)
        flow.skip(self.spool.floor(lane) - 1)  # what was evicted, or cannot be read any more
        payloads = []
        for message in messages:
            payloads.append(self._send(lane, message, now_ms, mono_s))
            flow.next = message[0] + 1
        return payloads

    def _question(self, lane: Lane, flow: _Flow, now_ms: int, mono_s: float) -> list[bytes]:
        """Return what asks where ingest stands.

        A message of it must be one that an earlier process wrote: a restored card's new message may have a number that
        ingest knows with another content. What is acknowledged is not asked with: ingest may not know it in this epoch.
        """
        seq = flow.compare if self.spool.body(lane, flow.compare) is not None else self.spool.earliest(lane, flow.sent)
        body = self.spool.body(lane, seq)
        if body is not None:
            return [self._send(lane, (seq, body), now_ms, mono_s)]
        floor = self.spool.floor(lane)
        payload = columns_message(Header(self.spool.epoch, floor - 1, floor, now_ms), b"")
        self.counters.add("asked_total")
        flow.note(floor - 1, len(payload), mono_s)
        return [payload]

    def _send(self, lane: Lane, message: tuple[int, bytes], now_ms: int, mono_s: float) -> bytes:
        seq, body = message
        flow = self._flows[lane]
        header = Header(self.spool.epoch, seq, self.spool.floor(lane), now_ms)
        payload = columns_message(header, body, compress=self._compress)
        self.counters.add("resent_total" if seq <= flow.high else "sent_total")
        flow.note(seq, len(payload), mono_s)
        return payload

    # --- down ---

    def incoming(self, where: str, payload: bytes, mono_s: float) -> None:
        """Take a message from the ack topic; what is no acknowledgement of this epoch is counted and ignored."""
        if where != self.ack_topic:
            self.counters.drop("ack_topic")
            return
        try:
            ack = decode_ack(payload)
        except WireError:
            self.counters.drop("ack_malformed")
            return
        if ack.epoch != self.spool.epoch:
            self.counters.drop("ack_epoch")
            return
        lane = LANES[ack.lane]
        flow = self._flows[lane]
        if ack.seq > flow.sent:
            self._restored(ack)
        elif flow.asking:
            self._answered(lane, flow, ack.seq, mono_s)
        elif ack.seq > flow.acked:
            self._accept(lane, flow, ack.seq, mono_s)
        elif flow.timed_out:  # ingest is back and says where it stands
            flow.timed_out = False
            flow.rewind()
        else:
            self.counters.drop("ack_repeated")

    def _answered(self, lane: Lane, flow: _Flow, seq: int, mono_s: float) -> None:
        if not flow.under_way:
            return  # not asked yet: this answers somebody else
        asked = flow.under_way[0][0]
        if seq != asked and seq >= self.spool.floor(lane) and self.spool.body(lane, seq) is not None:
            flow.compare = seq  # ingest says that it has these: let it compare the last of them
        else:
            flow.asking = False
            if seq > flow.acked:
                self._accept(lane, flow, seq, mono_s)
        flow.rewind()

    def _accept(self, lane: Lane, flow: _Flow, seq: int, mono_s: float) -> None:
        self.counters.add("acked_total", flow.accept(seq, mono_s))
        flow.timeout_s, flow.timed_out = self._timeout_s, False
        self.spool.acknowledged(lane, seq)

    def _restored(self, ack: Ack) -> None:
        """Begin a new epoch: ingest knows messages of this one that this card never sent."""
        what = f"{ack.lane} is acknowledged up to {ack.seq}, beyond what this card sent: it was restored from a copy"
        try:
            self.spool.new_epoch("restored")
        except DiskFull as error:  # nothing is freed meanwhile, and the next answer says it again
            self.counters.add("errors_total", stage="disk_full")
            self.counters.warn(f"{self.ack_topic}: {what}; a new epoch waits for room: {error}")
            return
        self.counters.warn(f"{self.ack_topic}: {what}; a new epoch begins")
        self._flows = {lane: self._flow(lane) for lane in Lane}


assert MAX_MESSAGE < WINDOW_BYTES, "an empty window must hold any message"
