"""What a camera has learned of itself, as a file: so that after a restart nothing is learned from a bad picture."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np

from edge.vision.frames import Field, Image
from edge.vision.health import Normal

VERSION = 2


class Learned(msgspec.Struct, frozen=True):
    """What is remembered. reference: grey, background: colour, both of the analysed size."""

    normal: Normal
    reference: Field
    background: Image


class _File(msgspec.Struct, frozen=True):
    version: int
    source: str
    normal: Normal
    reference: bytes  # PNG
    background: bytes  # PNG


def pack(learned: Learned, source: str) -> bytes:
    """Return it as the bytes of a file (msgpack, with PNGs); source: which stream it was learned from."""
    return msgspec.msgpack.encode(
        _File(VERSION, source, learned.normal, _png(learned.reference), _png(learned.background))
    )


def unpack(content: bytes, source: str) -> Learned:
    """Read such a file; raises ValueError where it is damaged, of another version or of another stream."""
    try:
        file = msgspec.msgpack.decode(content, type=_File)
    except msgspec.DecodeError as error:
        raise ValueError(f"damaged: {error}") from None
    if file.version != VERSION:
        raise ValueError(f"of version {file.version}, expected {VERSION}")
    if file.source != source:
        raise ValueError("learned from another source")
    reference = _image(file.reference, cv2.IMREAD_GRAYSCALE)
    background = _image(file.background, cv2.IMREAD_COLOR)
    if reference.shape != background.shape[:2]:
        raise ValueError("damaged: its pictures differ in size")
    return Learned(file.normal, reference.astype(np.float32), background)


def _png(image: Field | Image) -> bytes:
    return bytes(cv2.imencode(".png", np.clip(image, 0, 255).astype(np.uint8))[1].tobytes())


def _image(content: bytes, flags: int) -> Image:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("damaged: a picture in it cannot be read")
    return np.asarray(image, np.uint8)
