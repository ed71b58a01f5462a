"""`citybrain platform`: a reference grid platform: it takes cases, works them and reports back.

It has its own process and its own state (`platform/grid.db`, and `platform/received.jsonl` for people), and it is not
kind: it refuses bad signatures, fails at times, and drops connections after it has taken a case. What it does follows
from the run's seed. docs/integration.md is the contract it keeps.
"""

from __future__ import annotations

import argparse
import http.server
import signal
import socket
import threading
import urllib.error
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

import msgspec

from api.platforms import webhook
from citybrain.cli import Subcommand
from citybrain.clock import Clock, iso, real_unix_ms, real_unix_s, wait_s
from citybrain.counters import Counters
from citybrain.errors import SignatureError, Unavailable, UsageError
from citybrain.layout import Layout, Run
from simulators.grid_cases import KNOWN, Answer, Book, Notice, draw

MAX_BYTES = 1024 * 1024
REFUSED_SHARE = 0.05  # answered 503 although all is well
DROPPED_SHARE = 0.02  # taken, but the connection ends before the answer: the sender must come again
SEND_TIMEOUT_S = 1.5  # stopping waits for it
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 30.0)
STEP_S = 0.1
SOURCE = "urn:citybrain:platform:grid"


class Event(msgspec.Struct, frozen=True):
    """A CloudEvent of the desk. `data` is kept as it came; what we need of it is in `Book.take`."""

    id: str
    source: str
    type: str
    specversion: str
    data: dict[str, Any]


class Platform:
    """The platform without its sockets: what it answers, what it does as time passes, what it wants to send."""

    def __init__(self, layout: Layout, run: Run, book: Book, counters: Counters, *, failing: bool = True) -> None:
        self.layout = layout
        self.run = run
        self.clock: Clock = run.clock
        self.book = book
        self.counters = counters
        self.failing = failing

    def receive(self, headers: dict[str, str], body: bytes) -> Answer:
        """Take one webhook and return the answer; `drop` means that the answer gets lost on purpose."""
        self.counters.add("received_total")
        try:
            secret = webhook.read_secret(self.layout.secrets / "platform.key")
            if secret is None:
                return _problem(503, "no_secret", "secrets/platform.key", "no secret is agreed yet")
            webhook_id = webhook.verify([secret], headers, body, real_unix_s())
            event = msgspec.json.decode(body, type=Event)
        except SignatureError as error:
            self.counters.drop(f"signature_{error.reason}")
            return _problem(401, f"signature_{error.reason}", "header webhook-signature", str(error))
        except msgspec.DecodeError as error:
            self.counters.drop("malformed")
            return _problem(400, "malformed", "body", str(error))
        return self._take(webhook_id, event)

    def _take(self, webhook_id: str, event: Event) -> Answer:
        if event.type not in KNOWN:
            self.counters.drop("unknown_type")
            return _problem(400, "unknown_type", "body type", f"{event.type!r} is none of the types agreed")
        fate = draw(self.run.seed, webhook_id, self.book.times(webhook_id)) if self.failing else 1.0
        if fate < REFUSED_SHARE and not self.book.is_taken(webhook_id):
            self.book.refused(webhook_id)
            self.counters.add("failed_on_purpose_total", how="refused")
            return _problem(503, "busy", "platform", "too busy, come again", retry_after_s=1)
        try:
            answer = self.book.take(webhook_id, event.type, event.data, self.clock.now_ms())
        except (KeyError, TypeError, ValueError) as error:
            self.counters.drop("malformed")
            return _problem(400, "malformed", "body data", f"{type(error).__name__}: {error}")
        if answer.repeat:
            self.counters.add("repeats_total")
        elif fate < REFUSED_SHARE + DROPPED_SHARE:
            self.counters.add("failed_on_purpose_total", how="dropped")
            return msgspec.structs.replace(answer, drop=True)
        return answer

    def step(self) -> int:
        """Work the cases whose time has come and send what is due; return how much was done."""
        worked = self.book.work(self.clock.now_ms(), self.layout.truth)
        sent = sum(self._send(notice) for notice in self.book.due_notices(real_unix_ms()))
        self.counters.gauges["cases"] = float(self.book.count())
        self.counters.gauges["notices_waiting"] = float(self.book.waiting())
        return worked + sent

    def _send(self, notice: Notice) -> int:
        """Send one notice; one that does not arrive comes again, later and later."""
        url = f"http://{self.run.host}:{self.run.api_port}/v1/platforms/grid/events"
        secret = webhook.read_secret(self.layout.secrets / "verdict.key")
        error = "no secrets/verdict.key yet"
        if secret is not None:
            body = event_of(notice)
            headers = webhook.sign(secret, notice.id, real_unix_s(), body)
            error = post(url, body, {**headers, "content-type": "application/cloudevents+json"})
        if not error:
            self.book.sent(notice.id)
            self.counters.add("sent_total")
            return 1
        self.counters.add("errors_total", stage="send")
        self.counters.details["last_error"] = f"{notice.id}: {error}"
        delay_s = BACKOFF_S[min(notice.attempts, len(BACKOFF_S) - 1)]
        self.book.failed(notice.id, real_unix_ms() + int(delay_s * 1000))
        return 0


