"""The listener for boxes: HTTPS with our server certificate, a client certificate where there is one, few routes.

The rest of the API has no authentication and stays on loopback; this one may face the boxes' network.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.app import handle_errors
from api.command import Server, listen
from api.enrolment import Throttle
from api.pki.ca import Authority
from api.routes import enrolment
from api.site import Site
from citybrain.clock import HOUR_MS, real_unix_ms
from citybrain.errors import ConfigError, Unavailable
from citybrain.storage import OS_FILES

LOOK_MS = 2_000


def create_app(site: Site, authority: Authority) -> FastAPI:
    """Return the application; nothing is started."""
    app = FastAPI(title="City brain senses: boxes", version="1", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site, app.state.authority, app.state.throttle = site, authority, Throttle()
    app.include_router(enrolment.router)
    handle_errors(app, site)
    return app


class Protocol(H11Protocol):
    """uvicorn's HTTP with the peer's certificate in the scope, DER, under `extensions.tls.client_cert`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        shown = tls.getpeercert(binary_form=True) if tls is not None else None
        app = self.app

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), "tls": {"client_cert": shown}}
            await app(scope, receive, send)

        self.app = with_peer


class Boxes(threading.Thread):
    """Serves boxes until `stop`; takes certificates that were renewed meanwhile, and tends the authority every hour."""

    def __init__(self, site: Site, authority: Authority) -> None:
        super().__init__(name="boxes", daemon=True)
        self._site = site
        self._authority = authority
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.verify_mode = ssl.CERT_OPTIONAL
        self._loaded = b""
        self._tended_ms = self._looked_ms = 0
        host, _, port = authority.setting.listen.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{authority.folder / 'ca.json'} listen", "expected IP:PORT such as 0.0.0.0:8443")
        self.look()
        self._socket = listen(host, int(port))
        config = uvicorn.Config(
            create_app(site, authority),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
            ws="none",
            http=Protocol,
            ssl_context_factory=lambda *_: self._context,
        )
        self._server = Server(config)

    def run(self) -> None:
        with self._socket:
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End, and wait for it."""
        self._server.should_exit = True
        self.join(2.0)

    def look(self) -> None:
        """Do what time asks for; called again and again. Raises ConfigError, StorageError."""
        now_ms = real_unix_ms()
        if not 0 <= now_ms - self._looked_ms < LOOK_MS:
            self._looked_ms = now_ms
            if not 0 <= now_ms - self._tended_ms < HOUR_MS:
                self._tended_ms = now_ms
                self._authority.tend()
            self._load(self._authority.folder)
        for note in self._authority.notes:
            self._site.counters.warn(note)
        self._authority.notes.clear()

    def _load(self, folder: Path) -> None:
        files = [OS_FILES.read(folder / name) for name in ("server.pem", "server.key", "trust.pem")]
        if b"".join(files) == self._loaded:
            return
        try:
            self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
            self._context.load_verify_locations(cadata=files[2].decode())
        except ssl.SSLError as error:
            raise Unavailable(f"{folder}/server.pem: cannot be served: {error}") from None
        self._loaded = b"".join(files)
