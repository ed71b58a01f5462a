"""What came to stand somewhere: a thing, the same ground in another light, or the place of what was taken away.

A *patch* is where two images, one of the background (old) and one of the present (new), differ. Pure functions.
"""

from __future__ import annotations

import cv2
import numpy as np

from edge.vision.frames import Field, Mask, opened, slope, smooth, widened

TEXTURE, SAME_TEXTURE = 1.5, 0.4  # levels from which on ground has a texture to know it by, and how well it is kept
SHARP = 0.15  # a pixel: an edge takes more of a difference than that at once
AROUND = 9  # pixels: what is within is compared with what is without so far on


def same_ground(patch: Mask, new: Field, old: Field) -> Mask:
    """Return where around a patch two images have the same texture, however the light on it differs."""
    rows, columns = _around(patch)
    one, other = (_texture(image[rows, columns]) for image in (new, old))
    spread = [_mean_around(field * field) for field in (one, other)]
    same = _mean_around(one * other) / np.sqrt(np.maximum(spread[0] * spread[1], 1e-6))
    found = np.zeros_like(patch)
    found[rows, columns] = (same > SAME_TEXTURE) & (spread[1] > TEXTURE**2)
    return opened(found)


def only_light(patch: Mask, foreground: Mask, new: Field, old: Field) -> bool:
    """Return whether a patch of two images is the same in another light: one factor, no new colour, its texture.

    Ground without a texture is only known by the edge of what lies on it: a thing has a sharp one.
    """
    ratio = (new[patch] + 5.0) / (old[patch] + 5.0)
    whole = ratio.mean(axis=1)
    low, middle, high = np.percentile(whole, (15, 50, 85))
    colour = np.abs(ratio / whole[:, None] - 1.0).max(axis=1)
    if not (0.4 < middle < 1.8 and high - low < 0.25 * middle and np.median(colour) < 0.06):
        return False
    rows, columns = _around(patch)
    before, after = (_texture(image[rows, columns])[patch[rows, columns]] for image in (old, new))
    if before.std() < TEXTURE:
        return _is_soft(patch, foreground, new, old)
    return bool(after.std() > 0.0 and np.corrcoef(before, after)[0, 1] > SAME_TEXTURE)


def _is_soft(patch: Mask, foreground: Mask, new: Field, old: Field) -> bool:
    """Return whether a patch has no edge: from within to without the picture changes slowly."""
    outline = _outline(patch, foreground)
    if outline is None:
        return True
    rows, columns, within, without, rim = outline
    steep = [_steepest(image[rows, columns])[rim].mean() for image in (new, old)]
    return bool(steep[0] - steep[1] < SHARP * _stands_out(new[rows, columns], within, without, rim))


def taken_away(patch: Mask, foreground: Mask, old: Field, new: Field) -> bool:
    """Return whether a patch stood out from its surroundings in the old picture more than it does in the new one.

    Means of a few pixels within and without are compared along its outline, so that the ground's texture is no outline.
    """
    outline = _outline(patch, foreground)
    if outline is None:
        return False
    rows, columns, within, without, rim = outline
    now, then = (_stands_out(image[rows, columns], within, without, rim) for image in (new, old))
    return now < 0.8 * then


def _around(patch: Mask) -> tuple[slice, slice]:
    """Return the rows and columns of a patch and what is around it."""
    down, across = (np.flatnonzero(patch.any(axis=axis)) for axis in (1, 0))
    rows = slice(max(0, int(down[0]) - AROUND), int(down[-1]) + AROUND + 1)
    return rows, slice(max(0, int(across[0]) - AROUND), int(across[-1]) + AROUND + 1)


def _outline(patch: Mask, foreground: Mask) -> tuple[slice, slice, Mask, Mask, Mask] | None:
    """Return where a patch is, its inside, what is around it, and its rim; None where all around is no background."""
    rows, columns = _around(patch)
    within, near = patch[rows, columns], widened(patch, 2)[rows, columns]
    without: Mask = ~near & ~foreground[rows, columns]
    rim: Mask = near & (_share(within) > 0.05) & (_share(without) > 0.05)
    return (rows, columns, within, without, rim) if rim.any() else None


def _stands_out(image: Field, within: Mask, without: Mask, rim: Mask) -> float:
    """Return by how many levels the inside of a patch differs from what is around it."""
    inside, outside = (
        _mean_around(image * mask[:, :, None].astype(np.float32))[rim] / _share(mask)[rim, None]
        for mask in (within, without)
    )
    return float(np.abs(inside - outside).max(axis=1).mean())


def _steepest(image: Field) -> Field:
    """Return the steepest slope within two pixels of each."""
    return np.asarray(cv2.dilate(slope(smooth(image.mean(axis=2), 1.0)), np.ones((5, 5), np.uint8)), np.float32)


def _share(mask: Mask) -> Field:
    return _mean_around(mask.astype(np.float32))


def _mean_around(field: Field) -> Field:
    return np.asarray(cv2.boxFilter(field, -1, (AROUND, AROUND)), np.float32)


def _texture(image: Field) -> Field:
    levels = np.asarray(image.mean(axis=2), np.float32)
    return levels - smooth(levels, 2.0)
