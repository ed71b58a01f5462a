"""HTTPS to the centre's box listener: checked against our own authorities only, never the system's."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from citybrain.errors import ProtocolError, TransitionError, Unavailable, UsageError
from gateway.broker.certificate import parse
from gateway.broker.tls import failure

TIMEOUT_S = 20.0
MOST_BYTES = 1024 * 1024
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, openssl/x509_vfy.h

T = TypeVar("T")


class Caller:
    """Requests to one centre. now_ms: our wall clock, which may be wrong."""

    def __init__(self, url: str, context: ssl.SSLContext, now_ms: int) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise UsageError(f"{url[:100]!r}: expected an address such as https://iot.example.city:8443")
        self.url = f"https://{parts.netloc}"
        self._host, self._port = parts.hostname, parts.port or 443
        self._context = context
        self._now_ms = now_ms

    def call(self, method: str, path: str, kind: type[T], body: Mapping[str, Any] | None = None) -> T:
        """Return the centre's answer.

        Raises Unavailable where it does not answer, TransitionError in its words where it refuses, ProtocolError where
        the answer is none.
        """
        status, content = self._exchange(method, path, None if body is None else msgspec.json.encode(body))
        if status >= 400:
            raise _refusal(self.url, status, content)
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"{self.url}{path}: not an answer of ours: {error}") from None

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        line = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._context)
        try:
            line.request(method, path, body, {"Content-Type": "application/json"})
            answer = line.getresponse()
            return answer.status, answer.read(MOST_BYTES)
        except OSError as error:
            said = failure(error, self._host, self._now_ms).replace("the broker", "the centre")
            raise Unavailable(f"{self.url}: {said}") from None
        except http.client.HTTPException as error:
            raise ProtocolError(f"{self.url}: no HTTP: {error!r}") from None
        finally:
            line.close()


def unchecked_context() -> ssl.SSLContext:
    """Return a context that checks nothing: only for asking for the authorities, which a fingerprint then proves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def checked_context(trust: str, now_ms: int, shown: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """Return a context that trusts these authorities (PEM) only, and shows a certificate with its key.

    A clock that is before an authority's own beginning is wrong for certain: then validity in time is not checked,
    signature and name are. Raises ProtocolError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=trust)
        if shown is not None:
            context.load_cert_chain(*shown)
    except ssl.SSLError as error:
        raise ProtocolError(f"certificates: cannot be used: {error.reason or error}") from None
    if not clock_is_sound(trust, now_ms):
        context.verify_flags |= ssl.VerifyFlags(NO_CHECK_TIME)
    return context


def clock_is_sound(trust: str, now_ms: int) -> bool:
    """Return whether the clock may be right: it is not before an authority's beginning."""
    ders = certificates_of(trust)
    return all(now_ms >= parse(der).not_before * 1000 for der in ders)


def certificates_of(pem: str) -> list[bytes]:
    """Return the certificates of a PEM text, DER; raises ProtocolError."""
    found = [part + ssl.PEM_FOOTER for part in pem.split(ssl.PEM_FOOTER)[:-1]]
    try:
        return [ssl.PEM_cert_to_DER_cert(one.strip()) for one in found]
    except ValueError as error:
        raise ProtocolError(f"certificates: expected PEM: {error}") from None


def _refusal(url: str, status: int, content: bytes) -> Exception:
    try:
        problem = msgspec.json.decode(content, type=dict[str, Any])
        words = str(problem["what"])
    except (msgspec.DecodeError, KeyError):
        words = f"HTTP {status}"
    return Unavailable(f"{url}: {words}") if status >= 500 else TransitionError(f"{url} refuses: {words}")
