"""Bursts and open hydrants in a real network's hydraulics: which become one case, how soon, and how many are false.

    python -m benchmarks.hydraulics --inp Net3.inp --events 20 --seed 3 --json

EPANET solves the network with pressure-dependent demand (`benchmarks.hydraulics.network`); about 55 pressure sensors
say what it finds every 5 minutes, with noise of σ 0.005 MPa; the readings go through the real path (spool, uplink,
ingest, log, engine, desk) under the shipped rules. 5 days of history, then the events. An event counts as a cause where
its third-most affected sensor is, within 30 minutes, at least 0.025 MPa lower than in a twin run without it; smaller
ones are told apart. A case belongs to the event in whose time, or the 2 hours after it, it was opened; one that belongs
to none is false.

causes: events that count. found_15min: causes with a case within 15 min of their beginning. one_case, doubled, missed:
causes with exactly one case, with more, with none. false_cases_per_day: over the days of the events; history_cases are
those of the 5 days before. delay_s_median: from a cause's beginning to its first case, of all that were found. small,
small_found: events that do not count, and those of them with a case. The seed decides everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import select

from benchmarks.hydraulics.network import APART_S, DAY_S, FELT_MPA, HISTORY_DAYS, Event, Network, Sensor
from citybrain.clock import SECOND_MS, monotonic_s
from citybrain.db.schema import cases
from citybrain.errors import CityBrainError
from citybrain.layout import Layout
from citybrain.model import Cell, Device, Gateway, Lane, Place, Reading, Registry, Unit
from rules.categories import load_categories
from rules.files import library
from simulators.offline import ORIGIN_MS, LazyFiles
from simulators.pipeline import Pipeline

STEP_S = 60  # how often the pipeline is carried on: holds and delays of the rules run in it
SYNC_S = DAY_S
FOUND_S = 15 * 60
PER_GATEWAY = 20
CENTRE = (121.40, 31.10)  # degrees; the networks' own coordinates are only a drawing
EXTENT = 0.03


class Opened(msgspec.Struct, frozen=True):
    """A case, as the desk opened it: seconds since the beginning."""

    at_s: int
    category: str
    subject: str


def registry_of(sensors: Sequence[Sensor]) -> Registry:
    """Return the registry of a network's sensors: hydrants in its pressure zones, a few gateways a zone."""
    left, low = min(s.x for s in sensors), min(s.y for s in sensors)
    scale = max(max(s.x for s in sensors) - left, max(s.y for s in sensors) - low) or 1.0
    zones = sorted({sensor.zone for sensor in sensors})
    devices: list[Device] = []
    gateways: dict[str, Gateway] = {}
    cells: list[Cell] = []
    for number, sensor in enumerate(sensors, 1):
        code = f"990101001{number:06d}"
        lon, lat = (
            round(c + EXTENT * (v - o) / scale, 6)
            for c, v, o in zip(CENTRE, (sensor.x, sensor.y), (left, low), strict=True)
        )
        place = Place(lon, lat, code, f"node {sensor.node}")
        cells.append(Cell(code, "990101001G01", "001"))
        within = sum(device.zone == sensor.zone for device in devices)
        gateway = f"gw-{zones.index(sensor.zone) + 1:02d}-{within // PER_GATEWAY + 1:02d}"
        gateways.setdefault(gateway, Gateway(gateway, zones.index(sensor.zone) % 2, place))
        metrics, tags = ("pressure_mpa",), ("mains", "wet_barrel", "report_5min")
        devices.append(
            Device(device_of(sensor), "hydrant", gateway, place, metrics, zone=sensor.zone, name=sensor.node, tags=tags)
        )
    own = [Device(g.id, "gateway", g.id, g.place, ("uptime_s", "spooled")) for g in gateways.values()]
    units = [Unit("street-001", "一街道", "First street", "001")]
    units += [Unit(code, code, code, department=code) for code in sorted({c.unit for c in load_categories().values()})]
    return Registry(tuple(gateways.values()), (*devices, *own), tuple(cells), tuple(units))


def device_of(sensor: Sensor) -> str:
    """Return the device's id: the node's name, made safe for the wire."""
    return "hyd-" + "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in sensor.node)


def minutes(network: Network, pressure: Any) -> Iterator[tuple[int, list[tuple[int, Sensor, float]]]]:
    """Yield (end of the minute in s, its reports), minute by minute."""
    reports = iter(network.reports(pressure))
    waiting = next(reports, None)
    for end_s in range(STEP_S, network.days * DAY_S + STEP_S, STEP_S):
        found = []
        while waiting is not None and waiting[0] < end_s:
            found.append(waiting)
            waiting = next(reports, None)
        yield end_s, found


