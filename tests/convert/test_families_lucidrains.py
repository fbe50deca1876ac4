"""The lucidrains family: what its files tell, what they need, what is refused, and the way back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the files are PyTorch's: pip install 'jddim[convert]'")

from lucidrains_files import COSINE, SETTINGS, diffusion, draw, small_config, trainer, write  # noqa: E402

import jddim.checkpoint.folder  # noqa: E402
from convert.conversion import convert, describe  # noqa: E402
from convert.engine import ConversionError  # noqa: E402
from convert.export import export  # noqa: E402
from convert.families.lucidrains import buffers, infer, open_source, plan  # noqa: E402
from convert.recognition import as_asked, recognise  # noqa: E402
from jddim.config import LucidrainsConfig, SamplerConfig, ScheduleConfig  # noqa: E402
from jddim.schedule import make_schedule  # noqa: E402

pytestmark = pytest.mark.unoptimised

CONFIG = small_config()


def tensors(config: LucidrainsConfig = CONFIG, schedule: ScheduleConfig = COSINE, objective: str = "pred_v") -> Any:
    """What `open_source` makes of a GaussianDiffusion's state dict."""
    return open_source(diffusion(draw(config, 1), schedule, objective), "file").tensors


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_trainers_file_is_converted_and_verified(tmp_path: Path) -> None:
    source = write(tmp_path / "model-3.pt", trainer(CONFIG))
    lines: list[str] = []
    metadata = convert(source, tmp_path / "out", settings=SETTINGS, say=lines.append)
    assert metadata.model == CONFIG
    assert metadata.schedule == COSINE
    assert metadata.sampler == SamplerConfig(
        spacing="linspace", num_steps=100, eta=0.0, clip=True, rederive_eps=True, prediction_type="v_prediction"
    )
    provenance = metadata.provenance
    assert (provenance["family"], provenance["weights"], provenance["step"]) == ("lucidrains", "ema", 3000)
    assert provenance["verification"]["output_error"] <= 2e-5
    assert [fact.partition(" =")[0] for fact in provenance["assumed"]] == [
        "auto_normalize",
        "sinusoidal_pos_emb_theta",
        "sampling_timesteps",
        "ddim_sampling_eta",
    ]
    assert any("version 2.3.1" in line for line in lines)
    params = jddim.checkpoint.folder.load_params(tmp_path / "out", metadata)
    np.testing.assert_array_equal(params["mid.attention.mem_kv"], draw(CONFIG, 1)["mid_attn.mem_kv"])
    np.testing.assert_array_equal(params["down.0.block_1.norm1.g"], draw(CONFIG, 1)["downs.0.0.block1.norm.g"].ravel())


def test_the_sets_of_weights() -> None:
    ema, raw = (draw(CONFIG, seed)["init_conv.weight"] for seed in (1, 2))
    contents = trainer(CONFIG)
    for raw_contents, wish, expected, kind in (
        (contents, None, ema, "ema"),
        (contents, "ema", ema, "ema"),
        (contents, "raw", raw, "raw"),
        (contents["ema"], None, ema, "ema"),
        (contents["ema"], "raw", raw, "raw"),
        ({**contents, "ema": None}, None, raw, "raw"),
        (contents["model"], None, raw, "unstated"),
        (draw(CONFIG, 2), "raw", raw, "unstated"),
    ):
        family, source, _ = recognise(raw_contents, "file", wish)
        assert family.name == "lucidrains"
        assert source.weights == kind
        np.testing.assert_array_equal(source.tensors["init_conv.weight"], expected)
    with pytest.raises(ConversionError, match="holds no ema weights; it has: raw"):
        recognise({**contents, "ema": None}, "file", "ema")
    with pytest.raises(ConversionError, match="no --weights ema"):
        as_asked(recognise(draw(CONFIG, 2), "file", "ema")[1], "ema", "file")


