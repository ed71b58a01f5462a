"""`citybrain run`: the whole product on one machine; each process its own `citybrain` subcommand, supervised.

The first start makes the data folder, its secrets and `run/run.json`; a later one goes on with the same clock, ports
and seed. All addresses are loopback.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import os
import secrets
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import IO

import msgspec

from citybrain.cli import Subcommand, emit
from citybrain.clock import RunClock, from_iso, monotonic_s, real_unix_ms, system_clock, wait_s
from citybrain.counters import Counters, process_name
from citybrain.errors import Unavailable, UsageError
from citybrain.layout import Layout, Run
from citybrain.storage import OS_FILES
from streams.runtimes.broker import broker_command, mosquitto
from streams.runtimes.stores import add_arguments, words_of
from streams.runtimes.supervisor import Part, Say, Supervisor

KEYS = ("platform.key", "verdict.key")  # what we sign with, what the grid platform signs with
PORTS = {
    "mqtt_port": "MQTT",
    "api_port": "API",
    "platform_port": "platform",
    "cloud_port": "cloud",
    "operator_port": "operator",
}
DEFAULTS = Run(clock=system_clock())
SLOW_S = 60.0  # not live by then: say who is missing
SHARDS_OF_SIZE = {"zone": 2, "reference": 4}  # a pressure zone stays in one shard; a district has many
MOST_SHARDS = 256


class Console:
    """Says few things, each in Chinese and English; on stderr, because stdout belongs to `--json`."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __call__(self, zh: str, en: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; that must not keep us from stopping in order
            self._stream.write(f"citybrain  {zh} · {en}\n")
            self._stream.flush()


# --- preparing --------------------------------------------------------------------------------------------------


