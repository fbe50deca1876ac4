"""lucidrains' denoising-diffusion-pytorch 2.x: its Trainer's `model-N.pt`, and what is inside one.

The Trainer saves {step, model, opt, ema, scaler, version}. `model` is a GaussianDiffusion's state dict: the noise
schedule in float32 buffers, and the Unet's tensors under `model.`; `ema` is ema_pytorch's, with a GaussianDiffusion
under `ema_model.` and the raw one again under `online_model.`. A GaussianDiffusion's or a Unet's own state dict is
read too. Buffers tell T, the schedule and the objective; shapes tell all of the network but a sinusoid's theta.
classifier_free_guidance.py's Unet, which has labels, is wired otherwise, and its GaussianDiffusion has other defaults.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jddim.checkpoint.metadata import Metadata
from jddim.config import LucidrainsConfig, SamplerConfig, ScheduleConfig
from jddim.ddim import largest_eta, step_table
from jddim.schedule import noise_schedule, schedule_config_from_betas
from jddim.timesteps import make_timesteps

from ..engine import ConversionError, refuse, refusing
from ..rules import Rules
from ..writers import save_torch, torch_tensors
from .base import Family, Plan, Source, Wording, of_wiring, scaled_t
from .tensors import Tensors, check_tensors, common_size, stripped
from .values import asking, boolean, integer, not_read, number, one_of, parse, sections, settling, sides

# -- the file ---------------------------------------------------------------------------------------------------------

_UNET_NAME = re.compile(
    r"(downs|ups)\.\d+\.[0-3]\.(block[12]\.proj|mlp\.1|to_qkv|mem_kv|fn\.)|mid_(block[12]|attn)\.|final_res_block\."
)
_NULL = "null_classes_emb"


def recognise(state: Mapping[Any, Any]) -> bool:
    """A 2-d Unet's state dict, or a diffusion's around one; what of them cannot be converted, `open_source` says.

    A Unet alone under a prefix is not a diffusion's, unless t's features are learned: the source's two that hold no
    betas, ContinuousTimeGaussianDiffusion (`model.`) and ElucidatedDiffusion (`net.`), take no other Unet.
    """
    names = {str(name) for name in state}
    diffusions = {"model.": {"betas", "alphas_cumprod", "model.time_mlp.0.weights"}, "net.": {"net.time_mlp.0.weights"}}
    prefixes = ["", *(prefix for prefix, marks in diffusions.items() if marks & names)]
    return any(
        sum(name.startswith(prefix) and bool(_UNET_NAME.match(name, len(prefix))) for name in names) >= 4
        for prefix in prefixes
    )


def open_source(state: Mapping[Any, Any], file_name: str) -> Source:
    """The Unet's tensors under their names in it, and GaussianDiffusion's buffers."""
    if reason := _not_ours(state):
        raise ConversionError(f"{file_name} {reason}")
    check_tensors(state, file_name)
    return Source(stripped(state, "model.", file_name))


def _not_ours(state: Mapping[Any, Any]) -> str | None:
    """What else of the same repository a state dict is, and why it is not converted."""
    names = [str(name) for name in state]
    if any(name.startswith("net.") for name in names):
        return "is an ElucidatedDiffusion, whose sampler is Karras et al.'s and not DDIM; not supported"
    labelled = any(re.search(r"(^|\.)(classes_(emb|mlp)\.|null_classes_emb$)", name) for name in names)
    if not labelled and any(".2.fn." in name for name in names):
        return (
            "is a Unet of guided_diffusion.py or a version before 2.0 (its attention is under `.2.fn.`); only "
            "denoising_diffusion_pytorch.py and classifier_free_guidance.py of 2.x are supported"
        )
    if any(re.search(r"\.block1\.(norm\.weight$|block\.\d)", name) for name in names):
        return "is of denoising-diffusion-pytorch 0.x or 1.x, whose blocks have group norms; only 2.x is supported"
    if any(name.endswith("init_conv.weight") and np.ndim(value) == 3 for name, value in state.items()):
        return "is a Unet1D, a network of sequences and not of images; not supported"
    if any(name.startswith("model.") for name in names) and not any(
        name in ("betas", "alphas_cumprod") for name in names
    ):
        return (
            "wraps a Unet in something that has no betas (ContinuousTimeGaussianDiffusion?); if the Unet was trained "
            "with discrete timesteps, save its own state_dict() and say the rest by --set"
        )
    return None


# -- what only the user can tell --------------------------------------------------------------------------------------

SETTINGS = {
    "image_size": "side of the training images in pixels, or HEIGHTxWIDTH, or (height, width)",
    "objective": "pred_noise, pred_x0 or pred_v (checked against the buffer loss_weight where there is one)",
    "timesteps": "T (checked against the buffers)",
    "beta_schedule": "linear, cosine or sigmoid (checked against the buffers)",
    "sampling_timesteps": "default number of steps",
    "ddim_sampling_eta": "default eta",
    "auto_normalize": "true: the model works on images in [-1, 1]",
    "sinusoidal_pos_emb_theta": "base of the sinusoidal embedding's frequencies",
    "dim": "base width (checked against the tensors)",
    "init_dim": "the stem's width (checked against the tensors)",
    "out_dim": "channels of the output (checked against the tensors)",
    "dim_mults": "list of width multipliers (checked against the tensors)",
    "channels": "channels of the images (checked against the tensors)",
    "self_condition": "whether the network takes the last step's x0 (checked against the tensors)",
    "learned_variance": "whether half of the output is a variance (checked against the tensors)",
    "learned_sinusoidal_cond": "whether t's frequencies are learned (the tensors tell: learned or random)",
    "random_fourier_features": "whether t's frequencies are random (the tensors tell: learned or random)",
    "learned_sinusoidal_dim": "learned or random features of t (checked against the tensors)",
    "attn_dim_head": "a head's channels, one for all levels or one each (checked against the tensors)",
    "attn_heads": "heads, one for all levels or one each (checked against the tensors)",
    "num_classes": "classes of classifier_free_guidance.py's (checked against the tensors)",
    "cond_drop_prob": "how often a label was dropped in training; without effect on sampling",
    "full_attn": "full or linear attention, one for all levels or one each (checked against the tensors)",
}

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
BETA_SCHEDULES = ("linear", "cosine", "sigmoid")


def _each(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One value, or a tuple of one for each level."""
    return lambda value: tuple(map(parse, value)) if isinstance(value, (tuple, list)) else parse(value)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "image_size": sides,
    "objective": one_of(*OBJECTIVES),
    "beta_schedule": one_of(*BETA_SCHEDULES),
    **dict.fromkeys(("timesteps", "sampling_timesteps", "dim", "init_dim", "out_dim", "channels"), integer),
    **dict.fromkeys(("learned_sinusoidal_dim", "num_classes"), integer),
    "cond_drop_prob": number,
    **dict.fromkeys(("ddim_sampling_eta", "sinusoidal_pos_emb_theta"), number),
    **dict.fromkeys(("auto_normalize", "self_condition", "learned_variance"), boolean),
    **dict.fromkeys(("learned_sinusoidal_cond", "random_fourier_features"), boolean),
    **dict.fromkeys(("dim_mults", "attn_dim_head", "attn_heads"), _each(integer)),
    "full_attn": _each(boolean),
}


