"""convert.families.dit and diffusers_dit: their files, what tensors, settings and configs tell, what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import ml_dtypes
import named
import numpy as np
import pytest
from safetensors.numpy import save_file

import jddim
from convert.conversion import convert, describe
from convert.engine import ConversionError, UnsettledError, fill
from convert.families import diffusers_dit, dit
from convert.families.values import one_of
from convert.recognition import recognise
from convert.rules import source_of, torch_shape
from jddim.checkpoint.card import lines as describe_checkpoint
from jddim.checkpoint.folder import load_params
from jddim.cli.main import main
from jddim.config import DiTConfig, SamplerConfig, ScheduleConfig
from jddim.models.building import abstract_model, flat_params
from jddim.models.dit import positions
from jddim.run.plan import labels_of
from jddim.run.request import Request

pytestmark = pytest.mark.unoptimised

CONFIG = DiTConfig((10, 10), channels=24, depth=2, num_heads=3, num_classes=6)
SETTINGS = {"input_size": "10", "num_heads": "3"}
THEIRS = DiTConfig((10, 10), channels=24, depth=3, num_heads=3, num_classes=6, frequency_shift=1, mlp_norm_epsilon=1e-5)


def state(seed: int = 1) -> dict[str, np.ndarray]:
    return named.state_dict(dit, CONFIG, seed)


def table(side: int = 5, width: int = 24) -> np.ndarray:
    return positions(side, side, width).reshape(1, side * side, width)


def planned(tensors: dict[str, np.ndarray], **given: str) -> dit.Plan:
    family, source, _ = recognise(tensors, "file")
    assert family.name == "dit"
    return family.plan(source.tensors, None, given)


def test_the_tensors_tell_the_network_and_the_source_the_sampling() -> None:
    plan = planned(state(), **SETTINGS)
    assert plan.model == CONFIG
    assert plan.null_label == 5
    assert plan.schedule == ScheduleConfig("linear", 1000, 1e-4, 0.02)
    assert plan.sampler == SamplerConfig(
        spacing="openai",
        num_steps=250,
        clip=False,
        rederive_eps=True,
        variance="learned_range",
        guidance_channels=3,
    )
    assert plan.unchecked == ("input_size", "num_heads")
    assert planned(state(), **SETTINGS, num_classes="6").null_label is None
    told = planned(state(), **SETTINGS, model="DiT")
    assert (told.model, told.asks) == (CONFIG, ())
    assert not any("a DiT" in fact for fact in told.assumed)
    assert planned(state(), **SETTINGS, diffusion_steps="100").schedule == ScheduleConfig("linear", 100, 1e-3, 0.2)
    assert planned(state(), num_heads="3", image_size="80").model == CONFIG


def test_a_sit_is_sampled_along_the_straight_path(tmp_path: Path) -> None:
    plan = planned(state(), **SETTINGS, model="SiT")
    assert (plan.model, plan.schedule) == (CONFIG, ScheduleConfig("flow"))
    assert plan.sampler == SamplerConfig(
        spacing="even",
        num_steps=250,
        clip=False,
        prediction_type="velocity",
        reversed_time=True,
        variance="unused",
        guidance_channels=3,
    )
    assert any("path_type = Linear" in fact for fact in plan.assumed)
    save_file(state(), tmp_path / "a.safetensors")
    given = {**SETTINGS, "model": "SiT"}
    metadata = convert(tmp_path / "a.safetensors", tmp_path / "ckpt", settings=given)
    checked = metadata.provenance["verification"]
    assert checked["t"] == (1.0, 0.5, 0.0)  # as its network is told them
    assert checked["output_error"] <= 2e-5
    ddim = jddim.load(tmp_path / "ckpt")
    assert (ddim.metadata.schedule, ddim.metadata.sampler) == (plan.schedule, plan.sampler)
    with pytest.raises(ValueError, match=r"spacing .linspace. is not of continuous schedules.*even"):
        ddim.sample(0, 1, labels=2, spacing="linspace")
    with pytest.raises(ValueError, match="v is of paths with alpha_t"):
        ddim.sample(0, 1, labels=2, steps=3, prediction_type="v_prediction")


def test_a_file_that_may_be_sits_is_taken_for_dits_and_the_user_is_warned(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    lines: list[str] = []
    given = {"input_size": "10", "num_heads": "3"}
    metadata = convert(tmp_path / "a.safetensors", tmp_path / "ckpt", settings=given, say=lines.append)
    assert any("a DiT, trained by diffusion (a SiT's files" in fact for fact in metadata.provenance["assumed"])
    assert any("WARNING: no tensor tells model" in line for line in lines)
    assert metadata.null_label == 5
    assert jddim.load(tmp_path / "ckpt").null_label == 5
    assert metadata.provenance["verification"]["output_error"] <= 2e-5
    said = describe(tmp_path / "a.safetensors", settings=given)
    assert any("untold" in line and "model" in line for line in said)


def test_train_pys_file_holds_the_average_and_the_runs_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch.save writes it")
    monkeypatch.setitem(dit.SIZES, "T", (2, 24, 3))
    monkeypatch.setitem(dit.MODELS, "DiT-T/2", (2, 24, 3, 2))
    monkeypatch.setitem(dit._PARSERS, "model", one_of("DiT-T/2"))
    raw, ema = ({name: torch.tensor(value) for name, value in state(seed).items()} for seed in (1, 2))
    args = Namespace(model="DiT-T/2", image_size=80, num_classes=5, results_dir="results", epochs=1400)
    opt = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": raw, "ema": ema, "opt": opt, "args": args}, tmp_path / "0050000.pt")
    metadata = convert(tmp_path / "0050000.pt", tmp_path / "ckpt", verify=False)
    facts = metadata.provenance
    assert (facts["weights"], facts["taken"]) == ("ema", "ema")
    assert metadata.model == CONFIG
    assert not any("a DiT" in fact for fact in facts["assumed"])
    assert "warnings" not in facts
    assert any("config: not read: results_dir; epochs" in note for note in facts["notes"])
    kernel = load_params(tmp_path / "ckpt", metadata)["blocks.1.attention.v.kernel"]
    np.testing.assert_array_equal(kernel, state(2)["blocks.1.attn.qkv.weight"][48:].T)
    with pytest.raises(ConversionError, match="x_t of 12x12 has 36 patches, pos_embed 25 places"):
        dit.plan({**state(), "pos_embed": table()}, vars(args), {"image_size": "96"})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_positions_are_no_parameters_but_have_to_be_the_sources(dtype: Any) -> None:
    plan = planned({**state(), "pos_embed": table().astype(dtype)}, num_heads="3")
    assert plan.model == CONFIG
    assert plan.ignored.keys() == {"pos_embed"}
    wrong = table()
    wrong[0, 7, 3] += 0.01
    for learned in (wrong, np.full_like(wrong, np.nan)):
        with pytest.raises(ConversionError, match=r"pos_embed is not the table .* no learned positions"):
            planned({**state(), "pos_embed": learned.astype(dtype)}, num_heads="3")
    with pytest.raises(ConversionError, match=r"pos_embed has shape \(1, 25, 20\), expected \(1, 25, 24\)"):
        planned({**state(), "pos_embed": table(width=20)}, num_heads="3")


def test_what_the_tensors_do_not_tell_is_asked_at_once() -> None:
    with pytest.raises(UnsettledError, match=r"image_size=256.*heads, at a width of 24: --set num_heads=N") as caught:
        planned(state())
    assert caught.value.asks == ("image_size=SIDE", "num_heads=N", "model=VALUE")


def big(name: str) -> dict[str, np.ndarray]:
    """A network of the source's sizes, of one number."""
    depth, width, heads, patch = dit.MODELS[name]
    config = DiTConfig((40, 40), channels=width, depth=depth, num_heads=heads, patch_size=patch, num_classes=1001)
    one = np.zeros((), np.float32)
    right = {leaf: value.shape for leaf, value in flat_params(abstract_model(config)).items()}
    found: dict[str, tuple[int, ...]] = {}
    for leaf, shape in right.items():
        tensor = source_of(leaf, dit.rules(config))
        shape = torch_shape(shape, one, leaf)
        found[tensor] = (3 * shape[0], *shape[1:]) if ".qkv." in tensor else shape
    return {tensor: np.broadcast_to(one, shape) for tensor, shape in found.items()}


