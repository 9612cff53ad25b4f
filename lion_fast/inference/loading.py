"""Loading of complete models, and the default device and dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.modeling_lion import LionForCausalLM


def default_device(local_rank: int = 0) -> torch.device:
    """Return this process's GPU, or the CPU without a GPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return LION's default dtype: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the warnings of transformers in this context."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_complete(directory: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """Load a directory's `LionForCausalLM` in evaluation mode, and reject incomplete checkpoints.

    Args:
        settings: configuration values, such as `kernel_backend`, that override the directory's.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or parameters are missing or have other shapes.
    """
    # Without the warnings: the error below reports missing parameters in one line.
    with quiet_transformers(), naming(directory, "a checkpoint of LION that can be loaded"):
        loaded: Any = LionForCausalLM.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    model, info = loaded
    absent = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{directory}: {len(absent)} tensors are missing or of another shape, such as {absent[0]}"
        )
    return model.eval()
