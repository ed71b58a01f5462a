"""Standard Webhooks: signing what we send, verifying what we are sent (https://www.standardwebhooks.com).

Signed is `{id}.{timestamp}.{body}` with HMAC-SHA256; the signature header holds `v1,<base64>`, several of them with a
space between while a secret is changed. A secret is `whsec_` and the base64 of 24 to 64 bytes. Timestamps are real
time: simulated time never meets a signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets as random_secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from citybrain.errors import ConfigError, SignatureError

PREFIX = "whsec_"
ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
TOLERANCE_S = 300  # the standard's recommendation


def new_secret() -> str:
    """Return a fresh secret of 32 random bytes, `whsec_<base64>`."""
    return PREFIX + base64.b64encode(random_secrets.token_bytes(32)).decode()


def read_secret(path: Path) -> str | None:
    """Return the secret in a file, or None where there is no such file; raises ConfigError where it is none."""
    if not path.exists():
        return None
    text = path.read_text(encoding="ascii", errors="replace").strip()
    secret_key(text, str(path))
    return text


def secret_key(secret: str, where: str = "webhook secret") -> bytes:
    """Return the bytes of a `whsec_` secret; raises ConfigError, never showing the secret."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(PREFIX) or not 24 <= len(key) <= 64:
        raise ConfigError(where, f"expected {PREFIX} and the base64 of 24 to 64 bytes")
    return key


def _signature(secret: str, id: str, timestamp_s: int, body: bytes) -> str:
    signed = f"{id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(secret_key(secret), signed, hashlib.sha256)).decode()


def sign(secret: str, id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """Return the three headers of a webhook; `timestamp_s` is real time (`citybrain.clock.real_unix_s`)."""
    return {ID: id, TIMESTAMP: str(timestamp_s), SIGNATURE: _signature(secret, id, timestamp_s, body)}


def verify(
    secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_s: int, tolerance_s: int = TOLERANCE_S
) -> str:
    """Return the webhook-id of a message signed with one of `secrets`; header names in any case.

    Raises SignatureError with reason `missing` (a header is not there or makes no sense), `old` (its time is more than
    `tolerance_s` away from `now_s`, on either side) or `wrong` (signed with no secret we know, or changed).
    """
    found = {name.lower(): value for name, value in headers.items() if name.lower() in (ID, TIMESTAMP, SIGNATURE)}
    for name in (ID, TIMESTAMP, SIGNATURE):
        if not found.get(name):
            raise SignatureError("missing", f"no header {name}")
    stamp = found[TIMESTAMP]
    if not (stamp.isascii() and stamp.isdecimal() and len(stamp) <= 12):
        raise SignatureError("missing", f"{TIMESTAMP} {stamp[:40]!r} is no Unix time in seconds")
    if abs(now_s - int(stamp)) > tolerance_s:
        raise SignatureError("old", f"{TIMESTAMP} is {now_s - int(stamp)} s away, at most {tolerance_s} s are taken")
    given = [part.encode() for part in found[SIGNATURE].split()]
    for secret in secrets:
        wanted = _signature(secret, found[ID], int(stamp), body).encode()
        if any(hmac.compare_digest(wanted, part) for part in given):
            return found[ID]
    raise SignatureError("wrong", f"webhook {found[ID][:80]!r} carries no signature of a secret we know")
