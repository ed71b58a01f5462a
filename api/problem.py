"""A refusal that the API answers with."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import HTTPException


class Problem(HTTPException):
    """A refusal as RFC 9457 has it: `error` is a code, `where` the part of the request, `what` says what to do."""

    def __init__(self, status: int, error: str, where: str, what: str, **headers: str) -> None:
        super().__init__(status, what, headers)
        self.error = error
        self.where = where

    def body(self) -> dict[str, Any]:
        """Return the `application/problem+json` object."""
        return {
            "type": f"urn:citybrain:problem:{self.error}",
            "title": HTTPStatus(self.status_code).phrase,
            "status": self.status_code,
            "detail": self.detail,
            "error": self.error,
            "where": self.where,
            "what": self.detail,
        }
