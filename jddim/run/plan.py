"""From a request to a run: `plan(ddim, request, inputs)` settles what sampling needs, and says what is wrong.

Every door runs a `Plan`: `DDIM.sample`, `edit` and `invert`, the command line, sets of images, the page, sharding and
export. A plan is made on the host; nothing is compiled or drawn before a `Part` of it begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.config import ClassifierConfig, SamplerConfig
from jddim.ddim import StepTable, add_noise, sampler_table
from jddim.editing import keep_of, repaint_table, tail
from jddim.guidance import schedule_columns
from jddim.inversion import CONVENTIONS, check_inversion
from jddim.models import Network
from jddim.models.autoencoder import Autoencoder
from jddim.models.classifier import Classifier
from jddim.models.layers import at_least_float32
from jddim.run import methods
from jddim.run.compiling import Bound, is_traced
from jddim.run.methods import Classified, Given, Guidance, Inversion, Kept, Method
from jddim.run.problems import (
    array_problems,
    as_numpy,
    batch_size_problems,
    classifier_problems,
    condition_problems,
    decode_problems,
    described,
    eta_problems,
    guidance_problems,
    key_problems,
    label_problems,
    latent_problems,
    mask_problems,
    network_problems,
    num_problems,
    pair_problems,
    range_problems,
    reuse_problems,
    sampler_problems,
    start_problems,
)
from jddim.run.programs import Program, by_parts, check_decoded, decode, draw_keys, draw_noise, encode, segment
from jddim.run.request import CFG_PLUS_PLUS, CLASSIFIER_FREE, Problems, Request, RequestError
from jddim.sampling import State, init_state, is_zero
from jddim.schedule import Schedule
from jddim.solvers import cast, churned_heun
from jddim.timesteps import openai_respacing
from jddim.timetables import whole_steps

Images = Array | np.ndarray


class Source(Protocol):
    """What a plan is made for: a `jddim.DDIM`."""

    @property
    def model(self) -> Network:
        """The network."""

    @property
    def schedule(self) -> Schedule:
        """What it was trained with."""

    @property
    def sampler(self) -> SamplerConfig:
        """Its source's conventions."""

    @property
    def null_label(self) -> int | None:
        """The label that meant none in training, if that is recorded."""

    @property
    def autoencoder(self) -> Autoencoder | None:
        """The first stage whose latents the network samples; None: it samples images."""

    @property
    def label_names(self) -> Mapping[str, int]:
        """The source's name of a class -> its label, if they are recorded."""


class Inputs(NamedTuple):
    """The arrays of a request, a pytree; all may be traced, each None where the request or the checkpoint says it.

    key: one, or one an image `(num,)`. numbers: which images of the key they are, `(num,)`, in place of start,
    start + 1, ... x_T: `(num, h, w, c)`. noise: `(S, num, h, w, c)`. labels: one an image. eta, guidance_scale: a
    scalar or `(num,)`. images: `(num, h, w, c)`, what is edited, by a strength or with a mask, else inverted.
    mask: `(h, w, 1)`, in [-1, 1], 1 where images are made anew. condition: beside x_t, `(num, h, w,
    condition_channels)`, or smaller by whole factors. classifier: a network; classifier_scale: a scalar or `(num,)`.
    """

    key: Array | int | None = None
    numbers: ArrayLike | None = None
    x_T: Images | None = None
    noise: Images | None = None
    labels: ArrayLike | None = None
    eta: ArrayLike | None = None
    guidance_scale: ArrayLike | None = None
    images: Images | None = None
    mask: Images | None = None
    condition: Images | None = None
    classifier: Classifier | None = None
    classifier_scale: ArrayLike | None = None