def read_settings(config: Mapping[str, Any] | None, given: Mapping[str, str]) -> dict[str, Any]:
    """--set's values over those of a config file, which has the same names, flat or in sections (the source has none).

    Raises ConversionError for unknown or bad ones, all in one message.
    """
    found, _, problems = sections(config, SETTINGS)
    filed = {key: value for key, value in found.items() if key not in given}
    parsed, refused = parse({"config": filed, "--set": {k: _literal(v) for k, v in given.items()}}, _PARSERS)
    refuse(problems + refused)
    return parsed


def _literal(text: str) -> Any:
    """A Python literal as the source's callers write it: 64, 1,2,4, (64, 48), True; else the text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


# -- what the tensors tell --------------------------------------------------------------------------------------------


def infer(tensors: Tensors) -> dict[str, Any]:
    """The Unet's arguments, under the source's names, but theta; full_attn, attn_heads, attn_dim_head for each level.

    Facts are taken from several tensors each, by majority, so that one missing, misshapen or stray tensor is reported
    as such and not as a different network. Raises ConversionError where too few are there.
    """

    def votes(pattern: str, axis: int, divide: int = 1) -> int:
        if (size := common_size(tensors, pattern, axis, divide)) is None:
            raise ConversionError(f"too few tensors of the Unet are there to tell its shape (none named {pattern})")
        return size

    found = Counter(int(m.group(2)) for name in tensors if (m := re.match(r"(downs|ups)\.(\d+)\.", name)))
    levels = sum(count >= 20 for count in found.values())  # a level has about 50 tensors, in `downs` and `ups` together
    if not levels or any(found[level] < 20 for level in range(levels)):
        raise ConversionError("too few tensors of the Unet are there to tell its shape; is the file whole?")
    labelled = sum(name == _NULL or bool(re.match(r"classes_(emb|mlp)\.", name)) for name in tensors) >= 3
    of_labels = r"|classes_mlp\.[02]\.bias" if labelled else r"|.*\.mlp\.1\.weight"  # these are told labels beside t
    dim = votes(rf"time_mlp\.[13]\.bias{of_labels}", -1, 4)
    if not dim:
        raise ConversionError("the time MLP has no width; is the file whole?")
    widths = [
        votes(rf"(ups\.{levels - 1 - i}\.[01]\.|downs\.{i + 1}\.[01]\.)block[12]\.proj\.bias", 0) for i in range(levels)
    ]
    if odd := [width for width in widths if width % dim]:
        raise ConversionError(f"the levels' widths {widths} are not multiples of the time MLP's dim = {dim}: {odd}")
    places = [(f"downs.{i}.2", f"ups.{levels - 1 - i}.2") for i in range(levels)]
    attentions = [(False, *_HEADS) if labelled else _attention(tensors, each) for each in places]
    features = votes(r"time_mlp\.1\.weight", 1) if "time_mlp.1.weight" in tensors else dim
    learned = "time_mlp.0.weights" in tensors or features != dim
    return {
        "dim": dim,
        "init_dim": votes(r"init_conv\.bias|(final_res_block|downs\.0\.[01])\.block[12]\.proj\.bias", 0),
        "dim_mults": tuple(width // dim for width in widths),
        "full_attn": tuple(full for full, _, _ in attentions),
        "attn_heads": tuple(heads for _, heads, _ in attentions),
        "attn_dim_head": tuple(width for _, _, width in attentions),
        "num_mem_kv": 0 if labelled else _memory(tensors, levels, [full for full, _, _ in attentions]),
        "num_classes": votes(r"classes_emb\.weight", 0) if labelled else None,
        "attended": common_size(tensors, r"mid_attn\.fn\.fn\.to_qkv\.weight", 0, 3),
        "learned_sinusoidal_dim": features - 1 if learned else None,
        **_ends(tensors),
    }


_HEADS = (4, 32)
"""Of classifier_free_guidance.py's attentions: heads, channels of each."""


