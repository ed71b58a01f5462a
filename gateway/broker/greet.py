"""Asking whether it is an MQTT broker that answers, and whether it takes us: one CONNECT, under a name of its own.

The gateway's own name would end the connection that the gateway has.
"""

from __future__ import annotations

import socket

from gateway.broker.tls import PROBE_TIMEOUT_S, shaken
from gateway.config import Tls

CONNECT, CONNACK, DISCONNECT = 0x10, 0x20, b"\xe0\x00"
# Return codes of MQTT 3.1.1, 3.2.2.3.
REFUSED = {
    1: "it speaks another version of MQTT",
    2: "it does not take the name",
    3: "it is not ready",
    4: "user or password is wrong",
    5: "Not authorized: its ACL does not know the certificate's name",
}


def greeting(name: str) -> bytes:
    """Return a CONNECT with a clean session and no user (MQTT 3.1.1, 3.1).

    >>> greeting("ab").hex(" ")
    '10 0e 00 04 4d 51 54 54 04 02 00 0a 00 02 61 62'
    """
    told = name.encode()[:100]
    body = b"\x00\x04MQTT\x04\x02\x00\x0a" + len(told).to_bytes(2, "big") + told
    return bytes((CONNECT, len(body))) + body


def greet(host: str, port: int, tls: Tls | None, name: str, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """Return why the broker does not take us, "" where it does; raises OSError, and ConfigError for our files."""
    if tls is not None:
        with shaken(host, port, tls, timeout_s) as line:
            return _answer(line, name)
    with socket.create_connection((host, port), timeout_s) as plain:
        return _answer(plain, name)


def _answer(line: socket.socket, name: str) -> str:
    line.sendall(greeting(name))
    try:
        said = line.recv(4)
    except TimeoutError:
        said = b"\x00"
    except ConnectionResetError:
        said = b""
    if len(said) == 4 and said[0] == CONNACK:
        if said[3] == 0:
            line.sendall(DISCONNECT)
        return REFUSED.get(said[3], f"it refuses us: code {said[3]}") if said[3] else ""
    return "it hung up on our greeting: is it a TLS port?" if not said else "what answers there is no MQTT broker"
