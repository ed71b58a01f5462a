"""Measure the cloud intake: the real `citybrain cloud`, clients that push signed batches and wait for their 200.

    python -m benchmarks.cloud --json

pushes_per_s      batches of `--batch` readings, of four values each, that were stored (synced) and answered
readings_per_s    the same in readings
repeats_per_s     readings of batches that had all been pushed before
p99_ms            from a batch's sending until its 200
core_share        CPU seconds of the intake by second: what one core was used
readings_per_core_s   readings by CPU second of the intake: what a core of its own would do
table_bytes_per_value what `seen.db` takes on disk

No broker runs, so everything stays in the spools; the clients share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from citybrain.clock import real_unix_s, system_clock
from citybrain.layout import Active, Layout, Run
from citybrain.model import Device, Gateway, Place, Registry
from citybrain.webhook import sign
from gateway.clouds.config import make_keys, read_clouds, read_keys
from streams.registry import encode_registry
from streams.runtimes.embedded import free_port
from streams.runtimes.supervisor import accepts

HOST = "127.0.0.1"
PLACE = Place(121.47, 31.23, "310104001001001")
METRICS = ("pressure_mpa", "flow_lps", "battery_v", "temperature_c")
CONFIG = """\
operators:
  bench:
    token: bench.token
    key: bench.key
    device: IMEI
    time: timestamp
    values: payload
    only: {messageType: dataReport}
    fields:
      pressure_mpa: {metric: pressure_mpa}
      flow_lps: {metric: flow_lps}
      battery_v: {metric: battery_v}
      temperature_c: {metric: temperature_c}
"""
Prepared = tuple[bytes, dict[str, str]]


def prepare(root: Path, devices: int) -> tuple[Layout, Run]:
    """Make a data folder with two virtual gateways and their devices."""
    layout, run = Layout(root), Run(system_clock(), mqtt_port=free_port(HOST), cloud_port=free_port(HOST))
    layout.make()
    layout.write_run(run)
    (root / "clouds.yaml").write_text(CONFIG)
    make_keys(layout.secrets, read_clouds(root / "clouds.yaml"))
    gateways = tuple(Gateway(f"cloud-{shard}", shard, PLACE) for shard in range(2))
    hydrants = tuple(Device(f"8640{n:011d}", "hydrant", f"cloud-{n % 2}", PLACE, METRICS) for n in range(devices))
    layout.write_active(Active(layout.put_blob(encode_registry(Registry(gateways, hydrants))), "none"))
    return layout, run


def batches(layout: Layout, count: int, size: int, devices: int) -> list[Prepared]:
    """Return signed pushes; every value is another one."""
    keys = read_keys(layout.secrets, read_clouds(layout.root / "clouds.yaml").operators["bench"])
    base_ms, now_s = real_unix_s() * 1000 - 3_600_000, real_unix_s()
    found = []
    for number in range(count):
        messages = [
            {
                "messageType": "dataReport",
                "protocol": "lwm2m",
                "deviceId": f"d-{n % devices}",
                "IMEI": f"8640{n % devices:011d}",
                "timestamp": base_ms + n,
                "payload": {name: round(0.3 + n % 977 / 1000 + k, 3) for k, name in enumerate(METRICS)},
            }
            for n in range(number * size, (number + 1) * size)
        ]
        body = msgspec.json.encode(messages)
        headers = {"authorization": f"Bearer {keys.token}", **sign(keys.secret, f"b-{number}", now_s, body)}
        found.append((body, headers))
    return found


def push(port: int, own: list[Prepared], took_s: list[float], accepted: list[int]) -> None:
    """Push batches one after another over one connection."""
    line = http.client.HTTPConnection(HOST, port, timeout=30)
    for body, headers in own:
        began_s = time.perf_counter()
        line.request("POST", "/push/bench", body, headers)
        answer = line.getresponse()
        content = answer.read()
        took_s.append(time.perf_counter() - began_s)
        if answer.status != 200:
            raise SystemExit(f"answered {answer.status} {content[:300]!r}")
        accepted.append(json.loads(content)["accepted"])
    line.close()


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pushed(port: int, all_: list[Prepared], clients: int) -> tuple[float, list[float], int]:
    """Push from several clients at once; return (seconds, seconds by push, readings accepted)."""
    took_s: list[float] = []
    accepted: list[int] = []
    threads = [threading.Thread(target=push, args=(port, all_[n::clients], took_s, accepted)) for n in range(clients)]
    began_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began_s, took_s, sum(accepted)


def measure(root: Path, count: int, size: int, clients: int) -> dict[str, Any]:
    """Run the intake and push `count` batches to it, twice."""
    layout, run = prepare(root, 2000)
    prepared = batches(layout, count, size, 2000)
    argv = [sys.executable, "-P", "-m", "citybrain", "cloud", "--data", str(root)]
    with (root / "cloud.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            until_s = time.monotonic() + 30
            while not accepts(HOST, run.cloud_port) and time.monotonic() < until_s:
                time.sleep(0.05)
            before_s = cpu_s(process.pid)
            seconds, took_s, accepted = pushed(run.cloud_port, prepared, clients)
            used_s = cpu_s(process.pid) - before_s
            again_s, _, twice = pushed(run.cloud_port, prepared, clients)
        finally:
            process.terminate()
            process.wait(10)
    if accepted != count * size or twice:
        raise SystemExit(f"{count * size} readings pushed, {accepted} accepted, {twice} of the repeats")
    took_s.sort()
    return {
        "pushes_per_s": round(count / seconds),
        "readings_per_s": round(accepted / seconds),
        "repeats_per_s": round(accepted / again_s),
        "p99_ms": round(1000 * took_s[int(0.99 * len(took_s))], 1),
        "core_share": round(used_s / seconds, 2),
        "readings_per_core_s": round(accepted / used_s),
        "table_bytes_per_value": round((layout.clouds / "seen.db").stat().st_size / (accepted * len(METRICS)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cloud intake.")
    parser.add_argument("--batches", type=int, default=1000, help="how many are pushed (default: 1000)")
    parser.add_argument("--batch", type=int, default=100, help="readings in each (default: 100)")
    parser.add_argument("--clients", type=int, default=4, help="connections at a time (default: 4)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cloud-") as folder:
        result = measure(Path(folder), args.batches, args.batch, args.clients)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<22} {value}")


if __name__ == "__main__":
    main()
