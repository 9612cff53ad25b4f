"""`apply_lion_kernels` on a double of the original LION and on `LionForCausalLM`.

The kernels run in the interpreter on a CPU, or compiled on a GPU.
"""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lion_fast import LionForCausalLM, apply_lion_kernels
from lion_reference.lion import LION
from tests.extras import needs
from tests.lion_fast.drop_in.original_double import (
    CONFIG,
    T5Attention,
    T5LayerFF,
    T5LayerNorm,
    make_original,
    make_samples,
    set_adapter_t5,
    set_router_idx,
)
from tests.lion_fast.gradients import Results, copied_gradients, expect_near, expect_same, expect_same_bits
from tests.lion_fast.tiny import make_batch, make_model

TASKS = ("region_level", "image_level")


def results_of(model: Any, *args: Any) -> Results:
    """Return logits and gradients."""
    model.zero_grad()
    loss, logits = model(*args)
    loss.backward()
    return logits.detach(), copied_gradients(model)


def expect_all_near(got: list[Tensor], expected: list[Tensor]) -> None:
    """Expect equal outputs and gradients; a router ratio's gradient, a cancelling sum, was off by up to 3e-6."""
    for value, wanted in zip(got, expected, strict=True):
        expect_near(value, wanted, share=3e-5)


@pytest.fixture(scope="module")
def expected() -> dict[str, Results]:
    """Return the original's results, by task."""
    return {task: results_of(make_original(), make_samples(task)) for task in TASKS}


@pytest.fixture
def feed_forward() -> Any:
    """Return a feed-forward layer of T5 with its router and a task."""
    torch.manual_seed(0)
    holder = nn.ModuleList([T5LayerFF(CONFIG.t5)])
    set_adapter_t5(holder, 32, 2, 8)
    for parameter in holder.parameters():
        nn.init.normal_(parameter, std=0.3)
    set_router_idx(holder, 1)
    return holder


def outputs_and_gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    module.zero_grad()
    out = module(*inputs)
    out.square().sum().backward()
    return [out.detach(), *copied_gradients(module).values()]


def test_the_double_computes_the_reference(expected: dict[str, Results]) -> None:
    reference, samples = LION(CONFIG).eval(), make_samples()
    state = make_original().state_dict()
    reference.load_state_dict({name: value for name, value in state.items() if "embed_tokens" not in name})
    inputs = [samples[name] for name in ("image", "text", "text_mask", "question", "question_mask")]
    for number, task in enumerate(TASKS):
        output = reference(*inputs, torch.full((2,), number), labels=samples["labels"])
        torch.testing.assert_close(expected[task][0], output.logits, rtol=1e-5, atol=1e-6)


def test_every_part_is_rewired() -> None:
    result = apply_lion_kernels(make_original())
    assert Counter((module.class_name, module.operators) for module in result.rewired) == {
        ("Attention", "multi_scale_attention"): 3,
        ("BertSelfAttention", "multi_scale_attention"): 2 + 1 + 2 * 2,
        ("BertSelfOutput", "residual_layer_norm"): 2 + 1 + 2 * 2,
        ("BertOutput", "residual_layer_norm"): 2 * 2 + 2,
        ("T5Stack", "the mask of relative_bias_attention"): 2,
        ("T5Attention", "relative_bias_attention, multi_scale_attention"): 2 + 2 * 2,
        ("T5LayerNorm", "rms_norm"): 2 * 2 + 1 + 2 * 3 + 1,
        ("T5DenseGatedActDense", "gated_gelu"): 4,
        ("AdapterRouter", "mixture_of_adapters"): 4,
        ("T5LayerFF", "mixture_of_adapters"): 4,
    }
    assert {(module.class_name, module.reason) for module in result.left} == {
        ("Mlp", "no operator of lion_kernels has its mathematics")
    }