def event_of(notice: Notice) -> bytes:
    """Return a notice as the bytes of a CloudEvent; the same bytes every time."""
    event = {
        "specversion": "1.0",
        "id": notice.id,
        "source": SOURCE,
        "type": notice.type,
        "subject": notice.data["case"],
        "time": iso(notice.at),
        "datacontenttype": "application/json",
        "data": notice.data,
    }
    return msgspec.json.encode(event)


def post(url: str, body: bytes, headers: dict[str, str]) -> str:
    """POST and return "" where it was answered 2xx, else what went wrong."""
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=SEND_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.code} {error.read(300).decode(errors='replace')}"
    except (OSError, HTTPException) as error:
        return str(error)


def _problem(status: int, error: str, where: str, what: str, *, retry_after_s: int = 0) -> Answer:
    body = {"status": status, "error": error, "where": where, "what": what}
    return Answer(status, body, retry_after_s=retry_after_s)


class Handler(http.server.BaseHTTPRequestHandler):
    """POST /cases, GET /cases, GET /healthz."""

    protocol_version = "HTTP/1.1"
    timeout = 30  # an idle connection is ended
    server: Server

    def do_POST(self) -> None:
        size = int(self.headers.get("content-length") or -1)
        if self.path != "/cases":
            self.close_connection = True
            self._answer(_problem(404, "not_found", self.path, "POST /cases is what there is"))
        elif not 0 <= size <= MAX_BYTES:
            self.close_connection = True
            self._answer(_problem(413, "too_large", "body", f"a length of 0 to {MAX_BYTES} bytes is needed"))
        else:
            body = self.rfile.read(size)
            self._answer(self.server.platform.receive(dict(self.headers.items()), body))

    def do_GET(self) -> None:
        book, counters = self.server.platform.book, self.server.platform.counters
        if self.path == "/healthz":
            self._answer(Answer(200, {"live": True}))
        elif self.path == "/cases":
            self._answer(Answer(200, {"cases": book.listed(), "repeats": counters.values["repeats_total"]}))
        else:
            self._answer(_problem(404, "not_found", self.path, "GET /cases and /healthz are what there is"))

    def _answer(self, answer: Answer) -> None:
        if answer.drop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = msgspec.json.encode(answer.body)
        self.send_response(answer.status, HTTPStatus(answer.status).phrase)
        self.send_header("content-type", "application/json" if answer.status < 400 else "application/problem+json")
        self.send_header("content-length", str(len(content)))
        if answer.retry_after_s:
            self.send_header("retry-after", str(answer.retry_after_s))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: what happened is counted."""


class Server(http.server.ThreadingHTTPServer):
    """The HTTP side: one thread a connection, none outlives the process."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], platform: Platform) -> None:
        self.platform = platform
        try:
            super().__init__(address, Handler)
        except OSError as error:
            host, port = address
            raise Unavailable(
                f"platform: cannot listen on {host}:{port}: {error.strerror}; stop the program that has the port, "
                "or start `citybrain run` with another --platform-port"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is counted; the sender comes again."""
        self.platform.counters.add("errors_total", stage="connection")


def serve(layout: Layout, pace: float, stop: threading.Event, *, failing: bool = True) -> None:
    """Be the platform until `stop` is set; raises Unavailable where its port is taken."""
    run = layout.read_run()
    layout.make()
    counters = Counters("platform", layout.run)
    counters.resume()
    book = Book(layout.root / "platform", run.seed, pace)
    book.start()
    platform = Platform(layout, run, book, counters, failing=failing)
    with Server((run.host, run.platform_port), platform) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            while not stop.is_set():
                if not platform.step():
                    wait_s(STEP_S, stop)
                counters.publish()
        finally:
            server.shutdown()
    book.close()


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Be a grid platform: take cases at POST /cases, work them, send progress and verdicts back."
    parser.add_argument(
        "--pace",
        type=float,
        default=1.0,
        metavar="X",
        help="how long stages last (default: 1, seconds to minutes)",
    )
    parser.add_argument("--reliable", action="store_true", help="never fail on purpose")


def _run(args: argparse.Namespace) -> int:
    if not 0 < args.pace <= 10_000:
        raise UsageError(f"--pace {args.pace:g}: expected more than 0, at most 10000")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    serve(Layout(Path(args.data)), args.pace, stop, failing=not args.reliable)
    return 0


command = Subcommand("be the reference grid platform", _arguments, _run)
