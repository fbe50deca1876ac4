"""What a plan settles: edits on the end of a table, and everything that cannot be, said before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZE, random_model, small_config

from jddim import sampling
from jddim.config import SamplerConfig
from jddim.ddim import add_noise
from jddim.editing import inpaint_loop, tail
from jddim.pipeline import DDIM
from jddim.run.batches import run
from jddim.run.methods import find
from jddim.run.plan import Inputs, plan
from jddim.run.programs import Program, network_denoiser
from jddim.run.request import Request, RequestError
from jddim.scale.export import export_sampler
from jddim.scale.sharding import Sharded, make_mesh
from jddim.scale.sweeping import sweep
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.unoptimised

NARROW: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
KEY, NUM = jax.random.key(5), 3
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-0.9, 0.9, (NUM, *SIZE, 1)).astype(np.float32)
MASK = np.where(np.arange(SIZE[1]) < 4, 1, -1).astype(np.float32)[None, :, None].repeat(SIZE[0], axis=0)


@pytest.fixture(scope="module")
def ddim() -> DDIM:
    sampler = SamplerConfig(spacing="leading", num_steps=5, prediction_type="v_prediction", clip=False)
    return DDIM(random_model(small_config(**NARROW)), linear_schedule(100), sampler)


def close(actual: Any, expected: Any) -> None:
    """Up to rounding: the one is compiled by segments, the other as it stands."""
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(1, float(np.abs(expected).max())))


@pytest.mark.parametrize("given", [False, True])
def test_editing_by_strength_is_the_loop_on_the_tables_end(ddim: DDIM, given: bool) -> None:
    rest = tail(ddim.table(), 0.7)
    assert rest.num_steps == 3
    keys = sampling.sample_keys(KEY, NUM)
    x_T = sampling.initial_noise(keys, IMAGES.shape[1:])
    x_t = add_noise(jnp.asarray(IMAGES), x_T, rest.alpha_t[0], rest.sigma_t[0])
    noise = RNG.standard_normal((3, *IMAGES.shape)).astype(np.float32) if given else None
    how = {"noise": jnp.asarray(noise)} if given else {"key": keys}
    expected = sampling.sample_loop(ddim.model, x_t, rest, eta=0.6, **how, **ddim.conventions())
    close(ddim.edit(IMAGES, KEY, strength=0.7, eta=0.6, noise=noise, batch_size=2), expected)


@pytest.mark.parametrize(
    ("asked", "spacing", "last"),
    [
        ({}, "ddim5", 80),
        ({"steps": 18}, "18", 99),  # no stride makes 18 timesteps of 100
        ({"method": "ddpm"}, "openai", 99),
        ({"method": "dpm++2m", "spacing": "openai_ddim"}, "openai", 99),
        ({"spacing": "openai"}, "openai", 99),
        ({"spacing": "leading"}, "leading", 80),
    ],
)
def test_openais_ddim_has_a_spacing_that_its_other_samplers_have_not(
    ddim: DDIM, asked: dict[str, Any], spacing: str, last: int
) -> None:
    made = dataclasses.replace(ddim, sampler=dataclasses.replace(ddim.sampler, spacing="openai_ddim"))
    planned = plan(made, Request(**asked), Inputs(KEY), 1).check("sample")
    assert (planned.sampler.spacing, int(planned.table.t[0])) == (spacing, last)
    assert planned.table.num_steps == asked.get("steps", 5)


def test_who_watches_an_edit_sees_its_steps(ddim: DDIM) -> None:
    planned = plan(ddim, Request(strength=0.7, eta=0.0), Inputs(KEY, images=IMAGES)).check("edit")
    seen: list[tuple[int, int]] = []
    run(planned, on_segment=lambda now: seen.append((now.done, now.total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_nan_in_an_edit_is_dated(ddim: DDIM) -> None:
    broken = dataclasses.replace(ddim, model=Broken(ddim.model))
    with pytest.raises(FloatingPointError, match="image 0 at step 3 of 3"):
        broken.edit(IMAGES, KEY, strength=0.7)


@jax.tree_util.register_pytree_node_class
class Broken:
    """A network that ends in NaN."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        return self.model(x_t, t) + jnp.where(t < 10, jnp.nan, 0)[:, None, None, None]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.model,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> Any:
        return cls(*children)


