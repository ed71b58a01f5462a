"""The API as an ASGI application. It reads; what it is asked to change goes to the desk or ingest as a command."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from api.problem import Problem
from api.routes import (
    alarms,
    answers,
    assets,
    cases,
    commands,
    console,
    devices,
    evidence,
    gateways,
    health,
    maintenance,
    orders,
    platforms,
    readings,
)
from api.site import Site
from citybrain.errors import CityBrainError, NotFound, StorageError, Unavailable

DESCRIPTION = """\
Sensors raise the city's problems; this is what the platform knows and what you may tell it.

* All times are **Unix milliseconds, UTC**, in platform time (`/v1/status` has `at` and `speed`); names that end in
  `_s` are seconds.
* Lists have `items` and `next_cursor`; ask again with `?cursor=` until it is null.
* A change is a *command*: 202 with its id, then `GET /v1/commands/{id}` says `pending`, `applied` or `refused`.
  It names who asks: header `X-Actor` or `actor` in the body.
* Errors are RFC 9457 `application/problem+json` with `error` (a code), `where` and `what`.
* There is no authentication yet: the API listens on loopback only.
"""
_STATUS = {NotFound: 404, StorageError: 507, Unavailable: 503}


def create_app(site: Site) -> FastAPI:
    """Return the application; nothing is started."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        site.close()

    app = FastAPI(
        title="City brain senses",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere; /openapi.json is all we need
        redoc_url=None,
        responses={422: {"model": answers.Refusal, "description": "a parameter or the body is not as it should be"}},
    )
    app.state.site = site
    for module in (
        health,
        devices,
        gateways,
        readings,
        assets,
        alarms,
        cases,
        evidence,
        maintenance,
        commands,
        orders,
        platforms,
        console,
    ):
        app.include_router(module.router)
    handle_errors(app, site)
    return app


def handle_errors(app: FastAPI, site: Site) -> None:
    """Have an application answer every refusal as a problem."""

    def answer(problem: Problem) -> JSONResponse:
        return JSONResponse(
            problem.body(), problem.status_code, problem.headers or {}, media_type="application/problem+json"
        )

    @app.exception_handler(HTTPException)
    async def on_refusal(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, Problem):
            return answer(error)
        where = f"{request.method} {request.url.path}"
        return answer(Problem(error.status_code, "http", where, str(error.detail), **dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first: dict[str, Any] = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"])
        return answer(Problem(422, "invalid", where, str(first["msg"])))

    @app.exception_handler(CityBrainError)
    async def on_error(request: Request, error: CityBrainError) -> JSONResponse:
        site.counters.add("errors_total", stage="request")
        status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
        name = type(error).__name__.lower()
        return answer(Problem(status, name, f"{request.method} {request.url.path}", str(error)))

    @app.exception_handler(SQLAlchemyError)
    async def on_database(request: Request, error: SQLAlchemyError) -> JSONResponse:
        site.counters.add("errors_total", stage="database")
        site.counters.warn(f"database: {error}")
        what = "the desk's database cannot be read now; try again, or see `citybrain status`"
        return answer(Problem(503, "database", f"{request.method} {request.url.path}", what))
