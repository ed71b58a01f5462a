"""Charts and exports over HTTP, from Parquet and the open tail, and what is answered where something is wrong."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from citybrain.clock import DAY_MS, MINUTE_MS
from citybrain.counters import Counters
from citybrain.layout import Layout
from citybrain.mailbox import Mailbox
from streams.history.compactor import Compactor, Limits
from streams.history.manifest import Gap
from streams.history.query import MAILBOX, Found, History, Span
from tests.api.test_api import refusal
from tests.conftest import eventually
from tests.history_logs import merge_all
from tests.seeded_site import Seeded, process, seeded
from tests.streams.test_history import flip

DEVICE, METRIC = "hyd-000001", "pressure_mpa"
MINUTES = 3000
IN_PARQUET = 2500
DIP = 1234  # the minute of one low value


def value_at(minute: int) -> float:
    return 0.05 if minute == DIP else round(0.3 + (minute * 37 % 101) / 10_000, 4)


class City(Seeded):
    """Two days of one hydrant at 1/min, most of it in Parquet, the rest in the log; a gateway that was off."""

    def fill(self) -> None:
        for minute in minutes_there():
            at, last = self.at(minute), minute in (IN_PARQUET, MINUTES - 1)
            self.frame([("gw-01", "uptime_s", at, 1.0), (DEVICE, METRIC, at, value_at(minute))], minute, commit=last)
            if minute == IN_PARQUET:
                self.compact()

    def at(self, minute: int) -> int:
        return self.now_ms - (MINUTES - minute) * MINUTE_MS

    def compact(self, limits: Limits | None = None) -> Compactor:
        for shard in (0, 1):
            compactor = Compactor(self.layout, shard, Counters("history"), limits=limits)
            compactor.start()
            while compactor.step(self.now_ms, force=True):
                pass
            if compactor.manifest.next > 1:
                self.compactor = compactor
        return self.compactor


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Iterator[City]:
    made = City(tmp_path_factory.mktemp("city"))
    made.prepare()
    made.fill()
    with process(made.layout, "api", ready=made.url + "/healthz"):
        with httpx.Client(base_url=made.url, trust_env=False, timeout=5) as client:
            eventually(lambda: client.get(f"/v1/devices/{DEVICE}").status_code == 200)
        yield made


@pytest.fixture
def city_alone(city: City, tmp_path: Path) -> City:
    """A copy of the city that a test may break."""
    for folder in ("log", "history", "blobs"):
        shutil.copytree(city.layout.root / folder, tmp_path / folder)
    alone = City(tmp_path)
    alone.now_ms = city.now_ms
    alone.layout.make()
    return alone


@pytest.fixture
def api(city: City) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=city.url, trust_env=False, timeout=10) as client:
        yield client


def minutes_there() -> list[int]:
    return [minute for minute in range(MINUTES) if not 700 < minute < 720]


def ask(api: httpx.Client, **asked: Any) -> httpx.Response:
    device = asked.pop("device", DEVICE)
    return api.get(f"/v1/devices/{device}/readings", params={"metric": METRIC, **asked})


# --- charts -----------------------------------------------------------------------------------------------------


def test_few_values_come_as_they_are_from_parquet_and_tail(api: httpx.Client, city: City) -> None:
    first, last = IN_PARQUET - 20, IN_PARQUET + 20
    body = ask(api, **{"from": city.at(first), "to": city.at(last)}).json()
    assert body["at"] == [city.at(minute) for minute in range(first, last)]
    assert body["value"] == [value_at(minute) for minute in range(first, last)]
    assert (body["bucket_ms"], body["values"], body["unit"]) == (0, 40, "MPa")
    assert body["gaps"] == body["missing"] == body["min"] == []


def test_many_values_become_buckets_that_keep_extremes(api: httpx.Client, city: City) -> None:
    body = ask(api, **{"from": city.at(0), "to": city.at(MINUTES), "points": 100}).json()
    assert body["bucket_ms"] == 30 * MINUTE_MS
    assert body["values"] == sum(body["count"]) == len(minutes_there())
    assert min(body["min"]) == 0.05
    for bucket, at in enumerate(body["at"]):
        inside = [value_at(m) for m in minutes_there() if at <= city.at(m) < at + body["bucket_ms"]]
        facts = [body[name][bucket] for name in ("min", "max", "first", "last", "count")]
        assert facts == [min(inside), max(inside), inside[0], inside[-1], len(inside)]


def test_a_second_can_be_asked_for(api: httpx.Client, city: City) -> None:
    body = ask(api, **{"from": city.at(10), "to": city.at(10) + 1000}).json()
    assert body["value"] == [value_at(10)]


def test_a_gap_is_marked_where_the_gateway_was_off(api: httpx.Client, city: City) -> None:
    body = ask(api, **{"from": city.at(0), "to": city.at(MINUTES)}).json()
    assert {"from_ms": city.at(700), "until_ms": city.at(720), "why": "evicted"}.items() <= body["gaps"][0].items()
    assert body["gaps"][0]["messages"] == 19


def test_while_a_gateway_is_silent_the_gap_is_open(city: City) -> None:
    history, last, end = History(city.layout, 2), city.at(MINUTES - 1), city.now_ms + DAY_MS
    shard = city.compactor.shard
    assert history.gaps("gw-01", shard, last, end, last + 89_000) == []
    assert history.gaps("gw-01", shard, last, end, last + 91_000) == [
        Gap("gw-01", "telemetry", last, last + 91_000, "silent")
    ]


def test_values_that_arrive_are_in_the_next_answer(api: httpx.Client, city: City) -> None:
    span = {"from": city.now_ms + 10, "to": city.now_ms + DAY_MS, "metric": "flow_lps"}
    assert ask(api, **span).json()["values"] == 0
    city.frame([(DEVICE, "flow_lps", city.now_ms + 20, 1.5)], MINUTES)
    assert ask(api, **span).json()["value"] == [1.5]
    city.compact()
    assert ask(api, **span).json()["value"] == [1.5]


# --- exports ----------------------------------------------------------------------------------------------------


def test_csv(api: httpx.Client, city: City) -> None:
    answer = ask(api, **{"from": city.at(0), "to": city.at(MINUTES), "format": "csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["x-missing-parts"] == "0"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [int(row["observed_at"]) for row in rows] == [city.at(minute) for minute in minutes_there()]
    assert [float(row["value"]) for row in rows] == [value_at(minute) for minute in minutes_there()]
    assert rows[0]["device"] == DEVICE
    assert rows[0]["time"].endswith("Z")


def test_parquet(api: httpx.Client, city: City) -> None:
    answer = ask(api, **{"from": city.at(0), "to": city.at(MINUTES), "format": "parquet"})
    table = pq.read_table(io.BytesIO(answer.content))
    assert table.column_names == ["device", "metric", "observed_at", "value"]
    assert table["value"].to_pylist() == [value_at(minute) for minute in minutes_there()]


def test_json_of_many_devices(api: httpx.Client, city: City) -> None:
    asked: dict[str, Any] = {"device": [DEVICE, "gw-01"], "from": city.at(5), "to": city.at(8), "format": "json"}
    body = api.get("/v1/export", params=asked).json()
    assert body["missing"] == []
    assert [(item["device"], item["metric"]) for item in body["items"]] == [
        *[("gw-01", "uptime_s")] * 3,
        *[(DEVICE, METRIC)] * 3,
    ]
    assert api.get("/v1/export", params=asked | {"from": 5, "to": 8}).json() == {"items": [], "missing": []}


def test_an_export_of_a_kind(api: httpx.Client, city: City) -> None:
    asked: dict[str, Any] = {"kind": "hydrant", "metric": [METRIC], "from": city.at(5), "to": city.at(8)}
    rows = list(csv.DictReader(io.StringIO(api.get("/v1/export", params=asked).text)))
    assert [row["device"] for row in rows] == [DEVICE] * 3


# --- bad input --------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused(api: httpx.Client) -> None:
    assert "no device nobody" in refusal(ask(api, device="nobody"), 404, "not_found")
    assert "no metric 'pressure_bar'" in refusal(ask(api, metric="pressure_bar"), 404, "not_found")
    assert "has no floor; it has" in refusal(ask(api, metric="floor"), 404, "not_found")
    assert "no device nobody" in refusal(api.get("/v1/export", params={"device": "nobody"}), 404, "not_found")
    refusal(api.get("/v1/export", params={"kind": "hydrant", "metric": "x"}), 404, "not_found")


@pytest.mark.parametrize(
    "asked",
    [
        {"from": 20, "to": 20},
        {"from": 30, "to": 20},
        {"from": "yesterday"},
        {"to": 2**60},
        {"points": 0},
        {"points": 10_001},
        {"format": "xlsx"},
    ],
)
def test_what_makes_no_sense_is_refused(api: httpx.Client, asked: dict[str, Any]) -> None:
    refusal(ask(api, **asked), 422, "invalid")
    refusal(api.get(f"/v1/devices/{DEVICE}/readings"), 422, "invalid")
    refusal(api.get("/v1/export"), 422, "invalid")


def test_a_damaged_file_is_left_out_said_and_reported(city_alone: City) -> None:
    city = city_alone
    compactor = city.compact()
    first, second = compactor.manifest.parts[:2]
    path = compactor.folder / first.values_file
    path.write_bytes(path.read_bytes()[:-100])
    history = History(city.layout, 2)
    chart = history.chart(DEVICE, METRIC, city.at(0), city.at(MINUTES), 5000)
    assert [missing.file for missing in chart.missing] == [first.values_file]
    assert chart.at[0] >= second.from_ms
    assert len(chart.value) == chart.values > 0
    again = history.chart(DEVICE, METRIC, city.at(0), city.at(MINUTES), 5000)
    assert (again.missing, again.value) == (chart.missing, chart.value)
    reported, _ = Mailbox(city.layout.mailbox(MAILBOX)).take()
    assert [each.body["file"] for _, each in reported] == [first.values_file]
    assert history.missing(city.at(0), city.at(MINUTES)) == chart.missing
    compactor.set_aside(first)
    assert compactor.mend() == 1
    assert history.chart(DEVICE, METRIC, city.at(0), city.at(MINUTES), 5000).values == len(minutes_there())


class Overtaken(History):
    """A history whose parts are merged, and their files removed, between looking where they are and reading them."""

    def __init__(self, layout: Layout, compactor: Compactor) -> None:
        super().__init__(layout, 2)
        self._compactor = compactor
        self.swept = 0

    def _find(self, span: Span) -> Found:
        found = super()._find(span)
        if not self.swept:
            merge_all(self._compactor)
            self.swept = self._compactor.sweep() + self._compactor.sweep()
        return found


def test_a_chart_during_a_merge_finds_all_values(city_alone: City) -> None:
    city = city_alone
    shutil.rmtree(city.layout.root / "history")
    compactor = city.compact(Limits(values=200))
    history = Overtaken(city.layout, compactor)
    assert history.chart(DEVICE, METRIC, city.at(0), city.at(MINUTES), 5000).values == len(minutes_there())
    assert history.swept > 0


def test_a_tail_that_is_long_is_read_and_not_kept(city_alone: City, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.history.tail.MOST_BYTES", 4000)
    city = city_alone
    history = History(city.layout, 2)
    for _ in range(2):
        chart = history.chart(DEVICE, METRIC, city.at(0), city.at(MINUTES), 5000)
        assert chart.value == [value_at(minute) for minute in minutes_there()]


def test_a_site_without_history_answers_from_the_log(tmp_path: Path) -> None:
    made = seeded(tmp_path)
    made.frame([(DEVICE, METRIC, made.now_ms, 0.31)])
    chart = History(made.layout, 2).chart(DEVICE, METRIC, made.now_ms - 5, made.now_ms + 5, 10)
    assert (chart.at, chart.value) == ([made.now_ms], [0.31])


def test_a_flipped_bit_is_found_by_its_checksum(city_alone: City) -> None:
    city = city_alone
    compactor = city.compact()
    flip(compactor.folder / compactor.manifest.parts[0].values_file, 1000)
    assert "checksum differs" in compactor.damage_in(compactor.manifest.parts[0])
