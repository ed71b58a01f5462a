"""Which pictures are taken, on both sides of the wire: a JPEG or a PNG, told by how it begins."""

from __future__ import annotations

MEDIA = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"))
MAX_PHOTO = 2 * 1024 * 1024  # bytes of a commissioning photo; what a telephone's camera app calls "medium" [U]


def media_type(content: bytes) -> str | None:
    """Return a picture's media type, None where it is none that is taken.

    >>> media_type(b"\\x89PNG...")
    'image/png'
    """
    return next((media for magic, media in MEDIA if content.startswith(magic)), None)
