"""UI texts in Chinese and English from one catalogue, `citybrain/catalogue.yaml`: key → {zh, en}."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from citybrain.config import load_yaml

LANGUAGES = ("zh", "en")


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text in every language; `{name}` stands for what is filled in."""

    zh: str
    en: str

    def __call__(self, language: str, **facts: object) -> str:
        """Return the text in `language` ("zh" unless it is "en"), filled in."""
        return (self.en if language == "en" else self.zh).format(**facts)


@cache
def catalogue() -> dict[str, Text]:
    """Return every text, by key; raises ConfigError where the file is wrong."""
    return load_yaml(Path(__file__).with_name("catalogue.yaml"), dict[str, Text])


def text(key: str, language: str, **facts: object) -> str:
    """Return the catalogue's text for `key`; a missing key is a defect that the tests find (KeyError)."""
    return catalogue()[key](language, **facts)
