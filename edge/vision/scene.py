"""What stands in a region, and since when: regions, a background of two speeds, objects left, lanes taken, crowds.

Two backgrounds are kept (after Porikli 2007, "Detection of temporarily static regions by processing video at different
frame rates"): a *short* one that takes in within two seconds what stands still, and a *long* one that holds only what
belongs there. Where the present picture agrees with the short one and that does not with the long one, something was
left. Who walks by agrees with neither. Of what was left
- a patch that is the background, only lighter or darker, is a shadow or a lamp;
- a patch that stands out from its surroundings in the *long* background more than now is a ghost: something was taken
  away, or passed when the background was learned;
both go into the long background at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import cv2
import msgspec
import numpy as np

from edge.vision.frames import Field, Image, Mask, opened, widened
from edge.vision.patches import only_light, same_ground, taken_away

Sees = Literal["garbage", "stall", "lane", "crowd"]
METRICS: dict[Sees, str] = {"garbage": "garbage_s", "stall": "stall_s", "lane": "lane_blocked_s", "crowd": "crowd"}

SHORT_S = 1.0  # the short background takes in what stands for two to three of them
LONG_S = 30.0
SETTLE_S = 3.0
FREE_S = 1.5  # so long it must look like the background again before it is free
HIDDEN_S = 20.0  # so long something may be hidden by who passes in front of it
GAP_S = 10.0  # so long a stall may be without anybody and anything moving
STAYS_S = 4.0  # a stall is where somebody or something is for half of the time, over about so long
HALF_S = 0.69 * STAYS_S  # until what has come is said to stay
FIRST_FRAMES, FIRST_STEP_S = 9, 0.5  # the first background is the median of so many frames: who passes is not in it
CROWD_S = 5.0
OUTSIDE_S = 600.0  # where nothing is watched, what stands still belongs to the scene after so long
ABSORB_S = 86_400.0  # in a region, after a day
LEVELS = 20.0  # a difference that is none of noise
SURE_S = 60.0  # what has looked the same for so long belongs there, and is nobody
MOVED_S = 5.0
SUDDEN = 0.6  # more of the picture than that changes at once: the light, not a thing


class Region(msgspec.Struct, frozen=True):
    """A watched part of the picture. polygon: shares of width and height. area: of the region that a thing fills."""

    name: str
    sees: Sees
    polygon: tuple[tuple[float, float], ...]
    area: float
    full: float = 0.6


class Seen(msgspec.Struct, frozen=True):
    """What a region holds. value: in the metric's unit, 0 where nothing is. thing: where it is, None for a crowd."""

    region: str
    metric: str
    value: float
    thing: Mask | None = None


