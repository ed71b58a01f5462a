"""`citybrain mirror`: a second copy of the history on shared storage, brought up to date, checked, and fetched back."""

from __future__ import annotations

import argparse
import signal
import threading
from typing import Any

import msgspec

from citybrain.cli import Subcommand, emit
from citybrain.clock import wait_s
from citybrain.config import duration_ms
from citybrain.counters import Counters
from citybrain.errors import Damaged, StorageError, Unavailable, UsageError
from citybrain.layout import Layout
from streams.history.mirror import Fetched, Mirror

BEAT_S = 1.0
READS = 3  # parts that were merged away while they were read: the newer manifest is taken


def push(mirror: Mirror, layout: Layout) -> dict[str, Any]:
    """Push once; raises StorageError, Unavailable."""
    shards = layout.read_run().shards
    for left in reversed(range(READS)):
        try:
            return dict(msgspec.to_builtins(mirror.push(layout, shards)))
        except StorageError:  # a file that its manifest named is gone: it was merged meanwhile
            if not left:
                raise
    raise AssertionError


class Pushing:
    """Pushes every so often until stopped; storage that is away is waited for, and said."""

    def __init__(self, mirror: Mirror, layout: Layout, every_s: float, stop: threading.Event) -> None:
        self.counters = Counters("mirror", layout.run)
        self._mirror, self._layout, self._every_s, self._stop = mirror, layout, every_s, stop

    def __call__(self) -> None:
        self.counters.resume()
        while not self._stop.is_set():
            self._push()
            waited_s = 0.0
            while waited_s < self._every_s and not wait_s(BEAT_S, self._stop):
                waited_s += BEAT_S
                self.counters.publish()
        self.counters.publish(force=True)

    def _push(self) -> None:
        try:
            done = push(self._mirror, self._layout)
        except (Unavailable, StorageError) as error:
            self.counters.add("errors_total", stage="mirror")
            self.counters.warn(str(error))
        else:
            self.counters.add("sent_total", done["sent"])
            self.counters.gauges["mirror_bytes"] = done["bytes"]
        self.counters.publish(force=True)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("push", "fetch", "verify"), help="bring the copy up to date; fill an empty "
                        "data folder from it; read all of it and compare")  # fmt: skip
    parser.add_argument("url", metavar="URL", help="s3://BUCKET/PATH or file:///PATH")
    parser.add_argument("--every", metavar="TIME", help="with push: go on, and push that often, such as 5min")


def _run(args: argparse.Namespace) -> int:
    layout, mirror = Layout(args.data), Mirror(args.url)
    if args.action == "push":
        return _run_push(args, mirror, layout)
    if args.every is not None:
        raise UsageError("--every: only with push")
    return _told(mirror.fetch(layout) if args.action == "fetch" else mirror.verify(), as_json=args.json)


def _run_push(args: argparse.Namespace, mirror: Mirror, layout: Layout) -> int:
    layout.make()
    if args.every is None:
        emit(push(mirror, layout), as_json=args.json)
        return 0
    try:
        every_s = duration_ms(args.every) / 1000
    except ValueError as error:
        raise UsageError(f"--every: {error}") from None
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    Pushing(mirror, layout, every_s, stop)()
    return 0


def _told(fetched: Fetched, *, as_json: bool) -> int:
    emit(dict(msgspec.to_builtins(fetched)), as_json=as_json)
    return Damaged.exit_code if fetched.wrong else 0


command = Subcommand("keep a second copy of the history on shared storage", _arguments, _run)
