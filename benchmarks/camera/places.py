"""What the camera driver finds, and what it says for nothing, at random places that it was not made for.

`benchmarks.camera --seed S --scenes N` runs it: films of the seeds S to S+N-1 (simulators/lines/film.py), two minutes
each, encoded and decoded as a camera's are, 5 frames a second looked at. Seeds 100–119 are those to develop on; a
figure is one of seeds that nobody has looked at.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from edge.vision.frames import Image
from edge.vision.health import Trouble
from edge.vision.scene import METRICS, Region, Sees
from edge.vision.watch import Watch, Watched
from simulators.lines.film import Film, write_film
from simulators.lines.script import DURATION_S, DWELL_S, FAULTS, Event

FPS = 5.0
BAR_S, CROWD_BAR_S = 2.0, 10.0  # a crowd is told from half of full on, smoothed over 5 s
AFTER_S = 3.0  # so long a fault may be told after its end
COVER = frozenset((Trouble.BLURRED, Trouble.MOVED, Trouble.DARK, Trouble.BRIGHT))
MEANT: dict[str, frozenset[Trouble]] = {
    "occluded": COVER,  # at night a cap is dark
    "half_occluded": COVER - {Trouble.DARK, Trouble.BRIGHT},
    "blur": frozenset((Trouble.BLURRED,)),
    "freeze": frozenset((Trouble.FROZEN,)),
    "dark": frozenset((Trouble.DARK,)),
    "bright": frozenset((Trouble.BRIGHT,)),
    "moved": frozenset((Trouble.MOVED,)),
}


class Found(msgspec.Struct, frozen=True):
    """What became of a planted event. delay_s: beyond its dwell; None: it was missed. due: it could be seen."""

    seed: int
    what: str
    due: bool
    delay_s: float | None


class Result(msgspec.Struct, frozen=True):
    """What was said of one film. wrong_health, wrong_events: (time, what) of what is told for nothing."""

    seed: int
    codec: str
    found: tuple[Found, ...]
    wrong_health: tuple[tuple[float, str], ...]
    wrong_events: tuple[tuple[float, str], ...]


def watch_of(film: Film) -> Watch:
    """Return what watches a film's regions, as a technician would have configured it."""
    place, script = film.place, film.script
    regions = (
        (Region("garbage", "garbage", place.bins, script.areas["garbage"]), DWELL_S["garbage"]),
        (Region("lane", "lane", place.lane, script.areas["lane"]), DWELL_S["lane"]),
        (Region("square", script.square_sees, place.square, script.areas["square"]), DWELL_S["stall"]),
    )
    return Watch([Watched(region, dwell_s) for region, dwell_s in regions], 320)


