"""Estimate of training memory: weights, gradients, optimizer, and the activations saved for the backward pass.

The model runs on PyTorch's fake tensors, which have shapes but no storage, with few blocks in each stack, to which the
others are equal, so the published sizes are estimated in seconds on any machine. The estimate counts the tensors that
autograd saves, including those of the fused operators. It does not count the temporary memory of an operator, gradients
of activations, or the allocator's unused memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers.initialization import no_init_weights

from lion_fast.configuration_lion import LionConfig
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.training.shortened import Stack, shorten
from lion_fast.training.stages import Stage, convert_frozen, freeze_for_stage

_HALF = torch.float16  # has the size of bfloat16, and Triton's interpreter supports it


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
        nbytes: bytes of all of them.
        begun: bytes saved before each block's first call.
        blocks: bytes that each call of a block saved first.
    """

    known: set[int]
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    nbytes: int = 0
    begun: dict[nn.Module, int] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage
            self.nbytes += storage.nbytes()
        return tensor


@contextmanager
def counting_saved_tensors(model: LionForCausalLM) -> Iterator[SavedTensors]:
    """Count the tensors saved for the backward pass in this context, except the model's parameters and buffers."""
    held = [*model.parameters(), *model.buffers()]
    saved = SavedTensors({tensor.untyped_storage()._cdata for tensor in held})
    begun: list[int] = []

    def before(block: nn.Module, _: Any) -> None:
        begun.append(saved.nbytes)
        saved.begun.setdefault(block, saved.nbytes)

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
    """Estimate the memory of one training process, with or without gradient checkpointing; see `estimates`."""
    kept, recomputed = estimates(config, stage, shapes, precision=precision, shards=shards)
    return recomputed if gradient_checkpointing else kept


def estimates(
    config: LionConfig, stage: Stage, shapes: Shapes, *, precision: Literal["bf16", "fp32"], shards: int = 1
) -> tuple[Estimate, Estimate]:
    """Estimate the memory of one training process, without and with gradient checkpointing.

    Args:
        config: configuration of the stage's model (`building.stage_config`). `kernel_backend` "triton"
            estimates the kernels, which need `TRITON_INTERPRET=1` without a GPU; "torch" estimates PyTorch.
        stage: determines the trained parameters.
        shapes: sizes of a micro-batch.
        precision: `bf16` keeps frozen parameters in 2 bytes and computes under autocast.
        shards: number of processes over which FSDP2 shards parameters, gradients and optimizer.

    Raises:
        ValueError: the configuration's `visual_input` differs from the stage's, or the kernels are not available.
    """
    short, stacks = shorten(config)
    with FakeTensorMode():
        model = _initial_model(short, stage, precision)
        activations, blocks = _saved_by_forward(model, stacks, shapes, precision)
        checkpoint_blocks(model)  # blocks that are recomputed in the backward pass
        inputs, _ = _saved_by_forward(model, stacks, shapes, precision)

    def total(measure: Callable[[Iterable[nn.Parameter]], int]) -> int:
        built = measure(model.parameters())
        return built + sum(
            stack.missing * measure(p for block in stack.blocks(model)[stack.repeated] for p in block.parameters())
            for stack in stacks
        )

    frozen = total(lambda parameters: sum(p.nbytes for p in parameters if not p.requires_grad))
    trained = total(lambda parameters: sum(p.numel() for p in parameters if p.requires_grad))
    count = total(lambda parameters: sum(p.requires_grad for p in parameters))
    kept = Estimate(
        frozen=frozen // shards,
        trained=4 * trained // shards,
        gradients=4 * trained // shards,
        optimizer=(8 * trained) // shards + 4 * count,
        activations=activations,
    )
    return kept, replace(kept, activations=inputs + max(blocks, default=0))


def _initial_model(config: LionConfig, stage: Stage, precision: str) -> LionForCausalLM:
    """Return the stage's model, ready for training, without initial values."""
    with no_init_weights():
        model = LionForCausalLM(config).train()
    model.tie_weights()  # `no_init_weights` leaves this out, too
    freeze_for_stage(model, stage)
    if precision == "bf16":
        convert_frozen(model, _HALF)
    return model


def _saved_by_forward(
    model: LionForCausalLM, stacks: list[Stack], shapes: Shapes, precision: str
) -> tuple[int, list[int]]:
    """Return the bytes that a forward pass saves at full depth, and the bytes of each built block."""
    with torch.autocast("cpu", dtype=_HALF, enabled=precision == "bf16"), counting_saved_tensors(model) as saved:
        loss = model(**_batch(model.config, shapes)).loss  # the saved tensors live as long as the loss
        del loss
    missing = 0
    for stack in stacks:
        blocks, repeated = stack.blocks(model), stack.repeated
        missing += stack.missing * (saved.begun[blocks[repeated.stop]] - saved.begun[blocks[repeated.start]])
    return saved.nbytes + missing, saved.blocks


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