@pytest.mark.parametrize(("resample", "clean"), [(1, False), (2, False), (1, True)])
def test_editing_with_a_mask_is_inpaint_loop(ddim: DDIM, resample: int, clean: bool) -> None:
    ddim = ddim.with_sampler(clean_known=clean)
    keys = sampling.sample_keys(KEY, NUM)
    x_T = sampling.initial_noise(keys, IMAGES.shape[1:])
    keep = (1 - MASK) / 2
    how: dict[str, Any] = {"eta": 0.6, "key": keys, "resample": resample, "clean_known": clean, **ddim.conventions()}
    expected = inpaint_loop(ddim.model, x_T, ddim.table(), jnp.asarray(IMAGES), keep, **how)
    close(ddim.edit(IMAGES, KEY, mask=MASK, eta=0.6, resample=resample), expected)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"mask": MASK, "resample": 2, "method": "dpm++2m"}, "remembers earlier steps"),
        ({"mask": MASK > 0}, "mask must be floats in [-1, 1]"),
        ({"mask": 255 * MASK}, "in -255.0..255.0"),
        ({"mask": MASK * np.nan}, "mask must be floats"),
        ({"mask": MASK[..., 0]}, "mask must have shape (6, 10, 1), one for all images, got (6, 10)"),
        ({"mask": MASK[None].repeat(NUM, axis=0)}, "mask must have shape (6, 10, 1)"),
        ({"strength": 0.5, "resample": 2}, "resample and jump_length are RePaint's"),
        ({"strength": 0.5, "mask": MASK}, "give either strength"),
        ({}, "give either strength"),
        ({"strength": 1.5}, "strength must lie in (0, 1]"),
        ({"strength": "half"}, "strength must be float or None, got 'half'"),
    ],
)
def test_edits_that_cannot_be(ddim: DDIM, how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"edit: |strength") as raised:
        ddim.edit(IMAGES, KEY, **how)
    assert said in str(raised.value)


def test_images_of_bytes_are_not_edited(ddim: DDIM) -> None:
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\], got .*x / 127.5 - 1"):
        ddim.edit(127.5 * IMAGES + 127.5, KEY, strength=0.5)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"start": -1}, "start must lie in 0..4294967293"),
        ({"start": 2**32 - 2}, "start must lie in"),
        ({"start": 1.5}, "start must be int, got 1.5"),
        ({"steps": "4"}, "steps must be int or None, got '4'"),
        ({"guidance_interval": 500}, "guidance_interval must be tuple"),
        ({"image_size": 8}, "image_size must be tuple"),
        ({"clip_range": (1.0,)}, "clip_range must be tuple"),
        ({"x_T": np.ones((1, 2), np.float32)}, "x_T must have shape"),
        ({"clip": True, "threshold": (0.9, 1.0)}, "threshold and clip exclude each other"),
        ({"clip_range": (-1.0, 1.0)}, "clip_range without clip"),
        ({"rederive_eps": True, "method": "unipc"}, "rederive_eps is of DDIM and of solvers of eps; method 'unipc'"),
        ({"variance": "fixed_large"}, "variance is for method ddpm, not for 'ddim'"),
        ({"guidance": "projected"}, "guidance is for guidance: give guidance_scale too"),
        ({"labels": [1, 2, 3]}, "this network has no classes"),
    ],
)
def test_requests_that_cannot_be(ddim: DDIM, how: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match="sample: ") as raised:
        ddim.sample(KEY, NUM, **how)
    assert said in str(raised.value)


def test_what_a_door_has_no_use_for_is_refused_there(ddim: DDIM) -> None:
    with pytest.raises(TypeError, match="takes no 'strength'"):
        Sharded(ddim, make_mesh(1)).sample(KEY, 1, strength=0.3)
    with pytest.raises(RequestError, match="eta is left out: it is given when the exported sampler is run"):
        export_sampler(ddim, Request(eta=0.3))
    assert "strength is for images" in str(plan(ddim, Request(strength=0.3), Inputs(KEY), NUM).problems)


def test_a_seed_stands_for_its_key_everywhere(ddim: DDIM) -> None:
    images = np.asarray(ddim.sample(KEY, NUM, eta=0.5))
    np.testing.assert_array_equal(ddim.sample(5, NUM, eta=0.5), images)
    np.testing.assert_array_equal(ddim.sample(jax.random.PRNGKey(5), NUM, eta=0.5), images)
    np.testing.assert_array_equal(sweep(ddim, 5, NUM, [0.5])[0], images)
    close(Sharded(ddim, make_mesh(1)).sample(5, NUM, eta=0.5), images)
    largest = 2**32 - 1
    close(Sharded(ddim, make_mesh(1)).sample(largest, NUM, eta=0.5), ddim.sample(largest, NUM, eta=0.5))
    close(jax.jit(lambda seed: ddim.sample(seed, NUM, eta=0.5))(5), images)
    with pytest.raises(RequestError, match=r"key must be jax.random.key\(seed\), or the seed .* got -1"):
        ddim.sample(-1, NUM)


def test_x_T_may_be_closed_over_by_a_transformation(ddim: DDIM) -> None:
    x_T = jax.random.normal(KEY, (NUM, *SIZE, 1))
    close(jax.jit(lambda key: ddim.sample(key, x_T=x_T, eta=0.5))(KEY), ddim.sample(KEY, x_T=x_T, eta=0.5))


def test_a_self_conditioned_network_with_labels_is_wrapped_for_both() -> None:
    program = Program(find("ddim"), "epsilon", 1.0, False, "fixed_small", self_condition=True)

    def model(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return x[..., :1] * t[:, None, None, None] + labels[:, None, None, None]

    x = jnp.asarray(IMAGES)
    made = network_denoiser(model, program, jnp.arange(NUM), None)(x, jnp.ones(NUM), 2 * x)
    np.testing.assert_array_equal(made, 2 * x + np.arange(NUM).reshape(-1, 1, 1, 1))
