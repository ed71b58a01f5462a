"""`citybrain operator`: a simulated NB-IoT operator: battery devices report to it, and it pushes what they say to us.

It is as kind as the real ones: it pushes batches, tries three times and is then silent, pauses after many failures,
loses, repeats, delays and reorders some, and is away now and then. All it was told can be asked for at
`GET /readings?after=NUMBER`. What it does follows from the run's seed.
"""

from __future__ import annotations

import argparse
import heapq
import http.client
import http.server
import random
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import yaml

from citybrain.cli import Subcommand, emit
from citybrain.clock import HOUR_MS, MINUTE_MS, SECOND_MS, real_unix_s, wait_s
from citybrain.counters import Counters
from citybrain.errors import SignatureError, Unavailable
from citybrain.layout import Layout, Run
from citybrain.model import CLOUD_PREFIX, Reading, Registry
from citybrain.storage import OS_FILES
from citybrain.webhook import sign
from edge.agent import Source
from gateway.clouds.config import Keys, make_keys, read_clouds, read_keys
from gateway.clouds.operators import Peer
from simulators.cloud_book import Book
from simulators.district import build
from simulators.faults import Scenario, Schedule
from simulators.sensors import Sensors

NAME = "simulated"
BATCH_MESSAGES = 100
PAGE_MESSAGES = 500
TRIES = 3  # the real ones': documented by an operator as "at most 3 times"
RETRY_MS = 5 * SECOND_MS  # [U]
FAILURES_TO_PAUSE = 100  # in a row; documented by an operator, as is the minute
PAUSE_MS = MINUTE_MS
SETTLED_MS = MINUTE_MS  # [U] so long after it was told a message can be asked for: its push comes first
TIMEOUT_S = 5.0
STEP_S = 0.2
OUTAGE_WINDOW_MS = 6 * HOUR_MS


class Habits(msgspec.Struct, frozen=True):
    """How unreliable the operator is, as shares of batches; [U] all our choice, worse than any we heard of."""

    lost: float = 0.05
    repeated: float = 0.10
    delayed: float = 0.10
    reordered: float = 0.20
    delay_ms: int = 10 * MINUTE_MS  # at most
    outages: float = 0.25  # of windows of six hours
    outage_ms: int = 20 * MINUTE_MS  # at most


class Batch(msgspec.Struct, order=True, frozen=True):
    """Messages to be pushed together, when due."""

    due_ms: int
    number: int
    tries: int
    body: bytes


