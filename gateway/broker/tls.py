"""Mutual TLS to the broker, and the words for what goes wrong with it.

Under TLS 1.3 a client's handshake is over before the broker has looked at its certificate: a refusal comes as an alert
behind it, and an MQTT client sees only that the line is gone. So after an unexplained loss `probe` shakes hands once
more and reads until the alert is there.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from citybrain.clock import iso
from citybrain.errors import CityBrainError, ConfigError
from gateway.broker.certificate import read_certificate
from gateway.config import Tls
from gateway.times import SET_SINCE_MS

PROBE_TIMEOUT_S = 2.0
NOT_YET_VALID, EXPIRED, HOSTNAME, IP_ADDRESS = 9, 10, 62, 64  # X509_V_ERR_*, openssl/x509_vfy.h
NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL")  # OpenSSL's names
# What the broker's alert (RFC 8446, 6.2) means for us; OpenSSL's names for them.
ALERTS = {
    "CERTIFICATE_EXPIRED": "it has expired",
    "UNKNOWN_CA": "unknown authority: it was not signed by the broker's CA",
    "CERTIFICATE_REVOKED": "it has been revoked",
    "CERTIFICATE_REQUIRED": "none was shown",
    "HANDSHAKE_FAILURE": "none was shown, or none that it takes",
    "BAD_CERTIFICATE": "it cannot be read",
    "UNSUPPORTED_CERTIFICATE": "it is not for clients",
    "CERTIFICATE_UNKNOWN": "it is not acceptable (not yet valid by the broker's clock, or for another use)",
    "DECRYPT_ERROR": "key and certificate do not belong together",
    "ACCESS_DENIED": "it is valid, but may not connect",
}


def client_context(tls: Tls) -> ssl.SSLContext:
    """Return a context that checks the broker's chain and name and shows our certificate; raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (tls.ca, tls.certificate, tls.key):
        _readable(Path(path))
    try:
        context.load_verify_locations(tls.ca)
    except ssl.SSLError:
        raise ConfigError(tls.ca, "expected the CA's certificate in PEM (-----BEGIN CERTIFICATE-----)") from None
    read_certificate(Path(tls.certificate))  # OpenSSL would blame the key
    try:
        context.load_cert_chain(tls.certificate, tls.key)
    except ssl.SSLError as error:
        mismatch = "KEY_VALUES_MISMATCH" in str(error)
        what = f"is not the key of {tls.certificate}" if mismatch else f"expected a key in PEM: {error.reason or error}"
        raise ConfigError(tls.key, what) from None
    return context


def _readable(path: Path) -> None:
    try:
        with path.open("rb"):
            return
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror or error}") from None


def failure(error: OSError, host: str, now_ms: int) -> str:
    """Return in words why a connection did not come about. now_ms: our wall clock."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _broker_refused(error, host, now_ms)
    if isinstance(error, ConnectionResetError | ssl.SSLEOFError):
        return "it hung up in the middle of the TLS handshake; is it a TLS port?"
    if isinstance(error, ssl.SSLError):
        if error.reason in NO_TLS:
            return (
                "what answers there speaks no TLS: is it a TLS port, or a login page of the network (captive portal)?"
            )
        return _alert(error) or f"TLS: {error.reason or error}; is it a TLS port?"
    if isinstance(error, TimeoutError):
        return str(error) if isinstance(error, NoHandshake) else "no answer in time"
    return error.strerror or str(error)


def _broker_refused(error: ssl.SSLCertVerificationError, host: str, now_ms: int) -> str:
    if error.verify_code in (NOT_YET_VALID, EXPIRED) and now_ms < SET_SINCE_MS:
        return f"our clock says {iso(now_ms)[:10]}: it is not set, so no certificate can be checked; waiting for NTP"
    if error.verify_code == NOT_YET_VALID:
        return f"the broker's certificate is not valid yet; our clock says {iso(now_ms)}: which of them is wrong?"
    if error.verify_code == EXPIRED:
        return f"the broker's certificate has expired; our clock says {iso(now_ms)}"
    if error.verify_code in (HOSTNAME, IP_ADDRESS):
        return f"the broker's certificate is not for {host!r}: wrong `broker.host`, or somebody else answers there"
    return f"the broker's certificate is not signed by our CA: {error.verify_message}"


def _alert(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    for name, text in ALERTS.items():
        if reason.endswith(f"ALERT_{name}"):
            return f"the broker refused our certificate: {text}"
    return ""


def own_dates(tls: Tls, now_ms: int) -> str:
    """Return what is wrong with our certificate by its dates, "" where nothing is; raises ConfigError."""
    mine = read_certificate(Path(tls.certificate))
    if now_ms < SET_SINCE_MS:
        return ""  # by a clock that is not set nothing can be said
    if now_ms >= mine.not_after * 1000:
        return f"our certificate expired {day(mine.not_after)}"
    if now_ms < mine.not_before * 1000:
        return f"our certificate is valid from {day(mine.not_before)}; our clock says {iso(now_ms)}"
    return ""


def day(at_s: int) -> str:
    """Return Unix s as a date in UTC."""
    return iso(at_s * 1000)[:10]


def probe(host: str, port: int, tls: Tls, now_ms: int, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """Shake hands once and listen; return why that fails, "" where it does not. Blocks up to `timeout_s` a step."""
    try:
        with shaken(host, port, tls, timeout_s) as line:
            line.recv(1)  # whoever is refused is told now; whoever is not is waited for
    except NoHandshake as error:
        return str(error)
    except TimeoutError:
        return ""
    except OSError as error:
        return failure(error, host, now_ms)
    except CityBrainError as error:
        return str(error)
    return ""


class NoHandshake(TimeoutError):
    """There is a line, and nobody shakes hands on it."""


def handshake(context: ssl.SSLContext, plain: socket.socket, host: str) -> ssl.SSLSocket:
    """Shake hands on a connection; raises OSError, where nobody answers NoHandshake."""
    try:
        return context.wrap_socket(plain, server_hostname=host)
    except TimeoutError:
        raise NoHandshake("it takes connections, and does not answer the TLS handshake") from None


@contextmanager
def shaken(host: str, port: int, tls: Tls, timeout_s: float = PROBE_TIMEOUT_S) -> Iterator[ssl.SSLSocket]:
    """Open a connection and shake hands; raises OSError, and ConfigError where our files are wrong."""
    context = client_context(tls)
    with socket.create_connection((host, port), timeout_s) as plain, handshake(context, plain, host) as line:
        line.settimeout(timeout_s)
        yield line


def refusal(host: str, port: int, tls: Tls, now_ms: int) -> str:
    """Return why the broker hung up on us without a word, as far as it can be found out."""
    try:
        dates = own_dates(tls, now_ms)
    except ConfigError as error:
        return str(error)
    found = probe(host, port, tls, now_ms)
    return "; ".join(part for part in (found, dates) if part)
