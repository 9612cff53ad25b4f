"""Requests to the demo's server, sent over its socket: headers, paths, bodies, uploads, events and broken connections.

A request is answered with a status below 500. The body of an error is one short line without inner messages or the
machine's paths, and the log gets no traceback and nothing of a body. Afterwards the server answers as before, and no
other file than an accepted upload is left.
"""

import base64
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import images
from tests.campaign.mutating import VALUES, mutate_bytes, mutate_json
from tests.campaign.page_server import (
    INNER,
    SECRET,
    Exchange,
    Request,
    exchanged,
    expect_brief,
    expect_good,
    expect_quiet,
    images_file,
    multipart,
    page,
    quiet,
)
from tests.campaign.running import Trial


def make(rng: random.Random, folder: Path) -> Trial:
    page()
    kinds: list[Callable[[random.Random], Trial]] = [
        headers,
        headers,
        paths,
        bodies,
        bodies,
        connections,
        uploads,
        events,
    ]
    return rng.choice(kinds)(rng)


def trial(description: str, request: Request, check: Callable[[Exchange], None] | None = None) -> Trial:
    def checked(exchange: Exchange) -> None:
        expect_good(exchange)
        if check is not None:
            check(exchange)

    return Trial(f"{description}: {request.sent()[:300]!r}", lambda: exchanged(request), (), checked, refusals=())


def headers(rng: random.Random) -> Trial:
    """A valid request with one header that is missing, repeated or odd."""
    served = page()
    host = served.host
    base = rng.choice(["config", "upload", "join"])
    if base == "config":
        request = Request("GET", "/config", served.headers())
    elif base == "upload":
        request = served.post(*multipart([("files", "a.png", images_file())]))
    else:
        body = {"data": ["answer"], "fn_index": served.functions["lambda"], "session_hash": "h"}
        request = served.post("/gradio_api/queue/join", json.dumps(body).encode())
    size = len(request.body)
    huge = "x" * rng.choice([100, 9000, 70000])
    known: list[tuple[str, list[Any], tuple[int, ...]]] = [
        ("Host", [f"LOCALHOST:{served.port}", "[::1]", f"localhost:{served.port}", "127.1.2.3"], (200,)),
        ("Host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "0.0.0.0", "10.0.0.1", "2130706433",
                  "[::1", "[::ffff:8.8.8.8]", "127.0.0.1@evil.example", "evil.example#127.0.0.1",
                  "evil.example:127.0.0.1", "\u2024", "localhost,evil.example", "a" * 5000], (400, 431)),
        ("Origin", [f"http://{host}"], (200,)),
        ("Origin", ["null", "http://evil.example", f"http://{host}.evil", f"http://{host}@evil.example", "file://",
                    f"ftp://{host}", "", "*", f"http://{host}, http://evil.example", f"http://{host}/"], (403,)),
        ("Sec-Fetch-Site", ["cross-site", "same-site", "CROSS-SITE", "x"], (403,)),
        ("Sec-Fetch-Site", ["same-origin", "none"], (200,)),
        ("Referer", ["http://evil.example", "", huge[:9000], "\u00fc", "file:///etc/passwd"], (200, 400, 431)),
        ("Cookie", ["a=b", "access-token-x=" + SECRET, "a" * 5000, ";;;=", "\u2603"], (200, 400, 431)),
        ("X-Forwarded-Host", ["evil.example", "", "a b", "[::1", "x" * 3000, "evil.example, a"], ()),
        ("X-Forwarded-Proto", ["https", "javascript", "", "x, y"], ()),
        ("X-Forwarded-Prefix", ["/evil", "//evil.example", ""], ()),
        ("X-Gradio-Server", ["http://evil.example", ""], ()),
        ("X-Direct-Url", ["http://evil.example"], ()),
        ("X-Gradio-User", ["app", SECRET], ()),
        ("Forwarded", ["for=1.1.1.1;host=evil"], ()),
        ("Accept", ["", "*/*;q=2", "x" * 200, "application/json, \0"], ()),
        ("Accept-Encoding", ["br", "gzip;q=0", "zstd", "x" * 100, "identity"], ()),
        ("Range", ["bytes=0-1", "bytes=5-2", "bytes=-", "bytes=0-0,3-4", "bytes=1-2-3", "x"], ()),
        ("If-None-Match", ["*", '"x"', "x" * 100], ()),
        ("Upgrade", ["websocket", "h2c"], ()),
        ("Expect", ["100-continue", "x"], ()),
        ("Transfer-Encoding", ["chunked", "gzip", "identity", "chunked, chunked", "Chunked"], ()),
        ("Content-Length", ["-1", "0", "+5", "1e3", "0x10", str(10**30), "abc", "", "5, 5", str(size + 100),
                            "\u0665", str(max(0, size - 3)), " 5"], ()),
        ("Content-Type", ["", "application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary=",
                          "multipart/form-data; boundary=" + "x" * 300, "application/json; charset=utf-16",
                          "application/json; charset=nothing", "multipart/form-data; boundary=\"", "MULTIPART/FORM-DATA"
                          "; boundary=b0undary", "multipart/form-data; boundary=b0undary; charset=utf-7", "a/b; " * 50,
                          "multipart/form-data; charset=\u2603; boundary=b0undary", "application/x-www-form-urlencoded",
                          ], ()),
        (huge[:200], ["x"], ()),
        ("X-Long", [huge], ()),
        ("X Space", ["x"], ()),
        ("X-Nul", ["a\0b", b"\xff\xfe", "a\rb", "a\n b"], ()),
        ("", ["x"], ()),
    ]  # fmt: skip
    name, values, expected = rng.choice(known)
    value = rng.choice(values)
    others = [(header, text) for header, text in request.headers if header.lower() != name.lower()]
    how = rng.choice(["set", "set", "set", "twice", "missing"])
    if name in ("Host", "Origin", "Sec-Fetch-Site") and how != "missing":
        how = "set"
    if how == "missing":
        request.headers, expected = others, ()
        if name == "Connection" or len(others) == len(request.headers):
            expected = ()
    elif how == "twice":
        request.headers.append((name, value))
        expected = ()
    else:
        request.headers = [*others, (_recased(rng, name), value)]
    if name == "X-Long" and how != "missing":
        expected = ()
    # h11 takes other lengths for a request that is not complete, or for two.
    given = [text for header, text in request.headers if header.lower() in ("content-length", "transfer-encoding")]
    if name in ("Content-Length", "Transfer-Encoding") or (not given and request.body):
        request.complete = False
    if base != "config" and name in ("Upgrade", "Expect") and how != "missing":
        request.complete = False
    if name == "Host" and how == "missing":
        expected = (400,)
    request.expected = expected
    return trial(f"{base}, {name[:20]} {how} {value!r:.60}", request)


