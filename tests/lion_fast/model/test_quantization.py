"""Quantization: which layers are quantized, how much memory that saves, and answers if bitsandbytes is installed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lion_fast import LionForCausalLM
from lion_fast.model.quantization import KEPT_MODULES, keep_trained_modules
from lion_fast.model.vision import FusedProjection
from lion_fast.training.stages import STAGES
from tests.extras import needs
from tests.lion_fast.tiny import FAMILIES, make_batch, make_config, make_model
from tests.rounding import relative_error

PAGE = Path(__file__).resolve().parents[3] / "docs" / "generation.md"
# Widths that are multiples of the block size of bitsandbytes' four-bit kernel for CPUs.
WIDE: dict[str, Any] = {
    "vision_config": {"hidden_size": 64, "intermediate_size": 128},
    "aggregator_config": {"hidden_size": 64},
}
WIDE_TEXT: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}


def quantized(model: LionForCausalLM, subclasses: bool = False) -> set[str]:
    """Return the names of the layers that transformers' quantizers convert with `KEPT_MODULES`.

    bitsandbytes ignores subclasses of `nn.Linear`, such as the vision tower's fused projection; torchao and quanto
    convert them.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, list(KEPT_MODULES), model._keep_in_fp32_modules)
    linears = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    candidates = (name for name, kind in linears.items() if subclasses or kind is nn.Linear)
    return {name for name in candidates if should_convert_module(name, kept)}


def weight_bytes(model: LionForCausalLM, bits: int) -> int:
    """Compute the size of a bf16 model whose quantized layers have `bits` bits per weight and fp32 scales."""
    layers = {f"{name}.weight" for name in quantized(model)} if bits < 16 else set()
    total = 0
    for name, parameter in model.named_parameters():
        if name not in layers:
            total += 2 * parameter.numel()
        elif bits == 8:
            total += parameter.numel() + 4 * parameter.shape[0]  # a scale per row
        else:
            total += parameter.numel() // 2 + 4 * -(-parameter.numel() // 64)  # a scale per 64 weights
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizers_convert_only_frozen_layers(family: str) -> None:
    with torch.device("meta"):
        model = LionForCausalLM(make_config(family))
    found = quantized(model, subclasses=True)
    joint = STAGES[2]
    assert not [name for name in found if joint.trains(name)]
    assert all(name.startswith(("vision_model.blocks.", "language_model.")) for name in found)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    frozen = {name for name in linears if not joint.trains(name)}
    left = {name for name in frozen - found if not name.endswith(".wo")}  # transformers keeps T5's
    assert left == {"language_model.lm_head"}
    assert found - quantized(model) == {f"vision_model.blocks.{block}.attn.qkv" for block in range(3)}


def test_the_fused_projection_can_be_replaced() -> None:
    """A quantizer replaces it with a layer whose call takes no bias."""
    model, batch = make_model(), make_batch()
    expected = model.get_vision_features(batch["pixel_values"])
    for block in model.vision_model.blocks:
        plain = nn.Linear(16, 48, bias=False)
        plain.weight = block.attn.qkv.weight
        block.attn.qkv = plain
        block.attn.v_bias.data.normal_()
    biased = model.get_vision_features(batch["pixel_values"])
    assert not torch.allclose(biased, expected, atol=1e-4)  # the bias has an effect
    for block in model.vision_model.blocks:
        fused = FusedProjection(16, 48, bias=False)
        fused.weight = block.attn.qkv.weight
        block.attn.qkv = fused
    torch.testing.assert_close(model.get_vision_features(batch["pixel_values"]), biased)


