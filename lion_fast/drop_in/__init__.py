"""lion_kernels in existing models: the original LION, `LionForCausalLM`, and models of PEFT.

`apply_lion_kernels` is the entry point. `rewiring` rewires and restores an instance; `rules` selects the modules to
rewire and their new classes in `original`, `transformers` and `lora`.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Stack

from lion_fast.drop_in.rewiring import LeftModule, RewiredModule, Rewirer, Rewiring, remembering, restore
from lion_fast.drop_in.rules import LOOKED_FOR, rewire_by_structure
from lion_fast.drop_in.transformers import rewire_lion, rewire_t5_stack
from lion_fast.modeling_lion import LionForCausalLM
from lion_kernels import resolve_backend

__all__ = ["LeftModule", "RewiredModule", "Rewiring", "apply_lion_kernels"]

_LISTED, _SHOWN = 3, 180  # modules, and characters of each, in the error of a model that has none to rewire


def apply_lion_kernels(model: nn.Module, backend: str = "auto") -> Rewiring:
    """Rewire `model` in place, this instance alone, to compute with lion_kernels.

    Modules get other classes; parameters, their names, optimizers and checkpoints stay as they are. If `backend`
    resolves to PyTorch, a module computes what it did before, bit for bit. The function rewires:

    - of the original LION: adapter routers (with the one task that is set on them), feed-forward layers, T5's
      attention and norms, the vision tower's and the Q-Former's and aggregator's attention and outputs;
    - `LionForCausalLM`: as if loaded with `kernel_backend=backend`;
    - of a PEFT model: LoRA linear layers; `model(..., adapter_names=[...])` then works in training, too;
    - in any of them: RMS norms, and T5's attention and gated feed-forward.

    Calling it again on the same model is equivalent to calling it after `undo`. Call it before or after wrapping in
    DistributedDataParallel, but before FSDP and torch.compile.

    Args:
        model: any module that contains some of these.
        backend: "auto" (the kernels for CUDA tensors), "triton" or "torch".

    Returns:
        A printable list of the rewired modules, and of the others with reasons; its `undo()` restores the model.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `backend` no string.
        ValueError: nothing to rewire, an unknown backend, or a model that is already sharded or compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    resolve_backend(backend, "apply_lion_kernels", torch.device("cuda"))  # the actual device is only known in a call
    _check_not_wrapped(model)
    restore(model)
    with remembering(model):
        rewirer = Rewirer(model, backend)
        _rewire(rewirer)
        result = rewirer.result
        if not result.rewired:
            left = [f"; {name or 'it'} ({class_name}): {reason}"[:_SHOWN] for name, class_name, reason in result.left]
            rest = f"; and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
            raise ValueError(
                f"model: nothing to rewire in {type(model).__name__}; looked for {LOOKED_FOR}"
                f"{''.join(left[:_LISTED])}{rest}"
            )
    return result


def _rewire(rewirer: Rewirer) -> None:
    lions: list[Any] = [module for module in rewirer.names if isinstance(module, LionForCausalLM)]
    known = {part for lion in lions for part in lion.modules()}
    for lion in lions:
        rewire_lion(rewirer, lion)
    if "peft" in sys.modules:  # otherwise no model can be one of PEFT
        from lion_fast.drop_in.lora import rewire_lora

        rewire_lora(rewirer)
    for module in rewirer.names:
        if type(module) is T5Stack and module not in known:
            rewire_t5_stack(rewirer, module)
    rewire_by_structure(rewirer, known)


def _check_not_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        classes = {cls.__name__ for cls in type(module).__mro__}
        classes |= {type(parameter).__name__ for parameter in module.parameters(recurse=False)}
        place = f"model: {name or 'it'}"
        if classes & {"FullyShardedDataParallel", "FSDPModule", "DTensor"}:
            raise ValueError(f"{place} is sharded already; call apply_lion_kernels before FSDP wraps the model")
        if "OptimizedModule" in classes or module._compiled_call_impl is not None:
            raise ValueError(f"{place} is compiled already; call apply_lion_kernels before torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{place} is a TorchScript module, whose code cannot change")