class Operator:
    """The operator without its sockets. Times are platform time."""

    def __init__(self, book: Book, seed: int, habits: Habits, counters: Counters) -> None:
        self.book = book
        self.counters = counters
        self._seed = seed
        self._habits = habits
        self._random = random.Random(f"{seed}/operator")
        self._queue: list[Batch] = []
        self._numbers = 0
        self._failures = 0
        self._paused_until_ms = 0

    def away(self, now_ms: int) -> bool:
        """Return whether the operator's platform is out of order: it neither takes, pushes nor answers."""
        window = now_ms // OUTAGE_WINDOW_MS
        draw = random.Random(f"{self._seed}/outage/{window}")
        if draw.random() >= self._habits.outages:
            return False
        length_ms = round(self._habits.outage_ms * (0.1 + 0.9 * draw.random()))
        start_ms = window * OUTAGE_WINDOW_MS + round((OUTAGE_WINDOW_MS - length_ms) * draw.random())
        return start_ms <= now_ms < start_ms + length_ms

    def told(self, messages: Sequence[dict[str, Any]], now_ms: int) -> None:
        """Take what devices report: all of it is kept, most of it will be pushed."""
        if not messages:
            return
        self.book.add(messages, now_ms)
        self.counters.add("told_total", len(messages))
        if self.away(now_ms) or now_ms < self._paused_until_ms:  # devices are answered, nobody else is
            self.counters.add("unpushed_total", len(messages), reason="away")
            return
        for start in range(0, len(messages), BATCH_MESSAGES):
            self._batch(list(messages[start : start + BATCH_MESSAGES]), now_ms)

    def _batch(self, messages: list[dict[str, Any]], now_ms: int) -> None:
        habits, draw = self._habits, self._random.random
        if draw() < habits.lost:
            self.counters.add("unpushed_total", len(messages), reason="lost")
            return
        if draw() < habits.reordered:
            self._random.shuffle(messages)
        body = msgspec.json.encode(messages)
        due_ms = now_ms + (round(habits.delay_ms * draw()) if draw() < habits.delayed else 0)
        self._push_at(due_ms, 0, body)
        if draw() < habits.repeated:
            self._push_at(due_ms + round(habits.delay_ms * draw()), 0, body)

    def _push_at(self, due_ms: int, tries: int, body: bytes) -> None:
        self._numbers += 1
        heapq.heappush(self._queue, Batch(due_ms, self._numbers, tries, body))

    @property
    def queued(self) -> int:
        """How many batches wait for their push."""
        return len(self._queue)

    def due(self, now_ms: int) -> Batch | None:
        """Take the next batch that is due, None where there is none, or where the operator is away or pauses."""
        if not self._queue or self._queue[0].due_ms > now_ms or self.away(now_ms) or now_ms < self._paused_until_ms:
            return None
        return heapq.heappop(self._queue)

    def pushed(self, batch: Batch, error: str, now_ms: int) -> None:
        """Note how a push went: "" is well; three errors, and the batch is given up."""
        if not error:
            self._failures = 0
            self.counters.add("sent_total")
            return
        self.counters.add("errors_total", stage="push")
        self.counters.details["last_error"] = error
        self._failures += 1
        if self._failures >= FAILURES_TO_PAUSE:
            self._failures, self._paused_until_ms = 0, now_ms + PAUSE_MS
            self.counters.add("pauses_total")
        if batch.tries + 1 < TRIES:
            self._push_at(now_ms + RETRY_MS, batch.tries + 1, batch.body)
        else:
            self.counters.add("given_up_total")


def message_of(reading: Reading) -> dict[str, Any]:
    """Return a reading as the operator tells it; its metrics have our names, so that no number changes on the way."""
    head = {
        "messageType": "dataReport",
        "protocol": "lwm2m",
        "deviceId": f"dev-{reading.device}",
        "IMEI": reading.device,
    }
    return {**head, "timestamp": reading.observed_at, "payload": reading.values}


