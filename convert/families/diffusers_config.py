"""diffusers' two config files, both ways: UNet2DModel's `config.json` and a scheduler's `scheduler_config.json`.

Read with the rules that diffusers has for them: an absent key is the class's default, one that begins with `_` is not
an option. What neither holds is an argument of `DDIMPipeline`'s call; ours go into the scheduler's file under
`_jddim`, which diffusers skips.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jddim.checkpoint.metadata import Metadata
from jddim.config import ModelConfig, SamplerConfig, ScheduleConfig, UNetConfig, did_you_mean
from jddim.schedule import noise_schedule

from ..engine import ConversionError, cannot_hold, refuse, refusing, shortened
from ..files.pickles import printable
from .base import Wording, check_companions, check_sampler, checked, scaled_t
from .values import (
    asking,
    boolean,
    integer,
    is_integer,
    literal,
    misspelt,
    number,
    one_of,
    parse,
    positive,
    sides,
    whole,
)

# -- values: JSON's, or --set's text, to ours; a ValueError says what was wanted ---------------------------------------


def _count(value: Any) -> int:
    if not is_integer(value) or value < 1:
        raise ValueError("an integer of at least 1")
    return value


def _up_to(limit: int) -> Callable[[Any], int]:
    """A count that sizes something before the tensors are compared with it, so that a config cannot fill the memory."""

    def read(value: Any) -> int:
        if not is_integer(value) or not 1 <= value <= limit:
            raise ValueError(f"an integer in 1..{limit}")
        return value

    return read


def _list(reader: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str):  # --set block_out_channels=32,64
            value = [literal(part) for part in value.split(",")]
        try:
            return tuple(reader(item) for item in (value if isinstance(value, list) else [value]))
        except ValueError as error:
            raise ValueError(f"a list, each {error}") from error

    return read


def _size(value: Any) -> tuple[int, int]:
    found = sides(value.replace(",", "x") if isinstance(value, str) else value)  # --set sample_size=32,48
    if min(found) < 1:
        raise ValueError("a side of at least 1 pixel, or [height, width]")
    return found


def _or_none(reader: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value is None or value == "None":
            return None
        try:
            return reader(value)
        except ValueError as error:
            raise ValueError(f"{error}, or null") from error

    return read


def _activation(value: Any) -> str:
    name = str(value).lower()
    return one_of("silu", "mish", "gelu", "relu")("silu" if name == "swish" else name)


def _variance(value: Any) -> str:
    """Null is DPM-Solver's way to say that the network predicts none."""
    allowed = one_of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")
    return "fixed_small" if value is None else allowed(value)


_REFUSED_BLOCKS = {
    "Skip": "score_sde's FIR-filtered skip connections, made for VE schedulers, which are not DDIM's process",
    "SimpleCrossAttn": "it attends to text embeddings, which UNet2DModel does not give it",
    "CrossAttn": "it attends to text embeddings, which UNet2DModel does not give it",
    "K": "the k-diffusion upscaler's block",
    "Encoder": "an autoencoder's block",
    "Decoder": "an autoencoder's block",
}


def _block(direction: str) -> Callable[[Any], str]:
    known = {f"{kind}{direction}Block2D" for kind in ("", "Attn")} | {f"Resnet{direction}sampleBlock2D"}

    def read(value: Any) -> str:
        name = str(value).removeprefix("UNetRes")  # as diffusers does
        if name not in known:
            reasons = [reason for mark, reason in _REFUSED_BLOCKS.items() if mark in name.partition("Block2D")[0]]
            raise ValueError(
                f"one of {', '.join(sorted(known))}" + (f" ({name} is refused: {reasons[0]})" if reasons else "")
            )
        return name

    return read


# -- the options ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """A key of a config file: the class's default, how its value is read, what it means."""

    default: Any
    parse: Callable[[Any], Any]
    meaning: str


