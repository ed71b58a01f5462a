"""The desk: the one writer of alarms, incidents, cases and outbox.

Its inputs are the transitions of all shards, commands from its mailbox, timers that are due, and what became of
deliveries. A step takes what is there, decides (`api.clerk`), and writes everything, with the journal of the inputs and
the offsets behind them, in one transaction. So it may be killed between any two instructions: it goes on with the
first input whose effects are not there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, and_, func, select, union_all

from api.assets.book import registry_of
from api.assets.store import Shelf
from api.cases.clocks import Calendar, load_calendar
from api.cases.places import Atlas
from api.casework import CaseConfig
from api.clerk import Clerk, Setting
from api.instructions import follow
from api.lease import Lease
from api.ledger import Ledger, text
from api.outbox import Attempt, Outgoing
from api.rulebook import Rulebook
from citybrain.clock import MINUTE_MS
from citybrain.counters import Counters
from citybrain.db.migrations import upgrade
from citybrain.db.schema import MOVED, MOVING, alarms, asked, cases, consumed, incidents, journal, meta, outbox
from citybrain.db.store import named, reading, writing
from citybrain.errors import ConfigError, StorageError, TransitionError
from citybrain.layout import Layout
from citybrain.mailbox import Command, Mailbox
from citybrain.model import Registry, Transition
from citybrain.segments import Record
from rules.categories import Category
from streams.log import Kind, decode_transition
from streams.logs import LogReader, LogStore, SegmentStore, records
from streams.registry import decode_registry, encode_registry

EDITIONS = ("GB/T 47678.5-2026", "GB/T 30428.2", "CJ/T 214")


class DeskConfig(msgspec.Struct, frozen=True):
    """What the desk is set to.

    quiet_ms: how long after its end an alarm or incident is held open, so that a chattering signal stays one.
    editions: where class codes are taken from, the first that has one. batch: inputs of one kind in one transaction.
    """

    quiet_ms: int = 30 * MINUTE_MS
    editions: tuple[str, ...] = EDITIONS
    batch: int = 500
    calendar: Calendar | None = None  # None: api/cases/calendar.yaml


DEFAULTS = DeskConfig()


class Input(msgspec.Struct, frozen=True):
    """One thing the desk takes: a row of its journal, and the record or command behind it."""

    source: str  # registry | transition | command | timer | delivery | asked
    body: str | None = None
    shard: int | None = None
    offset: int | None = None
    record: Record | None = None
    mail: str = ""  # the command's name in the mailbox


class Desk:
    """Takes committed transitions, commands, timers and delivery results; decides; writes in one transaction.

    Rule sets come from `layout.blobs` by the hash each transition names; the registry by the hash in
    `layout.read_active()`, which ingest writes. Until there is one, a step takes nothing. `logs` is where transitions
    are read, by default the data folder. `lease`: what every transaction must hold, where there may be several desks.
    """

    def __init__(
        self,
        store: Engine,
        layout: Layout,
        shards: Sequence[int],
        categories: Mapping[str, Category],
        config: DeskConfig = DEFAULTS,
        counters: Counters | None = None,
        logs: LogStore | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.store = store
        self.lease = lease
        self.layout = layout
        self.shards = tuple(shards)
        self.categories = categories
        self.config = config
        self.counters = counters or Counters("desk")
        self.logs = logs or SegmentStore(layout)
        self.taken: list[int] = []  # when the transitions of the last step had been received
        self.delivered: list[int] = []  # when the messages had been made that it noted as delivered
        self._mailbox = Mailbox(layout.mailbox("desk"))
        self._ingest = Mailbox(layout.mailbox("ingest"))
        self._orders = Mailbox(layout.mailbox("orders"))
        self._rulebook = Rulebook(layout)
        self._shelf = Shelf(self.shards)
        self._cases = CaseConfig(config.editions, Calendar(0, ()))
        self._atlas = Atlas(Registry((), ()))
        self._readers: dict[int, LogReader] = {}
        self._waiting: dict[int, deque[Record]] = {}
        self._results: deque[Attempt] = deque()
        self._names: dict[int, tuple[int, int]] = {}  # per shard (source, index) of the last transition
        self._next_due: int | None = None
        self._next_delivery: int | None = None
        self._asking = False  # whether something waits to be asked of ingest
        self._stale = True  # whether what is committed must be read again before the next step

    def start(self) -> None:
        """Bring the schema up to date and find out where it stopped; raises StorageError, ConfigError, NotFound."""
        upgrade(self.store)
        self._cases = CaseConfig(self.config.editions, self.config.calendar or load_calendar())
        self.resume()

    def resume(self) -> None:
        """Go on from what is committed; also after a transaction that failed, or when this desk takes over."""
        self._stale = True
        self._shelf.forget()
        with reading(self.store) as connection:
            rows = {row["shard"]: row for row in connection.execute(select(consumed)).mappings()}
            known = {row.key: row.value for row in connection.execute(select(meta))}
            self._look_ahead(connection)
        self._refuse_moved(known)
        registry = known.get("registry")
        self._names = {shard: (row["source"], row["index"]) for shard, row in rows.items()}
        for shard in self.shards:
            offset = rows[shard]["offset"] if shard in rows else 0
            self._readers[shard] = self.logs.reader("transitions", shard, offset)
            self._waiting[shard] = deque()
        self._atlas = self._read_atlas(registry) if registry else Atlas(Registry((), ()))
        self._stale = False

    def _refuse_moved(self, known: Mapping[str, str]) -> None:
        if MOVING in known:
            raise StorageError(f"{named(self.store)}: a copy into it has not ended; run that `citybrain migrate` again")
        if MOVED in known:
            raise StorageError(f"{named(self.store)}: it has moved to {known[MOVED]}; start with --database")

    def _read_atlas(self, name: str) -> Atlas:
        return Atlas(decode_registry(self.layout.get_blob(name)), name)

    # --- inputs

    def accept(self, results: Iterable[Attempt]) -> None:
        """Hand in what became of deliveries; the next step writes it."""
        self._results.extend(results)

    def holds(self, message: str) -> bool:
        """Return whether a delivery's result has been accepted and is not written yet."""
        return any(result.id == message for result in self._results)

    def step(self, now_ms: int) -> int:
        """Take what is there (bounded), in one transaction; return how many inputs were taken, 0 where none were.

        Raises StorageError (DiskFull; Fenced where another desk has taken over) or Unavailable with nothing written;
        the next step takes the same again.
        """
        if self._stale:
            self.resume()
        try:
            inputs, caught_up = self._gather()
            timers = caught_up and self._next_due is not None and self._next_due <= now_ms
            if not inputs and not timers:
                return 0
            with writing(self.store) as connection:
                if self.lease is not None:
                    self.lease.hold(connection)
                ledger = Ledger(connection)
                for one in inputs:
                    self.apply(ledger, one, now_ms)
                taken = len(inputs) + (self._timers(ledger, now_ms) if timers else 0)
                self._look_ahead(connection)
        except BaseException:
            self._stale = True  # nothing was written: read it all again, once the database answers
            raise
        for _ in range(sum(one.source == "delivery" for one in inputs)):
            self._results.popleft()
        for one in inputs:
            if one.mail:
                self._mailbox.done(one.mail)
        self._publish(ledger)
        self.taken = [one.record.received_at for one in inputs if one.record is not None]
        self.delivered = ledger.delivered
        return taken

    def _gather(self) -> tuple[list[Input], bool]:
        """Return the inputs there are, and whether the transition logs have been read to their ends."""
        registry = self._registry()
        if not registry and not self._atlas.name:
            return [*self._asked(), *self._commands()], False  # nothing can be placed yet; the ledger may come
        inputs, caught_up = [*registry, *self._asked(), *self._deliveries(), *self._commands()], True
        for shard in self.shards:
            waiting = self._waiting[shard]
            if len(waiting) < self.config.batch:
                waiting.extend(self._readers[shard].read())
            most = min(self.config.batch, len(waiting))
            inputs += [_transition(shard, waiting.popleft()) for _ in range(most)]
            caught_up = caught_up and not waiting
        return inputs, caught_up

    def _registry(self) -> list[Input]:
        active = self.layout.read_active()
        if active is None or not active.registry or active.registry == self._atlas.name:
            return []
        return [Input("registry", text({"registry": active.registry}))]

    def _deliveries(self) -> list[Input]:
        return [Input("delivery", text(result)) for result in list(self._results)[: self.config.batch]]

    def _asked(self) -> list[Input]:
        """Put what ingest is to write into its mailbox, and return that this was done; a repeat has the same name.

        Of several registries the newest is enough, and it is made here, not where each change is decided.
        """
        if not self._asking:
            return []
        with reading(self.store) as connection:
            waiting = select(asked).where(asked.c.done == 0).order_by(asked.c.id).limit(self.config.batch)
            rows = connection.execute(waiting).mappings().all()
            newest = max((row["id"] for row in rows if row["kind"] == "registry"), default=0)
            book = self._shelf.book(connection, self._atlas.registry, 0) if newest else None
        for row in rows:
            body = msgspec.json.decode(row["body"])
            if row["id"] == newest and book is not None:
                body = {"content": self.layout.put_blob(encode_registry(registry_of(book)))}
            elif row["kind"] == "registry":
                continue
            made = Command(f"ledger-{row['id']:09d}", row["kind"], row["actor"], row["at"], body, row["reason"])
            (self._orders if row["kind"] == "order" else self._ingest).put(made)
        return [Input("asked", text({"ids": [row["id"] for row in rows]}))]

    def _commands(self) -> list[Input]:
        items, broken = self._mailbox.take(self.config.batch)
        for one in broken:
            self.counters.drop("broken_command")
            self.counters.warn(one.what)
        return [Input("command", text(command), mail=name) for name, command in items]

    def _timers(self, ledger: Ledger, now_ms: int) -> int:
        taken = 0
        for entity, table in (("alarm", alarms), ("incident", incidents)):
            query = select(table.c.id).where(table.c.due_at <= now_ms).order_by(table.c.due_at, table.c.id)
            for id in ledger.connection.execute(query.limit(self.config.batch)).scalars().all():
                self.apply(ledger, Input("timer", text({"entity": entity, "id": id})), now_ms)
                taken += 1
        return taken

    # --- effects

    def apply(self, ledger: Ledger, one: Input, now_ms: int) -> None:
        """Take one input: a function of it, of `now_ms` and of what is in the database."""
        clerk = Clerk(ledger, self._setting(), now_ms)
        body: Any = msgspec.json.decode(one.body) if one.body is not None else None
        if one.source == "command":
            command = msgspec.convert(body, Command)
            if ledger.command(command.id) is not None:
                ledger.counts["commands_repeated"] += 1
                return
            follow(clerk, command)
        elif one.source == "transition":
            self._transition(clerk, one)
        elif one.source == "timer":
            clerk.timer(body["entity"], body["id"])
        elif one.source == "delivery":
            self._delivered(ledger, msgspec.convert(body, Attempt), now_ms)
        elif one.source == "asked":
            for id in body["ids"]:
                ledger.set(asked, id, done=1)
        else:
            self._adopt(clerk, body["registry"])
        ledger.record(now_ms, one.source, one.shard, one.offset, one.body)

    def _setting(self) -> Setting:
        return Setting(
            self._rulebook,
            self._atlas,
            self.categories,
            self._cases,
            self.config.quiet_ms,
            self._shelf,
            self.layout.get_blob,
        )

    def _transition(self, clerk: Clerk, one: Input) -> None:
        ledger, record, shard = clerk.ledger, one.record, one.shard
        assert record is not None
        assert shard is not None
        name = self._names.get(shard, (-1, -1))
        try:
            if record.kind != Kind.TRANSITION:
                raise msgspec.DecodeError(f"record of kind {record.kind}")  # noqa: TRY301  one place says it
            transition = decode_transition(record.payload)
        except msgspec.DecodeError as error:
            ledger.drops["malformed_transition"] += 1
            ledger.warnings.append(f"{self.logs.where('transitions', shard)} offset {record.offset}: {error}")
        else:
            if (transition.source, transition.index) > name:
                name = self._names[shard] = (transition.source, transition.index)
                ledger.counts["transitions"] += 1
                self._decide(clerk, transition)
            else:
                ledger.drops["repeated"] += 1
        ledger.consume(shard, record.offset + 1, name)

    def _decide(self, clerk: Clerk, transition: Transition) -> None:
        """Let the clerk decide; what it cannot is set aside loudly, because a desk that stops helps nobody."""
        try:
            with clerk.ledger.connection.begin_nested():
                clerk.transition(transition)
        except (ConfigError, TransitionError) as error:
            clerk.ledger.drops["undecided_transition"] += 1
            clerk.ledger.warnings.append(f"{transition.rule} of {transition.subject} at {transition.at_ms}: {error}")

    def _adopt(self, clerk: Clerk, name: str) -> None:
        """Place what comes by another registry; alarms of devices whose trial is over are judged as if raised now."""
        before, self._atlas = self._atlas, self._read_atlas(name)
        clerk.ledger.keep("registry", name)
        passed = sorted(
            id
            for id, device in before.devices.items()
            if device.mode == "commissioning" and id in self._atlas.devices and not self._atlas.on_trial(id)
        )
        serving = Clerk(clerk.ledger, self._setting(), clerk.now_ms)
        for subject in passed:
            serving.trial_passed(subject)

    def _delivered(self, ledger: Ledger, result: Attempt, now_ms: int) -> None:
        row = ledger.get(outbox, result.id)
        if row is None or row["state"] != "pending":
            return
        done = result.outcome == "delivered"
        ledger.set(
            outbox,
            result.id,
            state="pending" if result.outcome == "retry" else result.outcome,
            attempts=row["attempts"] + 1,
            next_at=result.next_at,
            delivered_at=now_ms if done else None,
            last_error=result.error,
        )
        if done:
            ledger.delivered.append(row["created_at"])
        ledger.counts["delivered" if done else f"delivery_{result.outcome}"] += 1
        if result.outcome == "dead":
            ledger.warnings.append(f"message {result.id}: given up: {result.error}")

    # --- outputs

    def due(self, real_ms: int, most: int = 64) -> list[Outgoing]:
        """Return the messages to deliver now (real time), rescues first; of one case only the oldest, to keep order."""
        if self._next_delivery is None or self._next_delivery > real_ms:
            return []
        earlier = outbox.alias("earlier")
        blocked = select(earlier.c.n).where(
            and_(earlier.c.case_id == outbox.c.case_id, earlier.c.n < outbox.c.n, earlier.c.state == "pending")
        )
        query = (
            select(outbox.c.id, outbox.c.body, outbox.c.urgent, outbox.c.attempts)
            .where(outbox.c.state == "pending", outbox.c.next_at <= real_ms, ~blocked.exists())
            .order_by(outbox.c.urgent.desc(), outbox.c.n)
            .limit(most)
        )
        with reading(self.store) as connection:
            rows = connection.execute(query).all()
        return [Outgoing(row.id, row.body.encode(), bool(row.urgent), row.attempts) for row in rows]

    def _look_ahead(self, connection: Connection) -> None:
        """Remember when a timer and a delivery are due, so that an idle step costs no query."""
        times = union_all(select(func.min(alarms.c.due_at)), select(func.min(incidents.c.due_at)))
        self._next_due = min((at for at in connection.execute(times).scalars() if at is not None), default=None)
        self._asking = connection.execute(select(func.min(asked.c.id)).where(asked.c.done == 0)).scalar() is not None
        waiting = select(func.min(outbox.c.next_at)).where(outbox.c.state == "pending")
        self._next_delivery = connection.execute(waiting).scalar()

    def _publish(self, ledger: Ledger) -> None:
        for name, amount in ledger.counts.items():
            self.counters.add(f"{name}_total", amount)
        for reason, amount in ledger.drops.items():
            self.counters.drop(reason, amount)
        for warning in ledger.warnings:
            self.counters.warn(warning)

    def gauge(self, now_ms: int) -> None:
        """Set the gauges: how much is open, and how far behind the transition logs the desk is."""
        counted = {
            "alarms_open": select(func.count()).where(alarms.c.open == 1),
            "incidents_open": select(func.count()).where(incidents.c.open == 1),
            "cases_open": select(func.count()).where(cases.c.closed_at.is_(None)),
            "messages_waiting": select(func.count()).where(outbox.c.state == "pending"),
        }
        waiting_since = select(func.min(outbox.c.created_at)).where(outbox.c.state == "pending")
        with reading(self.store) as connection:
            for name, query in counted.items():
                self.counters.gauges[name] = float(connection.execute(query).scalar_one())
            made_at = connection.execute(waiting_since).scalar()
        self.counters.gauges["outbox_age_s"] = max(0.0, (now_ms - made_at) / 1000) if made_at is not None else 0.0
        oldest = min((waiting[0].received_at for waiting in self._waiting.values() if waiting), default=None)
        self.counters.gauges["lag_s"] = max(0.0, (now_ms - oldest) / 1000) if oldest is not None else 0.0


def _transition(shard: int, record: Record) -> Input:
    return Input("transition", shard=shard, offset=record.offset, record=record)


def replay(source: Engine, desk: Desk) -> int:
    """Do with `desk`, started on an empty database, what `source`'s journal says; return how many inputs that were.

    The transitions themselves come from `desk.logs`. Afterwards both databases hold the same rows.
    Raises StorageError where a transition is no longer there.
    """
    readers = {shard: records(desk.logs.reader("transitions", shard)) for shard in desk.shards}
    taken = 0
    with source.connect() as reading, desk.store.begin() as connection:
        ledger = Ledger(connection)
        for row in reading.execute(select(journal).order_by(journal.c.n)):
            record = None
            if row.source == "transition":
                record = next((r for r in readers[row.shard] if r.offset == row.offset), None)
                if record is None:
                    raise StorageError(f"{desk.logs.where('transitions', row.shard)}: offset {row.offset} is not there")
            desk.apply(ledger, Input(row.source, row.body, row.shard, row.offset, record), row.at)
            taken += 1
    desk.resume()
    return taken
