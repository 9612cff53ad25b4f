"""Every operator inside PyTorch's wrappers: DDP, FSDP2, and a CUDA graph of forward and backward.

One process suffices to test the wrappers. `tests/lion_fast/training/test_distributed.py` uses two processes;
`test_contract.py` tests compilation, checkpointing and autocast.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lion_kernels
from lion_kernels import multi_scale_attention

Sizes = dict[str, tuple[int, ...]]


def attention(q: Tensor, k: Tensor, v: Tensor, scale_gate: Tensor, **options: Any) -> Tensor:
    return multi_scale_attention(q, [k], [v], scale_gate=scale_gate, **options)


_ADAPTERS: Sizes = {"down_weight": (2, 8, 32), "down_bias": (2, 8), "up_weight": (2, 32, 8), "up_bias": (2, 32)}
_LORA: Sizes = {"weight": (40, 32), "bias": (40,), "lora_a": (2, 8, 32), "lora_b": (2, 40, 8)}
_QKV: Sizes = {"q": (2, 9, 2, 16), "k": (2, 12, 2, 16), "v": (2, 12, 2, 16)}
_DROPOUT: dict[str, Any] = {"dropout_p": 0.2, "seed": 1}
_TASKS = torch.tensor([2, 0])
_EXPERTS = torch.tensor([[0], [-1], [1], [1], [0], [0], [-1], [1]])
_TEXT = torch.tensor([[3, 20, 0, 8], [1, 1, 20, 2]])
# The operator, the shapes of its inputs and of its parameters, and its other arguments.
OPERATORS: dict[str, tuple[Callable[..., Tensor], Sizes, Sizes, dict[str, Any]]] = {
    "mixture_of_adapters channel": (
        lion_kernels.mixture_of_adapters, {"x": (2, 5, 32), "residual": (2, 5, 32)}, _ADAPTERS | {"gate": (3, 2, 32)},
        {"task_ids": _TASKS},
    ),
    "mixture_of_adapters sparse": (
        lion_kernels.mixture_of_adapters, {"x": (8, 32), "gate": (8, 1)}, _ADAPTERS, {"expert_ids": _EXPERTS},
    ),
    "mixture_of_lora_linear": (
        lion_kernels.mixture_of_lora_linear, {"x": (2, 5, 32), "gate": (2, 5, 2)}, _LORA, {},
    ),
    "multi_scale_attention": (attention, _QKV, {"scale_gate": (1,)}, _DROPOUT),
    "relative_bias_attention": (lion_kernels.relative_bias_attention, _QKV, {"bias_table": (32, 2)}, _DROPOUT),
    "residual_layer_norm": (
        lion_kernels.residual_layer_norm, {"x": (17, 48), "residual": (17, 48)},
        {"weight": (48,), "bias": (48,), "x_bias": (48,)}, {"eps": 1e-6, **_DROPOUT},
    ),
    "rms_norm": (lion_kernels.rms_norm, {"x": (17, 48)}, {"weight": (48,)}, {"eps": 1e-6}),
    "gated_gelu": (lion_kernels.gated_gelu, {"gate": (17, 48)}, {"up": (17, 48)}, {}),
    "assemble_inputs": (
        lion_kernels.assemble_inputs, {"prefix": (2, 3, 32)}, {"embedding": (9, 32), "soft_prompt": (32,)},
        {"input_ids": _TEXT, "soft_prompt_id": 20},
    ),
}  # fmt: skip


class Layer(nn.Module):
    """A module that holds some of an operator's arguments as parameters."""

    def __init__(self, operator: Callable[..., Tensor], parameters: dict[str, Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.operator, self.names, self.options = operator, tuple(parameters), options
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, **given: Tensor) -> Tensor:
        own = {name: getattr(self, name) for name in self.names}
        return self.operator(**given, **own, **self.options, backend="triton")


def make(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Layer, dict[str, Tensor]]:
    """Return a layer and its inputs."""
    operator, called_with, held, options = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    values = {
        key: torch.randn(size, generator=generator).to(device, dtype) for key, size in (called_with | held).items()
    }
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    layer = Layer(operator, {key: values[key] for key in held}, options)
    return layer, {key: values[key].requires_grad_() for key in called_with}


@pytest.fixture
def one_process(tmp_path: Path, device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", OPERATORS)
def test_data_parallel(name: str, kind: str, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer, inputs = make(name, device)
    expected = layer(**inputs)
    expected.backward(torch.ones_like(expected))
    wanted = {key: value.grad for key, value in layer.named_parameters()}
    layer.zero_grad()

    wrapped: Any = layer
    if kind == "ddp":
        wrapped = DistributedDataParallel(layer)
    else:
        fully_shard(layer, mesh=init_device_mesh(device.type, (1,)))
    out = wrapped(**inputs)
    assert torch.equal(out, expected)
    out.backward(torch.ones_like(out))
    for key, value in layer.named_parameters():
        gradient: Any = value.grad
        assert torch.equal(gradient.full_tensor() if kind == "fsdp" else gradient, wanted[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_a_cuda_graph_of_forward_and_backward(name: str, device: torch.device) -> None:
    layer, inputs = make(name, device, torch.bfloat16)
    leaves = [*inputs.values(), *layer.parameters()]

    def step() -> list[Tensor]:
        out = layer(**inputs)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels and fills the caches
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
