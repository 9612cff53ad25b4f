"""Two processes with a sample each, on the kernels, against one process with the whole batch."""

from pathlib import Path

import pytest
import torch

from lion_fast.training.stages import STAGES, freeze_for_stage
from lion_kernels.core.backend import interpreting
from tests.lion_fast.gradients import expect_same_gradients, gradients_of
from tests.lion_fast.processes import finish, free_port, starting
from tests.lion_fast.tiny import make_batch, make_model
from tests.rounding import LOSS_TWO_WAYS


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.skipif(not interpreting(), reason="the processes have no GPU, so kernels run in Triton's interpreter only")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_match_one(tmp_path: Path, kind: str) -> None:
    """Loss and gradients agree, under `DistributedDataParallel` and under `fully_shard` (FSDP2), with gloo."""
    model, batch = make_model(kernel_backend="torch"), make_batch(batch=2, labels=True)
    batch["labels"][0, 1:] = -100
    model.save_pretrained(tmp_path)
    torch.save(batch, tmp_path / "batch.pt")
    freeze_for_stage(model, STAGES[2])
    loss, expected = gradients_of(model, batch)
    port = free_port()
    with starting(Path(__file__).with_name("distributed_worker.py"), ["lion_fast.training.stages"]) as start:
        finish(*(start(kind=kind, directory=tmp_path, rank=rank, port=port) for rank in range(2)))
    result = torch.load(tmp_path / f"{kind}.pt")
    torch.testing.assert_close(result["loss"], loss, rtol=LOSS_TWO_WAYS, atol=0)
    expect_same_gradients(result["gradients"], expected)
