"""What can be asked of sampling, once: a frozen dataclass of what JSON can hold. No jax here, so that --help is quick.

Each field carries what the doors need of it: the option's name, how its text is read, one line of help, and which
commands leave it out and why. The command line, the manifest, a picture's metadata, most of the page's form and its
copied commands are made from these fields; `jddim.pipeline` types them for Python, which a test compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jddim.config import (
    DTYPES,
    METHODS,
    PREDICTION_TYPES,
    VARIANCES,
    SamplerConfig,
    did_you_mean,
    from_json,
    to_json,
)

Problems = list[tuple[str, str]]
"""(field, sentence) pairs: what is wrong with a request. Where it can, the sentence begins with the field's name."""


class RequestError(ValueError):
    """A request that cannot be. problems: what is wrong, field by field; of: the function that was called."""

    def __init__(self, problems: Problems, of: str):
        super().__init__(f"{of}: " + "; ".join(sentence for _, sentence in problems))
        self.problems, self.of = problems, of


GUIDANCES = CLASSIFIER_FREE, PROJECTED, CFG_PLUS_PLUS = ("classifier-free", "projected", "cfg++")
COMMANDS = ("sample", "bulk", "warmup", "sweep", "edit", "interpolate", "invert", "export", "serve", "page")
SPACING_NAMES = (
    "linspace, uniform, quad, leading, trailing, linspace_diffusers, openai, openai_ddim, ddimN or N,N,...; even (of a "
    "continuous t), karras, exponential, beta"
)

OWN = "an option of its own"
"""In place of a reason: the command has an option of this name that it defines itself."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What the doors need to know of a field of `Request`.

    flag: as the command line has it. help: one line. how: argparse's keywords that say how the text is read.
    left_out: command -> why it does not take this, or OWN. only: the commands that know this option at all; empty: all
    of them. convention: it stands for fields of `SamplerConfig`, and None means the checkpoint's.
    """

    flag: str
    help: str
    how: Mapping[str, Any]
    left_out: Mapping[str, str]
    only: Sequence[str]
    convention: bool


def _option(
    default: Any,
    flag: str,
    text: str,
    /,
    left_out: Mapping[str, str] = types.MappingProxyType({}),
    *,
    only: Sequence[str] = (),
    convention: bool = False,
    **how: Any,
) -> Any:
    """A field with its `Option`."""
    if only:
        own = " and ".join(command for command in only if command != "page")
        left_out = {command: f"it is of jddim {own} alone" for command in COMMANDS if command not in only}
    return dataclasses.field(default=default, metadata={"option": Option(flag, text, how, left_out, only, convention)})


