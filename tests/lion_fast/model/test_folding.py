"""Folded adapters compute the same in every model and batch, and refuse training and loading."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lion_fast import LionForCausalLM
from lion_fast.model.adapters import MixtureOfAdapters
from lion_fast.model.folded_adapters import FoldedAdapters, StackedAdapters
from lion_kernels.core.backend import interpreting
from tests.golden.computing import until_end
from tests.lion_fast.tiny import make_batch, make_model
from tests.rounding import TWO_WAYS, relative_error

TASKS = ("region_level", "image_level")


def make(*args, **overrides) -> LionForCausalLM:
    """Make a model with random scales, routers and biases, as after training."""
    model = make_model(*args, **overrides)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name and not name.endswith(("down_proj.weight", "up_proj.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def in_reference(adapters: MixtureOfAdapters, hidden: Tensor, residual: Tensor, task_ids: Tensor) -> Tensor:
    """Compute section 3.3 of the paper in fp64."""
    out = residual.double()
    for index, adapter in enumerate(adapters.adapters):
        scale, down_weight, down_bias, up_weight, up_bias = (parameter.double() for parameter in adapter())
        inner = torch.relu(hidden.double() @ down_weight.T + down_bias)
        update = scale * (inner @ up_weight.T + up_bias)
        if adapters.has_router:
            update = update * getattr(adapters, f"router_ratio{index + 1}").double()[task_ids].unsqueeze(1)
        out = out + update
    return out


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("triton", marks=pytest.mark.skipif(not interpreting(), reason="no interpreter here"))],
)
@pytest.mark.parametrize("num_adapters", [1, 2])
@torch.no_grad()
def test_a_folded_mixture_equals_the_reference(num_adapters: int, backend: str) -> None:
    model = make(num_adapters=num_adapters, kernel_backend=backend)
    (adapters, *_) = (module for module in model.modules() if isinstance(module, MixtureOfAdapters))
    hidden, residual, task_ids = torch.randn(5, 3, 32), torch.randn(5, 3, 32), torch.tensor([0, 1, 1, 0, 1])
    expected = in_reference(adapters, hidden, residual, task_ids)
    unfolded = adapters(hidden, residual, task_ids)
    adapters.fold()
    assert type(adapters.folded) is (StackedAdapters if backend == "triton" else FoldedAdapters)
    folded = adapters(hidden, residual, task_ids)
    for out in (unfolded, folded):
        assert relative_error(out, expected) < 1e-6
    adapters.unfold()
    assert torch.equal(adapters(hidden, residual, task_ids), unfolded)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_mixed_batch_has_the_same_answers(family: str) -> None:
    model, batch = make(family), make_batch(batch=4, labels=True)
    labels = batch.pop("labels")
    with torch.no_grad():
        plain, tokens = model(**batch, labels=labels).logits, model.generate(**batch, num_beams=3, max_new_tokens=6)
        model.fold_adapters()
        folded = model(**batch, labels=labels).logits
        assert not torch.equal(folded, plain)  # folding changes the rounding
        torch.testing.assert_close(folded, plain, **TWO_WAYS)
        assert torch.equal(model.generate(**batch, num_beams=3, max_new_tokens=6), tokens)
        twin = copy.deepcopy(model)
        model.unfold_adapters()
        assert torch.equal(model(**batch, labels=labels).logits, plain)
        assert torch.equal(twin(**batch, labels=labels).logits, folded)


def test_dtypes(tmp_path: Path) -> None:
    """In half precision, folding does not increase the error; a folded model may be cast."""
    model, batch = make(), make_batch(labels=True)
    exact = model(**batch).logits.detach()
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        half = LionForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        with torch.no_grad():
            plain = (half(**batch).logits.float() - exact).norm()
            half.fold_adapters()
            # The errors were of equal size where measured; their directions depend on the CPU.
            assert (half(**batch).logits.float() - exact).norm() < 3 * plain
    model.fold_adapters()
    with torch.no_grad():
        assert model.double()(**batch).logits.dtype == torch.float64


def test_training_a_folded_model_is_refused() -> None:
    model, batch = make().train(), make_batch(labels=True)
    model.fold_adapters()
    with pytest.raises(RuntimeError, match=r"folded adapters get no gradients: call unfold_adapters\(\)"):
        model(**batch)
    with pytest.raises(RuntimeError, match=r"folded adapters .*: call unfold_adapters\(\)"):
        model.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter." not in name)
    model(**batch).loss.backward()  # other parts may be trained
    assert model.qformer_projection.weight.grad.abs().sum() > 0
    model.unfold_adapters()
    model.requires_grad_(True)
    model(**batch).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".adapter." in n)


def test_a_folded_model_is_saved_unfolded(tmp_path: Path) -> None:
    model, batch = make(), make_batch(labels=True)
    names, plain = model.state_dict().keys(), model(**batch).logits
    model.fold_adapters()
    assert model.state_dict().keys() == names
    model.save_pretrained(tmp_path)
    loaded, info = LionForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded.eval()(**batch).logits, plain)


def test_folding_again_uses_the_current_weights() -> None:
    model, batch = make(), make_batch(labels=True)
    model.fold_adapters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.mul_(1.5)
        model.fold_adapters()
        folded = model(**batch).logits
        model.unfold_adapters()
        torch.testing.assert_close(folded, model(**batch).logits, **TWO_WAYS)


def test_offloaded_adapters_cannot_be_folded() -> None:
    model = make().to("meta")
    with pytest.raises(RuntimeError, match="fold_adapters: expected the adapters' parameters in memory"):
        model.fold_adapters()


@torch.no_grad()
def test_a_folded_mixture_compiles() -> None:
    (adapters, *_) = (module for module in make().modules() if isinstance(module, MixtureOfAdapters))
    adapters.fold()
    given = torch.randn(2, 3, 32), torch.randn(2, 3, 32), torch.tensor([0, 1])
    torch.testing.assert_close(torch.compile(adapters, fullgraph=True, backend="eager")(*given), adapters(*given))


@pytest.mark.parametrize("task", TASKS)
def test_golden_tokens(converted: Path, golden, golden_batch: Callable, task: str) -> None:
    model = LionForCausalLM.from_pretrained(converted).eval()
    model.fold_adapters()
    batch = golden_batch(task)
    del batch["labels"]
    for beams, penalty in ((1, 1.0), (1, 1.5), (5, 1.0), (5, 1.5)):
        ids = model.generate(**batch, num_beams=beams, repetition_penalty=penalty, max_new_tokens=20)
        assert until_end(ids) == until_end(golden.expected[f"{task}.generate.beams{beams}.rp{penalty}"])
