"""The whole model on lion_kernels: what PyTorch gives, with every operator in a kernel and none left out in silence.

On the GPU where there is one, else in Triton's interpreter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lion_fast.model.adapters
import lion_fast.model.attention
import lion_fast.model.kernel_modules
from lion_fast import LionForCausalLM
from lion_fast.model.attention import KERNEL_ATTENTION
from lion_fast.training.stages import STAGES, freeze_for_stage, parameter_groups
from tests.lion_fast import tiny
from tests.lion_fast.gradients import expect_same_gradients, gradients_of, train
from tests.lion_fast.tiny import PART, without_labels
from tests.rounding import LOSS_TWO_WAYS, TWO_WAYS, relative_error

Calls = dict[str, int]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = {
    lion_fast.model.attention: ("multi_scale_attention", "relative_bias_attention"),
    lion_fast.model.kernel_modules: ("assemble_inputs", "gated_gelu", "residual_layer_norm", "rms_norm"),
    lion_fast.model.adapters: ("mixture_of_adapters",),
}
# In the models of `make_model`: a vision tower of 3 layers, an aggregator of 2 blocks with 2 attentions each, a
# Q-Former of 2 layers with cross-attention in the first, and a language model of 2 layers, T5's in each of its halves.
VISION = {"multi_scale_attention": 3 + 2 * 2 + 3, "residual_layer_norm": 2 * 3 + 2 * 3 + 1, "assemble_inputs": 1}
EXPECTED: dict[str, Calls] = {
    "t5": VISION
    | {"multi_scale_attention": 3 + 2 * 2 + 3 + 2, "relative_bias_attention": 2 + 2, "gated_gelu": 4}
    | {"rms_norm": 2 * 2 + 1 + 2 * 3 + 1, "mixture_of_adapters": 4},
    "llama": VISION | {"rms_norm": 2 * 2 + 1, "mixture_of_adapters": 2},
    "qwen2": VISION | {"rms_norm": 2 * 2 + 1, "mixture_of_adapters": 2},
    "qwen3": VISION | {"rms_norm": 2 * 4 + 1, "mixture_of_adapters": 2},
}
FAMILIES = tuple(EXPECTED)


def make_model(*args: Any, **settings: Any) -> LionForCausalLM:
    return tiny.make_model(*args, **settings).to(DEVICE)


def make_batch(**settings: Any) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in tiny.make_batch(**settings).items()}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> Calls:
    """How often models on the kernels called each operator; a call that launched no kernel fails."""
    counts: Calls = {}

    def counted(name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            before = len(launches)
            out = operator(*args, **kwargs)
            if kwargs["backend"] == "torch":
                return out
            assert len(launches) > before, f"{name} launched no kernel"
            counts[name] = counts.get(name, 0) + 1
            return out

        return call

    for module, names in OPERATORS.items():
        for name in names:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


def padded_batch(family: str) -> dict[str, Tensor]:
    """Make a sample of each task, of which one has padding everywhere: question, tags' sentence and answer."""
    batch = make_batch(batch=2, labels=True, masks=True)
    batch["attention_mask"][1, slice(4, None) if family == "t5" else slice(0, 3)] = 0
    batch["qformer_attention_mask"][1, 3:] = 0
    batch["labels"][1, 2:] = -100
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_runs_in_its_kernel(calls: Calls, launches: list[str], family: str) -> None:
    model = make_model(family, kernel_backend="triton")
    model.get_input_embeddings().requires_grad_(False)  # as in LION's training
    loss = model(**make_batch(batch=1, labels=True)).loss
    assert calls == EXPECTED[family]
    forward = len(launches)
    loss.backward()
    assert len(launches) - forward >= sum(calls.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_pytorch_launches_no_kernel_and_attends_as_under_its_own_name(
    launches: list[str], family: str, backend: str
) -> None:
    """On a CPU `auto` is PyTorch: loss, gradients and tokens have the bits that sdpa asked for by name gives."""
    if backend == "auto" and DEVICE.type == "cuda":
        pytest.skip("on a GPU `auto` is Triton")
    batch, results = padded_batch(family), []
    for settings in ({"kernel_backend": backend}, {"kernel_backend": "torch", "attn_implementation": "sdpa"}):
        model = make_model(family, **settings)
        tokens = model.generate(**without_labels(batch), num_beams=2, max_new_tokens=3)
        results.append((*gradients_of(model, batch), tokens))
    (loss, gradients, tokens), (expected_loss, expected, expected_tokens) = results
    assert not launches
    assert torch.equal(loss, expected_loss)
    assert torch.equal(tokens, expected_tokens)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


@pytest.fixture(params=["t5", "llama", "qwen3"])
def both(request: pytest.FixtureRequest) -> tuple[str, dict[str, LionForCausalLM]]:
    """A family, and its model on PyTorch and on the kernels."""
    family = request.param
    return family, {backend: make_model(family, kernel_backend=backend) for backend in ("torch", "triton")}


def test_kernels_give_what_torch_gives(both) -> None:
    """Loss and every gradient, with padding and mixed tasks, whether or not blocks are recomputed in backward."""
    family, models = both
    batch = padded_batch(family)
    expected_loss, expected = gradients_of(models["torch"], batch)
    model = models["triton"].train()  # no layer drops anything; checkpoints are taken in training only
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, gradients = gradients_of(model, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=LOSS_TWO_WAYS, atol=0)
        expect_same_gradients(gradients, expected)


GENERATION = {
    "greedy": {"num_beams": 1, "repetition_penalty": 1.0},
    "beams": {"num_beams": 3},
    "static cache": {"num_beams": 1, "cache_implementation": "static"},
    "no cache": {"num_beams": 1, "use_cache": False},
}


# Qwen3 is Llama with norms of queries and keys; what caches them is the same.
@pytest.mark.parametrize(
    ("both", "setting"),
    [*((family, setting) for family in ("t5", "llama") for setting in GENERATION), ("qwen3", "beams")],
    indirect=["both"],
)
def test_kernels_generate_what_torch_generates(both, setting: str) -> None:
    family, models = both
    inputs = without_labels(padded_batch(family))
    tokens = {
        backend: model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **GENERATION[setting])
        for backend, model in models.items()
    }
    assert torch.equal(tokens["triton"], tokens["torch"])


