"""What PEFT's documentation promises of any model, on LION around T5 and around a decoder-only model.

Here: saving and loading (also safetensors, into an empty model, into transformers' own integration, and with a
`device_map`), several adapters, weighted combinations, deletion, merging and its reversal for each kind of method and
of layer, disabling, batches that mix adapters, `modules_to_save`, `trainable_token_indices`, patterns of layers and
ranks, half precision. Gradient checkpointing is in `test_checkpointing.py`, mixed batches in training in
`test_drop_in_lora.py`, losses of Trainer in `test_trainer.py`.

Not applicable, and why:

- `task_type`: the wrappers that it selects keep `task_ids` to themselves; the error says so.
- Prompt learning (prompt, prefix and P-tuning): it works through such a wrapper, and on `inputs_embeds`; LION's prompt
  follows an image.
- Layers that are no layers of PyTorch: LION's adapters. They are trained whole (`modules_to_save=["adapter"]`). Where
  their projections share names with a decoder's feed-forward, `exclude_modules` leaves them out.
- `target_parameters`: parameters of the model itself, such as `query_tokens`, which PEFT refuses for every model.
- LoRA on `shared` or `embed_tokens` of T5 merges into both, because they share a weight, in transformers' T5, too.
- `lora_bias` is merged only into layers that have a bias, as for every model; the vision tower's `qkv` has none.
- `AutoPeftModel` wants `import_allowlist=["lion_fast.modeling_lion"]`, as for every model outside transformers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_fast import LionForCausalLM
from lion_kernels.core.backend import interpreting
from tests.extras import needs
from tests.lion_fast.tiny import make_batch, make_model, without_labels
from tests.rounding import TWO_WAYS, relative_error

peft = needs("peft", "test")

TARGETS = {"t5": ["q", "v", "qkv", "query", "value"], "llama": ["q_proj", "v_proj", "qkv", "query", "value"]}
MERGED = 1e-5
METHODS: dict[str, Any] = {
    "LoRA": lambda targets: peft.LoraConfig(r=4, target_modules=targets),
    "rsLoRA": lambda targets: peft.LoraConfig(r=4, target_modules=targets, use_rslora=True),
    "DoRA": lambda targets: peft.LoraConfig(r=4, target_modules=targets, use_dora=True),
    "IA3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "VeRA": lambda targets: peft.VeraConfig(r=4, target_modules=targets),
    "LoKr": lambda targets: peft.LoKrConfig(r=4, target_modules=targets),
    "OFT": lambda targets: peft.OFTConfig(r=0, oft_block_size=4, target_modules=targets),
}


def make_base(family: str, **overrides: Any) -> LionForCausalLM:
    """Make a model whose biases are not zero."""
    model = make_model(family, **overrides)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "_bias")):
            nn.init.normal_(parameter)
    return model


def adapt(family: str, **settings: Any) -> Any:
    given = {"r": 4, "target_modules": TARGETS[family], "init_lora_weights": False} | settings
    return peft.get_peft_model(make_base(family), peft.LoraConfig(**given)).eval()


def logits_of(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**(batch or make_batch(labels=True))).logits


def move_parameters(model: Any) -> None:
    """Change the trained parameters, so that an adapter has an effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def expect_merging_keeps_the_results(model: Any) -> None:
    """Expect the same vision features and logits from the model unmerged, merged and unmerged again, and unloaded."""
    batch = make_batch(labels=True)

    def results(lion: LionForCausalLM) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return lion.get_vision_features(batch["pixel_values"]), lion(**batch).logits

    lion = model.eval().base_model.model
    move_parameters(model)
    expected = results(lion)
    model.merge_adapter()
    merged = results(lion)
    model.unmerge_adapter()
    for found in (merged, results(lion), results(model.merge_and_unload())):
        assert all(relative_error(got, want) < MERGED for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "method"), [*(("t5", method) for method in METHODS), ("llama", "DoRA")])
def test_merging_all_linear_layers(family: str, method: str) -> None:
    expect_merging_keeps_the_results(peft.get_peft_model(make_base(family), METHODS[method]("all-linear")))


@pytest.mark.parametrize("method", METHODS)
def test_merging_the_fused_projection(method: str) -> None:
    """Its bias is an argument of its call, which PEFT does not pass on."""
    model = peft.get_peft_model(make_base("t5"), METHODS[method](["qkv"]))
    before = make_base("t5").get_vision_features(make_batch()["pixel_values"])
    move_parameters(model)
    after = model.base_model.model.get_vision_features(make_batch()["pixel_values"])
    assert relative_error(after, before) > 1e-4  # the adapter has an effect
    expect_merging_keeps_the_results(model)


@pytest.mark.parametrize("target", ["patch_embed.proj", "word_embeddings", "relative_attention_bias", "lm_head"])
@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_merging_other_layers(target: str, method: str) -> None:
    expect_merging_keeps_the_results(peft.get_peft_model(make_base("t5"), METHODS[method]([target])))


@pytest.mark.skipif(not interpreting(), reason="kernels on the CPU are interpreted")
def test_merging_on_the_kernels() -> None:
    model = peft.get_peft_model(make_base("llama", kernel_backend="triton"), METHODS["DoRA"]("all-linear")).eval()
    move_parameters(model)
    batch = make_batch(batch=1, labels=True)
    expected = logits_of(model, **batch)
    assert relative_error(logits_of(model.merge_and_unload(), **batch), expected) < MERGED