def whole_seed(text: str) -> int:
    """The text of a seed: what jax.random.key tells apart."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a whole number, got {text!r}") from None
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..{2**32 - 1}, which seeds are kept apart in")
    return number


_ASKED_ON_THE_PAGE = {"serve": "whoever uses the page chooses it there"}
_COMPILED = {"page": "another value is another program, and the page has those of its start: give it to jddim serve"}
_OF_CHURN = {
    "invert": "inversion draws no noise",
    "sweep": "it is of method heun, and a sweep is of ddim",
    "serve": "it is of method heun, and half of the page is ddim's: give it to jddim sample",
    **_COMPILED,
}
_OF_REUSE = {"invert": "inversion goes back the exact steps", **_COMPILED}
_WHEN_RUN = {"export": "it is given when the exported sampler is run"}
_SWITCH = argparse.BooleanOptionalAction
ONE_NETWORK = {
    "bulk": "a set is of one checkpoint; give it to jddim sample",
    "sweep": "a sweep is of one checkpoint; give it to jddim sample, an eta a time",
    "export": "the exported program has one network",
    "serve": "the page samples one network; give it to jddim sample",
    "page": "the page samples one network",
}
"""Command -> why it takes no classifier."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a checkpoint's sampler, as JSON can hold it; arrays are `jddim.run.plan.Inputs`.

    What is None comes from the checkpoint. The meaning of each is `DDIM.sample`'s, of strength, resample and
    jump_length `DDIM.edit`'s, of convention and refine `DDIM.invert`'s.

    labels: one label an image, as text: "3,977", one each or one for all, or their names where the checkpoint has some;
    "0:10", 0 to 9 over and over; "balanced", all classes but the null label over and over. seed: image i depends on
    (seed, i) alone. start: the first image's i.
    """

    method: str = _option(
        "ddim",
        "--method",
        "ddpm: ancestral sampling; consistency: each x0 noised anew; the rest: other solvers (heun asks the network "
        "twice a step); default ddim",
        {
            "invert": "inversion takes DDIM's own steps backwards",
            "sweep": "a sweep goes over eta, which is DDIM's",
            "serve": "--methods names those that the page offers",
        },
        choices=METHODS,
    )
    steps: int | None = _option(
        None, "--steps", "default: the checkpoint's", {"sweep": OWN, **_ASKED_ON_THE_PAGE}, type=int, metavar="S"
    )
    eta: float | None = _option(
        None,
        "--eta",
        "0 deterministic, 1 as noisy as DDPM; default: the checkpoint's",
        {"sweep": OWN, "invert": "inversion is deterministic, added noise cannot be undone", **_WHEN_RUN}
        | _ASKED_ON_THE_PAGE,
        type=float,
        metavar="E",
    )
    spacing: str | tuple[float, ...] | None = _option(
        None, "--spacing", f"{SPACING_NAMES}; default: the checkpoint's", _ASKED_ON_THE_PAGE, metavar="NAME"
    )
    s_churn: float | None = _option(
        None,
        "--s-churn",
        "of method heun on EDM's path: how much noise a run adds before its steps (Algorithm 2; EDM's ImageNet-64: 40)",
        _OF_CHURN,
        type=float,
        metavar="X",
    )
    s_tmin: float | None = _option(
        None,
        "--s-tmin",
        "of --s-churn: the least sigma at which it does (0.05)",
        _OF_CHURN,
        type=float,
        metavar="SIGMA",
    )
    s_tmax: float | None = _option(
        None,
        "--s-tmax",
        "of --s-churn: the largest (50)",
        _OF_CHURN,
        type=float,
        metavar="SIGMA",
    )
    s_noise: float | None = _option(
        None,
        "--s-noise",
        "of --s-churn: that noise's standard deviation, 1 by default (1.003)",
        _OF_CHURN,
        type=float,
        metavar="X",
    )
    shift: float | None = _option(
        None,
        "--shift",
        "of a flow's spacing even: each t becomes N t / (1 + (N - 1) t), towards the noise above 1",
        _ASKED_ON_THE_PAGE,
        convention=True,
        type=float,
        metavar="N",
    )
    rho: float | None = _option(
        None,
        "--rho",
        "of the spacing karras: even steps in sigma^(1 / N)",
        _ASKED_ON_THE_PAGE,
        convention=True,
        type=float,
        metavar="N",
    )
    clip: bool | None = _option(
        None, "--clip", "clamp x0 to the clip range at each step", _COMPILED, convention=True, action=_SWITCH
    )
    clip_range: tuple[float, float] | None = _option(
        None, "--clip-range", "for --clip", convention=True, type=float, nargs=2, metavar=("LOW", "HIGH")
    )
    threshold: tuple[float, float] | None = _option(
        None,
        "--threshold",
        "dynamic thresholding of x0 in place of --clip: diffusers' dynamic_thresholding_ratio, sample_max_value",
        _COMPILED,
        convention=True,
        type=float,
        nargs=2,
        metavar=("RATIO", "MAX"),
    )
    rederive_eps: bool | None = _option(
        None,
        "--rederive-eps",
        "the direction's eps from the clipped x0 (OpenAI, lucidrains)",
        _COMPILED,
        convention=True,
        action=_SWITCH,
    )
    steps_offset: int | None = _option(
        None, "--steps-offset", "added to each t of the spacing leading", convention=True, type=int, metavar="N"
    )
    set_alpha_to_one: bool | None = _option(
        None,
        "--set-alpha-to-one",
        "of diffusers' spacings: whether the last step ends at the clean image, or at t = 0",
        convention=True,
        action=_SWITCH,
    )
    variance: str | None = _option(
        None,
        "--variance",
        "for method ddpm",
        {
            "invert": "inversion draws no noise, so there is no variance",
            "sweep": "it is of method ddpm, and a sweep is of ddim",
            **_COMPILED,
        },
        convention=True,
        choices=VARIANCES,
    )
    prediction_type: str | None = _option(
        None, "--prediction-type", "what the network predicts", _COMPILED, convention=True, choices=PREDICTION_TYPES
    )
    labels: str | None = _option(
        None,
        "--labels",
        "of a class-conditional model: 3,977 (one an image, or one for all), 0:10 (0 to 9, over and over) or balanced",
        {**_WHEN_RUN, **_ASKED_ON_THE_PAGE, "page": OWN},
        metavar="LABELS",
    )
    guidance: str | None = _option(
        None,
        "--guidance",
        "the kind: classifier-free (default); projected, without what oversaturates; cfg++, of x0 alone, scale in 0..1",
        _COMPILED,
        choices=GUIDANCES,
    )
    guidance_scale: float | None = _option(
        None,
        "--guidance-scale",
        "guidance: 0 without the label, 1 with it, above 1 beyond; needs a null label",
        _ASKED_ON_THE_PAGE,
        type=float,
        metavar="W",
    )
    guidance_rescale: float | None = _option(
        None,
        "--guidance-rescale",
        "0..1: how far a guided prediction's standard deviation goes back to the conditional one's",
        _COMPILED,
        type=float,
        metavar="PHI",
    )
    guidance_interval: tuple[float, float] | None = _option(
        None,
        "--guidance-interval",
        "guide at these t alone, LOW <= t <= HIGH",
        _COMPILED,
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    guidance_channels: int | None = _option(
        None,
        "--guidance-channels",
        "guidance changes the first N channels alone; as many as there are: all",
        _COMPILED,
        convention=True,
        type=int,
        metavar="N",
    )
    reuse: int | None = _option(
        None,
        "--reuse",
        "of a UNet: ask all of it every N steps, between them its last blocks alone (DeepCache): faster, not exact",
        _OF_REUSE,
        type=int,
        metavar="N",
    )
    reuse_center: int | None = _option(
        None,
        "--reuse-center",
        "of --reuse: as many whole steps, but denser around step C",
        _OF_REUSE,
        type=int,
        metavar="C",
    )
    reuse_blocks: int | None = _option(
        None,
        "--reuse-blocks",
        "of --reuse: how many last blocks of the way up are asked at each step; default 1",
        _OF_REUSE,
        type=int,
        metavar="K",
    )
    classifier_scale: float | None = _option(
        None,
        "--classifier-scale",
        "of --classifier: its gradient is taken so many times (1 in its paper's 64x64 and 256x256 models)",
        ONE_NETWORK,
        type=float,
        metavar="W",
    )
    null_label: int | None = _option(
        None,
        "--null-label",
        "what meant no label in training; default: as recorded",
        _ASKED_ON_THE_PAGE,
        type=int,
        metavar="N",
    )
    image_size: tuple[int, int] | None = _option(
        None,
        "--image-size",
        "in place of the checkpoint's",
        {
            "edit": "images keep their size",
            "invert": "images keep their size",
            "serve": "the page draws at the checkpoint's size",
            "page": "the page draws at the checkpoint's size",
        },
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
    )
    latents: bool | None = _option(
        None,
        "--latents",
        "of a checkpoint with a first stage: z, not decoded",
        {
            **dict.fromkeys(("bulk", "edit", "interpolate", "warmup", "sweep", "serve", "page"), "it makes pictures"),
            "invert": "an x_T is of latents always",
        },
        action=_SWITCH,
    )
    decode_batch: int | None = _option(
        None,
        "--decode-batch",
        "of a checkpoint with a first stage: how many images are encoded or decoded at a time; default 1",
        {**_COMPILED, "export": "an exported sampler decodes one at a time"},
        type=int,
        metavar="N",
    )
    dtype: str = _option(
        "float32", "--dtype", "of the network's computation; default float32", _COMPILED, choices=DTYPES
    )
    seed: int = _option(
        0,
        "--seed",
        "image i depends on (seed, i) alone; default 0",
        {"invert": "inversion draws nothing", "warmup": "any seed has the same program", **_WHEN_RUN}
        | _ASKED_ON_THE_PAGE,
        type=whole_seed,
        metavar="I",
    )
    start: int = _option(
        0,
        "--start",
        "number of the first image; default 0",
        {
            "bulk": "a set begins at image 0",
            "interpolate": "--images names them",
            "invert": "inversion draws nothing",
            "warmup": "any images have the same program",
            "serve": "the page begins at image 0",
            "page": "the page begins at image 0",
            **_WHEN_RUN,
        },
        type=int,
        metavar="I",
    )
    strength: float | None = _option(
        None,
        "--strength",
        "in (0, 1]: how far they are noised; 1 forgets them",
        only=("edit",),
        type=float,
        metavar="F",
    )
    resample: int = _option(
        1, "--resample", "with --mask: each step R times, RePaint's (default 1)", only=("edit",), type=int, metavar="R"
    )
    jump_length: int = _option(
        1,
        "--jump-length",
        "with --resample: going back J steps (default 1)",
        only=("edit",),
        type=int,
        metavar="J",
    )
    paste: bool = _option(
        False,
        "--paste",
        "with --mask, of a checkpoint with a first stage: what is kept is put back as it was, pixel for pixel",
        only=("edit", "page"),
        action="store_true",
    )
    convention: str = _option(
        "diffusers",
        "--convention",
        "where each step asks the network: diffusers, at the t it reaches (default); paper, at the t it leaves; "
        "openai, that too, from t = 0 on and one step beyond the last",
        only=("invert",),
        metavar="NAME",
    )
    refine: int = _option(
        0,
        "--refine",
        "K more evaluations a step, which solve for the x_T that sampling leads back from (default 0)",
        only=("invert",),
        type=int,
        metavar="K",
    )

    def sampler(self, own: SamplerConfig) -> SamplerConfig:
        """The checkpoint's conventions `own` with those that are asked for in their place.

        To say clip, on or off, or a threshold, takes the place of the checkpoint's thresholding. Raises RequestError
        for a clip range where x0 is not clipped.
        """
        asked = {o.name: value for o in options() if o.convention and (value := getattr(self, o.name)) is not None}
        if "clip" in asked:
            asked["threshold_ratio"] = None
        if "threshold" in asked:
            asked["threshold_ratio"], asked["threshold_max"] = asked.pop("threshold")
        used = dataclasses.replace(own, **asked)
        if self.clip and self.threshold is not None:
            raise RequestError([("threshold", "threshold and clip exclude each other: give one of them")], "sample")
        if self.clip_range is not None and (not used.clip or used.threshold_ratio is not None):
            told = "clip_range without clip: this checkpoint's x0 is not clipped; add clip, or leave it out"
            raise RequestError([("clip_range", told)], "sample")
        return used

    def settled(self, own: SamplerConfig) -> tuple[Request, SamplerConfig]:
        """What is asked beside conventions, steps, eta and spacing; and those, in place of the checkpoint's `own`."""
        asked: dict[str, Any] = {"num_steps": self.steps, "eta": self.eta, "spacing": self.spacing}
        used = dataclasses.replace(
            self.sampler(own), **{name: value for name, value in asked.items() if value is not None}
        )
        cleared = {o.name: None for o in options() if o.convention} | dict.fromkeys(("steps", "eta", "spacing"))
        return dataclasses.replace(self, **cleared), used

    @property
    def evaluations(self) -> int:
        """Images that the network sees for each one that is made, in one evaluation."""
        return 1 if self.guidance_scale is None else 2

    def asked(self) -> dict[str, Any]:
        """The fields that differ from the defaults, by name."""
        return {o.name: value for o in options() if (value := getattr(self, o.name)) != o.default}

    def words(self, command: str) -> list[str]:
        """The options of a command that ask for this; what the command does not take is left out."""
        words: list[str] = []
        asked = self.asked()
        for name, _, option in taken_by(command):
            value = asked.get(name)
            if value is None:
                continue
            if isinstance(value, bool):
                words.append(option.flag if value else f"--no-{option.flag[2:]}")
            else:
                words += [option.flag, *(map(repr, value) if isinstance(value, tuple) else [str(value)])]
        return words

    def described(self, sampler: SamplerConfig, num_steps: int, command: str) -> dict[str, Any]:
        """What a picture says of how it was made: the conventions used, and what else was asked of the command.

        sampler: as `sampler` returns it; num_steps: of the table.
        """
        asked = {o.name: getattr(self, o.name) for o in taken_by(command) if not o.convention and o.name != "steps"}
        used = to_json(sampler) | {"num_steps": num_steps}
        return used | {name: value for name, value in asked.items() if value is not None or name not in used}

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in to_json(self).items() if name in self.asked()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Request:
        """The inverse of `to_json`. Raises ValueError for unknown keys and for values of another type."""
        return from_json(Request, data)


