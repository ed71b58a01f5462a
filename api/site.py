"""What every route of the API needs: where things stand, who is alive, and a read-only view of the desk's database."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, HTTPException, Request
from sqlalchemy import Connection, Engine

from api.disk import DiskWatch
from api.readings import Latest
from citybrain.clock import Clock, real_unix_ms
from citybrain.counters import Counters, Heartbeat, read_heartbeats, takes_of
from citybrain.db.store import exists, open_store
from citybrain.errors import CityBrainError
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox
from streams.logs import LogStore
from streams.ruleset import Rule, decode_ruleset

if TYPE_CHECKING:
    from api.fleet import Fleet
    from api.pki.ca import Authority
    from streams.history.query import History

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
    """One API process's surroundings. It reads; it writes commands into mailboxes, and who looked at evidence."""

    def __init__(
        self, layout: Layout, run: Run, latest: Latest, counters: Counters, logs: LogStore | None = None
    ) -> None:
        self.layout = layout
        self.logs = logs  # None: in the data folder
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
        self._history: History | None = None
        self._authority: Authority | None = None
        self._fleet: Fleet | None = None

    @contextlib.contextmanager
    def database(self) -> Iterator[Connection]:
        """Give a read-only connection to the desk's database; raises Problem 503 while there is none."""
        with self._opening:
            if self._engine is None:
                if not exists(self.layout.place):
                    raise Problem(503, "no_database", "desk", "the database is not there yet; the desk makes it")
                self._engine = open_store(self.layout.place, readonly=True)
        with self._engine.connect() as connection:
            yield connection

    @property
    def history(self) -> History:
        """Charts and exports; what they need is loaded by the first who asks."""
        with self._opening:
            if self._history is None:
                from streams.history.query import History  # noqa: PLC0415  60 MB

                self._history = History(self.layout, self.run.shards, self.logs)
        return self._history

    @property
    def authority(self) -> Authority | None:
        """The certificate authority, None where there is none; what it needs is loaded by the first who asks."""
        there = False
        with self._opening:
            with contextlib.suppress(PermissionError):  # another user's: whoever serves boxes says so
                there = (self.layout.ca / "server.pem").exists()
            if self._authority is None and there:
                from api.pki.ca import Authority  # noqa: PLC0415  few runs have one

                self._authority = Authority(self.layout)
            return self._authority

    @property
    def fleet(self) -> Fleet:
        """The boxes, and what is remembered of them between two looks."""
        with self._opening:
            if self._fleet is None:
                from api.fleet import Fleet  # noqa: PLC0415  it needs us

                self._fleet = Fleet(self)
            return self._fleet

    def heartbeats(self) -> dict[str, Heartbeat]:
        """Return the last heartbeat of every process of this run that ever said something, by its name."""
        beats = {beat.process: beat for beat in read_heartbeats(self.layout.run)}
        return of_this_run(beats, real_unix_ms(), self.run.shards)

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

    >>> role_of("worker-1"), role_of("worker-b"), role_of("desk")
    ('worker', 'worker', 'desk')
    """
    role = takes_of(process, 0)[0]
    first = role.partition("-")[0]
    return first if first in PIPELINE else role


def claim_of(beat: Heartbeat, shards: int) -> tuple[str, tuple[int, ...]]:
    """Return a process's role and shards: those it was dealt (docs/distributed.md), else by its name."""
    dealt = beat.details.get("assigned")
    return takes_of(beat.process, shards) if dealt is None else ("worker", tuple(dealt))


def of_this_run(beats: Mapping[str, Heartbeat], now_ms: int, shards: int) -> dict[str, Heartbeat]:
    """Leave out what earlier runs left behind: another division of the shards, and parts nobody supervises now."""
    run = beats.get("run")
    known = run.details.get("parts") if run is not None and run.live(now_ms) else None
    found = {}
    for name, beat in beats.items():
        role = role_of(name)
        if role in PIPELINE:
            spare = standing_by(beat) or "assigned" in beat.details  # a desk, or a worker that waits for a shard
            ours = beat in in_force(beats, role, shards) or (spare and beat.live(now_ms))
        else:
            ours = known is None or name in ("run", *known) or beat.live(now_ms)
        if ours:
            found[name] = beat
    return found


def not_live(beats: Mapping[str, Heartbeat], now_ms: int, shards: int) -> list[str]:
    """Return, in words, why the run is not live; an empty list when it is. `now_ms` is real time.

    Several processes may share the shards of a role: every shard needs one that has it.
    """
    missing: dict[str, None] = {}  # in order, each once
    for role in PIPELINE:
        for shard in range(shards):
            beat = in_charge(beats, role, shard, shards)
            if beat is None:
                nobody = not any(claim_of(beat, shards)[0] == role for beat in beats.values())
                missing[f"{role} has not started" if nobody else f"no {role} has shard {shard}"] = None
            elif not beat.live(now_ms):
                missing[f"{beat.process} was last heard {(now_ms - beat.at) / 1000:.0f} s ago"] = None
            elif not ready(beat):
                missing[f"{beat.process} is not ready ({_why(beat)})"] = None
    return list(missing)


def in_charge(beats: Mapping[str, Heartbeat], role: str, shard: int, shards: int) -> Heartbeat | None:
    """Return the process of a role that has a shard: who was heard last, since a run may divide them anew.

    A desk that stands by has none, as long as there is another.
    """
    claims = ((beat, *claim_of(beat, shards)) for beat in beats.values())
    having = [beat for beat, its, numbers in claims if its == role and shard in numbers]
    return max(having, key=lambda beat: (not standing_by(beat), beat.at), default=None)


def in_force(beats: Mapping[str, Heartbeat], role: str, shards: int) -> list[Heartbeat]:
    """Return the processes of a role that have its shards now, without those of an earlier division."""
    found = (in_charge(beats, role, shard, shards) for shard in range(shards))
    return list({beat.process: beat for beat in found if beat is not None}.values())


def standing_by(beat: Heartbeat) -> bool:
    """Return whether this is a desk that waits for the one that works to fall silent."""
    return beat.gauges.get("standby", 0.0) >= 1.0


def ready(beat: Heartbeat) -> bool:
    """Return whether a process does its work: ingest while the broker has it, worker and desk once they measure lag."""
    role = role_of(beat.process)
    if role == "ingest":
        return beat.gauges.get("connected", 0.0) >= 1.0
    return role not in PIPELINE or "lag_s" in beat.gauges


def _why(beat: Heartbeat) -> str:
    if standing_by(beat):
        return "it stands by, and no desk works"
    return "not connected to the broker" if role_of(beat.process) == "ingest" else "starting"


def _site(request: Request) -> Site:
    found: Site = request.app.state.site
    return found


Here = Annotated[Site, Depends(_site)]
