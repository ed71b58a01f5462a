"""How our own commands talk to the API of a live run: loopback HTTP, JSON, and refusals in words."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

import msgspec

from citybrain.clock import monotonic_s, wait_s
from citybrain.errors import NotFound, TransitionError, Unavailable, UsageError
from citybrain.layout import Layout

TIMEOUT_S = 5.0
DECIDED_S = 10.0  # how long a command may wait for the desk before we say that it waits
_REFUSALS = {404: NotFound, 409: TransitionError}


class Api:
    """The API of the run in a data folder."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        run = layout.read_run()
        self.url = f"http://{run.host}:{run.api_port}"
        # Straight to loopback: a proxy in the environment has no business here.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict[str, Any]:
        """Return what the API answers.

        Raises Unavailable where nobody does, UsageError, NotFound or TransitionError where it refuses.
        """
        return self._call(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Mapping[str, Any], actor: str) -> dict[str, Any]:
        """Ask for a change on behalf of `actor`; raises as `get` does."""
        headers = {"Content-Type": "application/json", "X-Actor": quote(actor)}
        return self._call(urllib.request.Request(self.url + path, msgspec.json.encode(body), headers, method="POST"))

    def _call(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                return msgspec.json.decode(answer.read(), type=dict[str, Any])
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
        except (OSError, HTTPException, msgspec.DecodeError) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(
                f"{self._layout.root}: the API at {self.url} does not answer ({reason}); "
                f"start it with `citybrain run --data {self._layout.root}`"
            ) from None

    def decided(self, command: str) -> dict[str, Any]:
        """Wait until a command is applied or refused; return its state, which is `pending` where that takes long.

        Raises TransitionError with the desk's words where it was refused.
        """
        until_s = monotonic_s() + DECIDED_S
        state = self.get(f"/v1/commands/{command}")
        while state["state"] == "pending" and monotonic_s() < until_s:
            wait_s(0.05)
            state = self.get(f"/v1/commands/{command}")
        if state["state"] == "refused":
            raise TransitionError(str(state["message"]))
        return state


def _refusal(error: urllib.error.HTTPError) -> Exception:
    try:
        problem = msgspec.json.decode(error.read(), type=dict[str, Any])
        words = f"{problem['where']}: {problem['what']}"
    except (msgspec.DecodeError, KeyError, OSError):
        words = str(error)
    if error.code >= 500:
        return Unavailable(words)
    return _REFUSALS.get(error.code, UsageError)(words)