def lock(layout: Layout) -> IO[str]:
    """Take the data folder for this process alone; raises Unavailable, naming the process that has it."""
    file = (layout.run / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise Unavailable(
            f"{layout.root}: another `citybrain run` (process {holder}) works on this data folder; "
            "stop it, or give another --data"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def make_secrets(layout: Layout) -> list[str]:
    """Create the signing keys that are missing, readable by their owner only; return their names."""
    layout.secrets.chmod(0o700)
    made = []
    for name in KEYS:
        path = layout.secrets / name
        if path.exists():
            continue
        text = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        OS_FILES.replace(path, text.encode())
        path.chmod(0o600)
        made.append(name)
    return made


def is_free(port: int, host: str) -> bool:
    """Return whether nobody listens on the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_port(host: str) -> int:
    """Return a port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def choose_port(asked: int | None, usual: int, name: str, host: str, say: Say, *, anyhow: bool = False) -> int:
    """Return the port asked for, else the usual one, else a free one; `anyhow`, without looking who has it.

    Raises Unavailable where the port asked for is taken, UsageError where it is none.
    """
    if asked is not None and not 0 < asked < 65536:
        raise UsageError(f"--{name.lower()}-port {asked}: expected 1..65535")
    if anyhow or is_free(asked or usual, host):
        return asked or usual
    if asked is not None:
        raise Unavailable(f"port {asked} ({name}) on {host} is taken by another process; stop it, or choose another")
    port = free_port(host)
    say(f"{name} 端口 {usual} 已被占用,改用 {port}", f"{name} port {usual} is taken, using {port} instead")
    return port


def decide(args: argparse.Namespace, layout: Layout, say: Say) -> Run:
    """Return what the processes of this run agree on: what was asked for, else as in the last run, else the defaults.

    Raises UsageError and Unavailable.
    """
    first = not (layout.run / "run.json").exists()
    now_ms = real_unix_ms()
    last = Run(clock=RunClock(now_ms, now_ms)) if first else layout.read_run()
    clock = last.clock
    if args.origin is not None or args.speed is not None:
        origin_ms = parse_origin(args.origin) if args.origin is not None else clock.now_ms()
        clock = RunClock(origin_ms, now_ms, parse_speed(args.speed) if args.speed is not None else clock.speed)
    ports = {
        field: choose_port(getattr(args, field), getattr(last, field), name, last.host, say, anyhow=args.prepare)
        for field, name in PORTS.items()
    }
    if len(set(ports.values())) < len(ports):
        raise UsageError(f"the ports must differ: {', '.join(str(port) for port in ports.values())}")
    if args.api_host is not None and not args.prepare:
        raise UsageError("--api-host: only with --prepare, for a container; on this machine everything is loopback")
    seed = last.seed if args.seed is None else args.seed
    size = args.size or last.size
    usual = SHARDS_OF_SIZE[size] if first else last.shards
    shards = usual if args.shards is None else args.shards
    if not first and (size, shards) != (last.size, last.shards):
        raise UsageError(
            f"{layout.root}: made with --size {last.size} --shards {last.shards}, which stay; give another --data"
        )
    if not 1 <= shards <= MOST_SHARDS:
        raise UsageError(f"--shards {shards}: expected 1..{MOST_SHARDS}")
    api_host = args.api_host or (last.api_host if args.prepare else DEFAULTS.api_host)
    workers = args.workers if args.workers is not None else usual_workers(shards, os.cpu_count() or 1)
    if not 1 <= workers <= shards:
        raise UsageError(f"--workers {workers}: expected 1..{shards}, one shard each at least")
    logs = last.logs if args.log is None else words_of(args)
    if not first and bool(logs) != bool(last.logs):
        was = "in Kafka" if last.logs else "in the data folder"
        raise UsageError(f"{layout.root}: made with its logs {was}, where they stay; give another --data")
    return msgspec.structs.replace(
        last, clock=clock, seed=seed, api_host=api_host, workers=workers, size=size, shards=shards, logs=logs, **ports
    )


def parse_origin(text: str) -> int:
    """Return `--origin` as Unix ms; raises UsageError."""
    try:
        return from_iso(text)
    except ValueError:
        raise UsageError(f"--origin {text!r}: expected an ISO 8601 time such as 2026-01-01T08:00:00+08:00") from None


def parse_speed(speed: float) -> float:
    """Return `--speed`; raises UsageError."""
    if not 0 < speed <= 10_000:
        raise UsageError(f"--speed {speed:g}: expected more than 0, at most 10000")
    return speed


# --- running ----------------------------------------------------------------------------------------------------


def parts_of(layout: Layout, run: Run, *, simulate: bool) -> list[Part]:
    """Return the processes of a run, in the order in which they start."""

    def own(*words: str) -> tuple[str, ...]:
        # -P: modules come from the installation, never from the folder we happen to be started in.
        return (sys.executable, "-P", "-m", "citybrain", words[0], "--data", str(layout.root), *words[1:])

    installed = mosquitto()
    broker = broker_command(layout, run.mqtt_port, installed)
    parts = [
        Part("broker", broker, port=run.mqtt_port, heartbeat=installed is None, wave=2),
        Part("migrate", own("migrate"), once=True),
        Part("ingest", own("ingest", *run.logs), proof="connected", least=1.0, wave=1),
        *(Part(name, own("worker", *which, *run.logs), proof="lag_s", wave=1) for name, which in workers_of(run)),
        Part("history", own("history", *run.logs), proof="history_lag_s", wave=1),
        Part("desk", own("desk", *run.logs), after=("migrate",), proof="lag_s", wave=1),
        Part("api", own("api", *run.logs), after=("migrate",), port=run.api_port, wave=1),
    ]
    if (layout.root / "influx.yaml").exists():
        parts.append(Part("influx", own("influx"), proof="influx_lag_s", wave=1))
    agreed = layout.clouds / "simulated.yaml" if simulate else layout.root / "clouds.yaml"
    if simulate or agreed.exists():
        cloud = own("cloud", "--config", str(agreed))
        parts.append(Part("cloud", cloud, after=("contract",) if simulate else (), port=run.cloud_port, wave=1))
    if simulate:
        parts += [
            Part("contract", own("operator", "--provision"), once=True),
            Part("operator", own("operator"), after=("contract", "provision"), port=run.operator_port, wave=0),
            Part("provision", own("simulate", "--provision"), once=True),
            Part("platform", own("platform"), port=run.platform_port, wave=1),
            Part("simulate", own("simulate"), after=("provision",), wave=0),
        ]
    return parts


def workers_of(run: Run) -> list[tuple[str, tuple[str, ...]]]:
    """Return each worker's name and arguments: the shards are dealt out to them in turn."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for first in range(min(run.workers, run.shards)):
        shards = range(first, run.shards, min(run.workers, run.shards))
        name = process_name("worker", shards, run.shards)
        found.append((name, () if len(shards) == run.shards else ("--shards", ",".join(map(str, shards)))))
    return found


def usual_workers(shards: int, cores: int) -> int:
    """Return how many engines to run where nobody says: one for a zone, else half of the cores, at most the shards.

    [U] our choice: the other half is for ingest, the desk and whoever asks.
    """
    return 1 if shards <= SHARDS_OF_SIZE["zone"] else max(1, min(shards, cores // 2))


def supervise(supervisor: Supervisor, run: Run, say: Say, stop: threading.Event, *, as_json: bool) -> None:
    """Keep the processes up until `stop` is set; say when all of them are ready."""
    began_s, live, warned = monotonic_s(), False, False
    while not stop.is_set():
        supervisor.step()
        if not live:
            missing = supervisor.waiting_for(run.host)
            took_s = monotonic_s() - began_s
            live = not missing
            if live:
                _announce(run, took_s, say, as_json=as_json)
            elif took_s > SLOW_S and not warned:
                warned = True
                names = ", ".join(missing)
                say(f"仍在等待 {names}", f"still waiting for {names}; their logs are in the run folder")
        wait_s(0.2 if live else 0.05, stop)


def _announce(run: Run, took_s: float, say: Say, *, as_json: bool) -> None:
    url = f"http://{run.host}:{run.api_port}/"
    say(f"已就绪({took_s:.1f} 秒),状态页 {url},按 Ctrl-C 停止", f"live after {took_s:.1f} s, Ctrl-C stops")
    if as_json:
        emit({"live": True, "took_s": round(took_s, 1), "url": url, **msgspec.to_builtins(run)}, as_json=True)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--simulate", action="store_true", help="run a simulated zone or district and a grid platform beside it"
    )
    parser.add_argument("--prepare", action="store_true", help="make the data folder, keys and run.json; start nothing")
    parser.add_argument("--api-host", metavar="IP", help="with --prepare: where the API listens in its container")
    parser.add_argument("--origin", metavar="ISO", help="platform time to start at (default: now)")
    parser.add_argument("--speed", type=float, metavar="X", help="platform seconds per real second (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="what the simulation draws from (default: 7)")
    parser.add_argument("--size", choices=SHARDS_OF_SIZE, help="with --simulate, at the first start (default: zone)")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="partitions of the log, at the first start (default: 2)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="engines that share the shards (default: by cores)")
    add_arguments(parser)
    parser.set_defaults(log=None)  # as in the last run
    for field, name in PORTS.items():
        help_ = f"loopback port of {name} (default: the last run's, or {getattr(DEFAULTS, field)} if it is free)"
        parser.add_argument("--" + field.replace("_", "-"), type=int, metavar="N", help=help_)


def _run(args: argparse.Namespace) -> int:
    stop = _stop_on_signals()
    layout, say = Layout(Path(args.data)), Console(sys.stderr)
    layout.make()
    with lock(layout):
        run = decide(args, layout, say)
        layout.write_run(run)
        make_secrets(layout)
        if args.prepare:
            emit(msgspec.to_builtins(run), as_json=args.json)
            return 0
        counters = Counters("run", layout.run)
        counters.resume()
        say(
            f"数据 {layout.root},端口 MQTT {run.mqtt_port} · API {run.api_port} · 平台 {run.platform_port}",
            f"data in {layout.root}, starting",
        )
        supervisor = Supervisor(parts_of(layout, run, simulate=args.simulate), layout.run, say, counters)
        try:
            supervise(supervisor, run, say, stop, as_json=args.json)
        finally:
            began_s = monotonic_s()
            say("正在停止", "stopping")
            supervisor.stop()
            say(f"已停止({monotonic_s() - began_s:.1f} 秒)", "stopped")
    return 0


command = Subcommand("run everything on this machine; Ctrl-C stops it", _arguments, _run)
