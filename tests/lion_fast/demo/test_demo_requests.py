"""Requests to the page's server that the page itself never sends, and the server's end."""

import io
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.extras import needing
from tests.lion_fast.processes import PATIENCE, free_port, starting
from tests.lion_fast.tiny import make_answerer

pytestmark = needing("gradio", "demo")


def image_file(kind: str = "PNG", size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (20, 40, 200)).save(file, kind)
    return file.getvalue()


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def answerer() -> Any:
    return make_answerer()


@pytest.fixture(scope="module")
def address(answerer: Any) -> Iterator[str]:
    from lion_fast.demo.server import serving

    with serving(answerer, "a model") as address:
        yield address


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("[::1]:7860", 200),
        ("attacker.example", 400),
        ("127.0.0.1.attacker.example:7860", 400),
        ("192.168.1.7", 400),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_only_names_of_this_machine_are_served(address: str, host: str, status: int) -> None:
    """DNS rebinding: a site gives its own name this machine's address."""
    reply = httpx.get(f"{address}config", headers={"host": host})
    assert reply.status_code == status, reply.text


@pytest.mark.parametrize("host", ["attacker.example", "[::1", ""])
def test_a_request_cannot_say_where_it_was_forwarded_from(address: str, host: str) -> None:
    expected = httpx.get(f"{address}config")
    reply = httpx.get(f"{address}config", headers={"x-forwarded-host": host})
    assert (reply.status_code, reply.json()["root"]) == (200, expected.json()["root"])


def test_a_server_for_the_network_is_reached_by_address_or_name() -> None:
    from lion_fast.demo.guards import KnownHosts

    known: Any = KnownHosts(lambda *_: None, "0.0.0.0")  # type: ignore[arg-type]
    names = ("192.168.1.7:7860", "[fe80::1]", f"{socket.gethostname()}:7860", "localhost")
    assert all(known._knows(name) for name in names)
    assert not known._knows("attacker.example")


@pytest.mark.parametrize(
    "origin", ["http://attacker.example", "null", "http://127.0.0.1:1", "{origin}.example", "file://"]
)
def test_uploads_of_other_origins_are_refused(address: str, origin: str) -> None:
    origin = origin.format(origin=address.rstrip("/"))
    for path in ("gradio_api/upload", "gradio_api/queue/join"):
        reply = httpx.post(address + path, files={"files": ("a.png", image_file())}, headers={"origin": origin})
        assert reply.status_code == 403


@pytest.mark.parametrize(
    ("site", "mode", "destination", "path", "status"),
    [
        ("cross-site", "navigate", "document", "", 200),  # a link
        ("cross-site", "navigate", "iframe", "", 403),
        ("cross-site", "no-cors", "image", "config", 403),
        ("same-site", "cors", "empty", "config", 403),  # another port of this machine
        ("same-origin", "cors", "empty", "config", 200),
        ("none", "navigate", "document", "config", 200),
    ],
)
def test_other_sites_can_only_link_to_the_page(
    address: str, site: str, mode: str, destination: str, path: str, status: int
) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": mode, "sec-fetch-dest": destination}
    assert httpx.get(address + path, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["gradio_api/queue/join", "gradio_api/run/ask", "gradio_api/upload", "login", ""])