def test_empty_memories_are_none(tmp_path: Path) -> None:
    """What num_mem_kv=0 saves in the source; flax and Orbax have no empty tensors."""
    config = small_config(memory=0)
    memories = {
        name.replace("to_qkv.weight", "mem_kv"): np.zeros((2, 0, 1, 1), np.float32)
        for name in draw(config, 1)
        if "to_qkv" in name
    }
    for i, level in enumerate(zip(config.full_attention, config.num_heads, config.head_channels, strict=True)):
        full, heads, width = level
        shape = (2, heads, 0, width) if full else (2, heads, width, 0)
        last = len(config.full_attention) - 1
        memories |= dict.fromkeys((f"downs.{i}.2.mem_kv", f"ups.{last - i}.2.mem_kv"), np.zeros(shape, np.float32))
    memories["mid_attn.mem_kv"] = np.zeros((2, heads, 0, width), np.float32)
    file = write(tmp_path / "a.pt", {**draw(config, 1), **memories})
    metadata = convert(file, tmp_path / "out", settings=SETTINGS)
    assert metadata.model == config
    assert metadata.provenance["verification"]["output_error"] <= 2e-5


LEARNED = small_config(time_embedding="learned", time_features=6)


def renamed(old: str, new: str) -> dict[str, np.ndarray]:
    return {name.replace(old, new): value for name, value in draw(CONFIG, 1).items()}


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (renamed("downs.0.2.", "downs.0.2.fn."), r"before 2\.0"),
        (renamed("block1.norm.g", "block1.norm.weight"), r"0\.x or 1\.x, whose blocks have group norms"),
        (renamed("block1.proj", "block1.block.0"), r"0\.x or 1\.x, whose blocks have group norms"),
        ({f"net.{name}": value for name, value in draw(LEARNED, 1).items()}, "ElucidatedDiffusion"),
        ({f"model.{name}": value for name, value in draw(LEARNED, 1).items()}, "no betas"),
        ({**draw(CONFIG, 1), "init_conv.weight": np.zeros((4, 1, 7), np.float32)}, "Unet1D"),
        ({**draw(CONFIG, 1), "extra": "text"}, r"not tensors: extra \(str\)"),
    ],
)
def test_relatives_are_refused_with_a_reason(state: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        recognise(state, "file")


# -- classifier_free_guidance.py --------------------------------------------------------------------------------------

LABELLED = small_config(
    **{"full_attention": (False, False), "num_heads": (4, 4), "head_channels": (32, 32), "memory": 0},
    **{"num_classes": 4, "strided": True, "stem_channels": 6},
)


def labelled() -> dict[str, np.ndarray]:
    """A Unet's state dict: three classes, and the null class by itself."""
    state = draw(LABELLED, 1)
    table = state.pop("classes_emb.weight")
    return {**state, "classes_emb.weight": table[:3], "null_classes_emb": table[3]}


def test_labels_and_the_null_label_are_converted_and_go_back(tmp_path: Path) -> None:
    unet = labelled()
    file = write(tmp_path / "a.pt", diffusion(unet, COSINE, "pred_noise"))
    metadata = convert(file, tmp_path / "out", settings=SETTINGS | {"cond_drop_prob": "0.5", "num_classes": "3"})
    assert (metadata.model, metadata.null_label, metadata.schedule) == (LABELLED, 3, COSINE)
    assert metadata.sampler == SamplerConfig(spacing="linspace", num_steps=100, eta=1.0)
    assert metadata.provenance["verification"]["output_error"] <= 2e-5
    params = jddim.checkpoint.folder.load_params(tmp_path / "out", metadata)
    np.testing.assert_array_equal(params["class_embed.embedding"][3], unet["null_classes_emb"])
    export(tmp_path / "out", tmp_path / "b.pt", "lucidrains-unet")
    back = {name: value.numpy() for name, value in torch.load(tmp_path / "b.pt").items()}
    assert back.keys() == unet.keys()
    assert all(np.array_equal(value, unet[name]) for name, value in back.items())
    with pytest.raises(ConversionError, match=r"classifier_free_guidance\.py has no Trainer; use lucidrains-unet"):
        export(tmp_path / "out", tmp_path / "c.pt", "lucidrains")


def test_its_own_defaults_stand_in() -> None:
    made = plan(labelled(), None, SETTINGS)
    assert [fact.split(" (")[0] for fact in made.assumed] == [
        *("timesteps = 1000", "beta_schedule = cosine", "objective = pred_noise", "auto_normalize = True"),
        *("sampling_timesteps = 250", "ddim_sampling_eta = 1.0"),
    ]
    assert any("--guidance projected --guidance-scale 6 --guidance-rescale 0.7" in note for note in made.notes)
    assert plan(labelled(), None, SETTINGS | {"objective": "pred_x0"}).sampler.rederive_eps
    assert not made.sampler.rederive_eps


@pytest.mark.parametrize(
    ("changes", "given", "told"),
    [
        ({}, {"num_classes": "4"}, "num_classes is 4 by --set, but 3 in the tensors"),
        (
            {"mid_attn.fn.fn.to_qkv.weight": (48, 8, 1, 1)},
            {},
            "its middle attention has 16 channels, and no ",
        ),
        ({"init_conv.weight": (6, 2, 7, 7)}, {}, r"self_condition: classifier_free_guidance\.py has no sampler"),
        ({"null_classes_emb": (5,)}, {}, r"null_classes_emb is no row of classes_emb"),
    ],
)
def test_what_its_unets_are_not_is_refused(
    changes: dict[str, tuple[int, ...]], given: dict[str, str], told: str
) -> None:
    wrong = {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    with pytest.raises(ConversionError, match=told):
        plan(labelled() | wrong, None, SETTINGS | given)


def test_a_missing_null_label_is_named() -> None:
    tensors = labelled()
    del tensors["null_classes_emb"]
    with pytest.raises(ConversionError, match=r"^missing null_classes_emb, the null label's embedding$"):
        plan(tensors, None, SETTINGS)


# -- what buffers and shapes tell -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        small_config(),
        small_config(self_condition=True, in_channels=3, out_channels=3, stem_channels=6),
        small_config(in_channels=3, out_channels=6, full_attention=(True, False), num_heads=(1, 3)),
        small_config(time_embedding="learned", time_features=6, memory=3, head_channels=(2, 5)),
        small_config(time_embedding="learned", time_features=4, channels=6),
        small_config(
            channel_mults=(3,), full_attention=(True,), num_heads=(5,), head_channels=(2,), memory=5, stem_channels=8
        ),
    ],
)
def test_shapes_tell_the_network(config: LucidrainsConfig) -> None:
    assert plan(tensors(config), None, SETTINGS).model == config


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("gamma", [None, 5.0, 1e-4])
def test_loss_weight_tells_the_objective(objective: str, gamma: float | None) -> None:
    source = dict(tensors(objective=objective))
    if gamma is not None:  # min_snr_loss_weight
        a = source["alphas_cumprod"].astype(np.float64)
        snr = a / (1 - a)
        source["loss_weight"] = (source["loss_weight"] * np.minimum(snr, gamma) / snr).astype(np.float32)
    sampler = plan(source, None, SETTINGS).sampler
    assert (
        sampler.prediction_type == {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}[objective]
    )
    assert (sampler.rederive_eps, sampler.variance) == (True, "fixed_small")


