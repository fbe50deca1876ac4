# %% [markdown]
# # From a PyTorch checkpoint to a sampler of your own
#
# Eight pieces of code, a minute on a CPU. Run it in a clone of jddim, with `pip install '.[convert-core]'` done (or
# `'.[convert]'`, to have the conversion verified against PyTorch).

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import jddim
from jddim import sampling

ROOT = next(path for path in [Path.cwd(), *Path.cwd().parents] if (path / "scripts" / "assets").is_dir())

# %% [markdown]
# ## The checkpoint
#
# A DDPM trained on MNIST in PyTorch, with 1000 steps. Its tensors are renamed into a Flax network, each exactly once.

# %%
folder = Path(tempfile.mkdtemp()) / "mnist"
source = ROOT / "scripts/assets/mnist-ddpm/ckpt.pth"
converted = jddim.convert(source, folder, verify=False, say=print)  # True needs torch

# %%
ddim = jddim.load(folder)
print(ddim.sampler)
print(ddim.table(steps=10, spacing="linspace").t)  # which of the 1000 timesteps are visited


# %% [markdown]
# ## Ten steps in place of a thousand

# %%
key = jax.random.key(0)
digits = ddim.sample(key, 8, steps=10, spacing="linspace", eta=0.0)
jddim.show(digits, columns=8)

# %% [markdown]
# ## The same step, by hand
#
# An update is a sampler's step: from the network's output at x_t, and the table's row, to x_prev. This is Eq. 12 of the
# DDIM paper at eta 0: the clean image that x_t and eps imply, noised again, less, by the same eps.


# %%
def ddim_by_hand(x_t, eps, noise, row):
    x0 = (x_t - row.sigma_t * eps) / row.alpha_t
    return row.alpha_prev * x0 + row.sigma_prev * eps, x0


table = ddim.table(steps=10, spacing="linspace")
x_T = jddim.initial_noise(jddim.sample_keys(key, 8), (28, 28, 1))


@jax.jit
def by_hand(model, x_T):  # the model is an argument: closed over, its weights would be constants of the program
    return sampling.update_loop(model, ddim_by_hand, x_T, table, deterministic=True)


print("largest difference:", float(jnp.abs(by_hand(ddim.model, x_T) - digits).max()))

# %% [markdown]
# ## One of your own
#
# Each step takes the predicted x0 for constant. Between steps it moves, so go on as it moved in the last step: in
# lambda = log(alpha / sigma), where the ODE is smooth. What a step hands to the next is its memory.


# %%
def extrapolated(x_t, eps, noise, row, memory):
    last_x0, last_h = memory
    x0 = (x_t - row.sigma_t * eps) / row.alpha_t
    h = jnp.log(row.alpha_prev / row.sigma_prev) - jnp.log(row.alpha_t / row.sigma_t)
    moved = jnp.where(jnp.isfinite(h), h / (2 * last_h), 0)  # the step to the clean image is left as it is
    ahead = x0 + moved * (x0 - last_x0)
    eps_ahead = (x_t - row.alpha_t * ahead) / row.sigma_t
    return row.alpha_prev * ahead + row.sigma_prev * eps_ahead, x0, (x0, h)


@jax.jit
def mine(model, x_T):
    nothing = (jnp.zeros_like(x_T), jnp.float32(jnp.inf))
    return sampling.update_loop(model, extrapolated, x_T, table, deterministic=True, memory=nothing)


x_0 = mine(ddim.model, x_T)
jddim.show(x_0, columns=8)

# %% [markdown]
# It has a name: DPM-Solver++(2M), which jddim has as a table of coefficients.

# %%
named = ddim.sample(x_T=x_T, steps=10, spacing="linspace", method="dpm++2m")
print("largest difference from dpm++2m:", float(jnp.abs(x_0 - named).max()))

# %% [markdown]
# ## Is it better?
#
# Where many steps lead from the same x_T is where the ODE leads. How far from there are ten?

# %%
many = ddim.sample(x_T=x_T, steps=50, spacing="linspace", eta=0.0)
for name, made in (("DDIM", digits), ("extrapolated", x_0)):
    print(f"{name}, 10 steps: root mean square {float(jnp.sqrt(jnp.mean((made - many) ** 2))):.3f} from 50 steps")
jddim.show(jnp.concatenate([digits, x_0, many]), columns=8)

# %% [markdown]
# On from here: [research.md](../research.md) has sweeps, guidance, editing, gradients and likelihoods on the same two
# contracts, a denoiser `denoise(x_t, t)` and an update.
