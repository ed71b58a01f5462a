"""Frames as they are analysed: small, in colour, and in grey; and how much the sensor's noise alone changes them."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (rows, columns, 3) BGR or (rows, columns) grey
Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

BLOCKS = (16, 10)  # columns, rows: a person at the usual mounting height is about one block wide
MEAN_TO_SIGMA = 1.128  # the mean of |a - b| of two normal values is 1.128 of their deviation
SQRT2 = 1.4142


def analysed_size(width: int, rows: int, columns: int) -> tuple[int, int]:
    """Return (columns, rows) of a frame brought to a width; never larger than it is."""
    width = min(width, columns)
    return width, max(BLOCKS[1], round(rows * width / columns))


def shrink(image: Image, size: tuple[int, int]) -> Image:
    """Return an image at a size (columns, rows), each pixel the mean of what it covers."""
    if (image.shape[1], image.shape[0]) == size:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def grey(image: Image) -> Image:
    """Return the brightness of a colour image."""
    return image if image.ndim == 2 else np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), np.uint8)


def by_block(field: NDArray[Any]) -> Field:
    """Return the means of a field over the blocks, (10, 16)."""
    return np.asarray(cv2.resize(np.asarray(field, np.float32), BLOCKS, interpolation=cv2.INTER_AREA), np.float32)


def smooth(field: NDArray[Any], sigma: float) -> Field:
    """Return a field blurred by a Gaussian."""
    return np.asarray(cv2.GaussianBlur(np.asarray(field, np.float32), (0, 0), sigma), np.float32)


def slope(field: Field) -> Field:
    """Return the length of the gradient, in levels a pixel."""
    across = cv2.Sobel(field, cv2.CV_32F, 1, 0, scale=0.125)
    down = cv2.Sobel(field, cv2.CV_32F, 0, 1, scale=0.125)
    return np.asarray(cv2.magnitude(across, down), np.float32)


def noise_of(difference: Field) -> float:
    """Return the sensor's noise in levels from the (signed) difference of two frames.

    Neighbours are compared, so that neither the light nor a lamp that flickers counts, and what moves does not either.
    """
    apart = cv2.absdiff(difference[:, 1:], difference[:, :-1])
    return float(np.median(by_block(np.asarray(apart, np.float32)))) / (MEAN_TO_SIGMA * SQRT2)


def opened(mask: Mask, pixels: int = 3) -> Mask:
    """Return a mask without its specks."""
    kernel = np.ones((pixels, pixels), np.uint8)
    return np.asarray(cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_OPEN, kernel), np.uint8).view(np.bool_)


def widened(mask: Mask, pixels: int) -> Mask:
    """Return a mask grown by so many pixels on each side."""
    kernel = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.view(np.uint8), kernel), np.uint8).view(np.bool_)
