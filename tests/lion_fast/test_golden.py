"""LionForCausalLM, through `convert_checkpoint` and `from_pretrained`, against what the original model computed.

The golden values are fp32 results with their own rounding, which the aggregator's softmax magnifies: they are 3.0e-5
(aggregator) and 1.6e-5 (logits) away from the same computation in fp64. Eager attention, in the original's order of
operations, agrees to 1e-5 everywhere; sdpa rounds otherwise, and is asked to be as close as the golden values are to
fp64.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerMultiHeadAttention
from transformers.models.t5.modeling_t5 import T5LayerFF

from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.adapters import MixtureOfAdapters
from lion_fast.conversion import original_name
from lion_fast.images import load_image
from lion_fast.modeling_aggregator import LionAggregator, LionAggregatorProjections
from lion_fast.modeling_text import LionT5LayerFF
from lion_fast.stages import parameter_groups
from lion_reference import LION

TASKS = ("region_level", "image_level")
Batch = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(converted: Path, request: pytest.FixtureRequest) -> LionForCausalLM:
    return LionForCausalLM.from_pretrained(converted, attn_implementation=request.param).eval()


def tolerance(model: LionForCausalLM, bound: float) -> float:
    """`bound` for eager attention; the golden values' own distance from fp64, 3 times that, for others."""
    return bound if model.config.vision_config._attn_implementation == "eager" else 3 * bound


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def trim(ids: list[int], eos: int = 1) -> list[int]:
    """The tokens between the start token and EOS."""
    return ids[1 : ids.index(eos)] if eos in ids else ids[1:]


def test_vision_layers(model: LionForCausalLM, golden) -> None:
    features = model.get_vision_features(golden.expected["pixel_values"])
    for position, layer in enumerate(model.config.feature_layers):
        expected = golden.expected[f"vit.layer{layer}"]
        assert relative_error(features[:, position], expected) < 1e-5
        if model.config.vision_config._attn_implementation == "eager":
            assert torch.equal(features[:, position], expected)


def test_aggregator(model: LionForCausalLM, golden) -> None:
    features = model.get_vision_features(golden.expected["pixel_values"])
    aggregated = model.aggregator(features)
    assert relative_error(aggregated, golden.expected["aggregator.out"]) < tolerance(model, 1e-5)
    projected = model.aggregator_projection(model.aggregator_layernorm(aggregated))
    assert relative_error(projected, golden.expected["aggregator.proj"]) < 1e-5


@pytest.mark.parametrize("task", TASKS)
def test_processor_makes_the_original_text(model: LionForCausalLM, golden, golden_batch: Batch, task: str) -> None:
    batch, expected = golden_batch(task), golden.expected
    assert torch.equal(batch["labels"], expected[f"{task}.labels"])
    prefix = expected["visual_prefix"].shape[1]
    assert torch.equal(batch["attention_mask"], expected[f"{task}.attention_mask"][:, prefix:])
    assert torch.equal(model.embed_text(batch["input_ids"]), expected[f"{task}.inputs_embeds"][:, prefix:])


@pytest.mark.parametrize("size", [56, 224])
def test_processor_makes_the_original_pixels(converted: Path, golden, size: int) -> None:
    processor = LionProcessor.from_pretrained(converted)
    image = load_image(golden.directory / "image.png")
    pixels = processor.image_processor(image, size={"height": size, "width": size}, return_tensors="pt")
    assert torch.equal(pixels["pixel_values"][0], golden.expected[f"image.eval_processor_{size}"])


