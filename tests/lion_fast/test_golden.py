"""LionForCausalLM, through `convert_checkpoint` and `from_pretrained`, against what the original model computed.

The golden values are fp32 results of one CPU, with rounding that the aggregator's softmax magnifies, and another CPU
rounds as much again in another direction: `tests/rounding.py` has what is allowed for it, from fp64 (`lion_reference`)
and for gradients and losses from the golden values. Only eager attention, in the original's order of operations on a
CPU that rounds as the original's, is also held to the golden values themselves: bit for bit in the vision tower, then
to 1e-5, and to 1e-4 for gradients.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerMultiHeadAttention
from transformers.models.t5.modeling_t5 import T5LayerFF

from lion_fast import LionForCausalLM
from lion_fast.conversion.lion import original_name
from lion_fast.model.adapters import MixtureOfAdapters
from lion_fast.model.aggregator import LionAggregator, LionAggregatorProjections
from lion_fast.model.text import LionT5LayerFF
from lion_kernels.core.backend import interpreting
from lion_reference import LION, LIONOutput
from tests.golden.computing import until_end
from tests.golden.subjects import float64_throughout, lion_groups, reference_groups
from tests.interpreter import large_tiles
from tests.lion_fast.gradients import train
from tests.rounding import GOLDEN_DISTANCE, WORST, expect_golden_curve, expect_within, relative_error

TASKS = ("region_level", "image_level")
Batch = Callable[[str], dict[str, Tensor]]


class Exact(NamedTuple):
    """What the reference computes in fp64."""

    vision: dict[int, Tensor]
    aggregated: Tensor
    projected: Tensor
    outputs: dict[str, LIONOutput]


def load_reference(files: dict[str, Path]) -> LION:
    return LION.from_checkpoint_files(**files, dtype=torch.float64)


def in_fp64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "pixel_values": batch["pixel_values"].double()}


@pytest.fixture(scope="module")
def exact(golden, golden_files: dict[str, Path], golden_batch: Batch) -> Exact:
    reference = load_reference(golden_files)
    with torch.no_grad():
        vision = reference.visual_encoder(golden.expected["pixel_values"].double())
        aggregated = reference.fusion_adapter(vision[38], [vision[28], vision[18]])
        projected = reference.adapter_proj(reference.ln_adapter(aggregated))
        outputs = {task: reference(**in_fp64(golden_batch(task))) for task in TASKS}
    return Exact(vision, aggregated, projected, outputs)


SETTINGS = {
    "sdpa": {"attn_implementation": "sdpa"},
    "eager": {"attn_implementation": "eager"},
    "kernels": {"kernel_backend": "triton"},
}
ON_PYTORCH = pytest.mark.parametrize("model", ["sdpa", "eager"], indirect=True)
SLOW_TESTS = pytest.mark.skipif(
    not os.environ.get("LION_SLOW_TESTS"), reason="minutes in Triton's interpreter: set LION_SLOW_TESTS"
)
# tests/golden computes its smaller model on the kernels in every run without a GPU.
KERNELS = pytest.param("kernels", marks=SLOW_TESTS)


@pytest.fixture(scope="module", params=["sdpa", "eager", KERNELS])
def model(converted: Path, request: pytest.FixtureRequest) -> LionForCausalLM:
    if request.param == "kernels" and not interpreting():
        pytest.skip("these models are on the CPU, where kernels run in Triton's interpreter only")
    return LionForCausalLM.from_pretrained(converted, **SETTINGS[request.param]).eval()


@pytest.fixture(scope="module", autouse=True)
def _large_tiles() -> Iterator[None]:
    with large_tiles():
        yield


@pytest.fixture
def as_golden(model: LionForCausalLM, request: pytest.FixtureRequest) -> bool:
    """Whether the model computes in the original's order on a CPU that rounds alike."""
    eager = model.config.vision_config._attn_implementation == "eager"
    return eager and request.getfixturevalue("rounds_as_golden")


def expect_close(name: str, got: Tensor, golden: Tensor, exact: Tensor, as_golden: bool) -> None:
    expect_within(name, relative_error(got, exact))
    if as_golden:
        assert relative_error(got, golden) < 1e-5


