"""Worker process of `test_distributed.py`: loss and gradients of a wrapped model on one half of a batch."""

import os
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


def main(kind: str, directory: Path, rank: int, port: int, world: int = 2) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
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
    # On a busy machine, a worker once hung while freeing its process group after the other worker had exited. The group
    # is destroyed above, and nothing is freed here.
    os._exit(0)


if __name__ == "__main__":
    main(**globals()["ARGUMENTS"])