def test_the_sources_names_of_networks() -> None:
    tensors = big("DiT-S/8")
    plan = planned(tensors, **dit.FAMILY.presets["DiT-S/8"], image_size="320")
    assert plan.model == DiTConfig((40, 40), channels=384, depth=12, num_heads=6, patch_size=8, num_classes=1001)
    assert (plan.asks, plan.null_label) == ((), 1000)
    assert planned(tensors, image_size="320").model == plan.model  # the width is that of one of them
    with pytest.raises(
        ConversionError,
        match=r"has depth 28, the tensors 12; .*hidden_size 1152, the tensors 384; .*patch_size 2, the tensors 8",
    ):
        planned(tensors, **dit.FAMILY.presets["DiT-XL/2-256"])
    assert planned(tensors, model="SiT-S/8", image_size="320").model == plan.model
    assert planned(big("DiT-XL/2"), **dit.FAMILY.presets["DiT-XL/2-512"]).model.summary == (
        "a transformer: 64x64x4 in patches of 2x2, 28 blocks of 1152 channels and 16 heads, 1,001 classes"
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"image_size": "83"}, "image_size 83x83 is no multiple of 8"),
        ({"image_size": "80", "input_size": "12"}, r"contradict each other: \(80, 80\) is \(10, 10\), not \(12, 12\)"),
        ({"num_classes": "7"}, "num_classes is 7 by the settings, and the tensors have a table of 6 labels"),
        ({"input_size": "11"}, "image size 11x11 does not divide"),
        ({"num_heads": "5"}, "channels=24 cannot be split into num_heads=5"),
        ({"model": "DiT-M/2"}, "model must be one of DiT, SiT, DiT-S/2"),
        ({"head": "3"}, "unknown --set key 'head'"),
        ({"diffusion_steps": "0"}, "schedule cannot be built"),
        ({"path_type": "Linear"}, "path_type is of a SiT: give model=SiT too, or leave it out"),
        (
            {"model": "SiT", "path_type": "GVP", "prediction": "score", "noise_schedule": "linear"},
            "noise_schedule is of a DiT, and this is a SiT: leave it out; path_type GVP is not taken: jddim samples a "
            "SiT of path_type Linear; prediction score is not taken",
        ),
    ],
)
def test_settings_that_cannot_be(given: dict[str, str], told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        planned(state(), **{**({} if "image_size" in given else SETTINGS), "num_heads": "3", **given})


def test_everything_that_does_not_fit_is_in_one_report() -> None:
    tensors = state()
    del tensors["blocks.1.mlp.fc2.bias"]
    tensors["blocks.0.attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["final_layer.linear.weight"] = np.zeros((32, 23), np.float32)
    tensors["t_embedder.mlp.2.bias"][5] = np.nan
    plan = planned(tensors, **SETTINGS)
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(plan.model)).items()}
    with pytest.raises(ConversionError, match="4 tensors do not fit") as caught:
        fill(tensors, expected, plan.rules, plan.ignored, {})
    for told in (
        "missing blocks.1.mlp.fc2.bias",
        "unexpected blocks.0.attn.q_norm.weight",
        "final_layer.linear.weight has shape (32, 23), expected (32, 24)",
        "t_embedder.mlp.2.bias holds NaN",
    ):
        assert told in str(caught.value)
    odd = {"final_layer.linear.weight": np.zeros((28, 24)), "final_layer.linear.bias": np.zeros(28)}
    with pytest.raises(ConversionError, match="maps 4 channels to 7"):
        planned(state() | odd, **SETTINGS)


