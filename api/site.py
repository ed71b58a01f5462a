"""What every route of the API needs: where things stand, who is alive, and a read-only view of the desk's database."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from sqlalchemy import Connection, Engine

from api.disk import DiskWatch
from api.readings import Latest
from citybrain.clock import Clock, real_unix_ms
from citybrain.counters import Counters, Heartbeat, read_heartbeats
from citybrain.db.store import open_store
from citybrain.errors import CityBrainError
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox
from streams.ruleset import Rule, decode_ruleset

PIPELINE = ("ingest", "worker", "desk")  # without each of these no reading becomes a case
MANY_RULESETS = 64


class Problem(HTTPException):
    """A refusal as RFC 9457 has it: `error` is a code, `where` the part of the request, `what` says what to do."""

    def __init__(self, status: int, error: str, where: str, what: str, **headers: str) -> None:
        super().__init__(status, what, headers)
        self.error = error
        self.where = where

    def body(self) -> dict[str, Any]:
        """Return the `application/problem+json` object."""
        return {
            "type": f"urn:citybrain:problem:{self.error}",
            "title": HTTPStatus(self.status_code).phrase,
            "status": self.status_code,
            "detail": self.detail,
            "error": self.error,
            "where": self.where,
            "what": self.detail,
        }


class Site:
    """One API process's surroundings. It reads; the only thing it writes are commands in the mailboxes."""

    def __init__(self, layout: Layout, run: Run, latest: Latest, counters: Counters) -> None:
        self.layout = layout
        self.run = run
        self.clock: Clock = run.clock
        self.latest = latest
        self.counters = counters
        self.desk = Mailbox(layout.mailbox("desk"))
        self.ingest = Mailbox(layout.mailbox("ingest"))
        self.disk = DiskWatch(layout.root)
        self.intake = threading.Lock()  # one verdict at a time: "is it known" and "store it" belong together
        self._engine: Engine | None = None
        self._opening = threading.Lock()
        self._rules: dict[str, Mapping[str, Rule]] = {}

    @contextlib.contextmanager
    def database(self) -> Iterator[Connection]:
        """Give a read-only connection to the desk's database; raises Problem 503 while there is none."""
        with self._opening:
            if self._engine is None:
                if not self.layout.database.exists():
                    raise Problem(503, "no_database", "desk", "the database is not there yet; the desk makes it")
                self._engine = open_store(self.layout.database, readonly=True)
        with self._engine.connect() as connection:
            yield connection

    def heartbeats(self) -> dict[str, Heartbeat]:
        """Return the last heartbeat of every process of this run that ever said something, by its name."""
        return of_this_run({beat.process: beat for beat in read_heartbeats(self.layout.run)}, real_unix_ms())

    def rule(self, ruleset: str, rule: str) -> Rule | None:
        """Return a rule as it was in the rule set that decided, None where that can no longer be read."""
        if ruleset not in self._rules:
            if len(self._rules) >= MANY_RULESETS:
                self._rules.clear()
            try:
                rules = decode_ruleset(self.layout.get_blob(ruleset)).rules
            except CityBrainError as error:
                self.counters.warn(f"rule set {ruleset!r}: {error}")
                rules = ()
            self._rules[ruleset] = {each.id: each for each in rules}
        return self._rules[ruleset].get(rule)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()


def role_of(process: str) -> str:
    """Return what a process does, whichever of several it is.

    >>> role_of("worker-1"), role_of("desk")
    ('worker', 'desk')
    """
    return process.partition("-")[0]


def of_this_run(beats: Mapping[str, Heartbeat], now_ms: int) -> dict[str, Heartbeat]:
    """Leave out what an earlier run with other processes left behind: silent, and unknown to the live supervisor."""
    run = beats.get("run")
    if run is None or not run.live(now_ms) or "parts" not in run.details:
        return dict(beats)
    parts = {"run", *run.details["parts"]}
    return {name: beat for name, beat in beats.items() if name in parts or beat.live(now_ms)}


def not_live(beats: Mapping[str, Heartbeat], now_ms: int | None = None) -> list[str]:
    """Return, in words, why the run is not live; an empty list when it is. `now_ms` is real time."""
    now_ms = real_unix_ms() if now_ms is None else now_ms
    missing = []
    for role in PIPELINE:
        mine = {name: beat for name, beat in sorted(beats.items()) if role_of(name) == role}
        if not mine:
            missing.append(f"{role} has not started")
        for name, beat in mine.items():
            if not beat.live(now_ms):
                missing.append(f"{name} was last heard {(now_ms - beat.at) / 1000:.0f} s ago")
            elif not ready(beat):
                missing.append(f"{name} is not ready ({_why(beat)})")
    return missing


def ready(beat: Heartbeat) -> bool:
    """Return whether a process does its work: ingest while the broker has it, worker and desk once they measure lag."""
    role = role_of(beat.process)
    if role == "ingest":
        return beat.gauges.get("connected", 0.0) >= 1.0
    return role not in PIPELINE or "lag_s" in beat.gauges


def _why(beat: Heartbeat) -> str:
    return "not connected to the broker" if role_of(beat.process) == "ingest" else "starting"


def _site(request: Request) -> Site:
    found: Site = request.app.state.site
    return found


Here = Annotated[Site, Depends(_site)]
