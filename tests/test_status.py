"""`citybrain status`: quick, honest about what is not live, and never taken in by another run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from api.status import KEYS, language, lines
from citybrain.clock import RunClock
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


def test_lines_name_every_process_and_drop() -> None:
    process_ = {"pid": 7, "live": True, "ready": False}
    found = lines(
        {"readings": 1, "dropped": {}, "alarms_open": 0, "incidents_open": 0, "cases": 0, "cases_open": 0, "rescues": 0,
         "rescues_open": 0, "maintenance": 0, "closed": 0, "delivered": 0, "undelivered": 0, "lag_s": 0.0,
         "gateways": {"online": 0, "total": 0}, "processes": {"desk": process_}},
        "zh",
    )  # fmt: skip
    assert any("desk" in line and "未就绪" in line for line in found)