def test_another_loss_weight_tells_nothing() -> None:
    source = {**tensors(), "loss_weight": np.linspace(1, 3, 100).astype(np.float32)}
    made = plan(source, None, SETTINGS)
    assert "objective = pred_v (GaussianDiffusion's default)" in made.assumed
    assert plan(source, None, {**SETTINGS, "objective": "pred_x0"}).sampler.prediction_type == "sample"


def test_a_learned_variance_is_of_predicted_noise() -> None:
    config = small_config(out_channels=2)
    for objective, prediction in (("pred_noise", "epsilon"), ("pred_v", "epsilon"), ("pred_x0", "sample")):
        made = plan(tensors(config, objective=objective), None, SETTINGS)
        sampler = made.sampler
        assert (sampler.prediction_type, sampler.variance, sampler.rederive_eps) == (prediction, "learned_range", False)
        assert any("learned variance" in fact for fact in made.assumed) == (objective == "pred_v")
        assert any("ddim_sample fails" in note for note in made.notes)


def source_betas(name: str, T: int) -> np.ndarray:
    """The source's three schedules, in torch as there: the ends of its sigmoid are float32 numbers."""
    if name == "linear":
        return torch.linspace(1000 / T * 1e-4, 1000 / T * 0.02, T, dtype=torch.float64).numpy()
    t = torch.linspace(0, T, T + 1, dtype=torch.float64) / T
    if name == "cosine":
        alpha_bar = torch.cos((t + 0.008) / 1.008 * torch.pi * 0.5) ** 2
    else:
        start, end = torch.tensor(-3.0).sigmoid(), torch.tensor(3.0).sigmoid()
        alpha_bar = (end - (t * 6 - 3).sigmoid()) / (end - start)
    alpha_bar = alpha_bar / alpha_bar[0]
    return torch.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999).numpy()