def test_golden_values_have_rounding_of_their_own(golden, exact: Exact) -> None:
    """Files against fp64, so the same on every machine: what is allowed is the rounding of the constants' digits."""
    expected, outputs = golden.expected, exact.outputs
    distances = {
        "vision": max(relative_error(expected[f"vit.layer{layer}"], exact.vision[layer]) for layer in (38, 28, 18)),
        "aggregator": relative_error(expected["aggregator.out"], exact.aggregated),
        "projected": relative_error(expected["aggregator.proj"], exact.projected),
        "prefix": relative_error(expected["visual_prefix"], outputs["image_level"].visual_prefix),
        "encoder": max(relative_error(expected[f"{task}.enc"], outputs[task].encoder_output) for task in TASKS),
        "logits": max(relative_error(expected[f"{task}.logits"], outputs[task].logits) for task in TASKS),
        "loss": max(relative_error(expected[f"{task}.loss"].squeeze(), outputs[task].loss) for task in TASKS),
    }
    assert distances == pytest.approx(GOLDEN_DISTANCE, rel=5e-3)
    assert all(distance <= WORST[name] for name, distance in distances.items()), "golden values are fp32's too"


def test_vision_layers_and_aggregator(model: LionForCausalLM, golden, exact: Exact, as_golden: bool) -> None:
    features = model.get_vision_features(golden.expected["pixel_values"])
    for position, layer in enumerate(model.config.feature_layers):
        expected = golden.expected[f"vit.layer{layer}"]
        expect_close("vision", features[:, position], expected, exact.vision[layer], as_golden)
        if as_golden:
            assert torch.equal(features[:, position], expected)
    aggregated = model.aggregator(features)
    expect_close("aggregator", aggregated, golden.expected["aggregator.out"], exact.aggregated, as_golden)
    projected = model.aggregator_projection(model.aggregator_layernorm(aggregated))
    expect_close("projected", projected, golden.expected["aggregator.proj"], exact.projected, as_golden)


@pytest.mark.parametrize("task", TASKS)
def test_processor_makes_the_original_text(model: LionForCausalLM, golden, golden_batch: Batch, task: str) -> None:
    batch, expected = golden_batch(task), golden.expected
    assert torch.equal(batch["labels"], expected[f"{task}.labels"])
    prefix = expected["visual_prefix"].shape[1]
    assert torch.equal(batch["attention_mask"], expected[f"{task}.attention_mask"][:, prefix:])
    assert torch.equal(model.embed_text(batch["input_ids"]), expected[f"{task}.inputs_embeds"][:, prefix:])


@pytest.mark.parametrize("task", TASKS)
def test_forward_and_gradients(
    model: LionForCausalLM, golden, golden_batch: Batch, exact: Exact, as_golden: bool, task: str
) -> None:
    model.zero_grad()
    out, reference = model(**golden_batch(task)), exact.outputs[task]
    encoded = out.language_model_outputs.encoder_last_hidden_state
    expect_close("prefix", out.visual_prefix, golden.expected["visual_prefix"], reference.visual_prefix, as_golden)
    expect_close("encoder", encoded, golden.expected[f"{task}.enc"], reference.encoder_output, as_golden)
    expect_close("logits", out.logits, golden.expected[f"{task}.logits"], reference.logits, as_golden)
    expect_within("loss", relative_error(out.loss, golden.expected[f"{task}.loss"].squeeze()))
    out.loss.backward()
    prefix = f"{task}.grad."
    expected = {name.removeprefix(prefix): grad for name, grad in golden.expected.items() if name.startswith(prefix)}
    gradients = {original_name(name): parameter.grad for name, parameter in model.named_parameters()}
    assert set(expected) == set(golden.meta["trainable"])
    # The adapters' scales are sums that nearly cancel, one number each: they are compared as one vector.
    for values in (expected, gradients):
        values["scales"] = torch.cat([values.pop(name) for name in sorted(values) if name.endswith(".scale")])
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        # A key's bias has no influence on a softmax: what stands there is rounding, so there is a floor.
        error = ((gradients[name] - grad).norm() / max(grad.norm(), 1e-3 * total)).item()
        expect_within("gradients", error)
        assert not as_golden or error < 1e-4, name


@ON_PYTORCH
@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.5])
@pytest.mark.parametrize("task", TASKS)
def test_generated_tokens(
    model: LionForCausalLM, golden, golden_batch: Batch, task: str, repetition_penalty: float, beams: int
) -> None:
    batch = golden_batch(task)
    del batch["labels"]
    ids = model.generate(**batch, num_beams=beams, repetition_penalty=repetition_penalty, max_new_tokens=20)
    expected = golden.expected[f"{task}.generate.beams{beams}.rp{repetition_penalty}"]
    assert until_end(ids) == until_end(expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["kernels"], indirect=True)
