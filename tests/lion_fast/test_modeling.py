"""LionForCausalLM on small random models: every language model and visual input, training, generation, saving."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput

from lion_fast import LionForCausalLM
from lion_fast.model.adapters import MixtureOfAdapters
from lion_fast.model.validation import expect_ids
from lion_fast.modeling_lion import token_cross_entropy
from lion_kernels.core.backend import interpreting
from tests.extras import needs
from tests.lion_fast.gradients import gradients_of, train
from tests.lion_fast.tiny import FAMILIES, make_batch, make_config, make_model, without_labels
from tests.rounding import LOSS_TWO_WAYS, TWO_WAYS

INTERPRETED = pytest.mark.skipif(
    not interpreting(), reason="modules on the CPU, where kernels run in Triton's interpreter only"
)


@pytest.mark.parametrize("visual_input", ["ALL", "QFORMER", "AGGREGATOR"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_learns_and_generates(family: str, visual_input: str) -> None:
    model, batch = make_model(family, visual_input=visual_input), make_batch(labels=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision_model"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = train(model, [batch] * 8, optimizer)
    assert losses[-1] < 0.7 * losses[0]
    generated = model.generate(**without_labels(batch), num_beams=2, max_new_tokens=5)
    assert generated.shape[0] == 3
    assert 1 <= generated.shape[1] <= 6
    out = model(**batch)
    assert out.logits.shape == (3, 4, 64)
    assert out.visual_prefix.shape == (3, model.config.num_visual_tokens, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_match_the_forward_pass(family: str) -> None:
    """`generate`, with a cache, picks the tokens that `forward`, without a cache, predicts as the likeliest."""
    model, batch = make_model(family), make_batch()
    ids = model.generate(**batch, num_beams=1, repetition_penalty=1.0, max_new_tokens=4, min_new_tokens=4)
    answer = ids[:, 1:] if family == "t5" else ids
    logits = model(**batch, labels=answer).logits
    logits[:, :, model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
    assert torch.equal(logits.argmax(-1), answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_samples(family: str) -> None:
    model, batch = make_model(family), make_batch(labels=True)
    together = model(**batch).logits
    for sample in range(3):
        alone = model(**{name: value[sample : sample + 1] for name, value in batch.items()}).logits
        torch.testing.assert_close(together[sample], alone[0], **TWO_WAYS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_task_selects_the_adapter(family: str) -> None:
    """A new router selects adapter 0 for task 0 and adapter 1 for task 1."""
    model, batch = make_model(family), make_batch(labels=True)
    before = model(**batch).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters.0." in name:
                parameter.add_(0.5)
    after = model(**batch).logits
    changed = (before - after).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [True, False, True]  # task_ids 0, 1, 0


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_read_the_residual_stream_before_the_norm(family: str) -> None:
    """The layer computes h + FFN(norm(h)) + adapters(h)."""
    model = make_model(family, num_adapters=1)
    hidden = torch.randn(2, 5, 32) * 3 + 1
    if family == "t5":
        layer = model.language_model.encoder.block[0].layer[-1]
        fed_forward = layer.DenseReluDense(layer.layer_norm(hidden))
        out = layer(hidden)
    else:
        layer = model.language_model.model.layers[0]
        layer.self_attn.o_proj.weight.data.zero_()  # attention then adds nothing
        position = torch.arange(5).unsqueeze(0)
        rotary = model.language_model.model.rotary_emb(hidden, position)
        out = layer(hidden, position_embeddings=rotary, attention_mask=None)
        fed_forward = layer.mlp(layer.post_attention_layernorm(hidden))
    scale, down_weight, down_bias, up_weight, up_bias = layer.adapter.adapters[0]()
    adapted = scale * (torch.relu(hidden @ down_weight.T + down_bias) @ up_weight.T + up_bias)
    torch.testing.assert_close(out, hidden + fed_forward + adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model, batch = make_model(family), make_batch(labels=True)
    plain = model(**batch).logits
    side = (0, 3) if family == "t5" else (3, 0)
    pad = torch.nn.functional.pad
    padded = {
        **batch,
        "input_ids": pad(batch["input_ids"], side),
        "attention_mask": pad(torch.ones_like(batch["input_ids"]), side),
        "qformer_input_ids": pad(batch["qformer_input_ids"], (0, 2)),
        "qformer_attention_mask": pad(torch.ones_like(batch["qformer_input_ids"]), (0, 2)),
        "labels": pad(batch["labels"], (0, 2), value=-100),
    }
    out = model(**padded)
    torch.testing.assert_close(out.logits[:, :4], plain, **TWO_WAYS)
    assert out.loss.item() == pytest.approx(model(**batch).loss.item(), rel=LOSS_TWO_WAYS)
    short = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 4}
    generated = model.generate(**without_labels(padded), **short)
    assert torch.equal(generated, model.generate(**without_labels(batch), **short))


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_features_replace_pixels(family: str) -> None:
    model, batch = make_model(family), make_batch(labels=True)
    expected = model(**batch).logits
    features = model.get_vision_features(batch.pop("pixel_values"))
    assert torch.equal(model(**batch, vision_features=features).logits, expected)


@pytest.mark.parametrize("token_id", [5, 64, None])
def test_the_soft_prompt_replaces_its_token(token_id: int | None) -> None:
    """The token may lie beyond the embedding table (64 rows), as a token added to a tokenizer does."""
    model = make_model(soft_prompt_token_id=token_id)
    input_ids = torch.tensor([[7, token_id or 8, 9], [10, 11, 12]])
    embeddings = model.embed_text(input_ids)
    table = model.get_input_embeddings().weight
    assert torch.equal(embeddings[1], table[10:13])
    assert torch.equal(embeddings[0, [0, 2]], table[[7, 9]])
    assert torch.equal(embeddings[0, 1], table[8] if token_id is None else model.soft_prompt)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("visual_input", ["ALL", "QFORMER", "AGGREGATOR"])
def test_save_and_load_are_bit_identical(tmp_path: Path, family: str, visual_input: str) -> None:
    model, batch = make_model(family, visual_input=visual_input), make_batch(labels=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, info = LionForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)
    assert AutoConfig.from_pretrained(tmp_path).visual_input == visual_input


def test_the_output_head_is_never_tied(tmp_path: Path) -> None:
    model = make_model()
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = LionForCausalLM.from_pretrained(tmp_path).language_model
    for language_model in (model.language_model, loaded):
        assert not torch.equal(language_model.lm_head.weight, language_model.shared.weight)
        assert language_model.encoder.embed_tokens.weight is language_model.shared.weight
        assert language_model.decoder.embed_tokens.weight is language_model.shared.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_parameters_are_initialised(tmp_path: Path, family: str) -> None:
    """Loading a checkpoint of one adapter into a model with two initialises the routers and the second adapter."""
    make_model(family, num_adapters=1).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LionForCausalLM.from_pretrained(tmp_path, num_adapters=2)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "router_ratio" in name:
            own_task = int(name.endswith("2"))
            assert parameter.unique(dim=1).squeeze(1).tolist() == [1 - own_task, own_task], name
        if ".adapters.1.up_proj" in name:
            assert not parameter.any(), name


@pytest.mark.parametrize("num_adapters", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_add_nothing(family: str, num_adapters: int) -> None:
    model = LionForCausalLM(make_config(family, num_adapters=num_adapters))
    adapters = [module for module in model.modules() if isinstance(module, MixtureOfAdapters)]
    hidden = torch.randn(2, 3, 32)
    assert len(adapters) == (4 if family == "t5" else 2)
    for adapter in adapters:
        assert torch.equal(adapter(hidden, residual=hidden, task_ids=torch.tensor([0, 1])), hidden)
        for weight in (a.down_proj.weight for a in adapter.adapters):  # Kaiming-uniform: |w| <= 1 / sqrt(fan in)
            assert 0.9 < weight.abs().max() * 32**0.5 <= 1.0


def test_a_new_aggregator_only_normalises_the_last_layer() -> None:
    model = LionForCausalLM(make_config())
    features = torch.randn(2, 3, 5, 16)
    centred = features[:, 0] - features[:, 0].mean(-1, keepdim=True)
    norms = centred / features[:, 0].std(-1, keepdim=True, unbiased=False)
    torch.testing.assert_close(model.aggregator(features), norms, **TWO_WAYS)
    assert 0.5 < model.soft_prompt.std() < 1.5


def test_auto_classes(converted: Path, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(tmp_path)) is LionForCausalLM
    assert type(AutoProcessor.from_pretrained(converted)).__name__ == "LionProcessor"


def test_attention_implementation_per_part(tmp_path: Path) -> None:
    model, batch = make_model(), make_batch(labels=True)
    model.save_pretrained(tmp_path)
    choice = {"vision_config": "eager", "aggregator_config": "eager", "qformer_config": "sdpa", "text_config": "eager"}
    loaded = LionForCausalLM.from_pretrained(tmp_path, attn_implementation=choice).eval()
    assert {part: getattr(loaded.config, part)._attn_implementation for part in choice} == choice
    assert loaded.vision_model.blocks[0].attn.config._attn_implementation == "eager"
    assert loaded.language_model.encoder.config._attn_implementation == "eager"
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **TWO_WAYS)


def test_attention_implementation_can_be_changed_later() -> None:
    model, batch = make_model(), make_batch(labels=True)
    called = []

    def counted(module: torch.nn.Module, *args, **kwargs):
        called.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counted_attention", counted)
    expected = model(**batch).logits
    model.set_attn_implementation({"vision_config": "counted_attention", "aggregator_config": "counted_attention"})
    assert torch.equal(model(**batch).logits, expected)
    assert set(called) == {"LionVisionAttention", "LionAggregatorProjections"}


def test_sampling_defaults_to_lions_top_p() -> None:
    model, batch = make_model(), make_batch()
    given = {"do_sample": True, "num_beams": 1, "max_new_tokens": 6}

    def sampled(**settings) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**batch, **given, **settings)

    assert torch.equal(sampled(), sampled(top_p=0.9))
    assert not torch.equal(sampled(), sampled(top_p=0.05))


def test_generate_checks_tasks_against_precomputed_encodings() -> None:
    encoded = BaseModelOutput(last_hidden_state=torch.zeros(3, 5, 32))
    with pytest.raises(ValueError, match=r"task_ids: expected \[3\], got \[1\]"):
        make_model().generate(encoder_outputs=encoded, task_ids=torch.tensor([1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_the_gradients(family: str) -> None:
    model, batch = make_model(family).train(), make_batch(labels=True)
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("vision_model", "language_model")) and ".adapter." not in name
        parameter.requires_grad_(not frozen)
    _, expected = gradients_of(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, gradients = gradients_of(model, batch)
    assert gradients.keys() == expected.keys()
    assert any(".adapter." in name for name in gradients)
    for name, gradient in expected.items():
        # Rows are summed in another order: relative differences of 1e-6 were seen.
        torch.testing.assert_close(gradients[name], gradient, **TWO_WAYS, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model, batch = make_model(family), make_batch(labels=True)
    expected = model(**batch).loss.item()
    model.save_pretrained(tmp_path)
    loaded = LionForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    # transformers keeps T5's `wo`, which overflows, in float32, and with it every name that starts with "wo".
    kept = {"wo.weight", "word_embeddings.weight"} if dtype == torch.float16 and family == "t5" else set()
    others = [p for n, p in loaded.named_parameters() if not any(n.endswith(name) for name in kept)]
    assert {p.dtype for p in others} == {dtype}
    out = loaded(**batch)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected, rel=0.05 if dtype != torch.float64 else 1e-5)
    assert loaded.generate(**without_labels(batch), max_new_tokens=3).shape[0] == 3


def test_autocast_trains_float32_weights() -> None:
    model, batch = make_model(), make_batch(labels=True)
    expected = model(**batch).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, "torch") for family in FAMILIES),
        *(pytest.param(family, "triton", marks=INTERPRETED) for family in ("t5", "llama")),
    ],
)
def test_offloaded_parts_are_loaded_when_used(tmp_path: Path, launches: list[str], family: str, backend: str) -> None:
    """`device_map="auto"` offloads parts that do not fit; a module's call loads its own parameters from the disk.

    A map of the whole model to one device gives the same values.
    """
    needs("accelerate", "train")
    model, batch = make_model(family, kernel_backend=backend), make_batch(batch=1, labels=True)
    expected = model(**batch).logits
    kernels = [launches.pop(0) for _ in range(len(launches))]
    assert bool(kernels) == (backend == "triton")
    model.save_pretrained(tmp_path)
    parts = [name for name, _ in model.named_children()]
    device_map = {"query_tokens": "cpu", "soft_prompt": "cpu"} | dict.fromkeys(parts, "disk")
    loaded = LionForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "parts").eval()
    assert {p.device.type for part in parts for p in loaded.get_submodule(part).parameters()} == {"meta"}
    assert torch.equal(loaded(**batch).logits, expected)
    assert launches == kernels
    placed = LionForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(placed(**batch).logits, expected)
    if backend == "torch":
        inputs = without_labels(batch)
        assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3))


def test_every_linear_layer_is_called() -> None:
    """LoRA and quantization replace the forward of an `nn.Linear`, which only has an effect if it is called."""
    model, batch = make_model(), make_batch(labels=True)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    called = set()
    for name in linears:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    model(**batch)
    assert linears - called == set()


def test_gradient_accumulation_is_exact() -> None:
    """The losses of unequal micro-batches, divided by the batch's number of targets, sum to the batch's mean loss."""
    model, batch = make_model(), make_batch(batch=4, labels=True)
    batch["labels"][0, 1:] = -100
    expected = model(**batch).loss
    items = (batch["labels"] != -100).sum()
    slices = [slice(0, 1), slice(1, 4)]
    losses = [model(**{k: v[rows] for k, v in batch.items()}, num_items_in_batch=items).loss for rows in slices]
    torch.testing.assert_close(sum(losses), expected)


def test_loss_is_unshifted_cross_entropy() -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, -100], [4, -100, -100]])
    log_probabilities = logits.log_softmax(-1)
    picked = [log_probabilities[0, 0, 1], log_probabilities[0, 1, 2], log_probabilities[1, 0, 4]]
    torch.testing.assert_close(token_cross_entropy(logits, labels), -torch.stack(picked).mean())


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_the_loss_has_at_least_float32_precision(dtype: torch.dtype, expected: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, dtype=dtype)
    assert token_cross_entropy(logits, torch.ones(2, 3, dtype=torch.long)).dtype == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_set_image_size_interpolates_positions(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    before = model.vision_model.pos_embed.detach().clone()
    model.set_image_size(56)
    after = model.vision_model.pos_embed
    assert after.shape == (1, 1 + 16, 16)
    assert torch.equal(after[:, 0], before[:, 0])  # the class token's position is kept
    batch = make_batch(image_size=56, labels=True)
    out = model(**batch)
    out.loss.backward()
    assert out.visual_prefix.shape[1] == 4 + 17
    model.save_pretrained(tmp_path)
    assert torch.equal(LionForCausalLM.from_pretrained(tmp_path).eval()(**batch).logits, out.logits)
    model.generate(**without_labels(batch), max_new_tokens=3)


def test_interpolated_positions_keep_a_linear_ramp() -> None:
    """A ramp is preserved away from the clamped border.

    torch's bicubic formula bends it by 0.6 % of a patch on every machine; rounding is 1e-7.
    """
    model = make_model(vision_config={"image_size": 8 * 14})
    ramp = torch.arange(8.0).add(0.5).div(8)
    with torch.no_grad():
        model.vision_model.pos_embed[0, 1:] = ramp.repeat(8).unsqueeze(1)
    model.set_image_size(16 * 14)
    row = model.vision_model.pos_embed[0, 1:, 0].unflatten(0, (16, 16))[8]
    expected = torch.arange(16.0).add(0.5).div(16)
    torch.testing.assert_close(row[4:-4], expected[4:-4], rtol=0, atol=0.08 / 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "pixel_values: expected either"),
        ({"vision_features": torch.zeros(3, 3, 5, 16)}, "pixel_values: expected either"),
        ({"pixel_values": torch.zeros(3, 3, 30, 30)}, r"pixel_values: expected \[B, 3, 28, 28\]"),
        ({"pixel_values": torch.zeros(2, 3, 28, 28)}, r"input_ids: expected \[2, L\], got \[3, 7\]"),
        ({"input_ids": None}, "input_ids: expected"),
        ({"attention_mask": torch.ones(3, 6)}, r"attention_mask: expected \[3, 7\]"),
        ({"qformer_input_ids": None}, "qformer_input_ids: expected"),
        ({"qformer_input_ids": torch.ones(2, 5).long()}, r"qformer_input_ids: expected \[3, L\]"),
        ({"qformer_attention_mask": torch.ones(3, 4)}, r"qformer_attention_mask: expected \[3, 5\]"),
        ({"task_ids": None}, "task_ids: expected"),
        ({"task_ids": torch.tensor([0, 1])}, r"task_ids: expected \[3\]"),
        ({"task_ids": torch.tensor([0, 1, 2])}, r"task_ids: expected ids in 0..1, got \[2\]"),
        ({"task_ids": [0, 1, 0]}, r"task_ids: expected a tensor \[3\], got list"),
        ({"task_ids": torch.tensor([0, -1, 1])}, r"task_ids: expected ids in 0..1, got \[-1\]"),
        ({"input_ids": torch.full((3, 7), 64)}, r"input_ids: expected ids in 0..63, got \[64\]"),
        ({"qformer_input_ids": torch.full((3, 5), 70)}, r"qformer_input_ids: expected ids in 0..63, got \[70\]"),
        ({"qformer_input_ids": torch.ones(3, 40).long()}, "qformer_input_ids: expected at most 32 tokens .* got 40"),
        ({"labels": torch.full((3, 4), -7)}, r"labels: expected ids in 0..63, got \[-7\]"),
        ({"labels": torch.ones(3, 0).long()}, r"labels: expected one token or more per answer, got \[3, 0\]"),
        ({"labels": torch.ones(2, 4).long()}, r"labels: expected \[3, L\]"),
        ({"labels": None}, "labels: expected labels or decoder_input_ids"),
    ],
)
def test_invalid_input_is_named(change: dict, message: str) -> None:
    batch = {**make_batch(labels=True), **change}
    with pytest.raises(ValueError, match=message):
        make_model()(**batch)


def test_invalid_ids_in_a_compiled_graph_raise_the_same_message() -> None:
    """A compiled graph, like a GPU, checks ids asynchronously."""

    def checked(ids: Tensor) -> Tensor:
        expect_ids("labels", ids, 2, also=-100)
        return ids + 1

    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([0, -100, 1])).tolist() == [1, -99, 2]
    for wrong in (-1, 2):
        with pytest.raises(RuntimeError, match=r"labels: expected ids in 0\.\.1"):
            compiled(torch.tensor([0, -100, wrong]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_input": "BOTH"}, "visual_input: expected one of 'ALL', 'QFORMER', 'AGGREGATOR', got 'BOTH'"),
        ({"kernel_backend": "cuda"}, "kernel_backend: expected one of"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type: expected one of 't5'"),
        ({"text_config": {"d_model": 32}}, "text_config: expected a key 'model_type'"),
        ({"text_config": "t5"}, "text_config: expected a dict or a configuration, got 't5'"),
        ({"adapter_rank": 0}, "adapter_rank: expected 1 or more, got 0"),
        ({"num_query_tokens": 0}, "num_query_tokens: expected 1 or more, got 0"),
        ({"num_adapters": 3}, "num_adapters: expected 1 or 2, got 3"),
        ({"soft_prompt_token_id": -1}, "soft_prompt_token_id: expected 0 or more"),
        (
            {"aggregator_config": {"hidden_size": 8, "num_attention_heads": 2}},
            "aggregator_config.hidden_size: expected 16",
        ),
        (
            {"aggregator_config": {"hidden_size": 16, "num_attention_heads": 2, "feature_layers": [3, 1]}},
            "aggregator_config.feature_layers: expected blocks in 0..2",
        ),
        (
            {"aggregator_config": {"hidden_size": 16, "num_attention_heads": 3, "feature_layers": [2, 1]}},
            "aggregator_config.num_attention_heads: expected a divisor",
        ),
    ],
)
def test_invalid_configuration_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LionForCausalLM(make_config(**settings))


def test_settings_of_an_absent_aggregator_are_not_checked() -> None:
    aggregator = {"hidden_size": 88, "num_attention_heads": 16, "feature_layers": [2]}
    assert not hasattr(LionForCausalLM(make_config(visual_input="QFORMER", aggregator_config=aggregator)), "aggregator")


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lion_kernels.core.backend._INTERPRETING", False)
    with pytest.raises(ValueError, match=r"backend: the model runs 'triton' on a CUDA device, or on the CPU"):
        make_model(kernel_backend="triton")(**make_batch(labels=True))


@pytest.mark.parametrize(("name", "adapters"), [("LION-FlanT5-XL", 25.8), ("LION-FlanT5-XXL", 51.5)])
def test_published_sizes(published: dict[str, LionForCausalLM], name: str, adapters: float) -> None:
    """The vision tower (EVA-g) and the adapters have the published numbers of parameters, in millions."""
    model = published[name]

    def millions(part: str) -> float:
        return sum(parameter.numel() for name, parameter in model.named_parameters() if part in name) / 1e6

    assert millions("vision_model.") == pytest.approx(985.9, abs=0.1)
    assert millions(".adapter.") == pytest.approx(adapters, abs=0.05)
    assert (model.config.num_visual_tokens, model.config.vision_config.num_tokens) == (289, 257)
