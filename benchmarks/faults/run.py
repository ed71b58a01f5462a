"""Kill, stop and cut off the parts of the distributed runtime, then check that nothing was lost, doubled, forgotten.

    python -m benchmarks.faults --seed 9 --faults 50 --json

Three Kafka brokers, mosquitto, an ingest a shard, two workers, two desks on PostgreSQL, a grid platform, `citybrain
influx` with a VictoriaMetrics, and gateways that plant causes (benchmarks/faults/load.py), all as processes of their
own. One fault after the other: a part is killed with -9 and started after a pause, stopped (SIGSTOP) and continued, or
cut off by a line of ours. Each waits for recovery: a cause planted after the fault's end is an alarm on the desk, for
every shard, and none waits longer than 5 s any more; of InfluxDB and of who writes to it: the log's values are there
within 5 s.

lost            messages that a spool committed and the log does not hold
repeated        messages that count more than once in the log
doubled         alarms, cases, rescues, cases at the platform, transitions that are there more than once
forgotten       those that are due and are not; an alarm that is not open although its cause holds; undelivered messages
invented        alarms, cases, transitions that nothing planted explains
recovery_s_max  from the end of a fault
by_kind         by victim and manner: how many, recovery from the end and from the beginning, the greatest lag meanwhile
replay_differs  rows of the desk that its journal, done again, makes otherwise
points_missing  values of the log that InfluxDB has not
unrecovered     faults after which the lag was not below 5 s within the limit
ended           parts that ended by themselves, by exit code; they are started again, as a service manager does
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.chaos import count_lost, logged
from benchmarks.faults.books import read_books, replay_differs
from benchmarks.faults.judge import Findings, judge, judge_transitions
from benchmarks.faults.load import Said, book, gateway_of, is_rescue, read_book, subject
from benchmarks.faults.points import logged_points, missing_points, stored_points
from benchmarks.faults.site import DESKS, HOLDER, SHARDS, VICTIMS, Site, Victim, running
from citybrain.clock import iso, real_unix_ms
from citybrain.db.schema import alarms, lease
from citybrain.model import Transition
from streams.engine import Engine
from streams.log import Kind, decode_transition
from streams.logs import records

Manner = Literal["kill", "stop", "cut"]
LAG_S = 5.0
LIMIT_S = 120.0
LOOK_S = 0.1
SECONDS: dict[Manner, tuple[float, float]] = {"kill": (0.2, 5.0), "stop": (1.0, 20.0), "cut": (1.0, 15.0)}
SHOWN = 20  # findings that are told by name


class Fault(NamedTuple):
    """One thing that goes wrong, and for how long. `silent`: a cut line lets nothing pass, instead of refusing."""

    victim: str
    member: str
    manner: Manner
    seconds: float
    silent: bool
    felt: Literal["desk", "influx"] = "desk"


class Recovery(NamedTuple):
    """How long a fault was felt, from its end and from its beginning; None where it went on beyond the limit.

    `lag_s`: how long the oldest cause waited that was no alarm yet, at the worst.
    """

    fault: Fault
    from_end_s: float | None
    from_beginning_s: float
    lag_s: float


def plan(seed: int, faults: int, longest_s: float = 20.0, victims: tuple[Victim, ...] = VICTIMS) -> list[Fault]:
    """Return the faults of a seed: every victim in every manner once before any comes again, in a drawn order."""
    dice = random.Random(seed)
    kinds: list[tuple[Victim, Manner]] = [
        (victim, manner) for victim in victims for manner in SECONDS if manner != "cut" or victim.cuttable
    ]
    found: list[Fault] = []
    while len(found) < faults:
        for victim, manner in dice.sample(kinds, len(kinds)):
            seconds = round(min(dice.uniform(*SECONDS[manner]), longest_s), 2)
            member, silent = dice.choice(victim.members), dice.random() < 0.5
            found.append(Fault(victim.kind, member, manner, seconds, silent, victim.felt))
    return found[:faults]


# --- looking --------------------------------------------------------------------------------------------------------


class Watch:
    """Follows the book of planted causes, and which of them the desk has an alarm of."""

    def __init__(self, site: Site) -> None:
        self.said: list[Said] = []
        self.waiting: dict[int, Said] = {}  # planted, and not yet an alarm
        self.seen: dict[int, int] = {}  # shard: when its latest cause was planted that is an alarm
        self.worst_s = 0.0  # the greatest lag since somebody set it to 0
        self._site = site
        self._read = 0
        self._last = 0
        self._known: set[str] = set()
        self.holder = ""  # which desk has the lease
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow_desk, name="watch", daemon=True)

    def look(self) -> None:
        """Read on; a database that does not answer has nothing new."""
        more, self._read = read_book(book(self._site.layout), self._read)
        self.said += more
        self.waiting |= {one.n: one for one in more if not one.ended}
        for n in [n for n in self.waiting if subject(n) in self._known]:
            shard, at = shard_of(n), self.waiting.pop(n).at
            self.seen[shard] = max(self.seen.get(shard, 0), at)
        self.worst_s = max(self.worst_s, self.lag_s(real_unix_ms()))

    def _follow_desk(self) -> None:
        """Read the desk's alarms, on and on. A thread of its own: a server that is stopped answers nobody."""
        while not self._over.wait(LOOK_S):
            with suppress(SQLAlchemyError):
                self._look_at_desk()

    def _look_at_desk(self) -> None:
        with self._site.books.connect() as db:
            self.holder = str(db.execute(select(lease.c.holder)).scalar())
            query = select(alarms.c.id, alarms.c.subject).where(alarms.c.id > self._last).order_by(alarms.c.id)
            for id, name in db.execute(query):
                self._last = id
                self._known.add(name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LIMIT_S)

    def lag_s(self, now_ms: int) -> float:
        """Return the age of the oldest cause that is no alarm yet; rescues have a delay and do not count."""
        return max((now_ms - one.at for one in self.waiting.values() if not is_rescue(one.n)), default=0) / 1000

    def recovered(self, since_ms: int) -> bool:
        """Whether every shard showed something planted since then, and nothing waits for long."""
        shown = all(self.seen.get(shard, 0) >= since_ms for shard in range(SHARDS))
        return shown and self.lag_s(real_unix_ms()) < LAG_S

    def projected_to(self, ends: list[int]) -> bool:
        """Whether InfluxDB's server answers, and has every shard's log up to an offset."""
        beat = self._site.beat("influx")
        if beat is None or not beat.gauges.get("influx_answers"):
            return False
        shards = beat.details.get("shards", {})
        return all(shards.get(str(shard), {}).get("offset", 0) >= end for shard, end in enumerate(ends))


