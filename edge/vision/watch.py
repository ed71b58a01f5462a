"""A camera's picture from frames to what is told: its health, what stands in its regions, and the evidence of it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import msgspec
import numpy as np

from edge.vision import masks
from edge.vision.frames import Image, Mask, analysed_size, grey, shrink
from edge.vision.health import Health, Picture
from edge.vision.learned import Learned
from edge.vision.persons import may_be_somebody, persons
from edge.vision.scene import METRICS, Region, Scene, Seen, highest

REPEAT_S = 30.0  # what lasts is told that often, as docs/faults.md has it
CROWD_FROM, CROWD_UNTIL, CROWD_STEP = 0.5, 0.4, 0.15


class Watched(msgspec.Struct, frozen=True):
    """A region, and after how many seconds what it holds is told."""

    region: Region
    dwell_s: float


class Event(msgspec.Struct, frozen=True):
    """What is to be told of a scene. seen: set where it begins, so that evidence is due."""

    metric: str
    value: float
    seen: Seen | None = None


class Look(msgspec.Struct, frozen=True):
    """What one frame gave. changed: something began or ceased to be wrong with the picture."""

    picture: Picture
    changed: bool
    events: tuple[Event, ...]


class Telling:
    """When what of one metric is told: at its dwell, each half minute while it lasts, 0 at its end, 0 at the start."""

    def __init__(self, dwell_s: dict[str, float], since_s: float) -> None:
        self._dwell_s = dwell_s  # by region
        self._first_s = since_s + max(dwell_s.values()) + 5.0
        self._told_s: float | None = None
        self._told = 0.0
        self._lasts = False

    def judge(self, seen: Seen, now_s: float) -> Event | None:
        """Return what is to be told of it now, if anything."""
        crowd = seen.metric == METRICS["crowd"]
        begins = seen.value >= (CROWD_FROM if crowd else max(self._dwell_s[seen.region], 1e-3))
        over = seen.value < CROWD_UNTIL if crowd else seen.value == 0.0
        if begins and not self._lasts:
            self._lasts = True
            return self._tell(seen.value, now_s, seen)
        if self._lasts and over:
            self._lasts = False
            return self._tell(0.0, now_s)
        due = self._told_s is not None and now_s - self._told_s >= REPEAT_S
        if self._lasts and (due or (crowd and abs(seen.value - self._told) >= CROWD_STEP)):
            return self._tell(seen.value, now_s)
        if self._told_s is None and now_s >= self._first_s:
            return self._tell(0.0, now_s)
        return None

    def _tell(self, value: float, now_s: float, seen: Seen | None = None) -> Event:
        self._told, self._told_s = value, now_s
        return Event(seen.metric if seen else "", value, seen)


class Watch:
    """One camera, given its frames (BGR or grey, any size) in their order with monotonic times."""

    def __init__(self, watched: Sequence[Watched], width: int, learned: Learned | None = None) -> None:
        self._watched = {one.region.name: one for one in watched}
        self._width = width
        self._learned = learned
        self._health = Health()
        self._scene: Scene | None = None
        self._size = (0, 0)
        self._telling: dict[str, Telling] = {}
        self._image: Image | None = None
        self._sound = False  # the picture is one, so that it can be said who is in it
        self.picture: Picture | None = None

    def look(self, image: Image, at_s: float) -> Look:
        """Judge the next frame (BGR or grey).

        A stream that goes over to another size goes on where its sides keep their ratio, for it is scaled anyway; else
        it is another picture, and all begins anew.
        """
        image = image if image.ndim == 3 else np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), np.uint8)
        if analysed_size(self._width, image.shape[0], image.shape[1]) != self._size:
            self._begin(image, at_s)
        assert self._scene is not None
        frame = shrink(image, self._size)
        before = self.picture.troubles if self.picture is not None else frozenset()
        self.picture = self._health.look(grey(frame), at_s)
        self._image = image
        if self._health.accepted:
            self._health.accepted = False
            self._scene = Scene([one.region for one in self._watched.values()], self._size)
        self._sound = not self.picture.troubles and self._health.warm
        events: list[Event] = []
        if self._sound:
            events = self._tell(self._scene.look(frame, self.picture.noise, at_s), at_s)
        else:
            self._scene.pause(at_s)
            if not self._health.warm:
                self._scene.prepare(frame, at_s)
        return Look(self.picture, self.picture.troubles != before, tuple(events))

    def _begin(self, image: Image, at_s: float) -> None:
        self._size = analysed_size(self._width, image.shape[0], image.shape[1])
        learned = self._learned
        if learned is not None and learned.reference.shape != (self._size[1], self._size[0]):
            learned = None
        regions = [one.region for one in self._watched.values()]
        if learned is None:
            self._health, self._scene = Health(), Scene(regions, self._size)
        else:
            self._health = Health(learned.normal, learned.reference.copy())
            self._scene = Scene(regions, self._size, learned.background)
        dwells: dict[str, dict[str, float]] = {}
        for one in self._watched.values():
            dwells.setdefault(METRICS[one.region.sees], {})[one.region.name] = one.dwell_s
        self._telling = {metric: Telling(by_region, at_s) for metric, by_region in dwells.items()}

    def _tell(self, seen: Sequence[Seen], at_s: float) -> list[Event]:
        found = []
        for metric, one in highest(seen).items():
            event = self._telling[metric].judge(one, at_s)
            if event is not None:
                found.append(Event(metric, event.value, event.seen))
        return found

    def learned(self) -> Learned | None:
        """Return what is worth remembering, None while the picture is not a good one."""
        if not self._sound or self._scene is None or self._scene.long is None or self._health.reference is None:
            return None
        background = np.clip(self._scene.long, 0, 255).astype(np.uint8)
        return Learned(self._health.normal, self._health.reference.copy(), background)

    # --- pictures to look at ---

    def evidence(self, seen: Seen) -> tuple[bytes, bytes]:
        """Return (masked, unmasked) JPEGs of what a region holds: its background beside the present picture.

        What moves, moved in the last seconds, does not belong there or looks like a person is made coarse, except a
        thing that was left and looks like none.
        """
        assert self._image is not None
        assert self._scene is not None
        assert self._scene.long is not None
        region = self._watched[seen.region].region
        hidden, found = self._scene.passing(), persons(self._image, self._size)
        if region.sees == "garbage" and seen.thing is not None and not may_be_somebody(seen.thing, found):
            hidden &= ~seen.thing
        hidden |= found
        background = masks.panel(self._scene.long)
        before = masks.hide(background, self._scene.unsure() | persons(background, self._size))
        after = masks.hide(masks.panel(self._image), hidden)
        both = masks.side_by_side(before, masks.outline(after, region.polygon, seen.thing))
        return masks.jpeg(both), masks.jpeg(self._image, 1 << 20)

    def snapshot(self) -> bytes | None:
        """Return the present picture as JPEG, masked (all of it where nobody knows who is there), None without one."""
        if self._image is None or self._scene is None:
            return None
        whole: Mask = np.ones((self._size[1], self._size[0]), np.bool_)
        hidden = self._scene.passing() | persons(self._image, self._size) if self._sound else whole
        return masks.jpeg(masks.hide(masks.panel(self._image), hidden))
