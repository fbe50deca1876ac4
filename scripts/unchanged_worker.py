"""One tree's half of scripts/unchanged.py: runs with that tree's jddim first on PYTHONPATH, and may be of another tree.

    unchanged_worker.py samples OUT.npz NAME=CHECKPOINT ...   what the checkpoints sample and invert, by setting
    unchanged_worker.py loops OUT.npz                         the loops around a denoiser in closed form, and tables
    unchanged_worker.py serve CHECKPOINT                      samples when told to by a line of JSON; answers in JSON

It uses what a rebuilt jddim keeps: `load`, `DDIM`'s methods, and public functions of the modules imported below. A
setting that raises ValueError is kept as refused, any other exception as broken.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jddim
from jddim import ddim as maths
from jddim import denoisers, editing, guidance, inversion, sampling, schedule, solvers, timesteps, timetables

S, NUM = 7, 3  # a prime, which divides no T; and few images, since what takes time is to compile
SPACINGS: dict[str, tuple[Any, int | None]] = {  # name -> spacing, steps
    **{name: (name, S) for name in timesteps.SPACINGS},
    **{name: (name, None) for name in ("ddim8", "2,3,2")},
    "of a list": ([999, 800, 601, 400, 201, 77, 0], None),
}
LIMITS: dict[str, dict[str, Any]] = {
    "": {},
    ", clip": {"clip_range": (-0.8, 0.9)},
    ", threshold": {"threshold": (0.9, 1.5)},
    ", clip, rederive_eps": {"clip_range": (-0.8, 0.9), "rederive_eps": True},
}
Setting = tuple[str, Callable[[], Any]]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def in_turn(settings: Iterator[Setting]) -> dict[str, np.ndarray]:
    """The arrays that each setting returns, by its name, numbered where there are several."""
    found: dict[str, np.ndarray] = {}
    for name, run in settings:
        assert name not in found, name
        print(f"at {name}", file=sys.stderr, flush=True)  # what a crash is seen to come after
        try:
            leaves = [np.asarray(x) for x in jax.tree.leaves(run())]
        except ValueError:
            leaves = [np.array("refused")]
        except Exception as error:
            leaves = [np.array(f"broken: {type(error).__name__}: {error}".splitlines()[0])]
        found |= {name if len(leaves) == 1 else f"{name} [{i}]": leaf for i, leaf in enumerate(leaves)}
    return found


# -- with the checkpoints' networks -----------------------------------------------------------------------------------


def of_checkpoint(name: str, path: str) -> Iterator[Setting]:
    ddim = jddim.load(path)
    labels = {} if name == "mnist-ddpm" else {"labels": np.array([0, 4, 9])}
    key = jax.random.key(7)
    shape = ddim.sample(key, NUM, steps=S, **labels).shape[1:]

    def sample(_of: Any = ddim, **options: Any) -> Any:
        options = {"key": key, "num": NUM, "steps": S, "spacing": "linspace", **labels, **options}
        conventions = options.pop("conventions", None)
        return (_of.with_sampler(**conventions) if conventions else _of).sample(**options)

    for text, options in with_labels() if labels else without_labels(shape, key):
        yield f"{name}: {text}", partial(sample, **options)
    images = np.tanh(normal(3, NUM, *shape))
    ways: list[dict[str, Any]] = [{"guidance_scale": 3.0, "batch_size": 2}]
    if not labels:
        yield f"{name}: bfloat16", lambda: sample(jddim.load(path, dtype=jnp.bfloat16))
        ways = [{"convention": c, "refine": r} for c in inversion.CONVENTIONS for r in (0, 1)]
        ways += [{"clip": True, "rederive_eps": True}, {"spacing": "trailing"}]
        for spacing, steps in itertools.product(timesteps.SPACINGS, (1, 2, S, 30, 100, 1000)):
            for to_one in (True, False):
                at = ddim.with_sampler(set_alpha_to_one=to_one)
                text = f"{name}: table of {spacing}, {steps} steps{'' if to_one else ', set_alpha_to_one False'}"
                yield text, partial(at.table, steps, spacing, np.float64)
    for way in ways:
        yield f"{name}: invert {way}", partial(ddim.invert, images, steps=S, **labels, **way)


def without_labels(shape: tuple[int, ...], key: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings, and for each its arguments of `sample`, with its `conventions`.

    Those that differ in numbers alone share a program, and cost little: eta, guidance, most spacings.
    """
    x_T, noise = normal(1, NUM, *shape), normal(2, S, NUM, *shape)
    yield "the checkpoint's own conventions", {"spacing": None}
    for text, (spacing, steps) in SPACINGS.items():
        yield f"spacing {text}, eta 0.5", {"spacing": spacing, "steps": steps, "eta": 0.5}
    for eta, clip in itertools.product((0, 0.5, 1), (False, True)):
        yield f"eta {eta}{', clip' if clip else ''}", {"eta": float(eta), "clip": clip}
    yield "an eta an image", {"eta": np.array([0, 0.5, 1])}
    yield "clip_range", {"clip": True, "clip_range": (-0.8, 0.9)}
    yield "clip, rederive_eps, eta 1", {"clip": True, "rederive_eps": True, "eta": 1.0}
    for largest in (1.0, 1.5):
        yield f"threshold to {largest}", {"conventions": {"threshold_ratio": 0.9, "threshold_max": largest}}
    yield "leading, steps_offset 1", {"spacing": "leading", "conventions": {"steps_offset": 1}}
    for spacing in ("leading", "trailing", "linspace_diffusers"):
        yield f"{spacing}, set_alpha_to_one False", {"spacing": spacing, "conventions": {"set_alpha_to_one": False}}
    for variance in ("fixed_small", "fixed_large"):
        yield f"ddpm {variance}", {"method": "ddpm", "conventions": {"variance": variance}}
    for method in solvers.SOLVERS:
        yield f"method {method}, clip", {"method": method, "clip": True}
    yield "trajectory, eta 1", {"trajectory_every": 3, "eta": 1.0}
    yield "x_T, no key", {"x_T": x_T, "key": None, "eta": 0.0}
    yield "x_T and noise, eta 1", {"x_T": x_T, "noise": noise, "key": None, "eta": 1.0}
    yield "noise of too few steps", {"noise": noise[1:], "eta": 1.0}
    yield "batches of 2, eta 1", {"batch_size": 2, "eta": 1.0}
    yield "start 5, eta 1", {"start": 5, "eta": 1.0}
    yield "a key an image, eta 1", {"key": sampling.sample_keys(key, NUM, 11), "eta": 1.0}
    yield "in segments, eta 1", {"progress": True, "eta": 1.0}
    yield "another size", {"image_size": (20, 12)}


