"""The page, used as people use it, by mouse and keyboard in Chromium, and attacked as some would.

The model is a small LION with random weights, whose `generate` is scripted: answers depend on what was asked in a way
that a test can tell. Everything else, from the upload to the attention maps, is real.
"""

import io
import json
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lion_fast.cli import demo as command
from lion_fast.cli import main
from lion_fast.demo.answering import Answerer
from lion_fast.io.boxes import PALETTE
from tests.extras import needs

needs("gradio", "demo")
needs("playwright.sync_api", "test")

import httpx  # noqa: E402
import safehttpx  # noqa: E402
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

from lion_fast.demo.page import MAX_FILE_BYTES  # noqa: E402
from lion_fast.demo.server import serving  # noqa: E402

BLUE, GREEN = (20, 40, 200), (30, 160, 60)
BOX = "[0.250,0.500,0.750,1.000]"
both_asked = threading.Event()  # an answer that is asked for "slowly" waits for it
TIMEOUT = 60_000  # milliseconds, for machines that do other work too


def image_file(color: tuple[int, int, int] = BLUE, kind: str = "PNG", size: tuple[int, int] = (200, 100)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG of one bit per pixel, whatever the pixels are."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    )


def script(answerer: Answerer) -> Callable[..., Tensor]:
    """A `generate` that answers with a box if it is asked for a place, and otherwise with all that it was asked."""
    tokenizer: Any = answerer.processor.tokenizer

    def generate(input_ids: Tensor, task_ids: Tensor, **inputs: Tensor) -> Tensor:
        prompt = tokenizer.decode(input_ids[0], skip_special_tokens=True)
        if "break" in prompt:
            raise RuntimeError("the model is broken")
        if "slowly" in prompt:
            assert both_asked.wait(TIMEOUT / 1000), "nobody else has asked"
        answer = BOX if "can you locate" in prompt else f"task {task_ids.item()}: {prompt}"
        return torch.tensor([[0, *tokenizer(answer).input_ids]])

    return generate


def tag(images: list[Image.Image]) -> list[str]:
    return ["blue, sea" if image.getpixel((0, 0)) == BLUE else "green, grass" for image in images]


@pytest.fixture(scope="module")
def looked_up() -> Iterator[set[str]]:
    """Every host whose address this process asked for while the page was served."""
    hosts: set[str] = set()
    real = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        hosts.add(host.decode() if isinstance(host, bytes) else str(host))
        return real(host, *args, **kwargs)

    async def validate_url(host: str) -> str:  # by it Gradio's fetches begin; it asks name servers of its own
        hosts.add(host)
        raise ValueError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setattr(safehttpx, "async_validate_url", validate_url)
        yield hosts


@pytest.fixture(scope="module")
def address(make_answerer: Callable[..., Answerer], looked_up: set[str]) -> Iterator[str]:
    answerer = make_answerer()
    answerer.model.generate = script(answerer)  # type: ignore[method-assign]
    answerer.tagger = tag  # type: ignore[assignment]
    with serving(answerer, "a <b>small</b> model") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Opens the page for one more user; that it asks no other host for anything is checked at the end."""
    contexts, requests = [], []

    def open_one(width: int = 1280, height: int = 900) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Ask LION").wait_for()
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def upload(page: Page, content: bytes, name: str = "picture.png", mime_type: str = "image/png") -> None:
    files = {"name": name, "mimeType": mime_type, "buffer": content}
    page.locator("#picture input[type=file]").set_input_files(files)


def upload_picture(page: Page, color: tuple[int, int, int] = BLUE) -> None:
    upload(page, image_file(color))
    expected = "blue, sea" if color == BLUE else "green, grass"
    expect(page.get_by_label("Tags")).to_have_value(expected, timeout=TIMEOUT)


def ask(page: Page, want: str, text: str | None = None) -> None:
    page.get_by_role("radio", name=want).check()
    if text is not None:
        page.get_by_label("Question" if want == "An answer" else "What to find").fill(text)
    page.get_by_role("button", name="Ask LION").click()


def expect_answer(page: Page, text: str) -> None:
    expect(page.locator("#answer")).to_contain_text(text, timeout=TIMEOUT)


def boxed_picture(page: Page) -> Image.Image:
    drawn = page.get_by_alt_text("The picture with the answer's boxes drawn on it")
    drawn.wait_for()
    return Image.open(io.BytesIO(page.request.get(drawn.get_attribute("src") or "").body())).convert("RGB")


def test_a_place_is_drawn_on_the_picture(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_picture(page)
    page.get_by_role("radio", name="A place").check()
    page.get_by_label("What to find").fill("the left star")
    page.get_by_label("What to find").press("Enter")
    expect_answer(page, BOX)
    expect_answer(page, "Task: region_level, chosen automatically")
    expect_answer(page, "Box in pixels: [50, 50, 150, 100]")
    picture = boxed_picture(page)
    assert picture.size == (480, 240)  # enlarged 2.4 times, the box too
    for inside_stroke in ((120, 180), (240, 121), (359, 180), (240, 239)):
        assert picture.getpixel(inside_stroke) == PALETTE[0]
    for elsewhere in ((240, 180), (60, 200), (420, 60)):
        assert picture.getpixel(elsewhere) == BLUE
    # What was used: the answer, the Q-Former and three scales over the picture, and the gates, each said in words too.
    figures = page.locator("#insight figure")
    expect(figures).to_have_count(6)
    assert all(figures.nth(i).locator("img").get_attribute("alt") for i in range(6))
    for words in ("aggregator's tokens", "vision layer 2", "vision layer 1", "vision layer 0", "region adapter 1.00"):
        expect(page.locator("#insight")).to_contain_text(words)
    # A caption has no box: the one before goes.
    ask(page, "A caption")
    expect_answer(page, "task 1: According to")
    expect(page.locator("#boxed img")).to_have_count(0)


def test_tags_are_filled_in_and_may_be_edited(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_picture(page)
    page.get_by_label("Tags").fill("a red door,\nwall")
    ask(page, "An answer", "What is <b>here</b>?")
    expect_answer(page, "[a red door, wall]. What is <b>here</b>?")  # as text: what is asked is no HTML of the page


def test_the_task_may_be_chosen_by_hand(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_picture(page)
    ask(page, "An answer", "What is here?")
    expect_answer(page, "task 1:")
    expect_answer(page, "Task: image_level, chosen automatically")
    page.get_by_role("radio", name="region_level").check()
    ask(page, "An answer", "What is here?")
    expect_answer(page, "task 0:")
    expect_answer(page, "Task: region_level, chosen by hand")
    expect(page.locator("#insight")).to_contain_text("region adapter 1.00, image adapter 0.00")


def test_a_scene_is_offered_to_those_without_a_picture(open_page: Callable[..., Page]) -> None:
    page = open_page(width=390, height=844)
    ask(page, "A caption")
    expect_answer(page, "Choose a picture first.")
    page.get_by_role("button", name="Find ").click()
    expect(page.get_by_label("What to find")).not_to_have_value("", timeout=TIMEOUT)
    page.locator("#picture img").wait_for()
    page.get_by_role("button", name="Ask LION").click()
    expect_answer(page, BOX)
    assert boxed_picture(page).size == (480, 480)
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out of a phone's screen


def test_the_page_is_reached_by_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_picture(page)
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('[id]').id"))
        if "go" in reached:
            break
    assert {"tags", "want", "task", "go"} <= reached
    page.keyboard.press("Enter")
    expect_answer(page, "task 1:")


SCRIPT = b'<script>document.title = "owned"</script>'
NOT_PICTURES = {
    "words.png": (b"not a picture at all", "image/png", "picture (words.png): expected an image file"),
    "page.png": (b"<!doctype html>" + SCRIPT, "image/png", "picture (page.png): expected an image file"),
    "drawing.svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">' + SCRIPT + b"</svg>",
        "image/svg+xml",
        "picture (drawing.svg): expected an image file",
    ),
    "empty.png": (b"", "image/png", "picture (empty.png): expected an image file"),
    "cut.png": (image_file()[:-40], "image/png", "picture (cut.png): expected a whole image"),
    "cut.jpg": (image_file(kind="JPEG", size=(640, 640))[:2000], "image/jpeg", "(cut.jpg): expected a whole image"),
    "declared.png": (png(60_000, 60_000, b"\0"), "image/png", "picture (declared.png): expected at most"),
    "bomb.png": (png(10_000, 10_000, bytes(1251 * 10_000)), "image/png", "got 10000 x 10000"),  # a file of 12 kB
    "huge.bmp": (b"BM" + bytes(MAX_FILE_BYTES), "image/bmp", "exceed the maximum allowed size"),
    "page.html": (b"<!doctype html>" + SCRIPT, "text/html", "Invalid file type"),
    "../../../escape.png": (b"?", "image/png", "picture (escape.png): expected an image file"),
}


def test_what_is_no_picture_is_refused_with_a_message(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for name, (content, mime_type, message) in NOT_PICTURES.items():
        upload(page, content, name, mime_type)
        expect(page.get_by_text(message), name).to_be_visible(timeout=TIMEOUT)
        expect(page.locator("#picture img"), name).to_have_count(0, timeout=TIMEOUT)
    ask(page, "A caption")
    expect_answer(page, "Choose a picture first.")
    expect(page.locator("#refused")).not_to_be_visible()
    assert page.title() == "LION"
    # The page goes on, and judges by content, not by name.
    upload(page, image_file(kind="JPEG"), "a jpeg.png")
    ask(page, "A caption")
    expect_answer(page, "task 1:")


def test_an_error_of_the_model_is_shown_and_the_page_goes_on(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_picture(page)
    ask(page, "An answer", "Will you break?")
    expect(page.get_by_text("the model is broken")).to_be_visible(timeout=TIMEOUT)
    ask(page, "An answer", " ")
    expect_answer(page, "Write a question first.")
    page.get_by_label("Tags").fill("<extra_id_0>")
    ask(page, "An answer", "What?")
    expect_answer(page, "expected text without '<extra_id_0>'")
    page.get_by_label("Tags").fill("")
    ask(page, "An answer", "And now?")
    expect_answer(page, "task 1: And now?")


def test_two_users_at_once_get_their_own_answers(open_page: Callable[..., Page]) -> None:
    pages = {BLUE: open_page(), GREEN: open_page()}
    for color, page in pages.items():
        upload_picture(page, color)
        page.get_by_role("radio", name="A place").check()
        page.get_by_label("What to find").fill(f"slowly, {color[0]}")
    for page in pages.values():
        page.get_by_role("button", name="Ask LION").click()
    both_asked.set()
    for color, page in pages.items():
        expect_answer(page, f"can you locate slowly, {color[0]} and")
        assert boxed_picture(page).getpixel((10, 200)) == color
        expect(page.get_by_label("Tags")).to_have_value("blue, sea" if color == BLUE else "green, grass")


def send(address: str, function: str, data: list) -> dict:
    """What the page's queue answers to a request that no browser would make."""
    functions = httpx.get(f"{address}config").json()["dependencies"]
    number = next(f["id"] for f in functions if f["api_name"] == function)
    call = {"data": data, "fn_index": number, "session_hash": f"test{time.monotonic_ns()}"}
    httpx.post(f"{address}gradio_api/queue/join", json=call).raise_for_status()
    stream = httpx.get(
        f"{address}gradio_api/queue/data", params={"session_hash": call["session_hash"]}, timeout=TIMEOUT / 1000
    )
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    return next(event for event in events if event["msg"] == "process_completed")


def file_data(path: str, **fields: Any) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **fields}


