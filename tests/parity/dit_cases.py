"""DiTTransformer2DModel against the converted DiT and the PyTorch reference: a real diffusers module, redrawn.

Imported by pytest's own process (float32) and, as a program in one with JAX_ENABLE_X64=1, prints float64's errors.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is with PyTorch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs it: pip install diffusers")

from convert.engine import fill  # noqa: E402
from convert.families import diffusers_dit as family  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.models.building import abstract_model, build_model, flat_params  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "a learned variance": {"num_attention_heads": 3, "out_channels": 8, "sample_size": 10, "patch_size": 2},
    "none, a large epsilon": {"num_attention_heads": 1, "in_channels": 3, "sample_size": 15, "patch_size": 5}
    | {"norm_eps": 1e-2},
}
SMALL = {"attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 5}
T, LABELS = (0, 499, 999), (5, 0, 3)


def network(seed: int = 3, **options: Any) -> Any:
    """A real DiTTransformer2DModel in float32, redrawn, its blocks' copies equal."""
    model = diffusers.DiTTransformer2DModel(**{**SMALL, **options}).eval().requires_grad_(False)
    redraw_(model, seed)
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for embedding in others:
        embedding.load_state_dict(first.state_dict())
    return model


def config_of(model: Any) -> dict[str, Any]:
    """The contents of the config.json that diffusers saves."""
    return json.loads(model.to_json_string())


class Sinusoid(torch.nn.Module):
    """diffusers' own is float32 whatever the network is."""

    def forward(self, t: Any) -> Any:
        exponents = torch.arange(128, dtype=torch.float64) / 127
        angles = t.double()[:, None] * 10000.0**-exponents
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def errors(name: str, dtype: Any, seed: int = 3) -> dict[str, float]:
    """Largest error of jddim's output, and of the reference's, over diffusers' largest output."""
    model, rng = network(**CASES[name]), np.random.default_rng(seed)
    side, channels = model.config.sample_size, model.config.in_channels
    x_t = rng.standard_normal((len(T), side, side, channels), np.float32).astype(dtype)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    tensors = family.open_source(state, "file").tensors
    plan = family.plan(tensors, {"transformer": config_of(model)}, {})
    expected_shapes = {key: leaf.shape for key, leaf in flat_params(abstract_model(plan.model)).items()}
    params = {key: value.astype(dtype) for key, value in fill(tensors, expected_shapes, plan.rules).items()}
    reference = family.reference(plan.model).eval().requires_grad_(False)
    reference.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=True)

    diffusers.utils.logging.set_verbosity_error()  # it warns that casting is not as good as loading
    if dtype == np.float64:
        for module in (model, reference):
            module.to(torch.float64)
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj = Sinusoid()
    args = torch.tensor(np.moveaxis(x_t, -1, 1).copy()), torch.tensor(T), torch.tensor(LABELS)
    expected = np.moveaxis(model(*args).sample.numpy(), 1, -1)
    ours = jax.jit(lambda model, *args: model(*args))(
        build_model(plan.model, params, dtype), jnp.asarray(x_t), jnp.asarray(T), jnp.asarray(LABELS)
    )
    theirs = np.moveaxis(reference(*args).numpy(), 1, -1)
    assert np.isfinite(expected).all()
    scale = np.abs(expected).max()
    return {
        "jddim": float(np.abs(np.asarray(ours) - expected).max() / scale),
        "reference": float(np.abs(theirs - expected).max() / scale),
    }


if __name__ == "__main__":
    print(json.dumps({name: errors(name, np.float64) for name in CASES}))
