"""Fast pressure: strokes of water hammer are found, told at once, and what only looks like one is not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from citybrain.errors import ConfigError
from edge.driver import Quality
from edge.signals.hammer import Hammer, Stroke
from simulators.lines.pressure import REST_MPA, SAMPLES, Transmitter, ringing
from simulators.lines.talker import Talker, Told
from tests.line_site import LineSite

RATE_HZ = 100.0


def noisy(values: list[float], noise_mpa: float = 0.002) -> list[float]:
    noise = random.Random(1)
    return [value + noise.gauss(0, noise_mpa) for value in values]


def rest(seconds: float, mpa: float = REST_MPA) -> list[float]:
    return [mpa] * round(seconds * RATE_HZ)


def stroke(amplitude_mpa: float, seconds: float = 4.0) -> list[float]:
    return [REST_MPA + ringing(n / RATE_HZ, amplitude_mpa) for n in range(round(seconds * RATE_HZ))]


def found(samples: list[float]) -> tuple[Hammer, list[Stroke]]:
    hammer = Hammer(RATE_HZ, 0.1, 1.0)
    return hammer, hammer.take(samples)


@pytest.mark.parametrize("amplitude_mpa", [0.15, 0.4, 0.9, -0.3])
def test_a_stroke_is_told_once_with_its_amplitude_and_when_it_is_over(amplitude_mpa: float) -> None:
    hammer, told = found(noisy(rest(5) + stroke(amplitude_mpa) + rest(3)))
    assert [one.amplitude_mpa for one in told] == pytest.approx([abs(amplitude_mpa), 0], abs=0.02)
    assert told[0].place / RATE_HZ - 5 < 0.3  # at once: when the first swing is back
    assert told[1].place / RATE_HZ - 5 < 6
    assert (hammer.strokes, hammer.steps) == (1, 0)


def test_strokes_are_counted_one_by_one() -> None:
    hammer, told = found(noisy(rest(5) + 3 * (stroke(0.4) + rest(4))))
    assert hammer.strokes == 3
    assert [one.amplitude_mpa > 0 for one in told] == [True, False] * 3


@pytest.mark.parametrize(
    "samples",
    [
        rest(10) + rest(10, 0.55),  # a pump starts: a new pressure
        [REST_MPA + 0.3 * n / 2000 for n in range(2000)],  # it rises within 20 s
        [REST_MPA + 0.05 * math.sin(2 * math.pi * n / 80) for n in range(3000)],  # swings that are too small
        [*rest(5), REST_MPA + 0.5, *rest(5)],  # one sample alone
        rest(5) + rest(1.5, 0.6) + rest(5),  # it is back, but not within a second
    ],
    ids=["step", "ramp", "small", "glitch", "slow"],
)
def test_what_only_looks_like_a_stroke_is_none(samples: list[float]) -> None:
    hammer, told = found(noisy(samples))
    assert (hammer.strokes, told) == (0, [])


def test_a_surge_that_settles_a_little_higher_is_a_stroke() -> None:
    shifted = [value + 0.03 for value in stroke(0.5)]
    hammer, told = found(noisy(rest(5) + shifted + rest(5, REST_MPA + 0.03)))
    assert hammer.strokes == 1
    assert told[0].amplitude_mpa == pytest.approx(0.53, abs=0.02)


@given(st.lists(st.floats(0, 1.6), max_size=400), st.integers(1, 50))
def test_how_samples_are_cut_into_frames_changes_nothing(samples: list[float], size: int) -> None:
    _, whole = found(samples)
    hammer, told = Hammer(RATE_HZ, 0.1, 1.0), []
    for start in range(0, len(samples), size):
        part = hammer.take(samples[start : start + size])
        told += [Stroke(start + one.place, one.amplitude_mpa) for one in part]
    assert told == whole
    begun = 0
    for one in told:  # a stroke begins, may grow, and ends
        assert one.amplitude_mpa > begun or one.amplitude_mpa == 0 < begun
        begun = one.amplitude_mpa  # type: ignore[assignment]


# --- on the line ---


class Main:
    """A transmitter on a line, and the driver that listens to it."""

    def __init__(self, port: Path) -> None:
        self.transmitter = Transmitter(1, RATE_HZ)
        self.lose = 0
        self.talker = Talker(port, 115_200, self._frames, SAMPLES / RATE_HZ)
        self.talker.start()
        self.site = LineSite(
            f"driver: pressure_fast\nport: {port}\nrate_hz: 100\ninterval: 1s\nsilence: 1s\n"
            "devices: [{device: hyd-1, station: 1, high_mpa: 1.6}]"
        )

    def _frames(self, _: float) -> list[Told]:
        told = self.transmitter.frame()
        self.lose = max(0, self.lose - 1)
        return [] if self.lose else [told]


@pytest.fixture
def main(tmp_path: Path) -> Iterator[Main]:
    made = Main(tmp_path / "pressure")
    yield made
    made.site.hosts.stop(0)
    made.talker.stop()


def test_a_slammed_valve_is_an_event_and_an_interval_has_its_extremes(main: Main) -> None:
    site = main.site
    site.until(lambda: site.of("hyd-1", "pressure_mpa"))
    assert site.of("hyd-1", "pressure_mpa")[0] == pytest.approx(REST_MPA, abs=0.002)
    assert site.of("hyd-1", "hammer_count") == [0.0]
    site.until(lambda: site.of("hyd-1", "hammer_mpa") == [0.0], what="it is told once that nothing hammers")
    main.transmitter.slam(0.4)
    site.until(lambda: len(site.of("hyd-1", "hammer_mpa")) == 2)
    assert site.of("hyd-1", "hammer_mpa")[1] == pytest.approx(0.4, abs=0.02)
    assert [sorted(one) for one in site.events("hyd-1")] == [["hammer_mpa"]] * 2
    site.until(lambda: sum(site.of("hyd-1", "hammer_count")) == 1)
    assert max(site.of("hyd-1", "pressure_max_mpa")) == pytest.approx(REST_MPA + 0.4, abs=0.02)
    assert min(site.of("hyd-1", "pressure_min_mpa")) < REST_MPA - 0.15
    site.until(lambda: site.of("hyd-1", "hammer_mpa")[-1] == 0.0)
    main.transmitter.slam(0.5)
    site.until(lambda: site.of("hyd-1", "hammer_mpa")[-1] > 0.4)
    main.transmitter.broken = -1  # what is not seen any more is over, and not for ever
    site.until(lambda: site.of("hyd-1", "hammer_mpa")[-1] == 0.0)


def test_a_broken_wire_and_missing_samples_are_said_and_are_no_stroke(main: Main) -> None:
    site = main.site
    site.until(lambda: site.of("hyd-1", "pressure_mpa"))
    main.transmitter.broken = -1
    site.until(lambda: site.quality("hyd-1") is Quality.IMPLAUSIBLE)
    assert site.dropped("impossible_samples") > 0
    main.transmitter.broken = None
    site.until(lambda: site.quality("hyd-1") is Quality.GOOD)
    main.lose = 3
    main.transmitter.rest_mpa = 0.6  # while nobody looks
    site.until(lambda: site.dropped("missing_samples") == 2 * SAMPLES)
    assert site.dropped("incomplete_window") >= 1
    site.until(lambda: site.of("hyd-1", "pressure_mpa")[-1] > 0.59)
    assert set(site.of("hyd-1", "hammer_mpa")) == {0.0}
    assert sum(site.of("hyd-1", "hammer_count")) == 0
    main.talker.say((1, 18, b"\x00" * 10))
    site.until(lambda: site.dropped("bad_payload") == 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("rate_hz: 10", "rate_hz: expected 50 to 5000, got 10"),
        ("interval: 100ms", "interval: expected at least 1s"),
        ("hammer_mpa: 0", "hammer_mpa: expected more than 0"),
        ("hammer_back: 1ms", "hammer_back: expected 50ms to 5s"),
        ("devices: [{device: a, station: 1, low_mpa: 2, high_mpa: 1}]", "expected -0.1 <= low_mpa < high_mpa <= 5"),
    ],
)
def test_a_wrong_configuration_is_refused(change: str, expected: str) -> None:
    lines = {"port": "/dev/x", "rate_hz": "100", "devices": "[{device: a, station: 1}]"}
    name, _, value = change.partition(": ")
    text = "\n".join(f"{key}: {given}" for key, given in (lines | {name: value}).items())
    with pytest.raises(ConfigError) as caught:
        LineSite(f"driver: pressure_fast\n{text}")
    assert expected in str(caught.value)