def with_labels() -> Iterator[tuple[str, dict[str, Any]]]:
    for eta in (0, 1):
        yield f"spacing of the checkpoint, eta {eta}", {"spacing": None, "eta": float(eta)}
    yield "no labels", {"labels": None}
    for scale, eta in itertools.product((0, 1, 3), (0, 1)):
        yield f"guidance {scale}, eta {eta}", {"guidance_scale": float(scale), "eta": float(eta)}
    yield "guidance 3, null_label 9, start 5", {"guidance_scale": 3.0, "null_label": 9, "start": 5}
    yield "a guidance an image", {"guidance_scale": np.array([0, 1, 3.0])}
    yield "guidance 3, dpm++2m, trajectory", {"guidance_scale": 3.0, "method": "dpm++2m", "trajectory_every": 2}
    yield "guidance 3, ddpm, batches of 2", {"guidance_scale": 3.0, "method": "ddpm", "batch_size": 2}


# -- with a denoiser in closed form, in float32 or, with JAX_ENABLE_X64, in float64 -----------------------------------

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
# Of alpha, sigma and sigma^2: each is rounded once, as in neither tree's favour.
COLUMNS = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR), 1 - ALPHA_BAR


def denoiser(kind: str = "epsilon", mean: float = 0.9, variance: float = 0.04) -> Callable[..., Any]:
    """What predicts x0, eps or v best for pixels that are normal around -mean or mean, a little mixed."""

    def denoise(x: Any, t: Any, x0_hat: Any = 0.0) -> Any:
        alpha, sigma, noise = (jnp.asarray(column, x.dtype)[t][:, None, None, None] for column in COLUMNS)
        x = 0.9 * x + 0.1 * jnp.roll(x, 1, 1) + 0.05 * x0_hat
        total = alpha**2 * variance + noise
        centre = mean * jnp.tanh(alpha * mean * x / total)
        x0 = centre + alpha * variance / total * (x - alpha * centre)
        eps = sigma * (x - alpha * centre) / total
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]

    return denoise


