"""A data folder as a live run leaves it: a district, a log, a database, heartbeats, secrets; and the real API on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
from sqlalchemy import insert

from api.platforms.webhook import new_secret
from citybrain.clock import RunClock, real_unix_ms
from citybrain.counters import Counters
from citybrain.db.migrations import upgrade
from citybrain.db.place import VARIABLE
from citybrain.db.schema import alarms, cases, commands, incidents, outbox, timeline
from citybrain.db.store import open_store
from citybrain.layout import Active, Layout, Run
from citybrain.model import Evidence, Lane
from citybrain.segments import Writer
from rules.files import library
from simulators.district import District, build
from streams.log import Control, FrameHead, Kind, pack_frame
from streams.registry import Index, encode_registry
from streams.ruleset import encode_ruleset
from tests.conftest import end, eventually, unused_port

SHARDS = 2


class Seeded:
    """The folder, and what stands in it."""

    def __init__(self, root: Path, database: str = "") -> None:
        self.layout = Layout(root, database)
        self.now_ms = real_unix_ms()
        self.district: District = build(7)
        self.run = Run(
            clock=RunClock(self.now_ms, self.now_ms),
            shards=SHARDS,
            mqtt_port=unused_port(),
            api_port=unused_port(),
            platform_port=unused_port(),
        )
        self.registry = self.ruleset = ""
        self.index = Index(self.district.registry, "")
        self.writers = [Writer(self.layout.log(shard)) for shard in range(SHARDS)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.run.api_port}"

    def prepare(self) -> None:
        """Write everything but rows."""
        self.layout.make()
        self.layout.write_run(self.run)
        self.registry = self.layout.put_blob(encode_registry(self.district.registry))
        self.ruleset = self.layout.put_blob(encode_ruleset(library()))
        self.layout.write_active(Active(self.registry, self.ruleset))
        for name in ("platform.key", "verdict.key"):
            (self.layout.secrets / name).write_text(new_secret())
        store = open_store(self.layout.place)
        upgrade(store)
        store.dispose()
        for writer in self.writers:
            writer.start()
        self.control(Control("registry", self.now_ms, "test", self.registry))

    def control(self, control: Control) -> None:
        """Write a control record to every shard."""
        for writer in self.writers:
            writer.append(Kind.CONTROL, self.now_ms, msgspec.json.encode(control))
            writer.commit()

    def frame(self, values: list[tuple[str, str, int, float]], seq: int = 1, *, commit: bool = True) -> None:
        """Write one frame of (device, metric, time, value); all of one gateway."""
        gateway = self.index.device(values[0][0]).gateway
        number = self.index.gateway_index[gateway]
        head = FrameHead(number, Lane.TELEMETRY, 1, seq, self.now_ms, len(values), 0)
        payload = pack_frame(
            head,
            np.array([at for _, _, at, _ in values], np.int64),
            np.array([value for *_, value in values], np.float64),
            np.array([self.index.series(device, metric) for device, metric, _, _ in values], np.uint32),
        )
        writer = self.writers[self.index.gateways[number].shard]
        writer.append(Kind.FRAME, self.now_ms, payload)
        if commit:
            writer.commit()

    def beat(self, *, without: tuple[str, ...] = ()) -> None:
        """Write fresh heartbeats of the processes that make a run live."""
        for name in ("ingest", "worker", "desk"):
            if name in without:
                continue
            counters = Counters(name, self.layout.run)
            counters.add("received_total", 70)
            if name == "ingest":
                counters.add("readings_total", 4200)
                counters.drop("unknown_gateway", 3)
                counters.gauges["connected"] = 1
            if name == "worker":
                counters.drop("late", 2)
                counters.gauges["lag_s"] = 0.25
            if name == "desk":
                counters.gauges["lag_s"] = 0.0
            counters.publish(force=True)

    def rows(self, table: Any, *rows: dict[str, Any]) -> None:
        """Put rows into the database."""
        store = open_store(self.layout.place)
        with store.begin() as connection:
            for row in rows:
                connection.execute(insert(table).values(**row))
        store.dispose()

    def alarm(self, id: int, rule: str, subject: str, **columns: Any) -> dict[str, Any]:
        """Return an alarm's row."""
        at = self.now_ms - 60_000
        evidence = Evidence("pressure_mpa", 0.052, 0.14, at - 120_000)
        return {
            "id": id, "rule": rule, "ruleset": self.ruleset, "subject": subject, "state": "unack", "open": 1,
            "active": 1, "urgency": "urgent", "raised_at": at, "received_at": at, "opened_at": at, "last_at": at,
            "count": 1, "shard": 0, "source": 9, "evidence": msgspec.json.encode(evidence).decode(), **columns,
        }  # fmt: skip

    def incident(self, id: int, cause: str, by: str, key: str, **columns: Any) -> dict[str, Any]:
        """Return an incident's row."""
        at = self.now_ms - 60_000
        return {"id": id, "state": "confirmed", "open": 1, "cause": cause, "by": by, "key": key, "urgency": "urgent",
                "opened_at": at, "last_at": at, **columns}  # fmt: skip

    def case(self, id: int, kind: str, incident: int, alarm: int, subject: str, **columns: Any) -> dict[str, Any]:
        """Return a case's row."""
        device = self.index.device(subject)
        cell = self.district.cells[device.place.cell]
        owner = next(unit.code for unit in self.district.registry.units if unit.street == cell.street)
        at = self.now_ms - 60_000
        return {
            "id": id, "number": f"CB20261124-{id:06d}", "kind": kind, "incident": incident, "alarm": alarm,
            "subject": subject, "category": "water_main_burst", "edition": "GB/T 30428.2", "code": "05-01",
            "title_zh": "供水管道破裂", "title_en": "Water main burst", "urgency": "urgent", "lon": device.place.lon,
            "lat": device.place.lat, "cell": cell.code, "grid": cell.grid, "street": cell.street,
            "address": device.place.address, "unit": "water", "area_owner": owner, "stage": "dispatched",
            "owner_system": "external", "observed_at": at, "opened_at": at, "deadline": at + 3_600_000,
            "evidence": '[{"alarm":1,"why":"first"}]', **columns,
        }  # fmt: skip

    def seed_night(self) -> None:
        """A burst main with its case, a passenger trapped, one rescued, a flat battery, and what went before."""
        hydrants = [f"hyd-{number:06d}" for number in (1, 2, 3)]
        lifts = [device.id for device in self.district.registry.devices if device.kind == "elevator"][:2]
        now = self.now_ms
        self.rows(
            incidents,
            self.incident(1, "water", "zone", "zone-01"),
            self.incident(2, "power", "building", self.index.device(lifts[0]).building, urgency="life"),
            self.incident(3, "hydrant", "device", hydrants[1], state="pending", urgency="normal"),
            self.incident(4, "device_care", "device", hydrants[2], urgency="watch", kind="maintenance"),
            self.incident(5, "water", "zone", "zone-02", state="closed", open=0),
        )
        trapped = msgspec.json.encode(Evidence("fault_code", 93.0, None, now - 300_000)).decode()
        life = {"urgency": "life", "evidence": trapped, "incident": 2}
        self.rows(
            alarms,
            *(self.alarm(n, "hydrant_pressure_low", name, incident=1, why="first" if n == 1 else "same_zone")
              for n, name in enumerate(hydrants, 1)),
            self.alarm(4, "elevator_trapped", lifts[0], why="first", **life),
            self.alarm(5, "elevator_trapped", lifts[1], why="same_building", state="acked", acknowledged_by="王值班",
                       acknowledged_at=now, count=2, **life),
            self.alarm(6, "hydrant_battery_low", hydrants[2], incident=4, why="first", urgency="watch",
                       state="rtn_unack", active=0, cleared_at=now),
            self.alarm(7, "a_rule_long_gone", hydrants[0], incident=5, why="first", open=0, state="closed",
                       ruleset="0" * 64),
        )  # fmt: skip
        rescue = {
            "category": "elevator_trapped",
            "title_zh": "电梯困人",
            "title_en": "Passenger trapped in an elevator",
        }
        rescue |= {"unit": "lift-rescue", "edition": "GB/T 47678.5-2026", "code": "01076", "urgency": "life"}
        self.rows(
            cases,
            self.case(1, "case", 1, 1, hydrants[0]),
            self.case(2, "rescue", 2, 4, lifts[0], observed_at=now - 300_000, deadline=now - 30_000, **rescue),
            self.case(3, "rescue", 2, 5, lifts[1], observed_at=now - 900_000, rescued_at=now - 60_000, **rescue),
            self.case(4, "maintenance", 4, 6, hydrants[2], category="battery", title_zh="设备电池电量低",
                      title_en="Device battery low", edition="", code="", unit="sensor-ops", urgency="watch",
                      owner_system="native", deadline=now + 14 * 86_400_000),
            self.case(5, "case", 5, 7, hydrants[0], stage="closed", closed_at=now, verdict="confirmed",
                      verdict_reason="核实属实"),
        )  # fmt: skip
        entry = {"at": now, "reason": "confirmed", "actor": "desk", "details": '{"category":"water_main_burst"}'}
        self.rows(
            timeline,
            {"entity": "case", "entity_id": 1, "event": "report", "before": "new", "after": "reported", **entry},
            {"entity": "case", "entity_id": 1, "event": "filed", "before": "reported", "after": "filed", **entry},
            {
                "entity": "incident",
                "entity_id": 1,
                "event": "members",
                "before": "pending",
                "after": "confirmed",
                **entry,
            },
        )
        sent = {"type": "cn.citybrain.case.created", "body": "{}", "urgent": 0, "created_at": now, "next_at": 0}
        self.rows(
            outbox,
            {"id": "CB20261124-000001.1", "n": 1, "case_id": 1, "state": "delivered", "attempts": 2,
             "delivered_at": now, **sent},
            {"id": "CB20261124-000002.1", "n": 2, "case_id": 2, "state": "pending", "attempts": 1,
             "last_error": "HTTP 503", **sent},
        )  # fmt: skip
        self.rows(
            commands,
            {"id": "known", "kind": "acknowledge", "actor": "li", "at": now, "applied_at": now, "result": "refused",
             "message": "alarm 7: closed", "reason": ""},
        )  # fmt: skip


def seeded(root: Path, database: str = "") -> Seeded:
    """Return a prepared folder without rows; `database`: a URL, "" for its own file."""
    made = Seeded(root, database)
    made.prepare()
    return made


@contextlib.contextmanager
def process(layout: Layout, *words: str, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a real `citybrain` subcommand until `ready` (a URL) answers; stop it in the end."""
    argv = [sys.executable, "-m", "citybrain", words[0], "--data", str(layout.root), *words[1:]]
    with (layout.root / f"{words[0]}.log").open("ab") as log:
        environment = os.environ | ({VARIABLE: layout.store} if layout.store else {})
        started = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)
    try:
        eventually(lambda: answers(ready), 20, f"{ready}: {(layout.root / f'{words[0]}.log').read_text()[-2000:]}")
        yield started
    finally:
        end(started)


def answers(url: str) -> bool:
    """Return whether something answers HTTP there."""
    try:
        httpx.get(url, timeout=2, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def stops_within(running: subprocess.Popen[bytes], number: int, seconds: float) -> int:
    """Send a signal; return the exit code, and fail where it takes longer."""
    began = time.monotonic()
    running.send_signal(number)
    code = running.wait(seconds + 3)
    assert time.monotonic() - began < seconds
    return code