def test_latents_are_written_as_numbers_and_never_as_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "ckpt", settings=SETTINGS, verify=False)
    assert "jddim sample CKPT samples.npy --num 5 --labels 0:5" in (tmp_path / "ckpt" / "README.md").read_text()
    words = ["sample", str(tmp_path / "ckpt"), "--labels", "3", "--steps", "2", "--num", "2"]
    words += ["--guidance-scale", "2"]
    assert main([*words[:2], str(tmp_path / "x.png"), *words[2:]]) != 0
    assert "pictures need 1 or 3 channels, the samples have 4" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "x.npy"), *words[2:]]) == 0
    assert np.load(tmp_path / "x.npy").shape == (2, 10, 10, 4)
    assert sorted(path.name for path in tmp_path.glob("x.*")) == ["x.npy"]


# -- diffusers' -------------------------------------------------------------------------------------------------------


def theirs(seed: int = 1) -> dict[str, np.ndarray]:
    """As diffusers saves it: what embeds t and the label is in each block."""
    tensors = named.state_dict(diffusers_dit, THEIRS, seed)
    copied = {name: value for name, value in tensors.items() if ".norm1.emb." in name}
    return tensors | {
        name.replace("blocks.0", f"blocks.{i}"): value.copy() for name, value in copied.items() for i in (1, 2)
    }