@pytest.mark.parametrize(("task", "checkpointing"), [("region_level", False), ("image_level", True)])
def test_kernels_compute_the_same_as_the_original(
    expected: dict[str, Results], launches: list[str], task: str, checkpointing: bool
) -> None:
    """Logits and every gradient agree, with padding, also with blocks recomputed in backward."""
    model = make_original().train()  # without dropout in any layer
    apply_lion_kernels(model, backend="triton")
    for stack in (model.t5_model.encoder, model.t5_model.decoder):
        stack.gradient_checkpointing = model.visual_encoder.use_checkpoint = checkpointing
    expect_same(results_of(model, make_samples(task)), expected[task])
    assert set(launches) >= {
        "hidden_kernel",
        "update_kernel",
        "attention_forward",
        "attention_backward_keys",
        "gated_gelu_forward_kernel",
        "residual_layer_norm_forward_kernel",
        "rms_norm_backward_kernel",
    }


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_pytorch_gives_the_same_bits(expected: dict[str, Results], launches: list[str], backend: str) -> None:
    model = make_original()
    apply_lion_kernels(model, backend)
    for task in TASKS:
        expect_same_bits(results_of(model, make_samples(task)), expected[task])
    assert not launches


def test_names_and_storage_are_kept_and_undo_restores(expected: dict[str, Results]) -> None:
    model = make_original()
    had = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    result = apply_lion_kernels(model, backend="triton")
    for _ in range(2):
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
        assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state
        assert all(isinstance(module, had[name][0]) for name, module in model.named_modules())
        result.undo()
    result.undo()  # no effect
    for name, module in model.named_modules():
        cls, attributes = had[name]
        assert type(module) is cls
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[key] is value for key, value in attributes.items())
    expect_same_bits(results_of(model, make_samples()), expected["region_level"])


def test_generated_tokens_are_the_same() -> None:
    """Generation keeps keys and values from step to step."""
    model, samples = make_original(), make_samples("image_level")
    tokens = model.generate(samples, steps=3)
    apply_lion_kernels(model, backend="triton")
    assert torch.equal(model.generate(samples, steps=3), tokens)


@pytest.fixture
def decoder() -> tuple[Any, tuple[Tensor, ...]]:
    """Return the decoder and its input: embeddings, their mask, the encoder's output and its mask."""
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(2, length, 32, generator=generator) for length in (4, 6))
    mask, context_mask = torch.ones(2, 4).long(), torch.ones(2, 6).long()
    mask[1, 2:] = context_mask[1, 3:] = 0
    stack = make_original().t5_model.decoder
    set_router_idx(stack, 1)
    return stack, (x, mask, context, context_mask)


@pytest.mark.parametrize("case", ["weights", "first head mask", "second head mask", "any mask", "any cross mask"])
def test_unsupported_calls_use_the_original_forward(decoder: tuple[Any, tuple], case: str) -> None:
    """Layers on the kernels and others accept each other's masks and biases."""
    stack, (x, mask, context, context_mask) = decoder
    halves = torch.full((1, 4, 1, 1), 0.5)
    options: dict[str, Any] = {
        "weights": {"output_attentions": True},
        "first head mask": {"head_mask": [halves, None]},
        "second head mask": {"head_mask": [None, halves]},
    }.get(case, {})
    if case == "any mask":
        mask = torch.eye(4).long() + mask[:, None]
        mask = (mask > 0).long().tril()
    if case == "any cross mask":
        context_mask = (torch.arange(24).view(4, 6) % 3 > 0).long().expand(2, 4, 6)
    expected = stack(x, mask, context, context_mask, **options)
    apply_lion_kernels(stack, backend="triton")
    got = stack(x, mask, context, context_mask, **options)
    expect_near(got[0], expected[0])
    if case == "weights":
        torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-6)


def test_dropout_follows_the_seed_and_checkpointing(decoder: tuple[Any, tuple]) -> None:
    stack, inputs = decoder
    stack.block = stack.block[:1]
    stack.train()
    for module in stack.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        elif isinstance(module, T5Attention):
            module.dropout = 0.3
    apply_lion_kernels(stack, backend="triton")
    x, mask, context, context_mask = (given[:1] for given in inputs)
    x.requires_grad_()
    found = []
    for seed, stack.gradient_checkpointing in ((0, False), (0, True), (1, False)):
        torch.manual_seed(seed)
        x.grad = None
        out = stack(x, mask, context, context_mask)[0]
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[2][0], found[0][0], rtol=0.1)


def test_autocast_keeps_the_dtype_of_the_stream(feed_forward: Any) -> None:
    """The routers' ratios make a half-precision stream float32, as in the original."""
    (layer,) = feed_forward
    x = torch.randn(2, 5, 32).half()
    found = []
    for backend in (None, "triton"):
        if backend:
            apply_lion_kernels(feed_forward, backend)
        with torch.autocast("cpu", torch.float16):
            found.append(layer(x))
    assert [out.dtype for out in found] == [torch.float32] * 2
    assert (found[1] - found[0]).norm() < 2e-3 * found[0].norm()


