"""The server of the page, which is local: it fetches nothing and leaves no files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gradio.themes import Base

from lion_fast.demo.addresses import find_address
from lion_fast.demo.answering import Answerer
from lion_fast.demo.guards import guards
from lion_fast.demo.page import MAX_FILE_BYTES, Example, build_page
from lion_fast.scenes import SceneGenerator

_FONT = ("system-ui", "sans-serif")  # local fonts: Gradio's themes would load fonts from a service
_EXAMPLE_SEED = 2026  # seed of scenes that the quickstart's training has not seen
_PATIENCE = 1.0  # seconds that requests in progress get at the end
_folders: set[str] = set()


def remove_uploads() -> None:
    """Remove the uploads of all pages that this process serves, if it has to end without ending their contexts."""
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def serving(answerer: Answerer, name: str, *, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page of a model until the context ends.

    Uploads are stored in a temporary directory that only this process's user can read, and that is removed when the
    context ends. `lion_fast.demo.guards` says which requests are answered.

    Args:
        name: name of the model, shown on the page.
        host: address or name to listen on; `"0.0.0.0"` lets in everyone who can reach this machine.
        port: port to listen on; None for the first free one of `addresses.PORTS`.

    Yields:
        The page's address.

    Raises:
        ValueError: as for `addresses.find_address`.
    """
    address, port = find_address(host, port)
    with (
        _upload_folder() as folder,
        # Gradio asks its own server whether it answers, which no proxy can tell.
        _environment(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder, NO_PROXY="*", no_proxy="*"),
    ):
        page = build_page(answerer, name, draw_examples(Path(folder) / "scenes", answerer))
        theme = _theme()
        try:
            _, url, _ = page.launch(
                server_name=f"[{address}]" if ":" in address else address,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,  # unexpected errors would be shown with their message
                max_file_size=MAX_FILE_BYTES,
                app_kwargs={"middleware": guards(address, MAX_FILE_BYTES, Path(folder))},
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                theme=theme,
                css_paths=Path(__file__).with_name("page.css"),
            )
            page.server.close = partial(_stop, page.server)
            yield url
        finally:
            page.close(verbose=False)


def _stop(server: Any) -> None:
    """Stop a server of Gradio's, whose own method waits for the model and for all open event streams."""
    server.should_exit = server.force_exit = True
    server.thread.join(_PATIENCE)


@contextmanager
def _upload_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="lion-fast-demo-", ignore_cleanup_errors=True) as folder:
        _folders.add(folder)
        try:
            yield folder
        finally:
            _folders.discard(folder)


def draw_examples(folder: Path, answerer: Answerer) -> list[Example]:
    """Draw scenes into `folder`, each with a request and with the tagger's tags or, without a tagger, the true tags."""
    folder.mkdir(parents=True)
    generator = SceneGenerator(_EXAMPLE_SEED, image_size=384, num_objects=(2, 2))
    scenes = [generator[index] for index in range(3)]
    question, expression = scenes[1].questions[1].text, scenes[2].expressions[-1].text
    asked = (
        ("Describe this one", "caption", ""),
        (question, "answer", question),
        (f"Find {expression}", "place", expression),
    )
    examples = []
    for number, (scene, (label, want, text)) in enumerate(zip(scenes, asked, strict=True), 1):
        path = folder / f"scene-{number}.png"
        scene.image.save(path)
        tags = answerer.tags_of(scene.image) if answerer.tagger else ", ".join(scene.tags)
        examples.append(Example(label, path, tags, want, text))
    return examples


def _theme() -> Base:
    """Return a theme with enough contrast, light and dark: Gradio's subdued text and orange buttons lack it."""
    theme = Base(primary_hue="orange", neutral_hue="stone", font=_FONT, font_mono="monospace")
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