def play(network: Network, pressure: Any, layout: Layout) -> tuple[list[Opened], dict[str, int]]:
    """Send the reports through the pipeline; return the cases (no maintenance orders), and what was counted."""
    registry = registry_of(network.sensors)
    gateway_of = {device.id: device.gateway for device in registry.devices}
    files = LazyFiles()
    pipeline = Pipeline(layout, registry, library(), load_categories(), seed=network.seed, files=files)
    pipeline.start(ORIGIN_MS)
    counted = {"readings": 0, "transitions": 0}
    try:
        for end_s, reports in minutes(network, pressure):
            now_ms = ORIGIN_MS + end_s * SECOND_MS
            by_gateway: dict[str, list[Reading]] = {gateway.id: [] for gateway in registry.gateways}
            for at_s, sensor, mpa in reports:
                device = device_of(sensor)
                by_gateway[gateway_of[device]].append(
                    Reading(device, ORIGIN_MS + at_s * SECOND_MS, {"pressure_mpa": mpa})
                )
            for gateway, readings in by_gateway.items():
                readings.append(Reading(gateway, now_ms - SECOND_MS, {"uptime_s": float(end_s), "spooled": 0.0}))
                counted["readings"] += len(readings)
                pipeline.append(gateway, Lane.TELEMETRY, readings, now_ms)
            pipeline.tick(now_ms)
            counted["transitions"] += pipeline.step(now_ms)
            if end_s % SYNC_S == 0:
                files.flush()
        return _opened(pipeline), counted | {"dropped": _dropped(pipeline)}
    finally:
        pipeline.close()


def _opened(pipeline: Pipeline) -> list[Opened]:
    assert pipeline.store is not None  # it was started
    query = (
        select(cases.c.opened_at, cases.c.category, cases.c.subject)
        .where(cases.c.kind != "maintenance")
        .order_by(cases.c.id)
    )
    with pipeline.store.connect() as connection:
        return [
            Opened((row.opened_at - ORIGIN_MS) // SECOND_MS, row.category, row.subject)
            for row in connection.execute(query)
        ]


def _dropped(pipeline: Pipeline) -> int:
    counters = (pipeline.ingested, pipeline.stream.gateways)
    return sum(n for counter in counters for name, n in counter.values.items() if name.startswith("dropped_total"))


def score(
    events: Sequence[Event],
    felt_mpa: Sequence[float],
    opened: Sequence[Opened],
    event_days: int,
    history_days: int = HISTORY_DAYS,
) -> dict[str, Any]:
    """Return what the cases are worth; pure. felt_mpa: how much each event is felt."""
    owned: list[list[Opened]] = [
        [case for case in opened if e.start_s <= case.at_s < e.end_s + APART_S] for e in events
    ]
    mine = {id(case) for cases_ in owned for case in cases_}
    false = [case for case in opened if id(case) not in mine]
    causes = [(event, found) for event, felt, found in zip(events, felt_mpa, owned, strict=True) if felt >= FELT_MPA]
    small = [found for felt, found in zip(felt_mpa, owned, strict=True) if felt < FELT_MPA]
    delays = [min(case.at_s for case in found) - event.start_s for event, found in causes if found]
    history = sum(case.at_s < history_days * DAY_S for case in false)
    return {
        "causes": len(causes),
        "found_15min": sum(delay <= FOUND_S for delay in delays),
        "one_case": sum(len(found) == 1 for _, found in causes),
        "doubled": sum(len(found) > 1 for _, found in causes),
        "missed": sum(not found for _, found in causes),
        "false_cases_per_day": round((len(false) - history) / event_days, 3),
        "delay_s_median": statistics.median(delays) if delays else None,
        "events": len(events),
        "small": len(small),
        "small_found": sum(bool(found) for found in small),
        "history_cases": history,
        "days": history_days + event_days,
    }


def measure(network: Network, events: int, layout: Layout) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the whole; return the result, and a row an event."""
    began_s = monotonic_s()
    planned = network.plan(events)
    pressure = network.run(planned)
    felt_mpa = [network.felt_mpa(event, planned[:number], pressure) for number, event in enumerate(planned)]
    hydraulics_s = monotonic_s() - began_s
    opened, counted = play(network, pressure, layout)
    result = score(planned, felt_mpa, opened, network.days - network.history_days, network.history_days)
    zones = {sensor.zone for sensor in network.sensors}
    result |= {"network": network.name, "sensors": len(network.sensors), "zones": len(zones), **counted}
    result |= {"hydraulics_s": round(hydraulics_s, 1), "seconds": round(monotonic_s() - began_s, 1)}
    return result, [_row(event, felt, opened) for event, felt in zip(planned, felt_mpa, strict=True)]


def _row(event: Event, felt_mpa: float, opened: Sequence[Opened]) -> dict[str, Any]:
    found = [case.at_s - event.start_s for case in opened if event.start_s <= case.at_s < event.end_s + APART_S]
    return {
        **msgspec.to_builtins(event),
        "felt_mpa": round(felt_mpa, 4),
        "counts": felt_mpa >= FELT_MPA,
        "cases_after_s": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.hydraulics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inp", type=Path, required=True, metavar="NET.inp", help="the network, an EPANET file")
    parser.add_argument("--events", type=int, default=20, help="bursts and open hydrants, half of each (default: 20)")
    parser.add_argument("--seed", type=int, default=3, help="what everything is drawn from (default: 3)")
    parser.add_argument("--per-event", action="store_true", help="a line an event, on stderr")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not 0 < options.events <= 1000:
        parser.error(f"--events {options.events}: expected 1..1000")
    try:
        with tempfile.TemporaryDirectory(prefix="hydraulics-") as folder:
            network = Network(options.inp, options.seed, options.events)
            result, rows = measure(network, options.events, Layout(Path(folder)))
    except CityBrainError as error:
        sys.stderr.write(f"benchmarks.hydraulics: {error}\n")
        return error.exit_code
    if options.per_event:
        sys.stderr.writelines(f"{json.dumps(row)}\n" for row in rows)
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    return 0
