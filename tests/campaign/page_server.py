"""A server of the demo's page, requests over its socket, and what a good reply to one is."""

import atexit
import http.client
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.lion_fast.processes import free_port
from tests.lion_fast.tiny import make_answerer

SECRET = "SECRETWORD"
INNER = ("Traceback", "lion-fast-demo-", "site-packages", str(Path.cwd()), "Error:", "Errno", "object at 0x")
LOG = 1000  # characters that one request may add
PATIENCE = 10.0  # seconds for a reply
PARTIAL = 0.05  # seconds until a connection with an incomplete request is closed
Headers = list[tuple[str, str | bytes]]


@dataclass
class Request:
    """One HTTP request, as it is sent.

    Args:
        expected: statuses that are right; empty for any below 500.
        complete: whether the server can see the request's end, and so has to reply.
    """

    method: str
    path: str
    headers: Headers
    body: bytes = b""
    expected: tuple[int, ...] = ()
    complete: bool = True
    raw: bytes | None = None

    def sent(self) -> bytes:
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.path} HTTP/1.1".encode("utf-8", "surrogatepass")]
        lines += [
            name.encode("latin-1", "replace") + b": " + (text if isinstance(text, bytes) else text.encode("utf-8"))
            for name, text in self.headers
        ]
        return b"\r\n".join([*lines, b"", self.body])


@dataclass
class Exchange:
    """What came back.

    Args:
        replies: status and body of each reply.
        left: files that are there afterwards and were not before.
        again: why the server does not answer as before, if so.
    """

    request: Request
    replies: list[tuple[int, bytes]] = field(default_factory=list)
    log: str = ""
    left: list[str] = field(default_factory=list)
    again: str = ""


class Page:
    """The page of a small model, and what it answers."""

    def __init__(self) -> None:
        from lion_fast.demo.server import serving

        self.root = Path(tempfile.mkdtemp(prefix="page-campaign-"))
        tempfile.tempdir = str(self.root)
        self.port = free_port()
        self.serving = serving(make_answerer(), "a model", port=self.port)  # it ends when it is freed
        self.serving.__enter__()
        atexit.register(shutil.rmtree, self.root, ignore_errors=True)
        self.host = f"127.0.0.1:{self.port}"
        self.config = self.get("/config")
        dependencies = json.loads(self.config)["dependencies"]
        self.functions = {one["api_name"]: one["id"] for one in dependencies}
        (self.image,) = self.upload(images_file())
        self.answer = self.ask()

    def get(self, path: str) -> bytes:
        status, body = self.send(Request("GET", path, self.headers()))[0]
        assert status == 200, f"{path}: {status}"
        return body

    def headers(self, *more: tuple[str, str]) -> Headers:
        return [("Host", self.host), ("Connection", "close"), *more]

    def post(self, path: str, body: bytes, kind: str = "application/json") -> Request:
        length = ("Content-Length", str(len(body)))
        return Request("POST", path, self.headers(("Content-Type", kind), length), body)

    def send(self, request: Request) -> list[tuple[int, bytes]]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has already refused the request
                connection.sendall(request.sent())
            if not request.complete:
                connection.settimeout(PARTIAL)
            return list(_replies(connection, request))

    def upload(self, content: bytes, name: str = "a.png") -> list[str]:
        ((status, body),) = self.send(self.post(*multipart([("files", name, content)])))
        assert status == 200, (status, body)
        return json.loads(body)

    def event(self, function: str, data: Any) -> dict[str, Any]:
        """Call a function of the page as a browser does."""
        session = f"s{time.monotonic_ns()}"
        body = {"data": data, "fn_index": self.functions[function], "session_hash": session}
        status, reply = self.send(self.post("/gradio_api/queue/join", json.dumps(body).encode()))[0]
        assert status == 200, (status, reply)
        return self.completed(session)

    def completed(self, session: str) -> dict[str, Any]:
        (_, stream), *_ = self.send(Request("GET", f"/gradio_api/queue/data?session_hash={session}", self.headers()))
        events = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]
        return next(event for event in events if event["msg"] == "process_completed")

    def ask(self) -> str:
        file = {"path": self.image, "meta": {"_type": "gradio.FileData"}}
        output = self.event("ask", [file, "", "caption", "", "automatic"])["output"]
        return output["data"][0].partition(" seconds")[0].rpartition("<p")[0]  # without the time

    def files(self) -> set[str]:
        return {
            str(Path(folder, name).relative_to(self.root)) for folder, _, names in os.walk(self.root) for name in names
        }


@cache
def page() -> Page:
    with quiet():
        return Page()


def exchanged(request: Request) -> Exchange:
    served, done = page(), Exchange(request)
    before = served.files()
    with quiet() as log:
        done.replies = served.send(request)
        if not request.complete:
            time.sleep(PARTIAL)
        if served.get("/config") != served.config:
            done.again = "/config differs"
        done.left = sorted(served.files() - before)
    done.log = log[0]
    return done


def expect_good(done: Exchange) -> None:
    request = done.request
    assert done.replies or not request.complete, "no reply"
    for status, body in done.replies:
        assert status < 500, f"status {status}: {body[:200]!r}"
        if request.expected:
            assert status in request.expected, f"status {status}, not {request.expected}: {body[:200]!r}"
        if status >= 400:
            expect_brief(body.decode("utf-8", "replace"))
    expect_quiet(done.log)
    assert not done.again, done.again
    # What was accepted is in folders of its own; so is a file whose neighbour in the same request was refused.
    uploads = b"/upload" in request.sent()[:100]
    left = [name for name in done.left if not (uploads and name.count("/") == 2)]
    assert not left, f"left {left}"


def expect_brief(text: str) -> None:
    assert len(text) < 200, f"{len(text)} characters: {text[:200]!r}"
    assert "\n" not in text, repr(text)
    found = [part for part in (*INNER, SECRET) if part in text]
    assert not found, f"{found} in {text!r}"


def expect_quiet(log: str) -> None:
    assert "Traceback" not in log, log[-1500:]
    assert SECRET not in log, log[:300]
    assert len(log) < LOG, f"{len(log)} characters: {log[:500]}"


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Provide a list that gets what the process wrote to its output and error streams, at the end."""
    got: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield got
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            got.append(file.read().decode("utf-8", "replace"))


class _Connection(io.BufferedReader):
    """What a server sends; each reply reads its own part, and a reader for each would take the next one's too."""

    def __init__(self, connection: socket.socket):
        super().__init__(connection.makefile("rb", buffering=0))

    def makefile(self, mode: str) -> "_Connection":
        return self

    def close(self) -> None:
        """Stay open for the next reply."""


def _replies(connection: socket.socket, request: Request) -> Iterator[tuple[int, bytes]]:
    received: Any = _Connection(connection)
    while True:
        reply = http.client.HTTPResponse(received, method=request.method)
        try:
            reply.begin()
            yield reply.status, reply.read()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return
        except TimeoutError:
            assert not request.complete, f"no reply in {PATIENCE} seconds"
            return
        if reply.will_close:
            return


def images_file() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 10), (20, 40, 200)).save(file, "PNG")
    return file.getvalue()


def multipart(
    parts: list[tuple[str, str, bytes]], boundary: str = "b0undary", disposition: str = "form-data"
) -> tuple[str, bytes, str]:
    """Return path, body and content type of an upload."""
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: {disposition}; name="{name}"; filename="{file}"\r\n'.encode(
            "utf-8", "surrogatepass"
        )
        + b"Content-Type: image/png\r\n\r\n"
        + content
        + b"\r\n"
        for name, file, content in parts
    )
    return "/gradio_api/upload", body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
