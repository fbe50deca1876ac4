"""Snapshots as NVlabs/edm pickles them, without its code: objects of a stand-in for its torch_utils.persistence."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a file was unpickled")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An object that is pickled as its class's source and its attributes."""

    def __init__(self, class_name: str, **state: Any):
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        source = "raise SystemExit('the source in a snapshot ran')"
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.class_name}
        return _reconstruct_persistent_obj, ({**meta, "state": self.state},)


def module(class_name: str, tensors: Mapping[str, np.ndarray], **init_kwargs: Any) -> Persistent:
    """A module with these tensors, each a parameter, by dotted names."""
    import torch

    parts: dict[str, dict[str, np.ndarray]] = {}
    own: dict[str, Any] = {}
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            parts.setdefault(head, {})[rest] = value
        else:
            own[name] = torch.nn.Parameter(torch.tensor(value))
    return Persistent(
        class_name,
        training=False,
        _parameters=own | {"bias_of_none": None},
        _buffers={},
        _modules={head: module("Part", inner) for head, inner in parts.items()} | {"none": None},
        _non_persistent_buffers_set=set(),
        _init_args=(),
        _init_kwargs=init_kwargs,
    )


def write(path: Path, contents: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pickle of it."""
    stand_in = types.ModuleType("torch_utils.persistence")
    vars(stand_in)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
        patched.setitem(sys.modules, "torch_utils.persistence", stand_in)
        path.write_bytes(pickle.dumps(contents))
    return path
