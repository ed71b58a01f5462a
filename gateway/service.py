"""The gateway's process around its cores: a spool and an uplink, bound to an MQTT broker. Single-threaded.

Every connection is a new paho client with a clean session: paho resends what it holds after a reconnect, and only the
uplink may decide what goes out again. paho never holds more than both lanes' windows, because the uplink is told how
many messages the broker has not confirmed yet.
"""

from __future__ import annotations

import random
import select
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from citybrain.clock import Clock, monotonic_s, real_unix_ms, system_clock
from citybrain.wire import About, Status, encode_json, topic
from gateway.broker.dial import Broker, Dial
from gateway.spool import Spool
from gateway.uplink import Uplink

__all__ = ["Broker", "GatewayService", "poll_all"]

KEEPALIVE_S = 15
READY_TIMEOUT_S = 10.0  # until the broker confirmed the subscription
FIRST_RETRY_S = 0.25
MOST_RETRY_S = 8.0
SAY_AGAIN_S = 3600.0
MOST_REASONS = 16
TELL_LEAST_S = 30.0  # a status that changed is told so often
TELL_AGAIN_S = 3600.0  # one that did not, in case it was lost
SHORT_S, SHORT_TIMES = 60.0, 3  # so many connections one after the other that end so soon have one cause
ASK_AGAIN_S = 300.0  # between two questions why the broker hangs up: each costs it a handshake
TCP_BYTES = struct.Struct("=120x2Q")  # tcpi_bytes_acked, tcpi_bytes_received in struct tcp_info, linux/tcp.h


class _Client(paho.Client):
    """paho on a line that is there already (`_create_socket` is what it would open one with; paho-mqtt 2.1)."""

    line: socket.socket

    def _create_socket(self) -> socket.socket:
        return self.line


