"""Is the picture one? Brightness, sharpness and view against the camera's own normal, and whether it still lives.

A picture is cut into blocks. Those that have structure in the slowly renewed *reference* are compared with it:
- a block that does not correlate with its reference looks at something else (the view moved, something hangs there);
- one whose coarse gradients are gone is covered;
- sharpness is fine over coarse gradients, of each block against its own: blur takes the fine ones, dusk takes both.
  Sensor noise and the squares of a codec would look fine too: the finest is left out, and what of the noise remains,
  known from the difference of frames, is taken off.
A block in which something moves keeps its last judgement: a lorry that passes is not a moved camera. Nor is a bus that
waits: it hides a part, in which there is as much to see as before. A part is doubted only when it has lasted.
"""

from __future__ import annotations

import enum
from collections import deque

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.vision.frames import BLOCKS, Field, Image, Mask, by_block, noise_of, slope, smooth

WARM_S = 4.0  # so long the reference is the mean of what is seen
NOISE_FRAMES = 50
WINDOW_S = 1.5  # medians over so much: one bad frame says nothing, and what is found is found within 2 s
COARSE_SIGMA = 2.5
FINE_SIGMA = 1.0
FINE_NOISE = 0.112  # the sum of the squares of the weights of a Laplacian of such a Gaussian
ABOVE_NOISE = 4.0  # a block's usual fineness must stand so far above the noise (power), or it is not judged
STRUCTURE = 0.5  # levels a pixel: a block with less has nothing to recognise it by
LEAST_BLOCKS = 8  # with fewer of them nothing is said about the view
FEWEST_BLOCKS = 4  # … about the sharpness
SAME_VIEW, COVERED = 0.4, 0.25
PART = 0.3  # of the structure: more is doubted when it has lasted
MOST = 0.5  # … and more than that at once
PART_S = 60.0  # longer than a bus waits at the lights
QUIET = 0.15  # of the least that ever changes: less is a frozen picture that was encoded once more
LEAST_CHANGE = 0.3  # levels: a camera that is more quiet than that is only frozen when nothing at all changes
RENEW_S = 600.0  # the reference follows light and seasons that slowly
ACCEPT_S = 86_400.0  # a view that stays changed for a day was meant
LEARN_S = 3600.0  # the normal sharpness follows that slowly
FROZEN_S, MOST_REPEATED_S = 1.2, 12.0  # no usual codec repeats a frame for longer than its 12 s between key frames
LIVING = 0.002  # `motion` of a living picture is at least that; 0 is a frozen one (rules/library/cameras.yaml)


class Trouble(enum.StrEnum):
    """What is wrong with a picture."""

    FROZEN = "the picture is frozen"
    DARK = "the picture is dark"
    BRIGHT = "the picture is overexposed"
    BLURRED = "the picture is blurred or covered"
    MOVED = "the view is not the usual one"


class Picture(msgspec.Struct, frozen=True):
    """The health of a picture, in the units of `citybrain.units`. None: it could not be measured."""

    brightness: float
    motion: float
    sharpness: float | None
    view_shift: float | None
    noise: float
    troubles: frozenset[Trouble]


class Normal(msgspec.Struct):
    """What a camera has learned of itself. repeated_s: the codec's rests.

    fineness: fine over coarse gradients, by block, row by row. change: the least that its frames differ, in levels.
    """

    fineness: list[float] = []
    repeated_s: float = 0.0
    change: float | None = None


