"""Worker process of `test_distributed.py`: loss and gradients of a wrapped model on one half of a batch."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lion_fast import LionForCausalLM
from lion_fast.training.stages import STAGES, freeze_for_stage


def wrapped(model: LionForCausalLM, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for module in list(model.modules()):
        if type(module).__name__ in LionForCausalLM._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def gradient(parameter: nn.Parameter) -> Tensor:
    grad: Any = parameter.grad
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


KEPT: list[Any] = []  # keeps the wrapped model alive, and with it the process group


def main(kind: str, directory: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = LionForCausalLM.from_pretrained(directory, kernel_backend="triton").eval()
    freeze_for_stage(model, STAGES[2])
    parallel = wrapped(model, kind)
    batch = torch.load(directory / "batch.pt")
    items = (batch["labels"] != -100).sum()
    mine = {name: value.chunk(world)[rank] for name, value in batch.items()}
    loss = parallel(**mine, num_items_in_batch=items).loss
    (world * loss).backward()  # DDP and FSDP average gradients over the processes
    gradients = {name: gradient(p) for name, p in model.named_parameters() if p.grad is not None}
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        torch.save({"loss": total, "gradients": gradients}, directory / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()
    KEPT.append(parallel)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    # On a busy machine, a worker once hung while freeing its process group after the other worker had exited. The group
    # is destroyed above, and nothing is freed here.
    os._exit(0)