ALWAYS_SAID = ("seed", "method", "labels", "guidance_scale", "null_label", "dtype")
"""The fields that a manifest says even where they are the defaults: those that its first version had."""


class Named(typing.NamedTuple):
    """An `Option` with its field's name and default."""

    name: str
    default: Any
    option: Option

    @property
    def convention(self) -> bool:
        """Whether it stands for fields of `SamplerConfig`."""
        return self.option.convention


def options() -> tuple[Named, ...]:
    """Every field's option, in order."""
    return tuple(Named(field.name, field.default, field.metadata["option"]) for field in dataclasses.fields(Request))


def left_out_problems(request: Request, command: str) -> Problems:
    """What a request asks that this command leaves out, with the reasons."""
    asked = request.asked()
    reasons = {o.name: o.option.left_out[command] for o in options() if command in o.option.left_out}
    return [(name, f"{name} is left out: {why}") for name, why in reasons.items() if name in asked]


def taken_by(command: str) -> tuple[Named, ...]:
    """The options that are read from the fields for this command (or the page)."""
    return tuple(o for o in options() if command not in o.option.left_out)


def check_names(given: Mapping[str, Any], known: Sequence[str], of: str) -> None:
    """Raise TypeError that names what is unknown among the keyword arguments of a function, and the nearest known."""
    if unknown := [name for name in given if name not in known]:
        meant = of_peers(unknown[0])
        hint = f" (here it is {meant!r})" if meant in known else did_you_mean(meant or unknown[0], known)
        if meant in ELSEWHERE and meant not in known:
            hint = f" ({ELSEWHERE[meant]})"
        raise TypeError(f"{of}() takes no {unknown[0]!r}{hint}")


