"""The camera driver in a process of its own, on real video files: what it tells, and what it does without one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from citybrain.clock import system_clock
from citybrain.config import Duration
from citybrain.counters import Counters
from citybrain.errors import ConfigError
from citybrain.model import Lane, Reading
from citybrain.wire import evidence_number
from edge.driver import Quality, Request
from edge.drivers.camera import Config, RegionConfig
from edge.host import Configured, Hosts
from edge.mailbox import Answer, blob_name
from gateway.config import parse_config
from simulators.lines.video import BINS, Planted, Street, write_video
from tests.conftest import eventually

HEAD = "gateway: gw-1\nshard: 0\nbroker: {host: 127.0.0.1}\ndrivers:\n  cam: {driver: camera, device: cam-1, "
CAMERA = "cam-1"


class Site:
    """A gateway's drivers, and all they gave so far."""

    def __init__(self, config: Config) -> None:
        self.counters = Counters("gateway")
        self.hosts = Hosts([Configured("cam", "camera", config)], self.counters, system_clock())
        self.told: list[tuple[Lane, Reading]] = []
        self.pictures: list[bytes] = []
        self.answers: list[Answer] = []
        self.hosts.start()

    def poll(self) -> None:
        self.told += self.hosts.poll(system_clock().now_ms())
        self.pictures += [blob.content for _, blob in self.hosts.blobs()]
        self.answers += self.hosts.answers()

    def until(self, holds: Callable[[], object], within_s: float = 25.0, what: str = "the condition") -> None:
        def looked() -> object:
            self.poll()
            return holds()

        eventually(looked, within_s, what)

    def values(self, metric: str) -> list[float]:
        return [reading.values[metric] for _, reading in self.told if metric in reading.values]

    def ask(self, what: str) -> Answer:
        request = Request(f"order-{len(self.answers)}-{what}", what, CAMERA)
        assert self.hosts.ask(request)
        self.until(lambda: any(one.request == request.id for one in self.answers), what="the answer")
        return next(one for one in self.answers if one.request == request.id)


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    made: list[Site] = []
    yield made
    for site in made:
        site.hosts.stop(0, within_s=3.0)


def clip(path: Path, duration_s: float, *planted: Planted, fps: float = 10.0) -> Path:
    street = Street(5, planted, columns=320, rows=180)
    write_video(path, (image for _, image in street.frames(duration_s, fps)), fps)
    return path


def bins(dwell_s: float) -> dict[str, RegionConfig]:
    return {"bins": RegionConfig("garbage", BINS, dwell=Duration(round(1000 * dwell_s)))}


def test_a_bag_becomes_an_event_with_evidence_and_the_end_of_the_file_a_lost_signal(
    tmp_path: Path, sites: list[Site]
) -> None:
    path = clip(tmp_path / "street.avi", 14.0, Planted("garbage", 6.0), Planted("walker", 9.0))
    kept = tmp_path / "kept"
    site = Site(Config(CAMERA, str(path), folder=str(kept), regions=bins(4.0), keep_unmasked=Duration(3_600_000)))
    sites.append(site)
    site.until(lambda: [value for value in site.values("garbage_s") if value > 0], what="the event")
    lane, event = next(told for told in site.told if told[1].values.get("garbage_s"))
    assert lane is Lane.EVENT
    assert 4.0 <= event.values["garbage_s"] <= 6.0
    [picture] = site.pictures
    assert list(event.values) == ["evidence", "garbage_s"], "a code stands after its evidence"
    assert event.values["evidence"] == evidence_number(blob_name(picture))
    shown = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert shown is not None
    assert shown.shape[1] == 1280, "before and after"
    assert len(picture) <= 200_000
    [unmasked] = (kept / "unmasked").iterdir()
    assert unmasked.stat().st_mode & 0o777 == 0o600
    site.until(lambda: 0.0 in site.values("signal"), what="the lost signal")
    assert site.hosts.qualities()[CAMERA] is Quality.UNPLUGGED
    assert "has ended" in site.hosts.reasons()[CAMERA]
    healthy = [reading.values for _, reading in site.told if reading.values.get("signal") == 1.0]
    assert healthy, "the picture was told to be there"
    assert all(one["brightness"] > 0.2 and one["motion"] > 0.0 for one in healthy)


