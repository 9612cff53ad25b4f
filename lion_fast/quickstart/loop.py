"""The training loop of the stand-ins and the stages."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.quickstart.muon import build_optimizers, matrices_of


@dataclass
class Run:
    """Record of one part of the training; the loss of step i belongs to the kind `kinds[i % len(kinds)]`."""

    name: str
    kinds: tuple[str, ...]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    name: str,
    kinds: tuple[str, ...],
    losses: Iterator[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    max_norm: float = 1.0,
) -> Run:
    """Minimise the losses in `steps` steps, with warm-up, cosine decay to zero, gradient clipping and progress bar."""
    run, start = Run(name, kinds), time.perf_counter()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
    warm_up = max(1, round(0.05 * steps))
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for step in range(steps):
            progress = max(0.0, (step - warm_up) / max(1, steps - warm_up))
            share = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * share
            loss = next(losses)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, max_norm)
            for optimizer in optimizers:
                optimizer.step()
            run.losses.append(loss.item())
            bar.set_postfix_str(f"loss {sum(run.losses[-20:]) / len(run.losses[-20:]):.3f}", refresh=False)
            bar.update()
    run.seconds = time.perf_counter() - start
    return run


def train_lion(
    name: str,
    model: LionForCausalLM,
    kinds: tuple[str, ...],
    batches: Iterator[dict[str, Tensor]],
    steps: int,
    *,
    muon_lr: float,
    adamw_lr: float,
) -> Run:
    """Train a model's parameters that require gradients, on batches with the vision features of all layers."""
    model.train()
    optimizers = build_optimizers([model], matrices_of(model), muon_lr=muon_lr, adamw_lr=adamw_lr)
    # The batches hold all layers; a model without the aggregator reads only the first one, the last layer.
    layers = len(model.config.feature_layers)
    losses = (model(**{**batch, "vision_features": batch["vision_features"][:, :layers]}).loss for batch in batches)
    return train(name, kinds, losses, optimizers, steps)
