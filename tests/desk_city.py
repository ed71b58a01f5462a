"""A small city for the desk's tests: two pressure zones, two buildings, the shipped rules, and a hand on the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Engine, Table, select

from api.desk import Desk, DeskConfig
from citybrain.clock import MINUTE_MS, SECOND_MS
from citybrain.db.schema import alarms, cases, commands, incidents, metadata, outbox, timeline
from citybrain.db.store import open_store
from citybrain.layout import Active, Layout
from citybrain.mailbox import Command, Mailbox
from citybrain.model import Cell, Device, Edge, Evidence, Gateway, Place, Registry, Transition, Unit
from rules.categories import load_categories
from rules.files import library
from streams.log import Control, Kind, encode_transition
from streams.logs import LogStore, SegmentStore
from streams.registry import encode_registry
from streams.ruleset import Rule, encode_ruleset
from streams.runtimes.ingest import control_of

T0 = 1_795_536_000_000  # 2026-11-24 16:00 UTC, just after midnight in Shanghai
S, MIN = SECOND_MS, MINUTE_MS
RULES: dict[str, Rule] = {rule.id: rule for rule in library().rules}
CATEGORIES = load_categories()
HYDRANTS = tuple(f"hyd-{n:03d}" for n in range(8))  # 0-4 in zone z1, 5-7 in z2
LIFTS = ("lift-a1", "lift-a2", "lift-b1")


def place(n: int) -> Place:
    return Place(120.6 + n / 1000, 31.3, f"32050800100100{n % 3}", f"路{n}号")


def make_registry() -> Registry:
    """Hydrants on gateway gw-0 (shard 0), elevators on gw-1 (shard 1)."""
    hydrants = [
        Device(id, "hydrant", "gw-0", place(n), ("pressure_mpa",), zone="z1" if n < 5 else "z2")
        for n, id in enumerate(HYDRANTS)
    ]
    lifts = [Device(id, "elevator", "gw-1", place(10 + n), (), building=id[5]) for n, id in enumerate(LIFTS)]
    gateways = (Gateway("gw-0", 0, place(0)), Gateway("gw-1", 1, place(1)))
    own = [Device(g.id, "gateway", g.id, g.place, ("uptime_s",)) for g in gateways]
    cells = tuple(Cell(place(n).cell, "grid-1", f"00{1 + n % 2}") for n in range(3))
    units = (
        Unit("water", "供水公司", "Water company"),
        Unit("street-001", "一街道", "First street", "001"),
        Unit("street-002", "二街道", "Second street", "002"),
    )
    return Registry(gateways, (*hydrants, *lifts, *own), cells, units)


class City:
    """A data folder with a desk on it. Times are given in ms after T0. `database`: a URL, "" for its own file."""

    def __init__(
        self,
        root: Path,
        config: DeskConfig | None = None,
        logs_of: Callable[[Layout], LogStore] = SegmentStore,
        database: str = "",
    ) -> None:
        self.layout = Layout(root, database)
        self.layout.make()
        self.config = config or DeskConfig()
        self.logs = logs_of(self.layout)
        self.ruleset = self.layout.put_blob(encode_ruleset(library()))
        registry = self.layout.put_blob(encode_registry(make_registry()))
        self.layout.write_active(Active(registry, self.ruleset))
        self.writers = [self.logs.writer("transitions", shard) for shard in (0, 1)]
        for writer in self.writers:
            writer.start()
        self.source = [writer.next_offset * 10 for writer in self.writers]
        self.mailbox = Mailbox(self.layout.mailbox("desk"))
        self.store: Engine = open_store(self.layout.place)
        self.desk = self.make_desk(self.store)
        self.desk.start()

    def make_desk(self, store: Engine) -> Desk:
        return Desk(store, self.layout, (0, 1), CATEGORIES, self.config, logs=self.logs)

    def restart(self) -> None:
        """A desk that remembers nothing goes on with the same database."""
        self.store.dispose()
        self.store = open_store(self.layout.place)
        self.desk = self.make_desk(self.store)
        self.desk.start()

    def close(self) -> None:
        self.store.dispose()
        for writer in self.writers:
            writer.close()

    # --- what happens

    def transition(self, rule: str, subject: str, edge: Edge, at: int, value: float = 0.05) -> Transition:
        shard = 0 if subject.startswith("hyd") or subject == "gw-0" else 1
        self.source[shard] += 1
        evidence = Evidence("pressure_mpa", value, 0.14, T0 + at)
        return Transition(
            shard, self.source[shard], 0, rule, subject, edge, T0 + at, T0 + at + 500, evidence, self.ruleset
        )

    def put(self, *transitions: Transition) -> None:
        for transition in transitions:
            self.writers[transition.shard].append(
                Kind.TRANSITION, transition.received_at, encode_transition(transition)
            )
        for writer in self.writers:
            writer.commit()

    def raises(self, rule: str, *subjects: str, at: int, value: float = 0.05) -> None:
        """Devices raise; the desk is given a second."""
        self.put(*(self.transition(rule, subject, Edge.RAISE, at, value) for subject in subjects))
        self.step(at + S)

    def clears(self, rule: str, *subjects: str, at: int) -> None:
        self.put(*(self.transition(rule, subject, Edge.CLEAR, at) for subject in subjects))
        self.step(at + S)

    def step(self, at: int) -> int:
        """Let the desk do all there is to do at T0 + `at`."""
        total = 0
        while taken := self.desk.step(T0 + at):
            total += taken
        return total

    def command(self, id: str, kind: str, body: dict[str, Any], reason: str = "", at: int = 0) -> str:
        """Give the desk a command; return `applied: …` or `refused: …`."""
        self.mailbox.put(Command(id, kind, "wang", T0 + at, body, reason))
        self.step(at)
        row = next(row for row in self.rows(commands) if row["id"] == id)
        return f"{row['result']}: {row['message']}"

    def to_ingest(self) -> list[Control]:
        """What ingest would write of its mailbox, in order; a registry becomes the one in force."""
        box = Mailbox(self.layout.mailbox("ingest"))
        controls = []
        for name, command in box.take()[0]:
            controls.append(control_of(command, T0))
            if command.kind == "registry":
                self.layout.write_active(Active(controls[-1].content, self.ruleset))
            box.done(name)
        return controls

    # --- what there is

    def rows(self, table: Table) -> list[dict[str, Any]]:
        return rows_of(self.store, table)

    def one(self, table: Table) -> dict[str, Any]:
        found = self.rows(table)
        assert len(found) == 1, found
        return found[0]

    def kinds(self) -> dict[str, int]:
        """How many cases of each kind there are."""
        found = [row["kind"] for row in self.rows(cases)]
        return {kind: found.count(kind) for kind in sorted(set(found))}

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Type and data of every message, in order."""
        rows = sorted(self.rows(outbox), key=lambda row: row["n"])
        return [(row["type"].rpartition("citybrain.")[2], msgspec.json.decode(row["body"])["data"]) for row in rows]


