"""Loading of complete models, and the default device and dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from lion_fast.configuration_lion import LionConfig
from lion_fast.io.checkpoints import CheckpointError, has_weights, scan
from lion_fast.model.fitting import expect_fitting, lion_sizes
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
    if not Path(directory).is_dir():  # a name would be downloaded
        raise CheckpointError(f"{directory}: no such directory")
    # Without the warnings: errors report what is missing in one line.
    with quiet_transformers():
        model = LionForCausalLM.from_pretrained(directory, dtype=dtype, **settings)
    return model.eval()


def load_config(directory: Path) -> LionConfig:
    """Load a directory's configuration, and compare it with the weights beside it, if there are any.

    Raises:
        CheckpointError: there is no such directory or configuration, it asks for code, or it does not fit the weights;
            the message names the file.
    """
    if not Path(directory).is_dir():  # a name would be downloaded
        raise CheckpointError(f"{directory}: no such directory")
    config = LionConfig.from_pretrained(directory)
    if has_weights(Path(directory)):
        expect_fitting(config, scan(directory), Path(directory), lion_sizes)
    return config