def shard_of(n: int) -> int:
    return gateway_of(n) % SHARDS


# --- doing ----------------------------------------------------------------------------------------------------------


def until(site: Site, watch: Watch, holds: Callable[[], bool], limit_s: float) -> bool:
    """Keep the site up until something holds; return whether it did within the limit."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        site.tend()
        watch.look()
        if holds():
            return True
        time.sleep(LOOK_S)
    return False


def commit(site: Site, watch: Watch, fault: Fault) -> Recovery:
    """Let a fault happen, and wait until nothing is felt of it any more."""
    member = watch.holder if fault.member == HOLDER else fault.member
    process, line = site.processes[member], site.lines.get(member)
    began_s, watch.worst_s = time.monotonic(), 0.0
    match fault.manner:
        case "kill":
            process.kill()
        case "stop":
            process.pause()
        case "cut":
            assert line is not None
            line.cut(silent=fault.silent)
    until(site, watch, lambda: False, fault.seconds)
    match fault.manner:
        case "kill":
            process.start()
        case "stop":
            process.resume()
        case "cut":
            assert line is not None
            line.restore()
    ended_s, ended_ms = time.monotonic(), real_unix_ms()
    ends = site.log_ends() if fault.felt == "influx" else []
    felt = watch.projected_to if ends else lambda _: watch.recovered(ended_ms)
    good = until(site, watch, lambda: process.well and felt(ends), LIMIT_S)
    now_s = time.monotonic()
    from_end_s = round(now_s - ended_s, 2) if good else None
    return Recovery(fault, from_end_s, round(now_s - began_s, 2), round(watch.worst_s, 2))


def settle(site: Site, watch: Watch) -> list[str]:
    """Plant no more, let everything come to its end, and end the parts; return what did not."""
    problems = []
    if site.processes["gateways"].end(within_s=LIMIT_S + 30) != 0:
        problems.append("gateways: not everything in their spools was acknowledged")
    watch.look()
    if not until(site, watch, lambda: not watch.waiting and quiet(site, watch), LIMIT_S):
        problems.append(f"not settled within {LIMIT_S:g} s: {len(watch.waiting)} causes are no alarm yet")
    ends = site.log_ends()
    if not until(site, watch, lambda: watch.projected_to(ends), LIMIT_S):
        problems.append(f"InfluxDB has not everything of the log within {LIMIT_S:g} s")
    return problems


def quiet(site: Site, watch: Watch) -> bool:
    """Whether every end has arrived and everything is delivered."""
    ended = {subject(one.n) for one in watch.said if one.ended}
    books = read_books(site.books, [])
    return not books.undelivered and not any(row["active"] for row in books.alarms if row["subject"] in ended)


def written(site: Site, shard: int) -> list[Transition]:
    """Return the transitions of a shard that count."""
    found = records(site.store.reader("transitions", shard))
    return [decode_transition(one.payload) for one in found if one.kind == Kind.TRANSITION]


def verify(site: Site, watch: Watch) -> tuple[dict[str, int], Findings]:
    """Judge what is left behind: Kafka still runs, everything else has ended."""
    platform = site.platform_cases()
    site.end(["platform", *DESKS, "worker-a", "worker-b", "ingest-0", "ingest-1", "mosquitto", "influx"])
    findings = judge(watch.said, read_books(site.books, platform))
    for shard in range(SHARDS):
        log = list(records(site.store.reader("log", shard)))
        judge_transitions(findings, Engine(shard, site.layout).process(log), written(site, shard))
    findings.replayed = replay_differs(site.books, site.layout, site.store, SHARDS, site.layout.root)
    missing = missing_points(logged_points(site.store, site.layout, SHARDS), stored_points(site.stored_url))
    findings.missing += [
        f"{len(at)} points of {name}, {iso(int(at[0]))} to {iso(int(at[-1]))}" for name, at in missing.items()
    ]
    found = logged(site.layout, site.store, SHARDS)
    produced, lost = count_lost(site.layout, found)
    return {
        "produced": produced,
        "logged": len(found),
        "lost": lost,
        "repeated": sum(found.values()) - len(found),
        "causes": sum(not one.ended for one in watch.said),
        "doubled": len(findings.doubled),
        "forgotten": len(findings.forgotten),
        "invented": len(findings.invented),
        "replay_differs": len(findings.replayed),
        "points_missing": sum(map(len, missing.values())),
    }, findings


def run(root: Path, faults: list[Fault], seed: int, rate: float, causes: int) -> dict[str, Any]:
    """Start everything, let the faults happen, drain, judge; `seed` is the grid platform's."""
    with running(root, rate, causes, seed) as site, Watch(site) as watch:
        began_ms = real_unix_ms()
        if not until(site, watch, lambda: watch.recovered(began_ms) and watch.projected_to([1] * SHARDS), LIMIT_S):
            raise SystemExit(f"no cause became an alarm within {LIMIT_S:g} s; logs are in {root}")
        recoveries = []
        for number, fault in enumerate(faults, 1):
            recoveries.append(commit(site, watch, fault))
            tell(number, recoveries[-1])
        problems = settle(site, watch)
        counts, findings = verify(site, watch)
        ended = {name: dict(one.ended) for name, one in site.processes.items() if one.ended}
    return {
        "faults": len(faults),
        **counts,
        "recovery_s_max": max((one.from_end_s or LIMIT_S for one in recoveries), default=0.0),
        "unrecovered": [str(one.fault) for one in recoveries if one.from_end_s is None],
        "by_kind": table(recoveries),
        "ended": ended,
        "problems": problems + findings.all()[:SHOWN],
    }


