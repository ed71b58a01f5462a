"""A random place filmed by a fixed camera: its light, weather, exposure, sensor and codec, and the truth beside it.

film = Film(seed=1000)
for at_s, image in film.frames(5.0): ...
film.due                          # which planted events can be seen at all, once the frames were taken
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from simulators.lines import figures
from simulators.lines.places import MARGIN, Field, draw
from simulators.lines.script import DURATION_S, FAULTS, Event, Passing, write
from simulators.lines.video import Image, write_video

CODECS = ("h264", "h264", "mpeg4", "mjpeg", "")  # "": none, as a USB camera gives it
SEEN_LEVELS, SEEN_PIXELS = 28.0, 60  # what differs less, or is smaller at 320 columns, is below what docs promise
NIGHT = ("night", "infrared")


class Film:
    """A seed's place, its script and its frames, which must be taken in their order."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng((seed, 7))
        self.place = draw(rng)
        self.script = write(rng, self.place)
        self.codec = CODECS[rng.integers(len(CODECS))]
        self.kbit_per_s = int(rng.choice([120, 250, 500]))
        self.due: dict[int, bool] = {}  # by number of the event
        self.filled: dict[int, dict[str, float]] = {}  # by number of the event, the share of each region that it fills
        self.waited: dict[str, float] = {}  # the same of a bus that waits
        self._rng = np.random.default_rng((seed, 8))
        place = self.place
        sky: Field = np.asarray(cv2.GaussianBlur(self._rng.normal(0.0, 1.0, (90, 400)), (0, 0), 12.0), np.float32)
        self._sky: Field = sky / np.float32(np.abs(sky).max())
        self._sheet = self._rng.normal(0.0, 1.0, (2 * place.rows, 2 * place.columns, 3)).astype(np.float32)
        self._pools = self._lamp_pools()
        self._gain: float | None = None
        self._sway = np.zeros(2)
        self._held: Image | None = None

    def frames(self, fps: float) -> Iterator[tuple[float, Image]]:
        """Yield (time, frame) of the whole film."""
        for number in range(round(DURATION_S * fps)):
            yield number / fps, self._frame(number / fps, 1.0 / fps)

    def infrared(self, at_s: float) -> bool:
        """Return whether the camera sees in infrared at a time."""
        return self.place.light == "infrared" or (self.place.light == "switch" and at_s >= self.script.switch_s)

    def _frame(self, at_s: float, step_s: float) -> Image:
        here = [one for one in self.script.events if one.start_s <= at_s < one.end_s]
        if any(one.what == "freeze" for one in here) and self._held is not None:
            return self._held
        self._sway = 0.7 * self._sway + 0.5 * self.place.shake_px * self._rng.normal(0.0, 1.0, 2)
        canvas = self._canvas(at_s, here)
        self._wait(at_s, here, canvas)
        light = self._light(at_s)
        for number, event in enumerate(self.script.events):
            if number not in self.due and at_s >= event.start_s + 2.0:
                self._weigh(number, event, at_s, here, canvas, light)
        image = canvas * light
        image *= self._exposure(image, step_s)
        self._weather(image, at_s)
        for one in here:
            image = self._lens(image, one)
        strong = self.place.noise * (1.6 if self.infrared(at_s) or self.place.light == "night" else 1.0)
        image += self._noise() * strong
        if self.infrared(at_s):
            image[:] = image[:, :, 1:2]
        self._held = np.clip(image, 0, 255).astype(np.uint8)
        return self._held

    # --- what stands and moves there ---

    def _canvas(self, at_s: float, here: list[Event]) -> Field:
        place, canvas = self.place, self._view(at_s, here)
        if self.infrared(at_s):
            leaves = canvas[:, :, 1] > 1.15 * canvas[:, :, 2]
            canvas[leaves] = canvas[leaves] * 0.6 + 90.0  # leaves are bright in infrared
        drawn: list[tuple[float, Event | Passing]] = [(one.at[1], one) for one in here]
        for one in self.script.passing:
            where = one.place(at_s)
            if where is not None:
                drawn.append((where[1] if one.kind not in ("bird", "insect") else 9.0, one))
        for _, thing in sorted(drawn, key=lambda pair: pair[0]):
            if isinstance(thing, Passing):
                self._pass(canvas, thing, at_s)
            else:
                self._stand(canvas, thing, at_s)
        assert canvas.shape == (place.rows, place.columns, 3)
        return canvas

    def _view(self, at_s: float, here: list[Event]) -> Field:
        place, sight = self.place, self.place.sight
        if place.tree is not None:
            sight = self._swayed(sight, place.tree, at_s)
        left, top = place.columns * MARGIN + self._sway[0], place.rows * MARGIN + self._sway[1]
        if any(one.what == "moved" for one in here):
            left, top = left + 0.18 * place.columns, top + 0.07 * place.rows
        shift = np.array([[1.0, 0.0, -left], [0.0, 1.0, -top]])
        return np.asarray(cv2.warpAffine(sight, shift, (place.columns, place.rows)), np.float32)

    def _swayed(self, sight: Field, tree: tuple[int, int, int, int], at_s: float) -> Field:
        left, top, right, bottom = tree
        down, across = np.mgrid[top:bottom, left:right].astype(np.float32)
        gust = (1.5 + np.sin(0.13 * at_s)) * 0.006 * self.place.columns
        field = across / 23.0 + down / 31.0
        moved = sight.copy()
        across = across + np.asarray(gust * np.sin(2.1 * at_s + field), np.float32)
        down = down + np.asarray(0.5 * gust * np.sin(2.7 * at_s + field), np.float32)
        moved[top:bottom, left:right] = cv2.remap(sight, across, down, cv2.INTER_LINEAR)
        return moved

    def _foot(self, at: tuple[float, float]) -> tuple[tuple[float, float], float]:
        return (at[0] * self.place.columns, at[1] * self.place.rows), self.place.tall_at(at[1])

    def _pass(self, canvas: Field, one: Passing, at_s: float) -> None:
        where = one.place(at_s)
        assert where is not None
        foot, tall = self._foot(where)
        if one.kind == "walker":
            figures.person(canvas, foot, tall, one.colours, 6.0 * at_s if one.walks(at_s) else 0.5)
        elif one.kind in ("car", "bus"):
            lit = self.place.light in NIGHT
            side, bus = self.place.across, one.kind == "bus"
            figures.vehicle(canvas, foot, tall, one.colours[0], side=side, bus=bus, lit=lit)
        else:
            size = self.place.rows // (60 if one.kind == "bird" else 9)
            cv2.circle(canvas, (round(foot[0]), round(foot[1])), max(2, size), one.colours[0], -1)

    def _stand(self, canvas: Field, one: Event, at_s: float) -> None:
        foot, tall = self._foot(one.at)
        if one.what == "garbage":
            figures.bag(canvas, foot, one.size * tall, one.colour, one.shape)
        elif one.what == "lane":
            figures.vehicle(
                canvas, (foot[0], foot[1] + 0.3 * tall), tall, one.colour, side=self.place.across, bus=False, lit=False
            )
        elif one.what == "stall":
            figures.table(canvas, foot, tall, one.colour)
            beside = foot[0] + tall * (0.9 + 0.2 * np.sin(0.7 * at_s))
            figures.person(canvas, (beside, foot[1]), tall, (one.colour, (60.0, 50.0, 50.0)), 0.4)
        elif one.what == "crowd":
            self._gather(canvas, one, at_s)

    def _gather(self, canvas: Field, one: Event, at_s: float) -> None:
        """Draw so many people that they fill most of what counts as full."""
        rng = np.random.default_rng(round(one.start_s * 1000))
        mask = np.zeros(canvas.shape[:2], np.uint8)
        size = (self.place.columns, self.place.rows)
        region = np.array(self.place.square)
        cv2.fillPoly(mask, [np.round(region * size).astype(np.int32)], 1)
        most, filled = float(mask.sum()), np.zeros_like(mask)
        people: list[tuple[float, figures.Foot, float, figures.Colour, figures.Colour, float]] = []
        while len(people) < 150 and float((filled & mask).sum()) < 0.55 * most:
            x, y = (region * rng.dirichlet([1.0] * len(region))[:, None]).sum(axis=0)
            foot, tall = self._foot((float(x), float(y)))
            people.append(
                (foot[1], foot, tall, figures.colour_of(rng), figures.colour_of(rng), float(rng.uniform(0, 6)))
            )
            top, left = round(foot[1] - tall), round(foot[0] - 0.14 * tall)
            filled[max(0, top) : round(foot[1]), max(0, left) : round(left + 0.28 * tall)] = 1
        for _, (x, y), tall, coat, trousers, phase in sorted(people, key=lambda person: person[0]):
            sway = 0.06 * tall * np.sin(0.9 * at_s + phase)
            figures.person(canvas, (x + sway, y), tall, (coat, trousers), 0.4)

    def _weigh(self, number: int, event: Event, at_s: float, here: list[Event], canvas: Field, light: Field) -> None:
        """Note whether a thing differs enough from what is there without it, and which regions it is seen in."""
        if event.what in FAULTS:
            self.due[number], self.filled[number] = True, {}
            return
        differs = np.abs(canvas - self._canvas(at_s, [one for one in here if one is not event])).max(axis=2)
        self.filled[number] = self._shares(differs > 2.0)
        shown = differs * light[:, :, 0] * (self._gain or 1.0) > SEEN_LEVELS
        region = {"garbage": "garbage", "lane": "lane"}.get(event.what, "square")
        enough = self._shares(shown)[region] > 1.3 * self.script.areas[region]
        self.due[number] = enough and float(shown.sum()) * (320 / self.place.columns) ** 2 >= SEEN_PIXELS

    def _wait(self, at_s: float, here: list[Event], canvas: Field) -> None:
        """Note what a bus that waits hides."""
        bus = next((one for one in self.script.passing if one.kind == "bus"), None)
        if bus is None or self.waited or bus.walks(at_s) or bus.place(at_s) is None:
            return
        everybody = self.script
        others = tuple(one for one in everybody.passing if one is not bus)
        self.script = msgspec.structs.replace(everybody, passing=others)
        self.waited = self._shares(np.abs(canvas - self._canvas(at_s, here)).max(axis=2) > 2.0)
        self.script = everybody

    def _shares(self, there: NDArray[np.bool_]) -> dict[str, float]:
        """Return the share of each region that a mask fills."""
        size = (self.place.columns - 1, self.place.rows - 1)
        shares = {}
        for name, region in (("garbage", self.place.bins), ("lane", self.place.lane), ("square", self.place.square)):
            mask = np.zeros(there.shape, np.uint8)
            cv2.fillPoly(mask, [np.round(np.array(region) * size).astype(np.int32)], 1)
            shares[name] = float(there[mask > 0].mean())
        return shares

    # --- light, lens, sensor ---

    def _lamp_pools(self) -> Field:
        rows, columns = self.place.rows // 4, self.place.columns // 4
        pools = np.zeros((rows, columns), np.float32)
        for x, y, wide in self.place.lamps:
            cv2.ellipse(
                pools,
                (round(x * columns), round(y * rows)),
                (round(wide * columns), round(0.6 * wide * columns)),
                0,
                0,
                360,
                1.0,
                -1,
            )
        return np.asarray(cv2.GaussianBlur(pools, (0, 0), 0.06 * columns), np.float32)

    def _light(self, at_s: float) -> Field:
        """Return by how much the light takes of each pixel, (rows, columns, 1)."""
        place = self.place
        flicker = 1.0 - (place.flicker * float(self._rng.random()) if place.light in NIGHT else 0.0)
        if self.infrared(at_s):
            rows, columns = self._pools.shape[:2]
            down, across = np.mgrid[0:rows, 0:columns].astype(np.float32)
            away = np.square(across / columns - 0.5) + np.square(down / rows - 0.65)
            light = np.asarray(0.9 * np.exp(-3.0 * away), np.float32)
        elif place.light == "night":
            light = 0.12 + 0.8 * self._pools * flicker
            if any(one.what == "moved" and one.start_s <= at_s < one.end_s for one in self.script.events):
                light = np.roll(light, (-light.shape[0] // 14, -light.shape[1] // 6), axis=(0, 1))
        else:
            level = {"noon": 1.1, "cloudy": 0.85}.get(place.light, 0.75 - 0.45 * at_s / DURATION_S)
            light = np.full(self._pools.shape, level, np.float32)
        if place.clouds:
            left = int(at_s * 1.5) % 300
            cloud = cv2.resize(self._sky[:, left : left + 100], (place.columns // 4, place.rows // 4))
            light = light * (1.0 - place.clouds * np.clip(3.0 * cloud, 0.0, 1.0))
        if place.light in NIGHT and not self.infrared(at_s):
            light = light + self._beams(at_s)
        whole = cv2.resize(np.asarray(light, np.float32), (place.columns, place.rows))
        return np.asarray(whole, np.float32)[:, :, None]

    def _beams(self, at_s: float) -> Field:
        """Return the light of headlights on the ground before each vehicle."""
        beams = np.zeros_like(self._pools)
        for one in self.script.passing:
            where = one.place(at_s)
            if one.kind not in ("car", "bus") or where is None:
                continue
            ahead = 0.2 * np.sign(np.subtract(one.goal, one.source))
            x, y = (where[0] + ahead[0]) * beams.shape[1], (where[1] + 0.3 * ahead[1]) * beams.shape[0]
            cv2.ellipse(beams, (round(x), round(y)), (beams.shape[1] // 6, beams.shape[0] // 12), 0, 0, 360, 0.9, -1)
        return np.asarray(cv2.GaussianBlur(beams, (0, 0), 4.0), np.float32)

    def _exposure(self, image: Field, step_s: float) -> float:
        """Return the camera's gain, which follows the mean of the picture."""
        night = self.place.light in NIGHT
        wanted = float(np.clip((70.0 if night else 115.0) / max(1.0, float(image[::8, ::8].mean())), 0.5, 2.5))
        if self._gain is None:
            self._gain = wanted
        self._gain += (wanted - self._gain) * min(1.0, step_s / self.place.gain_s)
        return self._gain

    def _weather(self, image: Field, at_s: float) -> None:
        place = self.place
        if place.weather == "dry":
            return
        count = 60 if place.weather == "rain" else 90
        for x, y in self._rng.integers(0, (place.columns, place.rows), (count, 2)):
            if place.weather == "rain":
                cv2.line(image, (int(x), int(y)), (int(x) + 1, int(y) + place.rows // 25), (190, 190, 190), 1)
            else:
                cv2.circle(image, (int(x), int(y)), int(self._rng.integers(1, 3)), (225, 225, 225), -1)

    def _lens(self, image: Field, one: Event) -> Field:
        match one.what:
            case "occluded":
                image[:] = one.colour
            case "half_occluded":
                edge = round(0.55 * self.place.columns)
                part = image[:, :edge] if one.shape == 0 else image[:, -edge:]
                part[:] = one.colour
            case "blur":
                return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.012 * self.place.columns), np.float32)
            case "dark":
                image *= 0.02
            case "bright":
                image += 235.0
            case _:
                pass
        return image

    def _noise(self) -> Field:
        across, down = (int(self._rng.integers(0, size)) for size in (self.place.columns, self.place.rows))
        return self._sheet[down : down + self.place.rows, across : across + self.place.columns]


def write_film(folder: Path, film: Film, fps: float) -> Path:
    """Write a film as its camera would send it; raises OSError.

    Where no ffmpeg is installed H.264 becomes MPEG-4 of a higher rate, and `film.codec` says so.
    """
    images: Iterable[NDArray[np.uint8]] = (image for _, image in film.frames(fps))
    if film.codec == "mjpeg":
        write_video(folder / "film.avi", images, fps, "MJPG")
        return folder / "film.avi"
    if film.codec == "":
        write_video(folder / "film.avi", images, fps)
        return folder / "film.avi"
    path, program = folder / "film.mp4", shutil.which("ffmpeg")
    if program is None:
        film.codec = "mp4v"  # OpenCV's encoder, at a rate of its own
        write_video(path, images, fps, "mp4v")
        return path
    encoder = ["libx264", "-preset", "veryfast"] if film.codec == "h264" else ["mpeg4"]
    argv = [
        program, "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "bgr24",
        "-s", f"{film.place.columns}x{film.place.rows}", "-r", f"{fps:g}", "-i", "-",
        "-c:v", *encoder, "-b:v", f"{film.kbit_per_s}k", "-g", f"{4 * fps:g}", "-pix_fmt", "yuv420p", str(path),
    ]  # fmt: skip
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as encoding:
        assert encoding.stdin is not None
        for image in images:
            encoding.stdin.write(image.tobytes())
        encoding.stdin.close()
    if encoding.returncode:
        raise OSError(f"{path}: ffmpeg ended with {encoding.returncode}")
    return path