TRANSFORMER = {
    **{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3},
    **{"in_channels": 4, "out_channels": 8, "sample_size": 10, "patch_size": 2, "num_embeds_ada_norm": 5},
}
SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, "beta_end": 0.03}


def test_diffusers_conventions_are_its_own() -> None:
    family, source, _ = recognise(theirs(), "file")
    assert family.name == "diffusers_dit"
    assert source.note == "10 tensors that the blocks repeat are equal to the first's"
    plan = family.plan(source.tensors, {"transformer": TRANSFORMER, "scheduler": SCHEDULER}, {})
    assert plan.model == THEIRS
    assert plan.schedule == ScheduleConfig("linear", 1000, 1e-4, 0.03)
    assert plan.sampler == SamplerConfig(spacing="leading", num_steps=50, clip=False, variance="learned_range")
    assert plan.null_label == 5
    old = {**TRANSFORMER, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_vector_embeds": None}
    assert family.plan(source.tensors, {"transformer": old, "scheduler": SCHEDULER}, {}).model == THEIRS


def test_a_copy_that_differs_or_is_missing_is_named() -> None:
    tensors = theirs()
    tensors["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"][3, 4] += 1e-6
    del tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"]
    with pytest.raises(ConversionError) as caught:
        diffusers_dit.open_source(tensors, "file")
    assert "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias is missing" in str(caught.value)
    differs = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight is not equal to"
    assert differs in str(caught.value)


def test_without_configs_what_is_not_told_is_asked_and_warned_of() -> None:
    tensors = diffusers_dit.open_source(theirs(), "file").tensors
    with pytest.raises(UnsettledError, match=r"sample_size=32.*num_attention_heads=16") as caught:
        diffusers_dit.plan(tensors, {}, {})
    assert caught.value.asks[:2] == ("sample_size=SIDE", "num_attention_heads=N")
    plan = diffusers_dit.plan(tensors, {}, {"sample_size": "10", "num_attention_heads": "3"})
    assert plan.model == THEIRS
    assert not plan.sampler.clip  # latents are not
    assert any("clip_sample = false" in fact for fact in plan.assumed)
    assert any("no scheduler_config.json was found" in warning for warning in plan.warnings)


def test_classes_are_asked_for_by_the_names_that_a_pipeline_has(tmp_path: Path) -> None:
    pipeline = {"_class_name": "DiTPipeline", "id2label": {"0": "tench, Tinca tinca", "3": "crane", "4": "crane"}}
    config = {"transformer": TRANSFORMER, "scheduler": SCHEDULER, "pipeline": pipeline}
    plan = diffusers_dit.plan(diffusers_dit.open_source(theirs(), "file").tensors, config, {})
    # Of a name twice the last, as in DiTPipeline.
    names = {"tench": 0, "Tinca tinca": 0, "tench, Tinca tinca": 0, "crane": 4}
    assert plan.label_names == names
    for wrong in ({"5": "the null label"}, {"tench": "0"}, {"1": 2}, {"1": "a\x1b[2J"}):
        with pytest.raises(ConversionError, match=r"id2label must have the names of 0\.\.4, it has"):
            diffusers_dit.label_names(wrong, 5)

    for part, contents in (("transformer/", TRANSFORMER), ("scheduler/scheduler_", SCHEDULER)):
        (tmp_path / "dit" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dit" / part.split("/")[0]).mkdir(exist_ok=True)
        (tmp_path / "dit" / f"{part}config.json").write_text(json.dumps(contents))
    (tmp_path / "dit" / "model_index.json").write_text(json.dumps(pipeline))
    save_file(theirs(), tmp_path / "dit" / "transformer" / "diffusion_pytorch_model.safetensors")
    convert(tmp_path / "dit", tmp_path / "ckpt", verify=False)
    ddim = jddim.load(tmp_path / "ckpt")
    assert ddim.label_names == names
    whole = "tench,Tinca tinca"
    for text, labels in (
        *(("crane, tench", [4, 0]), ("Tinca tinca", [0, 0]), ("3", [3, 3])),
        *((whole, [0, 0]), (f"{whole},crane", [0, 4]), ("1, crane", [1, 4]), (f"crane, {whole}", [4, 0])),
    ):
        found, problems = labels_of(ddim, Request(labels=text), np.arange(2))
        assert (list(found), problems) == (labels, [])
    planned = ddim._plan("sample", 0, 2, {"labels": whole}).check("sample")  # as `sample` takes its options
    assert np.asarray(planned.inputs.labels).tolist() == [0, 0]
    for text in (["crane", "tench"], np.array(["crane", "tench"])):
        for call in (lambda labels: ddim.sample(0, 2, labels=labels), ddim.denoiser):
            with pytest.raises(ValueError, match=r"labels must be integers; DDIM\.label_names has each name's number"):
                call(text)
    for text in ("trench", "tench,crane,trench", f"{whole},trench"):
        ((_, told),) = labels_of(ddim, Request(labels=text), np.arange(2))[1]
        assert told == "labels: no class is called 'trench' (did you mean 'tench'?)"
    ((_, told),) = labels_of(ddim, Request(labels="TENCH"), np.arange(2))[1]
    assert told == "labels: no class is called 'TENCH' (did you mean 'tench'?)"
    ((_, told),) = labels_of(ddim, Request(labels="zebra"), np.arange(2))[1]
    assert told == "labels: no class is called 'zebra' (give a number in 0..5)"
    assert "label_names     4 names, such as 'tench', 'Tinca tinca', 'tench, Tinca tinca'" in describe_checkpoint(
        ddim.metadata, 1
    )


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "config.json is a PixArtTransformer2DModel's"),
        ({"norm_type": "ada_norm_single"}, "norm_type must be ada_norm_zero, the one kind that jddim has"),
        ({"activation_fn": "geglu"}, "activation_fn must be gelu-approximate"),
        ({"attention_bias": False}, "attention_bias must be true"),
        ({"num_layer": 3}, r"unknown key 'num_layer', which diffusers ignores \(did you mean 'num_layers'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1"),
        ({"out_channels": 7}, "in_channels is 4 and out_channels 7"),
        ({"num_layers": 101}, "depth=101 must lie in 1..100"),
    ],
)
def test_configs_that_cannot_be(network: dict[str, Any], told: str) -> None:
    tensors = diffusers_dit.open_source(theirs(), "file").tensors
    with pytest.raises(ConversionError, match=told):
        diffusers_dit.plan(tensors, {"transformer": TRANSFORMER | network, "scheduler": SCHEDULER}, {})