def tell(number: int, one: Recovery) -> None:
    """Say how it goes, on stderr."""
    how = "NOT RECOVERED" if one.from_end_s is None else f"recovered {one.from_end_s:.1f} s after its end"
    how += f", lag at most {one.lag_s:.1f} s"
    cut = (" silently" if one.fault.silent else " refusing") if one.fault.manner == "cut" else ""
    print(
        f"{iso(real_unix_ms())} {number:3} {one.fault.member} {one.fault.manner}{cut} {one.fault.seconds:.1f} s: {how}",
        file=sys.stderr,
    )


def table(recoveries: list[Recovery]) -> dict[str, dict[str, float]]:
    """Return the recovery times by victim and manner; what did not recover counts with the limit."""
    groups: dict[str, list[Recovery]] = {}
    for one in recoveries:
        groups.setdefault(f"{one.fault.victim} {one.fault.manner}", []).append(one)
    found = {}
    for name in sorted(groups):
        times = [LIMIT_S if one.from_end_s is None else one.from_end_s for one in groups[name]]
        found[name] = {
            "count": len(times),
            "recovery_s_median": round(statistics.median(times), 2),
            "recovery_s_max": max(times),
            "from_beginning_s_max": max(one.from_beginning_s for one in groups[name]),
            "lag_s_max": max(one.lag_s for one in groups[name]),
        }
    return found


def failed(result: dict[str, Any]) -> bool:
    """Whether a run shows anything that must not be."""
    wrong = (
        "lost",
        "repeated",
        "doubled",
        "forgotten",
        "invented",
        "replay_differs",
        "points_missing",
        "unrecovered",
        "problems",
    )
    return any(result[key] for key in wrong)


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--longest-s", type=float, default=20.0, help="cut longer faults down to this")
    kinds = [one.kind for one in VICTIMS]
    parser.add_argument("--only", action="append", choices=kinds, help="a victim; may be given several times")
    parser.add_argument("--rate", type=float, default=100.0, help="messages a second of 10 readings beside the causes")
    parser.add_argument("--causes", type=int, default=6000, help="elevators to plant causes at, two a second")
    parser.add_argument("--data", type=Path, help="keep the data here (default: a folder that is removed)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = (options.data or Path(folder)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        victims = tuple(one for one in VICTIMS if not options.only or one.kind in options.only)
        faults = plan(options.seed, options.faults, options.longest_s, victims)
        result = run(root, faults, options.seed, options.rate, options.causes)
    print(json.dumps(result) if options.json else "\n".join(f"{k:16} {v}" for k, v in result.items()))
    return 1 if failed(result) else 0
