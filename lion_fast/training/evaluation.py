"""Evaluation during training: loss, answers, boxes, and drawings of them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from lion_fast.data.loader import rank_and_size
from lion_fast.inference.pipeline import generate_texts
from lion_fast.io.boxes import draw_boxes, iou, parse_boxes
from lion_fast.io.images import load_image
from lion_fast.model.padding import IGNORED
from lion_fast.training.data import LionCollator, Sample

_TILE, _MARGIN, _LINES, _COLUMNS = 320, 10, 4, 4


@torch.no_grad()
def evaluate(
    model: Any,
    processor: Any,
    samples: Dataset,
    *,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    pictures: int,
    autocast: Callable[[], Any],
    collate: Callable[[Sequence[Sample]], dict[str, Any]] | None = None,
    **generation: Any,
) -> tuple[dict[str, float], list[tuple[Sample, str]]]:
    """Compute the loss and the answers for some samples, split among the processes.

    Args:
        model: model with `generate`; its call returns the loss.
        indices: samples to evaluate, the same on every process.
        batch_size: samples per batch and process.
        pictures: number of this process's samples to return with their answers, for `draw_answers`: with
            `LionCollator`, their images are reduced to the size that is drawn.
        autocast: returns the context that the model runs in.
        collate: makes the batches; `LionCollator` if None. Batches without labels give no loss.
        generation: arguments of `generate`.

    Returns:
        The metrics and the first samples with their answers. The metrics are `loss`, the mean over target tokens;
        `grounding_accuracy` over answers with a box, the fraction of first boxes with IoU >= 0.5, where a missing box
        is a miss; and `exact_match` over the other answers.
    """
    rank, world = rank_and_size()
    own = list(indices[rank::world])
    rounds = -(-len(indices) // (world * batch_size))
    reduces, collate, shown = collate is None, collate or LionCollator(processor), []
    totals: dict[str, float] = defaultdict(float)
    for round_ in range(rounds):
        chosen = own[round_ * batch_size : (round_ + 1) * batch_size]
        # All processes must run a sharded model equally often: a process without samples left runs any sample.
        read, drawn = [], []
        for index in chosen or indices[:1]:
            sample = samples[index]
            if len(shown) + len(drawn) < pictures:
                drawn.append({**sample, "image": _tile(sample)} if reduces else sample)
            read.append({**sample, "image": processor.resize(load_image(sample["image"]))} if reduces else sample)
            del sample  # one image at a time is held at its full size
        counted = read if chosen else []
        batch = {name: value.to(device) for name, value in collate(read).items()}
        with autocast():
            loss = model(**batch).loss if "labels" in batch else None
            answers, _ = generate_texts(model, processor, batch, **generation)
        if not counted:
            continue
        if loss is not None:
            tokens = int((batch["labels"] != IGNORED).sum())
            totals["loss"] += loss.item() * tokens
            totals["tokens"] += tokens
        for sample, answer in zip(counted, answers, strict=True):
            asked, right = ("placed", "located") if parse_boxes(sample["answer"]) else ("answered", "matched")
            totals[asked] += 1
            totals[right] += is_right(answer, sample["answer"])
        shown += zip(drawn, answers, strict=False)
    totals = _over_processes(totals)
    shares = {
        "loss": ("loss", "tokens"),
        "exact_match": ("matched", "answered"),
        "grounding_accuracy": ("located", "placed"),
    }
    return {name: totals[of] / totals[by] for name, (of, by) in shares.items() if totals[by]}, shown


def _over_processes(own: dict[str, float]) -> dict[str, float]:
    """Return the sums over all processes."""
    _, world = rank_and_size()
    if world == 1:
        return own
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, own)
    totals: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            totals[name] += value
    return totals


def is_right(answer: str, true: str) -> bool:
    """Return whether an answer is correct: equal to the true one or, if that has a box, first boxes with IoU >= 0.5."""
    expected, found = parse_boxes(true), parse_boxes(answer)
    return bool(found) and iou(found[0], expected[0]) >= 0.5 if expected else answer == true.strip()


def draw_answers(shown: Sequence[tuple[Sample, str]]) -> Image.Image:
    """Draw samples on one sheet, each with its question, true answer, the model's answer and the boxes of both.

    Raises:
        ValueError: `shown` is empty.
    """
    if not shown:
        raise ValueError("shown: expected one sample or more, got none")
    font = ImageFont.load_default(13)
    line = int(font.getbbox("Ag")[3]) + 3
    height = _TILE + 3 * _LINES * line // 2 + _MARGIN
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (_TILE + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (sample, answer) in enumerate(shown):
        x = _MARGIN + number % columns * (_TILE + _MARGIN)
        y = _MARGIN + number // columns * (height + _MARGIN)
        sheet.paste(_with_boxes(sample, answer), (x, y))
        y += _TILE + 4
        right = answer == sample["answer"].strip()
        said = (("black", sample["question"]), ("#00729e", f"true: {sample['answer']}"))
        for ink, text in (*said, ("#007a50" if right else "#b03a00", f"model: {answer}")):
            for part in _wrapped(draw, text, font)[: _LINES // 2]:
                draw.text((x, y), part, fill=ink, font=font)
                y += line
    return sheet


def _with_boxes(sample: Sample, answer: str) -> Image.Image:
    image = _tile(sample)
    boxes, labels = [], []
    # `draw_boxes` assigns the colours in order: the model's box first, then the true one.
    for label, text in (("model", answer), ("true", sample["answer"])):
        for box in parse_boxes(text, image.size)[:1]:
            boxes.append(box)
            labels.append(label)
    return draw_boxes(image, boxes, labels)


def _tile(sample: Sample) -> Image.Image:
    return load_image(sample["image"]).resize((_TILE, _TILE))


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= _TILE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def evaluated_indices(samples: Dataset, most: int) -> list[int]:
    """Return the indices of up to `most` samples, evenly spaced; the selection is deterministic."""
    count = len(samples)  # type: ignore[arg-type]
    return [number * count // min(most, count) for number in range(min(most, count))]
