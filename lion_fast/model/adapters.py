"""The mixture of adapters that LION adds to every feed-forward layer of the language model (section 3.3)."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from lion_fast.model.attention import on_kernels
from lion_fast.model.folded_adapters import FoldedAdapters, StackedAdapters, in_one_dtype
from lion_kernels import mixture_of_adapters


class Projection(nn.Module):
    """Weight [out_features, in_features] and bias [out_features] of an adapter; calling the module returns them.

    Offloaded parameters are loaded by the call, not by reading the attributes. The class is not an `nn.Linear`, because
    LoRA and quantization replace the forward of an `nn.Linear`, which would have no effect here.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class LowRankAdapter(nn.Module):
    """Parameters of the adapter scale * (up_proj ReLU(down_proj x)), which `MixtureOfAdapters` computes.

    Calling the module returns its parameters. A new adapter adds nothing: its down-projection is Kaiming-uniform, its
    up-projection zero and its scale one.
    """

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.down_proj = Projection(hidden_size, rank)
        self.up_proj = Projection(rank, hidden_size)

    def reset_parameters(self) -> None:
        init.ones_(self.scale)
        init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            init.zeros_(zero)

    def forward(self) -> tuple[Tensor, ...]:
        """Return scale [1], down weight [r, D] and bias [r], up weight [D, r] and bias [D]."""
        return self.scale, *self.down_proj(), *self.up_proj()


class MixtureOfAdapters(nn.Module):
    """residual + sum_k ratio_k[task] * A_k(h), where h is the residual stream before the feed-forward's norm.

    The routers' tables start as the identity: adapter 0 serves task 0 (region_level) and adapter 1 serves task 1
    (image_level). With one adapter there is no router.

    Args:
        config: a language model's configuration with `num_adapters`, `adapter_rank`, `num_tasks` and
            `kernel_backend`, as `LionConfig.share_settings` writes them.
    """

    adapters: list[LowRankAdapter]
    folded: FoldedAdapters | StackedAdapters | None

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.kernel_backend: str = config.kernel_backend
        self.num_tasks: int = config.num_tasks
        adapters = [LowRankAdapter(config.hidden_size, config.adapter_rank) for _ in range(config.num_adapters)]
        self.adapters = nn.ModuleList(adapters)  # type: ignore[assignment]
        self.has_router = config.num_adapters != 1
        if self.has_router:
            for index in range(config.num_adapters):
                # Numbered from 1, as in the published checkpoints.
                self.register_parameter(
                    f"router_ratio{index + 1}", nn.Parameter(torch.empty(config.num_tasks, config.hidden_size))
                )
        self.folded = None
        self.register_load_state_dict_pre_hook(_refuse_to_load_folded)

    def reset_parameters(self) -> None:
        for index in range(len(self.adapters) if self.has_router else 0):
            ratio = getattr(self, f"router_ratio{index + 1}")
            own_task = torch.arange(self.num_tasks, device=ratio.device) == index
            init.copy_(ratio, own_task.to(ratio.dtype).unsqueeze(1).expand_as(ratio))

    def gate(self, scales: Tensor) -> Tensor:
        """Return the gate times the scales [E]: [R, E, D] with a router, [E] without."""
        if not self.has_router:
            return scales
        ratios = [getattr(self, f"router_ratio{index + 1}") for index in range(len(self.adapters))]
        return torch.stack(ratios, dim=1) * scales.unsqueeze(1)

    @torch.no_grad()
    def fold(self) -> None:
        """Precompute everything that depends on the weights alone, until `unfold`.

        Raises:
            RuntimeError: parameters are offloaded.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            raise RuntimeError(
                "fold_adapters: expected the adapters' parameters in memory, got some that are offloaded"
            )
        operands = self._operands()
        if on_kernels(self.kernel_backend, operands[0].device):
            self.folded = StackedAdapters(*operands, kernel_backend=self.kernel_backend)
        else:
            self.folded = FoldedAdapters(*operands)

    def unfold(self) -> None:
        """Undo `fold`."""
        self.folded = None

    def _operands(self) -> tuple[Tensor, ...]:
        """Return down weight [E, r, D] and bias [E, r], up weight [E, D, r] and bias [E, D], and the gate."""
        scales, *parameters = zip(*(adapter() for adapter in self.adapters), strict=True)
        return *(torch.stack(parameter) for parameter in parameters), self.gate(torch.cat(scales))

    def forward(self, hidden_states: Tensor, residual: Tensor, task_ids: Tensor | None) -> Tensor:
        """Add the adapters' output to `residual`.

        Args:
            hidden_states, residual: [B, L, D]; their dtypes may differ from each other and from the weights'.
            task_ids: int64 [B]; required with a router.

        Returns:
            [B, L, D], in the residual's dtype.

        Raises:
            ValueError: `task_ids` is None with a router.
            RuntimeError: the adapters are folded and their gradients are needed.
        """
        if self.has_router and task_ids is None:
            raise ValueError("task_ids: expected one id per sequence for the adapters' router, got None")
        task_ids = task_ids if self.has_router else None
        if self.folded is not None:
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
                raise RuntimeError(
                    "folded adapters get no gradients: call unfold_adapters() before training, or compute under "
                    "torch.no_grad()"
                )
            return self.folded(hidden_states, residual, task_ids)
        hidden_states, operands = in_one_dtype(hidden_states, residual, self._operands())
        out = mixture_of_adapters(
            hidden_states, *operands, task_ids=task_ids, residual=residual, backend=self.kernel_backend
        )
        return out.to(residual.dtype)


def _refuse_to_load_folded(adapters: MixtureOfAdapters, *args: object) -> None:
    if adapters.folded is not None:
        raise RuntimeError("folded adapters keep computing with the weights they had: call unfold_adapters() before")