@pytest.mark.parametrize("T", [100, 997, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_buffers_give_back_the_sources_schedules(name: str, T: int) -> None:
    betas = source_betas(name, T)
    alpha_bar = np.cumprod(1 - betas)
    source = {**draw(CONFIG, 1), "betas": betas.astype(np.float32), "alphas_cumprod": alpha_bar.astype(np.float32)}
    made = plan(source, None, {**SETTINGS, "beta_schedule": name, "timesteps": str(T)})
    assert not any("schedule" in fact for fact in made.assumed)
    schedule = make_schedule(made.schedule)
    np.testing.assert_array_equal(schedule.alphas_cumprod.astype(np.float32), source["alphas_cumprod"])
    np.testing.assert_array_equal(schedule.betas.astype(np.float32), source["betas"])


def test_any_other_schedule_is_kept_as_the_buffer_has_it() -> None:
    alpha_bar = np.cumprod(1 - np.linspace(1e-3, 0.3, 50)).astype(np.float32)
    betas = np.linspace(1e-3, 0.3, 50).astype(np.float32)
    made = plan({**draw(CONFIG, 1), "betas": betas, "alphas_cumprod": alpha_bar}, None, SETTINGS)
    assert made.schedule.name == "betas"
    assert any("explicit betas, from the buffer alphas_cumprod" in fact for fact in made.assumed)
    np.testing.assert_array_equal(make_schedule(made.schedule).alphas_cumprod.astype(np.float32), alpha_bar)


def test_a_bare_unet_has_the_sources_defaults_or_what_is_told() -> None:
    made = plan(draw(CONFIG, 1), None, SETTINGS)
    assert made.sampler.prediction_type == "v_prediction"
    assert made.schedule.num_train_timesteps == 1000
    for fact in ("timesteps = 1000", "beta_schedule = sigmoid", "objective = pred_v", "sampling_timesteps = 250"):
        assert any(assumed.startswith(fact) for assumed in made.assumed), fact
    told = {"timesteps": "100", "beta_schedule": "cosine", "objective": "pred_noise", "sampling_timesteps": "7"}
    told |= {"ddim_sampling_eta": "0.5", "sinusoidal_pos_emb_theta": "100", "auto_normalize": "True"}
    told |= {"dim": "4", "dim_mults": "(1, 2)", "full_attn": "False", "attn_heads": "2", "attn_dim_head": "3,3"}
    made = plan(draw(CONFIG, 1), None, {"image_size": "(6, 10)", **told})
    assert made.model == dataclasses.replace(CONFIG, theta=100.0)
    assert made.schedule == COSINE
    assert (made.sampler.num_steps, made.sampler.eta, made.sampler.prediction_type) == (7, 0.5, "epsilon")
    assert made.assumed == ()
    assert made.notes == ()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_no_tensor_checks_depends_on_the_buffers() -> None:
    told = {"timesteps": "100", "beta_schedule": "cosine", "objective": "pred_x0", "dim_mults": "(1, 2)"}
    told |= {"image_size": "(6, 10)", "sinusoidal_pos_emb_theta": "10000", "ddim_sampling_eta": "0"}
    bare = plan(draw(CONFIG, 1), None, told)
    assert bare.unchecked == ("timesteps", "beta_schedule", "objective", "image_size", "sinusoidal_pos_emb_theta")
    whole = plan(open_source(diffusion(draw(CONFIG, 1), COSINE, "pred_x0"), "file").tensors, None, told)
    assert whole.unchecked == ("image_size", "sinusoidal_pos_emb_theta")


def test_every_contradiction_is_in_one_message() -> None:
    told = {"timesteps": "1000", "beta_schedule": "linear", "objective": "pred_noise", "dim": "8", "dim_mults": "1,4"}
    told |= {"channels": "3", "self_condition": "true", "attn_heads": "4", "full_attn": "True"}
    told |= {"random_fourier_features": "True", "auto_normalize": "False", "sampling_timesteps": "101"}
    with pytest.raises(ConversionError) as caught:
        plan(tensors(), None, told)
    for message in (
        "timesteps is 1000 by --set, but 100 in the buffers",
        "beta_schedule is linear by --set, but cosine in the buffers",
        "objective is pred_noise by --set, but loss_weight is pred_v's",
        "dim is 8 by --set, but 4 in the tensors",
        "dim_mults is (1, 4) by --set, but (1, 2) in the tensors",
        "channels is 3",
        "self_condition is True",
        "attn_heads is 4 by --set, but (2, 2) in the tensors",
        "full_attn is True by --set, but (False, True) in the tensors",
        "learned or random, but the tensors have a sinusoid's shapes",
        "auto_normalize=False",
        "sampling_timesteps=101 must lie in 1..100",
        "the tensors do not tell the image size; --set image_size=64",
    ):
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"image_sise": "6"}, "did you mean 'image_size'?"),
        ({"image_size": "6x"}, "image_size must be an integer, HEIGHTxWIDTH"),
        ({"image_size": "7x10"}, "does not divide"),
        ({**SETTINGS, "objective": "noise"}, "objective must be one of pred_noise, pred_x0, pred_v"),
        ({**SETTINGS, "ddim_sampling_eta": "-1"}, "ddim_sampling_eta=-1 must lie in 0.."),
        ({**SETTINGS, "dim": "True"}, "dim must be an integer"),
        ({**SETTINGS, "self_condition": "true", "learned_variance": "true"}, "the source has no sampler"),
    ],
)
def test_bad_settings(told: dict[str, str], message: str) -> None:
    with pytest.raises(ConversionError) as caught:
        plan(tensors(), None, told)
    assert message in str(caught.value)