def _recased(rng: random.Random, name: str) -> str:
    return rng.choice([name, name, name.lower(), name.upper(), name.swapcase()])


PATHS = (
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/assets/", "/static/", "/svelte/",
    "/login", "/logout", "/monitoring", "/monitoring/summary", "/monitoring/x", "/pwa_icon", "/pwa_icon/512", "/docs",
    "/pwa_icon/1000000000", "/pwa_icon/-1", "/openapi.json", "/redoc", "/gradio_api/info", "/gradio_api/openapi.json",
    "/gradio_api/app_id", "/gradio_api/token", "/gradio_api/user", "/gradio_api/login_check",
    "/gradio_api/dev/reload", "/gradio_api/deep_link?session_hash=x", "/gradio_api/runs",
    "/gradio_api/run-history/buckets", "/gradio_api/vibe-code",
    "/gradio_api/custom_component/x/client/component/style.css", "/gradio_api/custom_component/x/y/z/a",
    "/gradio_api/proxy=http://example.org/", "/gradio_api/proxy=https://x.hf.space/",
    "/gradio_api/proxy=file:///etc/", "/gradio_api/stream/a/b/1/playlist.m3u8", "/gradio_api/stream/a/b/c/1.ts",
    "/gradio_api/stream/a/b/1/2.exe", "/gradio_api/stream/x", "/gradio_api/reset", "/gradio_api/cancel",
    "/gradio_api/queue/status", "/gradio_api/queue/data?session_hash=none", "/gradio_api/queue/data",
    "/gradio_api/call/ask/x", "/gradio_api/call/ask", "/gradio_api/call/v2/ask", "/gradio_api/call/v2/none",
    "/gradio_api/run/ask", "/gradio_api/run/lambda", "/gradio_api/api/ask", "/gradio_api/run/",
    "/gradio_api/component_server", "/gradio_api/process_recording", "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=", "/gradio_api/file/etc/passwd", "/gradio_api/file=http://x/", "/gradio_api/upload",
    "/gradio_api/queue/join", "/gradio_api/startup-events", "/mcp", "/gradio_api/mcp/sse", "/?deep_link=",
    "/config?deep_link=x", "/config?page=x", "/?__theme=x", "/?view=api", "/__sign", "/.git/config", "/nothing",
)  # fmt: skip
PIECES = (
    "../", "..%2f", "%2e%2e/", "%252e%252e%252f", "..\\", "..%5c", "%c0%ae%c0%ae/", "/etc/passwd", "%00",
    "%0d%0aX-A: b", "~", "~root/", "$HOME", "file:///etc/passwd", "http://example.org/", "HTTPS://example.org",
    "//example.org/", "%ff", "\u2603", "%E2%98%83", "x" * 300, "x" * 5000, "?", "?a=%", "#x", ";a=b", "%", "%zz",
    "{}", "C:\\", "\\\\host\\share", ".", "proc/self/environ", "README.md", "pyproject.toml", "dev/zero", "//", "/./",
    " ", "\t", "con", "nul.png",
)  # fmt: skip