def test_decoding_runs_in_the_kernels(calls: Calls) -> None:
    """A step with a cache: self-attention from one query to all before it, and cross-attention."""
    model, batch = make_model(kernel_backend="triton"), make_batch(batch=1)
    counts = []
    for tokens in (2, 3):
        calls.clear()
        model.generate(**batch, num_beams=1, max_new_tokens=tokens, min_new_tokens=tokens)
        counts.append(dict(calls))
    step = {name: counts[1][name] - counts[0][name] for name in counts[1] if counts[1][name] != counts[0][name]}
    decoder = {"multi_scale_attention": 2, "relative_bias_attention": 2, "rms_norm": 7, "gated_gelu": 2}
    assert step == decoder | {"mixture_of_adapters": 2}


def test_dropout_is_that_of_a_seed() -> None:
    """Recomputed blocks drop what they dropped before; another seed drops other values."""
    model, batch = make_model(kernel_backend="triton").train(), make_batch(batch=1, labels=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.2)
    torch.manual_seed(0)
    loss, expected = gradients_of(model, batch)
    assert model(**batch).loss != loss
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    again, gradients = gradients_of(model, batch)
    assert torch.equal(again, loss)
    expect_same_gradients(gradients, expected)


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_an_attention_that_is_asked_for_stays(tmp_path: Path, calls: Calls, choice: str) -> None:
    model, batch = make_model(kernel_backend="triton"), make_batch(batch=1, labels=True)
    model.save_pretrained(tmp_path)
    asked = LionForCausalLM.from_pretrained(tmp_path, attn_implementation=choice).eval().to(DEVICE)
    assert asked.config.kernel_backend == "triton"
    logits = asked(**batch).logits
    others = {name for name in EXPECTED["t5"] if "attention" not in name}
    assert calls.keys() == others
    torch.testing.assert_close(logits, model(**batch).logits, **TWO_WAYS)


def test_attention_part_by_part(tmp_path: Path, calls: Calls) -> None:
    make_model(kernel_backend="triton").save_pretrained(tmp_path)
    choice = {"vision_config": "eager", "qformer_config": "sdpa"}
    model = LionForCausalLM.from_pretrained(tmp_path, attn_implementation=choice).eval().to(DEVICE)
    parts = ("vision_config", "qformer_config", "aggregator_config", "text_config")
    chosen = [getattr(model.config, part)._attn_implementation for part in parts]
    assert chosen == ["eager", "sdpa", KERNEL_ATTENTION, KERNEL_ATTENTION]
    model(**make_batch(batch=1, labels=True))
    assert calls["multi_scale_attention"] == 2 * 2 + 2  # aggregator, T5's cross-attention
    assert calls["relative_bias_attention"] == 4


