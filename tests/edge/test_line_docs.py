"""The pages of the drivers that listen to frames: samples are valid, every field stands there, examples are true."""

from __future__ import annotations

from types import ModuleType

import pytest

from edge import codes, frames
from edge import drivers as registry
from edge.drivers import elevator_retrofit, elevator_serial, pressure_fast, vibration
from edge.lifts import shaft
from edge.signals import features, hammer, raw
from tests.edge import test_edge_docs as pages

PAGES = {
    "drivers/elevator_serial.md": (elevator_serial.Config, elevator_serial.Seat),
    "drivers/elevator_retrofit.md": (elevator_retrofit.Config, elevator_retrofit.Kit),
    "drivers/vibration.md": (vibration.Config, vibration.Sensor),
    "drivers/pressure_fast.md": (pressure_fast.Config, pressure_fast.Sensor),
}


@pytest.mark.parametrize(("page", "kinds"), PAGES.items())
def test_the_sample_is_valid_and_every_field_stands_there(page: str, kinds: tuple[type, ...]) -> None:
    pages.test_the_sample_of_a_page_is_valid(page)
    pages.test_every_field_stands_in_its_page(page, kinds)


@pytest.mark.parametrize(
    "module", [codes, features, frames, hammer, raw, registry, shaft], ids=lambda one: one.__name__
)
def test_examples(module: ModuleType) -> None:
    pages.test_examples(module)
