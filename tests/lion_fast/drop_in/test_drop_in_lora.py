"""`apply_lion_kernels` on models of PEFT: LoRA through one operator, and training with batches that mix adapters.

The oracle of a mixed batch is the same model, computed by PEFT with one sample and one adapter at a time.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lion_fast import apply_lion_kernels
from tests.extras import needs
from tests.lion_fast.gradients import Results, copied_gradients, expect_same, expect_same_bits, expect_same_gradients
from tests.lion_fast.tiny import make_batch, make_model
from tests.rounding import TWO_WAYS

peft = needs("peft", "test")

NAMES = ["first", "__base__", "second"]
IDS = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(0))


def make_llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    sizes["initializer_range"] = 0.2  # otherwise the attention has almost no influence
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings))


def make_t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0, dropout_rate=0.0)
    config.dense_act_fn = "gelu"
    return T5ForConditionalGeneration(config)


def make_peft(base: nn.Module | None = None, **first: Any) -> Any:
    """Return a model with two adapters of different ranks, scalings and layers; one is rank-stabilised with biases."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | first
    model = peft.get_peft_model(
        base or make_llama(), peft.LoraConfig(**settings, init_lora_weights=False), adapter_name="first"
    )
    second: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": True,
        "lora_bias": True,
        "target_modules": ["q_proj", "down_proj"],
    }
    if "target_modules" in first:
        second["target_modules"] = first["target_modules"]
        second["lora_bias"] = "embed_tokens" not in first["target_modules"]  # PEFT has no bias for embeddings
    model.add_adapter("second", peft.LoraConfig(**second, init_lora_weights=False))
    model.set_requires_grad(["first", "second"])
    for name, parameter in model.named_parameters():
        if "lora_B.second.bias" in name:
            nn.init.normal_(parameter)
    return model.eval()


def loss_of(model: Any, ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return a loss to which every sample contributes equally, for any number of samples."""
    logits = model(input_ids=ids, **kwargs).logits
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum(), logits


def results_of(model: Any, ids: Tensor, **kwargs: Any) -> Results:
    model.zero_grad()
    loss, logits = loss_of(model, ids, **kwargs)
    loss.backward()
    return logits.detach(), copied_gradients(model)


def one_at_a_time(model: Any, ids: Tensor, names: list[str]) -> Results:
    model.zero_grad()
    logits = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                logits.append(model(input_ids=row[None]).logits)
            continue
        model.set_adapter(name)
        model.set_requires_grad(["first", "second"])
        loss, of_row = loss_of(model, row[None])
        loss.backward()
        logits.append(of_row)
    return torch.cat(logits).detach(), copied_gradients(model)


@pytest.mark.parametrize("active", [["first"], ["second"], ["first", "second"]])
def test_active_adapters_compute_the_same_as_peft(launches: list[str], active: list[str]) -> None:
    model = make_peft()
    model.base_model.set_adapter(active)
    expected = results_of(model, IDS)
    result = apply_lion_kernels(model, backend="triton")
    expect_same(results_of(model, IDS), expected)
    assert launches.count("update_kernel") + launches.count("linear_kernel") >= 4  # q_proj and down_proj of two layers
    launches.clear()
    result.undo()
    expect_same_bits(results_of(model, IDS), expected)
    assert not launches


def test_lora_modules_are_rewired() -> None:
    result = apply_lion_kernels(make_peft())
    assert Counter((module.class_name, module.operators) for module in result.rewired) == {
        ("Linear", "mixture_of_lora_linear"): 6,
        ("LoraModel", "adapter_names in training"): 1,
        ("LlamaDecoderLayer", "adapter_names in training"): 2,
        ("LlamaRMSNorm", "rms_norm"): 5,
    }
    assert {(module.class_name, module.reason) for module in result.left} == {
        ("LlamaAttention", "no operator of lion_kernels has its mathematics"),
        ("LlamaMLP", "no operator of lion_kernels has its mathematics"),
    }


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_may_mix_adapters_in_training(launches: list[str], backend: str, training: bool) -> None:
    expected = one_at_a_time(make_peft(), IDS, NAMES)
    model = make_peft().train(training)
    if training:
        with pytest.raises(ValueError, match="when the model is in training mode"):
            model(input_ids=IDS, adapter_names=NAMES)
    apply_lion_kernels(model, backend)
    expect_same(results_of(model, IDS, adapter_names=NAMES), expected)
    assert bool(launches) == (backend == "triton")
    assert model.base_model.training == training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_keep_the_names_of_their_batch(backend: str, reentrant: bool) -> None:
    """Each forward pass has its own names, when several precede backward."""
    model = make_peft().train()
    apply_lion_kernels(model, backend)
    expected = results_of(model, IDS, adapter_names=NAMES)
    reverse = results_of(model, IDS, adapter_names=NAMES[::-1])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expect_same(results_of(model, IDS, adapter_names=NAMES), expected)
    model.zero_grad()
    losses = [loss_of(model, IDS, adapter_names=names)[0] for names in (NAMES, NAMES[::-1])]
    sum(losses).backward()
    expect_same_gradients(
        copied_gradients(model), {name: gradient + reverse[1][name] for name, gradient in expected[1].items()}
    )


def test_names_lost_by_a_checkpoint_raise() -> None:
    """The base model's own checkpoint loses the names; other names would silently give wrong results."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.config = nn.Embedding(32, 16), None
            self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 32)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = checkpoint(self.hidden, self.embedding(input_ids), use_reentrant=False)
            return self.head(x)

    model = make_peft(Checkpointed(), target_modules=["hidden"]).train()
    apply_lion_kernels(model, backend="triton")
    with pytest.raises(RuntimeError, match=r"adapter_names: a layer of a batch that mixes adapters is computed again"):
        model(input_ids=IDS, adapter_names=NAMES).sum().backward()
    model(input_ids=IDS).sum().backward()