def test_paths_lead_nowhere_but_to_uploads(address: str, looked_up: set[str], tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_file())
    for path in (str(secret), "/etc/passwd", "../../etc/passwd", "http://example.org/picture.png"):
        done = send(address, "receive", [file_data(path)])
        assert not done["success"], path
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)
    assert "example.org" not in looked_up
    upload = f"{address}gradio_api/upload"
    (stored,) = httpx.post(upload, files={"files": ("../../../../tmp/evil.png", image_file())}).json()
    folder = Path(stored).parents[1]
    assert folder.name.startswith("lion-fast-demo-")
    assert folder.stat().st_mode & 0o077 == 0
    assert send(address, "receive", [file_data(stored)])["success"]
    assert send(address, "receive", [file_data(stored, url="data:image/png;base64,eA==")])["success"]
    assert httpx.post(upload, files={"files": ("big.png", bytes(MAX_FILE_BYTES + 1))}).status_code == 413


def test_what_the_page_does_not_offer_is_refused(address: str) -> None:
    (stored,) = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", image_file())}).json()
    for want, text, task in (("poem", "", "automatic"), ("caption", "", "level"), ("answer", "x" * 501, "automatic")):
        done = send(address, "ask", [file_data(stored), "", want, text, task])
        assert 'role="alert"' in done["output"]["data"][0]


