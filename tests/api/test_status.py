"""`citybrain status`: quick, honest about what is not live, and never taken in by another run."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import vitals as vitals_of
from api.disk import Disk, DiskWatch
from api.health import Ending, Late, Misplaced, Reason, Stage, Vitals, judge, level_of
from api.processes import not_live, of_this_run
from api.status import KEYS, lines, verdict
from citybrain.cli import language
from citybrain.clock import RunClock
from citybrain.counters import BOUNDS_S, Counters, Delays, Heartbeat, percentile, read_heartbeats
from citybrain.layout import Layout
from tests.seeded_site import Seeded, process, seeded


def status(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "citybrain", "status", "--data", str(root), *words]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LANG", "LC_"))}
    return subprocess.run(argv, capture_output=True, text=True, env={**clean, **environment}, check=False, timeout=30)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seeded]:
    made = seeded(tmp_path_factory.mktemp("site"))
    made.seed_night()
    made.beat()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        yield made


def test_a_live_run_in_json(site: Seeded) -> None:
    site.beat()
    done = status(site.layout.root, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found)[: len(KEYS)] == list(KEYS)
    assert {key: found[key] for key in KEYS if key not in ("processes", "dropped")} == {
        "readings": 4200, "alarms_open": 6, "incidents_open": 4, "cases": 5, "delivered": 1, "closed": 1,
        "lag_s": 0.25, "rescues": 2, "maintenance": 1,
    }  # fmt: skip
    assert found["dropped"] == {"late": 2, "unknown_gateway": 3}
    assert found["processes"]["ingest"]["ready"] is True
    assert found["undelivered"] == 1


def test_a_terminal_reads_its_own_language(site: Seeded) -> None:
    site.beat()
    zh = status(site.layout.root, LANG="zh_CN.UTF-8", PYTHONUTF8="1").stdout
    assert "未结束报警: 6" in zh
    assert "（在办 2）" in zh
    en = status(site.layout.root, LANG="C.UTF-8").stdout
    assert "alarms open: 6" in en
    assert "ingest     ready" in en
    assert not any("\u4e00" <= sign <= "\u9fff" for sign in en)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"), ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "de_DE"}, "en"),
        ({"LANG": "zh_CN", "LC_ALL": "C"}, "en"), ({"LC_MESSAGES": "zh_HK", "LANG": "C"}, "zh"),
    ],
)  # fmt: skip
def test_which_language(environment: dict[str, str], expected: str) -> None:
    assert language(environment) == expected


@pytest.mark.parametrize("missing", ["ingest", "worker", "desk"])
def test_not_live_without_each_of_them(site: Seeded, missing: str) -> None:
    (site.layout.run / f"{missing}.heartbeat.json").unlink()
    try:
        done = status(site.layout.root, "--json")
        assert done.returncode == 4
        assert done.stdout == ""
        assert f"{missing} has not started" in done.stderr
    finally:
        site.beat()


def test_a_stale_heartbeat_is_not_live(site: Seeded) -> None:
    path = site.layout.run / "worker.heartbeat.json"
    beat = json.loads(path.read_text())
    path.write_text(json.dumps({**beat, "at": beat["at"] - 60_000}))
    done = status(site.layout.root, "--json")
    site.beat()
    assert done.returncode == 4
    assert "worker was last heard 60 s ago" in done.stderr
    assert done.stdout == ""


def test_a_person_sees_also_what_still_works(site: Seeded) -> None:
    site.beat(without=("desk",))
    path = site.layout.run / "desk.heartbeat.json"
    beat = json.loads(path.read_text())
    path.write_text(json.dumps({**beat, "at": beat["at"] - 60_000}))
    done = status(site.layout.root, LANG="C.UTF-8")
    site.beat()
    assert done.returncode == 4
    assert done.stdout.startswith("■ down: desk does not work")
    assert "desk 6" in done.stdout
    assert "ingest     ready" in done.stdout
    assert "desk       silent" in done.stdout


def test_nothing_running_says_what_to_do(tmp_path: Path) -> None:
    made = seeded(tmp_path)
    done = status(tmp_path, "--json")
    assert done.returncode == 4
    assert f"127.0.0.1:{made.run.api_port}" in done.stderr
    assert "citybrain run" in done.stderr


def test_another_runs_api_is_not_ours(site: Seeded, tmp_path: Path) -> None:
    site.beat()
    layout = Layout(tmp_path)
    layout.make()
    layout.write_run(msgspec.structs.replace(site.run, clock=RunClock(1, 2)))
    done = status(tmp_path, "--json")
    assert done.returncode == 4
    assert "another run" in done.stderr


def test_it_imports_no_server() -> None:
    code = (
        "import sys, api.status; "
        "print([name for name in ('fastapi', 'sqlalchemy', 'numpy', 'yaml', 'httpx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LIVE = {
    "health": {"level": "well", "text": {"zh": "运行良好", "en": "well"}, "reasons": []},
    "readings": 4200, "readings_per_s": 20.5, "dropped": {"late": 2}, "dropped_per_min": {"unknown_device": 12},
    "alarms_open": 0, "incidents_open": 0, "cases": 0, "cases_open": 0, "rescues": 0, "rescues_open": 0,
    "maintenance": 0, "closed": 0, "delivered": 0, "undelivered": 0, "lag_s": 0.0,
    "lag": {"worker": {"now_s": 0.5, "p99_s": 45, "p50_s": 0.1, "process": "worker-1"}},
    "gateways": {"online": 1, "total": 2, "offline": ["gw-05"], "spooled": 7,
                 "late": [{"id": "gw-05", "late_s": 840.0, "spooled": 7}]},
    "quarantine": {"messages": 3, "devices": {"gw-01/stranger": 3}},
    "disk": {"total_bytes": 10**12, "free_bytes": 4 * 10**10, "used_share": 0.96, "data_bytes": 5 * 10**9,
             "grows_bytes_per_day": 10**9, "full_in_days": 40.0},
    "outbox": {"waiting": 2, "oldest_s": 240.0, "dead": 1},
    "processes": {"desk": {"pid": 7, "live": True, "ready": False, "restarts": 3}},
}  # fmt: skip


def test_lines_say_first_how_it_does_and_then_the_numbers() -> None:
    found = lines(LIVE, "en")
    assert found[0] == "● well"
    text = "\n".join(found)
    for part in (
        "worker 0.50 / 45.00 s", "20.5 a second (4,200 in all)", "unknown device 12 a minute (in all late 2)",
        "1/2 · 7 waiting in spools · gw-05 late for 14 min (7 spooled)", "3 (gw-01/stranger 3)",
        "96 % used, 40.0 GB free, data 5.0 GB · grows by 1.0 GB a day",
        "0 (2 waiting, the oldest for 4 min) · 1 given up",
        "desk       not ready  pid 7  restarted 3 times",
    ):  # fmt: skip
        assert part in text, part


def test_lines_in_chinese_hold_no_english_words() -> None:
    found = lines(LIVE, "zh")
    assert any("desk" in line and "未就绪" in line for line in found)
    assert any("gw-05 失联 14 分钟（待发 7）" in line for line in found)
    assert not any(word in "\n".join(found) for word in ("unknown", "late", "used", "waiting"))


def test_reasons_beyond_the_second_have_lines_of_their_own() -> None:
    reasons = [Reason("down", "missing", {"process": name}) for name in ("ingest", "worker", "desk")]
    told = [{"level": each.level, "code": each.code, "text": {"en": each.text("en")}} for each in reasons]
    assert verdict({"level": "down", "text": {"en": "down"}, "reasons": told}, "en") == [
        "■ down: ingest does not work · worker does not work", "  desk does not work",
    ]  # fmt: skip


# --- the judgement ----------------------------------------------------------------------------------------------


def said(vitals: Vitals) -> tuple[str, list[str]]:
    found = judge(vitals)
    return level_of(found), [reason.text("en") for reason in found]


def test_nothing_wrong_is_well() -> None:
    assert said(Vitals(stages={"worker": Stage(0.2, 0.1, 1.9, "worker")}, gateways=5, values_per_min=600)) == (
        "well",
        [],
    )


DAY_S = 86_400.0
GW = tuple(Late(f"gw-{n:02d}", 60.0 * n, 5) for n in (14, 2, 3))
JUDGED = [
    (Vitals(missing=("worker-1",)), "down", "worker-1 does not work"),
    (Vitals(silent=("history",)), "degraded", "history is silent"),
    (Vitals(gateways=60, late=GW), "degraded", "gateways late: 3, gw-14 for 14 min"),
    (Vitals(gateways=5, late=GW), "down", "gateways late: 3, gw-14 for 14 min"),
    (Vitals(gateways=60, late=(Late("gw-09", None, None), *GW)), "degraded", "gateways late: 4, gw-09 never heard"),
    (Vitals(disk=Disk(100, 4, 1)), "degraded", "disk 96 % full"),
    (Vitals(disk=Disk(1000, 10, 1)), "down", "disk 99 % full"),
    (Vitals(disk=Disk(100, 50, 1, grows_per_day=40.0)), "degraded", "disk full in 30 h"),
    (Vitals(stages={"worker": Stage(45, 1, 1, "worker-0")}), "degraded", "worker-0 45 s behind"),
    (Vitals(stages={"desk": Stage(600, 1, 1, "desk")}), "down", "desk 10 min behind"),
    (Vitals(stages={"ingest": Stage(0.1, 1, 2.5, "ingest")}), "degraded", "ingest slow at times (p99 2.5 s)"),
    (Vitals(values_per_min=88, dropped_per_min={"unknown_device": 12}), "degraded",
     "12 % of values dropped: unknown device"),
    (Vitals(values_per_min=88, dropped_per_min={"of_a_new_kind": 12}), "degraded",
     "12 % of values dropped: of_a_new_kind"),
    (Vitals(outbox_s=240, outbox_waiting=9), "degraded", "9 undelivered, the oldest for 4 min"),
    (Vitals(restarted={"worker": 120, "desk": 900}), "degraded", "worker restarted 2 min ago"),
    (Vitals(errors_per_min={"ingest: log": 30}), "degraded", "ingest: log errors, 30 a minute"),
    (Vitals(endings=(Ending("authority", "2", 300 * DAY_S),)), "degraded",
     "authority 2 ends in 300 d: citybrain ca rotate"),
    (Vitals(endings=(Ending("authority", "2", -1.0),)), "down", "authority 2 has ended: no gateway gets in"),
    (Vitals(endings=(Ending("list", "crl.pem", 20 * DAY_S),)), "degraded",
     "revocation list ends in 20 d and was not renewed"),
    (Vitals(endings=(Ending("list", "crl.pem", -1.0),)), "down", "revocation list has ended: no gateway gets in"),
    (Vitals(endings=(Ending("server", "citybrain", 20 * DAY_S),)), "degraded",
     "server certificate ends in 20 d and was not renewed"),
    (Vitals(endings=(Ending("server", "citybrain", 0.0),)), "down", "server certificate has ended: no gateway gets in"),
    (Vitals(endings=(Ending("service", "service-ingest", 13 * DAY_S),)), "degraded",
     "certificate of service-ingest ends in 13 d: citybrain ca sign"),
    (Vitals(endings=(Ending("service", "service-ingest", -5.0),)), "down", "certificate of service-ingest has ended"),
    (Vitals(endings=(Ending("gateway", "gw-2", 13 * DAY_S), Ending("gateway", "gw-1", 5 * DAY_S))), "degraded",
     "certificates not renewed: 2, gw-1 ends in 5 d"),
    (Vitals(endings=(Ending("gateway", "gw-1", -5 * DAY_S),)), "degraded",
     "certificates not renewed: 1, gw-1 has ended"),
    (Vitals(misplaced=(Misplaced("gw-1", 120.4), Misplaced("gw-2", 230.0))), "degraded",
     "not where the ledger has them: 2, gw-2 by 230 m"),
]  # fmt: skip


@pytest.mark.parametrize(("vitals", "level", "words"), JUDGED, ids=[words for *_, words in JUDGED])
def test_what_matters_is_said(vitals: Vitals, level: str, words: str) -> None:
    assert said(vitals) == (level, [words])
    assert all(reason.text("zh") for reason in judge(vitals))


@pytest.mark.parametrize(
    "vitals",
    [
        Vitals(values_per_min=9_000, dropped_per_min={"late": 4_000}),  # in the history; a newer value was there
        Vitals(values_per_min=9_000, dropped_per_min={"unknown_device": 12}),
        Vitals(values_per_min=1, dropped_per_min={"unknown_device": 2}),
        Vitals(disk=Disk(100, 50, 1, grows_per_day=-5.0)),
        Vitals(outbox_s=5, outbox_waiting=9),
        Vitals(stages={"worker": Stage(0.1, 1, 9, "worker", up_s=120)}),  # what had piled up while it started
        Vitals(
            endings=tuple(
                Ending(kind, "x", days * DAY_S)
                for kind, days in (("gateway", 14), ("service", 14), ("list", 30), ("server", 30), ("authority", 365))
            )
        ),
        Vitals(stages={"outbox": Stage(20, 5, 20, "desk")}),  # the platform is slow; see outbox_s
    ],
)
def test_what_does_not_matter_is_not(vitals: Vitals) -> None:
    assert said(vitals) == ("well", [])


def test_the_most_pressing_comes_first() -> None:
    vitals = Vitals(missing=("desk",), gateways=60, late=GW, disk=Disk(100, 4, 1), restarted={"api": 1})
    assert [reason.code for reason in judge(vitals)] == ["missing", "disk", "gateways_late", "restarted"]


# --- several processes of a role --------------------------------------------------------------------------------


def beat(name: str, at: int, **gauges: float) -> Heartbeat:
    return Heartbeat(name, 1, at, at, {"dropped_total{reason=late}": 2}, gauges)


def test_any_number_of_workers_and_ingests() -> None:
    now = 1_000_000
    beats = {
        each.process: each
        for each in (
            beat("ingest-0", now, connected=1), beat("ingest-1", now, connected=0),
            beat("worker-0", now, lag_s=0.5), beat("worker-1", now - 20_000, lag_s=30), beat("desk", now, lag_s=0),
        )
    }  # fmt: skip
    assert not_live(beats, now, 2) == [
        "ingest-1 is not ready (not connected to the broker)", "worker-1 was last heard 20 s ago",
    ]  # fmt: skip
    assert vitals_of.stages(beats, 1.0, now)["worker"] == Stage(30, 0, 0, "worker-1", up_s=20)
    assert vitals_of.stages(beats, 60.0, now - 20_000)["worker"].now_s == 0.5  # real seconds
    assert vitals_of.stages(beats, 60.0, now)["worker"].now_s == 20  # nothing has been done for so long, at least
    assert vitals_of.dropped(beats) == {"late": 10}
    assert vitals_of.dropped({"simulate": beat("simulate", now)}) == {}  # what it drops is not ours


def test_what_earlier_runs_left_is_left_out() -> None:
    now = 1_000_000
    run = msgspec.structs.replace(beat("run", now), details={"parts": ["worker-0", "worker-1", "api"]})
    beats = {
        each.process: each
        for each in (
            run,
            beat("worker", now - 60_000),
            beat("worker-0", now),
            beat("worker-1", now),
            beat("simulate", 1),
        )
    }
    assert set(of_this_run(beats, now, 2)) == {"run", "worker-0", "worker-1"}
    beats["run"] = msgspec.structs.replace(run, at=now - 60_000)  # in containers nobody supervises
    assert set(of_this_run(beats, now, 2)) == {"run", "worker-0", "worker-1", "simulate"}


# --- counting ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.001, 50_000), min_size=1, max_size=300), st.floats(0.01, 1.0))
def test_a_percentile_is_at_most_a_quarter_above_the_real_one(delays: list[float], share: float) -> None:
    counts: dict[int, int] = {}
    for delay in delays:
        size_ = bisect_left(BOUNDS_S, delay)
        counts[size_] = counts.get(size_, 0) + 1
    real = sorted(delays)[max(0, math.ceil(share * len(delays) - 1e-9) - 1)]
    assert real <= percentile(counts, share) <= max(real * 1.2501, BOUNDS_S[0])


def test_delays_say_the_last_minutes_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1020.0
    monkeypatch.setattr("citybrain.counters.monotonic_s", lambda: now_s)
    delays = Delays()
    delays.add(100.0)
    assert delays.told().latest == 100.0
    now_s += 290
    delays.add(0.5, 99)
    told = delays.told()
    assert (told.amount, told.most, told.latest) == (100, 100.0, 0.5)
    now_s += 30
    told = delays.told()
    assert (told.amount, told.most, told.latest, sum(told.counts)) == (99, 0.5, 0.0, 100)
    assert told.p99 == 0.5
    now_s += 300
    assert delays.told().amount == 0


def test_rates_are_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("citybrain.counters.monotonic_s", lambda: now_s)
    counters = Counters("ingest")
    counters.drop("late", 5000)  # before it was looked at first: a restart goes on with its totals
    assert counters.per_minute() == {}
    for _ in range(40):
        now_s += 5
        counters.drop("late", 1)
        rates = counters.per_minute()
    assert rates == {"dropped_total{reason=late}": 12.0}
    for _ in range(13):
        now_s += 5
        rates = counters.per_minute()
    assert rates == {}


def test_a_heartbeat_carries_rates_and_delays(tmp_path: Path) -> None:
    counters = Counters("worker", tmp_path)
    counters.probes.append(lambda: counters.details.update(asked=True))
    counters.delayed("lag_s", 0.25, 3)
    counters.publish(force=True)
    (found,) = read_heartbeats(tmp_path)
    assert found.delays["lag_s"].amount == 3
    assert found.delays["lag_s"].p99 == 0.25
    assert found.details == {"asked": True}


def test_disk_growth_needs_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("api.disk.monotonic_s", lambda: now_s)
    watch = DiskWatch(tmp_path)
    assert watch.told().grows_per_day is None
    watch.look()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "log").write_bytes(b"x" * 1_000_000)
    now_s += 864
    watch.look()
    found = watch.told()
    assert found.data >= 1_000_000
    assert found.grows_per_day == pytest.approx((found.data - 0) * 100, rel=0.02)
    assert found.full_in_days is not None
    assert 0 < found.used_share < 1


def test_every_counter_is_documented() -> None:
    """Names that stand in the sources as `add("x_total"…)`, `counts["x"]` of the desk, or `…["x_total"]`."""
    root = Path(__file__).parents[2]
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (root / "docs").glob("*.md"))
    found: set[str] = set()
    for package in ("api", "streams", "edge", "gateway", "citybrain", "simulators"):
        for source in (root / package).rglob("*.py"):
            text = source.read_text(encoding="utf-8")
            found |= set(re.findall(r'\b(?:add|delayed)\(\s*"([a-z_]+_total)"', text))
            found |= set(re.findall(r'(?:counts|values)\[f?"([a-z_]+_total)', text))
            found |= {f"{name}_total" for name in re.findall(r'ledger\.counts\["([a-z_]+)"\]', text)}
            found |= set(re.findall(r'gauges\["([a-z_]+)"\]', text))
    assert len(found) >= 40
    assert {name for name in found if f"`{name}" not in pages} == set()


def test_a_desk_that_stands_by_is_shown_and_missed_only_where_none_works() -> None:
    def beat(name: str, at: int, **gauges: float) -> Heartbeat:
        return Heartbeat(name, 1, at, 0, {}, gauges)

    now = 100_000
    others = {"ingest": beat("ingest", now, connected=1.0), "worker": beat("worker", now, lag_s=0.0)}
    waiting = {"desk-b": beat("desk-b", now, standby=1.0)}
    both = {**others, "desk": beat("desk", now - 900, lag_s=0.1, standby=0.0), **waiting}
    assert not_live(both, now, 2) == []
    assert set(of_this_run(both, now, 2)) == set(both)
    assert not_live({**others, **waiting}, now, 2) == ["desk-b is not ready (it stands by, and no desk works)"]
    silent = {**both, "desk": beat("desk", now - 20_000, lag_s=0.1)}
    assert not_live(silent, now, 2) == ["desk was last heard 20 s ago"]
    took_over = {**silent, "desk-b": beat("desk-b", now, lag_s=0.0, standby=0.0)}
    assert not_live(took_over, now, 2) == []
    assert set(of_this_run(took_over, now, 2)) == {*others, "desk-b"}
