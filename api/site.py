"""What every route of the API needs: where things stand, who is alive, and a read-only view of the desk's database."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from sqlalchemy import Connection, Engine

from api.disk import DiskWatch
from api.fleet import Fleet
from api.problem import Problem
from api.processes import of_this_run
from api.readings import Latest
from citybrain.clock import Clock, real_unix_ms
from citybrain.counters import Counters, Heartbeat, read_heartbeats
from citybrain.db.store import exists, open_store
from citybrain.errors import CityBrainError
from citybrain.layout import Layout, Run
from citybrain.mailbox import Mailbox
from streams.logs import LogStore
from streams.ruleset import Rule, decode_ruleset

if TYPE_CHECKING:
    from api.pki.ca import Authority
    from streams.history.query import History

MANY_RULESETS = 64


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
        self.fleet = Fleet(latest, run.clock, counters, self.database, lambda: self.authority)

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


def _site(request: Request) -> Site:
    found: Site = request.app.state.site
    return found


Here = Annotated[Site, Depends(_site)]
