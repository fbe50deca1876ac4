"""The lucidrains network by itself: its config, its errors, its dtypes. Parity with PyTorch is in parity/."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.config import LucidrainsConfig, from_json, to_json
from jddim.models import MODELS, wiring_of
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.models.lucidrains import RMSNorm

pytestmark = pytest.mark.unoptimised

CONFIG = LucidrainsConfig(
    (6, 10),
    full_attention=(False, True),
    num_heads=(2, 1),
    head_channels=(3, 5),
    in_channels=1,
    out_channels=1,
    self_condition=True,
    channels=4,
    channel_mults=(1, 2),
)


ONE_LEVEL = dataclasses.replace(  # which compiles in a third of the time
    CONFIG, channel_mults=(2,), full_attention=(False,), num_heads=(2,), head_channels=(3,)
)


def model(dtype: object = np.float32, config: LucidrainsConfig = CONFIG) -> object:
    rng = np.random.default_rng(0)
    params = {
        name: ((name.endswith(".g")) + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in flat_params(abstract_model(config)).items()
    }
    return build_model(config, params, dtype)  # type: ignore[arg-type]


def test_the_config_survives_json() -> None:
    assert wiring_of(CONFIG) == "lucidrains"
    assert from_json(MODELS["lucidrains"][0], json.loads(json.dumps(to_json(CONFIG)))) == CONFIG
    assert (CONFIG.input_channels, CONFIG.widths, CONFIG.stem, CONFIG.size_factor) == (2, (4, 8), 4, 2)
    assert "full attention at 3x5, no classes, self-conditioned" in CONFIG.summary


def test_everything_wrong_with_a_config_is_in_one_message() -> None:
    with pytest.raises(ValueError, match="LucidrainsConfig: ") as caught:
        LucidrainsConfig(
            (7, 0),
            full_attention=(True,),
            num_heads=(1, 0),
            head_channels=(),
            in_channels=0,
            channels=5,
            channel_mults=(1, 2),
            memory=-1,
            time_embedding="sinusoid",
            time_features=3,
            theta=1.0,
        )
    for part in (
        "in_channels=0",
        "channels=5 must be even",
        "full_attention=(True,) must hold one value for each of 2 levels",
        "num_heads=(1, 0)",
        "head_channels=()",
        "memory=-1",
        "did you mean 'sinusoidal'?",
        "time_features=3",
        "theta=1.0",
        "image_size=(7, 0)",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="7x10 does not divide"):
        LucidrainsConfig((7, 10), (False, True), (1, 1), (2, 2), channel_mults=(1, 2))


def test_wrong_inputs_are_refused() -> None:
    unet = model()
    t = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=r"\(b, h, w, 2, self-conditioning and x_t\), got \(1, 6, 10, 1\)"):
        unet(jnp.zeros((1, 6, 10, 1)), t)  # type: ignore[operator]
    with pytest.raises(ValueError, match="5x10 does not divide"):
        unet(jnp.zeros((1, 5, 10, 2)), t)  # type: ignore[operator]
    with pytest.raises(ValueError, match="no labels"):
        unet(jnp.zeros((1, 6, 10, 2)), t, t)  # type: ignore[operator]


def test_bfloat16_computes_the_same_roughly() -> None:
    x = np.random.default_rng(1).standard_normal((2, 6, 10, 2)).astype(np.float32)
    t = jnp.array([0, 999])
    apply = jax.jit(lambda unet, x: unet(x, t))
    exact, rough = (np.asarray(apply(model(dtype, ONE_LEVEL), x)) for dtype in (np.float32, jnp.bfloat16))
    assert rough.dtype == np.float32
    # 8 bits of mantissa through 20 layers
    np.testing.assert_allclose(rough, exact, rtol=0, atol=0.1 * np.abs(exact).max())


def test_the_norm_of_zeros_has_a_gradient() -> None:
    norm = RMSNorm(5, dtype=np.float32)
    slope = jax.grad(lambda x: jnp.sum(norm(x) ** 2))(jnp.zeros((1, 2, 3, 5)))
    assert np.isfinite(slope).all()