# How a table's few numbers are rounded decides a loop's error: one table says little, several together say more.
TIMETABLES = [
    timesteps.linspace_timesteps(1000, S),
    *(np.array([999, *np.sort(np.random.default_rng(i).choice(998, S - 1, False))[::-1]]) for i in range(4)),
]


def of_loops(t: np.ndarray) -> Iterator[Setting]:
    """Those whose names end in "(float32)" draw from keys, or are of tables: not for comparison with float64."""
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    shape = (64, 8, 8, 1)
    linear = schedule.linear_schedule()
    table, exact = maths.step_table(linear, t, dtype), maths.step_table(linear, t, np.float64)
    x, noise, rows = (jnp.asarray(normal(seed, *s), dtype) for seed, s in ((1, shape), (2, (S, *shape)), (3, shape)))
    images, keep, key = jnp.tanh(rows), jnp.asarray(np.arange(8) < 4, dtype)[:, None, None], jax.random.key(7)
    eps, other = denoiser(), denoiser(mean=0.5)

    def jitted(
        loop: Callable[..., Any], start: Any = x, noise: Any = noise, table: Any = table, **options: Any
    ) -> Callable[[], Any]:
        """The loop as one program of start, noise and table, so that XLA computes nothing of it beforehand."""
        given = {"start": start, "noise": noise, "table": table if loop in (sample, ancestral) else None}
        given = {name: value for name, value in given.items() if value is not None}
        return lambda: jax.jit(lambda given: loop(**given, **options))(given)

    def sample(start: Any, table: Any, denoise: Any = eps, **options: Any) -> Any:
        return sampling.sample_loop(denoise, start, table, **options)

    def ancestral(start: Any, table: Any, denoise: Any = eps, **options: Any) -> Any:
        return sampling.ancestral_loop(denoise, start, table, **options)

    def invert(start: Any, **options: Any) -> Any:
        return inversion.invert_loop(eps, start, table, **options)

    def inpaint(start: Any, **options: Any) -> Any:
        return editing.inpaint_loop(eps, start, table, images, keep, **options)

    def solve(start: Any, **options: Any) -> Any:
        return solvers.solver_loop(eps, start, exact, **options)

    def kept(start: Any, noise: Any) -> Any:
        update = editing.keep_known(sampling.ancestral_update(), images, keep, start)
        return sampling.update_loop(eps, update, start, table, noise=noise)

    for eta, (text, limits) in itertools.product((0, 0.5, 1), LIMITS.items()):
        yield f"ddim, eta {eta}{text}", jitted(sample, eta=float(eta), **limits)
    for kind in ("sample", "v_prediction"):
        options: dict[str, Any] = {"denoise": denoiser(kind), "prediction_type": kind, "clip_range": (-1.0, 1.0)}
        yield f"ddim, {kind}, eta 0.5", jitted(sample, eta=0.5, **options)
        yield f"ddpm, {kind}", jitted(ancestral, **options)
    yield "ddim, an eta an image", jitted(sample, eta=jnp.linspace(0, 1, 64, dtype=dtype))
    yield "ddim, trajectory", jitted(sample, eta=1.0, trajectory_every=3)
    yield "ddim, self-conditioned", jitted(sample, self_condition=True)
    yield (
        "ddim, its gradient",
        lambda: jax.jit(jax.grad(lambda x: (sample(x, table, noise=noise, eta=0.5) ** 2).sum()))(x),
    )
    for text, (spacing, steps) in SPACINGS.items():
        at = timesteps.make_timesteps(spacing, 1000, steps)
        ends = timesteps.previous_timesteps(at, spacing, 1000)
        yield f"timesteps {text} (float32)", lambda at=at, ends=ends: (at, ends)
        rows_of = maths.step_table(linear, at, dtype, timesteps_prev=ends, set_alpha_to_one=False)
        yield f"ddim, spacing {text}", jitted(sample, noise=None, table=rows_of)
    for variance, limit in itertools.product(("fixed_small", "fixed_large"), (None, (-1.0, 1.0))):
        yield f"ddpm, {variance}{', clip' if limit else ''}", jitted(ancestral, variance=variance, clip_range=limit)
    learned = {"denoise": lambda x, t: jnp.concatenate([eps(x, t), jnp.tanh(x)], -1), "variance": "learned_range"}
    yield "ddpm, learned_range", jitted(ancestral, **learned)
    for name, solver in solvers.SOLVERS.items():
        given = {"schedule": linear} if getattr(solver, "asks_between", False) else {}  # not of an older commit's
        for text, limits in list(LIMITS.items())[: 3 if solver.history == "x0" else 1]:
            yield (
                f"{name}, a solver{text}",
                jitted(solve, noise=noise if solver.stochastic else None, solver=name, **given, **limits),
            )
    for convention, refine in itertools.product(inversion.CONVENTIONS, (0, 1, 3)):
        options = {"convention": convention, "refine": refine}
        yield f"invert, {convention}, refine {refine}", jitted(invert, images, None, **options)
    yield "invert, clip, rederive_eps", jitted(invert, images, None, refine=1, **LIMITS[", clip, rederive_eps"])
    yield "inpaint", jitted(inpaint, noise=None)
    yield "inpaint, eta 1, clip", jitted(inpaint, eta=1.0, clip_range=(-1.0, 1.0))
    drawn = jnp.asarray(normal(5, editing.repaint_table(table, 2, 2).num_steps, 2, *shape), dtype)
    yield "inpaint, resample 2", jitted(inpaint, noise=drawn, eta=0.5, resample=2, jump_length=2)
    yield "ddpm that keeps what is known", jitted(kept)
    rest = editing.tail(table, 0.6)
    noised = float(COLUMNS[0][rest.t[0]]) * images + float(COLUMNS[1][rest.t[0]]) * noise[0]
    yield "image to image", jitted(sample, noised, None, table=rest)
    yield "slerp_line", lambda: editing.slerp_line(x[0], x[1], 5)
    yield "slerp_grid", lambda: editing.slerp_grid(x[:4].reshape(2, 2, *shape[1:]), 3, 4)
    pair = guidance.pair(eps, other)
    for name, guide in (("classifier_free", guidance.classifier_free), ("projected", guidance.projected)):
        for rescale in (0.0, 0.7):
            yield f"{name}, rescale {rescale}", jitted(sample, denoise=guide(pair, 3.0, rescale=rescale), eta=1.0)
    plus = partial(guidance.cfg_plus_plus_loop, table=table, scale=0.6, eta=0.5)
    yield "cfg_plus_plus", jitted(lambda start, noise: plus(pair, start, noise=noise))
    guided = guidance.classifier_guided(eps, lambda x, t: 0.3 - x, linear, clip_range=(-1.0, 1.0))
    yield "classifier_guided", jitted(sample, denoise=guided)
    yield "without_variance", jitted(sample, denoise=denoisers.without_variance(learned["denoise"]), eta=1.0)
    yield "keys and x_T (float32)", lambda: sampling.initial_noise(sampling.sample_keys(key, NUM, 5), (4, 3, 2))
    yield "ddim, from a key (float32)", jitted(sample, noise=None, key=key, eta=1.0)
    yield "ddpm, from a key (float32)", jitted(ancestral, noise=None, key=key)
    for name, make in schedule.SCHEDULES.items():
        yield f"schedule {name} (float32)", lambda make=make: make().alphas_cumprod
    yield "zero_terminal_snr (float32)", lambda: schedule.zero_terminal_snr(linear).alphas_cumprod
    yield "karras_timesteps (float32)", lambda: timetables.karras_timesteps(linear, S)
    short = schedule.linear_schedule(60)
    costs = timetables.elbo_costs(short, np.linspace(1, 9, 60))
    yield "search_timesteps (float32)", lambda: (costs, timetables.search_timesteps(costs, S))


# -- timed ------------------------------------------------------------------------------------------------------------


def serve(path: str) -> None:
    ddim = jddim.load(path)
    for line in itertools.chain(["{}"], iter(sys.stdin.readline, "")):
        options = json.loads(line)
        started = time.perf_counter()
        if options:
            jax.block_until_ready(ddim.sample(jax.random.key(0), **options))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}), flush=True)


if __name__ == "__main__":
    if not os.path.realpath(jddim.__file__).startswith(os.path.realpath(os.environ["PYTHONPATH"]) + os.sep):
        sys.exit("jddim is not the compared tree's")
    task, *args = sys.argv[1:]
    if task == "serve":
        serve(*args)
    elif task == "loops":
        found = [in_turn(of_loops(t)) for t in TIMETABLES]
        np.savez(args[0], **{name: np.stack([each[name] for each in found]) for name in found[0]})
    else:
        of_all = itertools.chain.from_iterable(of_checkpoint(*each.split("=", 1)) for each in args[1:])
        np.savez(args[0], **in_turn(of_all))
