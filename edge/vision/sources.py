"""Where a picture comes from (an RTSP stream, a device, a file), and why it does not, as far as that can be known."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import quote, urlsplit

PROBE_S = 2.0
RTSP_PORT = 554
ANSWERS = {
    "401": "it wants a user and a password",
    "403": "it refuses",
    "404": "it has no stream of that path",
    "453": "it has no bandwidth left: too many look at it",
    "503": "it is busy: too many look at it",
}


def is_file(url: str) -> bool:
    """Return whether a source is a file, which ends.

    >>> is_file("/srv/clip.mp4"), is_file("/dev/video0"), is_file("rtsp://10.0.0.7/1")
    (True, False, False)
    """
    return "://" not in url and not url.startswith("/dev/")


def with_credentials(url: str, credentials: str) -> str:
    """Return a stream's address with `user:password` in it; raises ValueError.

    >>> with_credentials("rtsp://10.0.0.7:554/1", "viewer:p@ss")
    'rtsp://viewer:p%40ss@10.0.0.7:554/1'
    """
    user, colon, password = credentials.strip().partition(":")
    if not user or not colon:
        raise ValueError("expected one line, `user:password`")
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{rest}"


def why_not(url: str, *, known: bool = False) -> str:
    """Return why nothing comes from a source (given without credentials); known: some were given."""
    if "://" in url:
        return _why_no_stream(url, known)
    path = Path(url)
    if not path.exists():
        return "it is not there"
    if not os.access(path, os.R_OK):
        return "it may not be read"
    return "it gives no picture: it is no video, or another program has it"


def _why_no_stream(url: str, known: bool) -> str:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or RTSP_PORT
    ask = f"DESCRIBE {url} RTSP/1.0\r\nCSeq: 1\r\nAccept: application/sdp\r\n\r\n"
    try:
        with socket.create_connection((host, port), PROBE_S) as connected:
            connected.settimeout(PROBE_S)
            connected.sendall(ask.encode())
            line = connected.recv(256).split(b"\r\n")[0].decode("latin-1")
    except TimeoutError:
        return f"{host}:{port} does not answer"
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    fields = line.split()
    code = fields[1] if len(fields) > 1 and fields[0].startswith("RTSP/") else ""
    if code == "401" and known:
        return "it refuses the user or the password"
    if code == "200":
        return "it describes the stream, but gives no picture"
    return ANSWERS.get(code, f"it answers {line[:60]!r}" if line else "it closes the connection: no RTSP there?")
