"""What the reference grid platform knows: the cases it took, how far each is, and what it has yet to say of them."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import threading
from pathlib import Path
from typing import Any

import msgspec

from api.platforms.events import CASE_CREATED, CASE_RECOVERED, CASE_UPDATED, RESCUE_CREATED
from citybrain.clock import DAY_MS, MINUTE_MS, iso
from citybrain.storage import OS_FILES

CREATED = (CASE_CREATED, RESCUE_CREATED)
KNOWN = (*CREATED, CASE_UPDATED, CASE_RECOVERED)
PROGRESS, VERDICT = "cn.citybrain.platform.progress", "cn.citybrain.platform.verdict"

# 受理 → 立案 → 派遣 → 接单 → 到场 → 处置 → 核查 → 结案, each with the seconds until it is reached, at pace 1.
WAY = (("accepted", 3), ("filed", 5), ("dispatched", 7), ("taken", 15), ("arrived", 60), ("handled", 120),
       ("verify_fix", 30), ("closed", 10))  # fmt: skip
RESCUE_WAY = (("accepted", 1), ("filed", 1), ("dispatched", 2), ("taken", 5), ("arrived", 30), ("handled", 40),
              ("verify_fix", 10), ("closed", 5))  # fmt: skip
EARLY_MS, LATE_MS = 2 * MINUTE_MS, 30 * MINUTE_MS  # a cause shows this long before and after its time
NEAR_M = 50.0
METRES_PER_DEGREE = 111_320.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    id TEXT PRIMARY KEY, number TEXT NOT NULL, type TEXT NOT NULL, times INTEGER NOT NULL, taken INTEGER NOT NULL,
    answer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cases (
    number TEXT PRIMARY KEY, external_id TEXT NOT NULL, rescue INTEGER NOT NULL, category TEXT NOT NULL,
    device TEXT NOT NULL, members TEXT NOT NULL, lon REAL NOT NULL, lat REAL NOT NULL, observed_at INTEGER NOT NULL,
    received_at INTEGER NOT NULL, stage TEXT NOT NULL, next_at INTEGER, verdict TEXT, recovered_at INTEGER);
CREATE TABLE IF NOT EXISTS notices (
    n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, number TEXT NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL,
    at INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, next_at INTEGER NOT NULL DEFAULT 0,
    sent INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS notices_waiting ON notices (sent, n);
CREATE INDEX IF NOT EXISTS cases_due ON cases (next_at);
"""


class Answer(msgspec.Struct, frozen=True):
    """What the platform answers. `repeat`: it had been taken before; `drop`: the connection ends without the answer."""

    status: int
    body: dict[str, Any]
    repeat: bool = False
    drop: bool = False
    retry_after_s: int = 0


class Notice(msgspec.Struct, frozen=True):
    """Something the platform has to say about a case, at platform time `at`. `id` is its webhook-id."""

    id: str
    type: str
    data: dict[str, Any]
    at: int
    attempts: int


