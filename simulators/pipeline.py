"""The whole way of a reading on the caller's time: offline simulation and `citybrain replay` use it.

The same cores as in the live processes: `gateway.spool` → `gateway.uplink` → `streams.ingest` → log → `streams.engine`
(a `Stream`, of some shards) → transition logs → `api.desk` (a `Pipeline`, of all). Only the sockets between them are
missing, and there is one clock: `now_ms`, given by the caller, in platform time; the uplinks' time-outs run on it too.

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
from citybrain.layout import Active, Layout, Run
from citybrain.model import Gateway, Lane, Reading, Registry, Transition
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
    """One shard's engine, behind its log."""

    def __init__(self, shard: int, layout: Layout, files: Files) -> None:
        self.engine = Engine(shard, layout)
        self._reader = Reader(layout.log(shard), files=files)

    def step(self) -> list[Transition]:
        """Take what the log has by now; return the transitions that caused."""
        found: list[Transition] = []
        while records := self._reader.read():
            found += self.engine.process(records)
        return found


class Stream:
    """Gateways, ingest and engines of some shards of a registry, on empty stores below `layout`.

    `online` says per gateway whether its line is up: what it spools meanwhile goes out afterwards. counters: `ingested`
    of ingest, `gateways` of all gateways. publishes: whether ingest tells the desk what is in force.
    """

    def __init__(
        self,
        layout: Layout,
        registry: Registry,
        shards: Sequence[int],
        *,
        seed: int = 7,
        files: Files = OS_FILES,
        publishes: bool = True,
    ) -> None:
        self.layout = layout
        self.shards = tuple(shards)
        self.ingested, self.gateways = Counters("ingest"), Counters("gateways")
        self.ingest = Ingest(layout, self.shards, self.ingested, files, publishes=publishes)
        self.uplinks: dict[str, Uplink] = {}
        self._detections = [Detection(shard, layout, files) for shard in self.shards]
        self._served = [gateway for gateway in registry.gateways if gateway.shard in self.shards]
        self._seed = seed
        self._files = files
        self._by_ack: dict[str, Uplink] = {}
        self._changed: dict[str, Uplink] = {}  # those that may have something to send
        self._up_since = 0

    def start(self, now_ms: int, active: Active) -> None:
        """Put a registry and a rule set, whose content is in `layout`, in force; raises ConfigError, StorageError."""
        self.ingest.start()
        self.ingest.control(Control("registry", now_ms, ACTOR, active.registry), now_ms)
        self.ingest.control(Control("ruleset", now_ms, ACTOR, active.ruleset), now_ms)
        self.ingest.commit()
        self._up_since = now_ms
        for gateway in self._served:
            self._open(gateway, now_ms)

    def _open(self, gateway: Gateway, now_ms: int) -> None:
        spool = Spool(
            self.layout.gateway(gateway.id),
            f"board-{gateway.id}",
            self._files,
            counters=self.gateways,
            draw_epoch=seeded_epochs(f"{self._seed}/{gateway.id}"),
        )
        spool.start()
        uplink = Uplink(spool, gateway.id, gateway.shard)
        uplink.connected(now_ms / SECOND_MS)
        self.uplinks[gateway.id] = uplink
        self._by_ack[uplink.ack_topic] = uplink

    def append(self, gateway: str, lane: Lane, readings: Sequence[Reading], at_ms: int) -> None:
        """Put readings into a gateway's spool, on disk with the next `exchange`."""
        self.spool(gateway).append(lane, readings, at_ms)

    def spool(self, gateway: str) -> Spool:
        """Return a gateway's spool, to put something into it."""
        uplink = self._changed[gateway] = self.uplinks[gateway]
        return uplink.spool

    def online(self, gateway: str, up: bool, now_ms: int) -> None:
        """Take a gateway's line down, or up again."""
        uplink = self._changed[gateway] = self.uplinks[gateway]
        if up:
            uplink.connected(now_ms / SECOND_MS)
        else:
            uplink.disconnected()

    def control(self, controls: Iterable[Control], now_ms: int) -> None:
        """Write control records to every shard; durable with the next `exchange`."""
        for control in controls:
            self.ingest.control(control, now_ms)

    def tick(self, now_ms: int) -> None:
        """Say that platform time has passed; durable with the next `exchange`."""
        self.ingest.tick(now_ms, self._up_since)

    def exchange(self, now_ms: int, gateway: str = "") -> None:
        """Carry everything that is spooled (by one gateway, where it is named) into the logs, where the line is up."""
        changed = [self._changed.pop(gateway)] if gateway else list(self._changed.values())
        for uplink in changed:
            uplink.spool.commit()
        while self._window(changed, now_ms):
            pass
        if not gateway:
            self._changed.clear()

    def _window(self, changed: Sequence[Uplink], now_ms: int) -> bool:
        """Hand over one window of each gateway and the acknowledgements; return whether there was anything."""
        mono_s = now_ms / SECOND_MS
        moved = False
        for uplink in changed:
            for topic, payload in uplink.outgoing(now_ms, mono_s):
                self.ingest.message(topic, payload, now_ms)
                moved = True
        for topic, payload in self.ingest.commit():
            self._by_ack[topic].incoming(topic, payload, mono_s)
        return moved

    def detect(self) -> list[Transition]:
        """Let the engines take what the logs have by now; return the transitions, by shard."""
        return [transition for detection in self._detections for transition in detection.step()]

    def waiting(self) -> int:
        """Return how many messages are spooled and not acknowledged."""
        return sum(uplink.spool.spooled() for uplink in self.uplinks.values())

    def close(self) -> None:
        """Close the files of gateways and ingest."""
        for uplink in self.uplinks.values():
            uplink.spool.close()
        self.ingest.close()