def _attention(tensors: Tensors, places: Iterable[str]) -> tuple[bool, int, int]:
    """(full, heads, channels of a head) of a level's two attentions, which are alike in the source."""
    linear = full = 0
    shapes: Counter[tuple[int, int]] = Counter()
    for place in places:
        linear += sum(name in tensors for name in (f"{place}.to_out.0.weight", f"{place}.to_out.0.bias"))
        full += sum(name in tensors for name in (f"{place}.to_out.weight", f"{place}.to_out.bias"))
    for place in places:
        memory, qkv = tensors.get(f"{place}.mem_kv"), tensors.get(f"{place}.to_qkv.weight")
        if memory is None or memory.ndim != 4:
            continue
        heads, width = memory.shape[1], memory.shape[3 if full > linear else 2]
        shapes[heads, width] += 1 + (qkv is not None and qkv.ndim > 0 and qkv.shape[0] == 3 * heads * width)
    if not shapes or full == linear:
        raise ConversionError(f"too few tensors of the attentions {' and '.join(places)} are there to tell their kind")
    (heads, width), _ = shapes.most_common(1)[0]
    return full > linear, heads, width


def _memory(tensors: Tensors, levels: int, full: list[bool]) -> int:
    """How many learned keys and values every attention has: by majority."""
    places = {f"downs.{i}.2": full[i] for i in range(levels)} | {
        f"ups.{levels - 1 - i}.2": full[i] for i in range(levels)
    }
    counts: Counter[int] = Counter(
        memory.shape[2 if is_full else 3]
        for place, is_full in {**places, "mid_attn": True}.items()
        if (memory := tensors.get(f"{place}.mem_kv")) is not None and memory.ndim == 4
    )
    return counts.most_common(1)[0][0]


