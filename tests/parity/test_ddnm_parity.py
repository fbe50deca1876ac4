"""DDNM beside its authors' own loop and operators, from stored outputs: make_ddnm_golden.py."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ddnm_cases import CASES, GOLDEN, GREY, STEPS, S, T, drawn, eps

from jddim import restoration
from jddim.config import SamplerConfig
from jddim.ddim import sampler_table
from jddim.schedule import linear_schedule

pytestmark = [pytest.mark.unoptimised, pytest.mark.quick]


@pytest.mark.parametrize(("name", "eta"), CASES)
def test_every_operator_equals_the_authors_loop(name: str, eta: float) -> None:
    x_T, image, noise, keep = drawn()
    with np.load(GOLDEN) as golden:
        expected, matrix = golden[f"{name}/{eta}"], golden["blur_matrix"]
    operator = {
        "inpainting": lambda: restoration.inpainting(keep),
        "average_pooling": lambda: restoration.average_pooling((S, S), 2),
        "channel_mix": lambda: restoration.channel_mix(GREY),
        # its matrix leaves the kernel's last tap out; its measurements have the singular values that its inverse lacks
        "blur": lambda: restoration.separable(matrix, matrix, least=3e-2),
    }[name]()

    def denoise(x_t: Any, t: Any) -> Any:
        return eps(jnp, x_t, t)

    y = operator.forward(jnp.asarray(image, jnp.float32))
    made = restoration.restore_loop(
        denoise,
        operator,
        y,
        jnp.asarray(x_T, jnp.float32),
        sampler_table(linear_schedule(T), SamplerConfig(spacing="uniform"), STEPS),
        eta=eta,
        noise=jnp.asarray(noise, jnp.float32),
    )
    # float32 beside their float64, through ten steps of which the first multiplies rounding by 1 / alpha = 13
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - image).max() > 0.3