class Client:
    """Pushes to the intake over one connection."""

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        self._keys = keys
        self._connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)

    def push(self, batch: Batch) -> str:
        """Push and return "" where it was answered 200, else what went wrong."""
        headers = {"authorization": f"Bearer {self._keys.token}", "content-type": "application/json"}
        headers |= sign(self._keys.secret, f"batch-{batch.number}", real_unix_s(), batch.body)
        try:
            self._connection.request("POST", f"/push/{NAME}", batch.body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return str(error) or type(error).__name__
        return "" if answer.status == 200 else f"{answer.status} {content[:300].decode(errors='replace')}"

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


# --- the pull ---------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /readings?after=NUMBER."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: PullServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        status, body = self.server.answer(parts.path, parts.query, dict(self.headers.items()))
        content = msgspec.json.encode(body)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: what happened is counted."""


class PullServer(http.server.ThreadingHTTPServer):
    """Answers whoever asks what the operator was told; one thread a connection, none outlives the process."""

    daemon_threads = True

    def __init__(self, run: Run, operator: Operator, peer: Peer) -> None:
        self._run, self._operator, self._peer = run, operator, peer
        try:
            super().__init__((run.host, run.operator_port), Handler)
        except OSError as error:
            raise Unavailable(
                f"operator: cannot listen on {run.host}:{run.operator_port}: {error.strerror}; stop the program that "
                "has the port, or start `citybrain run` with another --operator-port"
            ) from None

    def answer(self, path: str, query: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        """Return (status, body) of a request."""
        if path != "/readings":
            return 404, {"error": "not_found"}
        now_ms = self._run.clock.now_ms()
        if self._operator.away(now_ms):
            return 503, {"error": "away"}
        try:
            self._peer.check({name.lower(): text for name, text in headers.items()}, query.encode(), real_unix_s())
        except SignatureError as error:
            return 401, {"error": error.reason, "what": str(error)}
        after = parse_qs(query).get("after", [""])[0]
        if after and not after.isdecimal():
            return 400, {"error": "cursor", "what": f"{after!r:.40} is none of ours"}
        messages, last, more = self._operator.book.page(int(after or 0), PAGE_MESSAGES, now_ms - SETTLED_MS)
        return 200, {"messages": messages, "next": str(last), "more": more}


# --- live -------------------------------------------------------------------------------------------------------


def contract(registry: Registry, run: Run) -> dict[str, Any]:
    """Return the `clouds.yaml` that fits this operator: the metrics of hydrants under their own names."""
    lanes: dict[str, str] = {}
    for device in registry.devices:
        if device.kind == "hydrant":
            lanes |= dict.fromkeys(device.metrics, "telemetry") | dict.fromkeys(device.event_metrics, "event")
    return {
        "operators": {
            NAME: {
                "token": f"{NAME}.token",
                "key": f"{NAME}.key",
                "device": "IMEI",
                "time": "timestamp",
                "values": "payload",
                "only": {"messageType": "dataReport"},
                "fields": {name: {"metric": name, "lane": lane} for name, lane in sorted(lanes.items())},
                "pull": {"url": f"http://{run.host}:{run.operator_port}"},
            }
        }
    }


def provision(layout: Layout, run: Run) -> dict[str, object]:
    """Write the contract and its keys, as an operator and we would have agreed on them."""
    OS_FILES.make(layout.clouds)
    path = layout.clouds / "simulated.yaml"
    text = yaml.safe_dump(contract(build(run.seed, run.size).registry, run), sort_keys=False)
    OS_FILES.replace(path, text.encode())
    return {"config": str(path), "made": make_keys(layout.secrets, read_clouds(path))}


def serve(layout: Layout, run: Run, scenario: Scenario, habits: Habits, stop: threading.Event) -> None:
    """Be the operator until `stop` is set; raises Unavailable where its port is taken."""
    counters = Counters("operator", layout.run)
    counters.resume()
    configured = read_clouds(layout.clouds / "simulated.yaml").operators[NAME]
    district = build(run.seed, run.size)
    schedule = Schedule(district, district.seed, run.clock.origin_ms or run.clock.now_ms(), scenario)
    gateways = [gateway.id for gateway in district.registry.gateways if gateway.id.startswith(CLOUD_PREFIX)]
    marks = layout.root / "operator"
    sensors = [Sensors(district, name, schedule, marks / f"{name}.mark") for name in gateways]
    book = Book(layout.root / "operator")
    book.start()
    operator = Operator(book, run.seed, habits, counters)
    client = Client(run.host, run.cloud_port, read_keys(layout.secrets, configured))
    with PullServer(run, operator, Peer(NAME, configured, layout.secrets)) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            while not stop.is_set():
                step(operator, sensors, client, run)
                counters.publish()
                wait_s(STEP_S, stop)
        finally:
            server.shutdown()
            client.close()
            book.close()
            counters.publish(force=True)


def step(operator: Operator, sensors: Sequence[Source], client: Client, run: Run) -> None:
    """Hear the devices, push what is due."""
    now_ms = run.clock.now_ms()
    said = [message_of(reading) for source in sensors for _, reading in source.poll(now_ms)]
    operator.told(said, now_ms)
    while (batch := operator.due(now_ms)) is not None:
        operator.pushed(batch, client.push(batch), now_ms)
    operator.counters.gauges["queued"] = float(operator.queued)
    operator.counters.gauges["away"] = float(operator.away(now_ms))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provision", action="store_true", help="write DATA/clouds/simulated.yaml and its keys, and end"
    )
    parser.add_argument("--scenario", choices=("demo", "random"), default="demo", help="what happens (default: demo)")
    parser.add_argument("--reliable", action="store_true", help="lose, repeat, delay nothing, and never be away")


def _run(args: argparse.Namespace) -> int:
    layout = Layout(Path(args.data))
    layout.make()
    run = layout.read_run()
    if args.provision:
        emit(provision(layout, run), as_json=args.json)
        return 0
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    habits = Habits(0, 0, 0, 0, outages=0) if args.reliable else Habits()
    serve(layout, run, args.scenario, habits, stop)
    return 0


command = Subcommand("be a simulated NB-IoT operator that pushes what battery devices report", _arguments, _run)