def _ends(tensors: Tensors) -> dict[str, Any]:
    """channels, out_dim, self_condition, learned_variance: from the channels at both ends.

    Equal: a plain Unet. Twice as many in: self-conditioned. Twice as many out: a learned variance. The source refuses
    to have both at once, which would look like the first.
    """
    stem, out = tensors.get("init_conv.weight"), tensors.get("final_conv.weight")
    bias = tensors.get("final_conv.bias")
    taken = [stem.shape[1]] if stem is not None and stem.ndim > 1 else []
    given = [end.shape[0] for end in (out, bias) if end is not None and end.ndim]
    ratios = {(1, 1): (False, False), (2, 1): (True, False), (1, 2): (False, True)}
    for c_in in taken or given:
        for c_out in given or [c_in]:
            for (times_in, times_out), (self_condition, learned_variance) in ratios.items():
                if c_in * times_out == c_out * times_in:
                    channels = c_in // times_in
                    ends = {"channels": channels, "out_dim": c_out, "self_condition": self_condition}
                    return {**ends, "learned_variance": learned_variance}
    raise ConversionError(
        f"init_conv takes {taken or '(missing)'} channels and final_conv gives {given or '(missing)'}; a "
        "GaussianDiffusion's Unet has as many of both, or twice as many of one (self_condition, learned_variance)"
    )


def _objective(tensors: Tensors) -> str | None:
    """The objective that the buffer loss_weight belongs to, or None if it belongs to none, or to several.

    The weight is the signal-to-noise ratio, clipped with min_snr_loss_weight, over what the loss is measured in: over
    snr for pred_noise, 1 for pred_x0, snr + 1 for pred_v.
    """
    weight, alpha_bar = tensors.get("loss_weight"), tensors.get("alphas_cumprod")
    if weight is None or alpha_bar is None or weight.ndim != 1 or weight.shape != alpha_bar.shape:
        return None
    weight, alpha_bar = weight.astype(np.float64), alpha_bar.astype(np.float64)
    with np.errstate(all="ignore"):
        snr = alpha_bar / (1 - alpha_bar)
        found = []
        for objective, unit in (("pred_noise", snr), ("pred_x0", np.ones_like(snr)), ("pred_v", snr + 1)):
            clipped = weight * unit
            # 1 - alpha_bar is known to 6e-8 only, where it is 1e-4 or less
            if np.allclose(clipped, np.minimum(snr, clipped.max()), rtol=1e-2, atol=0):
                found.append(objective)
    return found[0] if len(found) == 1 else None


def _schedule(tensors: Tensors) -> tuple[ScheduleConfig, str | None]:
    """The schedule of the buffers, and its name in the source; None where they are not one of the source's."""
    betas, alpha_bar = (np.asarray(tensors[name]) for name in ("betas", "alphas_cumprod"))
    if betas.ndim != 1 or betas.shape != alpha_bar.shape or not betas.size:
        raise ConversionError(
            f"the buffers betas {betas.shape} and alphas_cumprod {alpha_bar.shape} are not two lists of T"
        )
    T = len(betas)
    for name in BETA_SCHEDULES:
        config = _source_schedule(name, T)
        if (ours := _built(config)) is None:
            continue
        # A schedule's float64 numbers, rounded as the buffers are; two roundings are for another machine's libm.
        rtol = 2 * float(np.finfo(betas.dtype if betas.dtype.kind == "f" else np.float32).eps)
        pairs = ((ours.betas, betas), (ours.alphas_cumprod, alpha_bar))
        if all(np.allclose(mine.astype(theirs.dtype), theirs, rtol=rtol, atol=0) for mine, theirs in pairs):
            return config, name
    # alphas_cumprod is all that DDIM uses, and float32 betas do not give it back where 1 - beta is small.
    previous = np.concatenate([[1.0], alpha_bar[:-1].astype(np.float64)])
    config = schedule_config_from_betas(list(1 - alpha_bar.astype(np.float64) / previous))
    with refusing("the buffer alphas_cumprod is no noise schedule"):
        noise_schedule(config)
    return config, None


def _source_schedule(name: str, T: int) -> ScheduleConfig:
    """The source's schedule of this name."""
    if name == "linear":
        return ScheduleConfig("linear", T, 1000 / T * 1e-4, 1000 / T * 0.02)
    return ScheduleConfig({"sigmoid": "sigmoid_alpha_bar"}.get(name, name), T)


