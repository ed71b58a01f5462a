"""`citybrain broker`: the MQTT broker of one machine, on loopback only; and what `citybrain run` starts as broker.

An installed mosquitto is preferred. Without one, amqtt (pure Python) serves: its own defaults bind every interface and
let everybody in, so both are overridden here. No figure and no fault test runs on amqtt (BASELINES: it loses queued
QoS 1 messages when a client reconnects; the protocol resends them).
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from citybrain.cli import Subcommand
from citybrain.counters import PERIOD_S, Counters
from citybrain.errors import Unavailable
from citybrain.layout import Layout
from citybrain.storage import OS_FILES

HOST = "127.0.0.1"
MAX_PACKET = 2 * 1024 * 1024  # more than any frame: ingest, not the broker, refuses and counts the oversized ones
BOXES, LISTENER = "boxes", "listener.conf"  # below DATA/broker, where there is a certificate authority
# What holds for every mosquitto of ours, whoever may reach it. The broker's PUBACK is never trusted (docs/wire.md), so
# persistence would only cost time. Its default bound of 1,000 queued messages silently loses half of a burst after the
# publisher was acked (measured): 0 lifts it; the gateways' windows bound the queue instead.
WHOLE_BROKER = (
    "persistence false",
    "max_queued_messages 0",
    "max_inflight_messages 0",
    f"max_packet_size {MAX_PACKET}",
    "set_tcp_nodelay true",
    "log_dest stderr",
    "log_timestamp_format %Y-%m-%dT%H:%M:%S",
    *(f"log_type {kind}" for kind in ("error", "warning", "notice")),
)
AUTHENTICATION = "streams.runtimes.broker_authentication.Loopback"


def mosquitto() -> str | None:
    """Return the path of an installed mosquitto, also where `/usr/sbin` is not on the PATH."""
    return shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def mosquitto_configuration(port: int) -> str:
    """Return a mosquitto configuration: loopback, nothing kept on disk, and no silent loss of a burst."""
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        *WHOLE_BROKER,
    ]
    if os.geteuid() == 0:
        # Started as root mosquitto changes its user, and that makes the kernel forget that it must die with us.
        lines.append(f"user {getpass.getuser()}")
    return "\n".join([*lines, ""])


def with_boxes(text: str, boxes: Path) -> str:
    """Return a configuration with the listener for boxes behind it, each listener with its own rules.

    `boxes` is the folder that `citybrain ca broker` writes; it sends SIGHUP to the process in `mosquitto.pid` there.
    """
    own = f"per_listener_settings true\npid_file {boxes / 'mosquitto.pid'}\n"
    return f"{own}{text}\n{OS_FILES.read(boxes / LISTENER).decode()}"


def broker_command(layout: Layout, port: int, program: str | None) -> tuple[str, ...]:
    """Return the command line of the broker: mosquitto at `program` (its configuration is written to `DATA/broker`),
    or the built-in one where that is None.
    """
    if program is None:
        return (sys.executable, "-P", "-m", "citybrain", "broker", "--data", str(layout.root), "--port", str(port))
    OS_FILES.make(layout.broker)
    path = layout.broker / "mosquitto.conf"
    text, boxes = mosquitto_configuration(port), layout.broker / BOXES
    if (boxes / LISTENER).exists():
        text = with_boxes(text, boxes.absolute())
    OS_FILES.replace(path, text.encode())
    return (program, "-c", str(path))


def amqtt_configuration(port: int) -> dict[str, Any]:
    """Return amqtt's configuration: one loopback listener, and only our own authentication."""
    return {
        "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{port}", "max_connections": 0}},
        "plugins": {AUTHENTICATION: {}},
    }


async def serve(port: int, counters: Counters) -> None:
    """Serve until SIGINT or SIGTERM; raises Unavailable where the port is taken."""
    from amqtt.broker import Broker  # noqa: PLC0415  slow to import, and an extra: mosquitto needs neither
    from amqtt.errors import BrokerError  # noqa: PLC0415

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    broker = Broker(amqtt_configuration(port))
    try:
        await broker.start()
    except BrokerError as error:
        raise Unavailable(f"port {port}: the MQTT broker cannot listen there: {error}") from None
    try:
        while not stop.is_set():
            counters.gauges["connections"] = float(len(broker.sessions))
            counters.publish()
            await _wait(stop)
    finally:
        await broker.shutdown()


async def _wait(stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), PERIOD_S)
    except TimeoutError:
        return


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, metavar="N", help="loopback port (default: the run's MQTT port)")


def _run(args: argparse.Namespace) -> int:
    layout = Layout(Path(args.data))
    port = args.port or layout.read_run().mqtt_port
    OS_FILES.make(layout.run)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("amqtt.broker").setLevel(logging.CRITICAL)  # what it cannot do it also raises
    asyncio.run(serve(port, Counters("broker", layout.run)))
    return 0


command = Subcommand("serve MQTT on loopback with amqtt, where no mosquitto is installed", _arguments, _run)
