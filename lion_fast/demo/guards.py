"""Middleware of the page's server: who may send requests, how large they are, and what an error tells.

A page that only this machine can reach is still reached by every web site that its user visits: a site can send
requests to it (cross-site request forgery), or give its own name this machine's address (DNS rebinding).
"""

import http
import ipaddress
import json
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_REQUEST_BYTES = 64 << 10
"""Largest request other than an upload: a question, its tags and the name of a file."""

_MULTIPART_BYTES = 64 << 10  # headers around an uploaded file


def guards(host: str, max_file_bytes: int) -> list[Middleware]:
    """Return the middleware of a server, the outermost first.

    Args:
        host: IP address that the server listens on.
        max_file_bytes: largest uploaded file.
    """
    return [
        Middleware(KnownHosts, host=host),
        Middleware(SameOrigin),
        Middleware(FetchNothing),
        Middleware(BriefErrors),
        Middleware(LimitedBodies, max_file_bytes=max_file_bytes),
    ]


class KnownHosts:
    """Rejects requests whose `Host` is not a name of this server, to which an attacker's name could be bound.

    IP addresses are no such names. A server that listens on a loopback address only accepts loopback addresses.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        self.local = ipaddress.ip_address(host).is_loopback
        machine = socket.gethostname().lower()
        self.names = {"localhost"} if self.local else {"localhost", machine, f"{machine}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope["type"] in ("http", "websocket") and not self._knows(Headers(scope=scope).get("host", ""))
        app = PlainTextResponse("This address is not one of the page's.", status_code=400) if refused else self.app
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
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (
        f"{scheme}://{headers.get('host', '').lower()}" for scheme in ("http", "https")
    ):
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


class BriefErrors:
    """Replaces the body of an error by the phrase of its status: Gradio's may quote the request and name folders."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def send_brief(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                replaced = True
                status = message["status"]
                body = json.dumps({"detail": http.HTTPStatus(status).phrase}).encode()
                headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
                await send({**message, "headers": headers})
                await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
            elif not replaced:
                await send(message)

        await self.app(scope, receive, send_brief if scope["type"] == "http" else send)