def test_single_adapter_and_no_task(feed_forward: Any) -> None:
    """Outside the joint stage there is one adapter and no router; without a task, the original's assertion fails."""
    set_adapter_t5(feed_forward, 32, 1, 8)
    layer, x = feed_forward[0], torch.randn(2, 5, 32)
    nn.init.normal_(layer.adapter.adapters[0].up_proj.weight)
    set_router_idx(feed_forward, 0)
    expected = outputs_and_gradients(layer, x)
    apply_lion_kernels(feed_forward, backend="triton")
    expect_all_near(outputs_and_gradients(layer, x), expected)
    set_router_idx(feed_forward, None)
    with pytest.raises(AssertionError):
        layer(x)


def test_a_router_alone_is_rewired(feed_forward: Any) -> None:
    """The router runs on the kernels even if the layer has another forward than the original's."""
    (layer,) = feed_forward
    layer.forward = lambda hidden_states: layer.adapter(hidden_states)
    x = torch.randn(2, 5, 32)
    expected = outputs_and_gradients(layer, x)
    result = apply_lion_kernels(feed_forward, backend="triton")
    assert [module.name for module in result.left] == ["0"]
    expect_all_near(outputs_and_gradients(layer, x), expected)


def test_adapters_with_dropout_use_the_original_forward_in_training(feed_forward: Any) -> None:
    (layer,) = feed_forward
    for adapter in layer.adapter.adapters:
        adapter.dropout = 0.5
    x, found = torch.randn(2, 5, 32), []
    for backend in (None, "triton"):
        if backend:
            apply_lion_kernels(layer.adapter, backend)
        torch.manual_seed(0)
        found.append(layer.adapter(x))
    assert torch.equal(*found)


def test_lora_on_rewired_adapters_has_its_effect(feed_forward: Any) -> None:
    """LoRA that comes after the kernels replaces the linear layers whose weights they read."""
    peft = needs("peft", "test")
    (layer,) = feed_forward
    x = torch.randn(2, 5, 32)
    before = layer.adapter(x)
    result = apply_lion_kernels(layer.adapter, "triton")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False), feed_forward)
    on_kernels = layer.adapter(x)
    result.undo()
    assert torch.equal(on_kernels, layer.adapter(x))
    assert not torch.allclose(on_kernels, before)


class OneMore(T5LayerNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


ENCODER, VISION = "t5_model.encoder", "visual_encoder.blocks.0.attn"


@pytest.mark.parametrize(
    ("name", "attribute", "value", "reason"),
    [
        (
            f"{ENCODER}.block.0.layer.1.adapter.adapters.0",
            "adapter_layernorm_option",
            "in",
            "adapter_layernorm_option='in'",
        ),
        (
            f"{ENCODER}.block.0.layer.1.DenseReluDense",
            "act",
            nn.GELU("tanh"),
            "the activation is GELU, not the exact GELU",
        ),
        (f"{ENCODER}.block.1.layer.0.SelfAttention", "pruned_heads", {1}, "pruned heads"),
        (f"{ENCODER}.final_layer_norm", "__class__", OneMore, "no x / sqrt(mean(x^2) + eps) * weight"),
        (VISION, "relative_position_bias_table", torch.zeros(1), "a relative position bias within windows"),
        (VISION, "forward", print, "the instance has a forward of its own"),  # like accelerate's hooks
        (
            "Qformer.bert.encoder.layer.0.attention.self",
            "position_embedding_type",
            "relative",
            "position_embedding_type='relative'",
        ),
        (
            "fusion_adapter.blocks.0.output",
            "LayerNorm",
            nn.LayerNorm(16, elementwise_affine=False),
            "LayerNorm is no nn.LayerNorm of one dimension with weight and bias",
        ),
    ],
)
def test_modules_that_would_differ_are_left_and_listed(name: str, attribute: str, value: Any, reason: str) -> None:
    model = make_original()
    setattr(model.get_submodule(name), attribute, value)
    result = apply_lion_kernels(model)
    left = [module for module in result.left if module.class_name != "Mlp"]
    assert {module.reason for module in left} == {reason}
    assert reason in str(result)
    assert not {module.name for module in result.rewired} & {module.name for module in result.left}
    if attribute == "pruned_heads":  # a stack is rewired as a whole
        assert [module.class_name for module in left] == ["T5Attention"] * 2
    else:
        assert [module.name for module in left] == [name.removesuffix(".adapters.0")]


def test_a_second_call_starts_over(feed_forward: Any) -> None:
    """A second call undoes the first, and its result undoes both."""
    (layer,), x = feed_forward, torch.randn(2, 5, 32)
    expected, classes = layer(x), [type(module) for module in feed_forward.modules()]
    first = apply_lion_kernels(feed_forward, backend="triton")
    second = apply_lion_kernels(feed_forward, backend="torch")
    assert first.rewired == second.rewired
    assert torch.equal(layer(x), expected)
    assert layer.adapter.kernel_backend == "torch"
    second.undo()
    assert [type(module) for module in feed_forward.modules()] == classes
    assert torch.equal(layer(x), expected)


def test_copies_are_rewired_and_restored_independently(feed_forward: Any) -> None:
    (layer,), x = feed_forward, torch.randn(2, 5, 32)
    expected = layer(x)
    result = apply_lion_kernels(feed_forward, backend="triton")
    twin = copy.deepcopy(feed_forward)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in feed_forward.parameters()}
    assert torch.equal(twin[0](x), layer(x))
    nn.init.zeros_(layer.DenseReluDense.wo.weight)
    result.undo()
    assert type(twin[0]) is not type(layer)
    apply_lion_kernels(twin).undo()
    assert type(twin[0]) is type(layer)
    assert torch.equal(twin[0](x), expected)


