"""Guidance against closed forms: classes that are Gaussians, whose every score is known, and the sources' formulas."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, small_config

import jddim
from jddim import guidance
from jddim.config import SamplerConfig
from jddim.ddim import per_sample, step_table
from jddim.denoisers import with_labels
from jddim.run.programs import only_in_interval
from jddim.sampling import ancestral_loop, sample_loop
from jddim.schedule import linear_schedule
from jddim.timesteps import linspace_timesteps

pytestmark = pytest.mark.unoptimised

T, S, SHAPE = 200, 13, (3, 5, 2)
SCHEDULE = linear_schedule(T, 5e-4, 0.1)  # alpha_bar_T = 3e-5: x_T is noise alone
TABLE = step_table(SCHEDULE, linspace_timesteps(T, S))
KEY = jax.random.key(4)
LABELS = jnp.array([0, 2, 1, 2])
MEANS = jax.random.normal(jax.random.key(1), (3, *SHAPE))  # of class y; variance 0.3^2, weights 0.2, 0.5, 0.3
WEIGHTS = jnp.array([0.2, 0.5, 0.3])
VARIANCE = 0.09


def spread(t):
    """(alpha_bar_t, variance of x_t within a class), one per sample."""
    a = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)[t]
    return a, a * VARIANCE + 1 - a


def logits(x_t, t):
    """log p(y | x_t) up to a constant, exactly: the best of all classifiers."""
    a, v = spread(t)
    distance = x_t[:, None] - jnp.sqrt(a)[:, None, None, None, None] * MEANS
    return jnp.log(WEIGHTS) - (distance**2).sum((2, 3, 4)) / (2 * v[:, None])


def denoise_class(x_t, t, labels):
    """The perfect eps of a class: -sqrt(1 - alpha_bar) times the score of N(sqrt(alpha_bar) mean, v)."""
    a, v = (per_sample(value, x_t) for value in spread(t))
    return jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * MEANS[labels]) / v


def denoise_any(x_t, t):
    """The perfect eps of the mixture."""
    weights = jax.nn.softmax(logits(x_t, t))
    every = jnp.stack([denoise_class(x_t, t, jnp.full(len(x_t), y)) for y in range(3)], axis=1)
    return jnp.einsum("by,byhwc->bhwc", weights, every)


CONDITIONAL = with_labels(denoise_class, LABELS)
PAIR = guidance.pair(CONDITIONAL, denoise_any)


def start(num: int = len(LABELS)):
    return jax.random.normal(jax.random.key(2), (num, *SHAPE))


def noisy(t: int):
    """x_t of these classes at one t, and t for each."""
    a = SCHEDULE.alphas_cumprod[t]
    return np.sqrt(a).astype(np.float32) * MEANS[LABELS] + np.sqrt(1 - a).astype(np.float32) * start(), jnp.full(4, t)


@pytest.mark.parametrize("guide", [guidance.classifier_free, partial(guidance.classifier_free, rescale=0.7)])
def test_scale_1_is_the_conditional_model_and_0_the_unconditional(guide) -> None:
    x_t, t = noisy(90)
    chex.assert_trees_all_close(guide(PAIR, 1.0)(x_t, t), CONDITIONAL(x_t, t), rtol=1e-6)
    if guide is guidance.classifier_free:  # to the bit
        chex.assert_trees_all_equal(guide(PAIR, 1.0)(x_t, t), CONDITIONAL(x_t, t))
        chex.assert_trees_all_equal(guide(PAIR, 0.0)(x_t, t), denoise_any(x_t, t))


@pytest.mark.parametrize("t", [3, 90, 199])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_perfect_classifiers_gradient_is_classifier_free_guidance(t: int, scale: float) -> None:
    # Bayes: grad log p(y | x) = grad log p(x | y) - grad log p(x), so both guidances are one line.
    x_t, t = noisy(t)
    cond_fn = guidance.label_gradient(logits, LABELS, scale)
    by_classifier = guidance.classifier_guided(denoise_any, cond_fn, SCHEDULE)(x_t, t)
    by_pair = guidance.classifier_free(PAIR, scale)(x_t, t)
    # float32; the logits are sums of 30 squares divided by v, up to 1e3 before the softmax
    chex.assert_trees_all_close(by_classifier, by_pair, atol=2e-4, rtol=2e-4)


def test_classifier_guidance_brings_the_asked_class() -> None:
    num = 64
    labels = jnp.arange(num) % 3
    cond_fn = guidance.label_gradient(logits, labels)
    denoise = guidance.classifier_guided(denoise_any, cond_fn, SCHEDULE)
    table = step_table(SCHEDULE, linspace_timesteps(T, 50))
    x_0 = jax.jit(lambda x_T: sample_loop(denoise, x_T, table))(start(num))
    nearest = ((x_0[:, None] - MEANS) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == labels).all()
    unguided = jax.jit(lambda x_T: sample_loop(denoise_any, x_T, table))(start(num))
    nearest = ((unguided[:, None] - MEANS) ** 2).sum((2, 3, 4)).argmin(1)
    shares = np.bincount(nearest, minlength=3) / num
    assert np.abs(shares - WEIGHTS).max() < 0.2  # 3 standard deviations of a share of 64


@pytest.mark.parametrize("t", [40, 150])
def test_openais_condition_score(t: int) -> None:
    """Their order in float64: clip x0, the eps that implies, the gradient off it, x0 from that, not clipped again."""
    rng = np.random.default_rng(5)
    x_t, output, gradient = rng.standard_normal((3, 4, *SHAPE))
    a = SCHEDULE.alphas_cumprod[t]
    x0 = np.clip(np.sqrt(1 / a) * x_t - np.sqrt(1 / a - 1) * output, -1, 1)
    eps = (np.sqrt(1 / a) * x_t - x0) / np.sqrt(1 / a - 1) - np.sqrt(1 - a) * gradient
    guided = guidance.classifier_guided(
        lambda x, t: jnp.asarray(output, x.dtype),
        lambda x, t: jnp.asarray(gradient, x.dtype),
        SCHEDULE,
        clip_range=(-1, 1),
    )(jnp.asarray(x_t, jnp.float32), jnp.full(4, t))
    np.testing.assert_allclose(guided, eps, atol=3e-6 / np.sqrt(a), rtol=3e-6)  # x_t / sqrt(alpha_bar_t) cancels in eps


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_gives_back_the_conditional_deviation(phi: float) -> None:
    x_t, t = noisy(120)
    plain = np.asarray(guidance.classifier_free(PAIR, 4.0)(x_t, t), np.float64)
    conditional = np.asarray(CONDITIONAL(x_t, t), np.float64)
    axes = (1, 2, 3)
    ratio = conditional.std(axes, keepdims=True) / plain.std(axes, keepdims=True)
    expected = phi * plain * ratio + (1 - phi) * plain  # Eq. 15, 16
    np.testing.assert_allclose(guidance.classifier_free(PAIR, 4.0, rescale=phi)(x_t, t), expected, rtol=2e-5, atol=1e-6)


def test_projected_guidance_leaves_out_what_is_parallel() -> None:
    x_t, t = noisy(60)
    conditional, unconditional = (np.asarray(p, np.float64).reshape(4, -1) for p in PAIR(x_t, t))
    unit = conditional / np.linalg.norm(conditional, axis=1, keepdims=True)
    update = conditional - unconditional
    parallel = (update * unit).sum(1, keepdims=True) * unit
    for keep in (0.0, 0.3, 1.0):
        expected = conditional + 3 * (update - parallel + keep * parallel)
        actual = guidance.projected(PAIR, 4.0, rescale=0.0, keep_parallel=keep)(x_t, t)
        np.testing.assert_allclose(actual.reshape(4, -1), expected, rtol=2e-5, atol=1e-5)
    rescaled = guidance.projected(PAIR, 4.0, rescale=1.0)(x_t, t)
    chex.assert_trees_all_close(rescaled.std((1, 2, 3)), CONDITIONAL(x_t, t).std((1, 2, 3)), rtol=1e-5)
    chex.assert_trees_all_close(
        guidance.projected(PAIR, 4.0, keep_parallel=1.0, rescale=0.0)(x_t, t),
        guidance.classifier_free(PAIR, 4.0)(x_t, t),
        atol=1e-5,
    )


def test_a_scale_per_sample_and_by_t() -> None:
    x_t, t = noisy(90)
    scales = jnp.array([0.0, 1.0, 2.0, 7.5])
    together = guidance.classifier_free(PAIR, scales)(x_t, t)
    for i, scale in enumerate(scales):
        chex.assert_trees_all_equal(together[i], guidance.classifier_free(PAIR, scale)(x_t, t)[i])
    interval = guidance.classifier_free(PAIR, lambda t: jnp.where((t > 50) & (t < 120), 3.0, 1.0))
    chex.assert_trees_all_equal(interval(x_t, t), guidance.classifier_free(PAIR, 3.0)(x_t, t))
    x_t, t = noisy(20)
    chex.assert_trees_all_equal(interval(x_t, t), CONDITIONAL(x_t, t))


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("clip_range", [None, (-1.0, 1.0)])
def test_cfg_plus_plus(eta: float, clip_range) -> None:
    """Its step in float64 NumPy, at every step taken; and at scale 0 it is plain DDIM."""
    noise = jax.random.normal(KEY, (S, 4, *SHAPE))
    run = jax.jit(
        lambda x_T, scale: guidance.cfg_plus_plus_loop(
            PAIR, x_T, TABLE, scale=scale, eta=eta, noise=noise, clip_range=clip_range, trajectory_every=1
        )
    )
    x_0, way = run(start(), 0.6)
    x = np.asarray(start(), np.float64)
    for s in range(S):
        a, a_prev = (SCHEDULE.alpha_bar(np.array(c[s])) for c in (TABLE.t, TABLE.t_prev))
        t = jnp.full(4, TABLE.t[s])
        conditional, unconditional = (np.asarray(p, np.float64) for p in PAIR(jnp.asarray(x, jnp.float32), t))
        x0 = (x - np.sqrt(1 - a) * (0.4 * unconditional + 0.6 * conditional)) / np.sqrt(a)
        x0 = x0 if clip_range is None else np.clip(x0, *clip_range)
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        direction = np.sqrt(np.maximum(1 - a_prev - sigma**2, 0))
        x = np.sqrt(a_prev) * x0 + direction * unconditional + sigma * np.asarray(noise[s])
        np.testing.assert_allclose(way.x_t[s], x, atol=2e-5)  # float32, one step from where the loop was
        x = np.asarray(way.x_t[s], np.float64)
    plain = sample_loop(denoise_any, start(), TABLE, eta=eta, noise=noise, clip_range=clip_range)
    chex.assert_trees_all_close(run(start(), 0.0)[0], plain, atol=1e-5)


def test_one_call_for_both_labels() -> None:
    model = random_model(small_config(class_embedding="learned", num_classes=4))
    x_t = jax.random.normal(KEY, (3, 6, 10, 1))
    t, labels = jnp.array([7, 300, 999]), jnp.array([0, 2, 1])
    one = jax.jit(lambda model, labels: model(x_t, t, labels))
    conditional, unconditional = jax.jit(lambda model: guidance.label_pair(model, labels, 3)(x_t, t))(model)
    chex.assert_trees_all_close(conditional, one(model, labels), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(unconditional, one(model, jnp.full(3, 3)), rtol=1e-5, atol=1e-5)


def pipeline(**sampler) -> jddim.DDIM:
    config = small_config(class_embedding="learned", num_classes=4)
    return jddim.DDIM(random_model(config), SCHEDULE, SamplerConfig(num_steps=4, **sampler))


def test_sample_with_guidance() -> None:
    ddim, labels = pipeline(), [0, 2, 1]
    plain = ddim.sample(KEY, 3, labels=labels, eta=0.5)
    none = ddim.sample(KEY, 3, labels=[3, 3, 3], eta=0.5)
    sample = partial(ddim.sample, KEY, 3, labels=labels, eta=0.5, null_label=3)
    # The guided program has twice the batch, so other kernels: rounding, through four steps of a random network.
    chex.assert_trees_all_close(sample(guidance_scale=1.0), plain, atol=1e-3, rtol=1e-3)
    chex.assert_trees_all_close(sample(guidance_scale=0.0), none, atol=1e-3, rtol=1e-3)
    each = sample(guidance_scale=[0.0, 1.0, 2.0])
    chex.assert_trees_all_close(each[0], none[0], atol=1e-3, rtol=1e-3)
    chex.assert_trees_all_close(each[1], plain[1], atol=1e-3, rtol=1e-3)
    chex.assert_trees_all_equal(each[2], sample(guidance_scale=2.0)[2])
    assert np.abs(np.asarray(each[2] - plain[2])).max() > 0.01
    over = jax.vmap(lambda w: sample(guidance_scale=w))(jnp.array([0.0, 2.0]))
    chex.assert_trees_all_close(over[1], sample(guidance_scale=2.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "variance"),
    [
        *(("classifier-free", "fixed_small"), ("projected", "fixed_small"), ("cfg++", "fixed_small")),
        *(("classifier-free", "learned_range"), ("projected", "learned_range")),  # cfg++ is DDIM's
    ],
)
def test_guidance_in_an_interval(kind: str, variance: str) -> None:
    """As a scale that is 1 outside; there the network is asked once, but for cfg++, which needs both everywhere."""
    channels = 2 if variance == "learned_range" else 1
    config = small_config(class_embedding="learned", num_classes=4, out_channels=channels)
    ddim = jddim.DDIM(random_model(config), SCHEDULE, SamplerConfig(num_steps=5, variance=variance))
    method = "ddpm" if variance == "learned_range" else "ddim"
    sample = partial(ddim.sample, KEY, 3, labels=[0, 2, 1], null_label=3, method=method, guidance=kind)
    guided, plain = sample(guidance_scale=0.7), ddim.sample(KEY, 3, labels=[0, 2, 1], method=method)
    t = ddim.table().t
    some = sample(guidance_scale=0.7, guidance_interval=(t[3] - 0.5, t[1] + 0.5))
    # twice the batch is another program: rounding, through five steps of a random network
    close = partial(np.allclose, atol=1e-3, rtol=1e-3)
    assert not close(some, guided)
    assert not close(some, plain)
    everywhere = sample(guidance_scale=0.7, guidance_interval=(0, T))
    chex.assert_trees_all_close(everywhere, guided, atol=1e-3, rtol=1e-3)
    if kind != "cfg++":
        chex.assert_trees_all_close(sample(guidance_scale=0.7, guidance_interval=(T, T)), plain, atol=1e-3, rtol=1e-3)
    if method == "ddim" and kind == "classifier-free":
        pair = guidance.label_pair(ddim.model, jnp.array([0, 2, 1]), 3)

        def scale(of: jax.Array) -> jax.Array:
            return jnp.where((of >= t[3]) & (of <= t[1]), 0.7, 1.0)

        x_T = jddim.initial_noise(jddim.sample_keys(KEY, 3), some.shape[1:])
        by_hand = sample_loop(guidance.classifier_free(pair, scale), x_T, ddim.table(), clip_range=(-1.0, 1.0))
        chex.assert_trees_all_close(some, by_hand, atol=1e-3, rtol=1e-3)


def test_outside_its_interval_guidance_asks_once() -> None:
    asked = only_in_interval(lambda x_t, t: x_t * 2, lambda x_t, t: x_t, (jnp.asarray(50.0), jnp.asarray(90.0)))
    x_t = start()
    for t, times in ((49, 1), (50, 2), (90, 2), (91, 1)):
        chex.assert_trees_all_equal(jax.jit(asked)(x_t, jnp.full(4, t)), x_t * times)


def test_what_guidance_refuses() -> None:
    ddim = pipeline()
    with pytest.raises(
        ValueError, match=r"needs null_label, the one of 0\.\.3 that meant no label in training; got None"
    ):
        ddim.sample(KEY, 2, labels=[0, 1], guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"got 4; guidance_scale must be a scalar or one value per image \(2,\)"):
        ddim.sample(KEY, 2, labels=[0, 1], guidance_scale=[1.0, 2.0, 3.0], null_label=4)
    with pytest.raises(ValueError, match="guidance_scale must be finite"):
        ddim.sample(KEY, 2, labels=[0, 1], guidance_scale=np.inf, null_label=3)
    with pytest.raises(ValueError, match="null_label is for guidance"):
        ddim.sample(KEY, 2, labels=[0, 1], null_label=3)
    with pytest.raises(ValueError, match="class-conditional"):
        ddim.sample(KEY, 2, guidance_scale=2.0, null_label=3)
    plain = jddim.DDIM(random_model(small_config()), SCHEDULE, SamplerConfig(num_steps=4))
    with pytest.raises(ValueError, match="guidance_scale needs a network with learned class labels; this one has none"):
        plain.sample(KEY, 2, guidance_scale=2.0, null_label=3)
    learned = jddim.DDIM(
        random_model(small_config(class_embedding="learned", num_classes=4, out_channels=2)),
        SCHEDULE,
        SamplerConfig(num_steps=4, variance="learned_range"),
    )
    assert learned.sample(KEY, 2, labels=[0, 1], guidance_scale=2.0, null_label=3).shape == (2, 6, 10, 1)
    for channels in (0, 2):
        with pytest.raises(ValueError, match=r"guidance_channels must lie in 1\.\.1, x_t's channels, got"):
            ddim.sample(KEY, 2, labels=[0, 1], guidance_scale=2.0, null_label=3, guidance_channels=channels)
    with pytest.raises(ValueError, match="guidance_channels is for guidance"):
        ddim.sample(KEY, 2, labels=[0, 1], guidance_channels=1)


@pytest.mark.parametrize("kind", ["classifier-free", "projected"])
def test_guidance_of_some_channels_leaves_the_rest_conditional(kind: str) -> None:
    """And, with a learned variance, that of all of them leaves the variance so (facebookresearch's DiT)."""
    guide = {"classifier-free": guidance.classifier_free, "projected": guidance.projected}[kind]
    conditional, unconditional = np.random.default_rng(1).standard_normal((2, 3, 5, 7, 6), np.float32)
    pair, x_t, t = lambda x_t, t: (conditional, unconditional), start(), jnp.zeros(3, jnp.int32)
    for channels, of in ((1, 1), (None, 3), (6, 6)):
        guided = guidance.on_channels(pair, lambda pair: guide(pair, 2.5), channels)(x_t, t)
        both = conditional[..., :of], unconditional[..., :of]
        alone = guide(lambda x_t, t, both=both: both, 2.5)(x_t, t)
        np.testing.assert_array_equal(guided[..., :of], alone)
        np.testing.assert_array_equal(guided[..., of:], conditional[..., of:])


def test_cfg_plus_plus_is_of_all_channels() -> None:
    model = random_model(small_config(class_embedding="learned", num_classes=4, in_channels=2, out_channels=2))
    ddim = jddim.DDIM(model, SCHEDULE, SamplerConfig(num_steps=4, guidance_channels=1))
    options = {"labels": [0, 1], "guidance_scale": 0.5, "null_label": 3, "guidance": "cfg++"}
    with pytest.raises(
        ValueError, match=r"changes all channels, this checkpoint's 1 alone: give guidance_channels 2 too"
    ):
        ddim.sample(KEY, 2, **options)
    assert ddim.sample(KEY, 2, **options, guidance_channels=2).shape == (2, 6, 10, 2)


@pytest.mark.parametrize("kind", ["rescaled", "projected", "classifier"])
def test_wrapped_denoisers_work_under_every_transformation(kind: str) -> None:
    x_T = start()
    denoise = {
        "rescaled": guidance.classifier_free(PAIR, 2.0, rescale=0.5),
        "projected": guidance.projected(PAIR, 2.0),
        "classifier": guidance.classifier_guided(denoise_any, guidance.label_gradient(logits, LABELS, 2.0), SCHEDULE),
    }[kind]

    @jax.jit
    def all_of_them(x_T):
        def run(x):
            return sample_loop(denoise, x, TABLE)

        noisy = sample_loop(denoise, x_T, TABLE, eta=0.5, key=KEY)
        ancestral = ancestral_loop(denoise, x_T, TABLE, key=KEY)
        both = jax.vmap(run)(jnp.stack([x_T, -x_T]))
        return noisy, ancestral, jax.grad(lambda x: run(x).sum())(x_T), both[0], run(x_T)

    made = all_of_them(x_T)
    chex.assert_tree_all_finite(made)
    chex.assert_trees_all_close(made[3], made[4], atol=1e-4)