def draw(seed: int, *names: object) -> float:
    """Return a number in [0, 1) that follows from the seed and the names alone."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


class Book:
    """The platform's memory. Every method is one transaction and may be called from any thread."""

    def __init__(self, folder: Path, seed: int, pace: float = 1.0) -> None:
        self.folder = folder
        self.seed = seed
        self.pace = pace
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False)

    def start(self) -> None:
        """Open what is there, or begin."""
        OS_FILES.make(self.folder)
        self._db = sqlite3.connect(self.folder / "grid.db", check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    # --- taking -------------------------------------------------------------------------------------------------

    def times(self, webhook_id: str) -> int:
        """Return how often a webhook has come so far."""
        with self._lock:
            row = self._db.execute("SELECT times FROM messages WHERE id = ?", (webhook_id,)).fetchone()
        return int(row["times"]) if row else 0

    def is_taken(self, webhook_id: str) -> bool:
        """Return whether a webhook has been taken before."""
        with self._lock:
            row = self._db.execute("SELECT 1 FROM messages WHERE id = ? AND taken = 1", (webhook_id,)).fetchone()
        return row is not None

    def refused(self, webhook_id: str) -> None:
        """Note that a webhook came and was refused on purpose."""
        with self._lock, self._db:
            self._db.execute(
                "INSERT INTO messages VALUES (?, '', '', 1, 0, '{}') ON CONFLICT (id) DO UPDATE SET times = times + 1",
                (webhook_id,),
            )

    def take(self, webhook_id: str, type: str, data: dict[str, Any], now_ms: int) -> Answer:
        """Take a webhook once; a repeat gets the first answer. Raises KeyError, TypeError, ValueError on bad `data`."""
        with self._lock, self._db:
            known = self._db.execute("SELECT * FROM messages WHERE id = ? AND taken = 1", (webhook_id,)).fetchone()
            if known is not None:
                self._db.execute("UPDATE messages SET times = times + 1 WHERE id = ?", (webhook_id,))
                return Answer(200, msgspec.json.decode(known["answer"]), repeat=True)
            number = str(data["number"])
            if type in CREATED:
                self._open(number, type, data, now_ms)
            else:
                self._update(number, type, data, now_ms)
            answer = {"number": number, "external_id": external_id(number)}
            self._db.execute(
                "INSERT INTO messages VALUES (?, ?, ?, 1, 1, ?) ON CONFLICT (id) DO UPDATE SET "
                "number = excluded.number, type = excluded.type, "
                "times = times + 1, taken = 1, answer = excluded.answer",
                (webhook_id, number, type, msgspec.json.encode(answer).decode()),
            )
            self._tell_people(webhook_id, type, data, now_ms)
        return Answer(201 if type in CREATED else 200, answer)

    def _open(self, number: str, type: str, data: dict[str, Any], now_ms: int) -> None:
        """Open a case unless it is open already: then the message counts as taken twice, and `listed` shows it."""
        rescue = type == RESCUE_CREATED
        row = (number, external_id(number), int(rescue), str(data["category"]), str(data["device"]), members_of(data),
               *position_of(data), int(data["observed_at"]), now_ms, "",
               now_ms + self._lasts_ms(number, 0, rescue=rescue))  # fmt: skip
        self._db.execute(
            "INSERT INTO cases (number, external_id, rescue, category, device, members, lon, lat, observed_at, "
            "received_at, stage, next_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            row,
        )

    def _update(self, number: str, type: str, data: dict[str, Any], now_ms: int) -> None:
        """What the desk found out since: it recovered, came back, or is wider than thought."""
        self._db.execute(
            "UPDATE cases SET category = ?, members = ?, lon = ?, lat = ?, recovered_at = ? WHERE number = ?",
            (
                str(data["category"]),
                members_of(data),
                *position_of(data),
                now_ms if type == CASE_RECOVERED else None,
                number,
            ),
        )

    def _tell_people(self, webhook_id: str, type: str, data: dict[str, Any], now_ms: int) -> None:
        line = msgspec.json.encode({"at": iso(now_ms), "webhook_id": webhook_id, "type": type, "data": data})
        with (self.folder / "received.jsonl").open("ab") as file:
            file.write(line + b"\n")

    # --- working ------------------------------------------------------------------------------------------------

    def work(self, now_ms: int, truth: Path) -> int:
        """Move every case whose time has come, as often as it has; return the number of steps."""
        done = 0
        with self._lock, self._db:
            while rows := self._db.execute(
                "SELECT * FROM cases WHERE next_at <= ? ORDER BY next_at, number", (now_ms,)
            ).fetchall():
                for row in rows:
                    self._advance(row, truth)
                    done += 1
        return done

    def _advance(self, row: sqlite3.Row, truth: Path) -> None:
        way = RESCUE_WAY if row["rescue"] else WAY
        names = [name for name, _ in way]
        place = names.index(row["stage"]) + 1 if row["stage"] else 0
        verdict, reason = self._judge(row, names[place], truth)
        if verdict:
            self._notify(row, VERDICT, names[place], verdict, reason)
            self._db.execute(
                "UPDATE cases SET stage = ?, next_at = NULL, verdict = ? WHERE number = ?",
                (names[place], verdict, row["number"]),
            )
            return
        self._notify(row, PROGRESS, names[place])
        following = row["next_at"] + self._lasts_ms(row["number"], place + 1, rescue=bool(row["rescue"]))
        self._db.execute(
            "UPDATE cases SET stage = ?, next_at = ? WHERE number = ?", (names[place], following, row["number"])
        )

    def _judge(self, row: sqlite3.Row, stage: str, truth: Path) -> tuple[str, str]:
        """Return (verdict, reason) where this stage brings one: a duplicate shows early, a false alarm on the spot."""
        if stage == "filed" and not row["rescue"] and (other := self._same_open(row)):
            return "duplicate", f"与在办案件 {other} 重复"
        if stage == "handled" and truth.exists():
            found = is_due(read_truth(truth), row["device"], set(msgspec.json.decode(row["members"])),
                           row["observed_at"], rescue=bool(row["rescue"]))  # fmt: skip
            if not found:
                return "false_alarm", "现场核实，未发现该问题"
        return ("confirmed", "现场核实属实，已处置") if stage == "closed" else ("", "")

    def _same_open(self, row: sqlite3.Row) -> str:
        """Return the number of an older open case of the same device and class within 50 m and 24 h, else ""."""
        others = self._db.execute(
            "SELECT * FROM cases WHERE device = ? AND category = ? AND number <> ? AND verdict IS NULL AND "
            "received_at BETWEEN ? AND ? ORDER BY received_at",
            (row["device"], row["category"], row["number"], row["received_at"] - DAY_MS, row["received_at"]),
        )
        near = (other for other in others if _distance_m(row, other) <= NEAR_M and _older(other, row))
        return next((str(other["number"]) for other in near), "")

    def _lasts_ms(self, number: str, place: int, *, rescue: bool) -> int:
        seconds = (RESCUE_WAY if rescue else WAY)[place][1]
        return max(1, round(seconds * 1000 * self.pace * (0.5 + draw(self.seed, number, place))))

    def _notify(self, row: sqlite3.Row, type: str, stage: str, verdict: str = "", reason: str = "") -> None:
        data = {"case": row["number"], "stage": stage, "external_id": row["external_id"]}
        if verdict:
            data |= {"verdict": verdict, "reason": reason}
            data["stage"] = "closed" if verdict == "confirmed" else ""
        self._db.execute(
            "INSERT INTO notices (id, number, type, data, at) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            (f"{row['external_id']}-{stage}", row["number"], type, msgspec.json.encode(data).decode(), row["next_at"]),
        )

    # --- sending ------------------------------------------------------------------------------------------------

    def due_notices(self, now_ms: int, most: int = 50) -> list[Notice]:
        """Return what to send now (real time, ms): of each case the oldest that has not arrived, if it is due."""
        with self._lock:
            rows = self._db.execute(
                "SELECT * FROM notices WHERE n IN (SELECT MIN(n) FROM notices WHERE sent = 0 GROUP BY number) "
                "AND next_at <= ? ORDER BY n LIMIT ?",
                (now_ms, most),
            ).fetchall()
        return [
            Notice(row["id"], row["type"], msgspec.json.decode(row["data"]), row["at"], row["attempts"]) for row in rows
        ]

    def sent(self, id: str) -> None:
        """Note that a notice arrived."""
        with self._lock, self._db:
            self._db.execute("UPDATE notices SET sent = 1, attempts = attempts + 1 WHERE id = ?", (id,))

    def failed(self, id: str, next_at: int) -> None:
        """Note that a notice did not arrive; it is due again at `next_at` (real time, ms)."""
        with self._lock, self._db:
            self._db.execute("UPDATE notices SET attempts = attempts + 1, next_at = ? WHERE id = ?", (next_at, id))

    # --- telling ------------------------------------------------------------------------------------------------

    def count(self) -> int:
        """Return how many cases there are."""
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM cases").fetchone()[0])

    def waiting(self) -> int:
        """Return how many notices have not arrived."""
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM notices WHERE sent = 0").fetchone()[0])

    def listed(self) -> list[dict[str, Any]]:
        """Return every case: `accepted` is how many different webhooks opened it (1, or somebody doubled it),
        `received` how often those came."""
        query = (
            "SELECT c.number, c.external_id, c.rescue, c.category, c.device, c.stage, c.verdict, c.recovered_at, "
            "COUNT(m.id) AS accepted, SUM(m.times) AS received FROM cases c "
            "JOIN messages m ON m.number = c.number AND m.type IN (?, ?) GROUP BY c.number ORDER BY c.number"
        )
        with self._lock:
            return [dict(row) for row in self._db.execute(query, CREATED)]

    def close(self) -> None:
        with self._lock:
            self._db.close()


def members_of(data: dict[str, Any]) -> str:
    """Return the devices that a case's evidence names, as JSON."""
    return msgspec.json.encode(sorted({str(member["device"]) for member in data["evidence"]})).decode()


def position_of(data: dict[str, Any]) -> tuple[float, float]:
    """Return where a case is: degrees east and north."""
    return float(data["place"]["lon"]), float(data["place"]["lat"])


def external_id(number: str) -> str:
    """Return the platform's own id of a case; it follows from ours, so that a repeat cannot get another."""
    return f"G{hashlib.sha256(number.encode()).hexdigest()[:12].upper()}"


def read_truth(path: Path) -> list[dict[str, Any]]:
    """Return the planted causes; a line that is being written is left out."""
    lines = OS_FILES.read(path).split(b"\n")[:-1]
    return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines if line.strip()]


def is_due(causes: list[dict[str, Any]], device: str, members: set[str], observed_at: int, *, rescue: bool) -> bool:
    """Return whether any planted cause is due this case (or this device's rescue)."""
    for cause in causes:
        if not cause["start_ms"] - EARLY_MS <= observed_at <= cause["end_ms"] + LATE_MS:
            continue
        due = cause["due"]
        if rescue and device in due["rescues"]:
            return True
        if not rescue and due["case"] and ({device} | members) & set(cause["subjects"]):
            return True
    return False


def _older(one: sqlite3.Row, other: sqlite3.Row) -> bool:
    return bool((one["received_at"], one["number"]) < (other["received_at"], other["number"]))


def _distance_m(one: sqlite3.Row, other: sqlite3.Row) -> float:
    north = (one["lat"] - other["lat"]) * METRES_PER_DEGREE
    east = (one["lon"] - other["lon"]) * METRES_PER_DEGREE * math.cos(math.radians(one["lat"]))
    return math.hypot(north, east)
