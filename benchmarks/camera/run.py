"""What a camera costs: frames of 720p a second of one core, and how soon what is planted is found.

    python -m benchmarks.camera --json [--clip FILE]
    python -m benchmarks.camera --json --seed 1000 --scenes 40 [--clips FOLDER] [--jobs 2]

Rates are by processor seconds of this process (decoder threads: 1), so that other work on the machine counts little:

decoded_per_s    frames read and decoded, not looked at (the clip is 720p MPEG-4 of a synthetic street, or `--clip`)
analysed_per_s   decoded frames brought to the analysed width, with health and four regions judged
frames_per_s     both, of every frame; as_configured_per_s: every frame decoded, 5 a second of 25 looked at
health_delay_s   by planted fault, the longest time until it was found (bar: 2 s)
dwell_delay_s    the longest time beyond the dwell until a thing that was left was told (bar: 2 s)
false_events     events and faults in 10 minutes of passers-by, a lorry, rain, shadow, cloud, wind and dusk
rss_mb           of this process at its end

With `--scenes` it measures those instead, at random places (places.py): by kind what was planted, how
much of it was due (it can be seen at all), found in time, late or missed; and what was said for nothing an hour.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.camera import places
from edge.vision.frames import Image
from edge.vision.health import Trouble
from edge.vision.scene import Region
from edge.vision.watch import Watch, Watched
from simulators.lines.video import BINS, LANE, Planted, Street, What, write_video

COLUMNS, ROWS, CLIP_FPS, CLIP_FRAMES = 1280, 720, 25.0, 150
LOOK_FPS, DWELL_S = 5.0, 5.0
SEEDS = range(5)
PLANTED_S, ENDS_S = 10.0, 18.0
FAULTS: tuple[tuple[What, Trouble], ...] = (
    ("occluded", Trouble.BLURRED), ("half_occluded", Trouble.MOVED), ("blur", Trouble.BLURRED),
    ("freeze", Trouble.FROZEN), ("dark", Trouble.DARK), ("bright", Trouble.BRIGHT), ("moved", Trouble.MOVED),
)  # fmt: skip
PASSING: tuple[What, ...] = ("walker", "rain", "shadow", "light", "shake", "night")


def watch() -> Watch:
    """Return four regions that are watched."""
    regions = [
        Region("bins", "garbage", BINS, 0.01),
        Region("pavement", "stall", BINS, 0.1),
        Region("lane", "lane", LANE, 0.15),
        Region("square", "crowd", BINS, 0.01),
    ]
    return Watch([Watched(region, 60.0 if region.sees == "stall" else DWELL_S) for region in regions], 320)


def spent(work: Callable[[], int]) -> float:
    """Return how much is done a processor second."""
    began = time.process_time()
    return work() / (time.process_time() - began)


def decode(clip: Path, look: Callable[[int, Image], object] | None) -> int:
    """Read a clip to its end; return its frames."""
    capture = cv2.VideoCapture(str(clip), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    number = 0
    while capture.grab():
        if look is not None:
            look(number, np.asarray(capture.retrieve()[1], np.uint8))
        number += 1
    return number


def rates(clip: Path) -> dict[str, float]:
    """Return the rates of a clip."""
    every, some = watch(), watch()
    frames: list[Image] = []
    decode(clip, lambda number, image: frames.append(image) if number < 50 else None)

    def analyse() -> int:
        watching = watch()
        for number in range(150):
            watching.look(frames[number % len(frames)], number / LOOK_FPS)
        return 150

    def configured(number: int, image: Image) -> None:
        if number % round(CLIP_FPS / LOOK_FPS) == 0:
            some.look(image, number / CLIP_FPS)

    return {
        "decoded_per_s": spent(lambda: decode(clip, None)),
        "analysed_per_s": spent(analyse),
        "frames_per_s": spent(lambda: decode(clip, lambda number, image: every.look(image, number / CLIP_FPS))),
        "as_configured_per_s": spent(lambda: decode(clip, configured)),
    }


def health_delays() -> dict[str, float]:
    """Return by fault how long finding it took at most."""
    found: dict[str, float] = {}
    for what, trouble in FAULTS:
        for seed in SEEDS:
            watching = watch()
            delay_s = float("inf")
            for at_s, image in Street(seed, [Planted(what, PLANTED_S, ENDS_S)]).frames(ENDS_S, LOOK_FPS):
                if trouble in watching.look(image, at_s).picture.troubles:
                    delay_s = at_s - PLANTED_S
                    break
            found[what] = max(found.get(what, 0.0), delay_s)
    return found


def dwell_delay() -> float:
    """Return how long beyond its dwell a bag, and a car in the lane, took at most."""
    longest = 0.0
    for what, metric in (("garbage", "garbage_s"), ("lane", "lane_blocked_s")):
        for seed in SEEDS:
            watching = watch()
            street = Street(seed, [Planted(what, PLANTED_S)])  # type: ignore[arg-type]
            delay_s = float("inf")
            for at_s, image in street.frames(PLANTED_S + DWELL_S + 10.0, LOOK_FPS):
                events = watching.look(image, at_s).events
                if any(event.metric == metric and event.seen is not None for event in events):
                    delay_s = at_s - PLANTED_S - DWELL_S
                    break
            longest = max(longest, delay_s)
    return longest


def false_events() -> int:
    """Count what is told while nothing is to be told: 100 s of each noise."""
    count = 0
    for seed, what in enumerate(PASSING):
        watching = watch()
        planted = [Planted(what, 10.0), Planted("walker", 15.0), Planted("lorry", 40.0, 46.0)]
        for at_s, image in Street(seed, planted).frames(100.0, LOOK_FPS):
            look = watching.look(image, at_s)
            lorry = 40.0 <= at_s < 49.0  # before the lens: its view is another one, and that is said
            count += sum(event.value > 0.0 for event in look.events) + (look.changed and not lorry)
    return count


def street_clip(folder: Path) -> Path:
    """Return a clip of 720p with somebody in it."""
    path = folder / "street.mp4"
    street = Street(1, [Planted("walker", 0.0)], COLUMNS, ROWS)
    images: Iterable[Image] = (street.frame(number / CLIP_FPS) for number in range(CLIP_FRAMES))
    write_video(path, images, CLIP_FPS, "mp4v")
    return path


def random_places(options: argparse.Namespace) -> int:
    """Measure at random places; print what went wrong, and the figures."""
    seeds = range(options.seed, options.seed + options.scenes)
    with ProcessPoolExecutor(options.jobs, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        results = list(pool.map(partial(places.run, clips=options.clips), seeds))
    for note in places.notes(results):
        print(note, file=sys.stderr)
    figures = places.summary(results)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=1))
    return 0


def main() -> int:
    """Measure; print a table, or JSON."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.camera", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", type=Path, help="a video to decode instead of the synthetic one")
    parser.add_argument("--seed", type=int, default=100, help="the first random place; 100 to 119 are to develop on")
    parser.add_argument("--scenes", type=int, default=0, help="how many random places")
    parser.add_argument("--clips", type=Path, help="keep their films in this folder")
    parser.add_argument("--jobs", type=int, default=1, help="films at a time")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.scenes:
        return random_places(options)
    with tempfile.TemporaryDirectory() as folder:
        clip = options.clip or street_clip(Path(folder))
        result: dict[str, Any] = {name: round(rate, 1) for name, rate in rates(clip).items()}
    result["health_delay_s"] = {what: round(delay_s, 2) for what, delay_s in health_delays().items()}
    result["dwell_delay_s"] = round(dwell_delay(), 2)
    result["false_events"] = false_events()
    result["rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<20} {value}")
    return 0
