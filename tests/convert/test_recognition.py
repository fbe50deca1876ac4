"""convert.recognition: each family under each wrapper, and what only looks like one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny

pytest.importorskip("torch", reason="the families' names and shapes are PyTorch's: pip install 'jddim[convert]'")

import lucidrains_files
import named
from lucidrains_files import COSINE, diffusion, draw

from convert.engine import ConversionError, fill
from convert.families import (
    FAMILIES,
    Source,
    consistency,
    diffusers,
    diffusers_dit,
    dit,
    monai,
    openai,
    palette,
    pytorch_ddpm,
    score_sde,
)
from convert.families import diffusers_config as configs
from convert.recognition import as_asked, recognise
from convert.writers import state_shapes
from jddim.config import DiTConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

State = dict[str, np.ndarray]

DIFFUSERS: dict[str, Any] = {
    **{"sample_size": 6, "in_channels": 1, "out_channels": 1, "block_out_channels": [6], "norm_num_groups": 2},
    **{"layers_per_block": 1, "down_block_types": ["AttnDownBlock2D"], "up_block_types": ["UpBlock2D"]},
    "attention_head_dim": 3,
}
OPENAI = UNetConfig(
    **{"image_size": (6, 10), "in_channels": 1, "out_channels": 1, "channels": 6, "channel_mults": (1,)},
    **{"num_res_blocks": 1, "attention_levels": (0,), "norm_groups": 2, "num_heads": 2, "scale_shift": True},
    **openai._FIXED,
)
LUCIDRAINS = lucidrains_files.small_config(
    channel_mults=(2,), full_attention=(True,), num_heads=(2,), head_channels=(3,)
)
PYTORCH_DDPM = UNetConfig(
    **{"image_size": (6, 10), "channels": 6, "channel_mults": (1,), "num_res_blocks": 1, "attention_levels": (0,)},
    **{"norm_groups": 2, "time_embedding": "learned", "num_timesteps": 11},
)
MONAI = UNetConfig(
    **{"image_size": (6, 10), "in_channels": 1, "out_channels": 1, "channels": 6, "channel_mults": (1,)},
    **{"num_res_blocks": 1, "attention_levels": (0,), "norm_groups": 2},
)
SCORE_SDE = UNetConfig(
    **{"image_size": (6, 10), "in_channels": 1, "out_channels": 1, "channels": 32, "channel_mults": (1,)},
    **{"num_res_blocks": 1, "attention_levels": (0,), "up_attention_last": True},
)
DIT = DiTConfig((6, 10), channels=8, depth=1, num_heads=2, num_classes=3)
PALETTE = dataclasses.replace(
    OPENAI, condition_channels=2, condition_first=True, time_embedding="noise_level", num_timesteps=7
)
SCHEDULE = {"schedule": "linear", "n_timestep": "7", "linear_start": "0.01", "linear_end": "0.3"}
MONAIS = {"image_size": "6x10", "num_head_channels": "3", "norm_num_groups": "2"}
FLAGS = {"image_size": "6x10", "num_heads": "2", "norm_groups": "2"}


def drawn(module: ModuleType, config: Any, seed: int, **options: Any) -> State:
    rng = np.random.default_rng(seed)
    shapes = state_shapes(lambda: module.reference(config, **options))
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def diffusers_state(seed: int) -> State:
    return drawn(diffusers, configs.unet_config(configs.read_configs({"unet": DIFFUSERS}, {})), seed)


def palette_state(seed: int) -> State:
    drawn_state = drawn(palette, PALETTE, seed, use_new_attention_order=False)
    return {name: value for name, value in drawn_state.items() if name != "noise_level.weight"}  # the schedule's


# name of a case -> the family, a state dict by seed, the config and settings that its plan needs
CASES: dict[str, tuple[str, Callable[[int], State], Any, dict[str, str]]] = {
    "ho": ("ho", lambda seed: tiny.arrays(seed=seed), None, tiny.SETTINGS),
    "diffusers": ("diffusers", diffusers_state, {"unet": DIFFUSERS}, {}),
    "openai": ("openai", lambda seed: drawn(openai, OPENAI, seed, use_new_attention_order=False), None, FLAGS),
    "consistency": (
        "consistency",
        lambda seed: named.state_dict(consistency, OPENAI, seed),
        None,
        FLAGS | {"training_mode": "edm"},
    ),
    "palette": ("palette", palette_state, None, FLAGS | SCHEDULE),
    "pytorch_ddpm": (
        "pytorch_ddpm",
        lambda seed: named.state_dict(pytorch_ddpm, PYTORCH_DDPM, seed),
        None,
        {"img_size": "6x10", "norm_groups": "2"},
    ),
    "score_sde": (
        "score_sde",
        lambda seed: drawn(score_sde, SCORE_SDE, seed),
        None,
        {"image_size": "6x10", "sde": "vpsde", "continuous": "true"},
    ),
    "dit": (
        "dit",
        lambda seed: named.state_dict(dit, DIT, seed),
        None,
        {"input_size": "6x10", "num_heads": "2"},
    ),
    "diffusers' DiT": (
        "diffusers_dit",
        lambda seed: named.state_dict(diffusers_dit, DIT, seed),
        {
            "transformer": {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
            | {"num_embeds_ada_norm": 2, "out_channels": 8}
        },
        {},
    ),
    "MONAI core": (
        "monai",
        lambda seed: named.state_dict(monai, MONAI, seed, core=True, combined=True),
        None,
        MONAIS,
    ),
    "MONAI Generative": (
        "monai",
        lambda seed: named.state_dict(monai, MONAI, seed, core=False, combined=False),
        None,
        MONAIS,
    ),
    "lucidrains": ("lucidrains", lambda seed: draw(LUCIDRAINS, seed), None, lucidrains_files.SETTINGS),
    "lucidrains' diffusion": (
        "lucidrains",
        lambda seed: diffusion(draw(LUCIDRAINS, seed), COSINE, "pred_x0"),
        None,
        lucidrains_files.SETTINGS,
    ),
}


_FIRST = ("conv_in", "init_conv", "input_blocks.0", "head", "all_modules.2.", "x_embedder", "proj_out")


@cache
def state(case: str, seed: int = 1) -> State:
    return CASES[case][1](seed)


def converted(source: Source, case: str) -> tuple[State, Any, Any]:
    """The parameters, schedule and sampler that a source becomes."""
    family, _, config, settings = CASES[case]
    plan = FAMILIES[family].plan(source.tensors, config, settings)
    expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(plan.model)).items()}
    return (
        fill({**source.tensors, **plan.implied}, expected, plan.rules, plan.ignored, FAMILIES[family].pointwise),
        plan.schedule,
        plan.sampler,
    )


@cache
def bare(case: str, seed: int) -> tuple[State, Any, Any]:
    return converted(FAMILIES[CASES[case][0]].open_source(state(case, seed), "file"), case)


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


LIGHTNING = {"epoch": 3, "global_step": 77, "pytorch-lightning_version": "2.1.0", "optimizer_states": [{}], "loops": {}}
LIST = np.array(0.9999, np.float32)

# name -> (raw, ema) to contents; where the weights lie; which they are; of which step. Seed 1 is raw, seed 2 EMA.
WRAPPERS: dict[str, tuple[Callable[[State, State], Any], str, str, int | None]] = {
    "as it is": (lambda raw, ema: raw, "", "unstated", None),
    "state_dict": (lambda raw, ema: {"state_dict": raw}, "state_dict", "unstated", None),
    "model_state_dict": (lambda raw, ema: {"epoch": 5, "model_state_dict": raw}, "model_state_dict", "unstated", None),
    "DDP": (lambda raw, ema: under("module.", raw), "module", "unstated", None),
    "torch.compile": (lambda raw, ema: under("_orig_mod.", raw), "_orig_mod", "unstated", None),
    "both": (lambda raw, ema: under("model._orig_mod.module.", raw), "model._orig_mod.module", "unstated", None),
    "unet": (lambda raw, ema: under("unet.", raw), "unet", "unstated", None),
    "net": (lambda raw, ema: under("net.", raw), "net", "unstated", None),
    "denoise_fn": (lambda raw, ema: under("denoise_fn.", raw), "denoise_fn", "unstated", None),
    "CompVis": (
        lambda raw, ema: {"state_dict": under("model.diffusion_model.", raw), "global_step": 9},
        *("state_dict.model.diffusion_model", "unstated", 9),
    ),
    "Lightning": (
        lambda raw, ema: {"state_dict": under("model.", raw), **LIGHTNING},
        "state_dict.model",
        "unstated",
        77,
    ),
    "Lightning with an average": (
        lambda raw, ema: {"state_dict": under("model.", raw) | under("ema_model.", ema), **LIGHTNING},
        *("state_dict.ema_model", "ema", 77),
    ),
    "a trainer": (
        lambda raw, ema: {"step": 5, "model": raw, "ema": ema, "opt": {"state": {}, "param_groups": []}},
        *("ema", "ema", 5),
    ),
    "net_model, ema_model": (
        lambda raw, ema: {"net_model": raw, "ema_model": ema, "sched": {}, "optim": {}, "step": 7, "x_T": LIST},
        *("ema_model", "ema", 7),
    ),
    "ema_model_state_dict": (
        lambda raw, ema: {"model_state_dict": raw, "ema_model_state_dict": ema},
        *("ema_model_state_dict", "ema", None),
    ),
    "torch's AveragedModel": (
        lambda raw, ema: {"model": raw, "ema": under("module.", ema) | {"n_averaged": np.array(3)}},
        *("ema.module", "ema", None),
    ),
    "ema_pytorch": (
        lambda raw, ema: {"model": raw, "ema": under("online_model.", raw) | under("ema_model.", ema)},
        *("ema.ema_model", "ema", None),
    ),
    "ermongroup's list": (lambda raw, ema: [under("module.", raw), {}, 1, 13, ema], "ema", "ema", 13),
    "its list without EMA": (lambda raw, ema: [under("module.", raw), {}, 1, 13], "model.module", "raw", 13),
    "another list": (lambda raw, ema: [raw, {"lr": 0.1}], "0", "unstated", None),
    "no EMA": (lambda raw, ema: {"model": raw, "ema": None}, "model", "raw", None),
    "a decay": (lambda raw, ema: {"model": raw, "ema_decay": 0.999, "decay": 0.9}, "model", "unstated", None),
    "shadow": (lambda raw, ema: {"decay": 0.999, "shadow": ema}, "shadow", "ema", None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_wrapped_is_what_is_bare(case: str, wrapper: str) -> None:
    wrap, taken, weights, step = WRAPPERS[wrapper]
    family, source, _ = recognise(wrap(state(case), state(case, 2)), "file")
    assert (family.name, source.taken, source.weights, source.step) == (CASES[case][0], taken, weights, step)
    params, *conventions = converted(source, case)
    expected, *others = bare(case, 2 if weights == "ema" else 1)
    assert conventions == others
    assert params.keys() == expected.keys()
    assert all(np.array_equal(value, expected[name]) for name, value in params.items())


def test_one_of_each_can_be_chosen() -> None:
    """By what it is, by where it lies, and by the beginning of that."""
    raw, ema = state("ho"), state("ho", 2)
    contents = {"net": under("module.", raw), "net_ema": ema, "step": 3}
    for asked, taken in (
        *((None, "net_ema"), ("ema", "net_ema"), ("raw", "net.module")),
        *(("net_ema", "net_ema"), ("net.module", "net.module"), ("net", "net.module")),
    ):
        source = recognise(contents, "file", asked)[1]
        assert source.taken == taken
        assert source.tensors["conv_in.bias"] is (ema if taken == "net_ema" else raw)["conv_in.bias"]
    with pytest.raises(ConversionError, match=r"holds no weights n; it has: raw \(net\.module: Ho .*ema \(net_ema"):
        recognise(contents, "file", "n")
    two = {"a": raw, "b": ema}
    with pytest.raises(ConversionError, match=r"several sets of weights: unstated \(a: .*\(b: .*such as --weights a"):
        recognise(two, "file")
    assert recognise(two, "file", "b")[1].taken == "b"
    same = {"a": raw, "b": dict(raw)}  # the same twice is no question
    assert [recognise(same, "file", asked)[1].taken for asked in (None, "raw", "a", "b")] == ["a", "a", "a", "b"]


def test_what_is_asked_for_is_what_there_is() -> None:
    one = recognise({"state_dict": state("ho")}, "file", "raw")[1]
    assert as_asked(one, "raw", "file").weights == "raw"
    assert as_asked(one, None, "file").weights == "unstated"
    for wish, contents in (("ema", {"model": state("ho"), "ema": None}), ("raw", {"ema": state("ho")})):
        with pytest.raises(ConversionError, match=f"holds no {wish} weights; it has: "):
            recognise(contents, "file", wish)
    with pytest.raises(ConversionError, match="which do not say what they are, so no --weights ema in it"):
        as_asked(recognise({"state_dict": state("ho")}, "file", "ema")[1], "ema", "file")


@pytest.mark.parametrize("case", CASES)
def test_a_partial_average_is_not_taken_and_that_is_said(case: str) -> None:
    ema = {name: value for name, value in state(case, 2).items() if not name.endswith("bias")}
    contents = {"model": state(case), "ema": ema}
    source = recognise(contents, "file")[1]
    assert (source.taken, source.weights) == ("model", "raw")
    assert source.note == "ema has not the names of model"
    with pytest.raises(ConversionError, match=r"holds no ema weights \(ema has not the names of model\)"):
        recognise(contents, "file", "ema")
    rest = {
        name: value
        for name, value in ema.items()
        if any(
            part in name
            for part in ("conv_in", "init_conv", "input_blocks.0", "head", "all_modules.2", "x_embedder", "proj_out")
        )
    }
    source = recognise({"model": state(case), "ema": rest}, "file")[1]
    assert (source.taken, source.note) == ("model", "ema has the names of no family's network")


def test_an_average_that_cannot_be_read_is_said() -> None:
    contents = {"model": state("ho"), "ema": state("ho", 2) | {"decay": 0.9}}
    source = recognise(contents, "file")[1]
    assert (source.taken, source.note) == (
        "model",
        "file, under ema, holds entries that are not tensors: decay (float)",
    )
    with pytest.raises(ConversionError, match=r"^file, under net_ema, holds entries that are not tensors"):
        recognise({"net": state("ho"), "net_ema": contents["ema"]}, "file", "net_ema")
    with pytest.raises(ConversionError, match=r"holds no ema weights \(file, under ema, holds entries"):
        recognise(contents, "file", "ema")


def test_an_average_without_buffers_keeps_schedule_and_objective() -> None:
    raw, ema = state("lucidrains' diffusion"), under("model.", state("lucidrains", 2))
    source = recognise({"model": raw, "ema": ema}, "file")[1]
    assert source.weights == "ema"
    _, schedule, sampler = converted(source, "lucidrains' diffusion")
    assert (schedule, sampler.prediction_type) == (COSINE, "sample")
    np.testing.assert_array_equal(source.tensors["init_conv.bias"], state("lucidrains", 2)["init_conv.bias"])


@pytest.mark.parametrize("case", CASES)
def test_a_list_of_parameters_takes_the_names_of_its_model(case: str) -> None:
    raw, ema = state(case), state(case, 2)
    buffers = FAMILIES[CASES[case][0]].buffers
    shadow = [value for name, value in ema.items() if name not in buffers]
    contents = {"model": under("module.", raw), "ema": {"decay": 0.9, "shadow_params": shadow}}
    source = recognise(contents, "file")[1]
    assert (source.taken, source.weights) == ("ema.shadow_params", "ema")
    params, *conventions = converted(source, case)
    expected, *others = bare(case, 2)
    assert conventions == others
    assert all(np.array_equal(value, expected[name]) for name, value in params.items())
    for wrong in (shadow[1:], shadow[::-1], [*shadow, shadow[0]]):
        contents["ema"]["shadow_params"] = wrong
        source = recognise(contents, "file")[1]
        assert source.taken == "model.module"
        assert source.note == (
            f"ema.shadow_params is a list of {len(wrong)} tensors without names, not those of a model in this file"
        )
        with pytest.raises(ConversionError, match=r"holds no ema weights .*without names"):
            recognise(contents, "file", "ema")
    with pytest.raises(ConversionError, match="holds an EMA as a list in the order of its model's parameters"):
        recognise({"ema": {"shadow_params": shadow}}, "file")


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", "unet."])
def test_names_that_would_be_one_are_refused(prefix: str) -> None:
    parent = prefix.rpartition(".")[0].rpartition(".")[0]
    twice = f"{parent}." * bool(parent) + "conv_in.weight"
    contents = under(prefix, state("ho")) | {twice: np.zeros(3, np.float32)}
    with pytest.raises(ConversionError, match=r"holds, with and without a prefix, conv_in\.weight"):
        recognise(contents, "file")
    both = state("lucidrains' diffusion") | {"init_conv.bias": np.zeros(3, np.float32)}
    with pytest.raises(ConversionError, match=r"with and without the prefix model\., init_conv\.bias"):
        recognise(both, "file")


def test_a_network_of_latents_or_with_a_conditioner_is_refused_for_what_it_is() -> None:
    unet, other = under("unet.", state("diffusers")), {"encoder.conv_in.weight": np.zeros(3, np.float32)}
    for contents in (
        unet | under("vae.", other),
        {"state_dict": under("model.diffusion_model.", state("openai")) | under("first_stage_model.", other)},
        {"unet": state("diffusers"), "vqvae": other},
    ):
        with pytest.raises(ConversionError, match=r"a network of latents .* none of those that jddim reads"):
            recognise(contents, "file")
    with pytest.raises(ConversionError, match=r"encodes its conditions \(text_encoder\)"):
        recognise({"unet": state("diffusers"), "text_encoder": other}, "file")


def test_a_schedule_that_is_not_read_is_said() -> None:
    for contents in (
        under("denoise_fn.", state("ho")) | {"betas": np.ones(5, np.float32)},
        {"model": state("openai"), "betas": [0.1, 0.2]},  # no tensor
    ):
        assert "betas lie beside them, which this family does not read" in recognise(contents, "file")[1].note
    assert recognise(state("lucidrains' diffusion"), "file")[1].note == ""


def test_betas_that_a_family_reads_go_with_raw_and_averaged_weights() -> None:
    """CompVis' layout: buffers of the diffusion beside its network, and an EMA under names without dots."""
    raw, ema = state("openai"), state("openai", 2)
    dotless = {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in ema.items()}
    rest = {
        "betas": np.linspace(0.01, 0.2, 7).astype(np.float32),
        "model_ema.decay": LIST,
        "model_ema.num_updates": LIST,
    }
    contents = {"state_dict": under("model.diffusion_model.", raw) | dotless | rest, "global_step": 5}
    for asked, taken, expected in (
        (None, "state_dict.model_ema", ema),
        ("state_dict.model_ema", "state_dict.model_ema", ema),
        ("raw", "state_dict.model.diffusion_model", raw),
    ):
        source = recognise(contents, "file", asked)[1]
        assert (source.taken, source.note) == (taken, "")
        assert (source.weights, source.step) == ("raw" if asked == "raw" else "ema", 5)
        assert source.tensors.keys() == {*raw, "betas"}
        assert all(np.array_equal(source.tensors[name], value) for name, value in expected.items())
    for part in (None, 0.5):
        contents["state_dict"]["model_ema.diffusion_modelout2bias"] = part
        source = recognise(contents, "file")[1]
        assert source.taken == "state_dict.model.diffusion_model"
        assert source.note == "model_ema has the names of no family's network"


