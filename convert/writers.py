"""NumPy arrays -> files as the PyTorch world writes them; the export path's one import of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jddim.installing import install_line

from .engine import ConversionError, source_tensors
from .rules import Rules


def save_torch(value: Any, path: Path) -> None:
    """Nested dicts and lists whose NumPy arrays become tensors, written by `torch.save`. Bits are kept."""
    torch = _torch()
    torch.save(_to_torch(value), path)


def save_safetensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """A `.safetensors` file marked as PyTorch's, as `transformers` and `diffusers` want it. Bits are kept."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode  # the library's own is for its owner alone
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def torch_tensors(params: Mapping[str, np.ndarray], rules: Rules, build: Callable[[], Any]) -> dict[str, np.ndarray]:
    """The parameters as the state dict of the torch module that `build` makes: its names, layouts and order."""
    return source_tensors(params, rules, state_shapes(build))


def state_shapes(build: Callable[[], Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the state dict of the torch module that `build` makes, without its memory."""
    with _torch().device("meta"):
        return {name: tuple(value.shape) for name, value in build().state_dict().items()}


def _to_torch(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _torch().from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {key: _to_torch(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_torch(item) for item in value]
    return value


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(f"writing PyTorch checkpoints needs PyTorch: {install_line('convert')}") from error
    return torch
