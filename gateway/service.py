"""The gateway's process around its cores: a spool and an uplink, bound to an MQTT broker. Single-threaded.

Every connection is a new paho client with a clean session: paho resends what it holds after a reconnect, and only the
uplink may decide what goes out again. paho never holds more than both lanes' windows, because the uplink is told how
many messages the broker has not confirmed yet.
"""

from __future__ import annotations

import random
import select
import socket
from collections.abc import Sequence
from typing import Any

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from citybrain.clock import Clock, monotonic_s, system_clock
from citybrain.wire import Status, encode_json, topic
from gateway.spool import Spool
from gateway.uplink import Uplink

KEEPALIVE_S = 15
CONNECT_TIMEOUT_S = 2.0  # of the TCP connection, which blocks the process
READY_TIMEOUT_S = 10.0  # until the broker confirmed the subscription
FIRST_RETRY_S = 0.25
MOST_RETRY_S = 8.0


class Broker(msgspec.Struct, frozen=True):
    """Where the broker is and who we are to it."""

    host: str
    port: int
    username: str | None = None
    password: str | None = None


class GatewayService:
    """One gateway's connection: birth and will, acknowledgements down, messages up, reconnects.

    Call `poll` again and again, or hand several services to `poll_all`. Raises StorageError where the spool does.
    counters: `connections_total`, `errors_total{stage=connect|connection}`.
    """

    def __init__(self, uplink: Uplink, gateway: str, shard: int, broker: Broker, clock: Clock | None = None) -> None:
        self.uplink = uplink
        self.gateway = gateway
        self.ready = False  # connected and subscribed: messages flow
        self._broker = broker
        self._clock = clock if clock is not None else system_clock()
        self._status_topic = topic(shard, gateway, "status")
        self._client: paho.Client | None = None
        self._inbox: list[tuple[str, bytes]] = []
        self._unconfirmed = 0
        self._connection = 0
        self._since_s = 0.0
        self._retry_s = 0.0
        self._delay_s = FIRST_RETRY_S
        self._refused = ""
        self._cut = False
        self._jitter = random.Random()

    @property
    def spool(self) -> Spool:
        return self.uplink.spool

    # --- for whoever drives it ---

    def poll(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the network, then do what is to be done."""
        poll_all([self], timeout_s)

    def cut(self) -> None:
        """Lose the network at once and stay without, as a broken line does: the broker publishes the will."""
        self._cut = True
        if self._client is not None:
            self._lost("cut")

    def restore(self) -> None:
        """End `cut`: connect again at the next poll."""
        self._cut = False
        self._retry_s, self._delay_s = 0.0, FIRST_RETRY_S

    def close(self, timeout_s: float = 1.0) -> None:
        """Say that we go, wait until the broker has it, and disconnect; what is unsent stays in the spool.

        A socket closed with bytes unread is reset, and a reset can overtake what was just written.
        """
        client, until_s = self._client, monotonic_s() + timeout_s
        if client is not None and self.ready:
            self._publish_status(client, online=False)
            while self._client is client and self._unconfirmed and (left_s := until_s - monotonic_s()) > 0:
                self._wait(left_s)
            if self._client is client:
                client.disconnect()
        self._cut = True
        if self._client is not None:
            self._lost("")

    def _wait(self, seconds: float) -> None:
        sock = self.socket()
        if sock is None:
            return self._lost("")
        readable, writable, _ = select.select([sock], [sock] if self.want_write() else [], [], seconds)
        return self.network(readable=bool(readable), writable=bool(writable))

    def socket(self) -> socket.socket | None:
        """Return the connection's socket, None where there is none."""
        found: Any = None if self._client is None else self._client.socket()
        return found if isinstance(found, socket.socket) else None

    def want_write(self) -> bool:
        """Return whether bytes wait for the socket to take them."""
        return self._client is not None and self._client.want_write()

    def network(self, *, readable: bool, writable: bool) -> None:
        """Move bytes as far as the socket allows."""
        client = self._client
        if client is None:
            return
        if readable:
            self._check(client.loop_read())
        if writable and self._client is client:
            self._check(client.loop_write())

    def advance(self) -> None:
        """Connect where that is due, take what came, send what may go."""
        mono_s = monotonic_s()
        if self._client is None:
            if self._cut or mono_s < self._retry_s:
                return
            self._connect(mono_s)
        client = self._client
        if client is None:
            return
        self._check(client.loop_misc())
        if not self.ready and mono_s - self._since_s > READY_TIMEOUT_S:
            self._lost("the broker does not answer")
        self._take(mono_s)
        if self.ready and self._client is client:
            self._send(client, mono_s)

    def _take(self, mono_s: float) -> None:
        inbox, self._inbox = self._inbox, []
        for where, payload in inbox:
            self.uplink.incoming(where, payload, mono_s)

    def _send(self, client: paho.Client, mono_s: float) -> None:
        for where, payload in self.uplink.outgoing(self._clock.now_ms(), mono_s, self._unconfirmed):
            self._unconfirmed += 1
            self._check(client.publish(where, payload, qos=1).rc)
            if self._client is not client:
                return

    # --- connection ---

    def _connect(self, mono_s: float) -> None:
        client = paho.Client(
            CallbackAPIVersion.VERSION2, self.gateway, clean_session=True, protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )  # fmt: skip
        client.max_inflight_messages = 0  # no limit of its own: a second queue would hide what is under way
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._broker.password)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        self._client, self._since_s, self._refused = client, mono_s, ""
        try:
            client.connect(self._broker.host, self._broker.port, KEEPALIVE_S)
        except OSError as error:
            self._lost(f"{self._broker.host}:{self._broker.port}: {error.strerror or error}", "connect")

    def _check(self, code: MQTTErrorCode) -> None:
        if self._client is None:
            return
        if code not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN) or self._client.socket() is None:
            self._lost(self._refused or paho.error_string(code))

    def _lost(self, why: str, stage: str = "connection") -> None:
        """Forget the connection; say so once, not at every try."""
        client, was_ready = self._client, self.ready
        self._client, self.ready, self._unconfirmed = None, False, 0
        self._inbox.clear()
        self.uplink.disconnected()
        sock: Any = None if client is None else client.socket()
        if sock is not None:
            sock.close()
        if why:
            self.uplink.counters.add("errors_total", stage=stage)
            if was_ready or self._delay_s == FIRST_RETRY_S:
                self.uplink.counters.warn(f"gateway {self.gateway}: no connection: {why}")
        self._retry_s = monotonic_s() + self._delay_s * self._jitter.uniform(0.5, 1.0)
        self._delay_s = min(2 * self._delay_s, MOST_RETRY_S)

    def _publish_status(self, client: paho.Client, *, online: bool) -> None:
        self._unconfirmed += 1
        client.publish(self._status_topic, self._status(online=online), qos=1)

    def _status(self, *, online: bool) -> bytes:
        return encode_json(Status(self._connection, online, self._clock.now_ms(), self.spool.serial, self.spool.fault))

    # --- paho's callbacks: they only note; whatever acts is done in `advance` ---

    def _on_socket_open(self, client: paho.Client, _data: Any, sock: Any) -> None:
        """Number the connection: between TCP and CONNECT, because a try is not worth a write and the will names it."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = self.spool.next_connection(self._clock.now_ms() // 1000)
        client.will_set(self._status_topic, self._status(online=False), qos=1)

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._refused = f"the broker refuses: {reason}"
        else:
            client.subscribe(self.uplink.ack_topic, qos=1)

    def _on_subscribe(self, client: paho.Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._refused = f"the broker refuses a subscription to {self.uplink.ack_topic}"
            client.disconnect()
            return
        self.ready, self._delay_s = True, FIRST_RETRY_S
        self.uplink.counters.add("connections_total")
        self.uplink.connected(monotonic_s())
        self._publish_status(client, online=True)

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        self._inbox.append((message.topic, bytes(message.payload)))

    def _on_publish(self, _client: paho.Client, _data: Any, _mid: int, _reason: Any, _properties: Any) -> None:
        self._unconfirmed -= 1


def poll_all(services: Sequence[GatewayService], timeout_s: float) -> None:
    """Drive several services with one wait of at most `timeout_s`."""
    waiter = select.poll()
    by_fd: dict[int, GatewayService] = {}
    for service in services:
        service.advance()
        sock = service.socket()
        if sock is not None:
            by_fd[sock.fileno()] = service
            waiter.register(sock, select.POLLIN | (select.POLLOUT if service.want_write() else 0))
    for fd, event in waiter.poll(max(timeout_s, 0.0) * 1000):
        by_fd[fd].network(
            readable=bool(event & (select.POLLIN | select.POLLHUP | select.POLLERR)),
            writable=bool(event & select.POLLOUT),
        )
    for service in services:
        service.advance()
