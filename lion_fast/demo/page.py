"""The page, in Gradio. This module checks everything that a browser sends; `load_image` checks image files."""

import html
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like
from PIL import Image

from lion_fast.configuration_lion import TASKS
from lion_fast.demo.answering import MAX_TAGS, MAX_TEXT, WANTS, Answer, Answerer
from lion_fast.demo.figures import for_display, insight_html
from lion_fast.demo.insight import adapter_gates
from lion_fast.io.boxes import draw_boxes
from lion_fast.io.images import load_image

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 20 * 2**20
_REQUESTS = (("A caption", "caption"), ("An answer", "answer"), ("A box", "place"))
_TEXT_FIELD = {
    "caption": {"visible": False},
    "answer": {"visible": True, "label": "Question", "placeholder": "What is the background like?"},
    "place": {"visible": True, "label": "What to find", "placeholder": "the rightmost object"},
}
_TASK_CHOICES = ("automatic", *TASKS)
_SHOWN_BY_BROWSERS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "MPO", "PNG", "WEBP")
_KEEP_SECONDS = 3600  # for uploads and drawn images


@dataclass(frozen=True)
class Example:
    """An image file with a request; the fields are those of the page."""

    label: str
    image: Path
    tags: str
    want: str
    text: str


class Refused(ValueError):
    """A request that cannot be answered; the message is shown to the user."""


def build_page(answerer: Answerer, name: str, examples: Sequence[Example] = ()) -> gr.Blocks:
    """Build the page. The server keeps no state per user: each request is complete and gets its own results.

    Args:
        name: name of the model, shown on the page.
        examples: examples offered below the image.
    """
    gates = adapter_gates(answerer.model)

    def receive(upload: dict | None) -> tuple[Any, Any, str]:
        """Return image, tags and error message after an upload."""
        with _hiding_errors():
            try:
                image = _uploaded(upload)
            except Refused as error:
                return None, gr.skip(), _problem(f"The file was not accepted. {error}")
            shown, notice = _shown(image, upload)
            return shown, answerer.tags_of(image), notice

    def ask(upload: dict | None, tags: str, want: str, text: str, task: str) -> tuple[str, Any, str, str]:
        """Return the answer, the image with boxes, the insight, and an empty error message."""
        with _hiding_errors():
            try:
                image = _uploaded(upload)
                if not (
                    _is_text(text, tags) and want in WANTS and task in _TASK_CHOICES
                ):  # the page never sends others
                    raise Refused("Expected texts, a request and a task that the page offers.")
                answer = answerer.answer(image, want, text or "", tags or "", None if task == "automatic" else task)
            except ValueError as error:
                return _problem(str(error)), gr.update(visible=False, value=None), "", ""
            shown, scale = for_display(image)
            boxed = gr.update(visible=False, value=None)
            if answer.boxes:
                boxes = [[side * scale for side in box] for box in answer.boxes]
                labels = [text.strip()] * len(boxes) if want == "place" else None
                boxed = gr.update(visible=True, value=draw_boxes(shown, boxes, labels))
            insight = insight_html(shown, answer.insight, gates, answer.task)
            return _answer_html(answer, want, automatic=task == "automatic"), boxed, insight, ""

    with gr.Blocks(title="LION", analytics_enabled=False, delete_cache=(_KEEP_SECONDS, _KEEP_SECONDS)) as page:
        gr.HTML(
            "<h1>LION: ask about an image</h1><p>Upload an image, then ask for a caption, an answer, or a box. "
            f"Model: <code>{html.escape(name)}</code></p>",
            elem_classes="lion-header",
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=330,
                    buttons=["fullscreen"],
                    alt_text="The uploaded image",
                    placeholder=f"Drop an image here\nor click to choose one, up to {MAX_FILE_BYTES // 2**20} MB",
                    elem_id="picture",
                )
                _take_uploads_only(image)
                refused = gr.HTML(elem_id="refused")
                chosen = gr.Column()
                tags = gr.Textbox(
                    label="Tags",
                    info="What the image may show, separated by commas. The model may use them or not."
                    + (" The tagger fills them in." if answerer.tagger else ""),
                    max_length=MAX_TAGS,
                    visible=answerer.takes_tags,
                    elem_id="tags",
                )
                want = gr.Radio(list(_REQUESTS), value="caption", label="What do you want?", elem_id="want")
                question = gr.Textbox(max_length=MAX_TEXT, elem_id="question", **_TEXT_FIELD["caption"])
                task = gr.Radio(
                    list(_TASK_CHOICES),
                    value="automatic",
                    label="Task",
                    info="Selects the adapters' routers: region_level for questions that ask for a box or contain one, "
                    "image_level for all others. Automatic follows this rule.",
                    elem_id="task",
                )
                go = gr.Button("Ask LION", variant="primary", elem_id="go")
            with gr.Column(scale=6, min_width=320):
                answered = gr.HTML(
                    _answer_block(
                        "<p>The answer appears here, with its box drawn on the image. Below it, the page shows which "
                        "parts of the image and which adapters the model used.</p>"
                    ),
                    elem_id="answer",
                )
                boxed = gr.Image(
                    label="Where it is",
                    visible=False,
                    interactive=False,
                    format="png",
                    height=430,
                    buttons=["download", "fullscreen"],
                    alt_text="The image with the answer's boxes drawn on it",
                    elem_id="boxed",
                )
        used = gr.HTML(elem_id="insight")
        if examples:
            with chosen:
                gr.Examples(
                    [[str(example.image), example.tags, example.want, example.text] for example in examples],
                    [image, tags, want, question],
                    label="Or try a scene",
                    example_labels=[example.label for example in examples],
                    api_visibility="private",
                )
        # One upload is read at a time, which bounds the memory of decoding. The model answers one question at a time.
        # Other requests are queued.
        image.upload(
            receive, image, [image, tags, refused], preprocess=False, concurrency_limit=1, api_visibility="private"
        )
        want.change(
            lambda value: gr.update(**_TEXT_FIELD[value or "caption"]), want, question, api_visibility="private"
        )
        for event in (go.click, question.submit):
            event(
                ask,
                [image, tags, want, question, task],
                [answered, boxed, used, refused],
                preprocess=False,
                concurrency_id="model",
                concurrency_limit=1,
                show_progress_on=answered,
                api_visibility="private",
            )
    page.queue(max_size=64)
    for function in page.fns.values():
        function.queue = True  # also that of the examples: calls outside the queue fail with status 500
    _name_no_values(page)
    return page