class Batch(NamedTuple):
    """Images low..low+taken-1 of a run, computed as `size` of them: the last batch too has the others' program."""

    low: int
    taken: int
    size: int

    def of(self, x: Images, axis: int = 0) -> Array:
        """Its part of `x`; its last sample repeated to make a full batch, whose copies are dropped afterwards."""
        rows = jnp.asarray(x[(slice(None),) * axis + (slice(self.low, self.low + self.taken),)])
        missing = self.size - self.taken
        if not missing:
            return rows
        return jnp.concatenate([rows, jnp.repeat(jnp.take(rows, jnp.array([-1]), axis), missing, axis)], axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A request, settled: what is compiled, what the scan runs over, and every array that goes in.

    sampler: the conventions used. table: the steps asked for; rows: what the scan runs over, as the method takes them.
    num: images, of `shape` (h, w, c) and `dtype`; with an autoencoder these are its latents, which it decodes, unless
        latents are asked for, decode_batch at a time; pastes: what a mask keeps is put back into the decoded images.
    prior_scale: the standard deviation of x_t where a run starts from noise; x_T is standard normal at every door.
    inputs: with defaults filled in, eta and guidance_scale `(num,)`.
    null_label, rescale, interval: of the guidance. problems: (field, sentence); with any, there is nothing to run.
    """

    model: Network
    program: Program
    sampler: SamplerConfig
    table: StepTable
    rows: Any
    limits: dict[str, tuple[Array, Array]]
    num: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    inputs: Inputs
    null_label: int | None
    rescale: float | None
    interval: tuple[float, float] | None
    problems: Problems
    schedule: Schedule
    autoencoder: Autoencoder | None = None
    decodes: bool = False
    decode_batch: int = 1
    pastes: bool = False
    prior_scale: float = 1.0

    def part(self, batch: Batch) -> Part:
        """The run of one batch."""
        return Part(self, batch)

    @functools.cached_property
    def run(self) -> Bound[State]:
        """The compiled segment with the model in it, which is flattened once."""
        return segment.bound(self.model)

    def images(self, z: Array) -> Array:
        """What the caller gets of the last x_t `(n, h, w, c)`: it, decoded where images are asked for of latents.

        Of inversion x_T, standard normal.
        """
        if isinstance(self.program.method, Inversion):
            return z if self.prior_scale == 1 else z / self.prior_scale
        if self.autoencoder is None or not self.decodes:
            return z
        return by_parts(self._decode, z, self.decode_batch)

    def noised(self, x_T: Array) -> Array:
        """The x_t where a run starts, of a standard normal x_T."""
        return x_T if self.prior_scale == 1 else x_T * self.prior_scale

    def pasted(self, made: Array, low: int) -> Array:
        """Images low, low + 1, ... of the run with what the mask keeps put back, where that is asked for."""
        if not self.pastes:
            return made
        assert self.inputs.images is not None
        assert self.inputs.mask is not None
        keep = jnp.asarray(keep_of(self.inputs.mask), made.dtype)
        known = jnp.asarray(self.inputs.images[low : low + len(made)], made.dtype)
        return keep * known + (1 - keep) * made

    def latents(self, images: Array) -> Array:
        """Images to edit or to invert as the network knows them: encoded by a first stage, or as they are."""
        return images if self.autoencoder is None else by_parts(self._encode, images, self.decode_batch)

    @property
    def mask(self) -> Images:
        """The mask of x_t: of latents, each is made anew as much as the pixel in its square that is so most."""
        mask: Any = self.inputs.mask
        if self.autoencoder is None:
            return mask  # type: ignore[no-any-return]
        f, (h, w) = self.autoencoder.config.size_factor, self.shape[:2]
        squares = mask.mean(axis=-1).reshape(h, f, w, f)
        return squares.max(axis=(1, 3))[..., None]  # type: ignore[no-any-return]

    @functools.cached_property
    def _decode(self) -> Bound[Array]:
        return decode.bound(self.autoencoder)

    @functools.cached_property
    def _encode(self) -> Bound[Array]:
        return encode.bound(self.autoencoder)

    @functools.cached_property
    def traced(self) -> bool:
        """Whether anything in it is, or a transformation of the caller's is under way."""
        return is_traced([*self.run.leaves, *jax.tree.leaves(self.inputs)])

    @property
    def scale(self) -> Images | None:
        """The guidance's, one an image; None: nothing is guided."""
        return self.inputs.guidance_scale  # type: ignore[return-value]  # a plan's is an array

    def guidance(self, scale: Array) -> Guidance:
        """The guidance at this scale, one an image."""
        rescale = None if self.rescale is None else jnp.asarray(self.rescale, self.dtype)
        interval = None if self.interval is None else (jnp.asarray(self.interval[0]), jnp.asarray(self.interval[1]))
        return Guidance(scale, jnp.asarray(self.null_label), rescale, interval)

    def deep(self, num: int) -> Array | None:
        """What the first step of `num` images finds of the network's deep half: zeros, or None where none is reused."""
        if self.program.reuse is None:
            return None
        config: Any = self.model.config
        asked = num if self.scale is None else 2 * num
        shape = config.deep_shape(self.shape[:2], self.program.reuse_blocks)
        return jnp.zeros((asked, *shape), self.model.dtype)

    def check(self, of: str) -> Plan:
        """Itself. Raises RequestError with everything that is wrong. of: the function that was called."""
        if self.problems:
            raise RequestError(self.problems, of)
        return self


class Part:
    """A batch of a plan on its way: `state = part.begin()`, then `part.advance(state, rows)` for each segment."""

    def __init__(self, plan: Plan, batch: Batch):
        self.plan, self.batch = plan, batch

    @functools.cached_property
    def keys(self) -> Array | None:
        """A key for each image; None where there is none."""
        key, numbers = as_key(self.plan.inputs.key), self.plan.inputs.numbers
        if key is None or key.ndim:
            return None if key is None else self.batch.of(key)
        return draw_keys(key, self.batch.of(jnp.asarray(numbers)))

    @functools.cached_property
    def x_T(self) -> Array:
        """The standard normal start, given or drawn."""
        plan = self.plan
        if plan.inputs.x_T is not None:
            return self.batch.of(plan.inputs.x_T)
        drawn: Array = draw_noise(self.keys, plan.shape, plan.dtype)
        return drawn

    @functools.cached_property
    def given(self) -> Given:
        """What each segment is given beside its state and rows, noise apart."""
        plan, inputs, batch = self.plan, self.plan.inputs, self.batch
        method, guidance, kept, classifier = plan.program.method, None, None, None
        # A method that eta makes deterministic draws all the same, so that every eta has one program.
        draws = inputs.noise is None and (method.takes_eta or method.stochastic or plan.program.resampled)
        keys = self.keys if self.keys is not None or not draws else draw_keys(jax.random.key(0), jnp.arange(batch.size))
        if inputs.guidance_scale is not None:
            guidance = plan.guidance(batch.of(inputs.guidance_scale))  # type: ignore[arg-type]
        if inputs.mask is not None:
            assert inputs.images is not None
            noise = None if plan.sampler.clean_known else self.x_T
            kept = Kept(plan.latents(batch.of(inputs.images)), jnp.asarray(keep_of(plan.mask)), noise)
        labels = None if inputs.labels is None else batch.of(inputs.labels)  # type: ignore[arg-type]
        if inputs.classifier is not None:
            assert labels is not None
            scale = batch.of(inputs.classifier_scale)  # type: ignore[arg-type]
            alpha, sigma = (jnp.asarray(column, plan.dtype) for column in schedule_columns(plan.schedule))
            classifier = Classified(inputs.classifier, labels, scale, alpha, sigma)
        return Given(
            batch.of(inputs.eta),  # type: ignore[arg-type]
            keys if draws else None,
            None,
            plan.limits,
            None if plan.model.config.class_embedding is None else labels,
            guidance,
            kept,
            None if inputs.condition is None else batch.of(inputs.condition),
            classifier,
        )

    def begin(self, trajectory_every: int | None = None) -> State:
        """The state before the first row. trajectory_every: with buffers for a trajectory."""
        plan, x = self.plan, self.plan.inputs.images
        if isinstance(plan.program.method, Inversion):
            x = plan.latents(self.batch.of(x))  # type: ignore[arg-type]
        elif x is not None and plan.inputs.mask is None:  # image to image: the images, noised to where the rows begin
            x = add_noise(plan.latents(self.batch.of(x)), self.x_T, plan.rows.alpha_t[0], plan.rows.sigma_t[0])
        else:
            x, kept = plan.noised(self.x_T), self.given.kept
            if kept is not None and kept.noise is None:
                x = kept.keep * kept.known + (1 - kept.keep) * x
        state = _fresh(x) if trajectory_every is None else init_state(x, plan.rows, trajectory_every)
        return state._replace(memory=plan.program.method.memory(plan.rows, x), deep=plan.deep(x.shape[0]))

    def images(self, x_0: Array) -> Array:
        """What the caller gets of the samples after the last row, without the copies that filled the batch up.

        Raises FloatingPointError if a decoder makes a NaN or infinity of one.
        """
        plan, batch = self.plan, self.batch
        made = plan.images(x_0[: batch.taken])
        if plan.decodes:
            check_decoded(made, plan.inputs.numbers[batch.low : batch.low + batch.taken])  # type: ignore[index]
        return plan.pasted(made, batch.low)

    def advance(self, state: State, rows: Any, trajectory_every: int | None = None) -> State:
        """The state after `rows`, all or a segment of the plan's. trajectory_every: as in `begin`."""
        given, noise = self.given, self.plan.inputs.noise
        if noise is not None:
            first = int(rows.step[0]) - int(self.plan.rows.step[0])
            axis = 2 if self.plan.program.resampled else 1
            given = given._replace(noise=self.batch.of(noise[first : first + rows.num_steps], axis))
        return self.plan.run(state, rows, given, program=self.plan.program, trajectory_every=trajectory_every)


def _fresh_state(x: Array) -> State:
    no_rows: Any = ()  # they are looked at for a trajectory alone
    return init_state(x, no_rows)


_fresh = jax.jit(_fresh_state)  # one small program, where each operation would be one


def plan(ddim: Source, request: Request, inputs: Inputs, num: int | None = None, batch_size: int | None = None) -> Plan:
    """What `request` and `inputs` ask of `ddim`, settled.

    num: images; None: as many as x_T, images, labels or conditions are, or 1.

    Raises RequestError at once where there is no table, for an unknown name; what else is wrong is in `problems`.
    """
    model, config = ddim.model, ddim.model.config
    dtype = np.dtype(at_least_float32(model.dtype))
    with _refusing(request, inputs):
        method = _method(request, inputs)
    key = as_key(inputs.key)
    inputs = inputs._replace(key=key)
    problems: Problems = _edit_problems(request, inputs, method, ddim.sampler)
    try:
        sampler = request.sampler(ddim.sampler)
    except RequestError as error:
        sampler, problems = ddim.sampler, problems + error.problems
    resampled = inputs.mask is not None and request.resample > 1
    with _refusing(request, inputs):
        spacing = spacing_of(request, sampler, ddim.schedule.most_steps)
        table = sampler_table(ddim.schedule, sampler, request.steps, np.float64, spacing)
        if isinstance(spacing, str):
            sampler = dataclasses.replace(sampler, spacing=spacing)
        if request.strength is not None:
            table = tail(table, request.strength)
        rows = method.rows(table, dtype, ddim.schedule)
        if resampled and not problems:
            rows = cast(repaint_table(table, request.resample, request.jump_length), dtype)
        table = cast(table, dtype)

    stage = None if ddim.autoencoder is None else ddim.autoencoder.config
    factor, channels = (1, config.in_channels) if stage is None else (stage.size_factor, stage.in_channels)  # of images
    given = inputs.x_T if inputs.images is None else inputs.images
    if num is None:
        first = next((x for x in (given, inputs.labels, inputs.condition) if x is not None and np.ndim(x)), None)
        num = 1 if first is None else np.shape(first)[0]
        if first is None and batch_size is not None:
            problems.append(("num", "num must be given beside batch_size, which is how many are made at a time"))
    if inputs.images is not None and (np.ndim(inputs.images) != 4 or not num):
        told = f"images must have shape (num, h, w, {channels}) with num at least 1, got "
        problems.append(("images", f"{told}{np.shape(inputs.images)}"))
        stand_in = np.zeros((1, *(factor * side for side in config.image_size), channels), dtype)
        inputs, given, num = inputs._replace(images=stand_in), stand_in, 1  # so that the rest is looked at too
    size = request.image_size
    if size is None and given is not None and np.ndim(given) == 4:
        own = config.in_channels if inputs.images is None else channels
        size = np.shape(given)[1:3] if np.shape(given)[3] == own else None
    height, width = config.image_size if size is None else size
    misfits: Problems = []
    if stage is not None and size is not None and (request.image_size is not None or inputs.images is not None):
        misfits = latent_problems(stage, config, size)
        height, width = stage.latent_size(size)
    shape = (height, width, config.in_channels)
    own_images = (factor * height, factor * width, channels)
    if stage is not None:
        misfits += pair_problems(stage, config)
    asked_eta = inputs.eta if inputs.eta is not None else request.eta
    eta = 0.0 if not method.takes_eta else sampler.eta if asked_eta is None else asked_eta
    scale = inputs.guidance_scale if inputs.guidance_scale is not None else request.guidance_scale
    own_null = request.null_label if request.null_label is not None else ddim.null_label
    null_label = request.null_label if scale is None else own_null
    unfit = inputs.classifier is not None and not isinstance(inputs.classifier, Classifier)
    if unfit:
        told = f"classifier must be what jddim.load_classifier returns, got {type(inputs.classifier).__name__}"
        problems.append(("classifier", told))
    classifier = inputs.classifier.config if isinstance(inputs.classifier, Classifier) else None
    rederives = classifier is not None and method.rederives_eps and bool(limits(sampler, dtype))
    if rederives:
        sampler = dataclasses.replace(sampler, rederive_eps=True)
    program = Program.of(
        method,
        sampler,
        ddim.schedule,
        guidance=None if scale is None else request.guidance or CLASSIFIER_FREE,
        resampled=resampled,
        guidance_channels=None if scale is None else sampler.guidance_channels,
    )
    unusable = reuse_problems(
        config,
        reuse=request.reuse,
        center=request.reuse_center,
        blocks=request.reuse_blocks,
        num_steps=rows.num_steps,
        beside={
            "guidance_interval": request.guidance_interval is not None,
            "a classifier": inputs.classifier is not None,
            "resample": resampled,
            "a self-conditioned network": sampler.self_condition,
        },
    )
    if request.reuse is not None and not unusable:
        whole = whole_steps(rows.num_steps, request.reuse, request.reuse_center)
        first_step = int(rows.step[0])
        program = dataclasses.replace(
            program, reuse=tuple(first_step + step for step in whole), reuse_blocks=request.reuse_blocks or 1
        )

    problems += unusable + _spacing_options(request, spacing)
    problems += misfits or network_problems(config, sampler, (height, width))
    problems += num_problems(num)
    problems += sampler_problems(sampler, table, ddim.schedule) + batch_size_problems(batch_size)
    problems += _unused(request, program, rederives=rederives) + stage_options(request, stage is not None)
    weight = inputs.classifier_scale if inputs.classifier_scale is not None else request.classifier_scale
    if not method.takes_eta and asked_eta is not None:
        problems += _eta_of_none(method, request, asked_eta)
    labels, wrong = one_each(inputs.labels, num)
    problems += wrong
    if not num_problems(num):
        if inputs.numbers is None:
            problems += start_problems(request.start, num)
        numbers = inputs.numbers if inputs.numbers is not None else _numbers(request.start, num)
        if labels is None and request.labels is not None and not unfit:
            labels, wrong = labels_of(ddim, request, numbers, classifier)
            problems += wrong
        if not wrong and not unfit and (request.labels is None or labels is not None):
            problems += label_problems(config, labels, num, classifier)
        rows_of_noise = (rows.num_steps, *((2,) if resampled else ()), num, *shape)
        if isinstance(method, Inversion):
            problems += _inversion_problems(sampler, table, request)
        else:
            needs_noise = method.stochastic or resampled or (method.takes_eta and not is_zero(eta))
            problems += key_problems(
                key,
                num,
                x_T=inputs.x_T is not None,
                noise=inputs.noise is not None,
                needs_noise=needs_noise,
            )
        problems += array_problems("x_T", inputs.x_T, (num, *shape), dtype)
        problems += array_problems("images", inputs.images, (num, *own_images), dtype)
        problems += array_problems("noise", inputs.noise, rows_of_noise, dtype, rows.num_steps)
        problems += [] if inputs.images is None else range_problems(inputs.images)
        problems += mask_problems(inputs.mask, own_images)
        problems += condition_problems(config, inputs.condition, (num, height, width), dtype)
        problems += eta_problems(eta, num, table) if method.takes_eta else []
        problems += guidance_problems(
            config,
            scale,
            null_label,
            num,
            kind=request.guidance,
            rescale=request.guidance_rescale,
            interval=request.guidance_interval,
            channels=program.guidance_channels,
            takes_eta=method.takes_eta,
        )
        problems += classifier_problems(
            config,
            classifier,
            None if unfit else weight,
            own_null,
            num,
            shape=shape,
            table=table,
            method=request.method,
            takes_variance=method.takes_variance,
            kind=program.guidance,
        )
        if not problems:
            inputs = inputs._replace(
                numbers=numbers,
                labels=labels,
                eta=_each(eta, num, dtype),
                guidance_scale=None if scale is None else _each(scale, num, dtype),
                classifier_scale=None if weight is None else _each(weight, num, dtype),
            )
    return Plan(
        model=model,
        program=program,
        sampler=sampler,
        table=table,
        rows=rows,
        limits=limits(sampler, dtype),
        num=num or 0,
        shape=shape,
        dtype=dtype,
        inputs=inputs,
        null_label=null_label,
        rescale=request.guidance_rescale,
        interval=request.guidance_interval,
        problems=problems,
        schedule=ddim.schedule,
        autoencoder=ddim.autoencoder,
        decodes=stage is not None and not request.latents and not isinstance(method, Inversion),
        decode_batch=request.decode_batch or 1,
        pastes=request.paste,
        prior_scale=ddim.schedule.prior_scale(float((table if request.s_churn is None else rows).t[0])),
    )


@contextlib.contextmanager
def _refusing(request: Request, inputs: Inputs) -> Iterator[None]:
    """What is wrong with a name or a table becomes RequestError."""
    try:
        yield
    except ValueError as error:
        edited = request.strength is not None or inputs.mask is not None
        of = "edit" if edited else "sample" if inputs.images is None else "invert"
        field = next((word for word in str(error).split() if word in Request.__annotations__), "steps")
        raise RequestError([(field, str(error))], of) from error


def limits(sampler: SamplerConfig, dtype: DTypeLike) -> dict[str, tuple[Array, Array]]:
    """What keeps x0 in range, as the loops' arguments."""
    if sampler.threshold_ratio is not None:
        return {"threshold": (jnp.asarray(sampler.threshold_ratio, dtype), jnp.asarray(sampler.threshold_max, dtype))}
    if not sampler.clip:
        return {}
    return {"clip_range": (jnp.asarray(sampler.clip_range[0], dtype), jnp.asarray(sampler.clip_range[1], dtype))}


def labels_of(
    ddim: Source, request: Request, numbers: ArrayLike, classifier: ClassifierConfig | None = None
) -> tuple[np.ndarray | None, Problems]:
    """The labels, int32, of the images with these numbers, as the request's text says; and what is wrong with it."""
    text, num = request.labels, np.shape(numbers)[0]
    classes = (classifier or ddim.model.config).num_classes
    if text is None:
        return None, []
    if classes is None:
        return None, [("labels", "this network has no classes: leave labels out")]
    each: Sequence[int] = ()
    if text == "balanced":
        each = classes_in_turn(ddim, request, classifier)
    else:
        with contextlib.suppress(ValueError):
            low, colon, high = text.partition(":")
            each = range(int(low), int(high)) if colon else [int(part) for part in text.split(",")]
    if not each and (names := ddim.label_names):
        asked = _names(text, names)
        if unknown := [name for name in asked if name not in names and not name.isdecimal()]:
            plain = {name.casefold(): name for name in names}
            close = difflib.get_close_matches(unknown[0].casefold(), plain)
            near = ", ".join(repr(plain[name]) for name in close)
            hint = f"did you mean {near}?" if near else f"give a number in 0..{classes - 1}"
            return None, [("labels", f"labels: no class is called {unknown[0]!r} ({hint})")]
        each = [names[name] if name in names else int(name) for name in asked]
    if not each:
        named = "" if text[:1].isdigit() else "; this checkpoint has no names of classes"
        told = f"labels are one number, several as in 207,388, a range as in 0:10, or balanced; got {text!r}{named}"
        return None, [("labels", told)]
    listed = "," in text and len(each) > 1
    if listed and len(each) != num:
        told = f"labels names {len(each)} labels for {num} images; give one for each, one for all, or a range"
        return None, [("labels", told)]
    if outside := [label for label in (each[0], each[-1], *each[:num]) if not 0 <= label < classes]:
        shown = classes if isinstance(each, range) and 0 <= each[0] < classes else outside[0]
        return None, [("labels", f"labels must lie in 0..{classes - 1}, got {shown}")]
    places = np.arange(num) if listed else np.asarray(numbers).astype(np.int64)
    return np.array(each, np.int32)[places % len(each)], []


def _names(text: str, known: Container[str]) -> list[str]:
    """The names in a text with commas between; where a name has commas itself, the longest that is known."""
    parts, names = [part.strip() for part in text.split(",")], []
    while parts:
        ends = range(len(parts), 0, -1)
        end = next((end for end in ends if ", ".join(parts[:end]) in known), 1)
        names.append(", ".join(parts[:end]))
        del parts[:end]
    return names


def one_each(labels: ArrayLike | None, num: int) -> tuple[Array | np.ndarray | None, Problems]:
    """Labels as an array, of one for all `(num,)`; and what is wrong with them."""
    if labels is None or isinstance(labels, Array):
        held: Array | np.ndarray | None = labels
    else:
        try:
            held = np.asarray(labels)
        except (TypeError, ValueError, RuntimeError):  # a tensor on a GPU, lists of several lengths
            told = f"labels must be one for all or one an image, got {described(labels)}"
            return None, [("labels", f"{told}: give {as_numpy('labels', labels)}")]
    if held is not None and held.ndim == 0 and not num_problems(num):
        held = (np if isinstance(held, np.ndarray) else jnp).broadcast_to(held, num)
    return held, []


def classes_in_turn(ddim: Source, request: Request, classifier: ClassifierConfig | None = None) -> list[int]:
    """The classes that labels "balanced" go through: the classifier's or the network's, all but the null label."""
    null_label = ddim.null_label if request.null_label is None else request.null_label
    return [label for label in range((classifier or ddim.model.config).num_classes or 0) if label != null_label]


def as_key(key: Array | int | None) -> Array | None:
    """A key as the loops take it: a seed makes one, and the raw keys of `jax.random.PRNGKey` are wrapped."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool) and 0 <= key < 2**32:
        return jax.random.key(key)
    if isinstance(key, Array) and jnp.issubdtype(key.dtype, jnp.integer):
        if key.ndim == 0:
            return jax.random.key(key)
        if key.dtype == jnp.uint32 and key.shape[-1] == 2 and key.ndim < 3:
            wrapped: Array = jax.random.wrap_key_data(key)
            return wrapped
    return key  # type: ignore[return-value]  # what is no key, `key_problems` says


def _method(request: Request, inputs: Inputs) -> Method:
    """DDIM's way up for images to invert, else the method asked for."""
    inverting = inputs.images is not None and inputs.mask is None and request.strength is None
    if not inverting:
        return methods.find(request.method) if request.s_churn is None else _churned(request)
    known = request.convention in CONVENTIONS  # an unknown one is among the problems
    return Inversion(request.convention if known else CONVENTIONS[0], request.refine)


CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
"""The fields of `Request` that are `churned_heun`'s arguments."""


def _churned(request: Request) -> Method:
    """The method heun with the request's churn. Raises ValueError for another method."""
    if request.method != "heun":
        raise ValueError(f"s_churn is of method heun, not of {request.method!r}: take that one, or leave s_churn out")
    asked = {name: getattr(request, name) for name in CHURN if getattr(request, name) is not None}
    return methods.BySolver(churned_heun(**asked))


def spacing_of(request: Request, sampler: SamplerConfig, T: int) -> str | np.ndarray:
    """The spacing in effect, a name or timesteps. OpenAI's DDIM takes other ones than its other samplers."""
    if isinstance(request.spacing, tuple):
        return np.asarray(request.spacing)
    spacing = request.spacing or sampler.spacing
    steps = request.steps if request.steps is not None else sampler.num_steps
    if spacing != "openai_ddim" or not 1 <= steps <= T:
        return spacing
    return openai_respacing(T, steps) if methods.find(request.method).takes_eta else "openai"


def _numbers(start: int, num: int) -> np.ndarray:
    return (start + np.arange(num)).astype(np.uint32)


def _each(value: ArrayLike, num: int, dtype: DTypeLike) -> Images:
    """One value an image; a number is not put on a device for it."""
    if isinstance(value, Array):
        return jnp.broadcast_to(value.astype(dtype), (num,))
    return np.broadcast_to(np.asarray(value, dtype), (num,))


def _eta_of_none(method: Method, request: Request, eta: ArrayLike) -> Problems:
    """What is wrong with an eta that the method has no use for."""
    if not isinstance(method, Inversion):
        return [("eta", f"eta is DDIM's; method {request.method!r} takes none")]
    if is_zero(eta):
        return []
    return [("eta", f"inversion is deterministic, so eta must be 0, got {eta}: added noise cannot be undone")]


def _edit_problems(request: Request, inputs: Inputs, method: Method, sampler: SamplerConfig) -> Problems:
    """What is wrong with the options of editing."""
    told = None
    if request.strength is not None and (inputs.images is None or inputs.mask is not None):
        told = ("strength", "strength is for images to edit, without a mask: it says how far they are noised")
    elif request.paste and inputs.mask is None:
        told = ("paste", "paste is of what a mask keeps: give mask, or leave it out")
    elif request.resample < 1:
        told = ("resample", f"resample must be at least 1, got {request.resample}")
    elif (request.resample, request.jump_length) != (1, 1) and inputs.mask is None:
        told = ("resample", "resample and jump_length are RePaint's: they go with a mask, not with strength")
    elif request.resample == 1 and request.jump_length != 1:
        told = (
            "jump_length",
            f"jump_length is of resampling: give resample too, at least 2, got jump_length={request.jump_length}",
        )
    elif request.resample > 1 and sampler.clean_known:
        told = (
            "resample",
            "resample is of known pixels that are noised; this network takes them clean, at every step: leave it out",
        )
    elif request.resample > 1 and method.remembers:
        told = (
            "method",
            f"method {request.method!r} remembers earlier steps, which resampling goes back from: take ddim or ddpm",
        )
    return [] if told is None else [told]


def _unused(request: Request, program: Program, *, rederives: bool) -> Problems:
    """What is asked of a method that has no use for it. rederives: a classifier guides, and x0 is limited."""
    problems: Problems = []
    if request.variance is not None and not program.method.takes_variance:
        problems.append(("variance", f"variance is for method ddpm, not for {request.method!r}: leave it out"))
    if request.s_churn is None:
        told = "is of s_churn: give s_churn too, or leave it out"
        problems += [(name, f"{name} {told}") for name in CHURN if getattr(request, name) is not None]
    if request.guidance_channels is not None and program.guidance is None:
        problems.append(
            ("guidance_channels", "guidance_channels is for guidance: give guidance_scale too, or leave it out")
        )
    if request.rederive_eps and (program.guidance == CFG_PLUS_PLUS or not program.method.rederives_eps):
        who = "guidance cfg++" if program.guidance == CFG_PLUS_PLUS else f"method {request.method!r}"
        problems.append(
            ("rederive_eps", f"rederive_eps is of DDIM and of solvers of eps; {who} derives none: leave it out")
        )
    elif request.rederive_eps is False and rederives:
        told = "rederive_eps is not False beside a classifier, whose eps is taken from the limited x0: leave it out"
        problems.append(("rederive_eps", told))
    return problems


def _spacing_options(request: Request, spacing: str | np.ndarray) -> Problems:
    """What is asked of the spacing that it has no use for."""
    named = spacing if isinstance(spacing, str) else "of listed t"
    fits = {"shift": named == "even", "rho": named.startswith("karras")}
    of = {"shift": "even", "rho": "karras"}
    return [
        (name, f"{name} is of the spacing {of[name]}, this run's is {named}: leave it out, or ask for that spacing")
        for name, fit in fits.items()
        if getattr(request, name) is not None and not fit
    ]


def stage_options(request: Request, has_stage: bool) -> Problems:
    """What is wrong with the options on a first stage."""
    asked = [name for name in ("latents", "decode_batch", "paste") if name in request.asked()]
    told = "is of a checkpoint with a first stage, of which this has none: leave it out"
    if not has_stage:
        return [(name, f"{name} {told}") for name in asked]
    if request.decode_batch is None:
        return []
    idle = "decode_batch is of images, and latents are asked for: leave it out"
    return [("decode_batch", idle)] if request.latents else decode_problems(request.decode_batch)


def _inversion_problems(sampler: SamplerConfig, table: StepTable, request: Request) -> Problems:
    problems: Problems = []
    if sampler.self_condition:
        told = "this network is self-conditioned: a step depends on the x0 of the one before it, which inversion only "
        problems.append(("convention", told + "comes to after it"))
    try:
        check_inversion(table, request.convention, request.refine, sampler.prediction_type)
    except ValueError as error:
        problems.append(("convention", str(error)))
    return problems
