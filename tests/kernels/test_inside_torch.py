"""Every operator inside PyTorch's wrappers: DDP, FSDP2, and a CUDA graph of forward and backward.

One process suffices to test the wrappers. `tests/lion_fast/training/test_distributed.py` uses two processes;
`test_contract.py` tests compilation, checkpointing and autocast.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lion_fast.check.cases import Case, Tensors
from tests.kernels.contract import SMALL, by_case, make, operator_of, run


class Layer(nn.Module):
    """An operator whose floating arguments are parameters, except the first."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        super().__init__()
        self.case = case
        _, *self.names = (name for name, value in tensors.items() if value.requires_grad)
        self.held = nn.ParameterList(tensors[name].detach().clone() for name in self.names)

    def forward(self, **given: Tensor) -> Tensor:
        tensors = given | dict(zip(self.names, self.held, strict=True))
        return operator_of(self.case)(**self.case.arguments(tensors), backend="triton")


@pytest.fixture
def one_process(tmp_path: Path, device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@by_case(SMALL)
def test_data_parallel(case: Case, kind: str, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tensors = make(case, device=device)
    layer = Layer(case, tensors)
    inputs = {name: value for name, value in tensors.items() if name not in layer.names}
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
@by_case(SMALL)
def test_a_cuda_graph_of_forward_and_backward(case: Case, device: torch.device) -> None:
    tensors = make(case, torch.bfloat16, device)
    grad = torch.ones_like(operator_of(case)(**case.arguments(tensors)))

    def step() -> list[Tensor]:
        return list(run(case, tensors, "triton", grad).values())

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