def _uploaded(upload: dict | None) -> Image.Image:
    """Load the image of an upload; Gradio has checked that its path is that of an upload.

    Raises:
        Refused: there is no upload, or `load_image` rejects the file.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not path:
        raise Refused("Choose an image first.")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise Refused("The upload is no longer there; choose the image again.") from error
    try:
        return load_image(content, f"image ({Path(path).name[:100]})")
    except ValueError as error:
        raise Refused(str(error)) from error


def _shown(image: Image.Image, upload: dict | None) -> tuple[Any, str]:
    """Return what the page shows and sends from now on, and a notice: PNG for a format that browsers do not show."""
    path = Path((upload or {})["path"])
    with Image.open(path) as file:
        format = file.format or "This format"
    if format in _SHOWN_BY_BROWSERS:
        return gr.skip(), ""
    converted = path.with_name(f"{path.stem}.{format.lower()}.png")
    image.save(converted, compress_level=1)
    return str(
        converted
    ), f'<p class="lion-detail">Shown as PNG, because browsers do not show {html.escape(format)}.</p>'


def _is_text(*values: Any) -> bool:
    return all(value is None or isinstance(value, str) for value in values)


@contextmanager
def _hiding_errors() -> Iterator[None]:
    """Log any exception, and tell the user no more than that there was one."""
    try:
        yield
    except Exception as error:
        logger.exception("a request to the page failed")
        message = "The page could not answer, because of an error that its log explains."
        raise gr.Error(message, print_exception=False) from error


def _take_uploads_only(image: gr.Image) -> None:
    """Reject URLs as images, which Gradio would fetch; this page must not fetch anything."""
    move_to_cache = image.async_move_resource_to_block_cache

    async def move_upload(url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None and is_http_url_like(str(url_or_file_path)):
            raise gr.Error("Expected an uploaded image, got a URL.", print_exception=False)
        return await move_to_cache(url_or_file_path)

    image.async_move_resource_to_block_cache = move_upload


def _name_no_values(page: gr.Blocks) -> None:
    """Reject values that the page never sends in one line: Gradio would log them, whatever their length."""
    preprocess_data = page.preprocess_data

    async def preprocess(*args: Any, **kwargs: Any) -> Any:
        try:
            return await preprocess_data(*args, **kwargs)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            logger.warning("a request to the page had values that it does not send (%s)", type(error).__name__)
            raise gr.Error("Expected values that the page offers, got others.", print_exception=False) from error

    page.preprocess_data = preprocess
    push = page._queue.push

    async def push_of_session(body: Any, *args: Any, **kwargs: Any) -> Any:
        if not body.session_hash:  # Gradio would fail later, outside the request
            return False, "Session hash not found.", "error"
        return await push(body, *args, **kwargs)

    page._queue.push = push_of_session


def _problem(message: str) -> str:
    return f'<p class="lion-problem" role="alert">{html.escape(message)}</p>'


def _answer_html(answer: Answer, want: str, *, automatic: bool) -> str:
    lines = [f"Asked: {answer.instruction}"]
    lines.append(f"Task: {answer.task}, {'chosen automatically' if automatic else 'chosen manually'}")
    lines += [f"Box in pixels: {[round(side) for side in box]}" for box in answer.boxes]
    if want == "place" and not answer.boxes:
        lines.append("The answer contains no box.")
    lines.append(f"{answer.seconds:.1f} seconds")
    details = "".join(f'<p class="lion-detail">{html.escape(line)}</p>' for line in lines)
    return _answer_block(f'<p class="lion-text">{html.escape(answer.text) or "(no words)"}</p>{details}')


def _answer_block(content: str) -> str:
    return f'<div class="lion-answer" role="status">{content}</div>'
