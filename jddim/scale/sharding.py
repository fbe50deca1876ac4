"""Sampling on many devices: a mesh with a data and a model axis, and which parameter lies where by a table of rules.

Along "data" each device samples images of its own and none hears of another: the loop is the one of one device, on its
part of the batch (`jax.shard_map`), so there is no communication, and image i is the same to the bit however many
devices there are, if each has as many images at a time. Along "model" the devices share every image: parameters are cut
by the rules, XLA cuts the products and sends what is needed, and images are the same up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jddim.models import Network
from jddim.models.layers import at_least_float32
from jddim.pipeline import DDIM
from jddim.run.batches import run as run_plan
from jddim.run.compiling import compiler_options, faster, kind_of
from jddim.run.plan import Images, Inputs, as_key, labels_of, one_each, plan
from jddim.run.problems import condition_problems, decode_problems, label_problems, latent_problems
from jddim.run.programs import by_parts, check_decoded, decode
from jddim.run.request import Request, RequestError, check_names, taken_by

Rules = Sequence[tuple[str, P]]
"""(regular expression, spec) pairs. A parameter's dotted path takes the first that is found in it; the spec is of the
last axes, so `P("model")` cuts output channels of convolutions and linear layers alike. No rule: that is an error.
"""

REPLICATED: Rules = (("", P()),)
"""Every parameter whole on every device: data parallelism."""

CHANNELS: Rules = ((r"^(conv_out|final_conv)\.", P()), (r"\.kernel$", P("model")), ("", P()))
"""Kernels cut by output channel, but the last, of 1 or 3 channels; all that is small is whole on every device."""

TRANSFORMER: Rules = (
    (r"\.(attention\.[qkv]|mlp\.linear_1)\.(kernel|bias)$", P("model")),
    (r"\.(attention\.out|mlp\.linear_2)\.kernel$", P("model", None)),
    ("", P()),
)
"""DiT's attention cut by heads and its MLPs by their inner channels, in and out, so that each is summed once over the
devices (Megatron-LM's way, arXiv:1909.08053). The devices' number has to divide the number of heads.
"""


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices, axes "data" and "model"; data: as many as there are, by default.

    Raises ValueError if there are not so many devices.
    """
    given = list(jax.devices() if devices is None else devices)
    data = len(given) // model if data is None else data
    if data < 1 or model < 1 or data * model > len(given):
        raise ValueError(f"a mesh of {data} x {model} needs {max(data, 1) * model} devices, there are {len(given)}")
    return Mesh(np.array(given[: data * model]).reshape(data, model), ("data", "model"))


def param_shardings(model: Network, mesh: Mesh, rules: Rules = REPLICATED) -> Network:
    """Where each leaf of `model` lies, as a tree like it of `NamedSharding`. The model may be abstract.

    Raises one ValueError that names every parameter that no rule is for, or that its rule does not fit.
    """
    problems: list[str] = []

    def place(path: Any, leaf: Any) -> NamedSharding:
        name, shape = ".".join(map(str, path)), leaf.shape
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            problems.append(f"no rule is for {name}")
            return NamedSharding(mesh, P())
        if len(spec) > len(shape):
            problems.append(f"{name} {shape} has fewer axes than its rule {spec}")
            return NamedSharding(mesh, P())
        full = P(*(None,) * (len(shape) - len(spec)), *spec) if len(spec) else P()
        for length, axes in zip(shape, full, strict=bool(len(spec))):
            names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            if unknown := [axis for axis in names if axis not in mesh.shape]:
                problems.append(f"{name}: the mesh has axes {', '.join(mesh.shape)}, not {', '.join(unknown)}")
                return NamedSharding(mesh, P())
            if length % (parts := int(np.prod([mesh.shape[axis] for axis in names]))):
                problems.append(f"{name} {shape}: {length} cannot be cut into {parts} by its rule {spec}")
        return NamedSharding(mesh, full)

    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    placed = {path: variable.replace(place(path, variable.get_value())) for path, variable in flat.items()}
    if problems:
        raise ValueError(f"{len(problems)} parameters cannot be placed: " + "; ".join(problems[:8]))
    shardings: Network = nnx.merge(graph, nnx.from_flat_state(placed))
    return shardings


class Sharded:
    """A `DDIM` on a mesh: `Sharded(ddim, make_mesh()).sample(jax.random.key(0), 512, steps=50)`.

    rules: where parameters lie. They are put there once; `ddim` stays as it was.
    """

    def __init__(self, ddim: DDIM, mesh: Mesh, rules: Rules = REPLICATED):
        self.mesh = mesh
        self.ddim = dataclasses.replace(
            ddim, model=jax.device_put(ddim.model, param_shardings(ddim.model, mesh, rules)), autoencoder=None
        )
        self._stage = functools.cache(lambda device: decode.bound(jax.device_put(ddim.autoencoder, device)))
        self._stage_config = None if ddim.autoencoder is None else ddim.autoencoder.config
        self._program = functools.lru_cache(maxsize=16)(functools.partial(program, self.ddim, mesh, rules))

    def sample(
        self,
        key: Array | int,
        num: int,
        *,
        start: int = 0,
        labels: ArrayLike | str | None = None,
        condition: Images | None = None,
        **options: Any,
    ) -> Array:
        """Images start..start+num-1 of the seed, `(num, h, w, c)`, lying cut along "data". As `DDIM.sample`.

        num: a multiple of the mesh's data axis; each device makes as many, in one batch if batch_size does not say
        otherwise. options: fields of `Request`, as numbers, names and tuples; they are compiled in.
        Raises ValueError as it does, and FloatingPointError if a NaN or infinity appears.
        """
        if {"classifier", "classifier_scale"} & options.keys():
            raise ValueError("Sharded.sample: a classifier is not on the mesh: take DDIM.sample")
        known = ["batch_size", *(o.name for o in taken_by("sample") if o.name not in ARRAYS)]
        check_names(options, known, "Sharded.sample")
        parts = self.mesh.shape["data"]
        batch_size = options.pop("batch_size", None)
        firsts = [start + i * (num // parts) for i in range(parts)]
        held, text = (None, labels) if isinstance(labels, str) else (labels, None)
        request = Request(labels=text, **options)
        return self.sample_request(request, key, firsts, num // parts, num, held, condition, batch_size)

    def sample_request(
        self,
        request: Request,
        key: Array | int,
        firsts: Sequence[int],
        size: int,
        num: int | None = None,
        labels: ArrayLike | None = None,
        condition: Images | None = None,
        batch_size: int | None = None,
    ) -> Array:
        """Images f..f+size-1 of the seed for each f of `firsts`, one of which each device of the data axis takes.

        `(len(firsts) * size, h, w, c)`, in this order, and labels and condition likewise, or labels as the request
        says. num: how many are asked for, to be refused where the devices do not share them out. As `sample` otherwise.
        """
        num = len(firsts) * size if num is None else num
        if labels is None:
            labels, problems = labels_of(self.ddim, request, np.concatenate([np.arange(f, f + size) for f in firsts]))
            if problems:
                raise RequestError(problems, "sample")
        config, (held, problems) = self.ddim.model.config, one_each(labels, num)
        asked = dataclasses.replace(request, labels=None, seed=0, start=0)
        if (stage := self._stage_config) is not None:
            asked = dataclasses.replace(asked, latents=None, decode_batch=None)
            if request.decode_batch is not None:
                problems = problems + decode_problems(request.decode_batch)
            if request.image_size is not None:
                problems = problems + latent_problems(stage, config, request.image_size)
                asked = dataclasses.replace(asked, image_size=stage.latent_size(request.image_size))
        shape = (num, *(asked.image_size or config.image_size))
        problems = problems or label_problems(config, held, num)
        problems += condition_problems(config, condition, shape, at_least_float32(self.ddim.model.dtype))
        if problems:
            raise RequestError(problems, "sample")
        rows, beside = (None if x is None else jnp.asarray(x) for x in (held, condition))
        run = self._program(num, rows is not None, asked, batch_size, beside is not None)
        images: Array = run(self.ddim.model, as_key(key), jnp.asarray(firsts, jnp.uint32), rows, beside)
        bad = ~jnp.isfinite(images).reshape(num, -1).all(axis=1)
        if bad.any():
            part, place = divmod(int(jnp.argmax(bad)), num // len(firsts))
            raise FloatingPointError(
                f"a NaN or infinity appeared in image {firsts[part] + place}, in {int(bad.sum())} of {num}; "
                "DDIM.sample says at which step"
            )
        if stage is None or request.latents:
            return images
        images = self._decoded(images, request.decode_batch or 1)
        check_decoded(images, np.concatenate([np.arange(f, f + size) for f in firsts]))
        return images

    def _decoded(self, z: Array, size: int) -> Array:
        """Images of latents, those of each device decoded there, by the program that a device alone has."""
        pieces = [by_parts(self._stage(shard.device), shard.data, size) for shard in z.addressable_shards]
        shape = (z.shape[0], *pieces[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self.mesh, P("data")), pieces)


ARRAYS = ("labels", "start", "seed", "dtype")
"""Fields of `Request` that a sharded program is given as arrays, or with its weights."""


def program(
    ddim: DDIM,
    mesh: Mesh,
    rules: Rules,
    num: int,
    labelled: bool = False,
    request: Request | None = None,
    batch_size: int | None = None,
    conditioned: bool = False,
) -> jax.stages.Wrapped:
    """`run(model, key, firsts, labels, condition)`, jitted: `num` images on the mesh, whose devices need not be there.

    firsts: uint32, the number of each data part's first image; labels: `(num,)`, or None if not labelled; condition:
    one an image, or None if not conditioned. The model lies as `param_shardings` says; all others but the key are cut
    along "data". Raises ValueError for what cannot be.
    """
    parts = mesh.shape["data"]
    if num < 1 or num % parts:
        raise ValueError(f"sample: num must be a multiple of {parts}, the data axis, got {num}")
    data, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    kind = kind_of(mesh.devices.flat[0])
    # Beside another axis than "data" a model stays as it is: how to cut cuDNN's attention there, XLA does not know.
    plain = mesh.size > parts and kind.platform != "cpu"
    asked, size = request or Request(), num // parts

    def part(model: Any, key: Array, first: Array, labels: Array | None, condition: Array | None) -> Array:
        own: Any = dataclasses.replace(ddim, model=model if plain else faster(model, kind))
        numbers = first[0] + jnp.arange(size, dtype=jnp.uint32)
        inputs = Inputs(key, numbers=numbers, labels=labels, condition=condition)
        return run_plan(plan(own, asked, inputs, size, batch_size).check("sample"), batch_size=batch_size)[0]

    run = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data"), P("data")),
        out_specs=P("data"),
        axis_names={"data", *(axis for axis, size in mesh.shape.items() if size == 1)},  # left open, one is still cut
    )
    beside = (data if labelled else None, data if conditioned else None)
    places = (param_shardings(ddim.model, mesh, rules), whole, data, *beside)
    return jax.jit(
        run,
        in_shardings=places,
        out_shardings=data,
        compiler_options=compiler_options(kind),
    )


def lower(
    ddim: DDIM, mesh: Mesh, rules: Rules, num: int, request: Request | None = None, *, labelled: bool = False
) -> jax.stages.Lowered:
    """`program` lowered for shapes alone: nothing is computed, and the model may be abstract."""
    places = param_shardings(ddim.model, mesh, rules)
    model = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), ddim.model, places
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    firsts = jax.ShapeDtypeStruct((mesh.shape["data"],), jnp.uint32)
    labels = jax.ShapeDtypeStruct((num,), jnp.int32) if labelled else None
    return program(ddim, mesh, rules, num, labelled, request).lower(model, key, firsts, labels, None)