def test_html_among_the_uploads_is_not_served_as_a_page(address: str) -> None:
    content = b"<script>alert(1)</script>"
    for name in ("page.html", "drawing.svg", "page.png"):
        (stored,) = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)}).json()
        reply = httpx.get(f"{address}gradio_api/file={stored}")
        shown_as_picture = reply.headers["content-type"] == "image/png"
        assert shown_as_picture or reply.headers["content-disposition"].startswith("attachment"), name


def test_nobody_else_is_asked_for_anything(address: str, looked_up: set[str]) -> None:
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False
    page = httpx.get(address).text
    assert "fonts.g" not in page + httpx.get(f"{address}theme.css").text
    assert looked_up <= {"127.0.0.1", "localhost", "None"}


def test_the_command_serves_this_machine_alone_and_leaves_nothing(
    make_answerer: Callable[..., Answerer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answerer = make_answerer()
    answerer.model.save_pretrained(tmp_path / "model")
    answerer.processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def interrupt() -> None:
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        for outside in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)} - {"127.0.0.1", "::1"}:
            with socket.socket() as other:
                assert other.connect_ex((outside, port)) != 0, outside
        assert list(tmp_path.glob("lion-fast-demo-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_wait", interrupt)
    assert main(["demo", "--model", str(tmp_path / "model"), "--port", str(port), "--device", "cpu"]) == 130
    assert f"The page is at http://127.0.0.1:{port}/" in capsys.readouterr().out
    assert not list(tmp_path.glob("lion-fast-demo-*"))
    assert main(["demo", "--model", str(tmp_path / "absent")]) == 2
    assert "--model: no directory" in capsys.readouterr().err