def test_other_lora_layers_mix_as_in_peft() -> None:
    model = make_peft(target_modules=["embed_tokens", "q_proj"])
    expected = results_of(model, IDS, adapter_names=NAMES)
    result = apply_lion_kernels(model.train(), backend="triton")
    assert ("Embedding", "no operator for layer.Embedding") in {(m.class_name, m.reason) for m in result.left}
    expect_same(results_of(model, IDS, adapter_names=NAMES), expected)


def test_wrong_names_raise_in_peft_and_leave_no_hooks() -> None:
    model = make_peft().train()
    apply_lion_kernels(model, backend="triton")
    expected = results_of(model, IDS)
    for names, message in (
        (["third"] * 3, r"non-existing adapter\(s\): third"),
        (["first"], "Length of `adapter_names`"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=IDS, adapter_names=names)
        assert model.base_model.training
        expect_same_bits(results_of(model, IDS), expected)


def test_dropout_has_the_random_numbers_of_peft(launches: list[str]) -> None:
    """The same seed gives the same logits and gradients; several active adapters are left to PEFT, and listed."""
    model = make_peft(lora_dropout=0.5).train()
    found: list[tuple[Results, Results]] = []
    for apply in (False, True):
        if apply:
            result = apply_lion_kernels(model, backend="triton")
            assert {m.reason for m in result.left if m.class_name == "Linear"} == {
                "lora_dropout ('first' 0.5): PEFT computes several at once in training, as each reads another input"
            }
        both: list[Results] = []
        for active in (["first"], ["first", "second"]):
            model.base_model.set_adapter(active)
            torch.manual_seed(0)
            both.append(results_of(model, IDS))
        found.append((both[0], both[1]))
    for got, expected in zip(found[1], found[0], strict=True):
        expect_same(got, expected)
    launches.clear()
    layer = model.base_model.model.model.layers[0].self_attn.v_proj  # has a single adapter
    layer(torch.ones(3, 5, 16))
    assert "update_kernel" in launches
    torch.manual_seed(1)
    assert not torch.equal(results_of(model, IDS)[0], found[1][1][0])


def test_a_mixed_batch_drops_inputs_per_adapter() -> None:
    class Halves(nn.Module):
        """A deterministic dropout, so that samples one by one are the oracle."""

        p = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x * self.p if self.training else x

    def make() -> Any:
        model = make_peft()
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.lora_dropout["first"] = Halves()
        return model.train()

    expected = one_at_a_time(make(), IDS, NAMES)
    model = make()
    apply_lion_kernels(model, backend="triton")
    expect_same(results_of(model, IDS, adapter_names=NAMES), expected)
    assert not torch.allclose(results_of(model.eval(), IDS, adapter_names=NAMES)[0], expected[0])


def test_dora_is_not_rewired() -> None:
    model = make_peft(use_dora=True)
    expected = results_of(model, IDS)
    result = apply_lion_kernels(model, backend="triton")
    reasons = {module.reason for module in result.left if module.class_name == "Linear"}
    assert reasons == {"PEFT computes the adapters that are 'first' Dora", "every adapter is 'first' Dora"}
    expect_same(results_of(model, IDS), expected)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        model(input_ids=IDS, adapter_names=NAMES)


@pytest.mark.parametrize("case", ["merged", "disabled"])
def test_merged_and_disabled_adapters(case: str) -> None:
    model = make_peft()
    result = apply_lion_kernels(model, backend="triton")
    (model.merge_adapter if case == "merged" else model.base_model.disable_adapter_layers)()
    with torch.no_grad():
        got = model(input_ids=IDS).logits
        result.undo()
        torch.testing.assert_close(got, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    if case == "merged":
        model.unmerge_adapter()


def test_half_precision_keeps_the_dtypes_of_peft() -> None:
    """Under autocast the result has the base layer's dtype; without it, PEFT computes float32 adapters in float32."""
    model = make_peft().half()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 16)
    for adapters in (torch.float16, torch.float32):
        for part in (layer.lora_A, layer.lora_B):
            part.to(adapters)
        expected = layer(x.half()).detach()
        with torch.autocast("cpu", torch.float16):
            under_autocast = layer(x).detach()
        result = apply_lion_kernels(model, backend="triton")
        got = layer(x.half()).detach()
        with torch.autocast("cpu", torch.float16):
            got_under_autocast = layer(x).detach()
        listed = any("adapters of another dtype" in module.reason for module in result.left)
        assert listed == (adapters == torch.float32)
        assert torch.equal(got, expected) or adapters == torch.float16
        for value, wanted in ((got, expected), (got_under_autocast, under_autocast)):
            assert value.dtype == wanted.dtype == torch.float16
            assert (value - wanted).norm() < 2e-3 * wanted.norm()
        result.undo()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(make_copy: Callable[[Any], Any]) -> None:
    model = make_peft().train()
    expected = results_of(model, IDS)
    apply_lion_kernels(model, backend="triton")
    mixed = results_of(model, IDS, adapter_names=NAMES)
    twin = make_copy(model)
    expect_same_bits(results_of(twin, IDS, adapter_names=NAMES), mixed)
    apply_lion_kernels(twin).undo()
    expect_same_bits(results_of(twin, IDS), expected)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        twin(input_ids=IDS, adapter_names=NAMES)


def test_saved_as_before_and_loaded_by_peft(tmp_path: Path) -> None:
    model = make_peft()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    keys, storage = list(model.state_dict()), [value.data_ptr() for value in model.state_dict().values()]
    apply_lion_kernels(model, backend="triton")
    assert list(model.state_dict()) == keys
    assert [value.data_ptr() for value in model.state_dict().values()] == storage
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "first").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_adapters_can_be_added_later() -> None:
    """Rewired layers support a new adapter; undoing works as before."""
    model = make_peft()
    result = apply_lion_kernels(model, backend="triton")
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("third")
    got = results_of(model, IDS)
    result.undo()
    expect_same(got, results_of(model, IDS))