def of_peers(name: str) -> str | None:
    """What another library's name of an option is here, or a key of `ELSEWHERE`; None: no name that is known."""
    return next((ours for ours, theirs in PEERS.items() if name in theirs), None)


ELSEWHERE = {
    "device": "jax chooses it: JAX_PLATFORMS=cpu, cuda or tpu in the environment",
    "dtype": "it is chosen when a checkpoint is loaded: jddim.load(..., dtype='bfloat16')",
    "prompt": "networks here take class labels, no text",
    "output_type": "images come as an array; jddim.to_pil makes pictures of it",
}
"""What is no option here, or not of every function, and what there is in its place."""

PEERS: Mapping[str, Sequence[str]] = {
    "steps": (
        *("num_inference_steps", "inference_steps", "num_steps", "ddim_steps", "ddim_num_steps"),
        *("sampling_timesteps", "sampling_steps", "timestep_respacing", "n_steps", "timesteps", "S"),
    ),
    "key": ("seed", "manual_seed", "generator", "rng", "random_state"),
    "num": ("num_images", "num_samples", "n_samples", "n", "num_images_per_prompt", "n_iter"),
    "labels": ("label", "class_labels", "class_label", "class_cond", "classes", "class_idx", "y"),
    "guidance_scale": ("cfg", "cfg_scale", "cond_scale", "unconditional_guidance_scale", "scale", "w"),
    "eta": ("ddim_eta", "ddim_sampling_eta"),
    "rederive_eps": ("use_clipped_model_output",),
    "clip": ("clip_denoised", "clip_sample"),
    "x_T": ("latents",),
    "image_size": ("size", "height", "width"),
    "method": ("sampler", "scheduler", "solver"),
    "spacing": ("timestep_spacing",),
    "dtype": ("torch_dtype", "precision", "fp16", "bf16", "half"),
    "device": ("device", "devices", "gpu", "gpus", "cuda", "cpu"),
    "prompt": ("prompt", "negative_prompt"),
    "output_type": ("output_type", "return_dict"),
}
"""What other libraries call an option of ours; or what is in `ELSEWHERE`."""
