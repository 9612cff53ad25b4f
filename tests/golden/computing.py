"""Computes with a subject what the original computed, for `comparison` with the golden values."""

from itertools import product

import torch
from torch import Tensor

from tests.golden.data import Golden
from tests.golden.subjects import LEARNING_RATE, Subject

PENALTIES = (1.0, 1.5)


def vision(subject: Subject, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the states of three vision layers and the aggregator's output."""
    golden = subject.golden
    with torch.no_grad():
        states = subject.vision_layers(golden.batch(golden.tasks[0], dtype)["pixel_values"])
        results = {f"vit.layer{layer}": state for layer, state in states.items()}
        if "aggregator.out" in golden.expected:
            results["aggregator.out"] = subject.aggregated(states)
    return results


def forward_and_backward(
    subject: Subject, dtype: torch.dtype, tasks: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Return prefix, encoder output, logits, loss and all trained parameters' gradients of `tasks` (None for all)."""
    golden, results = subject.golden, {}
    for task in golden.tasks if tasks is None else tasks:
        subject.model.zero_grad()
        output = subject.model(**golden.batch(task, dtype), labels=golden.expected["labels"])
        output.loss.backward()
        results["visual_prefix"] = output.visual_prefix
        results[f"{task}.encoder"] = subject.encoder_output(output)
        results[f"{task}.logits"], results[f"{task}.loss"] = output.logits, output.loss
        for name in golden.meta["trainable"]:
            parameter = subject.parameters[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            results[f"{task}.grad.{name}"] = gradient.clone()
    return results


def train(subject: Subject, dtype: torch.dtype, steps: int = 12) -> dict[str, Tensor]:
    """Train with AdamW and alternating tasks; return the losses, and after all 12 steps the trained parameters."""
    golden, results = subject.golden, {}
    groups = subject.groups()
    sizes = sorted(len(group["params"]) for group in groups if group["params"])
    assert sizes == sorted(size for size in golden.meta["group_sizes"] if size)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999))
    for step in range(steps):
        task = "region_level" if step % 2 else "image_level"
        loss = subject.model(**golden.batch(task, dtype), labels=golden.expected["labels"]).loss
        results[f"losses.{step}"] = loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if steps == len(golden.meta["losses"]):
        results |= {f"after.{name}": subject.parameters[name] for name in golden.meta["trainable"]}
    return results


def tokens(subject: Subject, dtype: torch.dtype, beams: tuple[int, ...]) -> dict[str, list[list[int]]]:
    """Return each sample's generated ids, by task, number of beams and repetition penalty."""
    results = {}
    for task, num_beams, penalty in product(subject.golden.tasks, beams, PENALTIES):
        settings = {"num_beams": num_beams, "repetition_penalty": penalty, "max_new_tokens": 20}
        ids = subject.generate(subject.golden.batch(task, dtype), **settings)
        results[f"{task}.generate.beams{num_beams}.rp{penalty}"] = until_end(ids)
    return results


def golden_tokens(golden: Golden, beams: tuple[int, ...]) -> dict[str, list[list[int]]]:
    keys = (f"{task}.generate.beams{n}.rp{penalty}" for task, n, penalty in product(golden.tasks, beams, PENALTIES))
    return {key: until_end(golden.expected[key]) for key in keys}


def until_end(ids: Tensor, start: int = 0, end: int = 1) -> list[list[int]]:
    """Return the ids without the start token and without the padding after EOS, which may differ."""
    rows = []
    for first, *row in ids.tolist():
        assert first == start
        rows.append(row[: row.index(end) + 1] if end in row else row)
    return rows