def paths(rng: random.Random) -> Trial:
    """A path of Gradio's, of the page or of nobody, with traversals and encodings, by any method."""
    path = rng.choice(PATHS)
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        path += rng.choice(PIECES)
    if rng.random() < 0.1:
        path = rng.choice(
            [path.upper(), path.lstrip("/"), f"http://evil.example{path}", f"//evil.example{path}", "*", ""]
        )
    method = rng.choice(
        ["GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get", "X" * 40]
    )
    body = rng.choice([b"", b"{}", b"[]", b"null", json.dumps({"session_hash": SECRET, "event_id": SECRET}).encode()])
    if method in ("GET", "HEAD"):
        body = b""
    request = page().post(path, body)
    request.method = method
    if "/upload" in path or "queue/data" in path or "heartbeat" in path:
        request.complete = False  # they may wait
    return trial(f"{method} {path[:80]}", request, _expect_no_file)


def _expect_no_file(done: Exchange) -> None:
    for _, body in done.replies:
        found = [
            text for text in (b"root:x:0", b"PATH=", b"[project]", b"# lion-fast", b"repositoryformat") if text in body
        ]
        assert not found, f"a file with {found}"


def bodies(rng: random.Random) -> Trial:
    """JSON for a path that takes it, with changes in its structure or bytes, or of another kind."""
    served = page()
    path, valid = rng.choice(
        [
            ("/gradio_api/queue/join", served.functions["ask"]),
            ("/gradio_api/queue/join", served.functions["receive"]),
            ("/gradio_api/run/lambda", served.functions["lambda"]),
            ("/gradio_api/component_server", 1),
            ("/gradio_api/cancel", 1),
            ("/gradio_api/reset", 1),
            ("/gradio_api/call/ask", 1),
            ("/gradio_api/call/v2/ask", 1),
            ("/login", 1),
        ]
    )
    value = {
        "data": [{"path": served.image, "meta": {"_type": "gradio.FileData"}}, "", "caption", "", "automatic"],
        "fn_index": valid,
        "session_hash": f"{rng.choice(['s', SECRET])}{rng.randrange(10**9)}",
        "event_data": None,
        "trigger_id": 3,
    }
    if rng.random() < 0.7:
        body = mutate_json(value, rng, rng.choice([1, 1, 2, 4])).encode("utf-8", "surrogatepass")
    else:
        body = mutate_bytes(json.dumps(value).encode(), rng)
    if rng.random() < 0.1:
        body += SECRET.encode() * rng.choice([100, 9000])
    return trial(f"{path}, a body of {len(body)} bytes", served.post(path, body))


def connections(rng: random.Random) -> Trial:
    """What is not one complete request: garbage, a part, several at once, or chunks."""
    served = page()
    good = Request("GET", "/config", [("Host", served.host)]).sent()
    last = Request("GET", "/theme.css", served.headers()).sent()
    whole = served.post(*multipart([("files", "a.png", images_file())])).sent()
    joining = served.post("/gradio_api/queue/join", b'{"data": [' + b"1," * 900 + b"1]}").sent()
    cut = rng.choice([whole, joining])
    cut = cut[: rng.randrange(1, len(cut))]
    chunked = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {served.host}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    kind, raw, complete = rng.choice(
        [
            ("garbage", rng.randbytes(rng.choice([1, 100, 100000])), False),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300), False),
            ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(20), False),
            ("HTTP/0.9", b"GET /\r\n", False),
            ("HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n", True),
            ("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", False),
            ("a part", cut, False),
            ("a part of an upload", whole[: -rng.randrange(1, 60)], False),
            ("pipelined", good * rng.choice([1, 5]) + last, True),
            ("pipelined after an upload", whole.replace(b"Connection: close\r\n", b"") + last, True),
            ("chunks", chunked + b"5\r\nabcde\r\n0\r\n\r\n", False),
            (
                "odd chunks",
                chunked + rng.choice([b"zz\r\n", b"-5\r\n", b"ffffffffffffffff\r\n", b"5;x=y\r\nab"]),
                False,
            ),
            ("endless headers", good[:-2] + b"A: b\r\n" * 20000, False),
            ("an endless line", b"GET /" + b"a" * 200000, False),
            ("bare line feeds", good.replace(b"\r\n", b"\n"), False),
            ("folded headers", b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\r\n c\r\n\r\n", False),
            ("mutated", mutate_bytes(rng.choice([whole, joining, good]), rng), False),
        ]
    )
    request = Request("GET", "raw", [], expected=(), complete=complete, raw=raw)
    return trial(f"{kind} of {len(raw)} bytes", request)


