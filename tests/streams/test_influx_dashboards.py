"""Every query of every dashboard, run on a real VictoriaMetrics that a real run was projected and scraped into.

The run is `citybrain run --simulate`, 40 times as fast as the clock, with `influx.yaml` in its data folder; so what the
processes call their counters and what the projection calls its metrics is what the dashboards are held against.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from citybrain.clock import real_unix_ms
from citybrain.counters import Heartbeat, read_heartbeats
from citybrain.layout import Layout
from tests.conftest import end, eventually
from tests.site.test_run import arguments
from tests.victoria import Victoria

pytestmark = pytest.mark.timeout(420)  # 20 s on an idle machine; under load the run takes as long as it takes
DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
FALLBACK = re.compile(r" or vector\(0\)")  # a panel shows 0 where there is nothing; the test wants the thing
# What a good run has none of: nobody called an alarm false.
MAY_BE_EMPTY = ("citybrain_verdicts_false_alarm_total",)


class Scene:
    """A server, and the time (s) that its data spans."""

    def __init__(self, server: Victoria, begin_s: float, end_s: float) -> None:
        self.server, self.begin_s, self.end_s = server, begin_s, end_s

    def run(self, query: str) -> list[dict[str, Any]]:
        asked: dict[str, Any] = {"query": query, "start": self.begin_s, "end": self.end_s, "step": "10s"}
        found = httpx.get(f"{self.server.url}/api/v1/query_range", params=asked, timeout=30, trust_env=False)
        assert found.status_code == 200, f"{query}: {found.text}"
        result: list[dict[str, Any]] = found.json()["data"]["result"]
        return result

    def label(self, key: str, match: str) -> list[str]:
        asked: dict[str, Any] = {"match[]": match, "start": self.begin_s, "end": self.end_s}
        found = httpx.get(f"{self.server.url}/api/v1/label/{key}/values", params=asked, timeout=30, trust_env=False)
        assert found.status_code == 200, found.text
        values: list[str] = found.json()["data"]
        return values


def scrape(layout: Layout, server: Victoria) -> None:
    """Do what Prometheus does: fetch `/metrics`, and keep it under the time of now."""
    port = layout.read_run().api_port
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10, trust_env=False).raise_for_status().text
    into = f"{server.url}/api/v1/import/prometheus"
    httpx.post(into, params={"timestamp": real_unix_ms()}, content=text, timeout=10).raise_for_status()


def status(layout: Layout) -> dict[str, Any]:
    port = layout.read_run().api_port
    found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/v1/status", timeout=10, trust_env=False).json()
    return found


def beat(layout: Layout, name: str) -> Heartbeat:
    return next(each for each in read_heartbeats(layout.run) if each.process == name)


def play(layout: Layout, server: Victoria) -> None:
    """Let enough happen for every panel: an error, cases that are made and closed, late gateways."""
    eventually(lambda: beat(layout, "influx").counters.get("errors_total{stage=influx}", 0), 60, "an error")
    server.start()
    scrape(layout, server)
    happened = ("maintenance_total", "delivery_retry_total", "verdicts_confirmed_total", "closed_total")
    eventually(lambda: all(beat(layout, "desk").counters.get(name) for name in happened), 180, f"{happened}")
    simulate = beat(layout, "simulate").pid
    os.kill(simulate, signal.SIGSTOP)
    try:
        eventually(lambda: len(status(layout)["gateways"]["late"]) >= 1, 60, "a late gateway")
        scrape(layout, server)
    finally:
        os.kill(simulate, signal.SIGCONT)
    eventually(lambda: beat(layout, "influx").counters.get("values_total", 0) > 1000, 60, "values in the server")
    scrape(layout, server)
    before = beat(layout, "desk").counters  # a rate needs something to happen between two scrapes that both know of it
    grown = ("transitions_total", "delivered_total")
    eventually(
        lambda: all(beat(layout, "desk").counters.get(name, 0) > before.get(name, 0) for name in grown), 120, f"{grown}"
    )
    scrape(layout, server)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    layout, server = Layout(folder / "data"), Victoria(folder / "victoria")
    layout.make()
    try:
        target = {"url": server.url, "org": "city", "bucket": "readings"}
        (layout.root / "influx.yaml").write_text(json.dumps(target))
        begin_s = real_unix_ms() / 1000 - 5
        argv = arguments(layout.root, "--simulate", "--json", "--speed", "40")
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert json.loads(process.stdout.readline() or "{}").get("live") is True, (
                    "see the logs in its run folder"
                )
                play(layout, server)
                end_s = layout.read_run().clock.now_ms() / 1000
            finally:
                end(process)
        httpx.get(f"{server.url}/internal/force_flush", timeout=10).raise_for_status()
        yield Scene(server, begin_s, end_s)
    finally:
        server.end()


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


QUERIES = [
    pytest.param(path, panel["title"], target["expr"], id=f"{path.stem}-{panel['id']}{target['refId']}")
    for path in DASHBOARDS
    for panel in read(path)["panels"]
    for target in panel["targets"]
]


def variables(path: Path) -> list[tuple[str, str, str]]:
    """Return (name, metric, label) of a dashboard's variables."""
    found = []
    for variable in read(path)["templating"]["list"]:
        match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert match, f"{path.name}: variable {variable['name']} is no label_values(metric, label)"
        found.append((variable["name"], match[1], match[2]))
    return found


@pytest.mark.parametrize(("path", "title", "query"), QUERIES)
def test_every_query_has_data(scene: Scene, path: Path, title: str, query: str) -> None:
    text = query if any(name in query for name in MAY_BE_EMPTY) else FALLBACK.sub("", query)
    for name, metric, label in variables(path):
        chosen = scene.label(label, metric)
        assert chosen, f"{path.name}: nothing to choose for {name}"
        one = [value for value in chosen if scene.run(text.replace(f"${name}", value))]
        assert one, f"{path.name}: {title}: no data for any {name}: {text}"
        text = text.replace(f"${name}", ".*")
    assert "$" not in text
    assert scene.run(text), f"{path.name}: {title}: no data: {text}"


def test_a_query_that_asks_for_what_is_not_there_would_be_seen(scene: Scene) -> None:
    assert scene.run("citybrain_health") != []
    assert scene.run("citybrain_healthy") == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_what_grafana_loads(path: Path) -> None:
    found = read(path)
    assert found["uid"] == f"citybrain-{path.stem}"
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    for title in (found["title"], *(panel["title"] for panel in found["panels"])):
        assert re.search("[\u4e00-\u9fff].* · [A-Z]|^Outbox", title), f"{path.name}: {title!r}: Chinese · English"
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/citybrain.yaml").read_text())["datasources"][0]
    for panel in found["panels"]:
        assert panel["targets"]
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
