"""Training stages: trained parameters, frozen parameters, and parameters carried over to the next stage."""

from typing import Any

import pytest
import torch

from lion_fast import LionForCausalLM
from lion_fast.training.stages import (
    STAGES,
    Stage,
    carry_over,
    copy_frozen,
    freeze_for_stage,
    parameter_groups,
    stage_of,
    stage_of_model,
)
from tests.lion_fast.tiny import make_batch, make_config

NARROW = {"d_model": 24}


def build(stage: Stage, seed: int = 0, **overrides: Any) -> LionForCausalLM:
    torch.manual_seed(seed)
    return LionForCausalLM(make_config(visual_input=stage.visual_input, **overrides))


@torch.no_grad()
def randomise(*models: LionForCausalLM, part: str = "") -> None:
    for name, parameter in (named for model in models for named in model.named_parameters()):
        if part in name:
            parameter.copy_(torch.randn_like(parameter))


# The trained parameters of each stage, by prefixes of their names.
SHARED = ("soft_prompt",)
IMAGE = ("vision_layernorm.", "query_tokens", "qformer.", "qformer_projection.")
REGION = ("aggregator.", "aggregator_layernorm.", "aggregator_projection.")
LAST_OUTPUT = "qformer.encoder.layer.1.output."
TRAINED = {1: SHARED + IMAGE, 2: SHARED + REGION, 3: SHARED + IMAGE + REGION, 4: SHARED + IMAGE + REGION}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_step_changes_exactly_the_trained_parameters(stage: Stage) -> None:
    model = build(stage)
    with torch.no_grad():  # initial zeros would block gradients in the adapters and the aggregator
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    names = freeze_for_stage(model, stage)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    tasks = {"image_level": 1, "region_level": 0}
    batch = make_batch(batch=2, labels=True)
    batch["task_ids"] = torch.tensor([tasks[stage.tasks[0]], tasks[stage.tasks[-1]]])
    model(**batch).loss.backward()
    torch.optim.AdamW(parameter_groups(model, lr=1e-2), eps=1e-30).step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith(TRAINED[stage.number]) or ".adapter." in name}
    assert set(names) == expected
    assert moved <= expected
    # Key biases cancel in the softmax, and the Q-Former's last layer outputs only the queries.
    idle = {name for name in expected - moved if not name.endswith("key.bias")}
    idle -= {name for name in idle if name.startswith(("qformer.encoder.layer.1.intermediate.", LAST_OUTPUT))}
    assert not idle
    assert not any(name.startswith("vision_model.") for name in moved)
    assert all(".adapter." in name for name in moved if name.startswith("language_model."))


def test_single_adapters_become_the_joint_models_adapters() -> None:
    first, second, joint = (build(stage, seed=stage.number) for stage in STAGES[:3])
    randomise(first, second, joint)
    untouched = {name: value.detach().clone() for name, value in joint.named_parameters()}
    written = carry_over(first, STAGES[0], joint, STAGES[2]) + carry_over(second, STAGES[1], joint, STAGES[2])
    sources = {1: dict(first.named_parameters()), 2: dict(second.named_parameters())}
    for name, value in joint.named_parameters():
        if ".adapter.adapters.1." in name:
            expected = sources[1][name.replace("adapters.1.", "adapters.0.")]
        elif ".adapter.adapters.0." in name:
            expected = sources[2][name]
        elif ".adapter.router_ratio" in name:
            expected = untouched[name]
            assert name not in written
        elif name.startswith(IMAGE):
            expected = sources[1][name]
        else:  # the region path, and parameters of both stages, whose last copy is kept
            expected = sources[2][name]
        assert torch.equal(value, expected), name


def test_a_joint_stage_passes_on_everything() -> None:
    third, fourth = build(STAGES[2], seed=1), build(STAGES[3], seed=2)
    written = carry_over(third, STAGES[2], fourth, STAGES[3])
    assert sorted(written) == sorted(name for name, _ in fourth.named_parameters())
    assert all(torch.equal(value, third.get_parameter(name)) for name, value in fourth.named_parameters())


