"""Operators and their inverses, and that what is restored has the measurement. tests/parity has the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, small_config

import jddim
from jddim import restoration, sampling
from jddim.config import SamplerConfig
from jddim.restoration import Operator
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.unoptimised

H, W = 6, 10
RNG = np.random.default_rng(5)
KEEP, ROWS, COLUMNS = RNG.uniform(size=(H, W, 1)) < 0.5, RNG.standard_normal((4, H)), RNG.standard_normal((13, W))
OPERATORS: dict[str, Callable[[], Operator]] = {
    "inpainting": lambda: restoration.inpainting(KEEP),
    "channel_mix": lambda: restoration.channel_mix((0.2, 0.7, 0.1)),
    "average_pooling": lambda: restoration.average_pooling((H, W), 2),
    "blur": lambda: restoration.blur((H, W), (0.2,) * 5, least=0.1),
    "separable": lambda: restoration.separable(ROWS, COLUMNS),
}


def matrix(function: Callable[[Any], Any], shape: tuple[int, ...]) -> np.ndarray:
    """Of a linear function of one array of this shape."""
    size = int(np.prod(shape))
    return np.asarray(function(jnp.eye(size).reshape(size, *shape))).reshape(size, -1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_an_inverse_is_moore_and_penroses(name: str) -> None:
    operator = OPERATORS[name]()
    y_shape = jax.eval_shape(operator.forward, jnp.zeros((1, H, W, 3))).shape[1:]
    A, inverse = matrix(operator.forward, (H, W, 3)), matrix(operator.pinv, y_shape)
    # float32, of matrices whose singular values go from 0.1 to about 10
    close: Any = {"rtol": 0, "atol": 2e-4 * max(1, np.abs(inverse).max())}
    np.testing.assert_allclose(A @ inverse @ A, A, **close)
    np.testing.assert_allclose(inverse @ A @ inverse, inverse, **close)
    np.testing.assert_allclose(A @ inverse, (A @ inverse).T, **close)
    np.testing.assert_allclose(inverse @ A, (inverse @ A).T, **close)
    assert np.linalg.matrix_rank(inverse @ A, tol=1e-2) < A.shape[1]  # something is lost


def test_what_they_measure() -> None:
    x = jax.random.normal(jax.random.key(1), (2, H, W, 3))
    pooled = x.reshape(2, H // 2, 2, W // 2, 2, 3).mean((2, 4))
    chex.assert_trees_all_close(restoration.average_pooling((H, W), 2).forward(x), pooled, atol=1e-6)
    chex.assert_trees_all_close(restoration.channel_mix().forward(x), x.mean(-1, keepdims=True), atol=1e-6)
    taps = np.array([0.1, 0.6, 0.3])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    blurred = sum(taps[i] * taps[j] * padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3))
    chex.assert_trees_all_close(restoration.blur((H, W), taps, least=0).forward(x), blurred, atol=1e-5)


def pipeline() -> jddim.DDIM:
    config = small_config(image_size=(H, W), in_channels=3, out_channels=3, class_embedding="learned", num_classes=4)
    return jddim.DDIM(random_model(config), linear_schedule(50), SamplerConfig(num_steps=5, clip=True))


@pytest.mark.parametrize("name", ["channel_mix", "separable"])
def test_what_is_restored_has_the_measurement(name: str) -> None:
    ddim, operator = pipeline(), OPERATORS[name]()
    keys = sampling.sample_keys(jax.random.key(2), 3)
    x_T = sampling.initial_noise(keys, (H, W, 3))
    y = operator.forward(jax.random.uniform(jax.random.key(3), x_T.shape, minval=-1))
    denoise = ddim.denoiser(labels=jnp.array([0, 2, 1]), guidance_scale=2.0, null_label=3)

    def restored(y: Any, eta: Any) -> Any:
        return restoration.restore_loop(
            denoise, operator, y, x_T, ddim.table(), eta=eta, key=keys, **ddim.conventions()
        )

    x_0 = jax.jit(restored)(y, 0.85)
    chex.assert_trees_all_close(operator.forward(x_0), y, atol=1e-3)
    free = sampling.sample_loop(denoise, x_T, ddim.table(), **ddim.conventions())
    assert np.abs(operator.forward(free) - y).max() > 0.1
    if name == "channel_mix":
        etas = jax.vmap(lambda eta: restored(y, eta))(jnp.array([0.0, 0.85]))
        chex.assert_trees_all_close(etas[1], x_0, atol=1e-3)  # other programs: rounding, through five steps
        chex.assert_trees_all_close(etas[0], restored(y, 0.0), atol=1e-3)
        each = restored(y, jnp.array([0.0, 0.85, 0.3]))
        chex.assert_trees_all_close(each[:2], jnp.stack([etas[0, 0], etas[1, 1]]), atol=1e-3)


def test_every_prediction_is_the_same_and_has_a_gradient() -> None:
    """A network of v is asked for v; the gradient in y is that of finite differences."""
    operator, T = restoration.average_pooling((H, W), 2), 50
    x_T, y = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (2, H, W, 3)), (2, (2, H // 2, W // 2, 3)))
    )
    table = pipeline().table()
    alpha, sigma = (
        jnp.asarray(column(np.arange(T)), jnp.float32)
        for column in (linear_schedule(T).alpha, linear_schedule(T).sigma)
    )

    def eps(x_t: Any, t: Any) -> Any:
        return jnp.tanh(x_t + 0.3 * jnp.roll(x_t, 1, axis=1))

    def v(x_t: Any, t: Any) -> Any:
        a, s = (column[t][:, None, None, None] for column in (alpha, sigma))
        return (eps(x_t, t) - s * x_t) / a

    def restored(y: Any, denoise: Any = eps, **options: Any) -> Any:
        return restoration.restore_loop(denoise, operator, y, x_T, table, eta=0.85, key=jax.random.key(3), **options)

    exact = restored(y)
    chex.assert_trees_all_close(restored(y, v, prediction_type="v_prediction"), exact, atol=1e-3)
    clipped = {"clip_range": (-1.0, 1.0)}
    assert np.abs(restored(y, **clipped, rederive_eps=True) - restored(y, **clipped)).max() > 1e-3

    def loss(y: Any) -> Any:
        return (restored(y) ** 2).mean()

    way = jax.random.normal(jax.random.key(4), y.shape)
    step = 1e-2
    slope = (loss(y + step * way) - loss(y - step * way)) / (2 * step)
    np.testing.assert_allclose((jax.grad(loss)(y) * way).sum(), slope, rtol=2e-2)


def test_an_operator_of_all_pixels_is_the_image_and_of_none_the_sampler() -> None:
    ddim, x_T = pipeline(), jax.random.normal(jax.random.key(4), (2, H, W, 3))
    image = jax.random.uniform(jax.random.key(3), x_T.shape, minval=-1)
    denoise = ddim.denoiser(labels=1)

    def restored(keep: Any) -> Any:
        operator = restoration.inpainting(keep)
        y = operator.forward(image)
        return restoration.restore_loop(denoise, operator, y, x_T, ddim.table(), eta=0.0, **ddim.conventions())

    chex.assert_trees_all_close(restored(np.ones((H, W, 1))), image, atol=1e-6)
    free = sampling.sample_loop(denoise, x_T, ddim.table(), **ddim.conventions())
    chex.assert_trees_all_close(restored(np.zeros((H, W, 1))), free, atol=1e-4)


def test_what_does_not_fit_is_told() -> None:
    ddim, x_T = pipeline(), jnp.zeros((2, H, W, 3))
    for told, make in (
        (r"factor must divide the size 6x10, got 4", lambda: restoration.average_pooling((H, W), 4)),
        (r"an odd number of taps, got shape \(4,\)", lambda: restoration.blur((H, W), np.ones(4))),
        (r"not all 0, got \(0, 0\)", lambda: restoration.channel_mix((0, 0))),
        (r"rows must be a matrix of finite numbers", lambda: restoration.separable([[np.nan]], [[1.0]])),
        (r"takes 4x4 pixels, got 6x10", lambda: restoration.average_pooling((4, 4), 2).forward(x_T)),
    ):
        with pytest.raises(ValueError, match=told):
            make()
    operator = restoration.channel_mix()
    for told, y, eta in (
        (r"measurements of x_T, \(2, 6, 10, 1\), got \(2, 6, 10, 3\)", x_T, 0.5),
        (r"eta is a share here, in \[0, 1\], got 1.5", x_T[..., :1], 1.5),
    ):
        with pytest.raises(ValueError, match=told):
            restoration.restore_loop(ddim.denoiser(labels=1), operator, y, x_T, ddim.table(), eta=eta)