def test_only_padding_masks_reach_the_kernels() -> None:
    """A mask of queries by keys would lose its rows: it is refused."""
    batch = make_batch(batch=1, labels=True)
    any_mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask: expected padding, bool \[B, 1, 1, Lk\].* \[1, 1, 4, 4\]"):
        make_model(kernel_backend="triton").language_model(
            inputs_embeds=torch.zeros(1, 7, 32),
            labels=batch["labels"],
            decoder_attention_mask=any_mask,
            task_ids=batch["task_ids"],
        )


def test_other_activations_are_left_to_transformers(calls: Calls) -> None:
    """The tanh form of the GELU, Flan-T5's own, is not the kernel's."""
    batch, logits = make_batch(batch=1, labels=True), []
    for backend in ("torch", "triton"):
        logits.append(make_model(text={"dense_act_fn": "gelu_new"}, kernel_backend=backend)(**batch).logits)
    assert "gated_gelu" not in calls
    assert "rms_norm" in calls
    torch.testing.assert_close(logits[1], logits[0], **TWO_WAYS)


def test_a_replaced_embedding_is_called(calls: Calls) -> None:
    """As LoRA replaces it: it knows of no prefix, and what it adds has to take effect."""

    class Doubled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, batch = make_model(kernel_backend="triton"), make_batch(batch=1, labels=True)
    before = model(**batch).logits
    assert calls.pop("assemble_inputs") == 1
    model.set_input_embeddings(Doubled(64, 32, _weight=model.get_input_embeddings().weight.detach()))
    assert not torch.allclose(model(**batch).logits, before, rtol=0.1)
    assert "assemble_inputs" not in calls


def test_padding_s_row_of_the_embedding_learns_nothing() -> None:
    """As `nn.Embedding` has it, with a table that is trained."""
    batch = make_batch(batch=1, labels=True)
    batch["input_ids"][0, 0] = 0
    gradients = [
        gradients_of(make_model("llama", kernel_backend=backend), batch)[1]["language_model.model.embed_tokens.weight"]
        for backend in ("torch", "triton")
    ]
    assert not gradients[1][0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "backend"), [("t5", "triton"), ("llama", "triton"), ("t5", "torch")])
def test_the_whole_forward_pass_compiles(family: str, backend: str) -> None:
    model, batch = make_model(family, kernel_backend=backend), make_batch(batch=2, labels=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_dict_is_that_of_any_backend(tmp_path: Path, family: str) -> None:
    models = [make_model(family, kernel_backend=backend) for backend in ("torch", "triton")]
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    models[1].save_pretrained(tmp_path)
    loaded, info = LionForCausalLM.from_pretrained(tmp_path, kernel_backend="torch", output_loading_info=True)
    assert not any(info.values()), info
    assert not any(isinstance(module, lion_fast.model.kernel_modules.OnKernels) for module in loaded.modules())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_half_precision(tmp_path: Path, family: str) -> None:
    """fp16, in which transformers keeps T5's `wo` in fp32: no worse than twice PyTorch's own distance from fp32."""
    exact, batch = make_model(family), make_batch(labels=True)
    exact.save_pretrained(tmp_path)
    expected = exact(**batch).logits
    error = {}
    for backend in ("torch", "triton"):
        model = LionForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, kernel_backend=backend).eval().to(DEVICE)
        error[backend] = relative_error(model(**batch).logits, expected)
    assert error["triton"] < 2 * error["torch"] < 0.1


@pytest.mark.slow
def test_six_training_steps() -> None:
    """The same curve, the same parameters and the same answers.

    AdamW's epsilon lies above rounding, or what has no gradient but rounding, as a key's bias, would go its own way.
    """
    narrow = {**PART, "num_attention_heads": 1}
    smallest: dict[str, Any] = {
        "vision_config": {**narrow, "num_hidden_layers": 2, "image_size": 14},
        "qformer_config": {**narrow, "num_hidden_layers": 1},
        "aggregator_config": {**narrow, "feature_layers": [1, 0], "projection_size": 24},
        "text": {"num_layers": 1, "num_heads": 2},
    }
    batch, results = make_batch(batch=2, image_size=14, labels=True), []
    for backend in ("torch", "triton"):
        model = make_model(**smallest, kernel_backend=backend)
        freeze_for_stage(model, STAGES[2])
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-2), eps=1e-6)
        losses = train(model, [batch] * 6, optimizer)
        trained = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        results.append((losses, trained, model.generate(**without_labels(batch), num_beams=2, max_new_tokens=4)))
    (expected_losses, expected, expected_tokens), (losses, trained, tokens) = results
    assert expected_losses[-1] < 0.8 * expected_losses[0]
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert (trained - expected).norm() < 1e-4 * expected.norm()
    assert torch.equal(tokens, expected_tokens)