@pytest.mark.parametrize(
    ("task", "sample", "repetition_penalty", "beams"),
    [
        ("image_level", 3, 1.5, 5),
        pytest.param("region_level", 0, 1.0, 1, marks=SLOW_TESTS),
        pytest.param("region_level", 0, 1.0, 5, marks=SLOW_TESTS),
        pytest.param("region_level", 1, 1.5, 1, marks=SLOW_TESTS),
        pytest.param("region_level", 1, 1.5, 5, marks=SLOW_TESTS),
        pytest.param("image_level", 2, 1.0, 1, marks=SLOW_TESTS),
        pytest.param("image_level", 2, 1.0, 5, marks=SLOW_TESTS),
        pytest.param("image_level", 3, 1.5, 1, marks=SLOW_TESTS),
    ],
)
def test_generated_tokens_of_one_sample(
    model: LionForCausalLM, golden, golden_batch: Batch, task: str, sample: int, repetition_penalty: float, beams: int
) -> None:
    batch = {name: value[sample : sample + 1] for name, value in golden_batch(task).items()}
    del batch["labels"]
    ids = model.generate(**batch, num_beams=beams, repetition_penalty=repetition_penalty, max_new_tokens=20)
    expected = golden.expected[f"{task}.generate.beams{beams}.rp{repetition_penalty}"]
    assert until_end(ids) == until_end(expected[sample : sample + 1])


@ON_PYTORCH
def test_a_mixed_batch_is_the_two_tasks_sample_by_sample(
    model: LionForCausalLM, golden, golden_batch: Batch, exact: Exact, as_golden: bool
) -> None:
    batch = golden_batch("image_level")
    batch["task_ids"] = torch.tensor([0, 1, 1, 0])
    logits = model(**batch).logits
    for sample, task_id in enumerate(batch["task_ids"].tolist()):
        task = TASKS[task_id]
        expected, reference = golden.expected[f"{task}.logits"][sample], exact.outputs[task].logits[sample]
        expect_close("logits of one sample", logits[sample], expected, reference, as_golden)
    del batch["labels"]
    ids = model.generate(**batch, num_beams=5, repetition_penalty=1.0, max_new_tokens=20)
    for sample, task_id in enumerate(batch["task_ids"].tolist()):
        expected = golden.expected[f"{TASKS[task_id]}.generate.beams5.rp1.0"]
        assert until_end(ids)[sample] == until_end(expected)[sample]


@float64_throughout()
def test_fp64_agrees_with_the_reference(converted: Path, golden_files: dict[str, Path], golden_batch: Batch) -> None:
    """Two implementations, one mathematics, and a batch that mixes tasks."""
    model = LionForCausalLM.from_pretrained(converted, dtype=torch.float64).eval()
    batch = in_fp64(golden_batch("image_level")) | {"task_ids": torch.tensor([0, 1, 1, 0])}
    got, expected = model(**batch), load_reference(golden_files)(**batch)
    for name in ("visual_prefix", "logits", "loss"):
        assert relative_error(getattr(got, name), getattr(expected, name)) < 1e-12, name


