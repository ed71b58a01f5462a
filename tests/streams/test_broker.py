"""Both brokers of one machine: loopback only, no silent loss, and the built-in one lets only our own in."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from citybrain.layout import Layout
from streams.runtimes.broker import amqtt_configuration, broker_command, mosquitto, mosquitto_configuration
from streams.runtimes.broker_authentication import on_this_machine
from streams.runtimes.supervisor import accepts
from tests.conftest import end, eventually

TOPIC = "cb/v1/0/gw-001/telemetry"


@pytest.fixture
def builtin(tmp_path: Path, free_port: int) -> Iterator[int]:
    """`citybrain broker` itself; the value is its port."""
    argv = [sys.executable, "-m", "citybrain", "broker", "--data", str(tmp_path), "--port", str(free_port)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: accepts("127.0.0.1", free_port), 20, "citybrain broker listening")
            yield free_port
        finally:
            end(process)


def client(port: int, name: str, got: queue.Queue[mqtt.MQTTMessage] | None = None) -> mqtt.Client:
    connected: queue.Queue[bool] = queue.Queue()
    made = mqtt.Client(CallbackAPIVersion.VERSION2, name)
    made.on_connect = lambda *args: connected.put(not args[3].is_failure)
    if got is not None:
        made.on_message = lambda _, __, message: got.put(message)
    made.connect("127.0.0.1", port)
    made.loop_start()
    assert connected.get(timeout=10), f"{name} was refused"
    return made


def subscribe(who: mqtt.Client, topic: str) -> None:
    granted: queue.Queue[bool] = queue.Queue()
    who.on_subscribe = lambda *_: granted.put(True)
    who.subscribe(topic, 1)
    granted.get(timeout=10)


def close(*clients: mqtt.Client) -> None:
    for each in clients:
        each.disconnect()
        each.loop_stop()


def exchange(port: int) -> None:
    """Publish two messages, one to a topic that is not ours, and look at what arrives."""
    got: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    listener, gateway = client(port, "ingest-0", got), client(port, "gw-001")
    try:
        subscribe(listener, "cb/v1/0/#")
        gateway.publish(TOPIC, b"x" * 200_000, 1).wait_for_publish(10)
        message = got.get(timeout=10)
        assert (message.topic, len(message.payload)) == (TOPIC, 200_000)
    finally:
        close(listener, gateway)


def test_messages_pass_mosquitto(mosquitto: int) -> None:
    exchange(mosquitto)


def test_messages_pass_the_builtin_broker(builtin: int) -> None:
    exchange(builtin)


def test_the_builtin_broker_knows_no_topics_but_ours(builtin: int) -> None:
    got: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
    listener, other = client(builtin, "ingest-0", got), client(builtin, "other")
    try:
        subscribe(listener, "#")  # refused
        subscribe(listener, "cb/v1/#")
        other.publish("somebody/else", b"1", 1).wait_for_publish(10)
        other.publish(TOPIC, b"2", 1).wait_for_publish(10)
        assert got.get(timeout=10).payload == b"2"
        assert got.empty()
    finally:
        close(listener, other)


def test_a_port_that_is_taken_is_named(tmp_path: Path, free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        argv = [sys.executable, "-m", "citybrain", "broker", "--data", str(tmp_path), "--port", str(free_port)]
        done = subprocess.run(argv, capture_output=True, timeout=30, check=False)
    assert done.returncode == 4
    assert f"port {free_port}".encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_neither_broker_listens_beyond_this_machine() -> None:
    assert "listener 1883 127.0.0.1" in mosquitto_configuration(1883)
    assert amqtt_configuration(1883)["listeners"]["default"]["bind"] == "127.0.0.1:1883"


@pytest.mark.parametrize(
    ("address", "here"),
    [("127.0.0.1", True), ("::1", True), ("127.8.0.1", True), ("10.0.0.1", False), ("", False), (None, False)],
)
def test_only_this_machine_is_let_in(address: str | None, here: bool) -> None:
    assert on_this_machine(address) is here


def test_mosquitto_where_there_is_one_else_the_builtin_broker(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert broker_command(layout, 1883, mosquitto())[:2] == (mosquitto(), "-c")
    assert "max_queued_messages 0" in (layout.broker / "mosquitto.conf").read_text()
    assert broker_command(layout, 1883, None)[1:5] == ("-P", "-m", "citybrain", "broker")