def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    state = diffusion(draw(CONFIG, 1), COSINE, "pred_v")
    for name, message in (
        ("model.downs.0.2.mem_kv", "missing downs.0.2.mem_kv"),
        ("model.ups.0.1.block2.norm.g", "missing ups.0.1.block2.norm.g"),
        ("model.downs.1.3.weight", "missing downs.1.3.weight"),
        ("model.init_conv.bias", "missing init_conv.bias"),
    ):
        write(tmp_path / "a.pt", {key: value for key, value in state.items() if key != name})
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "a.pt", tmp_path / "out", settings=SETTINGS)
    odd = {
        **state,
        "model.mid_attn.mem_kv": np.zeros((2, 2, 4, 5), np.float32),
        "model.mid_block1.block1.norm.g": np.zeros((1, 7, 1, 1), np.float32),
        "model.surplus.weight": np.zeros(3, np.float32),
        "model.final_conv.bias": np.full(1, np.nan, np.float32),
    }
    with pytest.raises(ConversionError) as caught:
        convert(write(tmp_path / "b.pt", odd), tmp_path / "out", settings=SETTINGS)
    for message in (
        "mid_attn.mem_kv has shape (2, 2, 4, 5), expected (2, 2, 4, 3)",
        "mid_block1.block1.norm.g has shape (1, 7, 1, 1), expected (1, 8, 1, 1)",
        "unexpected surplus.weight (3,)",
        "final_conv.bias holds NaN",
    ):
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (r"ups.", "too few tensors"),
        (r"time_mlp.", "do not fit the model: missing"),
        (r"mid_", "do not fit the model: missing"),
    ],
)
def test_a_torn_file_is_reported(tmp_path: Path, gone: str, message: str) -> None:
    state = {name: value for name, value in draw(CONFIG, 1).items() if not name.startswith(gone)}
    with pytest.raises(ConversionError, match="too few tensors|" + message):
        convert(write(tmp_path / "a.pt", state), tmp_path / "out", settings=SETTINGS)


def test_channels_that_no_sampler_of_the_source_takes() -> None:
    with pytest.raises(ConversionError, match=r"init_conv takes \[1\] channels and final_conv gives \[5, 5\]"):
        infer(draw(small_config(out_channels=5), 1))


def test_describe_says_what_is_needed(tmp_path: Path) -> None:
    source = write(tmp_path / "model-3.pt", trainer(CONFIG))
    lines = "\n".join(describe(source))
    assert "lucidrains (denoising-diffusion-pytorch 2.x)" in lines
    assert "ema, step 3,000" in lines
    assert "--set image_size=SIDE" in lines
    assert ", predicts v_prediction, " in "\n".join(describe(source, settings=SETTINGS))


