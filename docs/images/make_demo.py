"""Generates docs/images/demo.png: the page with the quickstart's checkpoint (`make quickstart`), asked for a box."""

import io
import shutil
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from lion_fast.cli.ask import DEFAULT_MODEL
from lion_fast.demo.answering import Answerer
from lion_fast.demo.server import serving

HERE = Path(__file__).parent


def main() -> None:
    answerer = Answerer.from_pretrained(DEFAULT_MODEL, torch.device("cpu"))
    with serving(answerer, str(DEFAULT_MODEL)) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.locator("#picture input[type=file]").set_input_files(HERE / "scene.png")
        page.locator("#picture img").wait_for()
        page.get_by_role("radio", name="A box").check()
        page.get_by_label("What to find").fill("the rightmost object")
        page.get_by_role("button", name="Ask LION").click()
        page.locator("#boxed img").wait_for()
        page.locator("#insight img").last.wait_for()
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until Gradio's transitions have ended
        shot = page.screenshot(full_page=True)
        browser.close()
    # A palette halves the file without a visible difference.
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256).save(HERE / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
