"""The whole model on a GPU: the kernels against PyTorch, compiled, in a CUDA graph, and for reproducibility."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_fast import LionForCausalLM
from lion_fast.training.stages import STAGES, freeze_for_stage
from tests.lion_fast.tiny import make_batch, make_model, without_labels
from tests.rounding import relative_error

pytestmark = pytest.mark.gpu

Build = Callable[..., LionForCausalLM]
FAMILIES = ("t5", "llama", "qwen3")

# LION's head dimensions (88 and 64), rank and number of patches, in few and narrow layers.
PARTS: dict[str, Any] = {
    "vision_config": {"hidden_size": 176, "intermediate_size": 768, "image_size": 224},
    "qformer_config": {"hidden_size": 128, "intermediate_size": 256},
    "aggregator_config": {
        "hidden_size": 176,
        "num_attention_heads": 2,
        "intermediate_size": 384,
        "projection_size": 704,
    },
    "num_query_tokens": 32,
    "adapter_rank": 64,
}
DECODER = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "num_attention_heads": 4}
TEXT: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 256, "d_kv": 64, "d_ff": 640, "num_heads": 4},
    "llama": DECODER,
    "qwen3": DECODER,
}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Factory of a family's model on the GPU, with the same weights for every dtype and backend."""

    def make(family: str, dtype: torch.dtype, kernel_backend: str) -> LionForCausalLM:
        path = tmp_path / family
        if not path.exists():
            make_model(family, text=TEXT[family], **PARTS).save_pretrained(path)
        model = LionForCausalLM.from_pretrained(path, dtype=dtype, kernel_backend=kernel_backend).eval().to("cuda")
        freeze_for_stage(model, STAGES[2])
        return model

    return make


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three samples of mixed tasks with padding, on the GPU."""
    made = make_batch(image_size=224, labels=True)
    made["qformer_attention_mask"] = torch.ones_like(made["qformer_input_ids"])
    made["qformer_attention_mask"][1, 3:] = 0
    made["labels"][1, 2:] = -100
    return {name: value.to("cuda") for name, value in made.items()}


def outputs(model: LionForCausalLM, batch: dict[str, Tensor], forward: Any = None) -> dict[str, Tensor]:
    """Return logits, loss, and the gradients of each part as one vector."""
    model.zero_grad()
    out = (forward or model)(**batch)
    out.loss.backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(name.split(".")[0], []).append(parameter.grad.flatten())
    gradients = {f"gradient of {part}": torch.cat(values) for part, values in parts.items()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_fp32_as_pytorch(
    build: Build, batch: dict[str, Tensor], family: str, weights: torch.dtype
) -> None:
    """With bf16 weights, and with fp32 weights and bf16 products, as in training."""
    expected = outputs(build(family, torch.float32, "torch"), batch)
    errors = {}
    for backend in ("torch", "triton"):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=weights == torch.float32):
            got = outputs(build(family, weights, backend), batch)
        errors[backend] = {name: relative_error(got[name], value) for name, value in expected.items()}
        assert got.keys() == expected.keys()
    for name, error in errors["triton"].items():
        # The error of a single number, such as the loss, may be small by chance.
        assert error < 2 * errors["torch"][name] + 2**-8, name


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_pytorch(build: Build, batch: dict[str, Tensor], family: str) -> None:
    models = {backend: build(family, torch.float32, backend) for backend in ("torch", "triton")}
    expected, got = (outputs(model, batch) for model in models.values())
    for name, value in expected.items():
        assert relative_error(got[name], value) < 1e-4, name
    tokens = [
        model.generate(**without_labels(batch), num_beams=3, max_new_tokens=8, min_new_tokens=8)
        for model in models.values()
    ]
    assert torch.equal(tokens[0], tokens[1])


def test_auto_is_triton_on_a_gpu(build: Build, batch: dict[str, Tensor]) -> None:
    logits = [build("t5", torch.bfloat16, backend)(**batch).logits for backend in ("auto", "triton")]
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_decoding_is_as_close_to_fp32_as_pytorch(build: Build, batch: dict[str, Tensor], family: str) -> None:
    """Compare the logits of every step with a cache, along the tokens that fp32 chooses."""
    inputs = without_labels(batch)
    once = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 8, "min_new_tokens": 8}
    exact = build(family, torch.float32, "torch")
    path = exact.generate(**inputs, **once)

    def along_the_path(sample: int, ids: Tensor) -> list[int]:
        return [int(path[sample, ids.shape[-1]])]

    def steps(model: LionForCausalLM) -> Tensor:
        out = model.generate(
            **inputs,
            **once,
            prefix_allowed_tokens_fn=along_the_path,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, path)
        return torch.stack(out.logits)

    expected = steps(exact)
    plain, got = (steps(build(family, torch.bfloat16, backend)) for backend in ("torch", "triton"))
    assert relative_error(got, expected) < 2 * relative_error(plain, expected) + 2**-8


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(build: Build, batch: dict[str, Tensor], family: str) -> None:
    model = build(family, torch.float32, "triton")
    expected = outputs(model, batch)
    for name, value in outputs(model, batch, torch.compile(model.forward, fullgraph=True)).items():
        assert relative_error(value, expected[name]) < 1e-4, name


@torch.no_grad()
def test_a_pass_in_a_cuda_graph(build: Build, batch: dict[str, Tensor]) -> None:
    """Vision, prefix, encoder and the decoder's first step are captured once and replayed for another batch."""
    model = build("t5", torch.bfloat16, "triton")
    given = without_labels(batch)
    given["decoder_input_ids"] = torch.zeros(3, 1, dtype=torch.long, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and fills what is cached
        for _ in range(3):
            model(**given, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(**given, use_cache=False).logits
    for seed in (1, 2):
        for name, value in make_batch(image_size=224, seed=seed).items():
            given[name].copy_(value)
        graph.replay()
        assert torch.equal(logits, model(**given, use_cache=False).logits)


def test_two_hundred_times_the_same_bits(build: Build, batch: dict[str, Tensor]) -> None:
    model = build("t5", torch.bfloat16, "triton")
    first = outputs(model, batch)
    for _ in range(200):
        for name, value in outputs(model, batch).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_adapters(build: Build, batch: dict[str, Tensor], family: str) -> None:
    """The kernels' folded operands give the same bits; PyTorch's give another rounding."""
    with torch.no_grad():
        model = build(family, torch.bfloat16, "triton")
        plain = model(**batch).logits
        model.fold_adapters()
        assert torch.equal(model(**batch).logits, plain)
        model = build(family, torch.float32, "torch")
        plain = model(**batch).logits
        model.fold_adapters()
        assert relative_error(model(**batch).logits, plain) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generation_with_a_static_cache(build: Build, batch: dict[str, Tensor], family: str, num_beams: int) -> None:
    """With one beam, transformers compiles the steps into CUDA graphs on a GPU; with several beams it does not."""
    model, inputs = build(family, torch.float32, "triton"), without_labels(batch)
    search = {"num_beams": num_beams, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(**inputs, **search)
    model.fold_adapters()
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **search, cache_implementation="static"), expected)
    assert hasattr(model.language_model, "_compiled_call") == (num_beams == 1)
