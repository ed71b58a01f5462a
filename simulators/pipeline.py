"""The whole way of a reading in one process and on the caller's time: offline simulation and `citybrain replay` use it.

The same cores as in the live processes: `gateway.spool` → `gateway.uplink` → `streams.ingest` → log → `streams.engine`
→ transition log → `api.desk`. Only the sockets between them are missing, and there is one clock: `now_ms`, given by
the caller, in platform time; the uplinks' time-outs run on it too.

    pipeline = Pipeline(layout, registry, ruleset, categories)
    pipeline.start(now_ms)
    pipeline.append("gw-01", Lane.TELEMETRY, readings, at_ms)      # into the gateway's spool
    pipeline.step(now_ms)                                          # carried through to the desk
    pipeline.close()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Engine as Store

from api.desk import Desk
from citybrain.clock import SECOND_MS, RunClock
from citybrain.counters import Counters
from citybrain.db.migrations import upgrade
from citybrain.db.store import open_store
from citybrain.layout import Layout, Run
from citybrain.model import Gateway, Lane, Reading, Registry
from citybrain.segments import Reader, Writer
from citybrain.storage import OS_FILES, Files
from gateway.spool import Spool, seeded_epochs
from gateway.uplink import Uplink
from rules.categories import Category
from streams.engine import Engine
from streams.ingest import Ingest
from streams.log import Control, Kind, encode_transition
from streams.registry import encode_registry
from streams.ruleset import RuleSet, encode_ruleset

ACTOR = "pipeline"


class Detection:
    """One shard's worker: its log in, its transition log out."""

    def __init__(self, shard: int, layout: Layout, files: Files) -> None:
        self.engine = Engine(shard, layout)
        self._reader = Reader(layout.log(shard), files=files)
        self._writer = Writer(layout.transitions(shard), files)

    def start(self) -> None:
        self._writer.start()

    def step(self) -> int:
        """Take what the log has by now; return how many transitions that caused."""
        written = 0
        while records := self._reader.read():
            for transition in self.engine.process(records):
                self._writer.append(Kind.TRANSITION, transition.received_at, encode_transition(transition))
                written += 1
        self._writer.commit()
        return written

    def close(self) -> None:
        self._writer.close()


class Pipeline:
    """Gateways, ingest, engines and desk of one registry, on empty stores below `layout`.

    `online` says per gateway whether its line is up: what it spools meanwhile goes out afterwards. counters are shared
    by ingest (`ingest`), the gateways (`gateways`) and the desk (`desk`).
    """

    def __init__(
        self,
        layout: Layout,
        registry: Registry,
        ruleset: RuleSet,
        categories: dict[str, Category],
        *,
        seed: int = 7,
        files: Files = OS_FILES,
    ) -> None:
        self.layout = layout
        self.registry = registry
        self.ruleset = ruleset
        self.categories = categories
        self.seed = seed
        self.shards = tuple(sorted({gateway.shard for gateway in registry.gateways}))
        self.ingested, self.gateways, self.decided = Counters("ingest"), Counters("gateways"), Counters("desk")
        self.ingest = Ingest(layout, self.shards, self.ingested, files)
        self.detections = [Detection(shard, layout, files) for shard in self.shards]
        self.uplinks: dict[str, Uplink] = {}
        self.store: Store | None = None
        self.desk: Desk | None = None
        self._files = files
        self._by_ack: dict[str, Uplink] = {}
        self._up_since = 0

    def start(self, now_ms: int) -> None:
        """Make the stores and put registry and rule set in force; raises ConfigError, StorageError."""
        self.layout.make()
        shards = max(self.shards, default=0) + 1
        self.layout.write_run(Run(clock=RunClock(now_ms, now_ms), shards=shards, seed=self.seed))
        registry = self.layout.put_blob(encode_registry(self.registry))
        ruleset = self.layout.put_blob(encode_ruleset(self.ruleset))
        self.ingest.start()
        self.ingest.control(Control("registry", now_ms, ACTOR, registry), now_ms)
        self.ingest.control(Control("ruleset", now_ms, ACTOR, ruleset), now_ms)
        self.ingest.commit()
        self._up_since = now_ms
        for gateway in self.registry.gateways:
            self._open(gateway, now_ms)
        for detection in self.detections:
            detection.start()
        self.store = open_store(self.layout.database)
        upgrade(self.store)
        self.desk = Desk(self.store, self.layout, self.shards, self.categories, counters=self.decided)
        self.desk.start()

    def _open(self, gateway: Gateway, now_ms: int) -> None:
        spool = Spool(
            self.layout.gateway(gateway.id),
            f"board-{gateway.id}",
            self._files,
            counters=self.gateways,
            draw_epoch=seeded_epochs(f"{self.seed}/{gateway.id}"),
        )
        spool.start()
        uplink = Uplink(spool, gateway.id, gateway.shard)
        uplink.connected(now_ms / SECOND_MS)
        self.uplinks[gateway.id] = uplink
        self._by_ack[uplink.ack_topic] = uplink

    # --- one step -----------------------------------------------------------------------------------------------

    def append(self, gateway: str, lane: Lane, readings: Sequence[Reading], at_ms: int) -> None:
        """Put readings into a gateway's spool, on disk with the next `step`."""
        self.uplinks[gateway].spool.append(lane, readings, at_ms)

    def online(self, gateway: str, up: bool, now_ms: int) -> None:
        """Take a gateway's line down, or up again."""
        uplink = self.uplinks[gateway]
        if up:
            uplink.connected(now_ms / SECOND_MS)
        else:
            uplink.disconnected()

    def control(self, controls: Iterable[Control], now_ms: int) -> None:
        """Write control records (overrides) to every shard; durable with the next `step`."""
        for control in controls:
            self.ingest.control(control, now_ms)

    def tick(self, now_ms: int) -> None:
        """Say that platform time has passed; durable with the next `step`."""
        self.ingest.tick(now_ms, self._up_since)

    def step(self, now_ms: int) -> int:
        """Carry everything that is spooled through to the desk; return how many transitions that caused."""
        for uplink in self.uplinks.values():
            uplink.spool.commit()
        while self._exchange(now_ms):
            pass
        caused = sum(detection.step() for detection in self.detections)
        self.decide(now_ms)
        return caused

    def _exchange(self, now_ms: int) -> bool:
        """Hand over one window of every gateway and the acknowledgements; return whether there was anything."""
        mono_s = now_ms / SECOND_MS
        moved = False
        for uplink in self.uplinks.values():
            for topic, payload in uplink.outgoing(now_ms, mono_s):
                self.ingest.message(topic, payload, now_ms)
                moved = True
        for topic, payload in self.ingest.commit():
            self._by_ack[topic].incoming(topic, payload, mono_s)
        return moved

    def decide(self, now_ms: int) -> None:
        """Let the desk take its inputs and do what is due."""
        while self.desk is not None and self.desk.step(now_ms):
            pass

    def waiting(self) -> int:
        """Return how many messages are spooled and not acknowledged."""
        return sum(uplink.spool.spooled() for uplink in self.uplinks.values())

    def close(self) -> None:
        for uplink in self.uplinks.values():
            uplink.spool.close()
        self.ingest.close()
        for detection in self.detections:
            detection.close()
        if self.store is not None:
            self.store.dispose()