class GatewayService:
    """One gateway's connection: birth and will, acknowledgements down, messages up, reconnects.

    Call `poll` again and again, or hand several services to `poll_all`. Raises StorageError where the spool does.
    `on_command` is given what comes on `…/command`; without it nothing is subscribed there.
    counters: `connections_total`, `errors_total{stage=connect|connection}`, `sent_bytes_total`, `received_bytes_total`
    (of TCP, TLS included, as the kernel counts them).
    """

    def __init__(
        self,
        uplink: Uplink,
        gateway: str,
        shard: int,
        broker: Broker,
        clock: Clock | None = None,
        on_command: Callable[[bytes], None] | None = None,
        wall_ms: Callable[[], int] = real_unix_ms,
    ) -> None:
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
        self._on_command = on_command
        self._wall_ms = wall_ms  # what certificates are judged by
        self._command_topic = topic(shard, gateway, "command")
        self._reply_topic = topic(shard, gateway, "reply")
        self.reason = ""  # why there is no connection
        self._said_s: dict[str, float] = {}  # when each reason was said last
        self._asked_s = -ASK_AGAIN_S
        self._ask = False
        self._ready_s = 0.0  # since when messages flow
        self._short = 0  # connections, one after the other, that ended soon and unexplained
        self._dial: Dial | None = None
        self._counted = (0, 0)
        self._about: About | None = None
        self._told: tuple[float, About | None] = (0.0, None)  # when what was said of us last

    @property
    def spool(self) -> Spool:
        return self.uplink.spool

    # --- for whoever drives it ---

    def poll(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the network, then do what is to be done."""
        poll_all([self], timeout_s)

    def cut(self) -> None:
        """Lose the network at once and stay without, as a broken line does: the broker publishes the will."""
        self._hang_up()
        if self._client is not None:
            self._lost("cut")

    def _hang_up(self) -> None:
        """Dial no more, and give up what is being dialled."""
        self._cut = True
        if self._dial is not None:
            self._dial.abandon()
        self._dial = None

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
        self._hang_up()
        if self._client is not None:
            self._lost("")

    def _wait(self, seconds: float) -> None:
        sock = self.socket()
        if sock is None:
            return self._lost("")
        waiter = select.poll()  # select() knows no descriptor above 1023
        waiter.register(sock, select.POLLIN | (select.POLLOUT if self.want_write() else 0))
        events = [event for _, event in waiter.poll(seconds * 1000)]
        return self.moved(events[0] if events else 0)

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
            self._read(client)
        if writable and self._client is client:
            self._check(client.loop_write())

    def moved(self, event: int) -> None:
        """Move bytes after what `poll` said of the socket."""
        ready = select.POLLIN | select.POLLHUP | select.POLLERR
        self.network(readable=bool(event & ready), writable=bool(event & select.POLLOUT))

    def _read(self, client: paho.Client) -> None:
        """Take what is there; what TLS has deciphered already shows on no socket."""
        self._check(client.loop_read())
        while self._client is client and isinstance(sock := self.socket(), ssl.SSLSocket) and sock.pending():
            self._check(client.loop_read())

    def advance(self) -> None:
        """Connect where that is due, take what came, send what may go."""
        mono_s = monotonic_s()
        if self._client is None:
            if self._cut or mono_s < self._retry_s:
                return
            self._connect()
        client = self._client
        if client is None:
            return
        if self.ready and (self._said_s or self._short) and mono_s - self._ready_s > SHORT_S:
            self._said_s.clear()  # it holds: the next loss is news
            self._delay_s, self._short = FIRST_RETRY_S, 0
        self._check(client.loop_misc())
        if not self.ready and mono_s - self._since_s > READY_TIMEOUT_S:
            self._lost("the broker does not answer")
        self._take(mono_s)
        if self.ready and self._client is client:
            self._tell(client, mono_s)
            self._send(client, mono_s)

    def reply(self, payload: bytes) -> bool:
        """Publish an answer on `…/reply`; return False where there is no connection to take it."""
        client = self._client
        if client is None or not self.ready:
            return False
        self._unconfirmed += 1
        self._check(client.publish(self._reply_topic, payload, qos=1).rc)
        return self._client is client

    def tell(self, about: About) -> None:
        """Have it said with every status from now on, and in between when it changes."""
        self._about = about

    def _tell(self, client: paho.Client, mono_s: float) -> None:
        told_s, said = self._told
        if self._about is not None and mono_s - told_s >= (TELL_AGAIN_S if said == self._about else TELL_LEAST_S):
            self._publish_status(client, online=True)

    def _take(self, mono_s: float) -> None:
        inbox, self._inbox = self._inbox, []
        for where, payload in inbox:
            if where == self._command_topic and self._on_command is not None:
                self._on_command(payload)
            else:
                self.uplink.incoming(where, payload, mono_s)

    def _send(self, client: paho.Client, mono_s: float) -> None:
        for where, payload in self.uplink.outgoing(self._clock.now_ms(), mono_s, self._unconfirmed):
            self._unconfirmed += 1
            self._check(client.publish(where, payload, qos=1).rc)
            if self._client is not client:
                return

    # --- connection ---

    def _connect(self) -> None:
        """Dial, and greet the broker as soon as there is a line."""
        if self._dial is None:
            self._dial = Dial(self._broker, self._wall_ms, ask=self._ask)
            self._dial.start()
        if not self._dial.done:
            return
        dial, self._dial, self._ask = self._dial, None, False
        if dial.line is None:
            self._short = 0  # nobody is there at all: that has another cause
            self._lost(dial.failed, "connect")
        else:
            self._greet(dial.line)

    def _greet(self, line: Any) -> None:
        client = _Client(
            CallbackAPIVersion.VERSION2, self.gateway, clean_session=True, protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )  # fmt: skip
        client.max_inflight_messages = 0  # no limit of its own: a second queue would hide what is under way
        if self._broker.username is not None:
            client.username_pw_set(self._broker.username, self._broker.password)
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.line = line
        self._client, self._since_s, self._refused = client, monotonic_s(), ""
        try:
            client.connect(self._broker.host, self._broker.port, KEEPALIVE_S)
        except OSError as error:  # it broke again before CONNECT was written
            self._lost(error.strerror or str(error))

    def _check(self, code: MQTTErrorCode) -> None:
        if self._client is None:
            return
        if code not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN) or self._client.socket() is None:
            why = self._broken(paho.error_string(code))
            if self._refused or self.ready or not self._unexplained():
                self._lost(self._refused or (why if self.ready else self.reason or why))
            else:
                self._lost("")

    def _broken(self, why: str) -> str:
        """Return why a connection broke; where it does so again and again, what a broker does that knows two of us."""
        if not self.ready:
            where = f"{self._broker.host}:{self._broker.port}"
            return (
                why if self._broker.tls else f"{where} hung up on our greeting: is it a TLS port, and `tls` left out?"
            )
        self._short = self._short + 1 if monotonic_s() - self._ready_s < SHORT_S else 0
        if self._short < SHORT_TIMES:
            return why
        return f"the broker ends each connection soon: does another box, or a copy of this card, use {self.gateway!r}?"

    def _unexplained(self) -> bool:
        """Return whether the next dial is to find out why the broker hung up on our certificate."""
        now_s = monotonic_s()
        if self._broker.tls is None or now_s - self._asked_s < ASK_AGAIN_S:
            return False
        self._asked_s, self._ask = now_s, True
        return True

    def _lost(self, why: str, stage: str = "connection") -> None:
        """Forget the connection; say why where that is news, not at every try."""
        client = self._client
        self._client, self.ready, self._unconfirmed = None, False, 0
        self._inbox.clear()
        self.uplink.disconnected()
        sock: Any = None if client is None else client.socket()
        if sock is not None:
            self._count_bytes(sock)
            sock.close()
        if why:
            self.uplink.counters.add("errors_total", stage=stage)
            self._say(why)
        self._counted = (0, 0)
        self._retry_s = monotonic_s() + self._delay_s * self._jitter.uniform(0.5, 1.0)
        self._delay_s = min(2 * self._delay_s, MOST_RETRY_S)

    def _say(self, why: str) -> None:
        """Say why there is no connection; where two reasons take turns, each only once an hour."""
        now_s, self.reason = monotonic_s(), why
        if now_s - self._said_s.get(why, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._said_s[why] = now_s
            self.uplink.counters.warn(f"gateway {self.gateway}: no connection: {why}")
        if len(self._said_s) > MOST_REASONS:
            del self._said_s[next(iter(self._said_s))]

    def count_bytes(self) -> None:
        """Bring `sent_bytes_total` and `received_bytes_total` up to date."""
        sock = self.socket()
        if sock is not None:
            self._count_bytes(sock)

    def _count_bytes(self, sock: Any) -> None:
        try:
            sent, received = TCP_BYTES.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_BYTES.size))
        except (OSError, struct.error):  # closed meanwhile, or an old kernel that tells less
            return
        self.uplink.counters.add("sent_bytes_total", max(sent - self._counted[0], 0))
        self.uplink.counters.add("received_bytes_total", max(received - self._counted[1], 0))
        self._counted = (sent, received)

    def _publish_status(self, client: paho.Client, *, online: bool) -> None:
        self._unconfirmed += 1
        self._told = monotonic_s(), self._about
        client.publish(self._status_topic, self._status(online=online), qos=1)

    def _status(self, *, online: bool) -> bytes:
        at, spool, about = self._clock.now_ms(), self.spool, self._about or About()
        return encode_json(Status(self._connection, online, at, spool.serial, spool.fault, about=about))

    # --- paho's callbacks: they only note; whatever acts is done in `advance` ---

    def _on_socket_open(self, client: paho.Client, _data: Any, sock: Any) -> None:
        """Number the connection: between TCP and CONNECT, because a try is not worth a write and the will names it."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = self.spool.next_connection(self._clock.now_ms() // 1000)
        client.will_set(self._status_topic, self._status(online=False), qos=1)

    def _on_socket_close(self, _client: paho.Client, _data: Any, sock: Any) -> None:
        self._count_bytes(sock)

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._refused = f"the broker refuses: {reason}"
        else:
            downward = [self.uplink.ack_topic] + ([self._command_topic] if self._on_command else [])
            client.subscribe([(where, 1) for where in downward])

    def _on_subscribe(self, client: paho.Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._refused = f"the broker refuses its subscriptions below {self.uplink.ack_topic.removesuffix('ack')}"
            client.disconnect()
            return
        self.ready, self.reason, self._asked_s = True, "", -ASK_AGAIN_S
        self._ready_s = monotonic_s()
        if self._short < SHORT_TIMES:
            self._delay_s = FIRST_RETRY_S
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
        by_fd[fd].moved(event)
    for service in services:
        service.advance()