def test_large_bodies_are_refused(address: str, path: str) -> None:
    from lion_fast.demo.page import MAX_FILE_BYTES

    for body in (b"[" * (MAX_FILE_BYTES + (1 << 20)), iter([b"x" * (1 << 20)] * 40)):
        reply = httpx.post(address + path, content=body, headers={"content-type": "application/json"}, timeout=60)
        # Some paths refuse a request before they read a body whose length is not known.
        assert reply.status_code in ((400, 405, 413, 422) if isinstance(body, Iterator) else (413,))
    several = [("files", (f"{name}.png", bytes(MAX_FILE_BYTES * 2 // 3))) for name in "ab"]
    assert httpx.post(f"{address}gradio_api/upload", files=several).status_code == 413


@pytest.mark.parametrize(
    "body", [b'{"data": ' + b"[" * 3000, b"\xff\xfe", b"{}", b'{"data": "SECRET", "fn_index": []}']
)
def test_errors_quote_nothing(address: str, body: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    for path in ("gradio_api/queue/join", "gradio_api/run/ask", "gradio_api/component_server"):
        reply = httpx.post(address + path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code in (400, 404, 405, 422)
        assert list(reply.json()) == ["detail"]
        assert len(reply.text) < 60
    assert "SECRET" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "gradio_api/pwa_icon/1000000000", 404),
        ("GET", "pwa_icon/1000000000", 404),  # Gradio would draw an icon of this size
        ("GET", "gradio_api/proxy=x", 404),
        ("GET", "gradio_api/custom_component/x/client/a/b", 404),
        ("GET", "gradio_api/deep_link", 404),
        ("GET", f"assets/{'x' * 3000}", 400),
        ("POST", "gradio_api/process_recording", 405),
        ("POST", "gradio_api/call/v2/none", 405),
        ("POST", "gradio_api/run/predict", 405),
        ("OPTIONS", "config", 405),
    ],
)
def test_only_what_the_page_requests_is_served(address: str, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, address + path, json={} if method == "POST" else None)
    assert (reply.status_code, list(reply.json())) == (status, ["detail"])


def test_malformed_requests_are_the_clients_errors(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    call = {"data": ["SECRET"], "fn_index": 999, "session_hash": "a"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=call).status_code == 400
    nobodys = {**call, "fn_index": 0, "session_hash": ""}
    assert httpx.post(f"{address}gradio_api/queue/join", json=nobodys).status_code == 400
    no_file = {"content-type": "multipart/form-data; boundary=b"}
    body = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nSECRET\r\n--b--\r\n'
    assert httpx.post(f"{address}gradio_api/upload", content=body, headers=no_file).status_code == 400
    image = upload(address, "a.png", image_file())
    for range in ("bytes=1-2-3", "bytes=-", "bytes=5-2"):
        reply = httpx.get(f"{address}gradio_api/file={image['path']}", headers={"range": range})
        assert reply.status_code in (200, 206, 400, 416), range
    unknown = httpx.get(f"{address}gradio_api/queue/data", params={"session_hash": "none"})
    assert "Session not found" in unknown.text or "404" in unknown.text
    for function, data in (
        ("receive", []),
        ("receive", ["SECRET" * 999]),
        ("ask", ["SECRET"] * 9),
        ("lambda", [["x"]]),
    ):
        assert "values that the page offers" in send(address, function, data)["output"]["error"]
    log = "".join(capfd.readouterr())
    assert "SECRET" not in log
    assert "Traceback" not in log


def test_an_upload_that_breaks_off_leaves_nothing(address: str, answerer: Any) -> None:
    folder = Path(upload(address, "a.png", image_file())["path"]).parents[1]
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(9000)
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {httpx.URL(address).netloc.decode()}\r\nContent-Length: 10000\r\n"
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(address).port)) as connection:
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + body)
        wait_until(lambda: any(path.is_file() for path in folder.iterdir()))
    wait_until(lambda: not any(path.is_file() for path in folder.iterdir()))


def test_a_proxy_in_the_environment_is_not_asked(answerer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lion_fast.demo.server import serving

    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serving(answerer, "a model") as address:
        assert httpx.get(f"{address}config", trust_env=False).status_code == 200


def send(address: str, function: str, data: list) -> dict:
    functions = httpx.get(f"{address}config").json()["dependencies"]
    number = next(f["id"] for f in functions if f["api_name"] == function)
    call = {"data": data, "fn_index": number, "session_hash": f"test{time.monotonic_ns()}"}
    httpx.post(f"{address}gradio_api/queue/join", json=call).raise_for_status()
    session = {"session_hash": call["session_hash"]}
    stream = httpx.get(f"{address}gradio_api/queue/data", params=session, timeout=60)
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    return next(event for event in events if event["msg"] == "process_completed")


def upload(address: str, name: str, content: bytes) -> dict:
    (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)}).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize("kind", ["TIFF", "JPEG2000", "TGA"])
def test_formats_that_browsers_do_not_show_are_shown_as_png(address: str, kind: str) -> None:
    done = send(address, "receive", [upload(address, f"a.{kind.lower()}", image_file(kind))])
    shown, _, notice = done["output"]["data"]
    assert f"browsers do not show {kind}" in notice
    content = httpx.get(shown["url"]).content
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((3, 3)) == (20, 40, 200)
    asked = send(address, "ask", [shown, "", "caption", "", "automatic"])
    assert 'class="lion-text"' in asked["output"]["data"][0]


