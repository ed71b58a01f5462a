"""Features of raw vibration against closed forms and real data, and the driver that makes them of a line's samples."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from citybrain.errors import ConfigError
from edge.driver import Quality
from edge.signals import features
from edge.signals.raw import Block, Raw, decode
from simulators.lines.accelerometer import SAMPLES, Accelerometer, sines
from simulators.lines.talker import Talker, Told
from tests.line_site import LineSite

RATE_HZ = 1000.0
TIME_S = np.arange(4000) / RATE_HZ
SKAB = Path(os.environ.get("SKAB", Path(__file__).parents[3] / "shared/data/skab"))
WINDOWS = arrays(np.float64, st.integers(16, 257), elements=st.floats(-8, 8))


def sine(amplitude: float, frequency_hz: float, offset: float = 0.0) -> features.F64:
    return np.asarray(offset + amplitude * np.sin(2 * np.pi * frequency_hz * TIME_S + 0.3))


# --- closed forms ---


@pytest.mark.parametrize("offset", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("frequency_hz", [5, 50, 125])
def test_of_a_sine_whatever_its_offset(frequency_hz: float, offset: float) -> None:
    window = sine(0.2, frequency_hz, offset)
    assert features.rms(window) == pytest.approx(0.2 / math.sqrt(2), rel=1e-6)
    assert features.kurtosis(window) == pytest.approx(1.5, rel=1e-6)
    assert features.crest(window) == pytest.approx(math.sqrt(2), rel=0.05)  # no sample need fall on the peak
    assert features.peak_to_peak(window) == pytest.approx(0.4, rel=0.05)
    assert features.a95(window) == pytest.approx(0.4, rel=0.05)


def test_of_a_square_a_triangle_and_normal_noise() -> None:
    square = np.sign(sine(1, 5))
    assert features.crest(square) == pytest.approx(1, rel=1e-2)
    assert features.kurtosis(square) == pytest.approx(1, rel=1e-2)
    triangle = 2 / np.pi * np.arcsin(sine(1, 5))
    assert features.crest(triangle) == pytest.approx(math.sqrt(3), rel=1e-2)
    assert features.kurtosis(triangle) == pytest.approx(9 / 5, rel=1e-2)
    noise = np.random.default_rng(1).normal(0, 1, 100_000)
    assert features.kurtosis(noise) == pytest.approx(3, abs=0.1)


def test_one_shock_among_hundred_waves_moves_peak_to_peak_and_kurtosis_and_not_a95() -> None:
    calm, shocked = sine(0.1, 50), sine(0.1, 50)
    shocked[1005] += 2.0
    assert features.peak_to_peak(shocked) > 5 * features.peak_to_peak(calm)
    assert (features.kurtosis(shocked) or 0) > 10 * (features.kurtosis(calm) or 0)
    assert features.a95(shocked) == pytest.approx(features.a95(calm), rel=0.05)


def test_a95_is_the_value_that_one_in_twenty_passes() -> None:
    """40 waves of growing height: of the 79 sums of neighbours the 76th is the first that 95 % do not pass."""
    phase = np.arange(40 * 100) / 100
    window = (1 + np.floor(phase)) * np.sin(2 * np.pi * phase)
    assert features.a95(window - window.mean()) == pytest.approx(2 * 38, rel=0.03)


def test_frequencies_fall_into_their_bands() -> None:
    window = sine(0.3, 10) + sine(0.4, 200)
    low, middle, high = features.band_rms(window, RATE_HZ, [(2, 20), (20, 100), (100, 500)])
    assert (low, middle, high) == pytest.approx((0.3 / math.sqrt(2), 0, 0.4 / math.sqrt(2)), abs=1e-6)


@given(WINDOWS)
def test_bands_that_part_all_frequencies_sum_up_to_the_rms(window: features.F64) -> None:
    edges = [0, 30, 111, 400, 500.001]
    bands = features.band_rms(window, RATE_HZ, list(pairwise(edges)))
    assert math.sqrt(sum(band**2 for band in bands)) == pytest.approx(features.rms(window), rel=1e-6, abs=1e-9)


@given(WINDOWS, st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_offset(window: features.F64, scale: float, offset: float) -> None:
    assert 0 <= features.rms(window) <= features.peak_to_peak(window)
    assert features.rms(window * scale + offset) == pytest.approx(scale * features.rms(window), rel=1e-6, abs=1e-6)
    if features.rms(window) > 1e-3:
        crest, kurtosis = features.crest(window), features.kurtosis(window)
        assert crest is not None
        assert kurtosis is not None
        assert 1 - 1e-9 <= crest <= math.sqrt(len(window))
        assert 1 - 1e-9 <= kurtosis <= len(window)
        assert features.kurtosis(window * scale + offset) == pytest.approx(kurtosis, rel=1e-3)
    if (value := features.a95(window)) is not None:
        assert value <= features.peak_to_peak(window) + 1e-9


def test_where_nothing_vibrates_there_is_no_shape() -> None:
    window = np.full(100, 1.0)
    assert (features.rms(window), features.peak_to_peak(window)) == (0, 0)
    assert (features.crest(window), features.kurtosis(window), features.a95(window)) == (None, None, None)


@pytest.mark.skipif(not SKAB.is_dir(), reason="the SKAB data are not here (environment SKAB names their folder)")
def test_on_a_real_pump() -> None:
    """Its accelerometers give one RMS a second, and no raw samples: the identities hold on real numbers too, and the
    files with a rotor out of balance lie above the healthy one."""

    def column(path: Path) -> features.F64:
        with path.open(encoding="utf-8") as file:
            return np.array([float(row["Accelerometer1RMS"]) for row in csv.DictReader(file, delimiter=";")])

    healthy = column(SKAB / "anomaly-free" / "anomaly-free.csv")
    for start in range(0, len(healthy) - 512, 512):
        window = healthy[start : start + 512]
        total = features.band_rms(window, 1.0, [(0, 0.1), (0.1, 0.51)])
        assert math.hypot(*total) == pytest.approx(features.rms(window))
        assert (features.a95(window) or 0) <= features.peak_to_peak(window)
    files = [path for number in range(5, 10) if (path := SKAB / "other" / f"{number}.csv").exists()]
    unbalanced = [column(path) for path in files]
    assert max(float(one.max()) for one in unbalanced) > float(np.percentile(healthy, 99))


# --- samples in frames ---


def block(first: int, count: int) -> Block:
    return Block(first % (1 << 32), np.arange(first, first + count, dtype=np.float64).reshape(-1, 1))


@given(st.integers(0, 5000), st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=60))
def test_windows_hold_what_came_and_count_what_did_not(first: int, parts: list[tuple[int, bool]]) -> None:
    raw, size, at, windows = Raw(64), 64, first, []
    sent: list[int] = []
    lost = 0
    for count, arrives in parts:
        if arrives or lost + count > size or at == first:
            windows += raw.take(block(at, count), 0.0)
            sent += range(at, at + count)
            lost = 0
        else:
            lost += count
        at += count
    for window in windows:
        numbers = window.samples[:, 0].astype(int)
        begin = numbers[0] // size * size
        assert begin >= first  # never a window that began before we listened
        assert numbers.tolist() == [number for number in sent if begin <= number < begin + size]
        assert window.missing == size - len(numbers)


def test_a_sensor_that_begins_anew_begins_a_window_anew() -> None:
    raw = Raw(64)
    assert raw.take(block(0, 63), 0.0) == []
    assert raw.take(block(0, 63), 0.0) == []
    (window,) = raw.take(block(63, 1), 0.0)
    assert (len(window.samples), window.missing) == (64, 0)


@pytest.mark.parametrize("payload", [b"", b"\x00" * 4, b"\x00" * 9, b"\x00" * 12])
def test_a_payload_without_whole_samples_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="are no samples"):
        decode(payload, 3)


# --- on the line ---


class Bearing:
    """An accelerometer on a line, and the driver that listens to it."""

    def __init__(self, port: Path, full_scale_g: float = 4.0, rate_hz: float = RATE_HZ) -> None:
        self.sensor = Accelerometer(1, rate_hz, full_scale_g, sines(0.2, 50.0, noise_g=0.002))
        self.lose = 0
        self.talker = Talker(port, 230_400, self._frames, SAMPLES / rate_hz)
        self.talker.start()
        self.site = LineSite(
            f"driver: vibration\nport: {port}\nbaud: 230400\nrate_hz: 1000\nfull_scale_g: 4\nwindow: 1s\nsilence: 1s\n"
            "devices:\n  - {device: pump-1, station: 1, axes: z, bands_hz: [[2, 40], [40, 100]]}\n"
            "  - {device: pump-1-all, station: 1}"
        )

    def _frames(self, _: float) -> list[Told]:
        told = self.sensor.frame()
        self.lose = max(0, self.lose - 1)
        return [] if self.lose else [told]


@pytest.fixture
def bearing(tmp_path: Path) -> Iterator[Bearing]:
    made = Bearing(tmp_path / "accelerometer")
    yield made
    made.site.hosts.stop(0)
    made.talker.stop()


def test_a_sine_on_the_line_becomes_its_features(bearing: Bearing) -> None:
    site = bearing.site
    site.until(lambda: site.of("pump-1", "vibration_band_2_g") and site.of("pump-1-all", "vibration_rms_g"))
    assert site.of("pump-1", "vibration_rms_g")[0] == pytest.approx(0.2 / math.sqrt(2), rel=0.01)
    assert site.of("pump-1-all", "vibration_rms_g")[0] == pytest.approx(0.2, rel=0.01)  # of two axes together
    assert site.of("pump-1", "vibration_pp_g")[0] == pytest.approx(0.4, rel=0.05)
    assert site.of("pump-1", "vibration_a95_g")[0] == pytest.approx(0.4, rel=0.05)
    assert site.of("pump-1", "vibration_crest")[0] == pytest.approx(math.sqrt(2), rel=0.05)
    assert site.of("pump-1", "vibration_kurtosis")[0] == pytest.approx(1.5, rel=0.02)
    assert site.of("pump-1", "vibration_band_1_g")[0] < 0.005
    assert site.of("pump-1", "vibration_band_2_g")[0] == pytest.approx(0.2 / math.sqrt(2), rel=0.02)
    assert site.of("pump-1-all", "vibration_band_1_g") == []
    assert site.quality("pump-1") is Quality.GOOD


def test_clipped_and_missing_samples_are_said(bearing: Bearing) -> None:
    site = bearing.site
    site.until(lambda: site.of("pump-1", "vibration_rms_g"))
    bearing.sensor.wave = sines(6.0, 50.0)
    site.until(lambda: site.quality("pump-1") is Quality.IMPLAUSIBLE, what="clipping is said")
    assert "beyond 4 g" in site.hosts.reasons()["pump-1"]
    bearing.sensor.wave = sines(0.2, 50.0)
    site.until(lambda: site.quality("pump-1") is Quality.GOOD)
    bearing.lose = 6  # five frames of forty samples: a fifth of a window
    site.until(lambda: site.dropped("incomplete_window") >= 1)
    assert site.quality("pump-1") is Quality.GARBLED
    assert site.dropped("missing_samples") == 200
    assert site.dropped("missed_frame") == 0  # the sensor never sent them: only its own numbers show it
    site.until(lambda: site.quality("pump-1") is Quality.GOOD)
    told = len(site.of("pump-1", "vibration_rms_g"))
    bearing.lose = 2  # one frame: 4 %
    site.until(lambda: site.dropped("missing_samples") == 240)
    site.until(lambda: len(site.of("pump-1", "vibration_rms_g")) > told + 1)
    assert len(site.of("pump-1", "vibration_band_2_g")) == len(site.of("pump-1", "vibration_rms_g")) - 1
    bearing.talker.say((1, 18, b"odd"))
    site.until(lambda: site.dropped("bad_payload") == 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("rate_hz: 5", "rate_hz: expected 10 to 20000, got 5"),
        ("full_scale_g: 0", "full_scale_g: expected up to 500"),
        ("window: 10ms", "window: expected 64 to 131072 samples, got 10"),
        ("devices: [{device: a, station: 1, bands_hz: [[20, 600]]}]", "expected low < high up to 500, got 20 to 600"),
        ("devices: [{device: a, station: 1, axes: w}]", "axes"),
        ("most_missing: 2", "most_missing: expected 0 to 0.5"),
    ],
)
def test_a_wrong_configuration_is_refused(change: str, expected: str) -> None:
    lines = {"port": "/dev/x", "rate_hz": "1000", "full_scale_g": "4", "devices": "[{device: a, station: 1}]"}
    name, _, value = change.partition(": ")
    text = "\n".join(f"{key}: {given}" for key, given in (lines | {name: value}).items())
    with pytest.raises(ConfigError) as caught:
        LineSite(f"driver: vibration\n{text}")
    assert expected in str(caught.value)


@pytest.mark.parametrize("driver", ["vibration", "pressure_fast", "elevator_retrofit", "elevator_serial"])
def test_the_gateway_itself_imports_no_numpy(driver: str) -> None:
    code = f"import sys, edge.drivers.{driver}; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("driver", ["vibration", "pressure_fast"])
def test_a_box_without_numpy_refuses_the_configuration_and_says_what_to_do(driver: str) -> None:
    text = f"driver: {driver}\nport: /dev/x\nrate_hz: 100\ndevices: [{{device: a, station: 1}}]"
    text += "\nfull_scale_g: 4" if driver == "vibration" else ""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from citybrain.errors import ConfigError\n"
        "from gateway.config import parse_config\n"
        f"section = {text!r}.replace(chr(10), chr(10) + '    ')\n"
        "try:\n"
        "    parse_config('gateway: gw-1\\nshard: 0\\nbroker: {host: 127.0.0.1}\\ndrivers:\\n  a:\\n    ' + section)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "needs numpy, which is not installed here: pip install numpy" in said


def test_the_rate_at_which_samples_come_is_known_after_ten_seconds() -> None:
    raw = Raw(100)
    rates = [window.rate_hz for second in range(13) for window in raw.take(block(100 * second, 100), second / 0.8)]
    assert rates[:8] == [None] * 8
    assert rates[-1] == pytest.approx(80)
