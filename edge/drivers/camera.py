"""A camera: is its picture one, and what stands where it should not? Evidence leaves the box without persons.

cam-front:
  driver: camera
  device: cam-000012
  source: rtsp://192.168.10.20/stream2
  credentials: /var/lib/citybrain/cam-front.txt    # one line, `user:password`
  folder: /var/lib/citybrain/cameras
  regions:
    bins: {sees: garbage, polygon: [[0.1, 0.5], [0.4, 0.5], [0.4, 0.9], [0.1, 0.9]], dwell: 1min}
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from citybrain.clock import SECOND_MS
from citybrain.config import Duration
from citybrain.errors import StorageError, Unavailable
from citybrain.model import Lane, Reading
from citybrain.storage import OS_FILES
from citybrain.wire import evidence_number
from edge.driver import Host, Quality, Request

if TYPE_CHECKING:
    from edge.vision.capture import Capture, Frame
    from edge.vision.watch import Event, Look, Watch

PROCESS = True
DEADLINE_S = 20.0
SILENT_S = 1.4  # without a new frame for so long, and what a look takes, the signal is lost within 2 s
FIRST_S = 7.0  # until the first frame: a stream has 5 s to open
STUCK_S = 45.0  # a call into the decoder that takes longer does not come back: the process is started anew
SAVE_S = 3600.0  # what was learned is written that often, and at the end: about 5 MB a day on the card
TIDY_S = 60.0
MOST_REGIONS = 16
_CREDENTIALS = re.compile(r"//[^/]*@")


class RegionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A watched part of the picture. polygon: corners as shares of its width and height, from the top left.

    area: the share of the region from which on a thing counts. dwell: it is told when it has been there for so long.
    full: of a crowd, the share of the region that means 1.
    """

    sees: Literal["garbage", "stall", "lane", "crowd"]
    polygon: tuple[tuple[float, float], ...]
    area: float = 0.01
    dwell: Duration = Duration(30_000)
    full: float = 0.6

    def __post_init__(self) -> None:
        if len(self.polygon) < 3:
            raise ValueError(f"polygon: expected 3 corners or more, got {len(self.polygon)}")
        outside = [corner for corner in self.polygon if not all(0.0 <= share <= 1.0 for share in corner)]
        if outside:
            raise ValueError(f"polygon: corners are shares, 0 to 1, got {list(outside[0])}")
        if abs(_area(self.polygon)) < 1e-3:
            raise ValueError("polygon: its corners enclose nothing")
        for name, share in (("area", self.area), ("full", self.full)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name}: expected more than 0 and at most 1, got {share:g}")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One camera. source: `rtsp://…`, a device such as `/dev/video0`, or a video file.

    credentials: a file with `user:password`. folder: where what was learned is kept; without one it is learned anew at
    every start. rate_fps, width: how many frames a second are analysed, and how wide. interval: how often the health is
    told besides at its changes. repeat: a file begins again at its end. keep_unmasked: how long pictures with
    recognisable persons stay in `folder`, on the box alone; 0s: there are none.
    """

    device: str
    source: str
    credentials: str = ""
    folder: str = ""
    rate_fps: float = 5.0
    width: int = 320
    interval: Duration = Duration(60_000)
    repeat: bool = False
    regions: dict[str, RegionConfig] = {}
    keep_unmasked: Duration = Duration(0)

    def __post_init__(self) -> None:
        if _CREDENTIALS.search(self.source):
            raise ValueError("source: user and password belong in a file that `credentials` names")
        if "://" in self.source and not self.source.startswith(("rtsp://", "rtsps://")):
            raise ValueError(f"source: expected rtsp://…, a device or a file, got {self.source[:60]!r}")
        if not self.source or ("://" not in self.source and not Path(self.source).is_absolute()):
            raise ValueError(f"source: expected rtsp://… or a path from /, got {self.source[:60]!r}")
        if self.folder and not Path(self.folder).is_absolute():
            raise ValueError(f"folder: expected a path from /, got {self.folder[:60]!r}")
        if self.keep_unmasked and not self.folder:
            raise ValueError("keep_unmasked: needs a `folder`")
        if not 1.0 <= self.rate_fps <= 25.0:
            raise ValueError(f"rate_fps: expected 1 to 25, got {self.rate_fps:g}")
        if not 160 <= self.width <= 1280:
            raise ValueError(f"width: expected 160 to 1280, got {self.width}")
        if not SECOND_MS <= self.interval <= 600_000:
            raise ValueError("interval: expected 1s to 10min")
        if len(self.regions) > MOST_REGIONS:
            raise ValueError(f"regions: at most {MOST_REGIONS}, got {len(self.regions)}")

    def devices(self) -> tuple[str, ...]:
        """Name the one device."""
        return (self.device,)


class Camera:
    """One camera."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._seen_number = 0
        self._seen_s: float | None = None  # when the last new frame was taken
        self._lost: bool | None = None
        self._told_s: float | None = None
        self._counted: tuple[int, float] = (0, 0.0)  # frames read, and when, for the rate
        self._fps = 0.0
        self._saved_s = 0.0
        self._tidied_s: float | None = None

    def run(self, host: Host) -> None:
        """Look until the host ends it; raises Unavailable where the decoder does not come back."""
        os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # it would print addresses with passwords
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp")
        import cv2  # noqa: PLC0415  OpenCV and numpy only in the driver's own process

        from edge.vision.capture import Capture  # noqa: PLC0415

        cv2.setNumThreads(1)  # so small frames are not worth sharing, and the other core has other work
        watch = self._watch(host)
        capture = Capture(self._address(), self._config.rate_fps, repeat=self._config.repeat)
        capture.start()
        started_s = self._saved_s = host.mono_s()
        self._counted = 0, started_s
        try:
            while not host.wait(0.5 / self._config.rate_fps):
                self._step(host, capture, watch, started_s)
        finally:
            self._save(host, watch)
            capture.stop()

    def _step(self, host: Host, capture: Capture, watch: Watch, started_s: float) -> None:
        now_s = host.mono_s()
        frame = capture.newest()
        if frame is not None and frame.number != self._seen_number:
            self._seen_number, self._seen_s = frame.number, now_s
            self._take(host, watch, frame)
        elif now_s - (started_s if self._seen_s is None else self._seen_s) > self._patience_s(capture):
            self._lose(host, capture, now_s)
        if capture.busy_since_s is not None and now_s - capture.busy_since_s > STUCK_S:
            raise Unavailable(f"{self._config.source}: the decoder has not come back for {STUCK_S:g} s")
        self._rate(capture, now_s)
        for request in host.requests():
            self._answer(host, watch, request)
        if now_s - self._saved_s > SAVE_S:
            self._saved_s = now_s
            self._save(host, watch)
        self._tidy(host, now_s)

    def _patience_s(self, capture: Capture) -> float:
        """Return for how long there may be no new frame: a camera may be slow, or not open yet."""
        if self._seen_s is None:
            return 0.0 if capture.ended else FIRST_S
        return max(SILENT_S, 3.0 / self._fps) if self._fps > 0.0 else SILENT_S

    # --- what is told ---

    def _take(self, host: Host, watch: Watch, frame: Frame) -> None:
        """Look at a new frame and tell what is due."""
        look = watch.look(frame.image, frame.at_s)
        now_s = host.mono_s()
        back, self._lost = self._lost is not False, False
        troubles = ", ".join(sorted(look.picture.troubles))
        if look.changed or back:
            host.quality(self._config.device, Quality.IMPLAUSIBLE if troubles else Quality.GOOD, troubles)
        if look.changed or back or self._told_s is None or now_s - self._told_s >= self._config.interval / SECOND_MS:
            self._tell_health(host, look)
        for event in look.events:
            self._tell_event(host, watch, event)

    def _tell_health(self, host: Host, look: Look) -> None:
        picture = look.picture
        values = {"signal": 1.0, "brightness": picture.brightness, "motion": picture.motion}
        if self._fps > 0.0:
            values["frame_rate_fps"] = self._fps
        if picture.sharpness is not None:
            values["sharpness"] = picture.sharpness
        if picture.view_shift is not None:
            values["view_shift"] = picture.view_shift
        self._told_s = host.mono_s()
        self._put(host, Lane.TELEMETRY, values)

    def _put(self, host: Host, lane: Lane, values: dict[str, float]) -> None:
        rounded = {name: value if name == "evidence" else round(value, 4) for name, value in values.items()}
        host.put(lane, Reading(self._config.device, host.now_ms(), rounded))

    def _tell_event(self, host: Host, watch: Watch, event: Event) -> None:
        values: dict[str, float] = {}
        if event.seen is not None:
            masked, unmasked = watch.evidence(event.seen)
            values["evidence"] = evidence_number(host.blob(masked))
            self._keep(host, unmasked, event.metric)
        self._put(host, Lane.EVENT, values | {event.metric: event.value})

    def _lose(self, host: Host, capture: Capture, now_s: float) -> None:
        """Tell that there is no picture: at once, and with every interval."""
        if self._lost and self._told_s is not None and now_s - self._told_s < self._config.interval / SECOND_MS:
            return
        if not self._lost:
            self._lost, self._fps = True, 0.0
        self._told_s = now_s
        self._put(host, Lane.TELEMETRY, {"signal": 0.0, "frame_rate_fps": 0.0})
        host.quality(self._config.device, Quality.UNPLUGGED, self._why(capture))

    def _why(self, capture: Capture) -> str:
        from edge.vision.sources import is_file, why_not  # noqa: PLC0415

        source = self._config.source
        if capture.ended == "read" and is_file(source):
            return f"{source} has ended"
        return f"{source}: {why_not(source, known=bool(self._config.credentials))}"

    def _rate(self, capture: Capture, now_s: float) -> None:
        read, since_s = self._counted
        if now_s - since_s >= 2.0:
            self._fps = (capture.read - read) / (now_s - since_s)
            self._counted = capture.read, now_s

    def _answer(self, host: Host, watch: Watch, request: Request) -> None:
        if self._lost is not False or watch.picture is None:
            host.answer(request.id, ok=False, text=f"{self._config.device}: there is no picture")
        elif request.what == "frame":
            picture = watch.snapshot()
            assert picture is not None
            sha256 = host.blob(picture)
            self._put(host, Lane.EVENT, {"evidence": evidence_number(sha256)})
            host.answer(request.id, ok=True, text=sha256)
        else:
            self._told_s = None  # told with the next frame
            host.answer(request.id, ok=True, text=self._config.device)

    # --- what is kept ---

    def _address(self) -> str:
        """Return the source with its credentials; raises Unavailable where they cannot be read."""
        from edge.vision.sources import with_credentials  # noqa: PLC0415

        if not self._config.credentials:
            return self._config.source
        try:
            text = Path(self._config.credentials).read_text(encoding="utf-8")
            return with_credentials(self._config.source, text)
        except (OSError, ValueError) as error:
            raise Unavailable(f"credentials {self._config.credentials}: {_said(error)}") from None

    def _watch(self, host: Host) -> Watch:
        """Return what looks at the frames, with what was learned before."""
        from edge.vision.learned import unpack  # noqa: PLC0415
        from edge.vision.scene import Region  # noqa: PLC0415
        from edge.vision.watch import Watch, Watched  # noqa: PLC0415

        watched = [
            Watched(Region(name, one.sees, one.polygon, one.area, one.full), one.dwell / SECOND_MS)
            for name, one in self._config.regions.items()
        ]
        learned = None
        path = self._learned_path
        if path is not None and path.exists():
            try:
                learned = unpack(OS_FILES.read(path), self._config.source)
            except (ValueError, StorageError) as error:
                host.drop("camera_learned", 1, f"{path}: {error}; it is learned anew")
        return Watch(watched, self._config.width, learned)

    @property
    def _learned_path(self) -> Path | None:
        folder = self._config.folder
        return Path(folder) / f"{self._config.device}.learned" if folder else None

    @property
    def _unmasked(self) -> Path:
        return Path(self._config.folder) / "unmasked"

    def _save(self, host: Host, watch: Watch) -> None:
        """Write what was learned; a full disk costs no more than that."""
        from edge.vision.learned import pack  # noqa: PLC0415

        path, learned = self._learned_path, watch.learned()
        if path is None or learned is None:
            return
        try:
            OS_FILES.make(path.parent)
            OS_FILES.replace_private(path, pack(learned, self._config.source))
        except StorageError as error:
            host.drop("camera_not_saved", 1, str(error))

    def _keep(self, host: Host, picture: bytes, metric: str) -> None:
        """Keep a picture with recognisable persons on the box, for its owner alone, until it expires."""
        if not self._config.keep_unmasked:
            return
        try:
            OS_FILES.make(self._unmasked)
            OS_FILES.replace_private(self._unmasked / f"{self._config.device}.{host.now_ms()}.{metric}.jpg", picture)
        except StorageError as error:
            host.drop("camera_not_saved", 1, str(error))

    def _tidy(self, host: Host, now_s: float) -> None:
        """Remove the pictures that have expired, also where none are kept any more."""
        if not self._config.folder or (self._tidied_s is not None and now_s - self._tidied_s < TIDY_S):
            return
        self._tidied_s = now_s
        until_ms = host.now_ms() - self._config.keep_unmasked
        for path in self._unmasked.glob(f"{self._config.device}.*.jpg"):
            taken_ms = path.name.removeprefix(f"{self._config.device}.").partition(".")[0]
            if taken_ms.isdecimal() and int(taken_ms) <= until_ms:
                OS_FILES.remove(path)


def _area(polygon: tuple[tuple[float, float], ...]) -> float:
    """Return a polygon's area (shoelace), with its sign."""
    following = (*polygon[1:], polygon[0])
    return sum(x * b - a * y for (x, y), (a, b) in zip(polygon, following, strict=True)) / 2


def _said(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def make(_name: str, config: Config) -> Camera:
    """Make the driver of one camera."""
    return Camera(config)
