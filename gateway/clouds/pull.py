"""Reconciliation: asking an operator for what he has said since a cursor, to fill what his pushes lost.

`GET {url}/readings?after=CURSOR`, signed like a push, answers `{"messages": […], "next": CURSOR, "more": false}` with
messages as in his pushes. The cursor is his; it is kept together with the readings that came before it.
"""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import msgspec

from citybrain.clock import monotonic_s
from citybrain.errors import Unavailable
from citybrain.webhook import sign
from citybrain.wire import NOT_JSON
from gateway.clouds.config import Keys

TIMEOUT_S = 5.0  # of the connection and of each read
WHOLE_S = 10.0
MOST_BYTES = 8 * 1024 * 1024
MOST_BACK_OFF = 16  # times the interval


class Page(msgspec.Struct, frozen=True):
    """One answer; `more` says that there is a next page now."""

    messages: list[Any]
    next: str
    more: bool = False


_page = msgspec.json.Decoder(Page)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:  # our token must not go where somebody else says
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())


def fetch(url: str, cursor: str, keys: Keys, id: str, now_s: int) -> Page:
    """Return the page behind `cursor`; raises Unavailable, saying what was answered. `now_s`: real time."""
    query = urllib.parse.urlencode({"after": cursor})
    headers = {"authorization": f"Bearer {keys.token}", **sign(keys.secret, id, now_s, query.encode())}
    request = urllib.request.Request(f"{url.rstrip('/')}/readings?{query}", headers=headers)
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            return _page.decode(_read(answer, url))
    except urllib.error.HTTPError as error:
        with error:
            raise Unavailable(f"{url}: answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{url}: {getattr(error, 'reason', None) or error}") from None
    except NOT_JSON as error:
        raise Unavailable(f"{url}: what it answered is no page of messages: {error}") from None


def _read(answer: http.client.HTTPResponse, url: str) -> bytes:
    until_s, parts, size = monotonic_s() + WHOLE_S, [], 0
    while some := answer.read1(1 << 16):
        parts.append(some)
        size += len(some)
        if size > MOST_BYTES:
            raise Unavailable(f"{url}: more than {MOST_BYTES} bytes in one page")
        if monotonic_s() > until_s:
            raise Unavailable(f"{url}: not whole within {WHOLE_S:g} s")
    return b"".join(parts)


class Schedule:
    """When to pull next, in platform time: each `every_ms`, at once where there is more, ever more seldom on errors."""

    def __init__(self, every_ms: int) -> None:
        self._every_ms = every_ms
        self._failures = 0
        self.due_ms = 0
        self.busy = False

    def due(self, now_ms: int) -> bool:
        """Return whether a pull is due; a clock that was put back does not delay it for long."""
        far = self.due_ms - now_ms > MOST_BACK_OFF * self._every_ms
        return not self.busy and (now_ms >= self.due_ms or far)

    def done(self, now_ms: int, *, more: bool) -> None:
        """A page has come."""
        self.busy, self._failures = False, 0
        self.due_ms = now_ms if more else now_ms + self._every_ms

    def failed(self, now_ms: int) -> bool:
        """No page has come; return whether that is news."""
        self.busy = False
        self.due_ms = now_ms + self._every_ms * min(2**self._failures, MOST_BACK_OFF)
        self._failures += 1
        return self._failures == 1


def in_background(work: Callable[[], None]) -> None:
    """Run `work` in a thread that does not keep the process from ending."""
    threading.Thread(target=work, daemon=True).start()
