"""Evidence without persons: what moves or does not belong there is made coarse, and what is shown is outlined."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from edge.vision.frames import Field, Image, Mask

PANEL = 640  # columns of each half of an evidence picture
COARSE = 24  # of PANEL: blocks across a person of usual size are too few to know a face by
MOST_BYTES = 200_000
YELLOW, RED = (0, 220, 255), (0, 0, 255)


def hide(image: Image, mask: Mask) -> Image:
    """Return an image with the masked pixels (any size of mask) replaced by blocks of their mean colour."""
    rows, columns = image.shape[:2]
    block = max(4, columns // (PANEL // COARSE))
    few = cv2.resize(image, (max(1, columns // block), max(1, rows // block)), interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(few, (columns, rows), interpolation=cv2.INTER_NEAREST)
    hidden = cv2.resize(mask.view(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST)
    return np.asarray(np.where(hidden[:, :, None] > 0, coarse, image), np.uint8)


def outline(image: Image, polygon: Sequence[tuple[float, float]], thing: Mask | None) -> Image:
    """Return a copy of an image with a region (shares) in yellow, and a thing (any size of mask) in red."""
    drawn, (rows, columns) = image.copy(), image.shape[:2]
    corners = np.round(np.array(polygon) * (columns - 1, rows - 1)).astype(np.int32)
    cv2.polylines(drawn, [corners], True, YELLOW, 2)
    if thing is not None:
        scaled = cv2.resize(thing.view(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(scaled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        for contour in contours:
            left, top, wide, high = cv2.boundingRect(contour)
            cv2.rectangle(drawn, (left - 4, top - 4), (left + wide + 4, top + high + 4), RED, 2)
    return drawn


def panel(image: Image | Field, columns: int = PANEL) -> Image:
    """Return an image at the size of half an evidence picture."""
    rows = max(1, round(image.shape[0] * columns / image.shape[1]))
    eight = np.clip(image, 0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(eight, (columns, rows), interpolation=cv2.INTER_AREA), np.uint8)


def side_by_side(before: Image, after: Image) -> Image:
    """Return two panels of one size in one picture."""
    return np.asarray(np.hstack([before, after]), np.uint8)


def jpeg(image: Image, most_bytes: int = MOST_BYTES) -> bytes:
    """Return an image as JPEG of at most so many bytes: of less quality first, then smaller."""
    while True:
        for quality in (85, 70, 50):
            encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
            if len(encoded) <= most_bytes or min(image.shape[:2]) < 32:
                return encoded
        image = np.asarray(cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA), np.uint8)
