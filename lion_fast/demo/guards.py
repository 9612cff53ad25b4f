"""Middleware of the page's server: who may send which requests, how large they are, and what an error tells.

A page that only this machine can reach is still reached by every web site that its user visits: a site can send
requests to it (cross-site request forgery), or give its own name this machine's address (DNS rebinding).
"""

import errno
import http
import ipaddress
import json
import logging
import socket
import traceback
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 10
"""Largest request other than an upload: a question, its tags and the name of a file."""

_MULTIPART_BYTES = 64 << 10  # headers around an uploaded file

# What the page requests, of all that Gradio serves: much of the rest fails on odd requests, or writes files.
_API = "/gradio_api"
_GET = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
_GET_API = ("queue/data", "upload_progress", "startup-events", "app_id")
_GET_BELOW = ("/assets/", "/static/", "/svelte/", f"{_API}/file=", f"{_API}/heartbeat/")
_UPLOAD, _JOIN = f"{_API}/upload", f"{_API}/queue/join"


def guards(host: str, max_file_bytes: int, uploads: Path) -> list[Middleware]:
    """Return the middleware of a server, the outermost first.

    Args:
        host: IP address that the server listens on.
        max_file_bytes: largest uploaded file.
        uploads: folder in which Gradio stores uploads, each in a folder of its own.
    """
    return [
        Middleware(KnownHosts, host=host),
        Middleware(SameOrigin),
        Middleware(FetchNothing),
        Middleware(BriefErrors),
        Middleware(LimitedBodies, max_file_bytes=max_file_bytes),
        Middleware(KnownPaths),
        Middleware(WholeUploads, folder=uploads),
    ]


class KnownHosts:
    """Rejects requests whose `Host` is not a name of this server, to which an attacker's name could be bound.

    IP addresses are no such names. A server that listens on a loopback address only accepts loopback addresses. The
    names that a request says it was forwarded from are dropped, because Gradio would build the page's links from them.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        self.local = ipaddress.ip_address(host).is_loopback
        machine = socket.gethostname().lower()
        self.names = {"localhost"} if self.local else {"localhost", machine, f"{machine}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope["type"] in ("http", "websocket") and not self._knows(Headers(scope=scope).get("host", ""))
        app = PlainTextResponse("This address is not one of the page's.", status_code=400) if refused else self.app
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if not name.startswith(b"x-forwarded-")]
            scope = {**scope, "headers": kept}
        await app(scope, receive, send)

    def _knows(self, header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        try:
            return ipaddress.ip_address(name).is_loopback or not self.local
        except ValueError:
            return name in self.names


class SameOrigin:
    """Rejects requests that a browser sends for the page of another origin; a link to the page works from anywhere."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope["type"] in ("http", "websocket") and _is_foreign(scope)
        app = PlainTextResponse("Requests from other sites are not accepted.", status_code=403) if refused else self.app
        await app(scope, receive, send)


def _is_foreign(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    own = [f"{scheme}://{headers.get('host', '').lower()}" for scheme in ("http", "https")]
    if any(origin.lower() not in own for origin in headers.getlist("origin")):
        return True
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    follows_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return not (follows_link and scope.get("method") == "GET" and scope["path"] == "/")


class FetchNothing:
    """Rejects `file=http://...`, for which Gradio would fetch and return any public address."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fetches = scope["type"] == "http" and any(
            f"={scheme}://" in scope["path"].lower() for scheme in ("http", "https")
        )
        app = PlainTextResponse("This page fetches nothing.", status_code=403) if fetches else self.app
        await app(scope, receive, send)


class LimitedBodies:
    """Limits the body of an upload to a file and that of any other request to `MAX_REQUEST_BYTES`."""

    def __init__(self, app: ASGIApp, max_file_bytes: int):
        self.uploads = RequestBodyLimitMiddleware(app, max_file_bytes + _MULTIPART_BYTES)
        self.others = RequestBodyLimitMiddleware(app, MAX_REQUEST_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        await (self.uploads if is_upload else self.others)(scope, receive, send)


class KnownPaths:
    """Rejects requests that the page does not send, by path and method."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            if method not in ("GET", "HEAD", "POST") or (method == "POST" and path not in (_UPLOAD, _JOIN)):
                app = PlainTextResponse("Not a request of the page.", 405, {"Allow": "GET, HEAD"})
            elif method != "POST" and not _is_read(path):
                app = PlainTextResponse("Not a part of the page.", 404)
        elif scope["type"] == "websocket":
            app = PlainTextResponse("The page uses no web sockets.", 403)
        await app(scope, receive, send)


def _is_read(path: str) -> bool:
    return path in _GET or path in [f"{_API}/{name}" for name in _GET_API] or path.startswith(_GET_BELOW)


class WholeUploads:
    """Removes what uploads that failed or that broke off have left, when no upload is in progress."""

    def __init__(self, app: ASGIApp, folder: Path):
        self.app, self.folder = app, folder
        self._in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _UPLOAD:
            await self.app(scope, receive, send)
            return
        self._in_progress += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_progress -= 1
            if not self._in_progress:
                for left in self.folder.iterdir():
                    if left.is_file():  # whole ones are in folders
                        left.unlink(missing_ok=True)


class BriefErrors:
    """Replaces the body of an error by the phrase of its status: Gradio's may quote the request and name folders.

    On a malformed request, Gradio raises exceptions of any class: they are errors of the request, and logged without
    its content. Those of the system are the server's.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = replaced = False

        async def send_brief(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                started = replaced = True
                await self._send_error(message, scope, send)
            elif not replaced:
                started = True
                await send(message)

        try:
            await self.app(scope, receive, send_brief)
        except ClientDisconnect:
            pass  # nobody waits for an answer
        except Exception as error:
            if started and isinstance(error.__cause__, HTTPException):  # it was handled, as far as it can be by then
                await send({"type": "http.response.body", "body": b""})
                return
            if started:
                raise
            ours = isinstance(error, OSError | MemoryError) and getattr(error, "errno", None) != errno.ENAMETOOLONG
            if ours:
                logger.exception("a request to the page failed")
            else:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(frame.filename).name}, line {frame.lineno}"
                logger.warning("a request to the page was not understood: %s in %s", type(error).__name__, place)
            await self._send_error({"type": "http.response.start", "status": 500 if ours else 400}, scope, send)

    async def _send_error(self, start: Message, scope: Scope, send: Send) -> None:
        body = json.dumps({"detail": http.HTTPStatus(start["status"]).phrase}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(name, value) for name, value in start.get("headers", ()) if name.lower() == b"allow"]
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
