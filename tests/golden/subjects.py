"""The two implementations under test, with the same interface and the original's parameter names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lion_fast import LionForCausalLM
from lion_fast.conversion.lion import convert_checkpoint, original_name
from lion_fast.training.stages import parameter_groups
from lion_reference import LION, generate
from tests.golden.data import Golden

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
VISION_LAYERS = (38, 28, 18)


class Reference:
    """`lion_reference`, read from the original's files."""

    def __init__(self, model: LION, golden: Golden) -> None:
        self.model, self.golden = model.eval(), golden
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())

    def vision_layers(self, pixel_values: Tensor) -> dict[int, Tensor]:
        states = self.model.visual_encoder(pixel_values)
        return {layer: states[layer] for layer in VISION_LAYERS}

    def aggregated(self, states: dict[int, Tensor]) -> Tensor:
        last, *earlier = (states[layer] for layer in VISION_LAYERS)
        return self.model.fusion_adapter(last, earlier)

    def encoder_output(self, output: Any) -> Tensor:
        return output.encoder_output

    def groups(self) -> list[dict[str, Any]]:
        return reference_groups(self.model, self.golden.meta["trainable"], WEIGHT_DECAY)

    def generate(self, batch: dict[str, Tensor], **settings: Any) -> Tensor:
        return generate(self.model, **batch, **settings)


class LionFast:
    """`LionForCausalLM`, converted from the original's files; only what the original trains gets gradients."""

    def __init__(self, model: LionForCausalLM, golden: Golden) -> None:
        self.model, self.golden = model.eval(), golden
        self.parameters = {original_name(name): parameter for name, parameter in model.named_parameters()}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in golden.meta["trainable"])

    def vision_layers(self, pixel_values: Tensor) -> dict[int, Tensor]:
        states = self.model.vision_model(pixel_values, layers=VISION_LAYERS)
        return {layer: states[:, n] for n, layer in enumerate(VISION_LAYERS)}

    def aggregated(self, states: dict[int, Tensor]) -> Tensor:
        return self.model.aggregator(torch.stack([states[layer] for layer in VISION_LAYERS], dim=1))

    def encoder_output(self, output: Any) -> Tensor:
        return output.language_model_outputs.encoder_last_hidden_state

    def groups(self) -> list[dict[str, Any]]:
        return lion_groups(self.model, self.golden.meta["trainable"], LEARNING_RATE, WEIGHT_DECAY)

    def generate(self, batch: dict[str, Tensor], **settings: Any) -> Tensor:
        return self.model.generate(**batch, **settings)


Subject = Reference | LionFast


def reference_groups(model: LION, trainable: list[str], weight_decay: float) -> list[dict[str, Any]]:
    """Return the original's groups, without `parameter_groups`: the aggregator is separate, vectors have no decay."""
    trained = [(name, model.get_parameter(name)) for name in trainable]
    return [
        {
            "params": [p for n, p in trained if n.startswith("fusion_adapter.") == apart and (p.ndim >= 2) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for apart in (False, True)
        for decays in (True, False)
    ]


def lion_groups(model: LionForCausalLM, trainable: list[str], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of lion_fast's training; only the parameters that the original trains require gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(original_name(name) in trainable)
    return parameter_groups(model, lr=lr, weight_decay=weight_decay)


def load_reference(golden: Golden, files: dict[str, Path]) -> Reference:
    return Reference(LION.from_checkpoint_files(**files, dtype=torch.float64), golden)


def convert(files: dict[str, Path], directory: Path) -> Path:
    convert_checkpoint(**files, out=directory)
    return directory


def load_lion_fast(golden: Golden, converted: Path, dtype: torch.dtype, **settings: Any) -> LionFast:
    return LionFast(LionForCausalLM.from_pretrained(converted, dtype=dtype, **settings), golden)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Skip the only cast of float64 to float32 in `LionForCausalLM`, which is in transformers' `T5LayerNorm`."""

    def norm(self: T5LayerNorm, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T5LayerNorm, "forward", norm)
        yield