def test_the_forward_pass_compiles() -> None:
    model = make_peft()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        apply_lion_kernels(model, backend="triton")
        compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_t5() -> None:
    """Attention, norms and feed-forward are rewired, unless an attention other than sdpa is requested; beams work."""
    model = make_peft(make_t5(), target_modules=["q", "wo"])
    beams = {"num_beams": 2, "max_new_tokens": 2, "adapter_names": NAMES}

    def run() -> tuple[Results, Tensor]:
        results = results_of(model.train(), IDS, decoder_input_ids=IDS, adapter_names=NAMES)
        return results, model.eval().generate(input_ids=IDS, **beams)

    with torch.no_grad():
        tokens = model.generate(input_ids=IDS, **beams)
    expected = results_of(model, IDS, decoder_input_ids=IDS, adapter_names=NAMES)
    config = model.base_model.model.encoder.config
    result = apply_lion_kernels(model, backend="triton")
    got, got_tokens = run()
    expect_same(got, expected)
    assert torch.equal(got_tokens, tokens)
    found = Counter(module.operators for module in result.rewired)
    assert found["relative_bias_attention, multi_scale_attention"] == 1 + 2
    assert (found["gated_gelu"], found["rms_norm"]) == (2, 2 + 1 + 3 + 1)
    assert not result.left
    result.undo()
    assert model.base_model.model.encoder.config is config
    config._attn_implementation = "eager"
    assert {(m.class_name, m.reason) for m in apply_lion_kernels(model).left} == {
        ("T5Attention", "attn_implementation='eager' was asked for")
    }


def test_lora_on_lion() -> None:
    model = peft.get_peft_model(
        make_model(kernel_backend="torch"), peft.LoraConfig(r=4, target_modules=["q", "query"], init_lora_weights=False)
    )
    batch = make_batch(batch=2, labels=True)
    expected = model(**batch).logits
    result = apply_lion_kernels(model, backend="triton")
    assert {"mixture_of_lora_linear", "mixture_of_adapters"} <= {module.operators for module in result.rewired}
    torch.testing.assert_close(model(**batch).logits, expected, **TWO_WAYS)
    result.undo()
    assert torch.equal(model(**batch).logits, expected)