@pytest.mark.parametrize("task", TASKS)
def test_forward(model: LionForCausalLM, golden, golden_batch: Batch, task: str) -> None:
    out, expected = model(**golden_batch(task)), golden.expected
    assert relative_error(out.visual_prefix, expected["visual_prefix"]) < 1e-5
    assert relative_error(out.language_model_outputs.encoder_last_hidden_state, expected[f"{task}.enc"]) < 1e-5
    assert relative_error(out.logits, expected[f"{task}.logits"]) < 1e-5
    assert out.loss.item() == pytest.approx(expected[f"{task}.loss"].item(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_gradients(model: LionForCausalLM, golden, golden_batch: Batch, task: str) -> None:
    model.zero_grad()
    model(**golden_batch(task)).loss.backward()
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
        scale = max(grad.norm(), 1e-3 * total)
        assert (gradients[name] - grad).norm() / scale < tolerance(model, 1e-4), name


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
    assert [trim(row) for row in ids.tolist()] == [trim(row) for row in expected.tolist()]


def test_generated_text(model: LionForCausalLM, converted: Path, golden, golden_batch: Batch) -> None:
    batch = golden_batch("region_level")
    del batch["labels"]
    ids = model.generate(**batch, max_new_tokens=20)  # 5 beams and penalty 1.5 are the defaults
    texts = LionProcessor.from_pretrained(converted).batch_decode(ids, skip_special_tokens=True)
    assert texts == golden.meta["region_level.generate.beams5.rp1.5"]


def test_a_mixed_batch_is_the_two_tasks_sample_by_sample(model: LionForCausalLM, golden, golden_batch: Batch) -> None:
    batch = golden_batch("image_level")
    batch["task_ids"] = torch.tensor([0, 1, 1, 0])
    logits = model(**batch).logits
    for sample, task_id in enumerate(batch["task_ids"].tolist()):
        expected = golden.expected[f"{TASKS[task_id]}.logits"][sample]
        assert relative_error(logits[sample], expected) < tolerance(model, 1e-5)
    del batch["labels"]
    ids = model.generate(**batch, num_beams=5, repetition_penalty=1.0, max_new_tokens=20).tolist()
    for sample, task_id in enumerate(batch["task_ids"].tolist()):
        expected = golden.expected[f"{TASKS[task_id]}.generate.beams5.rp1.0"][sample].tolist()
        assert trim(ids[sample]) == trim(expected)


def test_fp64_agrees_with_the_reference(converted: Path, golden, golden_batch: Batch) -> None:
    """Two implementations, one mathematics; transformers' T5 computes softmax and norms in fp32, whatever the dtype."""
    reference = LION.from_checkpoint_files(
        vit=golden.directory / "eva_vit_tiny.pth",
        llm=golden.directory / "flan-t5-tiny",
        bert=golden.directory / "bert-tiny",
        lion=golden.directory / "LION-tiny.pth",
        dtype=torch.float64,
    )
    model = LionForCausalLM.from_pretrained(converted, dtype=torch.float64).eval()
    batch = golden_batch("image_level")
    batch |= {"pixel_values": batch["pixel_values"].double(), "task_ids": torch.tensor([0, 1, 1, 0])}
    got, expected = model(**batch), reference.eval()(**batch)
    assert relative_error(got.visual_prefix, expected.visual_prefix) < 1e-13
    assert relative_error(got.logits, expected.logits) < 2e-6


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
        updates = [a.scale * a.up_proj(F.relu(a.down_proj(hidden_states))) for a in self.adapters]
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


def train_twelve_steps(model: LionForCausalLM, golden, golden_batch: Batch) -> list[float]:
    """The golden run: AdamW, tasks in turn, dropout off."""
    trainable = set(golden.meta["trainable"])
    for name, parameter in model.eval().named_parameters():
        parameter.requires_grad_(original_name(name) in trainable)
    recipe = golden.meta["adamw"]
    groups = parameter_groups(model, weight_decay=recipe["weight_decay"], lr=recipe["lr"])
    assert sorted(len(group["params"]) for group in groups) == sorted(golden.meta["group_sizes"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    losses = []
    for step in range(len(recipe["losses"])):
        loss = model(**golden_batch("image_level" if step % 2 == 0 else "region_level")).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.usefixtures("_original_order")
def test_twelve_training_steps_in_the_original_order(
    converted: Path, golden, golden_batch: Batch, rounds_as_golden: bool
) -> None:
    """The curve is chaotic: rounding of 1e-7 grows to 1e-2 in 12 steps. So it is asked of equal rounding only."""
    if not rounds_as_golden:
        pytest.skip("this CPU or build of torch rounds otherwise than the golden data's")
    model = LionForCausalLM.from_pretrained(converted, attn_implementation="eager")
    losses = train_twelve_steps(model, golden, golden_batch)
    assert losses == pytest.approx(golden.meta["adamw"]["losses"], rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_twelve_training_steps(converted: Path, golden, golden_batch: Batch, attention: str) -> None:
    """The model as users have it, with rounding of its own: close at first, and within what chaos leaves later.

    A wrong learning rate, optimizer group or order of tasks is farther off than 2e-2.
    """
    model = LionForCausalLM.from_pretrained(converted, attn_implementation=attention)
    losses, expected = train_twelve_steps(model, golden, golden_batch), golden.meta["adamw"]["losses"]
    assert losses[:2] == pytest.approx(expected[:2], rel=3e-5)
    assert losses == pytest.approx(expected, rel=2e-2)