class Office:
    """The transition logs of some shards and the desk that reads them."""

    def __init__(
        self, layout: Layout, shards: Sequence[int], categories: dict[str, Category], *, files: Files = OS_FILES
    ) -> None:
        self.decided = Counters("desk")
        self.store: Store | None = None
        self._layout = layout
        self._shards = tuple(shards)
        self._categories = categories
        self._writers = {shard: Writer(layout.transitions(shard), files) for shard in self._shards}
        self._desk: Desk | None = None

    def start(self) -> None:
        """Make the stores; raises StorageError."""
        for writer in self._writers.values():
            writer.start()
        self.store = open_store(self._layout.database)
        upgrade(self.store)
        self._desk = Desk(self.store, self._layout, self._shards, self._categories, counters=self.decided)
        self._desk.start()

    def write(self, transitions: Iterable[Transition]) -> None:
        """Put transitions into the logs of their shards, where the desk finds them."""
        for one in transitions:
            self._writers[one.shard].append(Kind.TRANSITION, one.received_at, encode_transition(one))
        for writer in self._writers.values():
            writer.commit()

    def decide(self, now_ms: int) -> None:
        """Let the desk take its inputs and do what is due."""
        while self._desk is not None and self._desk.step(now_ms):
            pass

    def close(self) -> None:
        """Close logs and store."""
        for writer in self._writers.values():
            writer.close()
        if self.store is not None:
            self.store.dispose()


def prepare(layout: Layout, registry: Registry, ruleset: RuleSet, now_ms: int, seed: int) -> Active:
    """Make a run's folder with the content a `Stream` is started with; raises StorageError."""
    layout.make()
    shards = max((gateway.shard for gateway in registry.gateways), default=0) + 1
    layout.write_run(Run(clock=RunClock(now_ms, now_ms), shards=shards, seed=seed))
    return Active(layout.put_blob(encode_registry(registry)), layout.put_blob(encode_ruleset(ruleset)))


def shards_of(registry: Registry) -> tuple[int, ...]:
    """Return the shards that have a gateway."""
    return tuple(sorted({gateway.shard for gateway in registry.gateways}))


class Pipeline:
    """Gateways, ingest, engines and desk of one registry, all in step, on empty stores below `layout`."""

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
        self.seed = seed
        self.shards = shards_of(registry)
        self.stream = Stream(layout, registry, self.shards, seed=seed, files=files)
        self._office = Office(layout, self.shards, categories, files=files)

    @property
    def ingested(self) -> Counters:
        """What ingest counted."""
        return self.stream.ingested

    @property
    def store(self) -> Store | None:
        """The desk's database, once it was started."""
        return self._office.store

    def start(self, now_ms: int) -> None:
        """Make the stores and put registry and rule set in force; raises ConfigError, StorageError."""
        active = prepare(self.layout, self.registry, self.ruleset, now_ms, self.seed)
        self.stream.start(now_ms, active)
        self._office.start()

    def append(self, gateway: str, lane: Lane, readings: Sequence[Reading], at_ms: int) -> None:
        """Put readings into a gateway's spool, on disk with the next `step`."""
        self.stream.append(gateway, lane, readings, at_ms)

    def online(self, gateway: str, up: bool, now_ms: int) -> None:
        """Take a gateway's line down, or up again."""
        self.stream.online(gateway, up, now_ms)

    def control(self, controls: Iterable[Control], now_ms: int) -> None:
        """Write control records (overrides) to every shard; durable with the next `step`."""
        self.stream.control(controls, now_ms)

    def tick(self, now_ms: int) -> None:
        """Say that platform time has passed; durable with the next `step`."""
        self.stream.tick(now_ms)

    def step(self, now_ms: int) -> int:
        """Carry everything that is spooled through to the desk; return how many transitions that caused."""
        self.stream.exchange(now_ms)
        transitions = self.stream.detect()
        self._office.write(transitions)
        self.decide(now_ms)
        return len(transitions)

    def decide(self, now_ms: int) -> None:
        """Let the desk take its inputs and do what is due."""
        self._office.decide(now_ms)

    def waiting(self) -> int:
        """Return how many messages are spooled and not acknowledged."""
        return self.stream.waiting()

    def close(self) -> None:
        """Close all files."""
        self.stream.close()
        self._office.close()