def test_what_lies_beside_is_said() -> None:
    contents = {"model": state("ho"), "step": np.int64(5), "args": {"lr": 1}, "note": "a\nb" * 100, "ema": None}
    source = recognise(contents, "file")[1]
    assert source.step == 5
    assert source.beside.startswith("step 5; args; note a?ba?b")
    assert len(source.beside) < 100
    many = recognise({"model": state("ho"), **{f"k{i}": i for i in range(1000)}}, "file")[1]
    assert many.beside.endswith("... and 992 more")


def test_wrappers_within_wrappers_come_to_an_end() -> None:
    contents: Any = state("ho")
    for _ in range(4):
        contents = {"state_dict": contents}
    assert recognise(contents, "file")[1].taken == ".".join(["state_dict"] * 4)
    with pytest.raises(ConversionError, match=r"no checkpoint that jddim knows: it holds state_dict\.state_dict"):
        recognise({"state_dict": contents}, "file")


FOREIGN = {
    "denoise_fn.cond_embed.0.weight denoise_fn.input_blocks.0.0.weight": "has a cond_embed as Palette's networks have",
    "denoise_fn.noise_level_mlp.1.weight denoise_fn.downs.0.weight": "is an SR3 network",
    "x_embedder.proj.weight blocks.0.adaLN_modulation.1.weight": "is a diffusion transformer",
    "pos_embed.proj.weight transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight": "is a diffusion transf",
    "conv_in.conv.weight time_embed.0.weight down_blocks.0.resnets.0.conv1.conv.weight": "is a network of MONAI's, but",
    "model.map_layer0.weight model.enc.32x32_conv.weight": "has map_layer0 as EDM's networks have",
    "module.all_modules.0.W": "has all_modules as score_sde's networks have",
    "time_embedding.timembedding.0.weight downblocks.0.weight": "has a timembedding as w86763777/pytorch-ddpm's",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": "cross-attention to text",
    "first_stage_model.x": "is a first stage that jddim does not read",
    "a.b c": r"is no checkpoint that jddim knows: it holds a\.b, c",
}


@pytest.mark.parametrize("names", FOREIGN)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "ema": s, "opt": {"state": {}}, "step": 3}])
def test_foreign_files_are_named_for_what_they_are(names: str, wrap: Callable[[Any], Any]) -> None:
    contents = wrap(dict.fromkeys(names.split(), np.zeros(2, np.float32)))
    message = FOREIGN[names] if "step" not in contents else FOREIGN[names].partition(" it holds")[0]
    with pytest.raises(ConversionError, match=f"^file {message}" if message.startswith("is ") else message):
        recognise(contents, "file")
    assert "lucidrains Trainer" not in message