def rows_of(store: Engine, table: Table) -> list[dict[str, Any]]:
    with store.connect() as connection:
        ordered = select(table).order_by(*table.primary_key.columns)
        return [dict(row._mapping) for row in connection.execute(ordered)]


def everything(store: Engine) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables."""
    return {name: rows_of(store, table) for name, table in metadata.tables.items()}


def invariants(city: City) -> None:
    """What must hold after any input: see DESIGN.md section 9."""
    found = city.rows(alarms)
    opened = [(row["rule"], row["subject"]) for row in found if row["open"]]
    assert len(opened) == len(set(opened)), "two open alarms"
    orders = city.rows(cases)
    by_incident = [row["incident"] for row in orders if row["kind"] != "rescue"]
    assert len(by_incident) == len(set(by_incident)), "two cases of one incident"
    rescued = [row["alarm"] for row in orders if row["kind"] == "rescue"]
    joined = [row for row in city.rows(timeline) if (row["entity"], row["event"]) == ("case", "joined")]
    rescued += [msgspec.json.decode(row["details"])["alarm"] for row in joined]
    life = [row["id"] for row in found if row["urgency"] == "life" and row["incident"] is not None]
    assert sorted(rescued) == sorted(life), "each life-safety alarm has one rescue"
    known = {row["id"]: row for row in city.rows(incidents)}
    for row in found:
        assert row["active"] == (row["state"] in ("unack", "acked"))
        assert row["open"] == (row["state"] != "closed")
        assert (row["due_at"] is None) == (row["state"] not in ("rtn_unack", "latched"))
        if row["open"] and not row["active"] and row["urgency"] != "life" and row["incident"] is not None:
            assert known[row["incident"]]["open"], "an alarm that ended is held by an open incident only"
    assert all(row["kind"] == "maintenance" for row in orders if row["owner_system"] == "native")
    sent = {row["case_id"] for row in city.rows(outbox)}
    assert sent == {row["id"] for row in orders if row["owner_system"] == "external"}
