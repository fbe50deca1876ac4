"""What the parts of a torch network put out, for references that compute without yielding it block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def recorded(model: nn.Module, parts: Mapping[str, nn.Module], *inputs: Tensor) -> dict[str, Tensor]:
    """The output of each of `parts`, modules of `model`, in the order computed. Runs `model(*inputs)`, no gradients."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[name] = output.detach().clone()

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in parts.items()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