class Scene:
    """The regions of one camera. Every call of `look` is given the next frame (colour, analysed size) and its time."""

    def __init__(self, regions: Sequence[Region], size: tuple[int, int], background: Image | None = None) -> None:
        self._regions = {one.name: one for one in regions}
        self._masks = {one.name: polygon_mask(one.polygon, size) for one in regions}
        shape = (size[1], size[0])
        self._watched: Mask = np.zeros(shape, np.bool_)
        for mask in self._masks.values():
            self._watched |= mask
        self.long: Field | None = None if background is None else background.astype(np.float32)
        self._short: Field | None = None
        self.foreground: Mask = np.zeros(shape, np.bool_)  # all that is not the long background now
        self._entered: Field = np.full(shape, np.inf, np.float32)  # since when a pixel is not the background
        self._stood: Field = np.full(shape, np.inf, np.float32)  # since when it stands still besides
        self._things: Mask = np.zeros(shape, np.bool_)  # what of it was judged to be a thing
        self._kept: Field = np.full(shape, -np.inf, np.float32)  # when that was seen last
        self._shown: Field = np.zeros((*shape, 3), np.float32)  # how it looked then
        self._seen_s: Field = np.full(shape, -np.inf, np.float32)  # the same, but no pause moves it
        self._differed: Field = np.full(shape, -np.inf, np.float32)
        # for how long a pixel has looked like the long background, which a restart does not doubt
        self._sure: Field = np.full(shape, 0.0 if background is None else SURE_S, np.float32)
        self._moved: Field = np.full(shape, -np.inf, np.float32)
        self._origin_s: float | None = None  # fields hold seconds since then: float32 has no room for an uptime
        self._at_s = 0.0
        self._paused = False
        self._sudden_s: float | None = None
        self._stays: Field = np.zeros(shape, np.float32)  # for which share of the time it was not the background lately
        self._first: list[Image] = []
        self._first_s = -np.inf
        self._stalls: dict[str, tuple[float, float]] = {}  # by region, since when and when last
        self._crowds: dict[str, float] = {}

    def pause(self, at_s: float) -> None:
        """Let the time pass in which the picture cannot be judged: things stay, what was not judged is forgotten."""
        if self._origin_s is not None:
            self._paused = True
            self._stood[~self._things] = np.inf
            self._entered[~self._things] = np.inf
            waited = np.float32(at_s - self._origin_s - self._at_s)
            self._kept += waited
            self._differed += waited
            self._at_s = at_s - self._origin_s
            self._stalls = {name: (since, last + float(waited)) for name, (since, last) in self._stalls.items()}

    def prepare(self, frame: Image, at_s: float) -> None:
        """Take in a frame before the first that is judged: the first background is what most of them show."""
        if self.long is None and at_s - self._first_s >= FIRST_STEP_S:
            self._first = [*self._first[1 - FIRST_FRAMES :], frame]
            self._first_s = at_s

    def look(self, frame: Image, noise: float, at_s: float) -> list[Seen]:
        """Judge a frame; return what each region holds, nothing while the light changes."""
        image = frame.astype(np.float32)
        if self._origin_s is None or self._short is None:
            self._origin_s, self._short = at_s, image.copy()
            if self.long is None:
                self.long = np.median([*self._first, frame], axis=0).astype(np.float32)
                self._first = []
        now, step_s = at_s - self._origin_s, at_s - self._origin_s - self._at_s
        self._at_s = now
        assert self.long is not None
        gain = self._gain_of(image, self.long)
        image /= np.float32(gain)  # a camera exposes anew for each car that passes: all is compared as if it did not
        if self._paused:
            self._paused, self._short = False, image.copy()
        limit = max(LEVELS, 5.0 * noise) / min(1.0, gain)
        restless = _apart(image, self._short, 0.75 * limit)
        self.foreground = opened(_apart(image, self.long, limit))
        standing = opened(_apart(self._short, self.long, limit) & ~restless)
        self._moved[restless] = now
        self._sure += np.where(self.foreground, np.float32(0.0), np.float32(step_s))
        self._short += (image - self._short) * np.float32(min(1.0, step_s / SHORT_S))
        self._stays += (self.foreground - self._stays) * np.float32(min(1.0, step_s / STAYS_S))
        if self._sudden(restless, now):
            return []
        self._time(standing, restless, now)
        self._renew(image, gain, now, step_s)
        return self._seen(image, now, step_s)

    def unsure(self) -> Mask:
        """Return where the long background may hold somebody: it has not looked like that for long enough."""
        return self._sure < SURE_S

    def passing(self) -> Mask:
        """Return where something moved lately or does not belong there: whoever is in the picture is there."""
        return widened(self.foreground | (self._moved >= self._at_s - MOVED_S) | self.unsure(), 3)

    # --- the background ---

    def _gain_of(self, image: Field, long: Field) -> float:
        """Return by how much the whole picture is lighter than its background, as what was background tells it."""
        part, other = image[::8, ::8, 1], long[::8, ::8, 1]
        fit = (other > 20.0) & (part < 250.0)
        free = fit & ~self.foreground[::8, ::8]
        fit = free if free.sum() >= 0.1 * fit.size else fit  # else a lorry would pass for the light
        if fit.sum() < 0.1 * fit.size:
            return 1.0
        return float(np.clip(np.median(part[fit] / other[fit]), 0.3, 3.0))

    def _sudden(self, restless: Mask, now: float) -> bool:
        """Return whether the whole picture has just changed; what it has become then is the background."""
        if self._sudden_s is None:
            if self.foreground.mean() <= SUDDEN:
                return False
            self._sudden_s = now
        if restless.mean() > 0.2:
            self._sudden_s = now
        if now - self._sudden_s < SETTLE_S:
            return True
        assert self._short is not None
        assert self.long is not None
        self.long = np.where(self._things[:, :, None], self.long, self._short)
        self._sudden_s = None
        self._sure[~self._things] = 0.0
        return True

    def _time(self, standing: Mask, restless: Mask, now: float) -> None:
        """Keep since when each pixel is not the background, and since when it stands still."""
        self._differed[self.foreground] = now
        self._entered = np.where(self.foreground, np.minimum(self._entered, np.float32(now)), self._entered)
        self._entered[self._differed < now - FREE_S] = np.inf
        self._replace(standing & (self._seen_s < now - FREE_S) & np.isfinite(self._stood), now)
        self._kept[standing] = self._seen_s[standing] = now
        fresh = standing & ~np.isfinite(self._stood)
        if fresh.any() or (standing & (self._stood > now - SETTLE_S)).any():
            fresh |= standing & (self._stood > now - SETTLE_S)
            assert self._short is not None
            self._shown[fresh] = self._short[fresh]
        self._stood = np.where(standing, np.minimum(self._stood, np.float32(now)), self._stood)
        free = ~self.foreground & ~restless
        self._stood[(self._kept < now - HIDDEN_S) | (free & (self._kept < now - FREE_S))] = np.inf

    def _replace(self, again: Mask, now: float) -> None:
        """Begin anew where something else stands than stood there before it was hidden."""
        assert self._short is not None
        if again.any():
            other = again & _apart(self._short, self._shown, 2.0 * LEVELS)
            self._stood[other] = self._entered[other] = now
            self._things &= ~other

    def _renew(self, image: Field, gain: float, now: float, step_s: float) -> None:
        """Let the long background follow the light, and take in what has stood for long enough."""
        assert self.long is not None
        assert self._short is not None
        rate = min(1.0, step_s / LONG_S)
        near = widened(self.foreground, 2)[:, :, None]
        self.long += np.where(near, np.float32(0.0), (image - self.long) * np.float32(rate))
        drift = np.float32(1.0 + (gain - 1.0) * rate)  # what stands there becomes lighter and darker with the rest
        self.long *= drift
        self._short *= drift
        stood_s = now - self._stood
        self._absorb((stood_s > np.where(self._watched, ABSORB_S, OUTSIDE_S)) & np.isfinite(self._stood))

    def _absorb(self, patch: Mask) -> None:
        """Take a patch into the long background."""
        if not patch.any():
            return
        assert self._short is not None
        assert self.long is not None
        patch = widened(patch, 2)
        self.long[patch] = self._short[patch]
        self._stood[patch] = np.inf
        self._entered[patch] = np.inf
        self._things &= ~patch
        self._sure[patch] = 0.0
        self.foreground &= ~patch

    # --- the regions ---

    def _seen(self, image: Field, now: float, step_s: float) -> list[Seen]:
        self._vet(now)
        left = self._things & self._watched
        found = []
        for name, region in self._regions.items():
            mask = self._masks[name]
            match region.sees:
                case "garbage":
                    found.append(self._object(region, left & mask, mask, now))
                case "lane":
                    found.append(self._taken(region, left & mask, mask, now))
                case "stall":
                    stays = self._solid(image, mask) & (self._stays > 0.5)
                    found.append(self._stall(region, stays, mask, now))
                case "crowd":
                    found.append(self._crowd(region, self._solid(image, mask), mask, step_s))
        return found

    def _vet(self, now: float) -> None:
        """Judge what has come to stand, each patch once and as a whole: a thing, or else part of the background."""
        patches = np.isfinite(self._stood)
        self._things &= patches
        if not (patches & self._watched & ~self._things & (self._stood <= now - SETTLE_S)).any():
            return
        count, labels = cv2.connectedComponents(widened(patches, 2).view(np.uint8))
        for label in range(1, count):
            whole: Mask = np.asarray(labels == label, np.bool_)
            patch = whole & patches  # also where nobody watches: the edge of a region is no outline
            fresh = patch & ~self._things
            if fresh.sum() < 0.2 * patch.sum() or not (fresh & self._watched).any():
                continue
            if (self._stood[fresh] > now - SETTLE_S).mean() > 0.1:
                continue
            self._judge(patch, fresh)

    def _judge(self, patch: Mask, fresh: Mask) -> None:
        """Take what is fresh of a patch for things, or into the background; a shadow is taken off a thing in it."""
        assert self._short is not None
        assert self.long is not None
        lit = fresh & same_ground(fresh, self._short, self.long)
        rest = opened(fresh & ~lit)
        if rest.sum() < 0.1 * fresh.sum():
            lit, rest = fresh, np.zeros_like(rest)
        if lit.sum() > 0.1 * fresh.sum():
            self._absorb(lit & ~widened(rest, 2))
        if not rest.any():
            return
        soft = only_light(rest, self.foreground, self._short, self.long)
        if soft or taken_away(rest, self.foreground, self.long, self._short):
            self._absorb(rest)
        else:
            self._things |= patch & ~lit

    def _solid(self, image: Field, mask: Mask) -> Mask:
        """Return what is in a region, moving or not, without shadows and lamps that wander over it."""
        there = self.foreground & mask
        if there.sum() < 0.01 * mask.sum():
            return there
        assert self.long is not None
        count, labels = cv2.connectedComponents(there.view(np.uint8))
        for label in range(1, count):
            patch: Mask = np.asarray(labels == label, np.bool_)
            if patch.sum() < 0.01 * mask.sum():
                continue
            lit = patch & same_ground(patch, image, self.long)
            rest = patch & ~lit
            if rest.sum() < 0.1 * patch.sum() or only_light(rest, self.foreground, image, self.long):
                lit = patch
            there &= ~lit
        return there

    def _object(self, region: Region, left: Mask, mask: Mask, now: float) -> Seen:
        """Return the oldest thing that was left in a region."""
        least = region.area * mask.sum()
        closed = cv2.morphologyEx(left.view(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        count, labels, stats, _ = cv2.connectedComponentsWithStats(closed)
        oldest: tuple[float, Mask] | None = None
        for label in range(1, count):
            thing: Mask = np.asarray(labels == label, np.bool_)
            if stats[label, cv2.CC_STAT_AREA] >= least and (oldest is None or self._age(thing, now) > oldest[0]):
                oldest = self._age(thing, now), thing
        value, where = oldest or (0.0, None)
        return Seen(region.name, METRICS[region.sees], value, where)

    def _taken(self, region: Region, left: Mask, mask: Mask, now: float) -> Seen:
        """Return since when so much of a region is taken by what stands."""
        if left.sum() < region.area * mask.sum():
            return Seen(region.name, METRICS[region.sees], 0.0)
        return Seen(region.name, METRICS[region.sees], self._age(left, now), left)

    def _age(self, thing: Mask, now: float) -> float:
        """Return for how long a thing has been there: since it entered, but what passed there before it is not it."""
        stood = self._stood[thing & np.isfinite(self._stood)]
        entered = self._entered[thing & np.isfinite(self._entered)]
        since = float(np.median(stood)) if stood.size else now
        came = float(np.median(entered)) if entered.size else since
        seen_s = float(np.median(self._seen_s[thing]))  # while it is hidden it may have gone
        return max(1e-3, min(now, seen_s) - max(min(came, since), since - SETTLE_S))

    def _stall(self, region: Region, there: Mask, mask: Mask, now: float) -> Seen:
        """Return since when somebody or something has stayed in so much of a region, moving or not."""
        since, last = self._stalls.get(region.name, (now, -np.inf))
        if now - last > GAP_S:
            since = max(0.0, now - HALF_S)
        if there.sum() >= region.area * mask.sum():
            last = now
            self._stalls[region.name] = since, last
        if now - last > GAP_S:
            self._stalls.pop(region.name, None)
            return Seen(region.name, METRICS[region.sees], 0.0)
        return Seen(region.name, METRICS[region.sees], max(now - since, 1e-3), there)

    def _crowd(self, region: Region, there: Mask, mask: Mask, step_s: float) -> Seen:
        """Return how full a region is, 0 to 1, smoothed."""
        share = float(there.sum() / max(1, mask.sum())) / region.full
        level = self._crowds.get(region.name, 0.0)
        level += (min(1.0, share) - level) * min(1.0, step_s / CROWD_S)
        self._crowds[region.name] = level
        return Seen(region.name, METRICS[region.sees], level)


def polygon_mask(polygon: Sequence[tuple[float, float]], size: tuple[int, int]) -> Mask:
    """Return the pixels (rows, columns) within a polygon of shares of width and height."""
    corners = np.round(np.array(polygon) * (size[0] - 1, size[1] - 1)).astype(np.int32)
    mask = np.zeros((size[1], size[0]), np.uint8)
    cv2.fillPoly(mask, [corners], 1)
    return mask.view(np.bool_)


def highest(seen: Sequence[Seen]) -> Mapping[str, Seen]:
    """Return by metric what is told of a camera: the region that holds the most."""
    found: dict[str, Seen] = {}
    for one in seen:
        if one.metric not in found or one.value > found[one.metric].value:
            found[one.metric] = one
    return found


def _apart(one: Field, other: Field, limit: float) -> Mask:
    """Return where two images differ by more than a limit in any colour."""
    difference = cv2.absdiff(one, other)
    return np.asarray(cv2.max(cv2.max(difference[:, :, 0], difference[:, :, 1]), difference[:, :, 2])) > limit