def test_a_frame_is_given_when_asked_for_and_a_sample(tmp_path: Path, sites: list[Site]) -> None:
    path = clip(tmp_path / "street.avi", 4.0)
    site = Site(Config(CAMERA, str(path), repeat=True, interval=Duration(600_000)))
    sites.append(site)
    site.until(lambda: site.values("signal"), what="the first reading")
    answer = site.ask("frame")
    assert answer.ok
    site.until(lambda: site.pictures, what="the picture")
    assert answer.text == blob_name(site.pictures[0])
    before = len(site.values("brightness"))
    assert site.ask("sample").ok
    site.until(lambda: len(site.values("brightness")) > before, what="the sample")


def test_a_source_that_is_not_there_is_said_and_found_when_it_comes(tmp_path: Path, sites: list[Site]) -> None:
    path = tmp_path / "street.avi"
    site = Site(Config(CAMERA, str(path), repeat=True))
    sites.append(site)
    site.until(lambda: 0.0 in site.values("signal"), what="no signal")
    site.until(lambda: "it is not there" in site.hosts.reasons().get(CAMERA, ""), what="the reason")
    assert not site.ask("frame").ok
    clip(tmp_path / "new.avi", 4.0).rename(path)
    site.until(lambda: 1.0 in site.values("signal"), what="the signal")
    assert site.hosts.qualities()[CAMERA] is Quality.GOOD
    assert site.counters.values["restarts_total{driver=cam}"] == 0


def test_what_is_no_video_is_said(tmp_path: Path, sites: list[Site]) -> None:
    path = tmp_path / "street.avi"
    path.write_bytes(os.urandom(10_000))
    site = Site(Config(CAMERA, str(path)))
    sites.append(site)
    site.until(lambda: 0.0 in site.values("signal"), what="no signal")
    site.until(lambda: "no video" in site.hosts.reasons().get(CAMERA, ""), what="the reason")


def test_what_was_learned_is_kept_and_a_damaged_file_is_counted(tmp_path: Path, sites: list[Site]) -> None:
    path, kept = clip(tmp_path / "street.avi", 6.0), tmp_path / "kept"
    config = Config(CAMERA, str(path), folder=str(kept), repeat=True, keep_unmasked=Duration(1000))
    site = Site(config)
    site.until(lambda: site.values("signal"), what="the first reading")
    site.until(lambda: site.ask("sample").ok and site.values("sharpness"), what="a warm picture")
    site.hosts.stop(0, within_s=5.0)
    learned = kept / f"{CAMERA}.learned"
    assert learned.stat().st_size > 1000
    learned.write_bytes(learned.read_bytes()[:-100])
    (kept / "unmasked").mkdir()
    old = kept / "unmasked" / f"{CAMERA}.{round((time.time() - 5) * 1000)}.garbage_s.jpg"
    old.write_bytes(b"x")
    again = Site(config)
    sites.append(again)
    again.until(lambda: again.counters.values["dropped_total{reason=camera_learned}"] == 1, what="the damage")
    again.until(lambda: again.values("signal") and not old.exists(), what="a picture, and the expired one gone")


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("source: 'rtsp://user:secret@10.0.0.7/1'}", "credentials"),
        ("source: 'http://10.0.0.7/1'}", "expected rtsp://"),
        ("source: clip.mp4}", "from /"),
        ("source: /dev/video0, keep_unmasked: 1h}", "needs a `folder`"),
        ("source: /dev/video0, rate_fps: 100}", "1 to 25"),
        ("source: /dev/video0, regions: {a: {sees: garbage, polygon: [[0, 0], [1, 1]]}}}", "3 corners"),
        ("source: /dev/video0, regions: {a: {sees: garbage, polygon: [[0, 0], [640, 0], [1, 1]]}}}", "shares"),
        ("source: /dev/video0, regions: {a: {sees: garbage, polygon: [[0, 0], [1, 1], [0.5, 0.5]]}}}", "nothing"),
        ("source: /dev/video0, regions: {a: {sees: dogs, polygon: [[0, 0], [1, 0], [1, 1]]}}}", "dogs"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_line(rest: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        parse_config(HEAD + rest, "gateway.yaml")
    assert "gateway.yaml:" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_credentials_that_cannot_be_read_are_said(tmp_path: Path, sites: list[Site]) -> None:
    site = Site(Config(CAMERA, "rtsp://127.0.0.1:9/1", credentials=str(tmp_path / "none.txt")))
    sites.append(site)
    site.until(lambda: "none.txt" in site.hosts.troubles().get("cam", ""), what="the trouble")
