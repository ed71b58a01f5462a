"""The write API of one server, and what its answers mean: written, wrong (so look for what is), or wait.

Nothing is retried in here: whoever writes keeps the batch, and the log keeps the rest.
"""

from __future__ import annotations

import contextlib
import email.utils
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.client.write_api import SYNCHRONOUS, WriteApi
from influxdb_client.rest import ApiException
from urllib3.exceptions import HTTPError, ReadTimeoutError

from citybrain.clock import monotonic_s, real_unix_s
from citybrain.errors import ConfigError
from streams.projection.config import Target, read_token

FIRST_WAIT_S, MOST_WAIT_S = 0.5, 30.0
MOST_RETRY_AFTER_S = 600.0  # a server that asks for more is asked again after ten minutes
# 400: a line that cannot be read, a field of another type; 413: too much at once; 422: outside the bucket's retention
WRONG = (400, 413, 422)
PRECISION: Any = "ms"
SAID = 300  # signs of an answer that are kept


class Answer(NamedTuple):
    """What became of a request, and in words."""

    what: Literal["written", "wrong", "wait"]
    text: str = ""


class Server:
    """One server. `due_s`: when (monotonic) it may be asked again."""

    def __init__(self, target: Target, secrets: Path) -> None:
        self.target = target
        self.due_s = 0.0
        self.trouble = ""  # why the last request was not taken
        self._secrets = secrets
        self._wait_s = FIRST_WAIT_S
        self._gone_s: float | None = None
        self._client: InfluxDBClient | None = None
        self._api: WriteApi | None = None

    def write(self, lines: bytes) -> Answer:
        """Send lines; after *wait* do not ask before `due_s`."""
        try:
            self._open().write(self.target.bucket, self.target.org, lines, PRECISION)
        except ApiException as error:
            return self._judge(error)
        except (HTTPError, OSError) as error:
            if not isinstance(error, TimeoutError | ReadTimeoutError) and self._gone_s is None:
                self._gone_s = monotonic_s()
            return self._wait(f"{self.target.url} does not answer: {type(error).__name__}: {error}"[:SAID], None)
        except ConfigError as error:
            return self._wait(str(error), None)
        self._wait_s, self.trouble = FIRST_WAIT_S, ""
        return Answer("written")

    def returned(self) -> float | None:
        """Return, once, since when (monotonic) a server was gone that answers again; None where it was not.

        Gone is who refuses or breaks connections: a server that is back before we ask again, or one behind a proxy, is
        never seen to refuse. Who is only slow has lost nothing, and would be made slower.
        """
        if self.trouble or self._gone_s is None:
            return None
        gone_s, self._gone_s = self._gone_s, None
        return gone_s

    @property
    def there_s(self) -> float:
        """Until when (monotonic) the server was there for sure: now, or when it went and has not been asked about."""
        return monotonic_s() if self._gone_s is None else self._gone_s

    def close(self) -> None:
        """Let go of the connection; the next request opens another, with the token as it is then."""
        client, self._client, self._api = self._client, None, None
        if client is not None:
            client.close()  # type: ignore[no-untyped-call]

    def _open(self) -> WriteApi:
        if self._api is None:
            target = self.target
            self._client = InfluxDBClient(
                target.url,
                read_token(target, self._secrets) or "none",  # it insists on one; a server without accounts ignores it
                timeout=int(target.timeout),
                enable_gzip=True,
                org=target.org,
                ssl_ca_cert=target.ca or None,
            )
            self._api = self._client.write_api(write_options=SYNCHRONOUS)
        return self._api

    def _judge(self, error: ApiException) -> Answer:
        text = f"{error.status} {error.reason}: {said(error)}"
        if error.status in WRONG:
            self._wait_s, self.trouble = FIRST_WAIT_S, ""
            return Answer("wrong", text)
        return self._wait(f"{self.target.url} says {text}", retry_after_s(error))

    def _wait(self, text: str, asked_s: float | None) -> Answer:
        """Wait as long as the server asks for, else twice as long as the last time."""
        self.close()
        self.trouble = text
        self.due_s = monotonic_s() + (self._wait_s if asked_s is None else min(asked_s, MOST_RETRY_AFTER_S))
        self._wait_s = min(self._wait_s * 2, MOST_WAIT_S)
        return Answer("wait", text)


def said(error: ApiException) -> str:
    """Return what the server's answer says, in one line."""
    body = error.body or ""
    with contextlib.suppress(msgspec.DecodeError, AttributeError):
        body = msgspec.json.decode(body).get("message", body)
    return " ".join(str(body).split())[:SAID]


def retry_after_s(error: ApiException) -> float | None:
    """Return what `Retry-After` asks for (seconds, or a date), None where it says nothing we understand."""
    headers: Any = error.headers or {}
    text = str(headers.get("Retry-After", "")).strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - real_unix_s())
    except ValueError:
        return None