class Health:
    """One camera's picture. Every call of `look` is given the next frame and its monotonic time."""

    def __init__(self, normal: Normal | None = None, reference: Field | None = None) -> None:
        self.normal = normal or Normal()
        self.reference = reference
        self.accepted = False  # a changed view has just become the usual one
        self._warm_until_s: float | None = None if reference is None else -1.0
        self._before: Image | None = None
        self._at_s = 0.0
        self._changed_s = 0.0  # when two frames differed last
        self._recent: deque[tuple[float, float, float]] = deque()  # time, brightness, view shift
        self._focused: deque[tuple[float, float]] = deque()  # judged time, sharpness of what is not covered
        self._judged_s = 0.0  # the time in which the sharpness could be judged
        self._noises: deque[float] = deque(maxlen=NOISE_FRAMES)
        # time, by how much the quieter half of the picture changed, and what moved
        self._changes: deque[tuple[float, float, float]] = deque()
        self._calm_s = 0.0 if self.normal.change is None else MOST_REPEATED_S  # for so long that was learned
        self._fineness: Field = np.zeros(BLOCKS[::-1], np.float32)
        self._fine_frames = 0
        self._fine_s = 0.0  # for so long it was learned
        if self.normal.fineness:
            self._fineness[:] = np.array(self.normal.fineness, np.float32).reshape(BLOCKS[::-1])
            self._fine_s = WARM_S
        self._odd: Mask = np.zeros(BLOCKS[::-1], np.bool_)
        self._covered: Mask = np.zeros(BLOCKS[::-1], np.bool_)
        self._bare = 0.0  # the share of the structure that is covered
        self._odd_since_s: float | None = None
        self._warm_frames = 0
        self._troubles: set[Trouble] = set()

    @property
    def warm(self) -> bool:
        """Whether there is a reference to compare with."""
        return self._warm_until_s is not None and self._at_s >= self._warm_until_s

    def look(self, frame: Image, at_s: float) -> Picture:
        """Judge a grey frame (analysed size)."""
        before = frame if self._before is None else self._before
        step_s = 0.0 if self._before is None else max(0.0, at_s - self._at_s)
        difference = np.asarray(cv2.absdiff(frame, before), np.uint8)
        signed = np.asarray(cv2.subtract(frame, before, dtype=cv2.CV_32F), np.float32)
        noise = self._noise_now(noise_of(signed))
        moving: Mask = difference > max(8.0, 6.0 * noise)
        self._before, self._at_s = frame, at_s
        still_s = self._still_s(bool(difference.any()), at_s)
        quiet = self._is_quiet(float(np.median(by_block(difference))), float(moving.mean()), at_s)
        coarse = smooth(frame, COARSE_SIGMA)
        shift = self._compare(frame, coarse, by_block(moving) > 0.1, noise, at_s, step_s)
        self._recent.append((at_s, float(frame.mean()) / 255.0, shift))
        while self._recent[0][0] < at_s - WINDOW_S:
            self._recent.popleft()
        return self._said(float(moving.mean()), noise, still_s, quiet)

    def _is_quiet(self, change: float, motion: float, at_s: float) -> bool:
        """Return whether frames differ by far less than they ever do: one picture, encoded again and again.

        Sensor noise is new in each frame, also where a codec leaves little of it; the least of it is learned. Where
        something moves the picture lives, however quiet it has become.
        """
        self._changes.append((at_s, change, motion))
        while self._changes[0][0] < at_s - FROZEN_S:
            self._changes.popleft()
        if at_s - self._changes[0][0] < 0.8 * FROZEN_S or not self.warm or Trouble.DARK in self._troubles:
            return False
        columns = np.array(self._changes, np.float64)
        now, usual = float(np.median(columns[:, 1])), self.normal.change
        self._calm_s += at_s - self._changes[-2][0]
        quiet = usual is not None and self._calm_s >= MOST_REPEATED_S and LEAST_CHANGE < usual > now / QUIET
        if usual is None or not quiet or np.median(columns[:, 2]) > LIVING / 2:
            self.normal.change = now if usual is None else min(usual, now)
            return False
        return bool(columns[:, 2].max() <= LIVING / 2)

    def _noise_now(self, changed: float) -> float:
        """Return the sensor's noise: the least that changed lately, since wind and a cloud change the picture too."""
        if changed > 0.0:  # a frame that is only repeated says nothing of it
            self._noises.append(changed)
        return min(self._noises, default=0.0)

    def _still_s(self, changed: bool, at_s: float) -> float:
        """Return for how long frames have repeated; learn how long the codec does that on a living picture."""
        if not changed and self._changed_s:
            return at_s - self._changed_s
        run_s = at_s - self._changed_s if self._changed_s else 0.0
        if Trouble.DARK not in self._troubles and FROZEN_S / 4 < run_s <= MOST_REPEATED_S:
            self.normal.repeated_s = max(self.normal.repeated_s, run_s)
        self._changed_s = at_s
        return 0.0

    def _compare(self, frame: Image, coarse: Field, moving: Mask, noise: float, at_s: float, step_s: float) -> float:
        """Return the view shift against the reference, NaN where it cannot be said; judge the sharpness besides."""
        if self._warm_until_s is None:
            self._warm_until_s = at_s + WARM_S
        fine = by_block(np.square(cv2.Laplacian(smooth(frame, FINE_SIGMA), cv2.CV_32F))) - FINE_NOISE * noise**2
        steep = np.sqrt(by_block(np.square(slope(coarse))))
        ratio = np.sqrt(np.maximum(fine, 0.0)) / np.maximum(steep, 1e-3)
        if self._fine_s < WARM_S:
            self._learn(ratio, step_s)
        if not self.warm:
            return self._warm_up(coarse)
        assert self.reference is not None
        usual = np.sqrt(by_block(np.square(slope(self.reference))))
        structured: Mask = usual > STRUCTURE
        if int(structured.sum()) < LEAST_BLOCKS:
            self._renew(coarse, step_s, np.zeros_like(moving))
            self._focused.clear()
            return float("nan")
        light = np.clip(by_block(coarse) / np.maximum(by_block(self.reference), 1.0), 0.1, 1.0)
        covered = structured & (steep < COVERED * usual * light)
        odd = structured & ((_correlation(coarse, self.reference) < SAME_VIEW) | covered)
        self._odd = np.where(moving, self._odd, odd) & structured
        self._covered = np.where(moving, self._covered, covered) & structured
        shift = float(self._odd.sum() / structured.sum())
        self._odd_since_s = None if shift <= PART else at_s if self._odd_since_s is None else self._odd_since_s
        self._bare = float(self._covered.sum() / structured.sum())
        seen = structured & ~self._covered
        self._focus(ratio, seen & ~moving & self._judged(np.asarray(usual * light, np.float32), noise), seen, step_s)
        self._follow(coarse, step_s, shift, at_s)
        return shift

    def _judged(self, steep: Field, noise: float) -> Mask:
        """Return which blocks usually have, in the present light, more that is fine than the noise has."""
        return np.asarray(np.square(self._fineness * steep) > max(1.0, ABOVE_NOISE * FINE_NOISE * noise**2))

    def _focus(self, ratio: Field, still: Mask, seen: Mask, step_s: float) -> None:
        """Compare each block's fineness with its usual one, unless most of what is seen changes."""
        if self._fine_s < WARM_S or still.sum() < max(FEWEST_BLOCKS, 0.3 * seen.sum()):
            return
        self._judged_s += step_s
        self._focused.append((self._judged_s, float(np.median(ratio[still] / self._fineness[still]))))
        while self._focused[0][0] < self._judged_s - WINDOW_S:
            self._focused.popleft()
        if not self._troubles:
            self._fineness += np.where(still, (ratio - self._fineness) * np.float32(min(1.0, step_s / LEARN_S)), 0.0)
            self.normal.fineness = self._fineness.ravel().tolist()

    def _learn(self, ratio: Field, step_s: float) -> None:
        """Take the first fineness for the usual one."""
        self._fine_s += step_s
        self._fine_frames += 1
        self._fineness += (ratio - self._fineness) / self._fine_frames
        self.normal.fineness = self._fineness.ravel().tolist()

    def _warm_up(self, coarse: Field) -> float:
        self._warm_frames += 1
        if self.reference is None:
            self.reference = coarse.copy()
        else:
            self.reference += (coarse - self.reference) / self._warm_frames
        return float("nan")

    def _follow(self, coarse: Field, step_s: float, shift: float, at_s: float) -> None:
        """Renew the reference: slowly, and not where it is contradicted as long as the whole view is in doubt."""
        if Trouble.DARK in self._troubles or Trouble.BRIGHT in self._troubles or Trouble.BLURRED in self._troubles:
            return
        if shift <= PART or self._odd_since_s is None:
            self._renew(coarse, step_s, np.zeros_like(self._odd))
            return
        if at_s - self._odd_since_s > ACCEPT_S:
            self.reference, self.accepted, self._odd_since_s = coarse.copy(), True, None
        else:
            self._renew(coarse, step_s, self._odd)

    def _renew(self, coarse: Field, step_s: float, kept: Mask) -> None:
        assert self.reference is not None
        size = (self.reference.shape[1], self.reference.shape[0])
        keep = np.asarray(cv2.resize(kept.view(np.uint8), size, interpolation=cv2.INTER_NEAREST), np.uint8)
        rate = np.float32(min(1.0, step_s / RENEW_S))
        self.reference += np.where(keep > 0, np.float32(0.0), (coarse - self.reference) * rate)

    def _said(self, motion: float, noise: float, still_s: float, quiet: bool) -> Picture:
        columns = np.array(self._recent, np.float64)
        brightness, shift = float(np.median(columns[:, 1])), _median(columns[:, 2])
        sharpness = self._sharpness(shift)
        self._judge(Trouble.DARK, brightness < 0.03, brightness > 0.04)
        self._judge(Trouble.BRIGHT, brightness > 0.92, brightness < 0.88)
        self._judge(Trouble.BLURRED, sharpness is not None and sharpness < 0.4, sharpness is None or sharpness > 0.5)
        self._judge(Trouble.MOVED, shift is not None and self._doubted(shift), shift is None or shift < 0.2)
        frozen = quiet or still_s > max(FROZEN_S, 2.0 * self.normal.repeated_s)
        frozen = frozen and Trouble.DARK not in self._troubles
        self._judge(Trouble.FROZEN, frozen, not frozen)
        motion = 0.0 if Trouble.FROZEN in self._troubles else max(motion, LIVING)
        return Picture(brightness, motion, sharpness, shift, noise, frozenset(self._troubles))

    def _doubted(self, shift: float) -> bool:
        """Return whether so much of the view is another one that it is not the usual view any more."""
        lasted = self._odd_since_s is not None and self._at_s - self._odd_since_s > PART_S
        return shift > MOST or (shift > PART and (self._bare > PART or lasted))

    def _sharpness(self, shift: float | None) -> float | None:
        """Return the sharpness: what is covered has none; where all is, or nothing was judged yet, only that counts."""
        if shift is None or not self._fine_s:
            return None
        focused = float(np.median([value for _, value in self._focused])) if self._focused else 1.0
        return min((1.0 - self._bare) * focused, 10.0)

    def _judge(self, trouble: Trouble, begins: bool, ends: bool) -> None:
        if begins:
            self._troubles.add(trouble)
        elif ends:
            self._troubles.discard(trouble)


def _correlation(one: Field, other: Field) -> Field:
    """Return the correlation of two fields block by block, -1 to 1."""
    mean_one, mean_other = by_block(one), by_block(other)
    together = by_block(one * other) - mean_one * mean_other
    spread = (by_block(one * one) - mean_one**2) * (by_block(other * other) - mean_other**2)
    return np.asarray(together / np.sqrt(np.maximum(spread, 1e-4)), np.float32)


def _median(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None
