"""Two processes with half a batch each, on the kernels, against one process with the whole batch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lion_fast import LionForCausalLM
from lion_fast.training.stages import STAGES, freeze_for_stage
from tests.lion_fast.gradients import expect_same_gradients
from tests.rounding import LOSS_TWO_WAYS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_match_one(
    make_model: Callable[..., LionForCausalLM], make_batch: Callable[..., dict[str, Tensor]], tmp_path: Path, kind: str
) -> None:
    """Loss and gradients agree, under `DistributedDataParallel` and under `fully_shard` (FSDP2), with gloo."""
    model, batch = make_model(kernel_backend="torch"), make_batch(batch=4, labels=True)
    batch["labels"][0, 1:] = -100
    model.save_pretrained(tmp_path)
    torch.save(batch, tmp_path / "batch.pt")
    freeze_for_stage(model, STAGES[2])
    loss = model(**batch).loss
    loss.backward()

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("distributed_worker.py")
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "reference"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # always gloo on the CPU and Triton's interpreter
    run = subprocess.run(
        [*command, worker, kind, tmp_path], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr

    result = torch.load(tmp_path / f"{kind}.pt")
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=LOSS_TWO_WAYS, atol=0)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expect_same_gradients(result["gradients"], expected)
