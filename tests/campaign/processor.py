"""Calls of `LionProcessor` and its chat template with arguments of all kinds."""

import functools
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.campaign.running import Trial
from tests.lion_fast.tiny import scene_processor

IMAGE = Image.new("RGB", (9, 7), (200, 30, 60))
NAMES = ("images", "text", "tags", "task", "text_target", "return_tensors", "padding", "truncation", "max_length",
         "pad_to_multiple_of", "padding_side", "add_special_tokens", "text_kwargs", "images_kwargs", "common_kwargs",
         "size", "do_resize", "image_mean", "resample", "videos", "audio", "audio_kwargs", "allow_urls")  # fmt: skip


def make(rng: random.Random, folder: Path) -> Trial:
    processor = _processor(rng.random() < 0.7)
    if rng.random() < 0.25:
        chat = _chat(rng)
        settings = {"tokenize": rng.random() < 0.8, "return_dict": True}
        call = functools.partial(processor.apply_chat_template, chat, **settings)
        return Trial(f"chat {chat!r:.300}", call, ("conversation", "images", "text"))
    count = rng.choice([1, 1, 2, 3])
    arguments: dict[str, Any] = {
        "images": [IMAGE] * count,
        "text": [rng.choice(["Why?", "How many dogs are there? " * rng.choice([1, 40])]) for _ in range(count)],
    }
    if rng.random() < 0.3:
        arguments["text_target"] = ["a dog"] * count
    changes = rng.sample(NAMES, rng.choice([0, 1, 1, 1, 2, 3]))
    for name in changes:
        arguments[name] = _valid(rng, name, count) if rng.random() < 0.4 else _hostile(rng, folder)
    names = (*changes, "text", "images", "padding", "return_tensors", "max_length", "size")
    return Trial(
        f"{changes} of { ({name: arguments[name] for name in changes})!r:.300}",
        lambda: (processor(**arguments), arguments),
        names,
        check=_check,
    )


@functools.cache
def _processor(is_encoder_decoder: bool) -> Any:
    return scene_processor(10, is_encoder_decoder=is_encoder_decoder)


def _check(result: Any) -> None:
    batch, arguments = result
    text = arguments.get("text")
    count = None if text is None else 1 if isinstance(text, str) else len(text)
    for name, rows in batch.items():
        assert count is None or len(rows) == count, f"{name} has {len(rows)} rows for {count} texts"
        if isinstance(rows, torch.Tensor):
            assert rows.isfinite().all(), f"{name} is not finite"


def _valid(rng: random.Random, name: str, count: int) -> Any:
    choices: dict[str, list[Any]] = {
        "images": [[IMAGE] * count, [[IMAGE]] * count, None, np.zeros((count, 4, 4, 3), np.uint8)],
        "text": [["What?"] * count, ["x " * 300] * count],
        "tags": [None, ["dog, cat"] * count, [["dog"], *[None] * (count - 1)]],
        "task": ["image_level", "region_level", ["region_level"] * count],
        "text_target": [None, ["a dog"] * count, [""] * count],
        "return_tensors": ["pt", "np", None],
        "padding": [True, "longest", "max_length", False],
        "truncation": [True, False, "longest_first"],
        "max_length": [None, 1, 7, 200],
        "pad_to_multiple_of": [None, 8],
        "padding_side": ["left", "right"],
        "add_special_tokens": [True, False],
        "text_kwargs": [{}, {"padding": "max_length"}, {"max_length": 5, "truncation": True}],
        "images_kwargs": [{}, {"do_resize": True}, {"size": {"height": 14, "width": 14}}],
        "common_kwargs": [{}, {"return_tensors": "pt"}],
        "size": [{"height": 14, "width": 28}],
        "image_mean": [[0.5, 0.5, 0.5]],
    }
    return rng.choice(choices.get(name, [None]))


def _hostile(rng: random.Random, folder: Path) -> Any:
    surrogate = "\ud83d"
    return rng.choice(
        [
            None, True, -1, 0, 3, 2**70, 0.5, float("nan"), "", " ", "x", surrogate, "<extra_id_0>", "a" * 100_000,
            b"", b"abc", [], [[]], {}, {1: 2}, {"x": None}, {"bytes": b"", "path": None}, {"padding": "x"},
            {"size": -1}, {"size": {"height": 10**12, "width": 1}}, {"max_length": "5"}, {"return_tensors": "tf"},
            set(), range(3), object(), lambda images: images, lambda images: [None] * len(images), lambda images: 3,
            np.zeros(3), np.array(["a"]), torch.zeros(2, 2), torch.tensor(5), IMAGE, [IMAGE, None], [IMAGE, [IMAGE]],
            io.BytesIO(b"abc"), io.StringIO("abc"), str(folder), folder / "none.png", "https://example.org/a.png",
            "data:image/png;base64,AA", "data:,", ["dog", 3], ["dog", None], [["dog", ["cat"]]], [surrogate], (None,),
        ]
    )  # fmt: skip


def _chat(rng: random.Random) -> Any:
    text = {"type": "text", "text": rng.choice(["Why?", "", " ", "{{ 1 }}", "{% raise %}", 3, None, "\ud83d"])}
    image = {"type": "image", rng.choice(["image", "url", "path", "base64", "x"]): _hostile(rng, Path("/nowhere"))}
    good = {"type": "image", "image": IMAGE}
    blocks = rng.sample([text, image, good, {"type": 3}, {"type": "video", "video": "a.mp4"}, "Why?", None], 3)
    content = rng.choice([blocks, [good, text], [text], "Why?", None, 3, {}, [good, {"type": "text", "text": "Why?"}]])
    message = {"role": rng.choice(["user", "assistant", "system", None, 3]), "content": content}
    message = rng.choice([message, message, message, [], None, "Why?", {"role": "user"}])
    return rng.choice([[message], [message, message], [[message]], [[message], [message]], message, [], None])