def test_copy_frozen_copies_only_frozen_parameters() -> None:
    source, target = build(STAGES[2], seed=1), build(STAGES[0], seed=2)
    randomise(source, target)
    before = {name: value.detach().clone() for name, value in target.named_parameters()}
    copy_frozen(source, target)
    given = dict(source.named_parameters())
    for name, value in target.named_parameters():
        assert torch.equal(value, before[name] if STAGES[2].trains(name) else given[name]), name
    with pytest.raises(ValueError, match=r"expected \[.*\] \(target\)"):
        copy_frozen(source, build(STAGES[0], text=NARROW))


def test_stages_are_found_by_number_and_by_model() -> None:
    assert [stage_of(number) for number in (1, 2, 3, 4)] == list(STAGES)
    assert [stage_of_model(build(stage)).number for stage in STAGES] == [1, 2, 3, 3]
    with pytest.raises(ValueError, match="stage: expected one of 1, 2, 3, 4, got 5"):
        stage_of(5)


def test_the_joint_model_starts_as_both_experts() -> None:
    """With initial routers, each task uses the adapter of its own stage in every layer."""
    first, second, joint = (build(stage, seed=stage.number) for stage in STAGES[:3])
    randomise(first, second, part=".adapter.")
    carry_over(first, STAGES[0], joint, STAGES[2])
    carry_over(second, STAGES[1], joint, STAGES[2])
    hidden, residual = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    for expert, task in ((first, 1), (second, 0)):
        own = expert.language_model.encoder.block[1].layer[-1].adapter(hidden, residual, None)
        routed = joint.language_model.encoder.block[1].layer[-1].adapter(hidden, residual, torch.full((3,), task))
        torch.testing.assert_close(routed, own, rtol=1e-5, atol=1e-5)


def test_adapters_are_not_carried_over_between_tasks() -> None:
    first, second = build(STAGES[0], seed=1), build(STAGES[1], seed=2)
    written = carry_over(first, STAGES[0], second, STAGES[1])
    assert "soft_prompt" in written
    assert not any(".adapter." in name for name in written)
    assert torch.equal(second.vision_model.pos_embed, first.vision_model.pos_embed)


def test_parameter_groups_equal_the_originals() -> None:
    model = build(STAGES[2])
    freeze_for_stage(model, STAGES[2])
    groups = {group["name"]: group for group in parameter_groups(model, lr=1e-3, weight_decay=0.05, boost_lr_scale=0.2)}
    names = {id(p): name for name, p in model.named_parameters()}
    listed = {group: {names[id(p)] for p in value["params"]} for group, value in groups.items()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name for group in listed.values() for name in group) == sorted(trained)
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "base_decay": (1e-3, 0.05),
        "base_no_decay": (1e-3, 0.0),
        "aggregator_decay": (2e-4, 0.05),
        "aggregator_no_decay": (2e-4, 0.0),
    }
    for name in trained:
        part = "aggregator" if name.startswith("aggregator.") else "base"
        parameter = model.get_parameter(name)
        plain = parameter.ndim < 2 or name.endswith("bias") or "norm" in name.lower()
        assert name in listed[f"{part}_{'no_decay' if plain else 'decay'}"], name
    assert "query_tokens" in listed["base_decay"]
    assert any("router_ratio1" in name for name in listed["base_decay"])
    assert "soft_prompt" in listed["base_no_decay"]


def test_errors_name_the_model_and_the_parameter() -> None:
    first = build(STAGES[0])
    with pytest.raises(ValueError, match="model: expected a model with visual_input 'ALL'"):
        freeze_for_stage(first, STAGES[2])
    with pytest.raises(ValueError, match="target: expected a model with visual_input 'ALL'"):
        carry_over(first, STAGES[0], first, STAGES[2])
    with pytest.raises(ValueError, match=r"soft_prompt: expected \[24\]"):
        carry_over(first, STAGES[0], build(STAGES[2], text=NARROW), STAGES[2])
