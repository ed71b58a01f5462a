"""Frames of a camera, a stream or a file: read as they come by a thread of their own, the newest kept for who looks.

Whatever is read is drained, so that nobody looks at what was; only what is looked at is converted. A source that ends,
or says nothing, is opened again, later each time.
"""

from __future__ import annotations

import threading

import cv2
import msgspec
import numpy as np

from citybrain.clock import monotonic_s, wait_s, wait_until_s
from edge.vision.frames import Image
from edge.vision.sources import is_file

OPEN_MS, READ_MS = 5000, 3000
FIRST_RETRY_S, MOST_RETRY_S = 0.5, 15.0
LONG_S = 10.0  # a stream that lasted so long begins with the first retry again
FILE_FPS = 25.0  # of a file that does not say


class Frame(msgspec.Struct, frozen=True):
    """A frame (BGR), its number in the order of reading, and when it was read (monotonic)."""

    number: int
    image: Image
    at_s: float


class Capture:
    """One source. url: a path, a device (`/dev/video0`) or `rtsp://…`, with credentials; rate_fps: how often one looks.

    repeat: a file begins again at its end. threads: of the decoder.
    """

    def __init__(self, url: str, rate_fps: float, *, repeat: bool = False, threads: int = 1) -> None:
        self._url = url
        self._every_s = 1.0 / rate_fps
        self._repeat = repeat
        self._threads = threads
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._newest: Frame | None = None
        self.read = 0  # frames so far
        self.ended = ""  # how the last try ended: `open` or `read`
        self.busy_since_s: float | None = None  # when the present call into the decoder began

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for the decoder to let go: a process that ends while it decodes is aborted."""
        self._stop.set()
        self._thread.join(READ_MS / 1000 + 1.0)

    def newest(self) -> Frame | None:
        """Return the newest frame, None before the first."""
        return self._newest

    def _work(self) -> None:
        delay_s = FIRST_RETRY_S
        while not self._stop.is_set():
            began_s = monotonic_s()
            self._once()
            self.busy_since_s = None
            if is_file(self._url) and self.ended == "read" and not self._repeat:
                return
            if monotonic_s() - began_s > LONG_S:
                delay_s = FIRST_RETRY_S
            if self._repeat and self.ended == "read":
                continue
            wait_s(delay_s, self._stop)
            delay_s = min(2 * delay_s, MOST_RETRY_S)

    def _once(self) -> None:
        self.busy_since_s = monotonic_s()
        capture = self._open()
        try:
            if not capture.isOpened():
                self.ended = "open"
                return
            file_s = 1.0 / (capture.get(cv2.CAP_PROP_FPS) or FILE_FPS) if is_file(self._url) else 0.0
            self._drain(capture, file_s)
            self.ended = "read"
        finally:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        if self._url.startswith("/dev/"):
            return cv2.VideoCapture(self._url, cv2.CAP_V4L2, [cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_MS])
        limits = [cv2.CAP_PROP_N_THREADS, self._threads]
        if not is_file(self._url):
            limits += [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_MS]
        return cv2.VideoCapture(self._url, cv2.CAP_FFMPEG, limits)

    def _drain(self, capture: cv2.VideoCapture, file_s: float) -> None:
        """Read until the source ends; a file as slowly as it was taken."""
        due_s = next_s = monotonic_s()
        while not self._stop.is_set():
            self.busy_since_s = monotonic_s()
            if not capture.grab():
                return
            self.busy_since_s, now_s = None, monotonic_s()
            self.read += 1
            if now_s >= due_s:
                good, image = capture.retrieve()
                if not good:
                    return
                self._newest = Frame(self.read, np.asarray(image, np.uint8), now_s)
                due_s = max(due_s + self._every_s, now_s)
            if file_s:
                next_s += file_s
                wait_until_s(next_s, 0.0)
