"""jddim.compat.diffusers_flax: its own behaviour; tests/parity/test_flax_golden.py compares it with diffusers'."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jddim.compat import diffusers_flax
from jddim.compat.diffusers_flax import FlaxAutoencoderKL, FlaxDDIMScheduler, FlaxDDPMScheduler, SchedulerState
from jddim.config import AutoencoderConfig
from jddim.ddim import coefficients, ddim_step, predict_both, step_table
from jddim.models.building import abstract_model, flat_params
from jddim.schedule import linear_schedule

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

T = 101
RNG = np.random.default_rng(0)
X, OUTPUT, NOISE = RNG.standard_normal((3, 2, 3, 5, 1), np.float32)


def ddim(steps: int = 5, **settings: Any) -> tuple[FlaxDDIMScheduler, SchedulerState]:
    scheduler = FlaxDDIMScheduler(T, **settings)
    return scheduler, scheduler.set_timesteps(scheduler.create_state(), steps)


def test_a_step_with_noise_is_jddims() -> None:
    scheduler, state = ddim(clip_sample=False)
    table = step_table(linear_schedule(T), [60], timesteps_prev=[40])
    row = coefficients(jax.tree.map(lambda column: column[0], table))
    for eta in (0.0, 0.7):
        x0, eps = predict_both(jnp.asarray(OUTPUT), jnp.asarray(X), row["alpha_t"], row["sigma_t"])
        expected = ddim_step(x0, eps, NOISE, **row, eta=eta)
        found = scheduler.step(state, OUTPUT, 60, X, eta, noise=NOISE).prev_sample
        np.testing.assert_allclose(found, expected, atol=1e-6)  # float32's rounding of numbers of about 1


def test_from_a_key_every_step_draws_for_itself() -> None:
    for scheduler, state, more in ((*ddim(), {"eta": 1.0}), (s := FlaxDDPMScheduler(T), s.create_state(), {})):
        a, b, again = (
            scheduler.step(state, OUTPUT, 60, X, key=jax.random.key(seed), **more).prev_sample for seed in (1, 2, 1)
        )
        assert (a == again).all()
        assert (a != b).all()


@pytest.mark.parametrize("given", [{}, {"key": jax.random.key(0), "noise": NOISE}], ids=["neither", "both"])
def test_noise_is_said_once(given: dict[str, Any]) -> None:
    scheduler, state = ddim()
    got = "both" if given else "neither"
    with pytest.raises(ValueError, match=rf"^step: eta > 0 needs key= or noise=, one of them; got {got}$"):
        scheduler.step(state, OUTPUT, 60, X, 0.1, **given)
    other = FlaxDDPMScheduler(T)
    with pytest.raises(ValueError, match=rf"^step: a step of DDPM needs key= or noise=, one of them; got {got}$"):
        other.step(other.create_state(), OUTPUT, 60, X, **given)


def test_what_a_scheduler_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"^FlaxDDPMScheduler: unknown beta_schedule 'sigmoid'.*; unknown variance_type"
    ):
        FlaxDDPMScheduler(beta_schedule="sigmoid", variance_type="learned_range")
    with pytest.raises(ValueError, match="betas must lie in"):
        FlaxDDIMScheduler(beta_end=2.0)
    with pytest.raises(ValueError, match="num_train_timesteps numbers"):
        FlaxDDIMScheduler(trained_betas=jnp.full(7, 0.1))
    scheduler = FlaxDDIMScheduler(T, steps_offset=1)
    with pytest.raises(ValueError, match=r"timesteps must lie in 0\.\.100"):
        scheduler.set_timesteps(scheduler.create_state(), T)
    with pytest.raises(ValueError, match=r"^step: the state has no steps yet"):
        scheduler.step(scheduler.create_state(), OUTPUT, 60, X)


def test_no_step_from_where_there_is_no_t() -> None:
    scheduler, state = ddim()
    found = scheduler.step(state, OUTPUT, np.array([T, 100]), X).prev_sample
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()
    assert np.isnan(scheduler.add_noise(state, X, NOISE, -1)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_under_jit_scan_and_vmap(dtype: Any) -> None:
    """A state is a pytree: a whole run in one program, for several etas at once, is the run by hand."""
    scheduler, state = ddim(4, dtype=dtype)
    x, output = jnp.asarray(X, dtype), jnp.asarray(OUTPUT, dtype)

    @jax.jit
    def run(state: SchedulerState, eta: jax.Array) -> jax.Array:
        def body(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
            return scheduler.step(state, output * x, t, x, eta, noise=jnp.asarray(NOISE, dtype)).prev_sample, None

        return jax.lax.scan(body, x, state.timesteps)[0]

    etas = jnp.array([0.0, 0.6], dtype)
    found = jax.vmap(run, (None, 0))(state, etas)
    assert found.dtype == dtype
    for eta, row in zip(etas, found, strict=True):
        by_hand = x
        for t in state.timesteps:
            by_hand, state = scheduler.step(
                state, output * by_hand, t, by_hand, eta, False, noise=jnp.asarray(NOISE, dtype)
            )
        scale = float(jnp.abs(by_hand).max())
        np.testing.assert_allclose(row, by_hand, atol=scale * 8 * float(jnp.finfo(dtype).eps))  # four steps' rounding


CONFIG = AutoencoderConfig(
    **{"image_size": (6, 10), "latent_channels": 3, "channels": 4, "channel_mults": (1,), "num_res_blocks": 1},
    **{"norm_groups": 2, "mid_attention": False, "scaling_factor": 0.6, "shift_factor": 0.2},
)


def test_the_first_stage_under_jit_takes_its_parameters_as_a_pytree() -> None:
    shapes = flat_params(abstract_model(CONFIG))
    params = {name: jnp.asarray(RNG.normal(0, 0.3, shape.shape), jnp.float32) for name, shape in shapes.items()}
    model = FlaxAutoencoderKL(CONFIG)
    images = jnp.asarray(RNG.standard_normal((2, 3, 6, 10)), jnp.float32)

    @jax.jit
    def back(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        return model.apply({"params": params}, images, True, rngs={"gaussian": key}).sample

    key = jax.random.key(1)
    gaussian = model.apply({"params": params}, images, method="encode").latent_dist
    decoded = model.apply({"params": params}, gaussian.sample(key), deterministic=True, method=model.decode).sample
    np.testing.assert_allclose(back(params, images, key), decoded, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gaussian.std**2, gaussian.var, rtol=1e-5)
    with pytest.raises(ValueError, match="1 parameters do not fit the model"):
        model.apply({"params": params | {"odd": images}}, images)
    with pytest.raises(ValueError, match=r"sample_posterior needs rngs"):
        model.apply({"params": params}, images, True)
    with pytest.raises(ValueError, match=r"^apply: method must be model.encode, model.decode or None, got 'init'$"):
        model.apply({"params": params}, images, method="init")
    with pytest.raises(ValueError, match=r"^decode: call model.apply"):
        model.decode(images)


def test_flaxs_file_is_read_unless_pytorchs_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = dataclasses.replace(CONFIG, num_codes=7), []
    monkeypatch.setattr(
        diffusers_flax, "load_autoencoder", lambda path, **_: asked.append(path) or SimpleNamespace(config=config)
    )
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "diffusion_flax_model.msgpack").touch()
    for given in ({}, {"from_pt": True}):
        with pytest.raises(ValueError, match=r"vae is a VQModel, which has no Gaussian: jddim\.load"):
            FlaxAutoencoderKL.from_pretrained(tmp_path, subfolder="vae", **given)
    with pytest.raises(ValueError, match="owner/name is a VQModel"):
        FlaxAutoencoderKL.from_pretrained("owner/name")
    assert asked == [vae / "diffusion_flax_model.msgpack", vae, "owner/name"]


@pytest.mark.parametrize("cls", [FlaxDDIMScheduler, FlaxDDPMScheduler])
def test_a_scheduler_from_its_file(cls: Any, tmp_path: Path) -> None:
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    told = {"_class_name": "PNDMScheduler", "trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}
    file.write_text(
        json.dumps(told | {"prediction_type": "sample", "timestep_spacing": "leading", "skip_prk_steps": True})
    )
    scheduler, state = cls.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.prediction_type == "sample"
    np.testing.assert_allclose(state.common.alphas_cumprod, np.cumprod([0.9, 0.8, 0.7]), rtol=1e-6)
    file.write_text(json.dumps(told | {"beta_start": "0.1", "clip_sample": 1, "timestep_spacing": "trailing"}))
    match = "beta_start must be float.*clip_sample must be bool.*timestep_spacing is 'trailing'; .* has 'leading' alone"
    with pytest.raises(ValueError, match=match):
        cls.from_pretrained(file.parent)
    for text, said in (
        ("[]", "holds no settings"),
        ("{", "scheduler_config.json: "),
        ('{"trained_betas": ["x"]}', "x"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            cls.from_pretrained(file.parent)
    with pytest.raises(OSError, match="scheduler_config"):
        cls.from_pretrained(tmp_path)
