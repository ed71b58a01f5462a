"""Operators as the process knows them: their keys, their messages, and whether their platform is alive."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from citybrain.errors import SignatureError
from citybrain.webhook import verify
from gateway.clouds.config import Clouds, Operator, read_keys
from gateway.clouds.mapping import Decoder


class Peer:
    """One operator. `life_ms` is when he last pushed, or answered a pull (platform time); 0: not since we started."""

    def __init__(self, name: str, operator: Operator, secrets: Path) -> None:
        self.name = name
        self.operator = operator
        self.keys = read_keys(secrets, operator)
        self.decoder = Decoder(operator)
        self.life_ms = 0
        self.pushed_ms = 0

    def check(self, headers: Mapping[str, str], body: bytes, now_s: int) -> None:
        """Raise SignatureError (`token` | `missing` | `old` | `wrong`) unless the request is his; `now_s` is real time.

        A request that is repeated within the five minutes is his all the same, and adds nothing.
        """
        kind, _, token = headers.get("authorization", "").partition(" ")
        wanted = self.keys.token.encode()
        if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), wanted):
            raise SignatureError("token", f"expected `Bearer TOKEN` with the token of operator {self.name!r}")
        verify([self.keys.secret], headers, body, now_s)

    def lives(self, now_ms: int) -> None:
        """Note a sign of life."""
        self.life_ms = now_ms

    def alive(self, now_ms: int) -> bool:
        """Return whether there was a sign of life within his `alive`; also where the clock was put back."""
        return bool(self.life_ms) and abs(now_ms - self.life_ms) <= self.operator.alive


def peers_of(clouds: Clouds, secrets: Path) -> dict[str, Peer]:
    """Return all operators of a file with their keys; raises ConfigError."""
    return {name: Peer(name, operator, secrets) for name, operator in clouds.operators.items()}
