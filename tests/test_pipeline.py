"""`DDIM.sample`: exact numbers of images, one program, and everything wrong said at once."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import sys
import types
from xml.etree import ElementTree

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, small_config

import jddim
from jddim.checkpoint.metadata import Metadata
from jddim.config import LucidrainsConfig, SamplerConfig, ScheduleConfig, UNetConfig
from jddim.curve import alpha_bar_curve
from jddim.run import programs
from jddim.run.compiling import kind_of
from jddim.run.progress import silence
from jddim.run.request import RequestError
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import linear_schedule, zero_terminal_snr
from jddim.timesteps import make_timesteps

pytestmark = [pytest.mark.quick, pytest.mark.unoptimised]

SIZE = (6, 10)


UNUSUAL = SamplerConfig(
    spacing="leading",
    num_steps=7,
    steps_offset=1,
    set_alpha_to_one=False,
    threshold_ratio=0.9,
    threshold_max=1.5,
    rederive_eps=True,
    prediction_type="v_prediction",
    timestep_scale=2.5,
)
"""Every convention another than the default, but those that go with a network of their own."""


@dataclasses.dataclass(frozen=True)
class Toy:
    """A network in one line, static under jit, with whatever config a test gives it."""

    config: UNetConfig
    dtype: type = jnp.float32

    def __call__(self, x_t, t, labels=None):
        y = 0.8 * jnp.sin(x_t + t.astype(jnp.float32)[:, None, None, None] / 50) + 0.1 * x_t
        if labels is not None:
            y += labels.astype(jnp.float32)[:, None, None, None] / 10
        return jnp.concatenate([y, jnp.cos(y)], axis=-1)[..., : self.config.out_channels]


jax.tree_util.register_static(Toy)


def toy(sampler: SamplerConfig, **fields) -> jddim.DDIM:
    config = UNetConfig(**{"image_size": SIZE, "in_channels": 2, "out_channels": 2, "channel_mults": (1, 2), **fields})
    return jddim.DDIM(Toy(config), linear_schedule(300), sampler)


SEVEN = SamplerConfig(spacing="linspace", num_steps=7)


def small_ddim() -> jddim.DDIM:
    config = UNetConfig(
        SIZE, in_channels=2, out_channels=2, channels=6, channel_mults=(1, 2), num_res_blocks=1, norm_groups=3
    )
    return jddim.DDIM(
        random_model(config), linear_schedule(300), SamplerConfig(spacing="linspace", num_steps=7, clip=True)
    )


@pytest.fixture(scope="module")
def ddim() -> jddim.DDIM:
    return small_ddim()


KEY = jax.random.key(5)


def test_it_is_sample_loop_with_the_checkpoints_defaults(ddim: jddim.DDIM) -> None:
    keys = jddim.sample_keys(KEY, 3)
    x_T = jddim.initial_noise(keys, (*SIZE, 2))
    table = ddim.table()
    assert table.num_steps == 7
    expected = sample_loop(ddim.model, x_T, table, eta=0.4, key=keys, clip_range=(-1.0, 1.0))
    # the same maths outside jit: rounding only
    chex.assert_trees_all_close(ddim.sample(KEY, 3, eta=0.4), expected, atol=1e-4)
    unclipped = sample_loop(ddim.model, x_T, table, eta=0.4, key=keys)
    chex.assert_trees_all_close(ddim.sample(KEY, 3, eta=0.4, clip=False), unclipped, rtol=1e-3, atol=1e-3)


def test_given_noise_is_used_and_padded_batches_do_not_leak(ddim: jddim.DDIM) -> None:
    rng = np.random.default_rng(0)
    x_T = rng.standard_normal((5, *SIZE, 2), dtype=np.float32)
    noise = rng.standard_normal((7, 5, *SIZE, 2), dtype=np.float32)
    etas = np.linspace(0, 1, 5, dtype=np.float32)
    whole, trajectory = ddim.sample(x_T=x_T, noise=noise, eta=etas, trajectory_every=3)
    parts = ddim.sample(x_T=x_T, noise=noise, eta=etas, trajectory_every=3, batch_size=2)
    chex.assert_trees_all_close(parts, (whole, trajectory), atol=2e-4)  # see above: another batch, other rounding
    chex.assert_shape(trajectory.x_t, (3, 5, *SIZE, 2))
    reversed_rows = ddim.sample(x_T=x_T, noise=noise[::-1], eta=etas)
    assert jnp.abs(reversed_rows - whole).max() > 0.01
    chex.assert_trees_all_close(reversed_rows[0], whole[0], atol=1e-6)  # eta 0: noise does not matter


def test_another_image_size_and_an_explicit_timetable(ddim: jddim.DDIM) -> None:
    images = ddim.sample(KEY, 2, image_size=(4, 14), spacing=[250, 100, 3])
    chex.assert_shape(images, (2, 4, 14, 2))


def test_a_preview_may_end_the_run(ddim: jddim.DDIM) -> None:
    class Enough(Exception):
        pass

    def stop(now: jddim.Preview) -> None:
        if now.done == 4:
            raise Enough

    with pytest.raises(Enough):
        ddim.sample(KEY, 3, steps=16, on_segment=stop)


def test_without_a_terminal_lines_are_printed_if_they_are_asked_for(
    ddim: jddim.DDIM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ddim.sample(KEY, 3, eta=0.7)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("jddim.run.progress.EVERY", 0.0)
    ddim.sample(KEY, 3, eta=0.7, batch_size=1, progress=True)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "compiling 7 steps, or reading what was compiled before ..."
    assert re.fullmatch(r"7 steps: 3/3 images, [\d.e+]+ images/s, 0 s left", lines[-1])
    with silence():
        ddim.sample(KEY, 3, eta=0.7, progress=True)
    assert capsys.readouterr().err == ""


def test_a_notebook_has_a_bar_at_once(
    ddim: jddim.DDIM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    ddim.sample(KEY, 3, eta=0.7)
    shown = capsys.readouterr().err
    assert "0/3" in shown
    assert "compiling" in shown
    assert "3/3" in shown


def test_one_program_for_every_eta_seed_and_weights(ddim: jddim.DDIM) -> None:
    other = dataclasses.replace(ddim, model=random_model(ddim.model.config, 8))
    ddim.sample(KEY, 4, steps=5, eta=0.1)
    compiled = programs.segment.on(kind_of())._cache_size()
    for i, eta in enumerate((0, 0.0, 0.5, np.float64(1), jnp.float32(0.3))):
        ddim.sample(jax.random.key(i), 4, steps=5, eta=eta)
        other.sample(jax.random.key(i), 4, steps=5, eta=eta)
    assert programs.segment.on(kind_of())._cache_size() == compiled


def test_bfloat16_computes_in_bfloat16_and_returns_float32(ddim: jddim.DDIM) -> None:
    half = dataclasses.replace(ddim, model=random_model(ddim.model.config, dtype=jnp.bfloat16))
    images = half.sample(KEY, 3, eta=0.5)
    assert images.dtype == jnp.float32
    exact = ddim.sample(KEY, 3, eta=0.5)
    error = jnp.abs(images - exact).mean()
    assert 1e-5 < error < 0.1  # 8 bits of mantissa through 7 steps: a few hundredths, and not nothing


def test_a_nan_names_the_image_and_the_step(ddim: jddim.DDIM) -> None:
    class Breaks:
        config = ddim.model.config
        dtype = jnp.float32

        def __call__(self, x_t, t):
            return jnp.where((t < 150)[:, None, None, None] & (x_t[:, :1, :1, :1] > 0), jnp.nan, 0.1 * x_t)

    broken = dataclasses.replace(ddim, model=jax.tree_util.register_static(Breaks)())
    x_T = np.full((3, *SIZE, 2), -0.3, np.float32)
    x_T[1] = 0.3
    with pytest.raises(FloatingPointError, match=r"image 1 at step 5 of 7 \(t = 127\), in 1 of 3"):
        broken.sample(x_T=x_T, eta=0)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"num": 0}, ["num must be at least 1, got 0"]),
        ({"num": 10**12}, ["num must be at most 4294967296, which images are kept apart in, got 1000000000000"]),
        ({"num": None, "batch_size": 4}, ["num must be given beside batch_size, which is how many are made at a time"]),
        ({"num": 3, "key": None}, ["a key is needed for x_T"]),
        ({"key": "7"}, ["key must be jax.random.key(seed), or the seed in 0..4294967295, got '7'"]),
        ({"key": np.zeros(3, np.uint32)}, ["got numpy's ndarray"]),
        ({"key": np.random.default_rng()}, ["got numpy's Generator"]),
        (
            {"key": None, "x_T": np.zeros((3, *SIZE, 2), np.float32), "eta": 0.5},
            ["a key is needed for the noise of each step (eta > 0)"],
        ),
        ({"eta": -0.1}, ["eta must be a finite number >= 0, got -0.1"]),
        ({"eta": float("nan")}, ["got nan"]),
        ({"eta": float("inf")}, ["got inf"]),
        ({"eta": 9.0}, ["eta 9 is too large for this table"]),
        ({"eta": np.zeros(4)}, [r"one value per image (3,), got shape (4,)"]),
        ({"batch_size": 0}, ["batch_size must be a whole number, at least 1, or None; got 0"]),
        ({"batch_size": "auto"}, ["batch_size must be a whole number, at least 1, or None; got 'auto'"]),
        ({"clip_range": (1.0, -1.0)}, ["low < high"]),
        ({"image_size": (5, 10)}, ["multiples of 2"]),
        ({"x_T": np.zeros((3, 10, 6, 3), np.float32)}, ["x_T must have shape (3, 6, 10, 2)"]),
        ({"x_T": np.zeros((3, *SIZE, 2)), "eta": -1}, ["got float64: give x_T.astype('float32')", "eta must be"]),
        ({"x_T": [[1.0]]}, ["x_T must be an array of jax or NumPy, got a list: give numpy.asarray(x_T"]),
        ({"x_T": np.full((3, *SIZE, 2), np.nan, np.float32)}, ["x_T holds a NaN or infinity, first at (0, 0, 0, 0)"]),
        ({"noise": np.zeros((6, 3, *SIZE, 2), np.float32)}, ["one row for each of 7 steps, got (6, 3"]),
        ({"steps": 301}, ["sample: num_steps (--steps) must lie in 1..300 (the training timesteps), got 301"]),
        ({"steps": 0}, ["got 0"]),
        ({"method": "ddmi"}, ["unknown method 'ddmi'"]),
        ({"spacing": "cubic"}, ["unknown spacing 'cubic'"]),
    ],
)
def test_what_is_wrong_is_said_at_once(ddim: jddim.DDIM, arguments: dict, messages: list[str]) -> None:
    with pytest.raises(RequestError, match="sample: ") as raised:
        ddim.sample(**{"key": KEY, "num": 3, **arguments})
    for message in messages:
        assert message in str(raised.value)


def test_a_table_that_cannot_be_names_the_function(ddim: jddim.DDIM) -> None:
    images = np.zeros((1, *SIZE, 2), np.float32)
    for of, call in (
        ("edit", lambda: ddim.edit(images, 0, strength=0.5, steps=0)),
        ("edit", lambda: ddim.edit(images, 0, mask=images[0, ..., :1], steps=0)),
        ("invert", lambda: ddim.invert(images, steps=0)),
    ):
        with pytest.raises(RequestError, match=f"^{of}: num_steps .* got 0"):
            call()


def test_what_pytorchs_pipelines_have_is_answered_with_what_there_is_here(ddim: jddim.DDIM) -> None:
    for name, said in (
        ("to", "JAX_PLATFORMS=cpu, cuda or tpu in the environment chooses the device"),
        ("cuda", "JAX_PLATFORMS"),
        ("half", "jddim.load(..., dtype='bfloat16')"),
        ("eval", "leave the call out"),
        ("from_pretrained", "jddim.load(...) loads a folder, a PyTorch file, a hub id"),
        ("unet", "the network is ddim.model"),
    ):
        for owner in (ddim, jddim.DDIM):
            assert not hasattr(owner, name)
            with pytest.raises(AttributeError, match=f"DDIM has no attribute '{name}': .*{re.escape(said)}"):
                getattr(owner, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'smaple'$"):
        ddim.smaple  # noqa: B018
    assert copy.copy(ddim).model is ddim.model


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (None, "load: path must name a checkpoint, a folder, .*; got None$"),
        ({"a": np.zeros(3)}, r"got a dict: save it, torch.save\(..., 'model.pt'\), then jddim.load\('model.pt'\)$"),
        (type("UNet", (), {"state_dict": dict})(), r"got test_pipeline's UNet: save its state_dict\(\), torch.save\("),
    ],
)
def test_what_is_no_name_of_a_checkpoint(path: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        jddim.load(path)


def test_num_is_that_of_the_arrays_or_one(ddim: jddim.DDIM) -> None:
    conditional = toy(SEVEN, class_embedding="learned", num_classes=5)
    assert ddim.sample(0).shape == (1, *SIZE, 2)
    made = conditional.sample(0, labels=[4, 4, 4], eta=0.3)
    chex.assert_trees_all_equal(made, conditional.sample(0, 3, labels=4, eta=0.3))
    chex.assert_trees_all_equal(made, conditional.sample(0, 3, labels=jnp.array(4), eta=0.3))


def test_one_t_and_one_label_are_every_samples() -> None:
    model = random_model(small_config(class_embedding="learned", num_classes=5))
    x_t = jax.random.normal(KEY, (3, 4, 4, 1))
    chex.assert_trees_all_equal(model(x_t, 7, 4), model(x_t, jnp.full(3, 7), jnp.full(3, 4)))
    lucidrains = random_model(
        LucidrainsConfig((8, 8), (True,), (2,), (4,), in_channels=1, out_channels=1, channels=8, channel_mults=(1,))
    )
    x_t = jax.random.normal(KEY, (3, 8, 8, 1))
    chex.assert_trees_all_equal(lucidrains(x_t, 7), lucidrains(x_t, jnp.full(3, 7)))


def test_without_stderr_images_are_made(ddim: jddim.DDIM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert ddim.sample(0).shape == (1, *SIZE, 2)


def test_tensors_are_answered_with_the_line_that_converts_them(ddim: jddim.DDIM) -> None:
    torch = pytest.importorskip("torch")
    x_T = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2, *SIZE), np.float32))
    noise = torch.zeros((7, 3, 2, *SIZE))
    with pytest.raises(ValueError, match=r"got torch's Tensor: give x_T\.permute\(0, 2, 3, 1\)\.float\(\)\.numpy") as e:
        ddim.sample(x_T=x_T, noise=noise, eta=0.5)
    assert "give noise.permute(0, 1, 3, 4, 2).float().numpy(force=True)" in str(e.value)
    converted = x_T.permute(0, 2, 3, 1).float().numpy(force=True)
    with pytest.raises(ValueError, match=r"give x_T\.float\(\)\.numpy\(force=True\)"):  # channels last already
        ddim.sample(x_T=torch.zeros((3, *SIZE, 2), dtype=torch.bfloat16), eta=0)
    with pytest.raises(
        ValueError, match=r"labels must be one for all or one an image, got torch's Tensor: give labels"
    ):
        toy(SEVEN, class_embedding="learned", num_classes=5).sample(0, labels=torch.ones(2, device="meta").long())
    assert ddim.sample(x_T=converted, eta=0).shape == (3, *SIZE, 2)
    with pytest.raises(ValueError, match=r"images must be .* give images\.permute\(0, 2, 3, 1\)"):
        ddim.invert(x_T)
    with pytest.raises(ValueError, match=r"mask must be .* give numpy\.asarray\(mask|mask\.numpy"):
        ddim.edit(converted, 0, mask=x_T[0, 0])


def test_labels_reach_the_network_one_an_image(ddim: jddim.DDIM) -> None:
    conditional = toy(SEVEN, class_embedding="learned", num_classes=5)
    labels = np.array([4, 0, 3], np.int32)
    together = conditional.sample(KEY, 3, labels=labels, eta=0.3)
    for i, label in enumerate(labels):
        alone = conditional.sample(KEY, 1, labels=[int(label)], start=i, eta=0.3)
        chex.assert_trees_all_close(alone[0], together[i], atol=1e-5)
    padded = conditional.sample(KEY, 3, labels=labels, eta=0.3, batch_size=2)
    chex.assert_trees_all_close(padded, together, atol=1e-5)
    assert jnp.abs(conditional.sample(KEY, 3, labels=labels[::-1], eta=0.3) - together)[0].max() > 0.01
    for wrong, message in (
        (None, r"class-conditional: give labels, one for all or one an image, integers in 0\.\.4"),
        ([1, 2], r"shape \(3,\), one an image, got \(2,\)"),
        ([1, 2, 5], r"lie in 0\.\.4, got 5"),
        ([-1, 2, 3], r"lie in 0\.\.4, got -1"),
        ([0.5, 1.0, 2.0], "integers, got float"),
    ):
        with pytest.raises(ValueError, match=message):
            conditional.sample(KEY, 3, labels=wrong)
    with pytest.raises(ValueError, match="this network has no classes"):
        ddim.sample(KEY, 3, labels=labels)


def test_every_convention_reaches_the_loop() -> None:
    conventions = dataclasses.replace(UNUSUAL, self_condition=True)
    keys = jddim.sample_keys(KEY, 3)
    x_T = jddim.initial_noise(keys, (*SIZE, 2))
    model = toy(conventions)
    t = make_timesteps("leading", 300, 7, 1)
    table = jddim.step_table(model.schedule, t, timesteps_prev=np.maximum(t - 300 // 7, -1), set_alpha_to_one=False)
    assert table.sigma_prev[-1] == np.float32(model.schedule.sigma(0))

    def network(x_t, t, x0_hat):  # the toy keeps the first half of its channels, which are x0_hat's
        return Toy(model.model.config)(jnp.concatenate([x0_hat, x_t], axis=-1), t * 2.5)

    expected = sample_loop(
        network,
        x_T,
        table,
        eta=0.4,
        key=keys,
        prediction_type="v_prediction",
        threshold=(0.9, 1.5),
        rederive_eps=True,
        self_condition=True,
    )
    sampled = model.sample(KEY, 3, eta=0.4)
    chex.assert_trees_all_close(sampled, expected, atol=1e-5)  # the same maths outside jit: rounding only
    for change in (
        {"steps_offset": 0},
        {"set_alpha_to_one": True},
        {"threshold_ratio": 0.6},
        {"threshold_max": 1.01},
        {"rederive_eps": False},
        {"prediction_type": "sample"},
        {"timestep_scale": 1.0},
        {"spacing": "linspace_diffusers"},
        {"self_condition": False},
    ):
        other = model.with_sampler(**change).sample(KEY, 3, eta=0.4)
        assert jnp.abs(other - sampled).max() > 1e-4, change
    clipped = model.sample(KEY, 3, eta=0.4, image_size=SIZE, clip=True)  # in place of the threshold
    chex.assert_trees_all_close(clipped, model.with_sampler(threshold_ratio=None, clip=True).sample(KEY, 3, eta=0.4))
    assert jnp.abs(clipped - sampled).max() > 1e-4


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_is_the_ancestral_loop_with_the_checkpoints_variance(variance: str) -> None:
    outputs = 4 if variance == "learned_range" else 2
    model = toy(dataclasses.replace(SEVEN, variance=variance, clip=True), out_channels=outputs)
    keys = jddim.sample_keys(KEY, 3)
    x_T = jddim.initial_noise(keys, (*SIZE, 2))
    expected = ancestral_loop(model.model, x_T, model.table(), key=keys, variance=variance)
    chex.assert_trees_all_close(model.sample(KEY, 3, method="ddpm"), expected, atol=1e-5)
    ddim = sample_loop(lambda x, t: model.model(x, t)[..., :2], x_T, model.table(), clip_range=(-1.0, 1.0))
    chex.assert_trees_all_close(model.sample(KEY, 3, eta=0), ddim, atol=1e-5)
    with pytest.raises(ValueError, match="eta is DDIM's"):
        model.sample(KEY, 3, method="ddpm", eta=1.0)
    with pytest.raises(ValueError, match=r"unknown method 'ddmp'.*did you mean 'ddpm'"):
        model.sample(KEY, 3, method="ddmp")
    with pytest.raises(ValueError, match="a key is needed for the noise of each step"):
        model.sample(x_T=np.asarray(x_T), method="ddpm")


def test_zero_terminal_snr_needs_a_network_that_predicts_v_or_x0() -> None:
    zero = dataclasses.replace(toy(SEVEN), schedule=zero_terminal_snr(linear_schedule(300)))
    with pytest.raises(ValueError, match="eps tells nothing of x0 at alpha_t = 0"):
        zero.sample(KEY, 3)
    for prediction_type in ("v_prediction", "sample"):
        images = zero.with_sampler(prediction_type=prediction_type).sample(KEY, 3, eta=0.5)
        assert jnp.isfinite(images).all()


def test_a_model_with_other_outputs_cannot_be_sampled(ddim: jddim.DDIM) -> None:
    config = dataclasses.replace(ddim.model.config, out_channels=4)
    learned_sigma = dataclasses.replace(ddim, model=random_model(config))
    with pytest.raises(ValueError, match="maps 2 channels to 4"):
        learned_sigma.sample(KEY, 1)


def test_no_warning_is_logged_while_sampling(ddim: jddim.DDIM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ddim.sample(KEY, 2, steps=2)
    assert not caplog.records


def test_the_denoiser_and_its_conventions_are_what_sample_runs(ddim: jddim.DDIM) -> None:
    x_T = np.asarray(jax.random.normal(KEY, (3, *SIZE, 2)))
    for conventions in (
        {},
        {"clip": True, "clip_range": (-0.6, 0.8), "rederive_eps": True, "timestep_scale": 0.5},
        {"threshold_ratio": 0.9, "threshold_max": 1.5, "prediction_type": "v_prediction"},
    ):
        other = ddim.with_sampler(**conventions)
        by_hand = sample_loop(other.denoiser(), x_T, other.table(), eta=0.7, key=KEY, **other.conventions())
        chex.assert_trees_all_close(by_hand, other.sample(KEY, x_T=x_T, eta=0.7), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="denoiser: this network has no classes: leave labels out"):
        ddim.denoiser([1, 2])


def test_an_x_T_of_pytorchs_layout_is_told(ddim: jddim.DDIM) -> None:
    with pytest.raises(ValueError, match=r"x_T looks like \(N, C, H, W\), got \(3, 2, 6, 10\): transpose it"):
        ddim.sample(x_T=np.zeros((3, 2, *SIZE), np.float32))
    for shape in ((3, 2, 7, 11), (3, 1, *SIZE)):  # no sizes of the network's; nothing is said of halving 2 or 1
        with pytest.raises(ValueError, match=r"sample: x_T must have shape \(3, 6, 10, 2\)") as raised:
            ddim.sample(x_T=np.zeros(shape, np.float32))
        assert "divide" not in str(raised.value)


def test_a_notebook_shows_the_timetable_and_the_checkpoint() -> None:
    ddim = small_ddim()
    shown = ElementTree.fromstring(ddim._repr_html_())
    assert shown.findtext("code") == repr(ddim)
    assert {row.findtext("th"): row.findtext("td") for row in shown.iter("tr")} == {
        "default timetable": repr(ddim.table())
    }
    assert alpha_bar_curve(ddim.schedule.alphas_cumprod, ddim.table().t) in ddim._repr_html_()
    about = Metadata(ddim.model.config, ScheduleConfig(), ddim.sampler, {"family": "<b>&amp;", "weights": "\"'"})
    shown = ElementTree.fromstring(dataclasses.replace(ddim, metadata=about)._repr_html_())
    rows = {row.findtext("th"): row.findtext("td") for row in shown.iter("tr")}
    assert (rows["family"], rows["weights"], rows["SHA-256"]) == ("<b>&amp;", "\"'", about.sha256)
    astray = ddim.with_sampler(spacing="ddim299")  # of 300
    with pytest.raises(ValueError, match="no integer stride") as caught:
        astray.table()
    shown = ElementTree.fromstring(astray._repr_html_())
    assert shown.findtext(".//td") == str(caught.value)