def test_an_optimizer_keeps_its_state(feed_forward: Any) -> None:
    """Its state belongs to the parameters, which stay the same."""
    found = []
    for apply in (False, True):
        torch.manual_seed(0)
        model = copy.deepcopy(feed_forward)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        for step in range(3):
            if apply and step == 1:
                apply_lion_kernels(model, backend="triton")
            optimizer.zero_grad()
            model[0](torch.randn(2, 5, 32)).square().sum().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    expect_near(found[1], found[0])


def test_the_forward_pass_compiles(decoder: tuple[Any, tuple]) -> None:
    stack, inputs = decoder
    expected = torch.compile(stack, backend="eager", fullgraph=True)(*inputs)[0]
    torch._dynamo.reset()
    apply_lion_kernels(stack, backend="triton")
    compiled = torch.compile(stack, backend="eager", fullgraph=True)
    expect_near(compiled(*inputs)[0], expected)


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_data_parallel_before_and_after_and_sharding_after(feed_forward: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (layer,), x = feed_forward, torch.randn(2, 5, 32)
    expected = outputs_and_gradients(layer, x)
    parallel = DistributedDataParallel(layer)
    result = apply_lion_kernels(parallel, backend="triton")
    assert "module.adapter" in {module.name for module in result.rewired}
    for wrapped in (parallel, DistributedDataParallel(layer)):
        expect_all_near(outputs_and_gradients(wrapped, x), expected)
    result.undo()
    apply_lion_kernels(feed_forward, backend="triton")
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    expect_near(layer(x), expected[0])
    with pytest.raises(ValueError, match=r"model: 0 is sharded already; call apply_lion_kernels before FSDP"):
        apply_lion_kernels(feed_forward)


def test_undo_refuses_a_module_whose_class_changed_since(feed_forward: Any) -> None:
    result = apply_lion_kernels(feed_forward)
    router = feed_forward[0].adapter

    class Sharded(type(router)):
        pass

    router.__class__ = Sharded
    with pytest.raises(RuntimeError, match=r"0.adapter: expected the class AdapterRouter that .* got Sharded"):
        result.undo()
    assert "_before_kernels" in feed_forward[0].__dict__  # nothing was restored


class LooksLikeEverything(nn.Module):
    """A module with the attributes of all kinds, which are of none."""

    NAMES = (
        "adapters num_adapters router_idx qkv q_bias v_bias proj attn_drop proj_drop scale num_heads query key value"
    )
    MORE = (
        "value num_attention_heads attention_head_size dense LayerNorm wi_0 wi_1 wo act dropout weight variance_epsilon"
    )

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_modules_that_only_look_alike_are_left_with_the_reason() -> None:
    names = f"{LooksLikeEverything.NAMES} {LooksLikeEverything.MORE}".split()
    lookalikes = [LooksLikeEverything(*names[start:]) for start in range(len(names))]
    norm = LooksLikeEverything("variance_epsilon")
    norm.weight = nn.Parameter(torch.ones(4))
    lazy = LooksLikeEverything("variance_epsilon")
    lazy.weight = nn.UninitializedParameter()
    stack = LooksLikeEverything("block", "final_layer_norm", "get_extended_attention_mask")
    model = nn.Sequential(*lookalikes, norm, lazy, stack)
    with pytest.raises(ValueError, match="nothing to rewire in Sequential") as error:
        apply_lion_kernels(model)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert {type(module) for module in model} == {LooksLikeEverything}
    model.append(T5LayerNorm(4, eps=1e-6))
    rewiring = apply_lion_kernels(model)
    assert [module.name for module in rewiring.rewired] == [str(len(model) - 1)]
    assert any("its check failed: TypeError" in module.reason for module in rewiring.left)
    rewiring.undo()


def test_clear_errors(feed_forward: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        apply_lion_kernels({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"):
        apply_lion_kernels(feed_forward, "cuda")
    with pytest.raises(ValueError, match=r"nothing to rewire in Linear; looked for LionForCausalLM.*router_idx"):
        apply_lion_kernels(nn.Linear(2, 2))
    feed_forward[0].DenseReluDense.act = nn.ReLU()
    inner = feed_forward[0].DenseReluDense
    with pytest.raises(ValueError, match=r"(?s)nothing to rewire.*it \(T5Dense.*activation is ReLU, not the exact"):
        apply_lion_kernels(inner)
    assert not any("_before_kernels" in module.__dict__ for module in inner.modules())
    inner.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model: 0.DenseReluDense is compiled already; call .* before torch.compile"):
        apply_lion_kernels(feed_forward)


@torch.no_grad()
@pytest.mark.parametrize("loaded", ["torch", "auto"])
def test_lion_for_causal_lm_equals_one_loaded_with_the_backend(loaded: str) -> None:
    """Bits, operators and saved files agree; another model with the same configuration is unaffected."""
    batch = make_batch(batch=1, labels=True)
    model, other = make_model(kernel_backend=loaded), make_model(kernel_backend=loaded)
    before = model(**batch).logits
    built = make_model(kernel_backend="triton")
    config = model.config
    result = apply_lion_kernels(model, backend="triton")
    assert torch.equal(model(**batch).logits, built(**batch).logits)
    assert model.config.kernel_backend == model.config.vision_config.kernel_backend == "triton"
    assert model.config is not config
    assert config.kernel_backend == other.config.kernel_backend == loaded
    assert Counter(module.operators for module in result.rewired) == {
        "multi_scale_attention": 3 + 2 * 2 + 3,
        "relative_bias_attention, multi_scale_attention": 2 * 3,
        "residual_layer_norm": 2 * 3 + 2 * 3 + 1,
        "rms_norm": 2 * 2 + 1 + 2 * 3 + 1,
        "gated_gelu": 4,
        "mixture_of_adapters": 4,
        "assemble_inputs": 1,
    }
    assert not result.left
    result.undo()
    assert torch.equal(model(**batch).logits, before)
    assert model.config is config


@torch.no_grad()
@pytest.mark.parametrize("loaded", ["torch", "triton"])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_a_lion_are_rewired_and_restored(make_copy: Callable[[Any], Any], loaded: str) -> None:
    """Also if it is on the kernels already, and its modules have classes that no module defines."""
    model, batch = make_model(kernel_backend=loaded), make_batch(batch=1)
    before = model(**batch, inputs_only=True).inputs_embeds
    apply_lion_kernels(model, backend="torch")
    copied = make_copy(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    for each in (model, copied):
        apply_lion_kernels(each, backend="torch").undo()
        assert torch.equal(each(**batch, inputs_only=True).inputs_embeds, before)
    assert [type(module) for module in copied.modules()] == [
        type(module) for module in make_model(kernel_backend=loaded).modules()
    ]


def test_a_requested_attention_is_kept() -> None:
    model: LionForCausalLM = make_model(kernel_backend="torch", attn_implementation={"vision_config": "eager"})
    result = apply_lion_kernels(model)
    assert {(module.class_name, module.reason) for module in result.left} == {
        ("LionVisionAttention", "attn_implementation='eager' was asked for")
    }
