"""The status page at `/`: one plain page for the night shift, in Chinese or English, that asks nobody but us."""

from __future__ import annotations

import html
import re
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Response

from citybrain.errors import NotFound
from citybrain.i18n import LANGUAGES, catalogue

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent.parent / "console"
FILES = {"app.js": "text/javascript", "style.css": "text/css"}
PLACEHOLDER = re.compile(r"\[\[([a-z0-9_.]+)\]\]")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/")
def page(lang: Annotated[str, Query(max_length=10)] = "zh") -> Response:
    """Return the page in `lang`, Chinese unless it is `en`."""
    return Response(rendered("en" if lang == "en" else "zh"), media_type="text/html", headers=HEADERS)


@router.get("/console/{name}")
def file(name: str) -> Response:
    """Return the page's script or style sheet."""
    if name not in FILES:
        raise NotFound(f"{name}: no such file")
    return Response((FOLDER / name).read_text(encoding="utf-8"), media_type=FILES[name], headers=HEADERS)


@cache
def rendered(language: str) -> str:
    """Return the page with every `[[key]]` filled in, and all texts for its script."""
    source = (FOLDER / "index.html").read_text(encoding="utf-8")
    texts = {key: text.en if language == "en" else text.zh for key, text in catalogue().items()}
    other = next(each for each in LANGUAGES if each != language)
    special = {"page.language": language, "page.other": other, "page.texts": script_json(texts)}

    def fill(match: re.Match[str]) -> str:
        key = match[1]
        return special[key] if key in special else html.escape(texts[key])

    return PLACEHOLDER.sub(fill, source)


def script_json(texts: dict[str, str]) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return msgspec.json.encode(texts).decode().replace("<", "\\u003c").replace("&", "\\u0026")
