"""`citybrain run`: the supervisor with real processes, what a run agrees on, and the whole product started for real."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from citybrain.clock import RunClock, real_unix_ms
from citybrain.counters import Counters, Heartbeat
from citybrain.errors import Unavailable, UsageError
from citybrain.layout import Layout, Run
from streams.runtimes.embedded import PORTS, decide, lock, make_secrets, parts_of
from streams.runtimes.supervisor import GRACE_S, LOG_BYTES, Failed, Part, Supervisor, cut_log
from tests.conftest import end, eventually, unused_port

FOREVER = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True);"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def gone(pid: int) -> bool:
    try:
        with Path(f"/proc/{pid}/stat").open() as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Heard:
    """Keeps what a person would have read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, zh: str, en: str) -> None:
        assert zh
        self.lines.append(en)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def supervisor_of(folder: Path, heard: Heard, *parts: Part) -> Supervisor:
    return Supervisor(parts, folder, heard, Counters("run", folder))


def pid_of(supervisor: Supervisor, name: str) -> int:
    process = supervisor.children[name].process
    return process.pid if process is not None and process.poll() is None else 0


def stepping(supervisor: Supervisor, holds: Callable[[], bool]) -> Callable[[], bool]:
    """Return a condition that lets the supervisor do a step whenever it is looked at."""

    def look() -> bool:
        supervisor.step()
        return holds()

    return look


# --- the supervisor ---------------------------------------------------------------------------------------------


def test_a_killed_process_is_started_again_and_counted(tmp_path: Path, heard: Heard) -> None:
    part = Part("sleeper", python(FOREVER + "signal.pause()"), heartbeat=False)
    supervisor = supervisor_of(tmp_path, heard, part)
    try:
        supervisor.step()
        first = pid_of(supervisor, "sleeper")
        os.kill(first, signal.SIGKILL)
        eventually(stepping(supervisor, lambda: pid_of(supervisor, "sleeper") not in (0, first)))
        assert heard.lines == [f"sleeper ended (signal 9), restarting in 0.2 s; log: {tmp_path / 'sleeper.log'}"]
        beat = json.loads((tmp_path / "run.heartbeat.json").read_bytes())
        assert beat["process"] == "run"
    finally:
        supervisor.stop()
    last = msgspec.json.decode((tmp_path / "run.heartbeat.json").read_bytes(), type=Heartbeat)
    assert last.counters == {"restarts_total{process=sleeper}": 1}


def test_a_process_that_cannot_live_is_started_ever_more_rarely(tmp_path: Path, heard: Heard) -> None:
    part = Part("broken", python("raise SystemExit('no such file: x.yaml')"), heartbeat=False)
    supervisor = supervisor_of(tmp_path, heard, part)
    try:
        eventually(stepping(supervisor, lambda: len(heard.lines) >= 2))
    finally:
        supervisor.stop()
    assert "restarting in 0.2 s; no such file: x.yaml" in heard.lines[0]
    assert "restarting in 0.5 s" in heard.lines[1]


def test_processes_wait_for_what_prepares_them(tmp_path: Path, heard: Heard) -> None:
    made = tmp_path / "made"
    supervisor = supervisor_of(
        tmp_path,
        heard,
        Part("prepare", python(f"open({str(made)!r}, 'w').write('x')"), once=True),
        Part(
            "use",
            python(f"open({str(made)!r}).read();" + FOREVER + "signal.pause()"),
            after=("prepare",),
            heartbeat=False,
        ),
    )
    try:
        eventually(stepping(supervisor, lambda: not supervisor.waiting_for("127.0.0.1")))
        assert heard.lines == []
    finally:
        supervisor.stop()


def test_a_preparation_that_fails_ends_the_run_with_its_exit_code(tmp_path: Path, heard: Heard) -> None:
    supervisor = supervisor_of(tmp_path, heard, Part("migrate", python("print('disk says no'); exit(5)"), once=True))
    with pytest.raises(Failed, match=r"migrate: disk says no \(exit code 5") as caught:
        eventually(stepping(supervisor, lambda: False))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("proof", ["", "lag_s"])
