"""The drivers' pages: their samples are valid, every field stands in them, and the maps that come along are sound."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import ModuleType

import pytest

from api.assets.kinds import metrics_of
from citybrain.units import METRICS
from edge import limits, report
from edge.drivers import camera, json_lines, modbus, modbus_rtu, modbus_tcp, registers
from edge.limits import Limit
from edge.report import Report
from edge.vision import sources
from gateway.config import parse_config
from simulators.lines import wire

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "drivers/modbus.md": (
        modbus_rtu.Config,
        modbus_tcp.Config,
        modbus.Station,
        registers.Register,
        registers.RegisterMap,
    ),
    "drivers/json_lines.md": (json_lines.Config, json_lines.Value),
    "drivers/camera.md": (camera.Config, camera.RegionConfig),
    "edge.md": (Report, Limit),
}
HEAD = "gateway: gw-1\nshard: 0\nbroker: {host: 127.0.0.1}\n"


@pytest.mark.parametrize("page", ["drivers/modbus.md", "drivers/json_lines.md", "drivers/camera.md"])
def test_the_sample_of_a_page_is_valid(page: str) -> None:
    sample = re.search(r"```yaml\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert sample is not None
    assert parse_config(HEAD + sample[1], page).drivers


@pytest.mark.parametrize(("page", "kinds"), PAGES.items())
def test_every_field_stands_in_its_page(page: str, kinds: tuple[type, ...]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    fields = {name for kind in kinds for name in kind.__struct_encode_fields__}  # type: ignore[attr-defined]
    assert {name for name in fields if not re.search(rf"\b{name}\b", text)} == set()


def test_every_reason_for_which_a_driver_drops_is_documented() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    found: set[str] = set()
    for source in (Path(__file__).parents[2] / "edge").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        found |= set(re.findall(r'\b(?:drop|_lose)\("([a-z_]+)"', text))
    assert len(found) >= 8
    assert {reason for reason in found if f"`{reason}`" not in pages} == set()


@pytest.mark.parametrize("name", registers.known_maps())
def test_a_map_that_comes_along_is_read_at_once_and_names_its_source(name: str) -> None:
    found = registers.load_map(name)
    assert found.source
    assert all(one.metric in METRICS for one in found.registers)
    tables = {one.table for one in found.registers}
    assert len(registers.blocks(found.registers, found.gap)) == len(tables)
    for one in found.registers:
        assert METRICS[one.metric].low <= one.range[0] < one.range[1] <= METRICS[one.metric].high


@pytest.mark.parametrize("kind", registers.known_maps())
def test_the_platform_takes_what_a_map_gives(kind: str) -> None:
    """A map is called after the kind of its assets; a series belongs to one lane, the same at both ends."""
    metrics, events = metrics_of(kind, ["edge"])
    told = registers.load_map(kind).registers
    assert {one.metric for one in told if one.lane == "telemetry"} | {"quality"} <= set(metrics)
    assert {one.metric for one in told if one.lane == "event"} | {"local_alarm"} <= set(events)


@pytest.mark.parametrize(
    "module", [report, limits, registers, json_lines, sources, wire], ids=lambda module: str(module.__name__)
)
def test_examples(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