def test_a_dit_goes_back_to_its_source(tmp_path: Path) -> None:
    """Every tensor of the source's state dict, with its positions; converted again, equal to the bit."""
    torch = pytest.importorskip("torch", reason="writing PyTorch files: pip install 'jddim[convert]'")
    whole = state() | {"pos_embed": table()}
    torch.save({name: torch.from_numpy(value) for name, value in whole.items()}, tmp_path / "own.pt")
    made = convert(tmp_path / "own.pt", tmp_path / "ckpt", settings=SETTINGS, verify=False)
    assert jddim.converting.export_torch(tmp_path / "ckpt", tmp_path / "back.pt") == "dit"
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == whole.keys()
    assert all(np.array_equal(back[name].numpy(), value) for name, value in whole.items())
    again = convert(tmp_path / "back.pt", tmp_path / "again", settings=SETTINGS, verify=False)
    assert again.params_sha256 == made.params_sha256
    save_file(theirs(), tmp_path / "theirs.safetensors")
    given = {"sample_size": "10", "num_attention_heads": "3"}
    convert(tmp_path / "theirs.safetensors", tmp_path / "other", settings=given, verify=False)
    with pytest.raises(ConversionError, match=r"cannot be written as dit: frequency_shift is 1.*, there always 0"):
        jddim.converting.export_torch(tmp_path / "other", tmp_path / "x.pt", "dit")
