"""The page in Chromium, used with mouse and keyboard, and under attack.

The model is a small LION with random weights, whose `generate` is scripted, so that a test can tell which question an
answer belongs to. Everything else, from the upload to the attention maps, is real.
"""

import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lion_fast.cli import demo as command
from lion_fast.demo.answering import Answerer
from lion_fast.io.boxes import PALETTE
from tests.extras import needing, needs
from tests.lion_fast.processes import free_port
from tests.lion_fast.tiny import make_answerer

needs("playwright.sync_api", "test")

import httpx  # noqa: E402
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

pytestmark = needing("gradio", "demo")  # imported by the tests, because it takes seconds

BLUE, GREEN = (20, 40, 200), (30, 160, 60)
BOX = "[0.250,0.500,0.750,1.000]"
both_asked = threading.Event()  # answers to questions with "slowly" wait for it
TIMEOUT = 60_000  # milliseconds, also for a busy machine


def image_file(color: Any = BLUE, kind: str = "PNG", size: tuple[int, int] = (200, 100), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def script(answerer: Answerer) -> Callable[..., Tensor]:
    """Return a `generate` that answers with a box if the prompt asks for one, and otherwise with the prompt."""
    tokenizer: Any = answerer.processor.tokenizer

    def generate(input_ids: Tensor, task_ids: Tensor, **inputs: Tensor) -> Tensor:
        prompt = tokenizer.decode(input_ids[0], skip_special_tokens=True)
        if "break" in prompt:
            raise RuntimeError("the model is broken")
        if "slowly" in prompt:
            assert both_asked.wait(TIMEOUT / 1000), "no other user has asked"
        answer = BOX if "can you locate" in prompt else f"task {task_ids.item()}: {prompt}"
        return torch.tensor([[0, *tokenizer(answer).input_ids]])

    return generate


def tag(images: list[Image.Image]) -> list[str]:
    return ["blue, sea" if image.getpixel((0, 0)) == BLUE else "green, grass" for image in images]


@pytest.fixture(scope="module")
def looked_up() -> Iterator[set[str]]:
    """Return every host that this process resolved while the page was served."""
    import safehttpx

    hosts: set[str] = set()
    real = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        hosts.add(host.decode() if isinstance(host, bytes) else str(host))
        return real(host, *args, **kwargs)

    async def validate_url(host: str) -> str:  # called by Gradio before a fetch; it uses its own name servers
        hosts.add(host)
        raise ValueError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setattr(safehttpx, "async_validate_url", validate_url)
        yield hosts


@pytest.fixture(scope="module")
def address(looked_up: set[str]) -> Iterator[str]:
    from lion_fast.demo.server import serving

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
    """Open the page for a further user; the end of the test checks that the page requests nothing from other hosts."""
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


def upload(page: Page, content: bytes, name: str = "image.png", mime_type: str = "image/png") -> None:
    files = {"name": name, "mimeType": mime_type, "buffer": content}
    page.locator("#picture input[type=file]").set_input_files(files)


def upload_image(page: Page, color: tuple[int, int, int] = BLUE) -> None:
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


def boxed_image(page: Page) -> Image.Image:
    drawn = page.get_by_alt_text("The image with the answer's boxes drawn on it")
    drawn.wait_for()
    return Image.open(io.BytesIO(page.request.get(drawn.get_attribute("src") or "").body())).convert("RGB")


def test_a_box_is_drawn_on_the_image(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_image(page)
    page.get_by_role("radio", name="A box").check()
    page.get_by_label("What to find").fill("the left star")
    page.get_by_label("What to find").press("Enter")
    expect_answer(page, BOX)
    expect_answer(page, "Task: region_level, chosen automatically")
    expect_answer(page, "Box in pixels: [50, 50, 150, 100]")
    image = boxed_image(page)
    assert image.size == (480, 240)  # enlarged 2.4 times, the box too
    for inside_stroke in ((120, 180), (240, 121), (359, 180), (240, 239)):
        assert image.getpixel(inside_stroke) == PALETTE[0]
    for elsewhere in ((240, 180), (60, 200), (420, 60)):
        assert image.getpixel(elsewhere) == BLUE
    # The insight has maps of the answer, the Q-Former and three vision layers, and the gates, each also in words.
    figures = page.locator("#insight figure")
    expect(figures).to_have_count(6)
    assert all(figures.nth(i).locator("img").get_attribute("alt") for i in range(6))
    for words in ("aggregator's tokens", "vision layer 2", "vision layer 1", "vision layer 0", "region adapter 1.00"):
        expect(page.locator("#insight")).to_contain_text(words)
    # A caption has no box, so the previous box disappears.
    ask(page, "A caption")
    expect_answer(page, "task 1: According to")
    expect(page.locator("#boxed img")).to_have_count(0)


def test_tags_are_filled_in_and_can_be_edited(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_image(page)
    page.get_by_label("Tags").fill("a red door,\nwall")
    ask(page, "An answer", "What is <b>here</b>?")
    expect_answer(page, "[a red door, wall]. What is <b>here</b>?")  # as text: questions are not interpreted as HTML


def test_the_task_can_be_chosen_manually(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_image(page)
    ask(page, "An answer", "What is here?")
    expect_answer(page, "task 1:")
    expect_answer(page, "Task: image_level, chosen automatically")
    page.get_by_role("radio", name="region_level").check()
    ask(page, "An answer", "What is here?")
    expect_answer(page, "task 0:")
    expect_answer(page, "Task: region_level, chosen manually")
    expect(page.locator("#insight")).to_contain_text("region adapter 1.00, image adapter 0.00")


def test_example_scenes_are_offered(open_page: Callable[..., Page]) -> None:
    page = open_page(width=390, height=844)
    ask(page, "A caption")
    expect_answer(page, "Choose an image first.")
    page.get_by_role("button", name="Find ").click()
    expect(page.get_by_label("What to find")).not_to_have_value("", timeout=TIMEOUT)
    page.locator("#picture img").wait_for()
    page.get_by_role("button", name="Ask LION").click()
    expect_answer(page, BOX)
    assert boxed_image(page).size == (480, 480)
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing overflows a phone's screen


def test_the_page_can_be_used_by_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_image(page)
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
    "words.png": (b"not an image at all", "image/png", "image (words.png): expected an image file"),
    "page.png": (b"<!doctype html>" + SCRIPT, "image/png", "image (page.png): expected an image file"),
    "drawing.svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">' + SCRIPT + b"</svg>",
        "image/svg+xml",
        "image (drawing.svg): expected an image file",
    ),
    "empty.png": (b"", "image/png", "image (empty.png): expected an image file"),
    "cut.png": (image_file()[:-40], "image/png", "image (cut.png): expected a whole image"),
    "cut.jpg": (image_file(kind="JPEG", size=(640, 640))[:2000], "image/jpeg", "(cut.jpg): expected a whole image"),
    "bomb.png": (image_file(0, size=(10_000, 10_000), mode="1"), "image/png", "got 10000 x 10000"),  # a file of 15 kB
    "page.html": (b"<!doctype html>" + SCRIPT, "text/html", "Invalid file type"),
    "../../../escape.png": (b"?", "image/png", "image (escape.png): expected an image file"),
}


def test_files_that_are_no_images_are_rejected_with_a_message(open_page: Callable[..., Page], tmp_path: Path) -> None:
    from lion_fast.demo.page import MAX_FILE_BYTES

    page = open_page()
    huge = tmp_path / "huge.bmp"
    huge.write_bytes(b"BM" + bytes(MAX_FILE_BYTES))
    page.locator("#picture input[type=file]").set_input_files(huge)  # as bytes, it would take Playwright seconds
    expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible(timeout=TIMEOUT)
    expect(page.locator("#picture img")).to_have_count(0, timeout=TIMEOUT)
    for name, (content, mime_type, message) in NOT_PICTURES.items():
        upload(page, content, name, mime_type)
        expect(page.get_by_text(message), name).to_be_visible(timeout=TIMEOUT)
        expect(page.locator("#picture img"), name).to_have_count(0, timeout=TIMEOUT)
    ask(page, "A caption")
    expect_answer(page, "Choose an image first.")
    expect(page.locator("#refused")).not_to_be_visible()
    assert page.title() == "LION"
    # The page keeps working, and checks the content instead of the name.
    upload(page, image_file(kind="JPEG"), "a jpeg.png")
    ask(page, "A caption")
    expect_answer(page, "task 1:")


def test_an_error_of_the_model_is_shown_and_the_page_keeps_working(open_page: Callable[..., Page]) -> None:
    page = open_page()
    upload_image(page)
    ask(page, "An answer", "Will you break?")
    expect(page.get_by_text("an error that its log explains")).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_text("the model is broken")).to_have_count(0)
    ask(page, "An answer", " ")
    expect_answer(page, "Write a question first.")
    page.get_by_label("Tags").fill("<extra_id_0>")
    ask(page, "An answer", "What?")
    expect_answer(page, "expected text without '<extra_id_0>'")
    page.get_by_label("Tags").fill("")
    ask(page, "An answer", "And now?")
    expect_answer(page, "task 1: And now?")


def test_two_simultaneous_users_get_their_own_answers(open_page: Callable[..., Page]) -> None:
    pages = {BLUE: open_page(), GREEN: open_page()}
    for color, page in pages.items():
        upload_image(page, color)
        page.get_by_role("radio", name="A box").check()
        page.get_by_label("What to find").fill(f"slowly, {color[0]}")
    for page in pages.values():
        page.get_by_role("button", name="Ask LION").click()
    both_asked.set()
    for color, page in pages.items():
        expect_answer(page, f"can you locate slowly, {color[0]} and")
        assert boxed_image(page).getpixel((10, 200)) == color
        expect(page.get_by_label("Tags")).to_have_value("blue, sea" if color == BLUE else "green, grass")


def send(address: str, function: str, data: list) -> dict:
    """Return the answer of the page's queue to a request that the page itself never sends."""
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


def test_only_paths_of_uploads_are_read(address: str, looked_up: set[str], tmp_path: Path) -> None:
    from lion_fast.demo.page import MAX_FILE_BYTES

    secret = tmp_path / "secret.png"
    secret.write_bytes(image_file())
    for path in (str(secret), "/etc/passwd", "../../etc/passwd", "http://example.org/image.png"):
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


def test_requests_that_the_page_does_not_offer_are_rejected(address: str) -> None:
    (stored,) = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", image_file())}).json()
    for want, text, task in (("poem", "", "automatic"), ("caption", "", "level"), ("answer", "x" * 501, "automatic")):
        done = send(address, "ask", [file_data(stored), "", want, text, task])
        assert 'role="alert"' in done["output"]["data"][0]


def test_uploaded_html_is_not_served_as_a_page(address: str) -> None:
    content = b"<script>alert(1)</script>"
    for name in ("page.html", "drawing.svg", "page.png"):
        (stored,) = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)}).json()
        reply = httpx.get(f"{address}gradio_api/file={stored}")
        shown_as_image = reply.headers["content-type"] == "image/png"
        assert shown_as_image or reply.headers["content-disposition"].startswith("attachment"), name


def test_no_other_host_is_contacted(address: str, looked_up: set[str]) -> None:
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False
    page = httpx.get(address).text
    assert "fonts.g" not in page + httpx.get(f"{address}theme.css").text
    assert looked_up <= {"127.0.0.1", "localhost", "None"}


def test_the_command_serves_this_machine_only_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Callable
) -> None:
    answerer = make_answerer()
    answerer.model.save_pretrained(tmp_path / "model")
    answerer.processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    port = free_port()

    def interrupt() -> None:
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        for outside in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port)} - {"127.0.0.1", "::1"}:
            with socket.socket() as other:
                assert other.connect_ex((outside, port)) != 0, outside
        assert list(tmp_path.glob("lion-fast-demo-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_wait", interrupt)
    status, out, _ = run_cli("demo", model=tmp_path / "model", port=port, device="cpu")
    assert status == 130
    assert f"The page is at http://127.0.0.1:{port}/" in out
    assert not list(tmp_path.glob("lion-fast-demo-*"))
    status, _, err = run_cli("demo", model=tmp_path / "absent")
    assert status == 2
    assert "--model: no directory" in err