@pytest.mark.parametrize("setting", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_configurations_exclude_the_kept_modules(setting: str) -> None:
    if setting == "llm_int8_skip_modules":
        given: Any = BitsAndBytesConfig(load_in_8bit=True)
        own: Any = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["qformer"])
        as_dict = keep_trained_modules({"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert as_dict.llm_int8_skip_modules == list(KEPT_MODULES)
    else:
        given, own = object.__new__(TorchAoConfig), object.__new__(TorchAoConfig)
        given.modules_to_not_convert, own.modules_to_not_convert = None, ["qformer"]
    assert getattr(keep_trained_modules(given), setting) == list(KEPT_MODULES)
    assert getattr(keep_trained_modules(own), setting) == ["qformer"]


def test_the_memory_table_in_the_docs_is_computed(published: dict[str, LionForCausalLM]) -> None:
    rows = re.findall(r"^\| (LION-\S+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(published)
    for name, cells in rows:
        model = published[name]
        text = model.config.text_config
        tokens = model.config.num_visual_tokens + 64
        cache = 2 * text.num_decoder_layers * text.num_heads * text.d_kv * 2 * (tokens + 20)
        figures = [*(weight_bytes(model, bits) for bits in (16, 8, 4)), 5 * cache]
        assert cells.split(" | ") == [f"{figure / 1e9:.1f}" for figure in figures], (name, figures)


def test_xl_in_bfloat16_leaves_room_on_24_gigabytes(published: dict[str, LionForCausalLM]) -> None:
    """Weights, folded copies of the adapters, and the cache of 8 images with 5 beams each."""
    model = published["LION-FlanT5-XL"]
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".adapter." in name)
    cache = 8 * 5 * 2 * 24 * 2048 * 2 * (289 + 64 + 20)
    assert weight_bytes(model, 16) + 2 * 2 * adapters + cache < 0.75 * 24e9


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_answers_in_fewer_bits(tmp_path: Path, family: str, bits: int) -> None:
    needs("bitsandbytes", "quantize")
    model, batch = make_model(family, text=WIDE_TEXT[family], **WIDE), make_batch(labels=True)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "full")
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)
    few = LionForCausalLM.from_pretrained(tmp_path / "full", quantization_config=settings, dtype=torch.float32).eval()
    # Before any forward pass: on a CPU, the first pass of bitsandbytes repacks 4 bits, and saves another model then.
    few.save_pretrained(tmp_path / "few")
    kinds = {name: type(module).__name__ for name, module in few.named_modules()}
    assert {name for name, kind in kinds.items() if kind in ("Linear8bitLt", "Linear4bit")} == quantized(model)
    logits = few(**batch).logits
    assert not torch.allclose(logits, expected)
    # The reference is the dequantized model, because small random weights amplify the rounding of weights. With 8 bits,
    # inputs are rounded too, each row to 127 steps of its largest value: 3.3e-2 was seen.
    twin = LionForCausalLM.from_pretrained(tmp_path / "full", quantization_config=settings, dtype=torch.float32)
    whole = twin.dequantize().float().eval()(**batch).logits
    assert relative_error(logits, whole) < 0.1
    labels = batch.pop("labels")
    tokens = few.generate(**batch, max_new_tokens=4)
    few.fold_adapters()
    assert torch.equal(few.generate(**batch, max_new_tokens=4), tokens)
    if bits == 8:
        (code,) = (
            block for block in re.findall(r"```py\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if "8bit" in block
        )
        names: dict[str, Any] = {"LionForCausalLM": LionForCausalLM, "path": tmp_path / "full"}
        exec(compile(code, str(PAGE), "exec"), names)
        assert sum(type(module).__name__ == "Linear8bitLt" for module in names["model"].modules()) == len(
            quantized(model)
        )
    loaded = LionForCausalLM.from_pretrained(tmp_path / "few").eval()
    torch.testing.assert_close(loaded(**batch, labels=labels).logits, logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_float16_keeps_the_residual_stream_in_float32(tmp_path: Path, bits: int) -> None:
    """transformers keeps T5's `wo` in float32, whose results may be too large for float16."""
    needs("bitsandbytes", "quantize")
    strong, batch = make_model(text=WIDE_TEXT["t5"], **WIDE), make_batch(labels=True)
    for block in strong.language_model.encoder.block:
        block.layer[-1].DenseReluDense.wo.weight.data.mul_(3e5)
    strong.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float16)
    half = LionForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float16).eval()
    whole = LionForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float16)
    with torch.no_grad():
        out = half(**batch)
        expected = whole.dequantize().float().eval()(**batch)
    assert out.loss.isfinite()
    assert relative_error(out.logits, expected.logits) < 0.1