# -- back -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "self-conditioned", "learned variance", "its own betas"])
def test_there_and_back_is_bit_identical(tmp_path: Path, name: str) -> None:
    config, schedule, objective = {
        "plain": (CONFIG, COSINE, "pred_v"),
        "self-conditioned": (small_config(self_condition=True), ScheduleConfig("linear", 500, 2e-4, 0.04), "pred_x0"),
        "learned variance": (small_config(out_channels=2), COSINE, "pred_noise"),
        "its own betas": (CONFIG, ScheduleConfig("linear", 50, 1e-3, 0.3), "pred_noise"),
    }[name]
    source = write(tmp_path / "model-3.pt", trainer(config, schedule, objective))
    first = convert(source, tmp_path / "first", settings=SETTINGS, verify=False)
    assert export(tmp_path / "first", tmp_path / "out.pt") == "lucidrains"
    again = convert(tmp_path / "out.pt", tmp_path / "again", settings=SETTINGS, verify=False)
    assert again.params_sha256 == first.params_sha256
    assert (again.model, again.schedule, again.sampler) == (first.model, first.schedule, first.sampler)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    original = torch.load(source, weights_only=True)
    # Explicit betas come from the float32 alphas_cumprod, so the other buffers differ in their last digits.
    exact = ("ema_model.model.", "ema_model.alphas_cumprod") if name == "its own betas" else ("ema_model.",)
    same = {key: torch.equal(written["ema"][key], value) for key, value in original["ema"].items()}
    assert all(equal for key, equal in same.items() if key in exact or key.startswith(exact[0])), same
    assert {"step", "model", "opt", "ema", "scaler", "version"} == set(written)
    assert set(written["ema"]) == set(original["ema"])
    assert set(written["model"]) == set(original["model"])
    assert written["step"] == 3000


def test_the_trainers_optimizer_loads_what_is_written(tmp_path: Path) -> None:
    convert(write(tmp_path / "a.pt", trainer(CONFIG)), tmp_path / "out", settings=SETTINGS, verify=False)
    export(tmp_path / "out", tmp_path / "b.pt", "lucidrains")
    parameters = [torch.nn.Parameter(torch.from_numpy(value)) for value in draw(CONFIG, 1).values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.99))
    optimizer.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True)["opt"])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_learned_features_go_back_as_a_bare_unet(tmp_path: Path) -> None:
    config = small_config(time_embedding="learned", time_features=6)
    told = {**SETTINGS, "beta_schedule": "cosine"}
    first = convert(write(tmp_path / "a.pt", draw(config, 1)), tmp_path / "out", settings=told, verify=False)
    with pytest.raises(ConversionError, match="GaussianDiffusion refuses a Unet with learned or random features"):
        export(tmp_path / "out", tmp_path / "b.pt", "lucidrains")
    export(tmp_path / "out", tmp_path / "b.pt", "lucidrains-unet")
    again = convert(tmp_path / "b.pt", tmp_path / "again", settings=told, verify=False)
    assert again.params_sha256 == first.params_sha256
    assert (again.model, again.schedule, again.sampler) == (first.model, first.schedule, first.sampler)


def test_a_network_given_another_t_is_no_trainers(tmp_path: Path) -> None:
    metadata = convert(write(tmp_path / "a.pt", trainer(CONFIG)), tmp_path / "out", settings=SETTINGS, verify=False)
    other = dataclasses.replace(metadata, sampler=dataclasses.replace(metadata.sampler, timestep_scale=2.5))
    params = jddim.checkpoint.folder.load_params(tmp_path / "out", metadata)
    jddim.checkpoint.folder.save_checkpoint(tmp_path / "other", params, other)
    with pytest.raises(ConversionError, match=r"given t times 2\.5, there t itself"):
        export(tmp_path / "other", tmp_path / "b.pt", "lucidrains")
    assert not (tmp_path / "b.pt").exists()


def test_other_wirings_are_refused(tmp_path: Path) -> None:
    from tiny import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "ckpt")
    for name in ("lucidrains", "lucidrains-unet"):
        with pytest.raises(ConversionError, match="another wiring"):
            export(checkpoint, tmp_path / "out.pt", name)


def test_the_buffers_are_those_of_the_posterior() -> None:
    made = buffers(COSINE, "pred_x0")
    assert set(made) == set(tensors()) - set(draw(CONFIG, 1))
    a, b = made["alphas_cumprod"].astype(np.float64), made["betas"].astype(np.float64)
    before = np.append(1, a[:-1])
    # float32 rounding, which 1 - alpha_bar magnifies where it is small
    np.testing.assert_allclose(made["posterior_variance"][1:], (b * (1 - before) / (1 - a))[1:], rtol=1e-3)
    np.testing.assert_allclose(made["loss_weight"], a / (1 - a), rtol=1e-3)
    assert all(value.dtype == np.float32 and value.shape == (100,) for value in made.values())
