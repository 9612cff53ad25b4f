"""Estimates of memory against measured runs, and the tensors saved for the backward pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lion_fast.training.memory
import lion_kernels
from lion_fast import LionConfig, LionForCausalLM
from lion_fast.training.memory import (
    SavedTensors,
    Shapes,
    checkpoint_blocks,
    counting_saved_tensors,
    estimate,
    estimates,
)
from lion_fast.training.shortened import shorten
from lion_fast.training.stages import STAGES, freeze_for_stage, parameter_groups
from tests.lion_fast.tiny import make_batch, make_config

SHAPES = Shapes(batch_size=3, text_tokens=7, question_tokens=5, answer_tokens=4)  # of `make_batch`


def config_for(tiny_lion: Path, stage: int, **changes: Any) -> LionConfig:
    config = LionConfig.from_pretrained(tiny_lion).to_dict()
    return LionConfig.from_dict(
        {**config, "visual_input": STAGES[stage - 1].visual_input, "num_adapters": None, **changes}
    )


@pytest.mark.parametrize(("stage", "backend"), [(1, "torch"), (3, "torch"), (3, "triton")])
def test_the_estimate_equals_the_measured_memory(tiny_lion: Path, stage: int, backend: str) -> None:
    """Activations agree to 0.1 %, or 2 % with checkpointing; parameters without a gradient have no AdamW state."""
    config = config_for(tiny_lion, stage, kernel_backend=backend)
    settings: Any = {"precision": "fp32"}
    kept = estimate(config, STAGES[stage - 1], SHAPES, gradient_checkpointing=False, **settings)
    again = estimate(config, STAGES[stage - 1], SHAPES, gradient_checkpointing=True, **settings)
    model = LionForCausalLM(config).train()
    freeze_for_stage(model, STAGES[stage - 1])
    batch = make_batch(labels=True, masks=True)
    with counting_saved_tensors(model) as plain:
        loss = model(**batch).loss
    assert kept.activations == pytest.approx(plain.nbytes, rel=1e-3)
    if backend == "torch":
        loss.backward()
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        optimizer.step()
        state = [value.nbytes for values in optimizer.state.values() for value in values.values()]
        # The text branch of the Q-Former's last layer is unused and gets no gradients.
        unreached = sum(p.nbytes for p in model.parameters() if p.requires_grad and p.grad is None)
        assert kept.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) + unreached
        assert kept.optimizer == pytest.approx(sum(state) + 2 * unreached, rel=1e-3)
    assert kept.frozen + kept.trained == sum(parameter.nbytes for parameter in model.parameters())
    checkpoint_blocks(model)
    with counting_saved_tensors(model) as saved:
        model(**batch)
    assert saved.nbytes < plain.nbytes
    assert again.activations == pytest.approx(saved.nbytes + max(plain.blocks), rel=2e-2)
    assert replace(again, activations=0) == replace(kept, activations=0)


DEEP: dict[str, Any] = {
    "vision_config": {"num_hidden_layers": 5},
    "qformer_config": {"num_hidden_layers": 11, "hidden_dropout_prob": 0.1},  # in pairs, and one
    "aggregator_config": {"feature_layers": [4, 1]},
}


@pytest.mark.parametrize(
    ("family", "stage", "backend", "precision", "text"),
    [
        ("t5", 3, "torch", "bf16", {"num_layers": 5, "num_decoder_layers": 6, "dropout_rate": 0.1}),
        ("llama", 2, "triton", "fp32", {"num_hidden_layers": 6}),
    ],
)
def test_blocks_that_are_not_built_count_in_full(
    family: str, stage: int, backend: str, precision: Any, text: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual_input = STAGES[stage - 1].visual_input
    config = make_config(family, text=text, visual_input=visual_input, kernel_backend=backend, **DEEP)
    assert {stack.path.split(".")[0] for stack in shorten(config)[1]} >= {"vision_model", "language_model"}
    short = estimates(config, STAGES[stage - 1], SHAPES, precision=precision)
    monkeypatch.setattr(lion_fast.training.memory, "shorten", lambda config: (config, []))
    assert short == estimates(config, STAGES[stage - 1], SHAPES, precision=precision)


def test_stacks_are_shortened_by_equal_blocks_only() -> None:
    text = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5}
    config = make_config("qwen2", text=text, **DEEP)
    short, stacks = shorten(config)
    assert [(stack.path, stack.period, stack.missing) for stack in stacks] == [
        ("vision_model.blocks", 1, 1),
        ("qformer.encoder.layer", 2, 1),
    ]
    assert (short.text_config.num_hidden_layers, short.qformer_config.num_hidden_layers) == (6, 9)
    assert config.qformer_config.num_hidden_layers == 11


def test_frozen_parts_keep_no_activations_and_get_no_gradients(tiny_lion: Path) -> None:
    for stage in STAGES[:3]:
        model = LionForCausalLM(config_for(tiny_lion, stage.number)).train()
        freeze_for_stage(model, stage)
        batch = make_batch(labels=True, masks=True)
        with counting_saved_tensors(model) as saved:
            features = model.get_vision_features(batch["pixel_values"])
        assert saved.nbytes == 0
        assert not features.requires_grad
        with counting_saved_tensors(model) as saved:
            kept = kept_by_frozen_projections(model, saved)
            loss = model(**batch).loss
        assert len(kept) > 10
        assert not any(kept)
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def kept_by_frozen_projections(model: LionForCausalLM, saved: SavedTensors) -> list[int]:
    """Record the bytes that each frozen linear layer saves, except its weight."""
    kept: list[int] = []

    def before(*_: Any) -> None:
        kept.append(-saved.nbytes)

    def after(*_: Any) -> None:
        kept[-1] += saved.nbytes

    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    return kept


def kept_by(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[int, int]:
    """Return the bytes that an operator saves besides its inputs, and the number of inputs that it saves."""
    flat = [t for a in (*arguments, *options.values()) for t in (a if isinstance(a, list) else [a])]
    inputs = {t.untyped_storage()._cdata for t in flat if isinstance(t, Tensor)}
    saved: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda t: saved.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        function(*arguments, backend="triton", **options)
    return sum(t.nbytes for key, t in saved.items() if key not in inputs), len(inputs & set(saved))


def test_fused_operators_save_what_is_documented() -> None:
    """Operators save inputs and: hidden activations [T, E r]; attention's output and log-sums; a norm's statistics."""
    B, L, D, E, r, H, Dh = 2, 5, 16, 2, 4, 2, 8

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_()

    x, residual = leaf(B, L, D), leaf(B, L, D)
    adapters = (leaf(E, r, D), leaf(E, r), leaf(E, D, r), leaf(E, D), leaf(2, E, D))
    tasks = torch.tensor([0, 1])
    mixture = kept_by(lion_kernels.mixture_of_adapters, x, *adapters, task_ids=tasks, residual=residual)
    assert mixture[0] == 4 * B * L * E * r
    lora = (leaf(D, D), None, leaf(E, r, D), leaf(E, D, r), leaf(2, E, D))
    assert kept_by(lion_kernels.mixture_of_lora_linear, x, *lora, task_ids=tasks)[0] == 4 * B * L * E * r
    q, k, v = leaf(B, L, H, Dh), leaf(B, L, H, Dh), leaf(B, L, H, Dh)
    attention = 4 * (B * L * H * Dh + B * L * H)
    assert kept_by(lion_kernels.multi_scale_attention, q, [k], [v])[0] == attention
    assert kept_by(lion_kernels.relative_bias_attention, q, k, v, leaf(32, H))[0] == attention
    assert kept_by(lion_kernels.rms_norm, x, leaf(D), 1e-6)[0] == 4 * B * L
    assert kept_by(lion_kernels.residual_layer_norm, x, residual, leaf(D), leaf(D), 1e-6)[0] == 2 * 4 * B * L
    assert kept_by(lion_kernels.gated_gelu, x, residual) == (0, 2)
    ids = torch.randint(0, 9, (B, 3))
    assert kept_by(lion_kernels.assemble_inputs, x, ids, leaf(9, D), leaf(D), 5) == (0, 1)


def test_the_estimate_scales_with_shards_and_batch_size(tiny_lion: Path) -> None:
    config = config_for(tiny_lion, 3, kernel_backend="torch")
    settings: Any = {"precision": "bf16", "gradient_checkpointing": False}
    one = estimate(config, STAGES[2], SHAPES, **settings)
    two = estimate(config, STAGES[2], SHAPES, shards=2, **settings)
    large = estimate(config, STAGES[2], replace(SHAPES, batch_size=6), **settings)
    assert (two.frozen, two.gradients) == (one.frozen // 2, one.gradients // 2)
    assert two.activations == one.activations
    assert 1.5 * one.activations < large.activations < 2 * one.activations
    assert large.total - large.activations == one.total - one.activations


def test_the_command_prints_a_table(tiny_lion: Path, run_cli: Callable) -> None:
    argv = ["memory", "--stage", "3", "batch.per_process=2", "--text-tokens", "9"]
    status, table, _ = run_cli(*argv, model=tiny_lion)
    assert status == 0
    assert "stage 3, bf16, 2 samples a device, 9 tokens of text" in table
    rows = [line for line in table.splitlines() if line.startswith("activations")]
    kept, checkpointed, fused, fused_checkpointed = map(float, rows[0].split()[1:])
    assert fused_checkpointed <= checkpointed < kept
    assert fused < kept
    status, _, err = run_cli(*argv)
    assert status == 2
    assert "model: expected --size, or a LION directory" in err
