"""The listener for boxes: HTTPS with our server certificate, a client certificate where there is one, few routes.

The rest of the API has no authentication and stays on loopback; this one may face the boxes' network.
"""

from __future__ import annotations

import socket
import ssl
import threading

import uvicorn
from fastapi import FastAPI

from api.app import handle_errors
from api.door import BOUNDS, Bounds, Door, DoorServer, fitting, open_files
from api.enrolment import Throttle
from api.pki.ca import Authority
from api.routes import enrolment
from api.server import listen
from api.site import Site
from citybrain.clock import HOUR_MS, real_unix_ms
from citybrain.errors import ConfigError, Unavailable
from citybrain.storage import OS_FILES

LOOK_MS = 2_000
AGAIN_MS = 30_000  # after what could not be done
OTHER_FILES = 1024  # that the API has open beside boxes


def create_app(site: Site, authority: Authority) -> FastAPI:
    """Return the application; nothing is started."""
    app = FastAPI(title="City brain senses: boxes", version="1", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site, app.state.authority, app.state.throttle = site, authority, Throttle()
    app.include_router(enrolment.router)
    handle_errors(app, site)
    return app


class Boxes:
    """The listener, and what the authority needs done in time. Everything happens in `look`, called again and again.

    A listener that cannot be served now (a port is taken, a passphrase is missing) is tried again; the rest of the API
    goes on.
    """

    def __init__(self, site: Site, authority: Authority, bounds: Bounds = BOUNDS) -> None:
        self._site = site
        self._authority = authority
        self._bounds = bounds
        self._context: ssl.SSLContext | None = None
        self._server: DoorServer | None = None
        self._thread: threading.Thread | None = None
        self._loaded = b""
        self._looked_ms = self._tended_ms = 0

    def look(self) -> None:
        """Serve, take certificates that were renewed meanwhile, tend the authority every hour.

        Raises ConfigError, StorageError, Unavailable for what cannot be done now.
        """
        now_ms = real_unix_ms()
        if 0 <= now_ms - self._looked_ms < LOOK_MS:
            return
        self._looked_ms = now_ms + AGAIN_MS  # unless all of it can be done
        if self._thread is None or not self._thread.is_alive():
            self._start()
        if not 0 <= now_ms - self._tended_ms < HOUR_MS:
            self._authority.tend()
            self._tended_ms = now_ms
        self._load()
        self._looked_ms = now_ms
        for note in self._authority.notes:
            self._site.counters.warn(note)
        self._authority.notes.clear()

    def stop(self) -> None:
        """End, and wait for it."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(2.0)

    def _start(self) -> None:
        given = self._authority.setting.listen
        if not given:
            return
        host, _, port = given.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{self._authority.folder / 'ca.json'} listen", "expected IP:PORT such as 0.0.0.0:8443")
        context = self._load()
        taken = listen(host, int(port))
        taken.listen(self._bounds.connections)  # who waits for a place
        bounds = fitting(self._bounds, open_files(2 * self._bounds.connections + OTHER_FILES))
        config = uvicorn.Config(
            create_app(self._site, self._authority),
            loop="asyncio",
            log_level="error",  # what strangers send is counted, not logged: a log line a request would fill the disk
            access_log=False,
            timeout_graceful_shutdown=1,
            ws="none",
            server_header=False,
            headers=[("connection", "close")],  # a box asks once
            h11_max_incomplete_event_size=self._bounds.head_bytes,
        )
        self._server = DoorServer(config, Door(taken, context, self._site.counters, bounds))
        self._thread = threading.Thread(target=self._serve, args=(self._server, taken), name="boxes", daemon=True)
        self._thread.start()

    @staticmethod
    def _serve(server: DoorServer, taken: socket.socket) -> None:
        with taken:
            server.run()

    def _load(self) -> ssl.SSLContext:
        """Return the context with what the authority's files hold now; connections that are open keep theirs."""
        if self._context is None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context.verify_mode = ssl.CERT_OPTIONAL
            self._context.options |= ssl.OP_NO_RENEGOTIATION
        folder = self._authority.folder
        files = [OS_FILES.read(folder / name) for name in ("server.pem", "server.key", "trust.pem")]
        if b"".join(files) == self._loaded:
            return self._context
        try:
            self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
            self._context.load_verify_locations(cadata=files[2].decode())
        except ssl.SSLError as error:
            raise Unavailable(f"{folder}/server.pem: cannot be served: {error}") from None
        self._loaded = b"".join(files)
        return self._context