def _built(config: ScheduleConfig) -> Any:
    try:
        return noise_schedule(config)
    except ValueError:
        return None


# -- the plan ---------------------------------------------------------------------------------------------------------


def plan(tensors: Tensors, config: Mapping[str, Any] | None, given: Mapping[str, str]) -> Plan:
    """The model, schedule and sampler of these tensors, with what --set adds, and what is assumed."""
    told = read_settings(config, given)
    found = infer({name: value for name, value in tensors.items() if name not in _BUFFERS})
    assumed: list[str] = []
    settle = settling(told, assumed)
    problems = _contradictions(told, found)

    if not told.get("auto_normalize", True):
        problems.append(
            "auto_normalize=False is a model of images in [0, 1]; jddim's images are [-1, 1], so its samples would be "
            "wrong by a shift"
        )
    if told.get("self_condition") and told.get("learned_variance"):
        problems.append("self_condition and learned_variance together: the source has no sampler for such a Unet")
    classes = found["num_classes"]
    if classes is not None:
        problems += _of_labelled(found)
        problems += [f"missing {_NULL}, the null label's embedding"] if _NULL not in tensors else []
    if "betas" in tensors and "alphas_cumprod" in tensors:
        schedule, name = _schedule(tensors)
        T = schedule.num_train_timesteps
        if told.get("timesteps", T) != T:
            problems.append(f"timesteps is {told['timesteps']} by --set, but {T} in the buffers")
        if told.get("beta_schedule", name) != name:
            actual = name or "none of the source's"
            problems.append(f"beta_schedule is {told['beta_schedule']} by --set, but {actual} in the buffers")
        if name is None:
            assumed.append("schedule: explicit betas, from the buffer alphas_cumprod (no schedule of the source's)")
    else:
        T = settle("timesteps", 1000, "GaussianDiffusion's default")
        name = settle("beta_schedule", "sigmoid" if classes is None else "cosine", "GaussianDiffusion's default")
        schedule = _source_schedule(name, max(T, 1))
        if T < 1 or _built(schedule) is None:
            problems.append(f"timesteps={T} makes no {name} schedule")
    read = _objective(tensors)
    objective = _settle_objective(read, found, told, assumed, problems)
    settle("auto_normalize", True, "GaussianDiffusion's default")
    theta = 10000.0
    if found["learned_sinusoidal_dim"] is None and classes is None:
        theta = settle("sinusoidal_pos_emb_theta", 10000.0, "Unet's default")
    steps = settle("sampling_timesteps", min(250, T), "the README's example" if T > 250 else "T")
    eta = settle("ddim_sampling_eta", 0.0 if classes is None else 1.0, "GaussianDiffusion's default")
    if not 1 <= steps <= T:
        problems.append(f"sampling_timesteps={steps} must lie in 1..{T}")
    elif _built(schedule) is not None:
        limit = largest_eta(step_table(noise_schedule(schedule), make_timesteps("linspace", T, steps)))
        if not 0 <= eta <= limit:
            problems.append(f"ddim_sampling_eta={eta:g} must lie in 0..{limit:.4g} for this table of steps")
    untold = ["image_size", "auto_normalize"]
    untold += [] if "betas" in tensors and "alphas_cumprod" in tensors else ["timesteps", "beta_schedule"]
    untold += ["objective"] if read is None else []
    untold += ["sinusoidal_pos_emb_theta"] if found["learned_sinusoidal_dim"] is None and classes is None else []
    missing = {}
    if "image_size" not in told:
        missing["image_size=SIDE"] = "the tensors do not tell the image size; --set image_size=64"
    refuse([*problems, *missing.values()], () if problems else asking(untold, told, missing))

    with refusing("the tensors and settings make no valid Unet"):
        model = _model(found, told["image_size"], theta)
    sampler = SamplerConfig(
        spacing="linspace",
        num_steps=steps,
        eta=eta,
        clip=True,
        # LearnedGaussianDiffusion's model_predictions keeps the network's eps beside the clipped x0, and so does
        # classifier_free_guidance.py's.
        rederive_eps=not found["learned_variance"] and (classes is None or objective != "pred_noise"),
        prediction_type=OBJECTIVES[objective],
        self_condition=found["self_condition"],
        variance="learned_range" if found["learned_variance"] else "fixed_small",
    )
    ignored = {name: reason for name, reason in _BUFFERS.items() if name in tensors}
    ignored |= {
        name: "an attention without memory"
        for name, value in tensors.items()
        if name.endswith(".mem_kv") and not value.size
    }
    implied = {}
    if classes is not None and _NULL in tensors:
        ignored[_NULL] = "kept as the last row of classes_emb"
        with refusing(f"{_NULL} is no row of classes_emb"):
            implied["classes_emb.weight"] = np.concatenate([tensors["classes_emb.weight"], tensors[_NULL][None]])
    wording = Wording(
        {"beta_schedule": name or "(none of the source's)", "timesteps": str(T)},
        {
            "objective": objective,
            "sampling_timesteps": str(steps),
            "ddim_sampling_eta": str(eta),
            "auto_normalize": "True",
            **{key: str(found[key]) for key in ("self_condition", "learned_variance")},
        },
    )
    notes = (*_notes(found, steps, T), *not_read(sections(config, SETTINGS)[1]))
    return Plan(
        *(model, schedule, sampler, rules(model), ignored, tuple(assumed), notes),
        asks=asking(untold, told),
        unchecked=tuple(key for key in given if key in untold),
        wording=wording,
        implied=implied,
        null_label=classes,
    )