def test_ready_means_its_own_fresh_heartbeat(tmp_path: Path, heard: Heard, proof: str) -> None:
    Counters("worker", tmp_path).publish(force=True)  # somebody else's: this test's
    beats = "from citybrain.counters import Counters; from pathlib import Path; "
    beats += f"mine = Counters('worker', Path({str(tmp_path)!r})); mine.gauges[{proof!r}] = 0.0; "
    beats += "mine.publish(force=True); "
    supervisor = supervisor_of(tmp_path, heard, Part("worker", python(FOREVER + beats + "signal.pause()"), proof=proof))
    try:
        supervisor.step()
        assert supervisor.waiting_for("127.0.0.1") == ["worker"]
        eventually(lambda: not supervisor.waiting_for("127.0.0.1"))
    finally:
        supervisor.stop()


def test_stop_goes_wave_by_wave_and_kills_the_deaf(tmp_path: Path, heard: Heard) -> None:
    told = tmp_path / "told"
    polite = "import signal, sys\ndef bye(*_):\n open({0!r}, 'a').write('{1} '); sys.exit(0)\n"
    polite += "signal.signal(signal.SIGTERM, bye); print('up', flush=True)\nwhile True: signal.pause()"
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nsignal.pause()"
    parts = [
        Part("broker", python(polite.format(str(told), "broker")), heartbeat=False, wave=2),
        Part("simulate", python(polite.format(str(told), "simulate")), heartbeat=False, wave=0),
        Part("deaf", python(deaf), heartbeat=False, wave=2),
    ]
    supervisor = Supervisor(parts, tmp_path, heard, Counters("run", tmp_path), grace_s=2.0)
    supervisor.step()
    pids = [pid_of(supervisor, part.name) for part in parts]
    eventually(lambda: all((tmp_path / f"{part.name}.log").read_text() == "up\n" for part in parts))
    supervisor.stop()
    assert told.read_text() == "simulate broker "
    assert all(gone(pid) for pid in pids)
    assert heard.lines == ["deaf did not stop in time: killed"]
    assert GRACE_S + 2 <= 8  # the whole stop, with SIGKILL, within what a person waits for


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from citybrain.counters import Counters\n"
        "from streams.runtimes.supervisor import Part, Supervisor\n"
        "from citybrain.clock import wait_s\nimport sys\n"
        "deaf = 'import signal; signal.signal(15, signal.SIG_IGN); signal.pause()'\n"
        "part = Part('deaf', (sys.executable, '-c', deaf))\n"
        f"supervisor = Supervisor([part], Path({str(tmp_path)!r}), print, Counters('run'))\n"
        "supervisor.step(); print(supervisor.children['deaf'].process.pid, flush=True); wait_s(60)"
    )
    with subprocess.Popen(python(code), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        assert not gone(orphan)
        process.kill()
    eventually(lambda: gone(orphan), what="the orphan's end")


def test_logs_stay_bounded_while_they_are_written(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with log.open("ab") as writer:
        writer.write(b"a" * LOG_BYTES + b"the end\n")
        writer.flush()
        cut_log(log)
        writer.write(b"and on\n")
    assert log.read_bytes() == b"and on\n"
    kept = (tmp_path / "worker.log.1").read_bytes()
    assert kept.endswith(b"the end\n")
    assert len(kept) <= LOG_BYTES // 2


def test_alive_without_its_proof_is_not_ready(tmp_path: Path, heard: Heard) -> None:
    beats = "from citybrain.counters import Counters; from pathlib import Path; "
    beats += f"mine = Counters('ingest', Path({str(tmp_path)!r})); mine.gauges['connected'] = 0.0; "
    beats += "mine.publish(force=True); "
    part = Part("ingest", python(FOREVER + beats + "signal.pause()"), proof="connected", least=1.0)
    supervisor = supervisor_of(tmp_path, heard, part)
    try:
        eventually(stepping(supervisor, (tmp_path / "ingest.heartbeat.json").exists))
        assert supervisor.waiting_for("127.0.0.1") == ["ingest"]
    finally:
        supervisor.stop()


# --- what a run agrees on ---------------------------------------------------------------------------------------


def asked(**given: object) -> argparse.Namespace:
    names = ("origin", "speed", "seed", *PORTS, "api_host", "workers", "size", "shards", "log", "kafka", "kafka_config")
    return argparse.Namespace(
        **{name: given.get(name) for name in names}, topics="t.", prepare=bool(given.get("prepare"))
    )


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "data")
    made.make()
    return made


def remember(layout: Layout, **fields: object) -> Run:
    ports = {name: unused_port() for name in PORTS}
    run = msgspec.convert({"clock": {"origin_ms": 5, "started_ms": 6, "speed": 60.0}, **ports, **fields}, Run)
    layout.write_run(run)
    return run


def test_the_first_run_lives_in_real_time(layout: Layout, heard: Heard) -> None:
    clock = decide(asked(), layout, heard).clock
    assert clock.origin_ms == clock.started_ms
    assert clock.speed == 1.0
    assert abs(clock.now_ms() - real_unix_ms()) < 1000


def test_a_later_run_goes_on_as_the_last_one(layout: Layout, heard: Heard) -> None:
    last = remember(layout, seed=99)
    assert decide(asked(), layout, heard) == last
    assert heard.lines == []


def test_origin_and_speed_make_simulated_time(layout: Layout, heard: Heard) -> None:
    run = decide(asked(origin="2026-01-01T08:00:00+08:00", speed=60.0, seed=3), layout, heard)
    assert run.clock.origin_ms == 1767225600000
    assert (run.clock.speed, run.seed) == (60.0, 3)


def test_a_new_speed_starts_where_platform_time_stands(layout: Layout, heard: Heard) -> None:
    remember(layout, clock={"origin_ms": 1_000_000, "started_ms": real_unix_ms(), "speed": 1.0})
    clock = decide(asked(speed=10.0), layout, heard).clock
    assert 1_000_000 <= clock.origin_ms < 1_010_000
    assert isinstance(clock, RunClock)


def test_a_usual_port_that_is_taken_gives_way_and_says_so(layout: Layout, heard: Heard) -> None:
    last = remember(layout)
    with socket.create_server(("127.0.0.1", last.api_port)):
        run = decide(asked(), layout, heard)
    assert run.api_port != last.api_port
    assert heard.lines == [f"API port {last.api_port} is taken, using {run.api_port} instead"]
    assert run.mqtt_port == last.mqtt_port


def test_a_port_asked_for_that_is_taken_is_an_error(layout: Layout, heard: Heard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Unavailable, match=rf"port {port} \(API\)"):
            decide(asked(api_port=port), layout, heard)


def test_prepared_elsewhere_a_port_may_be_taken(layout: Layout, heard: Heard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        prepared = decide(asked(mqtt_port=port, prepare=True, api_host="10.0.0.2"), layout, heard)
    assert (prepared.mqtt_port, prepared.api_host, prepared.host) == (port, "10.0.0.2", "127.0.0.1")
    layout.write_run(prepared)
    assert decide(asked(), layout, heard).api_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"origin": "yesterday"}, "--origin 'yesterday'"),
        ({"speed": 0.0}, "--speed 0"),
        ({"speed": float("nan")}, "--speed nan"),
        ({"api_port": 0}, "--api-port 0"),
        ({"api_port": 70_000}, "--api-port 70000"),
        ({"shards": 0}, "--shards 0"),
        ({"shards": 257}, "--shards 257"),
        ({"workers": 3}, "--workers 3"),
        ({"api_port": 20_001, "mqtt_port": 20_001}, "the ports must differ"),
        ({"api_host": "0.0.0.0"}, "--api-host: only with --prepare"),
    ],
)
def test_senseless_options_are_refused(layout: Layout, heard: Heard, given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decide(asked(**given), layout, heard)


def test_size_and_shards_stay_as_the_data_folder_was_made(layout: Layout, heard: Heard) -> None:
    made = decide(asked(size="reference"), layout, heard)
    assert (made.size, made.shards) == ("reference", 4)
    layout.write_run(made)
    assert decide(asked(), layout, heard).shards == 4
    for given in ({"size": "zone"}, {"shards": 2}, {"shards": 0}):
        with pytest.raises(UsageError, match="made with --size reference --shards 4, which stay"):
            decide(asked(**given), layout, heard)


def test_where_the_logs_are_stays_and_every_process_is_told(layout: Layout, heard: Heard) -> None:
    with pytest.raises(UsageError, match="say where it is, with --kafka"):
        decide(asked(log="kafka"), layout, heard)
    made = decide(asked(log="kafka", kafka="k:1", kafka_config=Path("access.yaml")), layout, heard)
    layout.write_run(made)
    assert decide(asked(), layout, heard).logs == made.logs
    assert decide(asked(log="kafka", kafka="k:2"), layout, heard).logs[3] == "k:2"  # it may move
    with pytest.raises(UsageError, match="made with its logs in Kafka, where they stay"):
        decide(asked(log="segments"), layout, heard)
    parts = {part.name: part.argv for part in parts_of(layout, made, simulate=True)}
    told = {name for name, argv in parts.items() if argv[-len(made.logs) :] == made.logs}
    assert told == {"ingest", "worker", "history", "desk", "api"}


def test_secrets_are_made_once_and_kept_from_others(layout: Layout) -> None:
    assert make_secrets(layout) == ["platform.key", "verdict.key"]
    keys = {path.name: path.read_text() for path in layout.secrets.iterdir()}
    assert set(keys) == {"platform.key", "verdict.key"}
    assert len(set(keys.values())) == 2
    assert all(text.startswith("whsec_") for text in keys.values())
    assert {stat.S_IMODE(path.stat().st_mode) for path in layout.secrets.iterdir()} == {0o600}
    assert make_secrets(layout) == []
    assert {path.name: path.read_text() for path in layout.secrets.iterdir()} == keys


def test_a_data_folder_has_one_run_at_a_time(layout: Layout) -> None:
    with lock(layout), pytest.raises(Unavailable, match=rf"process {os.getpid()}\) works on this data folder"):
        lock(layout)
    with lock(layout):
        pass


# --- everything -------------------------------------------------------------------------------------------------


class Started:
    """A `citybrain run --simulate` on free ports."""

    def __init__(self, process: subprocess.Popen[bytes], layout: Layout, live: dict[str, object]) -> None:
        self.process = process
        self.layout = layout
        self.live = live

    def pid(self, name: str) -> int:
        beat = msgspec.json.decode((self.layout.run / f"{name}.heartbeat.json").read_bytes(), type=Heartbeat)
        return beat.pid if beat.live(real_unix_ms()) and not gone(beat.pid) else 0

    def descendants(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                if path.read_text().rsplit(")", 1)[1].split()[1] == str(self.process.pid):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


def arguments(data: Path, *more: str) -> list[str]:
    ports = [f"--{name.replace('_', '-')}={unused_port()}" for name in PORTS]
    return [sys.executable, "-m", "citybrain", "run", "--data", str(data), *ports, *more]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    data = tmp_path_factory.mktemp("run") / "data"
    with subprocess.Popen(arguments(data, "--simulate", "--json"), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            live = json.loads(process.stdout.readline() or "{}")
            yield Started(process, Layout(data), live)
        finally:
            end(process)


def test_everything_is_live_in_time(started: Started) -> None:
    assert started.live.get("live") is True, "see the logs in its run folder"
    assert isinstance(started.live["took_s"], float)
    assert started.live["took_s"] < 20
    names = ("ingest", "worker", "history", "desk", "api", "cloud", "platform", "operator", "simulate")
    assert all(started.pid(name) for name in names)
    assert len(started.descendants()) == len(names) + 1  # and the broker
    status = subprocess.run(
        [sys.executable, "-m", "citybrain", "status", "--data", str(started.layout.root), "--json"],
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert {"readings", "dropped", "alarms_open", "incidents_open", "cases", "delivered", "closed", "lag_s"} <= set(
        json.loads(status.stdout)
    )


def test_a_second_run_on_its_data_folder_is_refused(started: Started) -> None:
    second = subprocess.run(arguments(started.layout.root), capture_output=True, timeout=30, check=False)
    assert second.returncode == 4
    assert f"process {started.process.pid}".encode() in second.stderr


@pytest.mark.parametrize("name", ["worker", "desk"])
def test_a_killed_process_comes_back(started: Started, name: str) -> None:
    before = started.pid(name)
    assert before
    os.kill(before, signal.SIGKILL)
    eventually(lambda: started.pid(name) not in (0, before), 20, f"a new {name}")


def test_interrupted_it_leaves_nothing_behind(started: Started) -> None:
    children = started.descendants()
    assert children
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(10) == 0
    assert all(gone(pid) for pid in children)
