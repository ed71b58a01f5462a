"""Measure the history: a chart of a year while ingest takes readings, bytes on disk, and how fast parts are made.

    python -m benchmarks.history --json

One hydrant reports every minute for a year, 200 others behind the same gateway every hour, four values each. The log of
that year becomes Parquet (`compact_values_per_s`: compaction and all merges, one core). Then a real broker, `citybrain
ingest` at half of the load it can take, `citybrain history` and `citybrain api` run side by side, and the API is asked
for charts of 1,000 points.

chart_ms_p50, chart_ms_p95  the whole HTTP request, one metric over the year
bytes_per_value             all files of the history, by the values in them
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from benchmarks.ingest import PLACE, SHARDS, Bench, make_registry, started, unused_port
from citybrain.clock import DAY_MS, MINUTE_MS, system_clock
from citybrain.counters import Counters
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox, command
from citybrain.model import Device, Gateway, Lane, Registry
from citybrain.segments import Writer
from streams.history.compactor import Compactor
from streams.log import F64, Control, FrameHead, Kind, pack_frame
from streams.registry import Index
from streams.runtimes.broker import mosquitto, mosquitto_configuration

GATEWAY, DEVICE = "gw-hydrants", "hyd-000000"
OTHERS = 200
METRICS = ("pressure_mpa", "flow_lps", "temperature_c", "battery_v")
DECIMALS = (4, 2, 1, 3)  # as the simulated sensors report
READINGS = 10  # in a message of the load
CHARTS = 40


def registry(gateways: int) -> Registry:
    """Return the load's gateways, and one with the hydrants."""
    load = make_registry(gateways, 100)
    hydrants = tuple(Device(f"hyd-{n:06d}", "hydrant", GATEWAY, PLACE, METRICS) for n in range(OTHERS + 1))
    return Registry((*load.gateways, Gateway(GATEWAY, 0, PLACE)), (*load.devices, *hydrants))


def year_of_values(minutes: int, seed: int) -> F64:
    """Return (minutes, 4), one row a reading: a daily pattern, weather and noise, rounded as a sensor reports them."""
    dice = np.random.default_rng(seed)
    day = 2 * np.pi * (np.arange(minutes) / 1440 + dice.random())
    columns = (
        0.3 + 0.03 * np.sin(day) + dice.normal(0, 0.005, minutes),
        np.maximum(2 + np.sin(day) + dice.normal(0, 0.3, minutes), 0),
        12 + 10 * np.sin(day / 365) + 4 * np.sin(day) + dice.normal(0, 0.2, minutes),
        3.6 - 0.2 * np.arange(minutes) / minutes + dice.normal(0, 0.002, minutes),
    )
    return np.stack([np.round(column, decimals) for column, decimals in zip(columns, DECIMALS, strict=True)], axis=1)