def test_errors_tell_the_user_nothing_about_the_server(
    address: str, answerer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = f"Cannot open {Path.cwd()}/weights"

    def broken(**_: Any) -> None:
        raise ValueError(inner)

    image = upload(address, "a.png", image_file())
    monkeypatch.setattr(answerer.model, "generate", broken)
    replies = [send(address, "ask", [image, "", "caption", "", "automatic"])["output"]]
    assert "an error that its log explains" in replies[0]["error"]
    for path in ("README.md", str(tmp_path / "a.png")):
        replies.append(send(address, "receive", [{"path": path, "meta": {"_type": "gradio.FileData"}}])["output"])
        replies.append(httpx.get(f"{address}gradio_api/file={path}").text)
    for odd in ("x", {"path": 5}, {"path": image["path"] + "\0"}):
        replies.append(send(address, "ask", [odd, {}, ["x"], {}, 5])["output"])
    for content in (b"no image", image_file()[:-30]):
        replies.append(send(address, "receive", [upload(address, "b.png", content)])["output"])
    text = json.dumps(replies)
    assert str(Path.cwd()) not in text
    assert "lion-fast-demo-" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70_000, "port: expected 1 to 65535, got 70000"),
        ("127.0.0.1", 0, "port: expected 1 to 65535, got 0"),
        ("127.0.0.1", "taken", "port: expected a free port, got .*, which is taken"),
        ("", None, "host: expected an address or a name of this machine, got ''"),
        ("[]", None, r"host: expected an address or a name of this machine, got '\[\]'"),
        ("no such host", None, "host: expected an address or a name of this machine, got 'no such host'"),
        ("192.0.2.1", None, "host: expected an address of this machine, got '192.0.2.1'"),
        ("224.0.0.1", None, "host: expected an address of this machine, got '224.0.0.1', which is that of a group"),
        ("x" * 500, None, r"host: expected an address or a name of this machine, got 'x{115}\.\.\.'"),
    ],
)
def test_an_address_that_cannot_be_served_is_named(host: str, port: Any, message: str) -> None:
    from lion_fast.demo.addresses import find_address

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if port == "taken" else port
        with pytest.raises(ValueError, match=message):
            find_address(host, port)


def test_addresses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lion_fast.demo import addresses

    assert addresses.find_address("localhost")[0] == "127.0.0.1"
    assert addresses.find_address("::ffff:127.0.0.1")[0] == "127.0.0.1"
    found = [(socket.AF_INET6, None, None, "", ("::1", 0)), (socket.AF_INET, None, None, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert addresses.find_address("this-machine")[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(addresses, "_PATIENCE", 0.1)
    with pytest.raises(ValueError, match=r"got 'slow' \(no answer\)"):
        addresses.find_address("slow")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_is_served(answerer: Any, host: str) -> None:
    from lion_fast.demo.server import serving

    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 address")
    port = free_port()
    with serving(answerer, "a model", host=host, port=port) as address:
        assert address == f"http://[::1]:{port}/"
        assert httpx.get(f"{address}config").status_code == 200


@pytest.fixture(scope="module")
def begin() -> Iterator[Callable[..., Any]]:
    with starting(Path(__file__).with_name("demo_process.py"), ["gradio", "lion_fast.demo.server"]) as begin:
        yield begin


@pytest.fixture(scope="module")
def model(answerer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    answerer.model.save_pretrained(folder)
    answerer.processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_ends_the_server_and_removes_the_uploads(
    begin: Callable[..., Any], model: str, number: int, tmp_path: Path
) -> None:
    port = free_port()
    process = begin(model=model, folder=str(tmp_path), port=port, loading=False)
    address, functions = f"http://127.0.0.1:{port}/", []

    def is_served() -> bool:
        with suppress(httpx.TransportError):
            functions.extend(httpx.get(f"{address}config").json()["dependencies"])
        return bool(functions)

    wait_until(is_served)
    image = upload(address, "a.png", image_file())
    assert Path(image["path"]).is_file()
    asking = {
        "data": [image, "", "caption", "", "automatic"],
        "fn_index": next(function["id"] for function in functions if function["api_name"] == "ask"),
        "session_hash": "a",
    }
    httpx.post(f"{address}gradio_api/queue/join", json=asking).raise_for_status()
    with httpx.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": "a"}):
        wait_until((tmp_path / "busy").exists)  # the model takes a minute
        began = time.monotonic()
        os.kill(process.pid, number)
        time.sleep(0.1)
        os.kill(process.pid, number)  # a second one changes nothing
        process.join(timeout=PATIENCE)
    assert time.monotonic() - began < 30
    assert process.exitcode == 128 + number
    assert list(tmp_path.glob("lion-fast-demo-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_signal_ends_the_command_while_the_model_is_loaded(
    begin: Callable[..., Any], model: str, number: int, tmp_path: Path
) -> None:
    process = begin(model=model, folder=str(tmp_path), port=free_port(), loading=True)
    wait_until((tmp_path / "busy").exists)
    began = time.monotonic()
    os.kill(process.pid, number)
    process.join(timeout=PATIENCE)
    assert time.monotonic() - began < 30
    assert process.exitcode == 128 + number
    assert list(tmp_path.iterdir()) == [tmp_path / "busy"]