@pytest.mark.parametrize("family", TARGETS)
def test_disabled_and_unloaded_adapters_leave_the_model(family: str) -> None:
    expected = logits_of(make_base(family))
    model = adapt(family)
    assert not torch.allclose(logits_of(model), expected, **TWO_WAYS)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), expected, **TWO_WAYS)
    torch.testing.assert_close(logits_of(model.unload()), expected)


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_are_saved_and_loaded(tmp_path: Path, family: str) -> None:
    make_base(family).save_pretrained(tmp_path / "base")
    first = peft.LoraConfig(r=4, target_modules=TARGETS[family], init_lora_weights=False)
    model = peft.get_peft_model(LionForCausalLM.from_pretrained(tmp_path / "base"), first).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model)
    assert [file.name for file in (tmp_path / "adapter").glob("*.safetensors")] == ["adapter_model.safetensors"]
    for empty in (False, True):
        loaded = peft.PeftModel.from_pretrained(make_base(family), tmp_path / "adapter", low_cpu_mem_usage=empty)
        torch.testing.assert_close(logits_of(loaded.eval()), expected)
    placed = LionForCausalLM.from_pretrained(tmp_path / "base", device_map="auto")
    placed = peft.PeftModel.from_pretrained(placed, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(placed), expected)
    integrated = LionForCausalLM.from_pretrained(tmp_path / "base")
    integrated.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(integrated.eval()), expected)
    with pytest.raises(ValueError, match="expected a model, got an adapter; load its model, then"):
        LionForCausalLM.from_pretrained(tmp_path / "adapter")  # it names its base, which may be anywhere


@pytest.mark.parametrize("family", TARGETS)
def test_several_adapters(family: str) -> None:
    """Adapters of one batch, their weighted combinations, and their deletion."""
    model, batch = adapt(family), make_batch(labels=True)
    second = {"target_modules": TARGETS[family], "init_lora_weights": False}
    model.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=16, **second))
    names = ["default", "__base__", "second"]
    mixed = logits_of(model, **batch, adapter_names=names)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = logits_of(model, **own)
        else:
            model.set_adapter(name)
            expected = logits_of(model, **own)
        torch.testing.assert_close(mixed[row], expected[0], **TWO_WAYS)
    for kind in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], kind, combination_type=kind)
        model.set_adapter(kind)
        assert logits_of(model).isfinite().all()
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "alone", combination_type="cat")
    model.set_adapter("alone")
    combined = logits_of(model)
    model.set_adapter("default")
    torch.testing.assert_close(logits_of(model), combined, **TWO_WAYS)
    model.delete_adapter("second")
    assert "second" not in model.peft_config
    with pytest.raises(ValueError, match="second"):
        model.delete_adapter("second")
    torch.testing.assert_close(logits_of(model), combined, **TWO_WAYS)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        *(("t5", name) for name in ("aggregator", "adapter", "shared")),
        *(("llama", name) for name in ("vision_model", "qformer_projection", "embed_tokens")),
    ],
)
def test_modules_to_save(tmp_path: Path, family: str, module: str) -> None:
    """A module trained whole beside LoRA gets gradients, is saved, and is replaced by the original when disabled."""
    model = adapt(family, modules_to_save=[module]).train()
    model(**make_batch(labels=True)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    move_parameters(model.eval())
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), logits_of(make_base(family)), **TWO_WAYS)
    assert model.generate(**without_labels(make_batch()), num_beams=1, max_new_tokens=2).shape[0] == 3
    loaded = peft.PeftModel.from_pretrained(make_base(family), tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), expected)
    assert relative_error(logits_of(model.merge_and_unload()), expected) < MERGED


@pytest.mark.parametrize("family", TARGETS)
def test_single_tokens_can_be_trained(tmp_path: Path, family: str) -> None:
    ids = make_batch()["input_ids"][0, 2:4].tolist()
    model = adapt(family, trainable_token_indices=ids).train()
    model(**make_batch(labels=True)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    move_parameters(model.eval())
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(family), tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), expected)
    assert relative_error(logits_of(model.merge_and_unload()), expected) < MERGED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", TARGETS)
def test_half_precision_has_float32_adapters(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    make_base(family).save_pretrained(tmp_path)
    base = LionForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, settings).eval()
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    expected = logits_of(model)
    assert expected.dtype == dtype
    assert model.generate(**without_labels(make_batch()), num_beams=1, max_new_tokens=2).shape[0] == 3
    assert relative_error(logits_of(model.merge_and_unload()), expected) < 16 * torch.finfo(dtype).eps


def test_patterns_of_layers_and_ranks() -> None:
    model = adapt("t5", layers_to_transform=[1], rank_pattern={"qkv": 2})
    ranks = {name.partition(".lora_A")[0]: len(p) for name, p in model.named_parameters() if "lora_A" in name}
    assert all(rank == (2 if name.endswith("qkv") else 4) for name, rank in ranks.items())
    assert [name for name in ranks if name.endswith("qkv")] == ["base_model.model.vision_model.blocks.1.attn.qkv"]


def test_merging_safely_refuses_nan() -> None:
    model = adapt("t5")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.constant_(parameter, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


def test_a_decoders_feed_forward_without_lions_adapters() -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(ValueError, match="Projection"):
        adapt("llama", target_modules=targets)
    model = adapt("llama", target_modules=targets, exclude_modules=r".*\.adapter\..*")
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * len(targets)
    assert not any(".adapter." in name for name in adapted)


def test_a_task_type_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"task_ids: expected .* got None; PEFT's models do not pass it on"):
        adapt("t5", task_type="SEQ_2_SEQ_LM")(**make_batch(labels=True))