def run(seed: int, clips: Path | None = None) -> Result:
    """Film a place, watch the film, and compare; clips: where films are kept from one run to the next."""
    film = Film(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if clips is None else clips / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        path = _filmed(film, folder)
        watching = watch_of(film)
        troubles: list[tuple[float, frozenset[Trouble]]] = []
        begun: list[tuple[float, str]] = []
        for at_s, image in _frames(path):
            look = watching.look(image, at_s)
            troubles.append((at_s, look.picture.troubles))
            begun += [(at_s, event.metric) for event in look.events if event.seen is not None]
    found = tuple(
        Found(seed, event.what, film.due[number], _delay(event, troubles, begun))
        for number, event in enumerate(film.script.events)
    )
    return Result(seed, film.codec, found, _wrong_health(film, troubles), _wrong_events(film, begun))


class _Truth(msgspec.Struct):
    codec: str
    due: dict[int, bool]
    filled: dict[int, dict[str, float]]
    waited: dict[str, float]


def _filmed(film: Film, folder: Path) -> Path:
    """Return a film's file, made unless it is there with its truth."""
    truth = folder / "truth.json"
    if truth.exists():
        known = msgspec.json.decode(truth.read_bytes(), type=_Truth)
        film.codec, film.due, film.filled, film.waited = known.codec, known.due, known.filled, known.waited
        return next(folder.glob("film.*"))
    path = write_film(folder, film, FPS)
    truth.write_bytes(msgspec.json.encode(_Truth(film.codec, film.due, film.filled, film.waited)))
    return path


def _frames(path: Path) -> Iterator[tuple[float, Image]]:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    number = 0
    while capture.grab():
        yield number / FPS, np.asarray(capture.retrieve()[1], np.uint8)
        number += 1


def _delay(
    event: Event, troubles: Sequence[tuple[float, frozenset[Trouble]]], begun: Sequence[tuple[float, str]]
) -> float | None:
    if event.what in FAULTS:
        told = [at_s for at_s, now in troubles if now & MEANT[event.what]]
        return next((at_s - event.start_s for at_s in told if event.start_s <= at_s < event.end_s), None)
    metric, dwell_s = METRICS[_sees(event.what)], DWELL_S.get(event.what, 0.0)
    told = [at_s for at_s, name in begun if name == metric]
    return next((at_s - event.start_s - dwell_s for at_s in told if event.start_s <= at_s < event.end_s), None)


def _sees(what: str) -> Sees:
    assert what in METRICS
    return what


def _wrong_health(film: Film, troubles: Sequence[tuple[float, frozenset[Trouble]]]) -> tuple[tuple[float, str], ...]:
    """Return each trouble that began while nothing was wrong."""
    faults = [one for one in film.script.events if one.what in FAULTS]
    wrong, before = [], frozenset[Trouble]()
    for at_s, now in troubles:
        meant = any(one.start_s <= at_s < one.end_s + AFTER_S for one in faults)
        wrong += [(at_s, trouble.name) for trouble in sorted(now - before) if not meant]
        before = now
    return tuple(wrong)


def _wrong_events(film: Film, begun: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Return each event that nothing explains: neither what was planted nor what stands before its region."""
    wrong = []
    for at_s, metric in begun:
        sees = next(name for name, other in METRICS.items() if other == metric)
        region = sees if sees in ("garbage", "lane") else "square"
        here = [n for n, one in enumerate(film.script.events) if one.start_s <= at_s < one.end_s + AFTER_S]
        explained = any(film.filled[number].get(region, 0.0) > 0.003 for number in here)
        buses = [one for one in film.script.passing if one.kind == "bus" and one.start_s < at_s < one.start_s + 29.0]
        hidden = bool(buses) and sees != "lane" and film.waited.get(region, 0.0) > 0.003
        if not explained and not hidden:
            wrong.append((at_s, metric))
    return tuple(wrong)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Return the figures of many films, by kind of what was planted."""
    hours = len(results) * DURATION_S / 3600
    found = [one for result in results for one in result.found]
    kinds = {what: _of_kind([one for one in found if one.what == what]) for what in sorted({one.what for one in found})}
    health, events = (sum(len(getattr(one, name)) for one in results) for name in ("wrong_health", "wrong_events"))
    return {
        "scenes": len(results),
        "codecs": Counter(one.codec or "raw" for one in results),
        "camera_hours": round(hours, 3),
        "kinds": kinds,
        "false_health": health,
        "false_health_per_hour": round(health / hours, 2),
        "false_events_told": events,
        "false_events_per_hour": round(events / hours, 2),
    }


def _of_kind(found: Sequence[Found]) -> dict[str, Any]:
    due = [one for one in found if one.due]
    delays = sorted(one.delay_s for one in due if one.delay_s is not None)
    in_time = [delay_s for delay_s in delays if delay_s <= (CROWD_BAR_S if found[0].what == "crowd" else BAR_S)]
    return {
        "planted": len(found),
        "due": len(due),
        "in_time": len(in_time),
        "late": len(delays) - len(in_time),
        "missed": len(due) - len(delays),
        "delay_s_p95": round(float(np.percentile(delays, 95)), 2) if delays else None,
        "delay_s_worst": round(delays[-1], 2) if delays else None,
    }


def notes(results: Sequence[Result]) -> Iterator[str]:
    """Yield a line for all that went wrong, by seed."""
    for result in results:
        for one in result.found:
            bar_s = CROWD_BAR_S if one.what == "crowd" else BAR_S
            if one.due and (one.delay_s is None or one.delay_s > bar_s):
                yield f"seed {one.seed}: {one.what} {'missed' if one.delay_s is None else f'{one.delay_s:.1f} s late'}"
        for at_s, what in (*result.wrong_health, *result.wrong_events):
            yield f"seed {result.seed}: {what} at {at_s:g} s for nothing"
