"""The ledger over HTTP: assets, imports, quarantine, registers. A change is a command to the desk."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from api.assets import views
from api.assets.book import Book
from api.assets.changes import encode_changes
from api.assets.findings import Refused, errors
from api.assets.importing import BESIDE, LAYERS, SHEETS, Result, Source, read_import
from api.problem import Problem
from api.routes import answers
from api.routes.commands import REFUSED, Actor, Asked, Rejected, actor_of, put
from api.routes.devices import Cursor, Limit
from api.routes.rows import cursor_of, cursor_text, not_found
from api.site import Here, Site
from citybrain.errors import UsageError

router = APIRouter(prefix="/v1", tags=["ledger"])

MOST_BYTES = 64 * 1024 * 1024  # of an upload, and of what a zip unpacks to
Text = Annotated[str, Field(max_length=200)]


class Replacement(Asked):
    """Another sensor (its name on the wire) for an asset."""

    sensor: str = Field(min_length=1, max_length=128)


class Adoption(Asked):
    """The asset a quarantined sensor belongs to: one of the ledger, or a new one with `kind`, `lon` and `lat`."""

    asset: str = Field(min_length=1, max_length=100)
    state: Literal["active", "commissioning"] = "active"
    gateway: Text = Field(default="", description="default: the one its readings came through")
    kind: Text = ""
    name: Text = ""
    zone: Text = ""
    building: Text = ""
    maintainer: Text = ""
    tags: tuple[Text, ...] = ()
    address: Text = ""
    lon: float | None = None
    lat: float | None = None
    crs: str = Field(default="cgcs2000", max_length=40)


class Entry(BaseModel):
    """An entry of a register: what is silent for whom, from when until when (Unix ms), and why."""

    kind: Literal["use", "maintenance"]
    subject: str = Field(max_length=100, description="asset, or grid:CODE, zone:CODE, building:CODE, street:CODE")
    from_ms: int = Field(alias="from", ge=0)
    until_ms: int = Field(alias="until", ge=0)
    reason: str = Field(min_length=1, max_length=500)
    also_life: bool = Field(default=False, description="silence life-safety rules too")
    actor: str = Field(default="", max_length=100)


class Report(BaseModel):
    """What an import comes to. `command` is null where nothing is asked of the desk: a dry run, or nothing new."""

    command: str | None
    counts: dict[str, dict[str, int]] = Field(description="by table: rows read and rows changed")
    findings: list[dict[str, str]] = Field(description="where, level, code, zh, en")


class NotImportable(Problem):
    """An import that a clerk has to put right first; the body has `findings`."""

    def __init__(self, result: Result) -> None:
        wrong = result.wrong
        super().__init__(422, "not_importable", wrong[0].where, f"{len(wrong)} error(s); nothing was changed")
        self.findings = [one.line() for one in result.findings]

    def body(self) -> dict[str, Any]:
        """Return the problem with all that was found."""
        return {**super().body(), "findings": self.findings}


def book_of(site: Site) -> Book:
    """Return the ledger as it stands."""
    with site.database() as db:
        return views.read_ledger(site.layout, db, site.clock.now_ms())


# --- assets -----------------------------------------------------------------------------------------------------


@router.get("/assets")
def list_assets(
    site: Here,
    *,
    kind: Annotated[str | None, Query(description="hydrant, elevator …")] = None,
    state: Annotated[str | None, Query(description="planned | commissioning | active | retired")] = None,
    zone: Annotated[str | None, Query(description="pressure zone")] = None,
    building: str | None = None,
    gateway: str | None = None,
    street: Annotated[str | None, Query(description="code of the street it stands in")] = None,
    grid: Annotated[str | None, Query(description="code of the responsibility grid")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> answers.Page[dict[str, Any]]:
    """Return assets in the order of their codes."""
    book, after = book_of(site), cursor_text(cursor) if cursor is not None else ""
    asked = {"kind": kind, "state": state, "zone": zone, "building": building, "gateway": gateway}
    found = [one for one in views.listed(book, {**asked, "street": street, "grid": grid}) if one.code > after]
    items = [views.shown(book, one) for one in found[:limit]]
    return answers.Page(items=items, next_cursor=cursor_of(found[limit - 1].code) if len(found) > limit else None)


@router.get("/assets/{code}", responses={404: {"model": answers.Refusal}})
def get_asset(site: Here, code: str) -> dict[str, Any]:
    """Return one asset with its sensors, its history and what the registers say of it."""
    now_ms = site.clock.now_ms()
    with site.database() as db:
        book = views.read_ledger(site.layout, db, now_ms)
        if code not in book.assets:
            raise not_found("asset", code)
        told = views.history(db, book, code)
    entries = [entry for entry in views.registers_of(book, now_ms) if entry["subject"] == code]
    return {**views.shown(book, book.assets[code]), **told, "registers": entries}


@router.post("/assets/{code}/replace", status_code=202, responses=REFUSED)
def replace(site: Here, code: str, asked: Replacement, x_actor: Actor = None) -> answers.Accepted:
    """Put another sensor on an asset; its alarms and its history go on."""
    body = {"asset": _known(site, code), "sensor": asked.sensor}
    return put(site, site.desk, "asset_replace", actor_of(x_actor, asked.actor), body=body, reason=asked.reason)


@router.post("/assets/{code}/{step}", status_code=202, responses=REFUSED)
def move(
    site: Here,
    code: str,
    step: Literal["commission", "activate", "retire"],
    asked: Asked | None = None,
    x_actor: Actor = None,
) -> answers.Accepted:
    """Put an asset on trial (its alarms open no case and no rescue), in service, or out of it."""
    asked = asked or Asked()
    body = {"asset": _known(site, code)}
    return put(site, site.desk, f"asset_{step}", actor_of(x_actor, asked.actor), body=body, reason=asked.reason)


def _known(site: Site, code: str) -> str:
    if code not in book_of(site).assets:
        raise not_found("asset", code)
    return code


# --- quarantine -------------------------------------------------------------------------------------------------


@router.get("/quarantine")
def list_quarantine(site: Here) -> list[dict[str, Any]]:
    """Return the sensors whose readings wait for an asset, those heard last first."""
    found = views.quarantined(site.layout, site.run.shards)
    return [msgspec.to_builtins(one) for one in found]


@router.post("/quarantine/{sensor}/adopt", status_code=202, responses=REFUSED)
def adopt(site: Here, sensor: str, asked: Adoption, x_actor: Actor = None) -> answers.Accepted:
    """Give a sensor its asset; its stored readings are then processed."""
    actor = actor_of(x_actor, asked.actor)
    heard = [one.gateway for one in views.quarantined(site.layout, site.run.shards) if one.sensor == sensor]
    names = ("asset", "state", "kind", "name", "zone", "building", "maintainer", "tags")
    body: dict[str, Any] = {"sensor": sensor, **{name: getattr(asked, name) for name in names}}
    body["gateway"] = asked.gateway or (heard[0] if heard else "")
    if asked.lon is not None and asked.lat is not None:
        try:
            place = views.place_at(book_of(site), asked.lon, asked.lat, asked.crs, asked.address)
        except (Refused, UsageError) as error:
            raise Problem(400, "no_place", "body lon, lat", str(error)) from None
        body["place"] = msgspec.to_builtins(place)
    return put(site, site.desk, "asset_adopt", actor, body=body, reason=asked.reason)


# --- registers --------------------------------------------------------------------------------------------------


@router.get("/registers")
def list_registers(
    site: Here, *, over: Annotated[bool, Query(description="also those that are over or cancelled")] = False
) -> list[dict[str, Any]]:
    """Return the entries of both registers, newest first."""
    return views.registers_of(book_of(site), site.clock.now_ms(), all_of_them=over)


@router.post("/registers", status_code=202, responses=REFUSED)
def enter(site: Here, asked: Entry, x_actor: Actor = None) -> answers.Accepted:
    """Enter an authorised use or a maintenance window; life-safety rules stay in force unless `also_life` is given."""
    active = site.layout.read_active()
    body = {
        **asked.model_dump(include={"kind", "subject", "from_ms", "until_ms", "also_life"}),
        "ruleset": active.ruleset if active is not None else "",
    }
    return put(site, site.desk, "register_enter", actor_of(x_actor, asked.actor), body=body, reason=asked.reason)


@router.post("/registers/{n}/cancel", status_code=202, responses=REFUSED)
def cancel(site: Here, n: int, asked: Rejected, x_actor: Actor = None) -> answers.Accepted:
    """Take an entry back; what it silenced so far stays silent."""
    if n not in book_of(site).registers:
        raise not_found("register", n)
    body = {"register": n}
    return put(site, site.desk, "register_cancel", actor_of(x_actor, asked.actor), body=body, reason=asked.reason)


# --- imports ----------------------------------------------------------------------------------------------------

_FILE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "the file as it is (.xlsx, .csv, .geojson), or a .zip of several, with those of a Shapefile",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("/imports", status_code=202, responses=REFUSED, openapi_extra=_FILE)
async def import_files(
    request: Request,
    site: Here,
    name: Annotated[str, Query(description="the file's name, such as assets.xlsx", max_length=200)],
    *,
    crs: Annotated[str, Query(description="coordinate system where a sheet names none")] = "cgcs2000",
    dry_run: Annotated[bool, Query(description="check only")] = False,
    reason: Annotated[str, Query(max_length=500)] = "",
    x_actor: Actor = None,
) -> Report:
    """Import a file into the ledger: all of it or nothing; what a clerk has to put right comes back as 422."""
    actor = actor_of(x_actor, "")
    content = await _content(request)
    return await run_in_threadpool(_import, site, _sources(name, content), crs, reason, actor, dry_run)


async def _content(request: Request) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise Problem(413, "too_large", "body", f"at most {MOST_BYTES} bytes; import the file on the command line")
    return bytes(content)


def _sources(name: str, content: bytes) -> list[Source]:
    """Return a file, or those of a zip, each once, with a Shapefile's parts together; raises Problem."""
    if not name.lower().endswith(".zip"):
        if not name.lower().endswith((*SHEETS, *LAYERS)) or name.lower().endswith(".shp"):
            raise Problem(400, "unknown_file", "query name", "expected .xlsx, .csv, .geojson, or a .zip of such files")
        return [Source(name, content)]
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(one.file_size for one in packed.infolist()) > MOST_BYTES:
                raise Problem(413, "too_large", "body", f"unpacked at most {MOST_BYTES} bytes")
            files = {one.filename: packed.read(one) for one in packed.infolist() if not one.is_dir()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise Problem(400, "unreadable", "body", f"not a zip file: {error}") from None
    found = [_source(path, files) for path in sorted(files) if path.lower().endswith((*SHEETS, *LAYERS))]
    if not found:
        raise Problem(400, "unknown_file", "body", f"nothing to import in it; expected {', '.join((*SHEETS, *LAYERS))}")
    return found


def _source(path: str, files: Mapping[str, bytes]) -> Source:
    stem = path.rpartition(".")[0]
    beside = {
        suffix: content for suffix in BESIDE for key, content in files.items() if key.lower() == stem.lower() + suffix
    }
    return Source(path.rpartition("/")[2], files[path], beside if path.lower().endswith(".shp") else {})


def _import(site: Site, sources: list[Source], crs: str, reason: str, actor: str, dry_run: bool) -> Report:
    now_ms = site.clock.now_ms()
    try:
        result = read_import(
            sources, book_of(site), crs=crs, shards=range(site.run.shards), at_ms=now_ms, reason=reason
        )
    except UsageError as error:
        raise Problem(400, "unknown_crs", "query crs", str(error)) from None
    if errors(result.findings):
        raise NotImportable(result)
    command = None
    if result.changes.counts and not dry_run:
        content = site.layout.put_blob(encode_changes(result.changes))
        command = put(site, site.desk, "ledger_import", actor, body={"content": content}, reason=reason).command
    return Report(command=command, counts=result.counts, findings=[one.line() for one in result.findings])
