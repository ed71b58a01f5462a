"""A real RTSP camera: it is watched, killed, hung, brought back, and refuses who does not know its password."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from citybrain.clock import system_clock
from edge.driver import Quality
from edge.drivers.camera import Config
from simulators.lines.video import Planted, Street, write_video
from tests.edge.test_camera_driver import CAMERA, Site
from tests.rtsp_camera import RtspCamera, needed

FPS = 10.0


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needed()
    path = tmp_path_factory.mktemp("rtsp") / "street.avi"
    street = Street(5, [Planted("walker", 0.0)])
    write_video(path, (image for _, image in street.frames(10.0, FPS)), FPS, "MJPG")
    return path


@pytest.fixture
def closing() -> Iterator[list[Site | RtspCamera]]:
    made: list[Site | RtspCamera] = []
    yield made
    for one in made:
        if isinstance(one, RtspCamera):
            one.kill()
        else:
            one.hosts.stop(0, within_s=3.0)


def lost_at_ms(site: Site) -> int:
    return next(reading.observed_at for _, reading in site.told if reading.values.get("signal") == 0.0)


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_camera_that_goes_away_is_told_soon_and_found_again(
    clip: Path, closing: list[Site | RtspCamera], how: str
) -> None:
    camera = RtspCamera(clip)
    closing.append(camera)
    camera.start()
    site = Site(Config(CAMERA, camera.url))
    closing.append(site)
    site.until(lambda: 1.0 in site.values("signal"), what="a picture")
    site.until(lambda: site.ask("sample").ok and [rate for rate in site.values("frame_rate_fps") if rate > 5.0])
    assert site.hosts.qualities()[CAMERA] is Quality.GOOD
    gone_ms = system_clock().now_ms()
    getattr(camera, how)()
    site.told.clear()
    site.until(lambda: 0.0 in site.values("signal"), what="the loss")
    assert lost_at_ms(site) - gone_ms < 6000, "2 s on an idle machine (docs/drivers/camera.md)"
    site.until(lambda: site.hosts.qualities()[CAMERA] is Quality.UNPLUGGED, what="the quality")
    camera.kill()
    camera.start()
    site.told.clear()
    site.until(lambda: 1.0 in site.values("signal"), 40.0, "the picture again")
    assert site.hosts.qualities()[CAMERA] is Quality.GOOD
    assert site.counters.values["restarts_total{driver=cam}"] == 0


def test_who_does_not_know_the_password_is_told_so_and_it_is_said_nowhere(
    clip: Path, closing: list[Site | RtspCamera], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    camera = RtspCamera(clip, "viewer:s3cret")
    closing.append(camera)
    camera.start()
    known, wrong = tmp_path / "known.txt", tmp_path / "wrong.txt"
    known.write_text("viewer:s3cret\n")
    wrong.write_text("viewer:wr0ng\n")
    refused, plain = Site(Config(CAMERA, camera.url, credentials=str(wrong))), Site(Config(CAMERA, camera.url))
    let_in = Site(Config(CAMERA, camera.url, credentials=str(known)))
    closing += [refused, plain, let_in]
    let_in.until(lambda: 1.0 in let_in.values("signal"), what="a picture")
    refused.until(lambda: "refuses the user" in refused.hosts.reasons().get(CAMERA, ""), what="the refusal")
    plain.until(lambda: "wants a user" in plain.hosts.reasons().get(CAMERA, ""), what="the reason")
    said = "".join(capfd.readouterr()) + " ".join(str(site.counters.warnings) for site in (refused, plain, let_in))
    assert "s3cret" not in said
    assert "wr0ng" not in said


def test_a_stream_of_another_path_is_said(clip: Path, closing: list[Site | RtspCamera]) -> None:
    camera = RtspCamera(clip)
    closing.append(camera)
    camera.start()
    site = Site(Config(CAMERA, camera.url + "2"))
    closing.append(site)
    site.until(lambda: "no stream of that path" in site.hosts.reasons().get(CAMERA, ""), what="the reason")


def test_nobody_at_the_address_is_said(closing: list[Site | RtspCamera]) -> None:
    site = Site(Config(CAMERA, "rtsp://127.0.0.1:9/stream"))
    closing.append(site)
    begun = time.monotonic()
    site.until(lambda: "refused" in site.hosts.reasons().get(CAMERA, ""), what="the reason")
    assert time.monotonic() - begun < 25.0