@pytest.fixture
def _original_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make eager attention, Q-Former and adapters add up in the original's order; the mathematics stay the same."""

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return (weights @ value).transpose(1, 2)

    def aggregator_attention(self: LionAggregatorProjections, hidden_states: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.query(hidden_states), self.key(context), self.value(context)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        return attention(*heads).flatten(2)

    def aggregator(self: LionAggregator, feature_maps: Tensor) -> Tensor:
        hidden_states, *others = (feature_map.contiguous() for feature_map in feature_maps.unbind(1))
        for block, feature_map in zip(self.blocks, others, strict=True):
            hidden_states = block(hidden_states, feature_map)
        return hidden_states

    def qformer_attention(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **_
    ) -> tuple[Tensor, None]:
        crossed = encoder_hidden_states is not None
        context, mask = (encoder_hidden_states, encoder_attention_mask) if crossed else (hidden_states, attention_mask)
        key, value, query = self.key(context), self.value(context), self.query(hidden_states)
        heads = [x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for x in (query, key, value)]
        return attention(*heads, mask).contiguous().flatten(2), None

    def adapters(self: MixtureOfAdapters, hidden_states: Tensor, task_ids: Tensor) -> Tensor:
        updates = []
        for scale, *weights in (adapter() for adapter in self.adapters):
            updates.append(scale * F.linear(F.relu(F.linear(hidden_states, *weights[:2])), *weights[2:]))
        ratios = [ratio[task_ids].unsqueeze(1) for ratio in (self.router_ratio1, self.router_ratio2)]
        return ratios[0] * updates[0] + ratios[1] * updates[1]

    def feed_forward(self: LionT5LayerFF, hidden_states: Tensor, task_ids: Tensor) -> Tensor:
        update = self.adapter(hidden_states, task_ids)
        return T5LayerFF.forward(self, hidden_states) + update

    monkeypatch.setattr(LionAggregatorProjections, "forward", aggregator_attention)
    monkeypatch.setattr(LionAggregator, "forward", aggregator)
    monkeypatch.setattr(InstructBlipQFormerMultiHeadAttention, "forward", qformer_attention)
    monkeypatch.setattr(MixtureOfAdapters, "forward", adapters)
    monkeypatch.setattr(LionT5LayerFF, "forward", feed_forward)


def train_twelve_steps(
    model: nn.Module, groups: list[dict], golden, golden_batch: Batch, dtype: torch.dtype = torch.float32
) -> list[float]:
    """The golden run: AdamW, tasks in turn, dropout off."""
    recipe = golden.meta["adamw"]
    assert sorted(len(group["params"]) for group in groups) == sorted(golden.meta["group_sizes"])
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=(0.9, 0.999))
    batches = [golden_batch("region_level" if step % 2 else "image_level") for step in range(len(recipe["losses"]))]
    return train(model, ({**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches), optimizer)


def groups_of(model: LionForCausalLM, golden) -> list[dict]:
    recipe = golden.meta["adamw"]
    return lion_groups(model.eval(), golden.meta["trainable"], recipe["lr"], recipe["weight_decay"])


@float64_throughout()
def test_twelve_training_steps_in_fp64_are_the_reference_s(
    converted: Path, golden, golden_files: dict[str, Path], golden_batch: Batch
) -> None:
    """The curve is chaotic: a difference grows by 1e5 in 12 steps. From fp64's 1e-15 that leaves 1e-10, here 7e-11."""
    model = LionForCausalLM.from_pretrained(converted, dtype=torch.float64)
    reference = load_reference(golden_files)
    losses = train_twelve_steps(model, groups_of(model, golden), golden, golden_batch, torch.float64)
    groups = reference_groups(reference, golden.meta["trainable"], golden.meta["adamw"]["weight_decay"])
    expected = train_twelve_steps(reference, groups, golden, golden_batch, torch.float64)
    assert losses == pytest.approx(expected, rel=1e-8)
    expect_golden_curve(losses, golden.meta["adamw"]["losses"])  # which started 1e-7 away, and comes as far as 1.1e-2


@pytest.mark.usefixtures("_original_order")
def test_twelve_training_steps_in_the_original_order(
    converted: Path, golden, golden_batch: Batch, rounds_as_golden: bool
) -> None:
    """Equal operations in equal order on a CPU that rounds alike: the golden curve itself."""
    if not rounds_as_golden:
        pytest.skip("this CPU or build of torch rounds otherwise than the golden data's")
    model = LionForCausalLM.from_pretrained(converted, attn_implementation="eager")
    losses = train_twelve_steps(model, groups_of(model, golden), golden, golden_batch)
    assert losses == pytest.approx(golden.meta["adamw"]["losses"], rel=1e-4)


@pytest.mark.parametrize("setting", ["sdpa", "eager", KERNELS])
def test_twelve_training_steps(converted: Path, golden, golden_batch: Batch, setting: str) -> None:
    """The model as users have it, with rounding of its own: close at first, and within what chaos leaves later.

    A learning rate one per cent off, half the rate in one group, or tasks in another order are out of bounds by the
    second step. Weight decay is not: its effect in 12 steps is within rounding's, so fp64 above has to show it.
    """
    if setting == "kernels" and not (os.environ.get("LION_SLOW_TESTS") and interpreting()):
        pytest.skip("minutes in Triton's interpreter: set LION_SLOW_TESTS where there is no GPU")
    model = LionForCausalLM.from_pretrained(converted, **SETTINGS[setting])
    losses = train_twelve_steps(model, groups_of(model, golden), golden, golden_batch)
    expect_golden_curve(losses, golden.meta["adamw"]["losses"])