NAMES = (
    "a.png", "", ".", "..", "../../a.png", "..\\a.png", "/etc/passwd", "a" * 300 + ".png", "\u2603.png", "a\0.png",
    "a\nb.png", "\u202egnp.exe", "con", "a.html", "a.svg", "a.png.", " ", "a;b.png", "a'b.png", "%2e%2e%2fa.png", "~",
    ".hidden", "a.tar.gz", "\ud83d\ude00" * 80 + ".png", "a" * 255, "state.json", "\x85", "a/b/c.png", "C:\\a.png",
    "\ud800.png",
)  # fmt: skip


def uploads(rng: random.Random) -> Trial:
    """An upload in an odd form; one that is accepted is then an image of any kind to the page."""
    served = page()
    choice = rng.randrange(4)
    if choice == 0:
        names = [
            rng.choice(["files", "files", "file", "", "x" * 500, "files[]"]) for _ in range(rng.choice([0, 1, 2, 30]))
        ]
        parts = [(name, rng.choice(NAMES), images_file()) for name in names]
        disposition = rng.choice(["form-data", "attachment", "", "form-data; filename*=UTF-8''x"])
        return trial("parts", served.post(*multipart(parts, rng.choice(["b0undary", "-", "x" * 70]), disposition)))
    if choice == 1:
        path, body, kind = multipart([("files", "a.png", images_file())])
        body = rng.choice(
            [
                body.replace(b'; filename="a.png"', b""),
                body.replace(b'name="files"', b"name"),
                body.replace(b"Content-Disposition", b"X"),
                body.replace(b"form-data", b"x" * 9000),
                body.replace(b"\r\n\r\n", b"\r\n", 1),
                body[:-8],
                body.replace(b"--b0undary--", b""),
                mutate_bytes(body, rng),
                b'{"files": ["' + base64.b64encode(images_file()) + b'"]}',
            ]
        )
        identifier = rng.choice(
            ["", "?upload_id=a", "?upload_id=a&upload_id=b", "?upload_id=" + SECRET, "?upload_id=%00"]
        )
        return trial(f"a body, {identifier}", served.post(path + identifier, body, kind))
    if choice == 2:
        _, mode, content = rng.choice(images._files())
        changes, content = images._mutated(rng, content)
        what = f"an image {mode} {changes}"
    else:
        what, content = _odd_image(rng)
    name = rng.choice(["a.png", "a.png", *NAMES[1:3], "\u2603.png", "a.html"])

    def call() -> tuple[dict[str, Any], dict[str, Any], str, str]:
        with quiet() as log:
            (path,) = served.upload(content, name)
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            received = served.event("receive", [file])["output"]
            asked = served.event("ask", [received["data"][0] if _is_file(received) else file, *REQUEST])["output"]
            again = served.ask()
        return received, asked, log[0], again

    return Trial(f"{what} as {name!r:.30}", call, (), _expect_answers, refusals=())


REQUEST = ("", "caption", "", "automatic")


def _is_file(output: dict[str, Any]) -> bool:
    data: list[Any] = output.get("data") or [None]
    return isinstance(data[0], dict) and "path" in data[0]


def _expect_answers(result: tuple[dict[str, Any], dict[str, Any], str, str]) -> None:
    *outputs, log, again = result
    for output in outputs:
        assert "error" not in output, output["error"]
        notice = str(output["data"][-1]) + str(output["data"][0] if 'role="alert"' in str(output["data"][0]) else "")
        assert "\n" not in notice, notice
        found = [part for part in (*INNER[:4], SECRET) if part in notice]
        assert not found, f"{found} in {notice[:300]}"
        assert len(notice) < 1000, notice[:300]
    expect_quiet(log)
    assert again == page().answer, f"the valid request: {again!r}, not {page().answer!r}"


