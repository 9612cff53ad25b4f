"""Models in half precision, whose residual stream transformers may keep in float32: T5's `wo`, strong feed-forwards.

T5's norms make the answers almost independent of the feed-forward's strength, but its residual stream exceeds the range
of float16. The reference is the same model in float32; transformers' own T5 deviates by 0.1 to 0.2 %.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from lion_fast import LionForCausalLM, apply_lion_kernels
from lion_fast.model.adapters import MixtureOfAdapters
from lion_kernels.core.backend import interpreting
from tests.lion_fast.tiny import make_batch, make_config, make_model, without_labels
from tests.rounding import relative_error

BOUND = 5e-3
LARGEST = torch.finfo(torch.float16).max
INTERPRETED = pytest.mark.skipif(not interpreting(), reason="kernels on the CPU are interpreted")


def make_strong(scale: float, family: str = "t5") -> LionForCausalLM:
    """Make a model whose feed-forward layers are `scale` times as strong."""
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".wo.weight"):
                parameter.mul_(scale)
    return model


def largest_stream(model: LionForCausalLM, batch: dict[str, Tensor]) -> float:
    """Return the largest value that a block of the encoder returns."""
    found = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: found.append(out[0].abs().max().item()))
        for block in model.language_model.encoder.block
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return max(found)


@pytest.mark.parametrize(
    ("scale", "backend"),
    [(1, "torch"), (3e5, "torch"), (1e8, "torch"), pytest.param(3e5, "triton", marks=INTERPRETED)],
)
def test_a_strong_feed_forward_stays_exact_in_float16(tmp_path: Path, scale: float, backend: str) -> None:
    strong, batch = make_strong(scale), make_batch(batch=2, labels=True)
    assert (largest_stream(strong, batch) > LARGEST) == (scale > 1)
    strong.save_pretrained(tmp_path)
    expected = strong(**batch)
    half = LionForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, kernel_backend=backend).eval()
    with torch.no_grad():
        out = half(**batch)
    questions = without_labels(batch)
    options: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 2}
    half.fold_adapters()
    assert out.logits.dtype == torch.float16
    assert relative_error(out.logits, expected.logits) < BOUND
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)
    assert torch.equal(half.generate(**questions, **options), strong.generate(**questions, **options))


def test_gradients_in_float16_follow_those_in_float32(tmp_path: Path) -> None:
    strong, batch = make_strong(3e5), make_batch(labels=True)
    strong.save_pretrained(tmp_path)
    half = LionForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    for model in (strong, half):
        model.train()(**batch).loss.backward()
    wanted = {name: p.grad for name, p in strong.named_parameters() if p.grad is not None and ".adapter." in name}
    found = {name: p.grad for name, p in half.named_parameters() if name in wanted}
    largest = max(gradient.norm().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = (found[name].float() - gradient).norm().item()
        assert error < 0.05 * gradient.norm().item() + 1e-3 * largest, name


def test_the_casts_are_those_of_transformers(tmp_path: Path) -> None:
    """`.half()` and bfloat16 have no float32 layers; loading in float16 has T5's `wo`, saved again or not."""
    make_model().save_pretrained(tmp_path)

    def dtypes_of_wo(model: LionForCausalLM) -> set[torch.dtype]:
        return {p.dtype for name, p in model.named_parameters() if name.endswith(".wo.weight")}

    half = LionForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert dtypes_of_wo(half) == {torch.float32}
    half.save_pretrained(tmp_path / "half")
    again = LionForCausalLM.from_pretrained(tmp_path / "half").eval()
    assert dtypes_of_wo(again) == {torch.float32}
    assert again.dtype == torch.float16
    brain = LionForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    cast = make_model().half()
    assert (dtypes_of_wo(brain), dtypes_of_wo(cast)) == ({torch.bfloat16}, {torch.float16})
    batch = make_batch(labels=True)
    expected = make_model()(**batch).logits
    for model, bound in ((again, BOUND), (cast, BOUND), (brain, 8 * BOUND)):
        with torch.no_grad():
            assert relative_error(model(**batch).logits, expected) < bound
    with torch.autocast("cpu", torch.float16):
        assert relative_error(make_model()(**batch).logits, expected) < BOUND


KINDS = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32}
ALL_KINDS = ["hhf", "hff", "fff", "hhh", "fhf", "ffh", "bbf", "bff", "bhf", "bbb"]


@pytest.mark.parametrize(
    ("dtypes", "backend"),
    # Triton's interpreter does not compute bfloat16 correctly.
    [(kinds, "torch") for kinds in ALL_KINDS]
    + [pytest.param(kinds, "triton", marks=INTERPRETED) for kinds in ALL_KINDS if "b" not in kinds],
)
def test_adapters_take_any_dtypes_and_return_the_residuals(dtypes: str, backend: str) -> None:
    """The letters are the dtypes of hidden states, residual and weights."""
    hidden_dtype, residual_dtype, weight_dtype = (KINDS[letter] for letter in dtypes)
    torch.manual_seed(0)
    exact = MixtureOfAdapters(make_config().text_config)
    adapters = MixtureOfAdapters(make_config(kernel_backend=backend).text_config)
    for parameter in exact.parameters():
        nn.init.normal_(parameter).data.copy_(parameter.to(weight_dtype))
    adapters.load_state_dict(exact.state_dict())
    hidden = torch.randn(2, 5, 32).to(hidden_dtype)
    residual = torch.randn(2, 5, 32).to(residual_dtype) * (1e6 if residual_dtype == torch.float32 else 1)
    tasks = torch.tensor([0, 1])
    expected = exact.double()(hidden.double(), residual.double(), tasks)
    coarsest = max(torch.finfo(KINDS[letter]).eps for letter in dtypes)
    adapters.to(weight_dtype)
    whole = adapters(hidden, residual, tasks)
    with torch.no_grad():
        adapters.fold()
        folded = adapters(hidden, residual, tasks)
    for found in (whole, folded):
        assert found.dtype == residual_dtype
        assert relative_error(found, expected) < 2 * coarsest


@INTERPRETED
def test_transformers_t5_in_float16_on_the_kernels(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0, initializer_factor=0.3)
    config.dense_act_fn = "gelu"
    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(config).eval()
    for block in [*whole.encoder.block, *whole.decoder.block]:
        block.layer[-1].DenseReluDense.wo.weight.data.mul_(1e6)
    whole.save_pretrained(tmp_path)
    half = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).eval()
    batch = {"input_ids": make_batch()["input_ids"], "labels": make_batch(labels=True)["labels"]}
    with torch.no_grad():
        expected, own = whole(**batch).logits, half(**batch).logits
        apply_lion_kernels(half, "triton")
        found = half(**batch).logits
    assert relative_error(own, expected) < BOUND
    assert relative_error(found, expected) < BOUND