def _of_labelled(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with a Unet of classifier_free_guidance.py."""
    heads, width = _HEADS
    problems = [
        f"{key}: classifier_free_guidance.py has no sampler for such a Unet"
        for key in ("self_condition", "learned_variance")
        if found[key]
    ]
    if found["attended"] not in (None, heads * width):
        problems.append(
            f"its middle attention has {found['attended']} channels, and no tensor tells their heads; "
            f"jddim reads the source's default, {heads} heads of {width}"
        )
    return problems


def _notes(found: Mapping[str, Any], steps: int, T: int) -> tuple[str, ...]:
    """Where the source itself would not run DDIM."""
    notes = []
    if found["num_classes"] is not None:
        notes.append(
            "the source samples with cond_scale 6: --guidance projected --guidance-scale 6 --guidance-rescale 0.7"
        )
    if found["learned_variance"]:
        notes.append("LearnedGaussianDiffusion's ddim_sample fails by a missing import; jddim does what it says")
    if found["learned_sinusoidal_dim"] is not None:
        notes.append("GaussianDiffusion refuses a Unet with learned or random features of t; t is given as 0..T-1")
    if steps == T:
        notes.append("with sampling_timesteps = timesteps the source samples ancestrally (sample --method ddpm)")
    return tuple(notes)


def _model(found: Mapping[str, Any], image_size: tuple[int, int], theta: float) -> LucidrainsConfig:
    features = found["learned_sinusoidal_dim"]
    return LucidrainsConfig(
        image_size=image_size,
        in_channels=found["channels"],
        out_channels=found["out_dim"],
        self_condition=found["self_condition"],
        channels=found["dim"],
        channel_mults=found["dim_mults"],
        stem_channels=found["init_dim"],
        full_attention=found["full_attn"],
        num_heads=found["attn_heads"],
        head_channels=found["attn_dim_head"],
        memory=found["num_mem_kv"],
        time_embedding="sinusoidal" if features is None else "learned",
        theta=theta,
        num_classes=None if found["num_classes"] is None else found["num_classes"] + 1,
        strided=found["num_classes"] is not None,
        **({} if features is None else {"time_features": features}),
    )


def _contradictions(told: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Each --set value that the tensors contradict."""
    problems = []
    levels = len(found["dim_mults"])
    for key in (
        "dim",
        "init_dim",
        "out_dim",
        "dim_mults",
        "channels",
        "self_condition",
        "learned_variance",
        "num_classes",
    ):
        if key in told and told[key] != found[key]:
            problems.append(f"{key} is {told[key]} by --set, but {found[key]} in the tensors")
    for key in ("attn_heads", "attn_dim_head", "full_attn"):
        value = told.get(key)
        if value is False:  # as in the source, where full_attn=False means its default
            value = (*[False] * (levels - 1), True)
        if value is not None and (value if isinstance(value, tuple) else (value,) * levels) != found[key]:
            problems.append(f"{key} is {told[key]} by --set, but {found[key]} in the tensors")
    features = found["learned_sinusoidal_dim"]
    kinds = [told[key] for key in ("learned_sinusoidal_cond", "random_fourier_features") if key in told]
    if any(kinds) and features is None:
        problems.append("--set says that t's features are learned or random, but the tensors have a sinusoid's shapes")
    if len(kinds) == 2 and not any(kinds) and features is not None:
        problems.append("--set says that t's features are a sinusoid, but the tensors have learned or random ones")
    if features is not None and told.get("learned_sinusoidal_dim", features) != features:
        problems.append(
            f"learned_sinusoidal_dim is {told['learned_sinusoidal_dim']} by --set, but {features} in the tensors"
        )
    return problems


def _settle_objective(
    read: str | None, found: Mapping[str, Any], told: Mapping[str, Any], assumed: list[str], problems: list[str]
) -> str:
    """The objective that DDIM goes by."""
    asked = told.get("objective")
    if found["learned_variance"]:
        # LearnedGaussianDiffusion trains to predict noise whatever its objective, and knows no pred_v in DDIM.
        if asked is None and read == "pred_v":
            assumed.append("objective = pred_noise (what a learned variance is trained with; loss_weight says pred_v)")
            return "pred_noise"
        return asked or read or "pred_noise"
    if read is not None and asked not in (None, read):
        problems.append(f"objective is {asked} by --set, but loss_weight is {read}'s")
    default = "pred_v" if found["num_classes"] is None else "pred_noise"
    if asked is None and read is None:
        assumed.append(f"objective = {default} (GaussianDiffusion's default)")
    return asked or read or default


# -- names ------------------------------------------------------------------------------------------------------------

_DERIVED = "computed from betas, as jddim does itself"
_BUFFERS = {
    "betas": "read: the schedule",
    "alphas_cumprod": "read: the schedule",
    "loss_weight": "read: the objective",
    "alphas_cumprod_prev": _DERIVED,
    "sqrt_alphas_cumprod": _DERIVED,
    "sqrt_one_minus_alphas_cumprod": _DERIVED,
    "log_one_minus_alphas_cumprod": _DERIVED,
    "sqrt_recip_alphas_cumprod": _DERIVED,
    "sqrt_recipm1_alphas_cumprod": _DERIVED,
    "posterior_variance": _DERIVED,
    "posterior_log_variance_clipped": _DERIVED,
    "posterior_mean_coef1": _DERIVED,
    "posterior_mean_coef2": _DERIVED,
}

_BLOCK = {
    "mlp.1": "time_proj",
    "block1.proj": "conv1",
    "block1.norm": "norm1",
    "block2.proj": "conv2",
    "block2.norm": "norm2",
    "res_conv": "shortcut",
}
# `mem_kv` is the attention's own. `to_out` is full attention's output; `to_out.{0,1}` linear attention's, with a norm.
_ATTENTION = {"norm": "norm", "to_qkv": "qkv", "to_out": "out", "to_out.0": "out_proj", "to_out.1": "out_norm"}
_BLOCKS = {"mid_block1": "mid.block_1", "mid_block2": "mid.block_2", "final_res_block": "block_out"} | {
    f"{theirs}.{{i}}.{j}": f"{ours}.{{i}}.block_{j + 1}"
    for theirs, ours in (("downs", "down"), ("ups", "up"))
    for j in (0, 1)
}
_ATTENTIONS = {"downs.{i}.2": "down.{i}.attention", "ups.{i}.2": "up.{i}.attention", "mid_attn": "mid.attention"}


def rules(config: LucidrainsConfig) -> Rules:
    """The rename table; a network with classes has its attentions, and what comes before them, under other names."""
    labelled = config.num_classes is not None
    of_attention = {"fn.norm" if x == "norm" else f"fn.fn.{x}": y for x, y in _ATTENTION.items()}
    return {
        **({"classes_emb": "class_embed", "classes_mlp.0": "class_mlp.linear_1"} if labelled else {}),
        **({"classes_mlp.2": "class_mlp.linear_2"} if labelled else {}),
        "init_conv": "conv_in",
        "time_mlp.0": "time_features",
        "time_mlp.1": "time_embed.linear_1",
        "time_mlp.3": "time_embed.linear_2",
        "downs.{i}.3.1": "down.{i}.resample.proj",
        "downs.{i}.3": "down.{i}.resample",
        "ups.{i}.3.1": "up.{i}.resample.conv",
        "ups.{i}.3": "up.{i}.resample",
        "final_conv": "conv_out",
        **_ATTENTIONS,
        **{f"{a}.{x}": f"{b}.{y}" for a, b in _BLOCKS.items() for x, y in _BLOCK.items()},
        **{
            f"{a}.{x}": f"{b}.{y}"
            for a, b in _ATTENTIONS.items()
            for x, y in (of_attention if labelled else _ATTENTION).items()
        },
    }


def reference(config: LucidrainsConfig) -> Any:
    """The PyTorch reference of this config, whose parameters have the source's names."""
    from ..reference.lucidrains_unet import LucidrainsUNet

    return LucidrainsUNet(
        dim=config.channels,
        init_dim=config.stem,
        out_dim=config.out_channels,
        dim_mults=config.channel_mults,
        channels=config.in_channels,
        self_condition=config.self_condition,
        full_attn=config.full_attention,
        attn_heads=config.num_heads,
        attn_dim_head=config.head_channels,
        num_mem_kv=config.memory,
        learned_sinusoidal_dim=config.time_features if config.time_embedding == "learned" else None,
        sinusoidal_pos_emb_theta=config.theta,
        num_classes=config.num_classes,
    )


# -- back -------------------------------------------------------------------------------------------------------------


def write_trainer(metadata: Metadata, params: Tensors, path: Path) -> None:
    """One file as the Trainer saves and loads it. Raw and EMA weights are equal; the optimizer is untrained."""
    config, problems = of_wiring(metadata.model, LucidrainsConfig), []
    if config.num_classes is not None:
        problems.append("classifier_free_guidance.py has no Trainer; use lucidrains-unet")
    if config.time_embedding == "learned":
        problems.append("GaussianDiffusion refuses a Unet with learned or random features of t; use lucidrains-unet")
    if metadata.schedule.zero_terminal_snr:
        problems.append("the schedule ends at alpha_bar = 0, which GaussianDiffusion divides by")
    problems += scaled_t(metadata.sampler)
    refuse(problems)
    objective = next(name for name, kind in OBJECTIVES.items() if kind == metadata.sampler.prediction_type)
    unet = torch_tensors(params, rules(config), lambda: reference(config))
    diffusion = buffers(metadata.schedule, objective) | {f"model.{name}": value for name, value in unet.items()}
    step = metadata.provenance.get("step") or 0
    ema = {"initted": np.array(True), "step": np.array(step)}
    ema |= {f"{kind}.{name}": value for kind in ("online_model", "ema_model") for name, value in diffusion.items()}
    contents = {"step": step, "model": diffusion, "opt": _fresh_adam(len(unet)), "ema": ema, "scaler": None}
    save_torch({**contents, "version": "2.3.1"}, path)


def write_unet(metadata: Metadata, params: Tensors, path: Path) -> None:
    """One file, the Unet's own state dict."""
    config = of_wiring(metadata.model, LucidrainsConfig)
    tensors = torch_tensors(params, rules(config), lambda: reference(config))
    if config.num_classes is not None:
        tensors["classes_emb.weight"], tensors[_NULL] = np.split(tensors["classes_emb.weight"], [-1])
        tensors[_NULL] = tensors[_NULL][0]
    save_torch(tensors, path)


def buffers(schedule: ScheduleConfig, objective: str) -> dict[str, np.ndarray]:
    """GaussianDiffusion's buffers `(T,)`, computed in float64 and rounded to float32 as there; no min-SNR clipping."""
    built = noise_schedule(schedule)
    betas, alpha_bar = built.betas, built.alphas_cumprod
    previous = np.concatenate([[1.0], alpha_bar[:-1]])
    variance = betas * (1 - previous) / (1 - alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    values = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "log_one_minus_alphas_cumprod": np.log(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alpha_bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
        "loss_weight": {"pred_noise": np.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}[objective],
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def _fresh_adam(count: int) -> dict[str, Any]:
    """The state dict of the Trainer's Adam before its first step, for `count` parameters."""
    group = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
    group |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
    return {"state": {}, "param_groups": [{**group, "params": list(range(count))}]}


FAMILY = Family(
    name="lucidrains",
    title="lucidrains (denoising-diffusion-pytorch 2.x)",
    recognise=recognise,
    open_source=open_source,
    plan=plan,
    reference=reference,
    settings=SETTINGS,
    buffers=frozenset(_BUFFERS),
    pointwise=dict.fromkeys(("res_conv", "to_qkv", "to_out", "to_out.0", "3.1", "final_conv"), 2),
    formats={"lucidrains": write_trainer, "lucidrains-unet": write_unet},
)
