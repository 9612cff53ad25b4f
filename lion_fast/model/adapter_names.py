"""An adapter per sample (PEFT's `adapter_names`) in `generate`, where parts of the model see other numbers of rows.

PEFT gives every layer the names of all samples, repeated by the `num_beams` of the call except in the encoder. LION's
tower, Q-Former and aggregator see each sample once, too, and beams or several sequences per sample may also be the
checkpoint's defaults. A layer therefore gets the names for the rows that it sees.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def names_for_rows(model: nn.Module) -> Iterator[None]:
    """Within the context, layers with an adapter per sample get the names of their input's rows.

    Rows of one sample follow each other in each layer of LION, as `generate` expands its inputs.
    """
    handles = []
    if hasattr(model, "peft_config"):  # set by PEFT on a model that it has changed
        handles = [
            layer.register_forward_pre_hook(_with_names_for_rows, with_kwargs=True)
            for layer in model.modules()
            if any("adapter_names" in getattr(hook, "keywords", ()) for hook in layer._forward_pre_hooks.values())
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_names_for_rows(_: nn.Module, args: Any, kwargs: Any) -> Any:
    """Change `adapter_names`, which hooks before this one have set; names that fit no rows are left to PEFT's error."""
    names, rows = kwargs.get("adapter_names"), args[0].shape[0] if args and isinstance(args[0], Tensor) else 0
    if not names or not rows:
        return args, kwargs
    if rows % len(names) == 0:
        names = [name for name in names for _ in range(rows // len(names))]
    elif len(names) % rows == 0:
        names = list(names)[:: len(names) // rows]
    return args, {**kwargs, "adapter_names": names}
