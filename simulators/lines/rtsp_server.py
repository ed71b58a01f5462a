"""An RTSP camera: Debian's gst-rtsp-server, run by the system's Python, plays a video (AVI, MJPEG) in a loop.

    /usr/bin/python3 rtsp_server.py CLIP.avi PORT [user:password]

It says its port (of `PORT` 0, a free one) on a line of its own, and ends with its standard input. The system's Python
has PyGObject and ours has not, so nothing of this project is imported.
"""

import sys
import threading
from importlib import import_module
from typing import Any

PATH = "/stream"
KEY_FRAMES = 20


def pipeline(clip: str) -> str:
    """Return how a clip becomes an H.264 stream at its own pace."""
    return (
        f'( multifilesrc location="{clip}" loop=true ! avidemux ! jpegdec ! videoconvert '
        f"! x264enc tune=zerolatency speed-preset=ultrafast bitrate=2000 key-int-max={KEY_FRAMES} "
        "! rtph264pay name=pay0 pt=96 config-interval=1 )"
    )


def guard(rtsp: Any, server: Any, factory: Any, credentials: str) -> None:
    """Let in only who knows the user and the password."""
    user, _, password = credentials.partition(":")
    auth, token = rtsp.RTSPAuth(), rtsp.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    auth.add_basic(rtsp.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    permissions = rtsp.RTSPPermissions()
    for what in ("access", "construct"):
        permissions.add_permission_for_role("viewer", f"media.factory.{what}", True)
    factory.set_permissions(permissions)


def serve(clip: str, port: str, credentials: str = "") -> None:
    """Serve until standard input ends."""
    gi = import_module("gi")
    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    glib, gst, rtsp = (import_module(f"gi.repository.{name}") for name in ("GLib", "Gst", "GstRtspServer"))
    gst.init(None)
    server, factory = rtsp.RTSPServer(service=port), rtsp.RTSPMediaFactory(shared=True)
    server.set_address("127.0.0.1")
    factory.set_launch(pipeline(clip))
    if credentials:
        guard(rtsp, server, factory, credentials)
    server.get_mount_points().add_factory(PATH, factory)
    if not server.attach(None):
        sys.exit(f"port {port} is taken")
    print(server.get_bound_port(), flush=True)
    loop = glib.MainLoop()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.quit()), daemon=True).start()
    loop.run()


if __name__ == "__main__":
    serve(*sys.argv[1:])