def write_year(layout: Layout, index: Index, days: int, until_ms: int) -> int:
    """Write the log of shard 0, a frame a minute; return how many values it has."""
    minutes, from_ms = days * 1440, until_ms - days * DAY_MS
    one = year_of_values(minutes, 0)
    others = np.stack([year_of_values(days * 24 + 1, 1 + n) for n in range(OTHERS)])
    series = np.array([[index.series(d.id, m) for m in METRICS] for d in index.devices if d.gateway == GATEWAY])
    gateway, values = index.gateway_index[GATEWAY], 0
    writer = Writer(layout.log(0))
    writer.start()
    writer.append(Kind.CONTROL, from_ms, msgspec.json.encode(Control("registry", from_ms, "benchmark", index.name)))
    for minute in range(minutes):
        at = from_ms + minute * MINUTE_MS
        due = [0, *range(1 + minute % 60, OTHERS + 1, 60)]
        value = np.concatenate([one[minute], others[np.array(due[1:]) - 1, minute // 60].ravel()])
        head = FrameHead(gateway, Lane.TELEMETRY, 1, minute + 1, at, len(value), minute)
        times = np.repeat(np.array([at - 40 * n for n in range(len(due))], np.int64), len(METRICS))
        writer.append(Kind.FRAME, at + 300, pack_frame(head, times, value, series[due].ravel().astype(np.uint32)))
        values += len(value)
        if minute % 1440 == 0:
            writer.commit()
    writer.commit()
    writer.close()
    return values


def compact(layout: Layout, now_ms: int) -> dict[str, Any]:
    """Make the history of shard 0, merged as it is after a year; return what it took."""
    compactor = Compactor(layout, 0, Counters("history"))
    began_s, cpu_s = time.monotonic(), time.process_time()
    compactor.start()
    while compactor.step(now_ms, force=True):
        pass
    before = None
    while before is not compactor.manifest:
        before = compactor.manifest
        for _ in compactor.merge():
            pass
    took_s, used_s = time.monotonic() - began_s, time.process_time() - cpu_s
    compactor.sweep()
    compactor.sweep()
    values = sum(part.values for part in compactor.manifest.parts)
    size = sum(path.stat().st_size for path in compactor.folder.iterdir())
    return {
        "values": values,
        "parts": len(compactor.manifest.parts),
        "bytes_per_value": round(size / values, 2),
        "compact_values_per_s": round(values / took_s),
        "compact_values_per_cpu_s": round(values / used_s),
    }


def ask_charts(url: str, from_ms: int, to_ms: int, stop: threading.Event, found: list[float]) -> None:
    """Ask for charts, one after the other with a pause, until `stop`; keep how long each took, in ms."""
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        while not stop.is_set() and len(found) < CHARTS:
            metric = METRICS[len(found) % len(METRICS)]
            asked: dict[str, str | int] = {"metric": metric, "from": from_ms, "to": to_ms, "points": 1000}
            began_s = time.monotonic()
            answer = client.get(f"/v1/devices/{DEVICE}/readings", params=asked)
            found.append(1000 * (time.monotonic() - began_s))
            body = answer.json()
            if answer.status_code != 200 or len(body["at"]) < 900 or body["missing"]:
                raise SystemExit(f"no chart: {answer.status_code} {answer.text[:300]}")
            time.sleep(0.1)


def wait_for_api(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/v1/devices/{DEVICE}", trust_env=False, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the API did not come up within 60 s")


def under_load(bench: Bench, url: str, span: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Measure what ingest can take, then charts at half of that."""
    most = bench.load(READINGS, "columns", 0.0, 3.0)["messages_per_s"]
    found: list[float] = []
    stop = threading.Event()
    asking = threading.Thread(target=ask_charts, args=(url, *span, stop, found))
    asking.start()
    load = bench.load(READINGS, "columns", most / 2, seconds)
    stop.set()
    asking.join()
    times = np.array(found[1:])  # the first loads DuckDB
    return {
        "chart_ms_p50": round(float(np.percentile(times, 50)), 1),
        "chart_ms_p95": round(float(np.percentile(times, 95)), 1),
        "charts": len(times),
        "first_chart_ms": round(found[0], 1),
        "load": {key: load[key] for key in ("messages_per_s", "p99_ms", "cpu")},
    }


def run(root: Path, gateways: int, days: int, seconds: float) -> dict[str, Any]:
    """Write a year, make its history, ask for charts under load."""
    layout, port, api_port = Layout(root / "data"), unused_port(), unused_port()
    layout.make()
    agreed = Run(clock=system_clock(), shards=SHARDS, mqtt_port=port, api_port=api_port)
    layout.write_run(agreed)
    bench = Bench(layout, registry(gateways), port)
    now_ms = agreed.clock.now_ms()
    write_year(layout, bench.index, days, now_ms)
    result = compact(layout, now_ms)
    Mailbox(layout.mailbox("ingest")).put(command("registry", "benchmark", 0, {"content": bench.name}))
    program = mosquitto()
    if program is None:
        raise SystemExit("mosquitto is not installed")
    configuration = root / "mosquitto.conf"
    configuration.write_text(mosquitto_configuration(port))
    own = (sys.executable, "-m", "citybrain")
    data = ("--data", str(layout.root))
    (root / "api").mkdir()
    (root / "history").mkdir()
    url = f"http://{socket.gethostbyname('localhost')}:{api_port}"
    with started(root, program, "-c", str(configuration)) as broker:
        time.sleep(0.3)
        with (
            started(root, *own, "ingest", *data) as ingest,
            started(root / "history", *own, "history", *data) as history,
            started(root / "api", *own, "api", *data) as api,
        ):
            bench.wait()
            wait_for_api(url)
            bench.pids = {"mosquitto": broker.pid, "ingest": ingest.pid, "history": history.pid, "api": api.pid}
            measured = under_load(bench, url, (now_ms - days * DAY_MS, now_ms), seconds)
            memory = {name: rss_mb(pid) for name, pid in bench.pids.items()}
    return {**measured, **result, "rss_mb": memory, "days": days, "cores": os.cpu_count()}


def rss_mb(pid: int) -> int:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", type=int, default=32)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long charts are asked for")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        result = run(Path(folder), options.gateways, options.days, options.seconds)
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