def _odd_image(rng: random.Random) -> tuple[str, bytes]:
    from PIL import Image

    kind = rng.choice(["bomb", "16 bits", "CMYK", "animation", "TIFF", "text", "wide", "1 bit", "profile"])
    file = io.BytesIO()
    if kind == "bomb":
        Image.new("1", (30000, 30000)).save(file, "PNG")
    elif kind == "16 bits":
        Image.new("I;16", (30, 20), rng.randrange(65536)).save(file, rng.choice(["PNG", "TIFF"]))
    elif kind == "CMYK":
        Image.new("CMYK", (30, 20), (9, 99, 9, 9)).save(
            file, rng.choice(["JPEG", "TIFF"]), icc_profile=rng.randbytes(300)
        )
    elif kind == "animation":
        frames = [Image.new("P", (30, 20), color) for color in range(40)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=0)
    elif kind == "TIFF":
        Image.new(rng.choice(["F", "LAB", "1", "RGBA"]), (30, 20)).save(file, "TIFF", description=SECRET + "<script>")
    elif kind == "text":
        file.write(rng.choice([b"", b"<svg xmlns='x'><script/></svg>", b"%PDF-1.4", b"GIF89a", SECRET.encode() * 99]))
    elif kind == "wide":
        Image.new("1", (rng.choice([131073, 65000]), 1)).save(file, "PNG")
    elif kind == "1 bit":
        Image.new("1", (2000, 2000)).save(file, rng.choice(["PNG", "TIFF"]))
    else:
        Image.new("RGB", (30, 20)).save(
            file, rng.choice(["PNG", "JPEG", "WEBP"]), icc_profile=rng.randbytes(9), exif=b"Exif\0\0MM"
        )
    return kind, file.getvalue()


def events(rng: random.Random) -> Trial:
    """A call of one of the page's functions, with values that the page does not send."""
    served = page()
    file = {"path": served.image, "meta": {"_type": "gradio.FileData"}}
    valid: dict[str, list[Any]] = {
        "ask": [file, "", "caption", "", "automatic"],
        "receive": [file],
        "lambda": ["answer"],
    }
    name = rng.choice(["ask", "ask", "receive", "lambda"])
    data = valid[name]
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(data))
        value = rng.choice(
            [*(other for other in VALUES if not str(other).startswith("\x1araw")), *FILES, [file, file], file]
        )
        if isinstance(value, int | float) and abs(value) > 1e300:
            value = 10**30
        data[at] = {**file, rng.choice(list(FIELDS)): rng.choice(FIELD_VALUES)} if rng.random() < 0.4 else value
    if rng.random() < 0.2:
        data = rng.choice([[], data[:-1], [*data, "x"], data * 100])
    session = f"s{time.monotonic_ns()}"
    body = {"data": data, "fn_index": served.functions[name], "session_hash": session}
    request = served.post("/gradio_api/queue/join", json.dumps(body).encode("utf-8", "surrogatepass"))

    def call() -> tuple[dict[str, Any] | None, Exchange, str]:
        done = exchanged(request)
        with quiet() as log:
            output = served.completed(session)["output"] if done.replies and done.replies[0][0] == 200 else None
            again = served.ask()
        done.log += log[0]
        return output, done, again

    def check(result: tuple[dict[str, Any] | None, Exchange, str]) -> None:
        output, done, again = result
        done.left = []
        expect_good(done)
        assert again == served.answer, f"the valid request: {again!r}, not {served.answer!r}"
        if output is None:
            return
        told = json.dumps(output.get("error")) if "error" in output else str(output["data"][0])
        if 'role="alert"' in told or "error" in output:
            assert "that its log explains" not in told, told
            expect_brief(told)

    return Trial(f"{name}{data!r:.300}", call, (), check, refusals=())


FIELDS = ("path", "url", "size", "orig_name", "mime_type", "is_stream", "meta", "is_file")
FIELD_VALUES: tuple[Any, ...] = (
    None, "", "/etc/passwd", "README.md", "../" * 9 + "etc/passwd", "http://127.0.0.1:1/",
    "https://example.org/a.png", -1, True, 1e300, [], {}, {"_type": "gradio.FileData"}, {"_type": "x"},
    "data:image/png;base64,eA==", "file:///etc/passwd", "\0", "x" * 5000, "/", ".", "/dev/zero", "/proc/self/environ",
    SECRET, 5,
)  # fmt: skip
FILES: tuple[Any, ...] = (
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"url": "http://127.0.0.1:1/a.png"},
    {"path": "x", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update", "value": SECRET},
    "data:image/png;base64,iVBORw0KGgo=",
    "caption",
    "place",
    "answer",
    "poem",
    "region_level",
    "[0.1,0.2,0.3,0.4]",
    "x" * 499,
    "\u2603" * 499,
    "a," * 900,
    "</s><pad><extra_id_0>",
    "\ud800",
)
