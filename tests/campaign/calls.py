"""Arguments of the model's calls: `forward`, `generate`, selections of images, taggers and the pipeline."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from lion_fast import LionPipeline
from lion_fast.model.generation_arguments import RULES, UNSUPPORTED
from tests.campaign.running import Trial
from tests.lion_fast.tiny import make_batch, make_model, make_tagger, without_labels

logging.set_verbosity_error()

INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64)
OTHERS = (torch.bool, torch.float32, torch.float16, torch.complex64, torch.bfloat16)
SEARCH = {"num_beams": 2, "max_new_tokens": 3}
VALUES: list[Any] = [
    *(0, -1, 1, 2, 3, 10**6, 10**20, True, False, 0.5, -0.5, 1.5, float("nan"), float("inf"), -float("inf")),
    *("", "3", "auto", "never", b"3", [], [1], [[1]], [[]], [-1], ["a"], {}, {"a": 1}, {(1,): 2.0}, (1, 2.0), (1,)),
    *(object(), torch.tensor(2), torch.tensor([1, 2]), np.int64(2), np.float32(0.5), np.ones(3), print, range(3)),
]


@cache
def model_of(family: str) -> Any:
    return make_model(family)


@cache
def answer_of(family: str) -> Tensor:
    return model_of(family).generate(**make_batch(), **SEARCH)


def make(rng: random.Random, folder: Path) -> Trial:
    twice: list[Callable[[random.Random], Trial]] = [forward_tensor, generate_argument]
    return rng.choice([*twice, *twice, same_result, forward_argument, selection, tagger_call, pipeline_call])(rng)


def changed(rng: random.Random, value: Tensor, names: list[str]) -> tuple[str, Any]:
    """Return what was done to a valid tensor, and the result."""
    shape = list(value.shape)
    choice = rng.randrange(14)
    if choice == 0:
        dtype = rng.choice([*INTEGERS, *OTHERS])
        return f"as {dtype}", value.abs().clamp(max=200).to(dtype)
    if choice == 1:
        axis = rng.randrange(len(shape))
        length = rng.choice([0, 1, shape[axis] - 1, shape[axis] + 1])
        return f"axis {axis} cut to {length}", value.new_zeros([*shape[:axis], length, *shape[axis + 1 :]])
    if choice == 2:
        return "with an axis more", value.unsqueeze(rng.randint(0, len(shape)))
    if choice == 3:
        return "with an axis less", value.flatten()[: rng.randint(0, 3)].squeeze()
    if choice == 4:
        return "on meta", value.to("meta")
    if choice == 5:
        return "sparse", value.to_sparse()
    if choice == 6:
        return "as a list", value.tolist()
    if choice == 7:
        return "as an array", value.numpy()
    if choice == 8:
        return "as a parameter", torch.nn.Parameter(value.float())
    if choice == 9:
        return "transposed", value.movedim(0, -1)
    other = rng.choice([None, "a", 3, -1, 0.5, {}, object(), torch.tensor(3)])
    if choice == 10:
        return f"replaced by {type(other).__name__}", other
    number = rng.choice([-1, -100, -101, 64, 5, 10**6, 2**40, -(2**62)])
    if value.is_floating_point():
        number = rng.choice([float("nan"), float("inf"), 1e3, -1e3])
    broken = value.clone()
    broken.view(-1)[rng.randrange(max(1, value.numel()))] = number
    return f"with {number}", broken


def inputs(rng: random.Random, family: str, labels: bool) -> dict[str, Any]:
    batch: dict[str, Any] = make_batch(labels=labels, masks=rng.random() < 0.6)
    if rng.random() < 0.2:
        batch["vision_features"] = model_of(family).get_vision_features(batch.pop("pixel_values")).detach()
    elif rng.random() < 0.2:
        batch["image_features"] = model_of(family).encode_images(batch.pop("pixel_values"))
    if rng.random() < 0.1:
        batch["inputs_embeds"] = model_of(family).embed_text(batch.pop("input_ids")).detach()
    return batch


def forward_tensor(rng: random.Random) -> Trial:
    """One tensor of a batch is not what it should be, in forward or generate."""
    family, generates = rng.choice(["t5", "llama"]), rng.random() < 0.3
    batch = inputs(rng, family, labels=not generates)
    name = rng.choice([name for name, value in batch.items() if isinstance(value, Tensor)])
    what, batch[name] = changed(rng, batch[name], list(batch))
    model, names = model_of(family), [*batch, "input_ids"]  # None for embeddings asks for ids
    if generates:
        return Trial(f"{family} generate, {name} {what}", lambda: model.generate(**batch, **SEARCH), names, whole)
    return Trial(f"{family} forward, {name} {what}", lambda: model(**batch), names, finite)


def finite(output: Any) -> None:
    if output.loss is None:
        return  # no labels
    assert torch.isfinite(output.loss), f"loss {output.loss}"
    assert not output.loss.is_meta, "a loss without a value"


def whole(ids: Any) -> None:
    assert isinstance(ids, Tensor), type(ids)
    assert ids.dtype == torch.int64, ids.dtype


def same_result(rng: random.Random) -> Trial:
    """Another form of the same batch has the same answers."""
    family = rng.choice(["t5", "llama"])
    batch: dict[str, Any] = make_batch(masks=True)
    done = []
    for ids, mask in (("input_ids", "attention_mask"), ("qformer_input_ids", "qformer_attention_mask")):
        for _ in range(rng.randint(0, 3)):
            place = rng.randint(0, batch[ids].shape[1])
            for name, value in ((ids, rng.choice([0, 7, 63])), (mask, 0)):
                tensor = batch[name]
                batch[name] = torch.cat([tensor[:, :place], torch.full((3, 1), value), tensor[:, place:]], 1)
            done.append(f"{ids} padded at {place}")
        dtype = rng.choice([*INTEGERS, torch.bool, torch.float16, torch.float32])
        batch[mask] = batch[mask].to(dtype)
        batch[ids] = batch[ids].to(rng.choice(INTEGERS))
        done.append(f"{mask} as {dtype}, {ids} as {batch[ids].dtype}")
    batch["task_ids"] = batch["task_ids"].to(rng.choice(INTEGERS))

    def check(ids: Tensor) -> None:
        assert torch.equal(ids, answer_of(family)), f"{ids.tolist()}, not {answer_of(family).tolist()}"

    description = f"{family}, {', '.join(done)}"
    return Trial(description, lambda: model_of(family).generate(**batch, **SEARCH), list(batch), check)


def forward_argument(rng: random.Random) -> Trial:
    family = rng.choice(["t5", "llama"])
    known = ("use_cache", "output_hidden_states", "output_attentions", "encoder_outputs", "past_key_values")
    others = ("logits_to_keep", "decoder_inputs_embeds", "decoder_input_ids", "decoder_attention_mask")
    more = ("num_items_in_batch", "position_ids", "cache_position", "image_features", "vision_features", "anything")
    name, value = rng.choice([*known, *others, *more]), rng.choice(VALUES)
    batch = {**make_batch(labels=rng.random() < 0.7), name: value}
    description = f"{family} forward, {name}={value!r:.60}"
    return Trial(description, lambda: model_of(family)(**batch), [name, "labels", "pixel_values"])


def generate_argument(rng: random.Random) -> Trial:
    family = rng.choice(["t5", "llama"])
    given: dict[str, Any] = {}
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([*RULES, *RULES, *UNSUPPORTED, "encoder_outputs", "decoder_input_ids", "anything"])
        given[name] = rng.choice(VALUES)
    batch: dict[str, Any] = without_labels(make_batch())
    bounds = {"max_new_tokens": 3} if not given.keys() & {"max_new_tokens", "max_length", "generation_config"} else {}
    slow = {"num_beams", "num_return_sequences", "max_new_tokens", "max_length", "min_length", "min_new_tokens"}
    if any(name in slow and isinstance(value, int) and value == 10**6 for name, value in given.items()):
        return generate_argument(rng)  # allowed, and would take long
    description = f"{family} generate, {', '.join(f'{name}={value!r:.60}' for name, value in given.items())}"
    return Trial(description, lambda: model_of(family).generate(**{**batch, **bounds, **given}), list(given))


def selection(rng: random.Random) -> Trial:
    features = model_of("t5").encode_images(make_batch()["pixel_values"])
    many = [99, -4, -3, 2, 3, slice(1, 9), slice(0, 3, -1), slice(None, "a"), [0, 0, 1], [0, 99], [True, False, True]]
    more = [[True], (0, 1), (), [], [[0]], None, ..., "a", 1.0, {}, torch.tensor([0, 3]), torch.tensor([[0]])]
    last = [torch.tensor([True, False]), torch.tensor(1, dtype=torch.uint8), torch.tensor([0.0]), np.array([1, 2])]
    index = rng.choice([*many, *more, *last, *VALUES])
    if rng.random() < 0.3:
        return Trial(f"repeated {index!r:.80}", lambda: features.repeat_interleave(index), ["repeats"])

    def check(selected: Any) -> None:
        assert selected.aggregated.shape[1:] == features.aggregated.shape[1:], selected.aggregated.shape

    refusals = (ValueError, TypeError, IndexError)
    return Trial(f"features[{index!r:.80}]", lambda: features[index], ["index"], check, refusals)


def tagger_call(rng: random.Random) -> Trial:
    value = rng.choice(VALUES)
    image = np.zeros((8, 8, 3), np.uint8)
    tagger: Any = make_tagger(["dog", "cat"], [0.5, 0.5])
    kind = rng.randrange(4)
    if kind == 0:
        return Trial(f"batch_size={value!r:.60}", lambda: tagger([image], batch_size=value), ["batch_size"])
    if kind == 1:
        what, pixels = changed(rng, torch.zeros(1, 3, 32, 32), [])
        return Trial(f"logits, pixels {what}", lambda: tagger.logits(pixels), ["pixel_values"])
    name = rng.choice(["tags", "tag_thresholds"])
    setting = rng.choice([value, [value, value], [value], "ab"])
    setattr(tagger, name, setting)
    return Trial(f"{name}={setting!r:.60}", lambda: tagger([image]), ["tag"])


def pipeline_call(rng: random.Random) -> Trial:
    value = rng.choice(VALUES)
    name = rng.choice(["model", "processor", "device", "dtype", "kernel_backend"])
    given: dict[str, Any] = {"model": model_of("t5"), "processor": None, name: value}
    return Trial(f"pipeline, {name}={value!r:.60}", lambda: LionPipeline(**given), [name, "processor", "None"])
