"""Estimate of training memory: weights, gradients, optimizer, and the activations saved for the backward pass.

The model runs on PyTorch's fake tensors, which have shapes but no storage, so the published sizes are estimated in
seconds on any machine. The estimate counts the tensors that autograd saves, including those of the fused operators. It
does not count the temporary memory of an operator, gradients of activations, or the allocator's unused memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers.initialization import no_init_weights

from lion_fast.configuration_lion import LionConfig
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.training.stages import Stage, convert_frozen, freeze_for_stage


@dataclass(frozen=True)
class Shapes:
    """Sizes of a batch on one device: samples, and tokens of the language model's text, the question and the answer.

    Args:
        question_tokens: tokens of the Q-Former's text.
    """

    batch_size: int
    text_tokens: int = 128
    question_tokens: int = 128
    answer_tokens: int = 128


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Args:
        frozen, trained: weights.
        gradients: gradients of the trained weights, float32.
        optimizer: AdamW's two moments of the trained weights, float32.
        activations: tensors saved for the backward pass; with checkpointing, the inputs of all blocks and the
            activations of the largest block.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations


@dataclass
class SavedTensors:
    """Tensors saved by autograd, by storage, so that tensors with a common storage count once.

    Args:
        known: storages that are not counted, such as those of parameters.
        blocks: bytes that each call of a block saved first.
    """

    known: set[int]
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor


@contextmanager
def counting_saved_tensors(model: LionForCausalLM) -> Iterator[SavedTensors]:
    """Count the tensors saved for the backward pass in this context, except the model's parameters and buffers."""
    held = [*model.parameters(), *model.buffers()]
    saved = SavedTensors({tensor.untyped_storage()._cdata for tensor in held})
    begun: list[int] = []

    def before(*_: Any) -> None:
        begun.append(saved.nbytes)

    def after(*_: Any) -> None:
        saved.blocks.append(saved.nbytes - begun.pop())

    with ExitStack() as stack:
        for block in model.blocks():
            stack.callback(block.register_forward_pre_hook(before).remove)
            stack.callback(block.register_forward_hook(after).remove)
        stack.enter_context(saved_tensors_hooks(saved.add, lambda tensor: tensor))
        yield saved


def estimate(
    config: LionConfig,
    stage: Stage,
    shapes: Shapes,
    *,
    precision: Literal["bf16", "fp32"],
    gradient_checkpointing: bool,
    shards: int = 1,
) -> Estimate:
    """Estimate the memory of one training process.

    Args:
        config: configuration of the stage's model (`building.stage_config`). `kernel_backend` "triton"
            estimates the kernels, which need `TRITON_INTERPRET=1` without a GPU; "torch" estimates PyTorch.
        stage: determines the trained parameters.
        shapes: sizes of a micro-batch.
        precision: `bf16` keeps frozen parameters in 2 bytes and computes under autocast.
        gradient_checkpointing: whether blocks are recomputed in the backward pass.
        shards: number of processes over which FSDP2 shards parameters, gradients and optimizer.

    Raises:
        ValueError: the configuration's `visual_input` differs from the stage's, or the kernels are not available.
    """
    activations, blocks, model = _saved_by_forward(config, stage, shapes, precision, checkpointed=False)
    if gradient_checkpointing:
        activations = _saved_by_forward(config, stage, shapes, precision, checkpointed=True)[0] + max(blocks, default=0)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return Estimate(
        frozen=frozen // shards,
        trained=4 * sum(trained) // shards,
        gradients=4 * sum(trained) // shards,
        optimizer=(8 * sum(trained)) // shards + 4 * len(trained),
        activations=activations,
    )


def _saved_by_forward(
    config: LionConfig, stage: Stage, shapes: Shapes, precision: str, *, checkpointed: bool
) -> tuple[int, list[int], LionForCausalLM]:
    """Return the bytes saved by a forward pass, the bytes of each block, and the model on fake tensors."""
    # float16 has the size of bfloat16, and Triton's interpreter supports it.
    half = torch.float16
    with FakeTensorMode():
        with no_init_weights():
            model = LionForCausalLM(config).train()
        model.tie_weights()  # `no_init_weights` leaves this out, too
        freeze_for_stage(model, stage)
        if checkpointed:
            checkpoint_blocks(model)
        if precision == "bf16":
            convert_frozen(model, half)
        with torch.autocast("cpu", dtype=half, enabled=precision == "bf16"), counting_saved_tensors(model) as saved:
            loss = model(**_batch(config, shapes)).loss  # the saved tensors live as long as the loss
            del loss
    return saved.nbytes, saved.blocks, model


def checkpoint_blocks(model: LionForCausalLM) -> None:
    """Recompute blocks in the backward pass (gradient checkpointing)."""
    # transformers 5.17 has only the older name, which warns in later versions.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})


def _batch(config: LionConfig, shapes: Shapes) -> dict[str, Tensor]:
    size = config.vision_config.image_size

    def ids(*length: int) -> Tensor:
        return torch.empty(shapes.batch_size, *length, dtype=torch.long)

    return {
        "pixel_values": torch.empty(shapes.batch_size, 3, size, size),
        "input_ids": ids(shapes.text_tokens),
        "attention_mask": ids(shapes.text_tokens),
        "qformer_input_ids": ids(shapes.question_tokens),
        "qformer_attention_mask": ids(shapes.question_tokens),
        "task_ids": ids(),
        "labels": ids(shapes.answer_tokens),
    }


def as_table(columns: dict[str, Estimate]) -> str:
    """Format estimates as a table with one column each."""
    rows = ("frozen", "trained", "gradients", "optimizer", "activations", "total")
    labels = ("frozen weights", "trained weights", "gradients", "optimizer", "activations", "total")
    width = max(12, *(len(name) + 2 for name in columns))
    unit, scale = ("GiB", 2**30) if max(e.total for e in columns.values()) >= 2**30 else ("MiB", 2**20)
    lines = [f"{f'{unit} on a device':18}" + "".join(f"{name:>{width}}" for name in columns)]
    for row, label in zip(rows, labels, strict=True):
        lines.append(f"{label:18}" + "".join(f"{getattr(e, row) / scale:>{width}.2f}" for e in columns.values()))
    return "\n".join(lines)