_ATTN_BLOCKS = ("AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
UNET: Mapping[str, Option] = {
    "sample_size": Option(None, _or_none(_size), "side of the training images in pixels, or HEIGHTxWIDTH"),
    "in_channels": Option(3, _count, "channels of x_t"),
    "out_channels": Option(3, _count, "channels of the output"),
    "center_input_sample": Option(False, boolean, "the network first maps x to 2 x - 1"),
    "time_embedding_type": Option(
        "positional", one_of("positional", "fourier", "learned"), "positional, fourier or learned"
    ),
    "time_embedding_dim": Option(None, _or_none(integer), "width of the time MLP; null: 4 block_out_channels[0]"),
    "freq_shift": Option(0, number, "shift in the sinusoid's frequencies"),
    "flip_sin_to_cos": Option(True, boolean, "cosines before sines"),
    "down_block_types": Option(
        ("DownBlock2D", *_ATTN_BLOCKS), _list(_block("Down")), "the encoder's blocks, full resolution first"
    ),
    "mid_block_type": Option(
        "UNetMidBlock2D", _or_none(one_of("UNetMidBlock2D")), "UNetMidBlock2D, or null for no middle"
    ),
    "up_block_types": Option(
        (*(name.replace("Down", "Up") for name in _ATTN_BLOCKS), "UpBlock2D"),
        _list(_block("Up")),
        "the decoder's blocks, lowest resolution first",
    ),
    "block_out_channels": Option((224, 448, 672, 896), _list(_count), "each level's width"),
    "layers_per_block": Option(2, _up_to(100), "residual blocks per level"),
    "mid_block_scale_factor": Option(1, positive, "what the middle's blocks divide their sums by"),
    "downsample_padding": Option(1, integer, "1: the strided convolution pads every side; 0: right and bottom"),
    "downsample_type": Option("conv", _or_none(one_of("conv", "resnet")), "of AttnDownBlock2D: conv or resnet"),
    "upsample_type": Option("conv", _or_none(one_of("conv", "resnet")), "of AttnUpBlock2D: conv or resnet"),
    "dropout": Option(0.0, number, "of training only"),
    "act_fn": Option("silu", _activation, "silu, mish, gelu or relu"),
    "attention_head_dim": Option(8, _or_none(_count), "channels of a head; null: one head"),
    "norm_num_groups": Option(32, _count, "groups of the group norms"),
    "attn_norm_num_groups": Option(None, _or_none(_count), "groups of the middle attention's norm"),
    "norm_eps": Option(1e-5, positive, "epsilon of the group norms"),
    "resnet_time_scale_shift": Option("default", one_of("default", "scale_shift"), "how time enters a block"),
    "add_attention": Option(True, boolean, "attention in the middle"),
    "class_embed_type": Option(None, _or_none(one_of("timestep", "identity")), "timestep, identity or null"),
    "num_class_embeds": Option(None, _or_none(_count), "number of classes, with class_embed_type null"),
    "num_train_timesteps": Option(None, _or_none(_count), "of a learned time embedding"),
}

# Both classes' keys: either class skips the other's, and keeps them when it saves.
SCHEDULER: Mapping[str, Option] = {
    "num_train_timesteps": Option(1000, _up_to(1_000_000), "T"),
    "beta_start": Option(1e-4, number, "first beta"),
    "beta_end": Option(0.02, number, "last beta"),
    "beta_schedule": Option(
        "linear",
        one_of("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        "linear, scaled_linear, squaredcos_cap_v2 or sigmoid",
    ),
    "trained_betas": Option(None, _or_none(_list(number)), "the betas themselves"),
    "rescale_betas_zero_snr": Option(False, boolean, "betas rescaled so that alpha_bar ends at 0"),
    "prediction_type": Option(
        "epsilon", one_of("epsilon", "sample", "v_prediction"), "epsilon, sample or v_prediction"
    ),
    "clip_sample": Option(True, boolean, "clamp x0 at each step"),
    "clip_sample_range": Option(1.0, positive, "to -R..R"),
    "thresholding": Option(False, boolean, "dynamic thresholding instead"),
    "dynamic_thresholding_ratio": Option(0.995, positive, "its quantile"),
    "sample_max_value": Option(1.0, positive, "its largest threshold"),
    "timestep_spacing": Option("leading", one_of("leading", "trailing", "linspace"), "leading, trailing or linspace"),
    "steps_offset": Option(0, integer, "added to every t of leading spacing"),
    "set_alpha_to_one": Option(True, boolean, "false: the last step ends at alpha_bar_0 (DDIMScheduler)"),
    "variance_type": Option(
        "fixed_small",
        _variance,
        "the ancestral sampler's variance (DDPMScheduler)",
    ),
}

CALL: Mapping[str, Option] = {
    "num_inference_steps": Option(50, _count, "default number of steps"),
    "eta": Option(0.0, number, "default eta"),
    "use_clipped_model_output": Option(False, boolean, "default for re-deriving eps from the clipped x0"),
    "condition_first": Option(False, boolean, "of a network given an image beside x_t: its channels come before x_t's"),
}

UNTOLD = (
    *("sample_size", "center_input_sample", "freq_shift", "flip_sin_to_cos", "mid_block_scale_factor", "act_fn"),
    *("downsample_padding", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps"),
    *("class_embed_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type", "condition_first"),
)
"""The facts of a network and its training that no tensor tells."""
_NULL = ("attn_norm_num_groups", "class_embed_type", "num_train_timesteps", "attention_head_dim")
"""Those of the network's that are null, or asked for by `_missing`."""

SETTINGS: Mapping[str, str] = {key: option.meaning for part in (UNET, CALL, SCHEDULER) for key, option in part.items()}

# What EMAModel.save_pretrained adds to the network's config, and what old schedulers had: without effect on sampling.
_OF_EMA = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
_OBSOLETE = ("tensor_format", "timestep_values", "predict_epsilon")

_OF_OTHERS = (
    *("addition_embed_type", "addition_time_embed_dim", "attention_type", "class_embeddings_concat"),
    *("cross_attention_dim", "cross_attention_norm", "dual_cross_attention", "encoder_hid_dim", "num_attention_heads"),
    *(
        "only_cross_attention",
        "resnet_out_scale_factor",
        "resnet_skip_time_act",
        "reverse_transformer_layers_per_block",
    ),
    *("time_embedding_act_fn", "transformer_layers_per_block", "upcast_attention"),
    *("interpolation_type", "predict_x0", "predictor_order", "timestep_scaling", "timestep_type"),
)
"""Keys of diffusers' other networks and schedulers that look like one of these misspelt."""

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler")
_OF_BETAS = re.compile(
    r"(DDIM(Inverse|Parallel)|DDPMParallel|DEISMultistep|DPMSolver(Multistep(Inverse)?|SDE|Singlestep)|"
    r"(Euler|EulerAncestral|Heun|KDPM2|KDPM2Ancestral|LMS)Discrete|PNDM|RePaint|SASolver|UnCLIP|UniPCMultistep)Scheduler"
)
"""The other schedulers with DDIM's process, its noise told by betas."""

_OTHER_PROCESSES = {
    r"Flow|LTXEuler|Helios|Piflow|MiniMax": "flow matching",
    r"EDM|KarrasVe|CosineDPM": "EDM's, whose t is a sigma",
    r"ScoreSde": "score_sde's",
    r"^(CM|LCM|TCD|SCM|Consistency)": "a consistency model's",
    r"VQ|Amused|BlockRefinement|EntropyBound|DiscreteDDIM": "one of discrete tokens",
    r"CogVideoX": "one of betas with a shifted signal-to-noise ratio",
    r"IPNDM|Wuerstchen": "a cosine in continuous t, without betas",
    r"Proteina": "one of proteins' coordinates",
}
"""A mark of a scheduler's name -> its process."""


def section(contents: Mapping[str, Any]) -> str:
    """Which of the files this is: "scheduler", "unet", or "pipeline", which is model_index.json."""
    kind = str(contents.get("_class_name"))
    if kind.endswith("Pipeline") or "unet" in contents:
        return "pipeline"
    schedules = {"beta_schedule", "trained_betas", "beta_start"} & contents.keys()
    return "scheduler" if schedules or "Scheduler" in kind else "unet"


@dataclasses.dataclass(frozen=True)
class Told:
    """The files and --set, read: every key with a value.

    defaulted: sentences on the keys that nothing named; where there is no scheduler's file, its are in warnings.
    asks: as a plan's.
    """

    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    call: Mapping[str, Any]
    defaulted: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    asks: tuple[str, ...]


def parts_of(pipeline: Mapping[str, Any]) -> set[str]:
    """The parts that a pipeline's `model_index.json` says it has."""
    return {name for name, value in pipeline.items() if isinstance(value, list) and any(value)}


def read_configs(
    config: Mapping[str, Any] | None, given: Mapping[str, str], found: Mapping[str, Any] | None = None
) -> Told:
    """The files' contents, by `section`, with --set over them.

    found: in place of config.json's contents, where there are none, what the tensors tell. Raises ConversionError with
    all that is wrong; UnsettledError if that is but what they do not tell, and no default is safe for.
    """
    files: dict[str, dict[str, Any]] = {
        name: dict((config or {}).get(name) or {}) for name in ("unet", "scheduler", "pipeline")
    }
    check_companions("the pipeline of model_index.json", "unet", parts_of(files["pipeline"]), handled=True)
    problems, notes = class_problems(files)
    refuse(problems)  # the keys are another class's
    problems += [f"unknown --set key {key!r}{did_you_mean(key, SETTINGS)}" for key in given if key not in SETTINGS]
    call = files["scheduler"].pop("_jddim", {})
    if not isinstance(call, Mapping):
        problems.append(f"scheduler_config.json: _jddim must hold keys, it holds {call!r}")
        call = {}
    scheduler, obsolete = without_obsolete(files["scheduler"])
    unet = {key: value for key, value in files["unet"].items() if key not in _OF_EMA}
    parts = {}
    for name, file, options, contents in (
        ("unet", "config.json", UNET, unet),
        ("scheduler", "scheduler_config.json", SCHEDULER, scheduler),
        ("call", "scheduler_config.json's _jddim", CALL, call),
    ):
        # num_train_timesteps is of both files; the tensors tell the network's own
        mine = {key: given[key] for key in options if key in given and not (name == "unet" and key in SCHEDULER)}
        parsed, wrong, unread = read_part(file, options, contents, mine)
        problems += wrong
        notes += unread
        inferred = dict(found or {}) if name == "unet" else {}
        problems += _contradictions(inferred, parsed)
        parts[name] = {key: option.default for key, option in options.items()} | inferred | parsed
    trained = () if files["scheduler"] else TRAINED
    keys = [] if found is None else [key for key in UNET if key in UNTOLD and key not in (*_NULL, *found)]
    keys += [*trained, *(["condition_first"] if "condition_first" not in call and _beside(parts) else [])]
    missing = {} if found is None else _missing(found, given)
    if missing:
        problems.append(
            f"without a config.json, the tensors do not tell {'; nor '.join(missing.values())}; --config config.json "
            "says all of it"
        )
    refuse(problems, asking(keys, given, missing) if missing and len(problems) == 1 else ())
    assumed = list(obsolete)
    if absent := defaulted(UNET, {*unet, *given, *(found or {})}, _INERT):
        why = "its config does not name them" if found is None else "the tensors do not tell them"
        assumed.append(f"{absent} (UNet2DModel's defaults in diffusers: {why})")
    unsaid, warnings = scheduler_defaults(scheduler, given)
    assumed += unsaid
    return Told(
        *(parts["unet"], parts["scheduler"], parts["call"]),
        defaulted=tuple(assumed),
        notes=tuple(notes),
        warnings=warnings,
        asks=asking(keys, given),
    )


def scheduler_defaults(
    scheduler: Mapping[str, Any], given: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is assumed of a scheduler whose file, without the obsolete keys, and --set do not say all; and warnings."""
    assumed, warnings = [], []
    trained = () if scheduler else TRAINED
    if absent := defaulted(SCHEDULER, {*scheduler, *given}, ("variance_type", "set_alpha_to_one", *trained)):
        assumed.append(f"{absent} (the scheduler's defaults in diffusers: its config does not name them)")
    if absent := defaulted({key: SCHEDULER[key] for key in trained}, set(given), ()):
        warnings.append(
            f"no scheduler_config.json was found, so the network is taken to be trained with {absent}; if it was not, "
            "its samples are wrong: give that file by --config, or each by --set"
        )
    return tuple(assumed), tuple(warnings)


def read_part(
    file: str, options: Mapping[str, Option], contents: Mapping[str, Any], given: Mapping[str, str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The values that a file's contents and --set have, which goes first; what is wrong; and a note on what is unread.

    file: its name, for messages. given: those of --set that are among the options.
    """
    told = {key: value for key, value in contents.items() if not key.startswith("_") and key not in given}
    odd = [key for key in told if key not in options]
    problems, left = misspelt([key for key in odd if key not in _OF_OTHERS], options, file)
    skipped = [printable(key) for key in odd if key in left or key in _OF_OTHERS]
    notes = [f"{file}: not read, nor by diffusers: {shortened(skipped, 40)}"] if skipped else []
    known = {key: value for key, value in told.items() if key in options}
    sources = {file: known, "--set": {key: literal(given[key]) for key in sorted(given)}}
    parsed, refused = parse(sources, {key: option.parse for key, option in options.items()})
    return parsed, problems + refused, notes


def _beside(parts: Mapping[str, Mapping[str, Any]]) -> int:
    """How many channels in are an image's that the network is given beside x_t: those that do not come out of x_t."""
    network, learned = parts["unet"], parts["scheduler"]["variance_type"] == "learned_range"
    of_x_t, odd = divmod(network["out_channels"], 2 if learned else 1)
    return 0 if odd or network["in_channels"] == network["out_channels"] else max(network["in_channels"] - of_x_t, 0)


def _contradictions(found: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """What is told otherwise than the tensors have it, with both values."""

    def same(key: str, value: Any) -> Any:
        if key in ("down_block_types", "up_block_types") and value:  # nothing is resampled after the last block
            return (*value[:-1], re.sub("Resnet(Down|Up)sample", r"\1", value[-1]))
        return value or 4 * found["block_out_channels"][0] if key == "time_embedding_dim" else value

    return [
        f"{key} is {shown(value)} by --set, but {shown(found[key])} by the tensors"
        for key, value in told.items()
        if key in found and same(key, value) != same(key, found[key])
    ]


def _missing(found: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """What neither the tensors nor --set tell and no default is safe for: as --set takes it -> what it is."""
    missing = {"sample_size=SIDE": "the size of the images: --set sample_size=32, or HEIGHTxWIDTH"}
    middle = found.get("add_attention", False)
    if middle or any("Attn" in name for name in found["down_block_types"] + found["up_block_types"]):
        missing["attention_head_dim=N"] = (
            "how attention is split into heads: --set attention_head_dim=8 (the default of UNet2DModel), or =None (one "
            "head, as in Ho et al.'s)"
        )
    if any(width % UNET["norm_num_groups"].default for width in found["block_out_channels"]):
        missing["norm_num_groups=N"] = "the groups of the norms: --set norm_num_groups=N, a divisor of each width"
    if middle and found["resnet_time_scale_shift"] == "scale_shift" and "attn_norm_num_groups" not in found:
        missing["attn_norm_num_groups=N"] = "the groups of the middle attention's norm: --set attn_norm_num_groups=N"
    return {ask: what for ask, what in missing.items() if ask.partition("=")[0] not in given}


def class_problems(
    files: Mapping[str, Mapping[str, Any]], read: Sequence[str] = ("UNet2DModel",)
) -> tuple[list[str], list[str]]:
    """What is wrong with the classes that the files are of; and a note where a scheduler of another is taken.

    read: the classes of networks that are.
    """
    problems, notes = [], []
    network, scheduler = (files[name].get("_class_name") for name in ("unet", "scheduler"))
    if network not in (None, *read):
        problems.append(f"config.json is a {printable(str(network))}'s; of diffusers' networks jddim reads {read[0]}")
    if scheduler is not None and scheduler not in SCHEDULERS:
        name, told = printable(str(scheduler)), files["scheduler"]
        process = next((what for mark, what in _OTHER_PROCESSES.items() if re.search(mark, name)), None)
        if told.get("use_flow_sigmas") is True:
            process = "flow matching (use_flow_sigmas)"
        elif told.get("timestep_type") == "continuous":
            process = "EDM's, whose t is a sigma (timestep_type continuous)"
        if process is not None:
            problems.append(f"scheduler_config.json is a {name}'s: its process is {process}, not DDIM's")
        elif _OF_BETAS.fullmatch(name):
            notes.append(
                f"scheduler_config.json is a {name}'s: DDIM takes its betas, prediction type and spacing, as by "
                "DDIMScheduler.from_config"
            )
        else:
            problems.append(
                f"scheduler_config.json is a {name}'s, a class that jddim does not know: give one of DDIMScheduler by "
                "--config, such as DDIMScheduler.from_config(pipeline.scheduler.config) saves"
            )
    return problems, notes


def without_obsolete(contents: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A scheduler's config without keys of old diffusers, and what the one with an effect was taken to mean."""
    kept = {key: value for key, value in contents.items() if key not in _OBSOLETE}
    if contents.get("predict_epsilon") is False and "prediction_type" not in contents:
        kept["prediction_type"] = "sample"
        return kept, ["prediction_type = sample (predict_epsilon is false, as diffusers before 0.13 wrote it)"]
    return kept, []


_INERT = ("sample_size", "dropout", "num_train_timesteps", "num_class_embeds", "class_embed_type", "time_embedding_dim")


TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
"""The keys that a network is wrong without, where they are not the defaults."""


def defaulted(options: Mapping[str, Option], named: set[str], inert: Sequence[str]) -> str:
    """The keys that diffusers would fill in, and what with; "" if there are none."""
    absent = [key for key in options if key not in named and key not in inert]
    return ", ".join(f"{key} = {shown(options[key].default)}" for key in absent)


def shown(value: Any) -> str:
    """A value as JSON spells it; a long list by its length."""
    if isinstance(value, tuple) and len(value) > 8:
        return f"({len(value)} numbers)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# -- the network ------------------------------------------------------------------------------------------------------


def unet_config(told: Told) -> UNetConfig:
    """The network that `config.json` describes. Raises ConversionError with every reason why jddim cannot hold it."""
    c = told.unet
    beside = _beside({"unet": c, "scheduler": told.scheduler})
    widths, down, up = c["block_out_channels"], c["down_block_types"], c["up_block_types"]
    problems = []
    if not len(widths) == len(down) == len(up):
        problems.append(
            f"block_out_channels, down_block_types and up_block_types must be of one length, got {len(widths)}, "
            f"{len(down)} and {len(up)}"
        )
    if c["sample_size"] is None:
        problems.append("config.json does not tell the sample_size; --set sample_size=32, or HEIGHTxWIDTH")
    if c["downsample_padding"] not in (0, 1):
        problems.append(
            f"downsample_padding is {c['downsample_padding']}: only 0 and 1 halve the image, as the decoder needs"
        )
    if (c["time_embedding_type"] == "learned") and c["num_train_timesteps"] is None:
        problems.append("time_embedding_type learned needs config.json's num_train_timesteps")
    refuse(problems, ("sample_size=SIDE", *told.asks) if c["sample_size"] is None and len(problems) == 1 else ())
    up = up[::-1]  # by level, as the encoder's
    learned = c["class_embed_type"] is None and c["num_class_embeds"] is not None
    attended = [i for i, name in enumerate(down) if name.startswith("Attn")]
    attended_up = [i for i, name in enumerate(up) if name.startswith("Attn")]
    fields = {
        "image_size": c["sample_size"],
        "in_channels": c["in_channels"] - beside,
        "out_channels": c["out_channels"],
        "condition_channels": beside,
        "condition_first": told.call["condition_first"],
        "channels": widths[0],
        "channel_mults": tuple(whole(width / widths[0]) for width in widths),
        "num_res_blocks": c["layers_per_block"],
        "attention_levels": tuple(attended),
        "up_attention_levels": None if attended == attended_up else tuple(attended_up),
        "middle": c["mid_block_type"] is not None,
        "mid_attention": c["add_attention"],
        "mid_norm_groups": _mid_norm_groups(c),
        "head_channels": c["attention_head_dim"],
        "downsample": _resamplings(down[:-1], c["downsample_type"] or "conv"),
        "upsample": _resamplings(up[1:], c["upsample_type"] or "conv"),
        "symmetric_padding": c["downsample_padding"] == 1,
        "scale_shift": c["resnet_time_scale_shift"] == "scale_shift",
        "activation": c["act_fn"],
        "mid_scale": float(c["mid_block_scale_factor"]),
        "norm_groups": c["norm_num_groups"],
        "norm_epsilon": c["norm_eps"],
        "time_embedding": {"positional": "sinusoidal"}.get(c["time_embedding_type"], c["time_embedding_type"]),
        "time_channels": c["time_embedding_dim"] or None,
        "cosine_first": c["flip_sin_to_cos"],
        "frequency_shift": float(c["freq_shift"]),
        "divide_last": True,
        "num_timesteps": c["num_train_timesteps"] if c["time_embedding_type"] == "learned" else None,
        "class_embedding": "learned" if learned else c["class_embed_type"],
        "num_classes": c["num_class_embeds"] if learned else None,
        "center_input": c["center_input_sample"],
    }
    with refusing("config.json makes no valid UNet"):
        return UNetConfig(**fields)


def _mid_norm_groups(c: Mapping[str, Any]) -> int | None:
    """As `UNetConfig.mid_norm_groups`: with scale_shift the middle attention has no norm unless its groups are told."""
    if c["attn_norm_num_groups"] is None:
        return 0 if c["resnet_time_scale_shift"] == "scale_shift" else None
    return None if c["attn_norm_num_groups"] == c["norm_num_groups"] else c["attn_norm_num_groups"]


def _resamplings(blocks: Sequence[str], of_attention: str) -> tuple[str, ...]:
    kinds = tuple(
        of_attention if name.startswith("Attn") else "resnet" if name.startswith("Resnet") else "conv"
        for name in blocks
    )
    return kinds if len(set(kinds)) > 1 else kinds[:1] or ("conv",)


def unet_json(c: UNetConfig) -> dict[str, Any]:
    """The `config.json` of a network, the inverse of `unet_config`. Raises ConversionError with every misfit."""
    levels = range(len(c.channel_mults))
    head_dim, problems = _head_dim(c)
    problems += cannot_hold(c, _VARIES)
    if not c.widths[0] == c.channels == c.stem:
        problems.append(
            f"channels, stem and first level are {c.channels}, {c.stem} and {c.widths[0]} wide, there all equal"
        )
    if c.time_embedding == "noise_level":
        problems.append("time_embedding is 'noise_level', there t is embedded")
    if c.mid_norm_groups == 0 and not c.scale_shift:
        problems.append("mid_norm_groups is 0 without scale_shift; there the middle attention then has a norm")
    blocks, kinds = {}, {}
    for name, up in (("downsample", False), ("upsample", True)):
        steps = [c.resampling(level)[up] for level in levels[:-1]]
        if "pool" in steps:
            problems.append(f"{name} is {getattr(c, name)}, there conv or resnet")
        # the step between levels i and i + 1 belongs to the encoder's block i, and to the decoder's block i + 1
        of_level: list[str | None] = [None, *steps] if up else [*steps, None]
        attended = [c.has_attention(level, up=up) for level in levels]
        of_attention = {kind for kind, here in zip(of_level, attended, strict=True) if here and kind}
        if len(of_attention) > 1:
            problems.append(f"{name} is {getattr(c, name)} at levels with attention, there one {name}_type for all")
        kinds[name] = next(iter(sorted(of_attention)), "conv")
        word = "Up" if up else "Down"
        blocks[name] = [
            f"Attn{word}Block2D" if here else f"Resnet{word}sampleBlock2D" if kind == "resnet" else f"{word}Block2D"
            for kind, here in zip(of_level, attended, strict=True)
        ]
    refuse(problems)
    height, width = c.image_size
    groups = c.norm_groups if c.mid_norm_groups is None and c.scale_shift else c.mid_norm_groups or None
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": c.input_channels,
        "out_channels": c.out_channels,
        "center_input_sample": c.center_input,
        "time_embedding_type": {"sinusoidal": "positional"}.get(c.time_embedding, c.time_embedding),
        "time_embedding_dim": c.time_channels,
        "freq_shift": whole(c.frequency_shift),
        "flip_sin_to_cos": c.cosine_first,
        "down_block_types": blocks["downsample"],
        "mid_block_type": "UNetMidBlock2D" if c.middle else None,
        "up_block_types": blocks["upsample"][::-1],
        "block_out_channels": list(c.widths),
        "layers_per_block": c.num_res_blocks,
        "mid_block_scale_factor": whole(c.mid_scale),
        "downsample_padding": int(c.symmetric_padding),
        "downsample_type": kinds["downsample"],
        "upsample_type": kinds["upsample"],
        "dropout": 0.0,
        "act_fn": c.activation,
        "attention_head_dim": head_dim,
        "norm_num_groups": c.norm_groups,
        "attn_norm_num_groups": groups,
        "norm_eps": c.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if c.scale_shift else "default",
        "add_attention": c.mid_attention,
        "class_embed_type": None if c.class_embedding == "learned" else c.class_embedding,
        "num_class_embeds": c.num_classes,
        "num_train_timesteps": c.num_timesteps,
    }


# All but conv_shortcut, which there is always 1x1.
_VARIES = tuple(field.name for field in dataclasses.fields(UNetConfig) if field.name != "conv_shortcut")


def _head_dim(c: UNetConfig) -> tuple[int | None, list[str]]:
    """attention_head_dim, one for every attention; None: one head each. And why there is none that fits."""
    if c.head_channels is not None:
        return c.head_channels, []
    attended = [
        (width, c.heads(width, up=up)) for i, width in enumerate(c.widths) for up in (False, True)
        if c.has_attention(i, up=up)
    ]  # fmt: skip
    attended += [(c.widths[-1], c.heads(c.widths[-1]))] * (c.middle and c.mid_attention)
    if all(heads == 1 for _, heads in attended):
        return None, []
    sizes = sorted({width // heads for width, heads in attended})
    if len(sizes) == 1:
        return sizes[0], []
    return None, [f"the attentions' heads are {sizes} channels wide, there one attention_head_dim for all"]


# -- the scheduler ----------------------------------------------------------------------------------------------------

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
_SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "linspace_diffusers"}


def schedule_config(c: Mapping[str, Any]) -> ScheduleConfig:
    """The noise schedule of `scheduler_config.json`, checked by building it."""
    T, betas, zero = c["num_train_timesteps"], c["trained_betas"], c["rescale_betas_zero_snr"]
    if betas is not None and len(betas) != T:
        raise ConversionError(f"num_train_timesteps is {T}, but trained_betas holds {len(betas)} numbers")
    name = _SCHEDULES[c["beta_schedule"]]
    start, end = (None, None) if name == "cosine" else (c["beta_start"], c["beta_end"])
    config = ScheduleConfig(name, T, start, end, zero_terminal_snr=zero)
    if betas is not None:
        config = ScheduleConfig("betas", T, betas=betas, zero_terminal_snr=zero)
    return checked(config)


def sampler_config(told: Told, model: ModelConfig, schedule: ScheduleConfig) -> SamplerConfig:
    """DDIMPipeline's conventions with this scheduler. Raises ConversionError if it could not sample the model."""
    c, call = told.scheduler, told.call
    variance = c["variance_type"].removesuffix("_log")
    outputs = 2 if variance == "learned_range" else 1
    if model.out_channels != outputs * model.in_channels:
        raise ConversionError(
            f"in_channels is {model.in_channels} and out_channels {model.out_channels}: DDIM needs both equal, or "
            "twice as many out with variance_type learned_range, or more in than come out of x_t: an image's beside it"
        )
    T = schedule.num_train_timesteps
    sampler = SamplerConfig(
        spacing=_SPACINGS[c["timestep_spacing"]],
        num_steps=min(call["num_inference_steps"], T),
        eta=call["eta"],
        steps_offset=c["steps_offset"],
        set_alpha_to_one=c["set_alpha_to_one"],
        clip=c["clip_sample"],
        clip_range=(-c["clip_sample_range"], c["clip_sample_range"]),
        threshold_ratio=c["dynamic_thresholding_ratio"] if c["thresholding"] else None,
        threshold_max=c["sample_max_value"] if c["thresholding"] else 1.0,
        rederive_eps=call["use_clipped_model_output"],
        prediction_type=c["prediction_type"],
        variance=variance,
    )
    table = check_sampler(sampler, schedule)
    if getattr(model, "time_embedding", None) == "fourier" and 0 in table.t:
        raise ConversionError(
            "the sampler's defaults do not work: time_embedding_type fourier takes log t, and this spacing visits "
            "t = 0, where diffusers' samples are NaN too; --set timestep_spacing=trailing or --set steps_offset=1 "
            "avoids it"
        )
    return sampler


def wording(told: Told) -> Wording:
    """Those keys of the scheduler's file and of the pipeline's call that have an effect, as JSON spells them."""
    c = told.scheduler
    ends = () if c["beta_schedule"] == "squaredcos_cap_v2" else ("beta_start", "beta_end")
    betas = ("beta_schedule", *ends) if c["trained_betas"] is None else ("trained_betas",)
    bounds = {
        "thresholding": ("dynamic_thresholding_ratio", "sample_max_value"),
        "clip_sample": ("clip_sample_range",),
    }
    clipping = next((keys for switch, keys in bounds.items() if c[switch]), ())
    sampler = (
        *("timestep_spacing", *(["steps_offset"] if c["timestep_spacing"] == "leading" else []), "set_alpha_to_one"),
        *("prediction_type", "clip_sample", "thresholding", *clipping, "variance_type"),
    )
    call = {key: value for key, value in told.call.items() if key != "condition_first"}  # the network's
    return Wording(
        {key: shown(c[key]) for key in ("num_train_timesteps", *betas, "rescale_betas_zero_snr")},
        {key: shown(value) for key, value in {**{key: c[key] for key in sampler}, **call}.items()},
    )


def scheduler_json(metadata: Metadata) -> dict[str, Any]:
    """The `scheduler_config.json` of a checkpoint, the inverse of the two above. Raises ConversionError, as they do.

    Of class DDIMScheduler, except for the sigmoid schedule and learned variances, which only DDPMScheduler has.
    """
    s, config = metadata.sampler, metadata.schedule
    spacing, problems = _spacing(s, config.num_train_timesteps)
    low, high = s.clip_range
    if low != -high:
        problems.append(f"clip_range is {s.clip_range}, there -R..R")
    problems += scaled_t(s)
    if s.self_condition:
        problems.append("self_condition is True, there always False")
    refuse(problems)
    ancestral = config.name == "sigmoid" or s.variance == "learned_range"
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    known = config.name in names
    betas = noise_schedule(dataclasses.replace(config, zero_terminal_snr=False)).betas
    # A sigmoid's betas do not reach its ends; the other schedules' do.
    ends = (float(betas[0]), float(betas[-1])) if config.name != "sigmoid" else (1e-4, 0.02)
    ends = (1e-4, 0.02) if config.name == "cosine" or not known else ends
    start, end = (given if given is not None else end for given, end in zip(
        (config.beta_start, config.beta_end), ends, strict=True
    ))  # fmt: skip
    threshold = {} if s.threshold_ratio is None else {"dynamic_thresholding_ratio": s.threshold_ratio}
    call: dict[str, Any] = {"num_inference_steps": s.num_steps, "eta": s.eta}
    call |= {"use_clipped_model_output": s.rederive_eps}
    call |= {"condition_first": True} if metadata.model.condition_first else {}
    return {
        "_class_name": "DDPMScheduler" if ancestral else "DDIMScheduler",
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": names[config.name] if known else "linear",
        "trained_betas": None if known else betas.tolist(),
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "prediction_type": s.prediction_type,
        "clip_sample": s.clip,
        "clip_sample_range": high,
        "thresholding": s.threshold_ratio is not None,
        **{"dynamic_thresholding_ratio": 0.995, **threshold},
        "sample_max_value": s.threshold_max,
        "timestep_spacing": spacing,
        "steps_offset": s.steps_offset,
        "set_alpha_to_one": s.set_alpha_to_one,
        "variance_type": s.variance,
        "_jddim": call,
    }


def _spacing(s: SamplerConfig, T: int) -> tuple[str, list[str]]:
    """Diffusers' name for a spacing, and why it has none.

    Where S divides T, ermongroup's uniform is leading and the walk-through's linspace is trailing, to the timestep.
    """
    names = {ours: theirs for theirs, ours in _SPACINGS.items()}
    if s.spacing in names:
        return names[s.spacing], []
    like = {"uniform": "leading", "linspace": "trailing"}.get(s.spacing)
    if like is not None and T % s.num_steps == 0 and not s.steps_offset:
        return like, []
    also = f" (as {like} only where num_steps divides {T}; it is {s.num_steps})" if like else ""
    return "", [
        f"the spacing {s.spacing} visits other timesteps than diffusers' leading, trailing and linspace{also}; convert "
        "the source again with another default spacing"
    ]
