"""What `jddim.load` returns: a model, its schedule and its source's sampling conventions, ready to sample."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jddim.checkpoint import card
from jddim.checkpoint.folder import (
    CheckpointError,
    load_autoencoder_metadata,
    load_classifier_metadata,
    load_metadata,
    load_params,
    part_of,
)
from jddim.checkpoint.metadata import FIRST_STAGE, Metadata, PartMetadata
from jddim.config import AutoencoderConfig, SamplerConfig, type_problems
from jddim.converting import Told
from jddim.curve import alpha_bar_curve
from jddim.ddim import StepTable, sampler_table
from jddim.guidance import Scale
from jddim.models import Network
from jddim.models.autoencoder import Autoencoder
from jddim.models.building import build_model
from jddim.models.classifier import Classifier
from jddim.models.layers import at_least_float32
from jddim.resolving import forget, resolve
from jddim.run.batches import Preview, run
from jddim.run.methods import Guidance, find
from jddim.run.plan import Inputs, Plan, as_key, limits, plan
from jddim.run.problems import (
    condition_problems,
    decode_problems,
    described,
    guidance_problems,
    key_problems,
    label_problems,
    stage_problems,
)
from jddim.run.programs import (
    Program,
    by_parts,
    check_decoded,
    decode,
    denoiser_returns,
    encode,
    moments,
    network_denoiser,
)
from jddim.run.request import Request, RequestError, check_names
from jddim.sampling import Denoiser, Trajectory
from jddim.schedule import NoiseSchedule, Schedule, make_schedule
from jddim.solvers import Solver

Images = Array | np.ndarray
R = TypeVar("R", bound=Metadata | PartMetadata)


class Common(TypedDict, total=False):
    """The options of `DDIM.sample`, `edit` and `invert` alike; `DDIM.sample` says what they mean."""

    steps: int | None
    spacing: str | Sequence[float] | np.ndarray | None
    shift: float | None
    rho: float | None
    clip: bool | None
    clip_range: tuple[float, float] | None
    threshold: tuple[float, float] | None
    rederive_eps: bool | None
    steps_offset: int | None
    set_alpha_to_one: bool | None
    prediction_type: str | None
    labels: ArrayLike | str | None
    condition: Images | None
    guidance: str | None
    guidance_scale: ArrayLike | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    guidance_channels: int | None
    null_label: int | None
    classifier: Classifier | None
    classifier_scale: ArrayLike | None
    batch_size: int | None
    decode_batch: int | None
    progress: bool | None


class EditOptions(Common, total=False):
    """The options of `DDIM.edit` beside its own."""

    method: str | Solver
    eta: ArrayLike | None
    variance: str | None
    s_churn: float | None
    s_tmin: float | None
    s_tmax: float | None
    s_noise: float | None
    reuse: int | None
    reuse_center: int | None
    reuse_blocks: int | None
    noise: Images | None
    start: int


class SampleOptions(EditOptions, total=False):
    """The options of `DDIM.sample`."""

    x_T: Images | None
    image_size: tuple[int, int] | None
    latents: bool | None
    on_segment: Callable[[Preview], object] | None


class Conventions(TypedDict, total=False):
    """The fields of `jddim.config.SamplerConfig`, which says what they mean, as `DDIM.with_sampler` takes them."""

    spacing: str
    num_steps: int
    eta: float
    steps_offset: int
    set_alpha_to_one: bool
    clip: bool
    clip_range: tuple[float, float]
    threshold_ratio: float | None
    threshold_max: float
    rederive_eps: bool
    prediction_type: str
    timestep_scale: float
    self_condition: bool
    variance: str
    clean_known: bool
    guidance_channels: int | None
    reversed_time: bool
    sigma_data: float
    boundary: bool
    shift: float
    rho: float


RUN = ("batch_size", "progress", "on_segment")
"""How a plan is run; no part of what is asked for."""


def load(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, **told: Unpack[Told]) -> DDIM:
    """A checkpoint, ready to sample.

    path: a folder that `jddim convert` wrote; or a PyTorch checkpoint, which is converted into the cache first, unless
    it is there: a file, a folder, a hub id (`google/ddpm-cifar10-32`, with `@REVISION` for a branch, tag or commit), or
    a name of `jddim.presets`. What is found and assumed then is printed on stderr. What lies here comes before a hub id
    of the same name.
    dtype: the network's compute dtype, float32 or bfloat16; the sampler's state, the norms and the softmax stay
    float32. told: config, settings, preset, weights, variant, revision of a PyTorch checkpoint, as `jddim.convert`
    takes them.

    Raises `jddim.CheckpointError` if there is no such checkpoint, or it is incomplete, edited or too new;
    `jddim.ConversionError` and ModuleNotFoundError as `jddim.convert`, with the command that settles what a file needs;
    ValueError for another dtype.
    """
    _check_dtype(dtype)
    metadata, params = _held(path, told, "load", load_metadata)
    model = build_model(metadata.model, part_of(params, ""), dtype)
    stage: Any = metadata.autoencoder and build_model(metadata.autoencoder, part_of(params, FIRST_STAGE), dtype)
    return DDIM(model, make_schedule(metadata.schedule), metadata.sampler, metadata, stage)


def load_classifier(
    path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, **told: Unpack[Told]
) -> Classifier:
    """A classifier of noisy images, for `DDIM.sample(classifier=...)`.

    A pytree and a function: `classifier(x_t, t)` -> logits `(b, classes)`. The arguments, and what raises: as in
    `load`.
    """
    _check_dtype(dtype)
    metadata, params = _held(path, told, "load_classifier", load_classifier_metadata)
    model: Any = build_model(metadata.model, params, dtype)
    assert isinstance(model, Classifier)
    return model


def load_autoencoder(
    path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, **told: Unpack[Told]
) -> Autoencoder:
    """A first stage: `encode(images)` -> z, `decode(z)` -> images; a checkpoint's own, or the one beside a network.

    The arguments, and what raises: as in `load`.
    """
    _check_dtype(dtype)
    metadata, params = _held(path, told, "load_autoencoder", load_autoencoder_metadata)
    config = metadata.autoencoder if isinstance(metadata, Metadata) else metadata.model
    assert isinstance(config, AutoencoderConfig)
    model: Any = build_model(config, part_of(params, FIRST_STAGE if isinstance(metadata, Metadata) else ""), dtype)
    assert isinstance(model, Autoencoder)
    return model


def _held(
    path: str | os.PathLike[str], told: Told, of: str, metadata_of: Callable[[Path, object], R]
) -> tuple[R, Mapping[str, np.ndarray]]:
    """The metadata and parameters of what names a checkpoint. A copy in the cache whose parameters are damaged goes.

    of: the function that is called.
    """
    check_names(told, [*Told.__annotations__], of)
    if not isinstance(path, (str, os.PathLike)):
        states = "it" if isinstance(path, Mapping) else "its state_dict()" if hasattr(path, "state_dict") else None
        way = f": save {states}, torch.save(..., 'model.pt'), then jddim.{of}('model.pt')" if states else ""
        named = "a folder, a file, a hub id or a name of jddim.presets"
        raise TypeError(f"{of}: path must name a checkpoint, {named}; got {described(path)}{way}")
    folder = resolve(path, **told)
    metadata = metadata_of(folder, path)
    try:
        return metadata, load_params(folder, metadata)
    except CheckpointError as error:
        if not forget(folder):
            raise
        raise CheckpointError(
            f"the copy in the cache is damaged ({error}); it is removed, and the same call makes it anew"
        ) from error


def _check_dtype(dtype: DTypeLike) -> None:
    """Raise ValueError for a dtype that networks do not compute in."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"dtype must be float32 or bfloat16 (float64 under jax's x64), got {jnp.dtype(dtype).name}")


_PLACED = "jax places arrays by itself: JAX_PLATFORMS=cpu, cuda or tpu in the environment chooses the device"
_DTYPE = "a network's dtype is chosen when it is loaded: jddim.load(..., dtype='bfloat16')"
_MODES = "a network here has no modes and no gradients of its own: leave the call out"
_LOADED = "jddim.load(...) loads a folder, a PyTorch file, a hub id or a name of jddim.presets"
PEERS: Mapping[str, str] = {
    **dict.fromkeys(("to", "cuda", "cpu", "enable_model_cpu_offload"), _PLACED),
    **dict.fromkeys(("half", "float", "bfloat16"), _DTYPE),
    **dict.fromkeys(("eval", "train", "requires_grad_"), _MODES),
    **dict.fromkeys(("from_pretrained", "from_single_file", "load_state_dict"), _LOADED),
    "save_pretrained": "jddim.export_torch(folder, 'out', 'diffusers') writes a checkpoint's folder so",
    **dict.fromkeys(("state_dict", "parameters"), "the network, ddim.model, is a pytree: jax.tree.leaves(ddim.model)"),
    "unet": "the network is ddim.model",
    "scheduler": "the noise schedule is ddim.schedule, the conventions of sampling are ddim.sampler",
}
"""What models and pipelines of PyTorch libraries have and `DDIM` has not, and what there is in its place."""


def _lacks(name: str) -> AttributeError:
    hint = f": {PEERS[name]}" if name in PEERS else ""
    return AttributeError(f"jddim's DDIM has no attribute {name!r}{hint}")


class _Led(type):
    """The class of `DDIM`, whose own attributes are asked for as well: `DDIM.from_pretrained`."""

    if not TYPE_CHECKING:  # to a checker, every name would be there

        def __getattr__(cls, name):
            raise _lacks(name)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DDIM(metaclass=_Led):
    """A diffusion model with everything that sampling it needs. Replace a part with `dataclasses.replace`.

    model: `model(x_t, t) -> eps`, a pytree. schedule: what it was trained with. sampler: the source's conventions,
    the defaults of `sample`. metadata: the checkpoint's own, None for a model built in memory. autoencoder: the first
    stage whose latents the model samples, None for a model of images.
    """

    model: Network
    schedule: Schedule
    sampler: SamplerConfig
    metadata: Metadata | None = None
    autoencoder: Autoencoder | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for an autoencoder that is none."""
        if not isinstance(self.autoencoder, Autoencoder | None):
            told = f"DDIM: autoencoder must be what jddim.load_autoencoder gives, got {described(self.autoencoder)}"
            raise TypeError(told)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            raise _lacks(name)

    def __repr__(self) -> str:
        """One line."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model))
        used = self.sampler
        source = "" if self.metadata is None else f", {self.metadata.provenance.get('family', 'jddim')}"
        source += "" if self.autoencoder is None else f"; latents of {self.autoencoder.config.summary}"
        return (
            f"DDIM({self.model.config.summary}; {count:,} parameters; {self.schedule.summary}; "
            f"{used.spacing}, {used.num_steps} steps, predicts {used.prediction_type}{source})"
        )

    def _repr_html_(self) -> str:
        """For a notebook: the line, the schedule with the default timetable's t, and where the checkpoint is from."""
        try:
            table = self.table()
            visited, told = table.t, repr(table)
        except ValueError as error:  # of conventions that make no table; what is only looked at does not raise
            visited, told = np.array([], int), str(error)
        facts = {"default timetable": told} | ({} if self.metadata is None else card.facts(self.metadata))
        pairs = [(html.escape(name), html.escape(fact)) for name, fact in facts.items()]
        rows = (f'<tr><th align="left">{name}</th><td align="left">{fact}</td></tr>' for name, fact in pairs)
        line, schedule = html.escape(repr(self)), self.schedule
        curve = ""
        if isinstance(schedule, NoiseSchedule) and np.issubdtype(visited.dtype, np.integer):
            curve = alpha_bar_curve(schedule.alphas_cumprod, visited)
        return f"<div><code>{line}</code><br/>{curve}<table>{''.join(rows)}</table></div>"

    def with_sampler(self, **conventions: Unpack[Conventions]) -> DDIM:
        """The same model with other conventions: fields of `SamplerConfig`, e.g. `steps_offset=1`.

        To say `clip`, on or off, leaves the checkpoint's thresholding out, unless threshold_ratio is said as well.
        Raises TypeError for what is no convention.
        """
        own, elsewhere = [*Conventions.__annotations__], [*SampleOptions.__annotations__]
        if asked := [name for name in conventions if name not in (*own, "steps") and name in elsewhere]:
            raise TypeError(f"with_sampler() takes no {asked[0]!r}: it is an option of DDIM.sample, no convention")
        check_names(conventions, own, "with_sampler")
        if "clip" in conventions:
            conventions = {"threshold_ratio": None, **conventions}
        return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, **conventions))

    def table(
        self,
        steps: int | None = None,
        spacing: str | Sequence[float] | np.ndarray | None = None,
        dtype: DTypeLike = np.float32,
    ) -> StepTable:
        """The step table of `steps` with a named spacing, or of an explicit descending list of timesteps.

        Defaults come from the checkpoint. The table has the source's number of rows, which "uniform" does not always
        make equal to `steps` (see `jddim.timesteps`).
        """
        return sampler_table(self.schedule, self.sampler, steps, dtype, spacing)

    @overload
    def sample(
        self,
        key: Array | int | None = None,
        num: int | None = None,
        *,
        trajectory_every: None = None,
        **options: Unpack[SampleOptions],
    ) -> Array: ...

    @overload
    def sample(
        self,
        key: Array | int | None = None,
        num: int | None = None,
        *,
        trajectory_every: int,
        **options: Unpack[SampleOptions],
    ) -> tuple[Array, Trajectory]: ...

    def sample(
        self,
        key: Array | int | None = None,
        num: int | None = None,
        *,
        trajectory_every: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> Array | tuple[Array, Trajectory]:
        """Images `(num, h, w, c)` float32, nominally in [-1, 1] (not clamped unless x0 is clipped).

        num: as many as x_T, labels or condition have by default, or 1.
        key: `jax.random.key(seed)`, or the seed. Image i of the result is image `start + i` of the seed: it depends on
            nothing else, so `num=7` and then `num=9, start=7` make the images of `num=16`. Or one key per image
            `(num,)`, such as some of `jddim.sampling.sample_keys`. Not needed if x_T is given, and eta is 0 or noise is
            given.
        trajectory_every: k returns `(images, Trajectory)` with every k-th step.

        The options:

        method: "ddim"; "ddpm", ancestral sampling with the checkpoint's variance or `variance`; one of
            `jddim.solvers.SOLVERS`, such as "dpm++2m", or a `Solver`. `noise` then has one row an evaluation.
            s_churn, s_tmin, s_tmax, s_noise: of "heun" on EDM's path, as `jddim.solvers.churned_heun`'s.
        steps: S; spacing: a name that `jddim.timesteps.make_timesteps` takes, or a descending list of timesteps (then
            no steps). shift: of a flow's spacing "even"; rho: of the spacing "karras".
        eta: 0 deterministic ... 1 as noisy as DDPM; a scalar or one value per image, `(num,)`. May be traced. For
            "ddim" alone.
        clip: clamp x0 to clip_range at each step; threshold: instead, (ratio, largest) of dynamic thresholding;
            rederive_eps: use the limited x0's eps in the direction term.
        steps_offset, set_alpha_to_one, prediction_type, variance, guidance_channels: as in
            `jddim.config.SamplerConfig`.
        labels: for a network with classes, and only for one: `(num,)` integers in 0..num_classes-1, or one for all, or
            text as the command line takes it: "207,388", and "goldfish" of a checkpoint that has names. Or what its
            `class_embedding` takes, one row an image.
        condition: for a network that is given an image beside each x_t, and only for one: `(num, h, w,
            condition_channels)` float32, scaled as in training (mostly to [-1, 1]); one that is smaller by whole
            factors is enlarged bilinearly.
        guidance_scale: guidance between `null_label`, the label that meant none in training (scale 0; by default what
            is recorded), and `labels` (1), or beyond; a scalar or one value per image. Twice the
            evaluations. guidance: its kind, "classifier-free", "projected" or "cfg++" (`jddim.guidance`).
            guidance_rescale: phi in [0, 1]. guidance_interval: (low, high), the t to guide at; elsewhere the scale is
            1, and the network is asked once (but of cfg++).
        reuse: of a UNet: all of it is asked at steps 0, N, 2N, ... and between them the last `reuse_blocks` blocks of
            its way up alone (default 1), on what the rest gave at the last whole step (DeepCache, arXiv:2312.00858).
            reuse_center: the whole steps lie denser around this one (`jddim.timetables.whole_steps`).
        classifier: a network that `load_classifier` gives, which leads to `labels` by its gradient, classifier_scale
            times: a scalar or one value an image. labels are then needed for a network without classes, too. x0 is
            limited before the gradient is added, and not again (OpenAI's condition_score). Not for method "ddpm".
        x_T: `(num, h, w, c)` float32 start; noise: `(S, num, h, w, c)` float32, row s used in the s-th step taken.
        image_size: (height, width) in pixels, other than the checkpoint's. latents: of a checkpoint with a first stage,
            z `(num, h / f, w / f, c)` in place of images, as x_T and noise are always, and a trajectory. decode_batch:
            how many images are encoded or decoded at a time; 1 by default.
        batch_size: images per compiled call, default all.
        progress: a bar on stderr, in a notebook or at a terminal alone by default; True: elsewhere a line every 10 s.
            Then Ctrl-C is heard between segments.
        on_segment: called with a `Preview` after each segment, of which a batch has eight or more (or as many as it has
            evaluations); what it raises ends the run.

        Everything that is None comes from the checkpoint. Works inside `jit`, `vmap` and `grad`, where values are
        traced and only shapes are checked; outside, one compiled program serves every eta, seed, label and set of
        weights of a shape and S, whoever watches.

        Raises ValueError with everything wrong in one message, TypeError for an unknown option; FloatingPointError if a
        NaN or infinity appears, naming the image and the step (outside tracing only).
        """
        check_names(options, [*SampleOptions.__annotations__], "sample")
        planned = self._plan("sample", key, num, options).check("sample")
        x_0, trajectory = run(planned, trajectory_every=trajectory_every, **_how(options))
        return x_0 if trajectory is None else (x_0, trajectory)

    def edit(
        self,
        images: Images,
        key: Array | int | None = None,
        *,
        strength: float | None = None,
        mask: Images | None = None,
        resample: int = 1,
        jump_length: int = 1,
        paste: bool = False,
        **options: Unpack[EditOptions],
    ) -> Array:
        """Images made anew from `images` `(num, h, w, c)` float32 in [-1, 1]: all over, or where a mask is white.

        Give one of the two: strength, in (0, 1], how far they are noised before they are sampled again
        (`jddim.editing.tail`); or mask `(h, w, 1)` in [-1, 1], -1 where they stay, 1 where they are made anew, a blend
        between (`jddim.editing.inpaint_loop`; resample and jump_length are RePaint's).
        paste: of a checkpoint with a first stage, whose latents a mask keeps where it keeps all of their pixels: what
            the mask keeps is put back into the decoded images, blended where the mask blends.
        key, the options and what raises are `sample`'s; noise has two draws a row, `(N, 2, num, h, w, c)`, where
        resample is above 1.
        """
        check_names(options, [*EditOptions.__annotations__], "edit")
        if (strength is None) == (mask is None):
            raise ValueError("edit: give either strength, to change images all over, or mask, to fill them in")
        more = {"strength": strength, "resample": resample, "jump_length": jump_length, "paste": paste}
        planned = self._plan("edit", key, None, {**options, **more}, images=images, mask=mask).check("edit")
        return run(planned, **_how(options))[0]

    def invert(
        self,
        images: Images,
        *,
        convention: str = "diffusers",
        refine: int = 0,
        eta: ArrayLike = 0.0,
        **options: Unpack[Common],
    ) -> Array:
        """The x_T `(num, h, w, c)` float32 of `images`, of the same shape, float32 in [-1, 1]: DDIM inversion.

        `sample(x_T=..., eta=0)` with the same arguments then leads back to the images, about: the error falls as
        1 / steps, and with each refinement.

        convention: "paper", "diffusers" or "openai" (`jddim.inversion.inversion_table`). refine: k more evaluations a
            step, which solve for the x_T from which `sample` does lead back (`jddim.inversion.invert_loop`).
        eta: 0, the only one that can be inverted; the checkpoint's own plays no part.
        The options are those of `sample` with the same names.

        Works inside `jit`, `vmap` and `grad`, as `sample` does. Raises ValueError with everything wrong in one message,
        images beyond -2..2 and self-conditioned networks included; FloatingPointError if a NaN or infinity appears.
        """
        check_names(options, [*Common.__annotations__], "invert")
        more = {"convention": convention, "refine": refine, "eta": eta}
        planned = self._plan("invert", None, None, {**options, **more}, images=images).check("invert")
        return run(planned, **_how(options))[0]

    def _plan(self, of: str, key: Array | int | None, num: int | None, options: Any, **arrays: Any) -> Plan:
        """The plan of keyword arguments: arrays go in as they are, the rest is a `Request`."""
        asked = {name: value for name, value in options.items() if name not in RUN}
        text = {"labels": asked.pop("labels")} if isinstance(asked.get("labels"), str) else {}
        given = {name: asked.pop(name) for name in Inputs._fields if name in asked}
        if not isinstance(asked.get("latents"), bool | None):
            told = "latents is a switch here, for z in place of images; what diffusers calls latents is x_T"
            raise RequestError([("latents", told)], of)
        spacing = asked.get("spacing")
        if spacing is not None and not isinstance(spacing, str):
            asked["spacing"] = tuple(np.asarray(spacing).ravel().tolist())
        asked = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.items()}
        solver = {"method": asked.pop("method")} if isinstance(asked.get("method"), Solver) else {}
        request = Request(**asked, **text)
        if problems := [(told.partition(" ")[0], told) for told in type_problems(request)]:
            raise RequestError(problems, of)
        inputs = Inputs(key=key, **given, **arrays)
        return plan(self, dataclasses.replace(request, **solver), inputs, num, options.get("batch_size"))

    def decode(self, z: Images, *, decode_batch: int = 1) -> Array:
        """Images `(n, h, w, c)` float32, nominally in [-1, 1], of latents z `(n, h / f, w / f, c')`.

        decode_batch: how many at a time, which does not change the images but for rounding. Raises RequestError for z
        of another shape or type, or with a NaN, ValueError for a checkpoint without a first stage, FloatingPointError
        if the decoder makes a NaN or infinity (outside tracing only).
        """
        stage = self._first_stage("decode")
        problems = stage_problems("z", z, stage.config.latent_channels, self.model.config.image_size)
        if problems := problems + decode_problems(decode_batch):
            raise RequestError(problems, "decode")
        images = by_parts(decode.bound(stage), jnp.asarray(z), decode_batch)
        check_decoded(images, np.arange(len(images)))
        return images

    def encode(self, images: Images, key: Array | int | None = None) -> Array:
        """Latents z `(n, h / f, w / f, c')` of images `(n, h, w, c)` float32 in [-1, 1].

        key: z is drawn from the encoder's Gaussian, image i with `fold_in(key, i)`, or with the i-th of one key an
        image; None: its mean. Raises RequestError for images of another shape, type or range and for what is no key,
        ValueError for a side that does not divide, a key where nothing is drawn, and for a checkpoint without a first
        stage.
        """
        stage = self._first_stage("encode")
        drawn = as_key(key)
        problems = stage_problems("images", images, stage.config.in_channels, stage.config.image_size)
        if drawn is not None and not problems:
            problems = key_problems(drawn, len(images), x_T=False, noise=False, needs_noise=True)
        if problems:
            raise RequestError(problems, "encode")
        images = jnp.asarray(images)
        if drawn is None:
            return by_parts(encode.bound(stage), images, 1)
        return stage.z_of(by_parts(moments.bound(stage), images, 1), drawn)

    def _first_stage(self, of: str) -> Autoencoder:
        if self.autoencoder is None:
            raise ValueError(f"{of}: this checkpoint has no first stage: its network makes images")
        return self.autoencoder

    def denoiser(
        self,
        labels: ArrayLike | None = None,
        *,
        condition: Images | None = None,
        guidance_scale: Scale | None = None,
        null_label: int | None = None,
    ) -> Denoiser:
        """`denoise(x_t, t)`, the network as the loops of `jddim.sampling`, `jddim.editing` and the like take it.

        labels: `(b,)` or one for all, for a network with classes. condition, guidance_scale, null_label: as in
        `sample`; the scale may also be a function of t (`jddim.guidance`). A learned variance is left out. Closes over
        the weights: under `jit`, pass the model to the jitted function and call this on
        `dataclasses.replace(ddim, model=model)`, or every weight becomes a constant of the program.
        Raises ValueError if labels, condition or guidance are not this network's.
        """
        one = labels is not None and np.ndim(labels) == 0
        labels = labels if labels is None or isinstance(labels, Array) else np.asarray(labels)
        num = 1 if labels is None or one else labels.shape[0]
        config, c = self.model.config, self.sampler
        scale = 1.0 if callable(guidance_scale) else guidance_scale
        if guidance_scale is not None and null_label is None:
            null_label = self.null_label
        problems = label_problems(config, labels[None] if one else labels, num)  # type: ignore[index]
        problems += guidance_problems(config, scale, null_label, num)
        beside = None if condition is None else jnp.asarray(condition)
        lead = (num, *config.image_size)
        if beside is not None and beside.ndim == 4:
            many = num if labels is not None and labels.ndim else beside.shape[0]
            lead = (many, beside.shape[1], beside.shape[2])
        problems += condition_problems(config, beside, lead, at_least_float32(self.model.dtype))  # type: ignore[arg-type]
        if problems:
            raise RequestError(problems, "denoiser")
        program = Program.of(find("ddim"), c, self.schedule, guidance_channels=c.guidance_channels)
        guidance: Any = None if guidance_scale is None else Guidance(guidance_scale, null_label)  # type: ignore[arg-type]
        told = None if labels is None else jnp.asarray(labels)
        return network_denoiser(self.model, program, told, guidance, beside)

    def conventions(self, dtype: DTypeLike = np.float32) -> dict[str, Any]:
        """The checkpoint's conventions as keyword arguments of `sample_loop`, and of `inpaint_loop` and `invert_loop`.

        invert_loop takes no self_condition, which is among them for a network that needs it alone. inpaint_loop needs
        the sampler's clean_known beside them, which the other two do not take.
        """
        options: dict[str, Any] = {
            "prediction_type": denoiser_returns(self.sampler),
            "rederive_eps": self.sampler.rederive_eps,
            **limits(self.sampler, dtype),
        }
        return options | ({"self_condition": True} if self.sampler.self_condition else {})

    @property
    def null_label(self) -> int | None:
        """The label that meant none in training, as the checkpoint records it; None: it does not."""
        return None if self.metadata is None else self.metadata.null_label

    @property
    def label_names(self) -> dict[str, int]:
        """The source's name of a class -> its label, as the checkpoint records them; empty: it does not."""
        return {} if self.metadata is None else self.metadata.label_names


def _how(options: Any) -> dict[str, Any]:
    return {"progress": None, **{name: options[name] for name in RUN if name in options}}
