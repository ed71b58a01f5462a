"""Pictures that prove an event: shown to a named person, and noted before they are shown.

What persons may be recognised in is shown for a reason only. Who looked at what, when and why stands in the view log
(`DATA/evidence/views.jsonl`), which is synced before the first byte goes out.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from api.problem import Problem
from api.routes import answers
from api.routes.commands import Actor, actor_of
from api.site import Here, Site
from citybrain.errors import NotFound
from citybrain.pictures import media_type
from citybrain.wire import blob_sha256
from streams.evidence import About, EvidenceStore, Expired, View

router = APIRouter(prefix="/v1/evidence", tags=["evidence"])

REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"model": answers.Refusal, "description": "nobody says who asks, or a reason is missing"},
    404: {"model": answers.Refusal},
    410: {"model": answers.Refusal, "description": "it was kept as long as configured, and removed"},
}
SHOWN: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}, "application/octet-stream": {}}}}
AS_ACTOR = Query(max_length=200, description="who asks, where a header cannot be sent: as in an <img>")
WHY = Query(max_length=500, description="why; mandatory for what is unmasked")


class Evidence(BaseModel):
    """What is known of a picture."""

    sha256: str
    gateway: str = Field(description="which one sent it")
    size: int = Field(description="bytes")
    received_at: int = Field(description="when its first part came")
    unmasked: bool = Field(description="persons may be recognised in it: it is shown for a reason only")
    complete: bool = Field(description="all of it is here")
    expired_at: int | None = Field(description="when it was removed, as configured")


class Viewing(BaseModel):
    """Who was shown it, when and why."""

    actor: str
    at: int
    reason: str


class Viewings(BaseModel):
    """Who was shown a picture, oldest first."""

    items: list[Viewing]


@router.get("/{name}", response_class=Response, responses={**REFUSED, **SHOWN})
def get_evidence(
    site: Here,
    name: str,
    *,
    reason: Annotated[str, WHY] = "",
    actor: Annotated[str, AS_ACTOR] = "",
    x_actor: Actor = None,
) -> Response:
    """Show a picture, named by its SHA-256 or the first 13 digits of it."""
    store, about = _find(site, name)
    who, why = actor_of(x_actor, actor), reason.strip()
    if about.unmasked and not why:
        what = "persons may be recognised in it: say why you look, `?reason=`"
        raise Problem(400, "no_reason", f"evidence {about.sha256}", what)
    try:
        content = store.content(about)
    except Expired as gone:
        raise Problem(410, "expired", f"evidence {about.sha256}", str(gone)) from None
    except NotFound as missing:
        raise Problem(404, "not_found", f"evidence {about.sha256}", str(missing)) from None
    store.viewed(View(about.sha256, who, site.clock.now_ms(), why, about.unmasked))
    site.counters.add("evidence_viewed_total")
    return _picture(content, about.sha256)


@router.get("/commissioning/{sheet}", response_class=Response, responses={**REFUSED, **SHOWN})
def get_photo(site: Here, sheet: str, *, actor: Annotated[str, AS_ACTOR] = "", x_actor: Actor = None) -> Response:
    """Show the photo that came with a commissioning sheet, named by the sheet's SHA-256; kept as long as the sheet."""
    from api.commissioning import kept_photo  # noqa: PLC0415  cryptography, which an API without boxes is to do without

    who = actor_of(x_actor, actor)
    try:
        content = kept_photo(site.layout, sheet)
    except NotFound as missing:
        raise Problem(404, "not_found", f"sheet {sheet[:80]}", str(missing)) from None
    view = View(blob_sha256(content), who, site.clock.now_ms(), "commissioning", unmasked=False)
    EvidenceStore(site.layout.evidence).viewed(view)
    site.counters.add("evidence_viewed_total")
    return _picture(content, view.sha256)


@router.get("/{name}/about", responses=REFUSED)
def get_about(site: Here, name: str) -> Evidence:
    """Say what is known of a picture, without showing it: also of one that is removed."""
    about = _find(site, name)[1]
    return Evidence.model_validate(about, from_attributes=True)


@router.get("/{name}/views", responses=REFUSED)
def get_views(site: Here, name: str) -> Viewings:
    """Say who was shown a picture."""
    store, about = _find(site, name)
    seen = store.views(about.sha256)
    return Viewings(items=[Viewing(actor=one.actor, at=one.at, reason=one.reason) for one in seen])


@router.get("/number/{number}", responses=REFUSED)
def get_by_number(site: Here, number: float) -> Evidence:
    """Say which picture a value of the metric `evidence` means."""
    if not (0 <= number < 2**52 and number == int(number)):
        raise Problem(404, "not_found", f"evidence number {number:g}", "it is a whole number below 2^52")
    return get_about(site, f"{int(number):013x}")


def _picture(content: bytes, sha256: str) -> Response:
    media = media_type(content) or "application/octet-stream"
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff", "x-sha256": sha256}
    return Response(content, media_type=media, headers=headers)


def _find(site: Site, name: str) -> tuple[EvidenceStore, About]:
    store = EvidenceStore(site.layout.evidence)
    try:
        return store, store.find(name)
    except NotFound as missing:
        raise Problem(404, "not_found", f"evidence {name[:80]}", str(missing)) from None
