"""The diffusers family: which files it finds, what it reads of the two configs, what it refuses, and the way back."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tree

torch = pytest.importorskip("torch", reason="the reference and the writers need torch")

from safetensors.numpy import save_file  # noqa: E402

import jddim  # noqa: E402
from convert.conversion import convert, describe, verify  # noqa: E402
from convert.engine import ConversionError, UnsettledError  # noqa: E402
from convert.export import export  # noqa: E402
from convert.families import diffusers as family  # noqa: E402
from convert.families import diffusers_config as configs  # noqa: E402
from convert.files.shards import read_weights  # noqa: E402
from convert.sources import find  # noqa: E402
from convert.writers import state_shapes  # noqa: E402
from jddim.checkpoint.card import sampler_line  # noqa: E402
from jddim.checkpoint.metadata import Metadata  # noqa: E402
from jddim.cli.main import main  # noqa: E402
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig  # noqa: E402
from jddim.converting import hub_id  # noqa: E402
from jddim.installing import install_line  # noqa: E402
from jddim.schedule import make_schedule  # noqa: E402

pytestmark = pytest.mark.unoptimised

NETWORK: dict[str, Any] = {
    **{"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", "sample_size": 6, "in_channels": 1},
    **{"out_channels": 1, "block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"attention_head_dim": 4},
}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "variance_type": "fixed_large"}


def tensors(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """Random weights of NETWORK with `changes`, under diffusers' names."""
    config = configs.unet_config(configs.read_configs({"unet": NETWORK | changes}, {}))
    rng = np.random.default_rng(seed)
    shapes = state_shapes(lambda: family.reference(config))
    return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(folder: Path, state: dict[str, np.ndarray] | None = None, name: str = "", **changes: Any) -> Path:
    """A network's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(NETWORK | changes))
    path = folder / (name or "diffusion_pytorch_model.safetensors")
    state = tensors(**changes) if state is None else state
    if path.suffix == ".bin":
        torch.save({key: torch.from_numpy(value) for key, value in state.items()}, path)
    else:
        save_file(state, path)
    return path


def write_scheduler(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | changes))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    write(tmp_path / "pipeline" / "unet")
    write_scheduler(tmp_path / "pipeline" / "scheduler")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path / "pipeline"


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_pipeline_its_unet_a_flat_folder_and_a_bare_file_are_one_checkpoint(tmp_path: Path, pipeline: Path) -> None:
    lines: list[str] = []
    first = convert(pipeline, tmp_path / "first", say=lines.append)  # the only one here that is verified, as by default
    figure = first.provenance["verification"]
    assert figure["output_error"] <= 2e-5
    assert any("model: 6x6x1" in line for line in lines)
    assert first.sampler == SamplerConfig(spacing="leading", variance="fixed_large")

    flat = tmp_path / "flat"  # as the hub's oldest pipelines are
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    shutil.copy(flat / "diffusion_pytorch_model.safetensors", tmp_path / "weights.safetensors")
    both = [pipeline / "unet" / "config.json", pipeline / "scheduler" / "scheduler_config.json"]
    for src, config in ((pipeline / "unet", None), (flat, None), (tmp_path / "weights.safetensors", both)):
        lines = describe(src, config)
        assert f"  sha256      {first.provenance['source']['sha256']}" in lines
        for part in (f"  network     {first.model.summary}", f"  sampler     {sampler_line(first.sampler)}"):
            assert part in lines
        assert sum(line.startswith("  config ") for line in lines) == 2


def test_the_command_line_takes_two_configs_and_info_a_folder(
    tmp_path: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = shutil.copy(pipeline / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "w.safetensors")
    given = ["--config", str(pipeline / "unet" / "config.json")]
    scheduler = ["--config", str(pipeline / "scheduler" / "scheduler_config.json")]
    assert main(["convert", str(weights), str(tmp_path / "out"), "--no-verify", *given, *scheduler]) == 0
    assert "scheduler_config.json" in capsys.readouterr().out
    assert main(["convert", str(weights), str(tmp_path / "out2"), "--no-verify", *given, *given]) == 1
    assert "both unet configs; give one" in capsys.readouterr().err
    assert main(["info", str(pipeline)]) == 0
    out = capsys.readouterr().out
    assert "diffusers UNet2DModel" in out
    assert f"convert it:   jddim convert {pipeline} DST" in out


def test_the_emas_weights_come_first_and_its_step_is_known(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoint-500"  # as train_unconditional.py leaves it: no scheduler
    write(run / "unet")
    ema = tensors(seed=1)
    write(run / "unet_ema", ema, decay=0.9999, optimization_step=500, power=0.75, update_after_step=0)
    metadata = convert(run, tmp_path / "a", verify=False)
    assert (metadata.provenance["weights"], metadata.provenance["step"]) == ("ema", 500)
    assert not any("beta_start" in line for line in metadata.provenance["assumed"])
    assert any(line.startswith("trained_betas = null, ") for line in metadata.provenance["assumed"])
    warning, untold = metadata.provenance["warnings"]
    assert "no scheduler_config.json was found" in warning
    assert untold.startswith("no tensor tells ")
    assert "trained with num_train_timesteps = 1000, beta_start = 0.0001, " in warning
    assert f"- WARNING: `{warning}`" in (tmp_path / "a" / "README.md").read_text()
    (line,) = (line for line in describe(run) if "WARNING" in line)
    assert warning in line
    assert find(run, "raw").file.parent.name == "unet"
    for src, weights, message in (
        (run / "unet_ema", "raw", "the ema ones, so no --weights raw"),
        (run / "unet", "ema", "no --weights ema"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(src, tmp_path / "c", weights=weights, verify=False)


def test_a_checkpoint_of_a_run_takes_the_runs_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    write(run / "checkpoint-500" / "unet")
    write(run / "checkpoint-500" / "unet_ema", optimization_step=500)
    write_scheduler(run / "scheduler", prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    monkeypatch.chdir(run / "checkpoint-500")
    for src in (run, run / "checkpoint-500", run / "checkpoint-500" / "unet", Path("."), Path("unet_ema")):
        lines: list[str] = []
        metadata = convert(src, tmp_path / "out", verify=False, overwrite=True, say=lines.append)
        assert (metadata.schedule.name, metadata.sampler.prediction_type) == ("cosine", "v_prediction")
        assert f"  config: {run / 'scheduler' / 'scheduler_config.json'} (found)" in lines
        assert "warnings" not in metadata.provenance
    # accelerate's file has no config.json beside it; the run's network does
    shutil.copy(run / "checkpoint-500" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "w")
    write(run / "unet")
    shutil.rmtree(run / "checkpoint-500")
    (run / "checkpoint-1").mkdir()
    shutil.copy(tmp_path / "w", run / "checkpoint-1" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert sum(line.startswith("  config ") for line in describe(run / "checkpoint-1")) == 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vqvae", r"holds a network of latents \(unet\) and the first stage .* \(vqvae\), .* no decoder yet"),
        ("text_encoder", r"what encodes its conditions \(text_encoder\)"),
    ],
)
def test_a_pipelines_other_parts_are_heard(tmp_path: Path, pipeline: Path, part: str, message: str) -> None:
    index = {"_class_name": "APipeline", "unet": ["diffusers", "UNet2DModel"], part: ["diffusers", "AModel"]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    for src in (pipeline, pipeline / "unet"):
        with pytest.raises(ConversionError, match=message):
            convert(src, tmp_path / "out", verify=False)
        (refused,) = (line for line in describe(src) if "refused" in line)
        assert "convert it" not in describe(src)[-1]
        assert part in refused
    (pipeline / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    assert describe(pipeline)[-1].startswith("convert it: ")


def test_variants_are_taken_when_asked_for_or_alone(tmp_path: Path) -> None:
    half = {name: value.astype(np.float16) for name, value in tensors().items()}
    path = write(tmp_path / "unet", half, "diffusion_pytorch_model.fp16.safetensors")
    assert find(tmp_path).file == path
    write(tmp_path / "unet", tensors(), "diffusion_pytorch_model.non_ema.bin")
    with pytest.raises(ConversionError, match=r"the variants fp16, non_ema alone; --variant names one"):
        find(tmp_path)
    plain = write(tmp_path / "unet")
    assert (find(tmp_path).file, find(tmp_path, variant="fp16").file) == (plain, path)
    with pytest.raises(ConversionError, match=r"no variant 'fp61' \(did you mean 'fp16'"):
        find(tmp_path, variant="fp61")
    with pytest.raises(ConversionError, match="--variant fp16 chooses a file in a folder"):
        find(path, variant="fp16")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConversionError, match="holds settings, not weights; name the folder"):
        find(tmp_path / "model_index.json")
    assert find(tmp_path, variant="fp16").to_json()["variant"] == "fp16"


def test_legacy_names_and_bin_files(tmp_path: Path) -> None:
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in tensors().items():
        found = next((part for part in new if f".{part}." in name), None)
        old[name if found is None else name.replace(found, new[found])] = value
    assert len(set(old) - set(tensors())) == 8 * 4  # 1 down, 1 middle, 2 up; a weight and a bias each
    write(tmp_path / "old", old, "diffusion_pytorch_model.bin")
    write(tmp_path / "new")
    first, second = (
        family.open_source(read_weights(find(tmp_path / name).file), "").tensors for name in ("old", "new")
    )
    assert set(first) == set(second)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert "32 tensors under the names of diffusers before 0.15" in describe(tmp_path / "old")[3]
    both = old | {"mid_block.attentions.0.to_q.bias": old["mid_block.attentions.0.query.bias"]}
    write(tmp_path / "both", both)
    with pytest.raises(ConversionError, match=r"old and the present name, mid_block\.attentions\.0\.to_q\.bias"):
        convert(tmp_path / "both", tmp_path / "out")


def shard(folder: Path, edit: Callable[[dict[str, str]], None] = lambda weight_map: None) -> Path:
    """The network in two shards; edit: what to do to the index before it is written."""
    state = tensors()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NETWORK))
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    edit(weight_map)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path: Path) -> None:
    index = shard(tmp_path / "sharded")
    write(tmp_path / "whole")
    whole, sharded = (read_weights(find(tmp_path / name).file) for name in ("whole", "sharded"))
    assert set(sharded) == set(whole)
    assert all(np.array_equal(sharded[key], whole[key]) for key in whole)
    source = find(index).to_json()
    assert source == find(tmp_path / "sharded").to_json()
    assert (source["file"], len(source["shards"])) == (index.name, 2)
    last = index.with_name(source["shards"][1])
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert find(index).sha256() != source["sha256"]  # the digest covers the shards


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../unet.safetensors", "refused: it names files that do not lie beside it"),
        ("/etc/passwd", "refused: it names files that do not lie beside it"),
        ("..", "refused: it names files that do not lie beside it"),
        ("a\\b", "refused: it names files that do not lie beside it"),
        ("a" * 300, "refused: .* or are no file names"),  # the system would fail to look for it
        (7, "names files that are not there|refused"),
        ("absent.safetensors", r"names files that are not there: absent\.safetensors"),
    ],
)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, file: Any, message: str) -> None:
    write(tmp_path, name="unet.safetensors")
    shard(tmp_path / "sharded", lambda weight_map: weight_map.update({"conv_in.bias": file}))
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "sharded", tmp_path / "out")
    assert tree(tmp_path) == before


TWICE = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'


def test_an_index_that_disagrees_with_its_files_or_is_none(tmp_path: Path) -> None:
    def swap(weight_map: dict[str, str]) -> None:
        names = sorted(weight_map)
        weight_map[names[0]] = weight_map[names[1]]

    index = shard(tmp_path / "sharded", swap)
    with pytest.raises(
        ConversionError, match=r"disagree: conv_in\.bias is not in .*; conv_in\.bias in .* is not in the index"
    ):
        convert(tmp_path / "sharded", tmp_path / "out")
    for content, message in (
        ("[1]", "no weight_map"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (TWICE, "twice"),
    ):
        index.write_text(content)
        with pytest.raises(ConversionError, match=message):
            convert(index, tmp_path / "out")


# -- the hub: a cache made by hand, no network ------------------------------------------------------------------------

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache with `someone/tiny` in it, main at COMMIT; offline."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="hub ids need it: pip install 'jddim[hub]'")
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    write(snapshot, name="diffusion_pytorch_model.bin")  # flat, as the hub's oldest pipelines are
    write_scheduler(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_comes_from_the_cache_and_is_recorded(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = convert("someone/tiny", tmp_path / "out")
    source = metadata.provenance["source"]
    assert (source["hub_id"], source["commit"]) == ("someone/tiny", COMMIT)
    assert metadata.sampler.variance == "fixed_large"
    assert verify(tmp_path / "out", "someone/tiny").first_bad is None
    assert find("someone/tiny", revision=COMMIT).commit == find(f"someone/tiny@{COMMIT}").commit == COMMIT
    assert describe("someone/tiny", revision=COMMIT)[-1].endswith(f"someone/tiny DST --revision {COMMIT}")
    for src, revision, message in (
        ("someone/else", None, "no such file or folder: someone/else, and as a hub id it cannot be had: it is not in "),
        ("someone/else", None, "the hub's cache, and HF_HUB_OFFLINE is set, so it is not fetched"),
        (f"someone/tiny@{COMMIT}", "v2", "says a revision, so no --revision v2"),
        ("someone/tiny", "v2", "as a hub id at revision v2 it cannot be had"),
        (str(cache), "v2", "--revision v2 goes with a hub id"),
    ):
        with pytest.raises(ConversionError, match=message):
            find(src, revision=revision)


def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs, then safetensors, and only without them bin: each download of one commit."""
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="hub ids need it: pip install 'jddim[hub]'")
    remote, local = tmp_path / "remote", tmp_path / COMMIT
    write(remote / "unet")
    write(remote / "unet", name="diffusion_pytorch_model.bin")
    write(remote / "unet", name="diffusion_pytorch_model.fp16.safetensors")
    write_scheduler(remote / "scheduler")
    (remote / "training.log").touch()
    revisions = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append(revision)
        for path in remote.rglob("*"):
            name = path.relative_to(remote)
            if path.is_file() and any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / name)
        local.mkdir(exist_ok=True)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find("someone/tiny", revision="main").file == local / "unet" / "diffusion_pytorch_model.safetensors"
    files = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    assert files == ["scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert revisions == ["main", COMMIT]
    shutil.rmtree(local)
    assert find("someone/tiny", variant="fp16").file.name == "diffusion_pytorch_model.fp16.safetensors"


def test_what_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_id("google/ddpm-cifar10-32") == ("google/ddpm-cifar10-32", None)
    assert hub_id("google/ddpm-cifar10-32@refs/pr/1") == ("google/ddpm-cifar10-32", "refs/pr/1")
    for path in ("model", "a/b/c", "/a/b", "../b", "runs/model", "google/model.safetensors", "a/../b", "a/", "a/b@"):
        assert hub_id(path) is None, path
    assert hub_id("runs/model", here=True) is not None
    with pytest.raises(ConversionError, match="no such file: runs/model"):
        find("runs/model")


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConversionError, match="no such file or folder: a/b; .*" + re.escape(install_line("hub"))):
        find("a/b")


# -- the configs ------------------------------------------------------------------------------------------------------


def plan(network: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None, **given: str) -> Any:
    return family.plan({}, {"unet": NETWORK | (network or {}), "scheduler": SCHEDULER | (scheduler or {})}, given)


def test_a_config_becomes_the_models_and_back() -> None:
    model = plan().model
    assert model == UNetConfig(
        (6, 6),
        1,
        1,
        channels=4,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        head_channels=4,
        symmetric_padding=True,
        norm_groups=2,
        norm_epsilon=1e-5,
        cosine_first=True,
        frequency_shift=0.0,
        divide_last=True,
    )
    assert configs.unet_config(configs.read_configs({"unet": configs.unet_json(model)}, {})) == model


@pytest.mark.parametrize("first", [False, True])
def test_channels_beyond_x_ts_are_an_image_beside_it(tmp_path: Path, first: bool) -> None:
    """5 in and 2 out: converted, verified, and sampled as diffusers' users do, who concatenate at each step."""
    state = tensors(seed=3, in_channels=5, out_channels=2)
    write(tmp_path / "net", state, in_channels=5, out_channels=2)
    write_scheduler(tmp_path / "net", clip_sample=False)
    settings = {"condition_first": "true"} if first else {}
    metadata = convert(tmp_path / "net", tmp_path / "ckpt", settings=settings)
    config = metadata.model
    assert isinstance(config, UNetConfig)
    assert (config.in_channels, config.condition_channels, config.out_channels) == (2, 3, 2)
    assert config.condition_first is first
    (note,) = (note for note in metadata.provenance["notes"] if "beside x_t" in note)
    assert (
        f"3 channels in are an image's that the network is given beside x_t, {'before' if first else 'after'}" in note
    )

    ddim = jddim.load(tmp_path / "ckpt")
    rng = np.random.default_rng(5)
    x_T, beside = (rng.standard_normal((3, 6, 6, c), np.float32) for c in (2, 3))
    made = ddim.sample(x_T=x_T, steps=3, eta=0.0, condition=beside)
    network = family.reference(config)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    x, table = torch.from_numpy(x_T).permute(0, 3, 1, 2), ddim.table(3)
    condition = torch.from_numpy(beside).permute(0, 3, 1, 2)
    for t, alpha, sigma, alpha_prev, sigma_prev in zip(table.t, *table[3:7], strict=True):
        with torch.no_grad():
            eps = network(torch.cat([condition, x] if first else [x, condition], dim=1), torch.full((3,), int(t)), None)
        x = alpha_prev * (x - sigma * eps) / alpha + sigma_prev * eps
    expected = x.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(made, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ConversionError, match="in_channels is 3 and out_channels 3: DDIM needs both equal"):
        plan({"in_channels": 3, "out_channels": 3}, {"variance_type": "learned_range"})
    with pytest.raises(ConversionError, match="in_channels is 4 and out_channels 4: DDIM needs both equal"):
        plan({"in_channels": 4, "out_channels": 4}, {"variance_type": "learned_range"})


def test_the_scheduler_becomes_schedule_and_sampler() -> None:
    full = plan(
        {},
        {
            **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 1e-2},
            **{"num_train_timesteps": 40, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            **{"timestep_spacing": "linspace", "steps_offset": 1, "set_alpha_to_one": False},
            **{"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
            **{"clip_sample": False, "clip_sample_range": 2},
        },
        eta="0.5",
        use_clipped_model_output="true",
    )
    assert full.schedule == ScheduleConfig("scaled_linear", 40, 0.001, 0.01, zero_terminal_snr=True)
    assert full.sampler == SamplerConfig(
        spacing="linspace_diffusers",
        num_steps=40,
        eta=0.5,
        steps_offset=1,
        set_alpha_to_one=False,
        clip=False,
        clip_range=(-2.0, 2.0),
        threshold_ratio=0.9,
        threshold_max=3.0,
        rederive_eps=True,
        prediction_type="v_prediction",
        variance="fixed_large",
    )
    cosine = plan(scheduler={"beta_schedule": "squaredcos_cap_v2"}).schedule
    assert cosine == ScheduleConfig("cosine", 1000)
    betas = plan(scheduler={"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}).schedule
    assert betas == ScheduleConfig("betas", 3, betas=(0.1, 0.2, 0.3))
    old = plan(scheduler={"predict_epsilon": False, "tensor_format": "pt", "timestep_values": None})
    assert old.sampler.prediction_type == "sample"
    assert "prediction_type = sample (predict_epsilon is false" in old.assumed[0]
    assert plan(num_train_timesteps="7", timestep_spacing="trailing").schedule.num_train_timesteps == 7


def test_what_no_file_names_is_listed_as_assumed() -> None:
    unet, scheduler = plan().assumed
    assert "norm_eps = 1e-05, " in unet
    assert "sample_size" not in unet
    assert "clip_sample = true, " in scheduler
    assert "beta_schedule" not in scheduler
    assert "norm_eps" not in plan(norm_eps="1e-5").assumed[0]


@pytest.mark.parametrize(
    ("network", "scheduler", "message"),
    [
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, {}, "SkipDownBlock2D is refused: score_sde's FIR"),
        (
            {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
            {},
            "CrossAttnUpBlock2D is refused: it attends to text",
        ),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 2}, {}, "attends to text"),
        ({"down_block_types": ["KDownBlock2D"] * 2}, {}, "k-diffusion upscaler"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, {}, "an autoencoder's block"),
        ({"attention_head_dim": 3}, {}, "cannot be split into heads of head_channels=3"),
        ({"attention_head_dim": 16}, {}, "cannot be split into heads of head_channels=16"),
        ({"norm_num_groups": None}, {}, "norm_num_groups must be an integer of at least 1"),
        ({"norm_num_groups": 3}, {}, "multiple of norm_groups=3"),
        ({"layers_per_block": 10**9}, {}, r"layers_per_block must be an integer in 1\.\.100,"),
        ({}, {"num_train_timesteps": 10**10}, r"num_train_timesteps must be an integer in 1\.\.1000000,"),
        ({"block_out_channels": [4, 8, 8]}, {}, "must be of one length, got 3, 2 and 2"),
        ({"downsample_padding": 2}, {}, "downsample_padding is 2: only 0 and 1"),
        ({"downsample_type": "fir"}, {}, "downsample_type must be one of conv, resnet, or null"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, {}, "mid_block_type must be one of UNetMidBlock2D, or null"),
        ({"resnet_time_scale_shift": "spatial"}, {}, "must be one of default, scale_shift"),
        ({"class_embed_type": "projection"}, {}, "must be one of timestep, identity, or null"),
        ({"sample_size": None}, {}, r"--set sample_size=32"),
        ({"sample_size": 7}, {}, "image size 7x7 does not divide"),
        ({"out_channels": 2}, {}, "in_channels is 1 and out_channels 2: DDIM needs both equal, or twice as many"),
        ({}, {"variance_type": "learned_range"}, "in_channels is 1 and out_channels 1"),
        ({}, {"variance_type": "learned"}, "variance_type must be one of"),
        ({"norm_groups": 1}, {}, r"config\.json: unknown key 'norm_groups'.*did you mean 'norm_num_groups'"),
        ({}, {"beta_starts": 1}, r"scheduler_config\.json: unknown key 'beta_starts'.*did you mean 'beta_start'"),
        ({}, {"_jddim": {"num_steps": 1}}, r"_jddim: unknown key 'num_steps'.*did you mean 'num_inference_steps'"),
        ({"_class_name": "UNet2DConditionModel"}, {}, "is a UNet2DConditionModel's"),
        ({}, {"_class_name": "OwnScheduler"}, "is a OwnScheduler's, a class that jddim does not know"),
        ({}, {"_class_name": "EDMEulerScheduler"}, "its process is EDM's, whose t is a sigma, not DDIM's$"),
        ({}, {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "its process is flow matching"),
        ({}, {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type continuous"),
        ({}, {"beta_schedule": "laplace"}, "must be one of linear, scaled_linear"),
        ({}, {"trained_betas": [0.1]}, "num_train_timesteps is 1000, but trained_betas holds 1"),
        ({}, {"beta_end": 1.5}, "the noise schedule cannot be built"),
        ({}, {"steps_offset": 500}, "the sampler's defaults do not work"),
        ({}, {"_jddim": {"eta": 9}}, r"eta must lie in 0\.\."),
        ({"time_embedding_type": "fourier"}, {}, "visits t = 0, where diffusers' samples are NaN too"),
        (
            {},
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "the sampler's defaults do not work: .*zero terminal SNR",
        ),
    ],
)
def test_refusals_say_why(network: dict[str, Any], scheduler: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        plan(network, scheduler)


def test_keys_that_diffusers_ignores_are_listed() -> None:
    found = plan(
        {"cross_attention_dim": None, "magic": 1, "reverse_transformer_layers_per_block": None},
        {"_class_name": "DDIMScheduler", "skip_prk_steps": True, "interpolation_type": "linear"},
    )
    assert found.notes == (
        "config.json: not read, nor by diffusers: cross_attention_dim; magic; reverse_transformer_layers_per_block",
        "scheduler_config.json: not read, nor by diffusers: skip_prk_steps; interpolation_type",
    )


def test_all_that_is_wrong_comes_in_one_message() -> None:
    with pytest.raises(ConversionError) as caught:
        plan({"act_fn": "tanh", "norm_eps": -1}, {"clip_sample": "yes"}, stepps_offset="1", timestep_spacing="karras")
    for part in ("act_fn must", "norm_eps must", "clip_sample must", "did you mean 'steps_offset'", "--set: timestep"):
        assert part in str(caught.value)


# -- without config.json ----------------------------------------------------------------------------------------------

UNTOLD = "center_input_sample freq_shift flip_sin_to_cos mid_block_scale_factor downsample_padding act_fn norm_eps"
TRAINED = "num_train_timesteps beta_start beta_end beta_schedule prediction_type"


def test_a_bare_state_dict_converts_with_what_info_asks_for(tmp_path: Path) -> None:
    path = write(tmp_path / "pipeline" / "unet")
    write_scheduler(tmp_path / "pipeline" / "scheduler")
    bare = Path(shutil.copy(path, tmp_path / "model.safetensors"))
    lines = describe(bare)
    asked = ["sample_size=SIDE", "attention_head_dim=N", "norm_num_groups=N"]
    assert lines[-2].startswith(f"  untold      {', '.join((*UNTOLD.split(), *TRAINED.split()))}: no tensor tells ")
    assert lines[-1] == " ".join([f"convert it:   jddim convert {bare} DST", *(f"--set {ask}" for ask in asked)])
    wrapped = tmp_path / "last.ckpt"
    state = {f"model.unet.{key}": torch.from_numpy(value) for key, value in tensors().items()}
    torch.save({"state_dict": state, "epoch": 3}, wrapped)
    expected = convert(tmp_path / "pipeline", tmp_path / "expected", verify=False)
    settings = {"sample_size": "6", "attention_head_dim": "4", "norm_num_groups": "2", "variance_type": "fixed_large"}
    for src in (bare, wrapped):
        found = convert(src, tmp_path / src.stem, settings=settings)
        assert (found.model, found.params_sha256) == (expected.model, expected.params_sha256)
        assert found.provenance["verification"]["output_error"] <= 2e-5
        assert any("norm_eps = 1e-05" in line for line in found.provenance["assumed"])
        assert not any("block_out_channels" in line for line in found.provenance["assumed"])
        _, untold = found.provenance["warnings"]
        assert "flip_sin_to_cos, " in untold
        assert "its samples are wrong, and a comparison of the networks does not see it" in untold
        assert found.provenance["unchecked"] == ["sample_size", "attention_head_dim", "norm_num_groups"]
        assert verify(tmp_path / src.stem, src).first_bad is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"block_out_channels": "4,4"}, r"block_out_channels is \(4, 4\) by --set, but \(4, 8\) by the tensors"),
        ({"layers_per_block": "2"}, "layers_per_block is 2 by --set, but 1 by the tensors"),
        ({"num_class_embeds": "10"}, "num_class_embeds is 10 by --set, but null by the tensors"),
        ({"attention_head_dim": "3"}, "cannot be split into heads of head_channels=3"),
        ({"norm_num_groups": "3"}, "multiple of norm_groups=3"),
        ({"time_embedding_dim": "17"}, "time_embedding_dim is 17 by --set, but null by the tensors"),
        (
            {"down_block_types": "DownBlock2D,DownBlock2D"},
            "down_block_types is .* by --set, but .*Attn.* by the tensors",
        ),
        ({"attn_norm_num_groups": "5"}, "width 8 must be a multiple of mid_norm_groups=5"),
    ],
)
def test_what_a_bare_state_dict_contradicts_is_refused(told: dict[str, str], message: str) -> None:
    settings = {"sample_size": "6", "attention_head_dim": "4", "norm_num_groups": "2"}
    with pytest.raises(ConversionError, match=message) as caught:
        family.plan(tensors(), {}, settings | told)
    assert not isinstance(caught.value, UnsettledError)


def test_what_says_the_same_in_other_words_is_no_contradiction() -> None:
    settings = {"sample_size": "6", "attention_head_dim": "4", "norm_num_groups": "2"}
    expected = family.plan(tensors(), {}, settings).model
    same = {"time_embedding_dim": "16", "down_block_types": "DownBlock2D,AttnDownBlock2D", "layers_per_block": "1"}
    found = family.plan(
        tensors(), {}, settings | same | {"up_block_types": "AttnUpBlock2D,ResnetUpsampleBlock2D"}
    ).model
    assert found == dataclasses.replace(expected, time_channels=16)


def test_a_bare_state_dict_that_is_not_whole_is_said(tmp_path: Path) -> None:
    state = tensors()
    settings = {"sample_size": "6", "attention_head_dim": "4", "norm_num_groups": "2"}
    for lost, message in (
        ("up_blocks", "the blocks do not add up to a UNet2DModel: 2 down_blocks and 0 up_blocks"),
        ("conv_in", "too few tensors of the UNet2DModel"),
        ("down_blocks.0.resnets.0.conv1.weight", "missing down_blocks.0.resnets.0.conv1.weight"),
    ):
        path = tmp_path / "w.safetensors"
        save_file({key: value for key, value in state.items() if not key.startswith(lost)}, path)
        with pytest.raises(ConversionError, match=message):
            convert(path, tmp_path / "out", settings=settings)


def test_weights_must_fit_their_config(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(NETWORK | {"layers_per_block": 2}))
    with pytest.raises(ConversionError, match=r"tensors do not fit the model: missing down_blocks\.0\.resnets\.1"):
        convert(path, tmp_path / "out")


def test_diffusers_other_networks_are_named(tmp_path: Path) -> None:
    stem = {f"{name}.weight": np.zeros(2, np.float32) for name in ("conv_norm_out", "time_embedding.linear_1")}
    for name, message in (
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "cross-attention to text"),
        ("encoder.down_blocks.0.resnets.0.norm1.weight", "autoencoder"),
        ("down_blocks.0.resnets.0.norm1.weight", "too few names of a UNet2DModel"),
    ):
        save_file(stem | {name: np.zeros(2, np.float32)}, tmp_path / "w.safetensors")
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / "w.safetensors", tmp_path / "out")


def test_an_output_of_zeros_is_said(tmp_path: Path) -> None:
    state = tensors()
    write(tmp_path / "unet", {key: value * (not key.startswith("conv_out.")) for key, value in state.items()})
    lines: list[str] = []
    metadata = convert(tmp_path, tmp_path / "out", say=lines.append)
    assert "  WARNING: its output is all zero: untrained?" in lines
    assert metadata.provenance["verification"]["all_zero"] is True
    assert "its scale (allowed: 0.0001); its output is all zero: untrained?" in (tmp_path / "out/README.md").read_text()
    assert str(verify(tmp_path / "out", tmp_path)).endswith("\nits output is all zero: untrained?")


@pytest.mark.parametrize("kind", ["fourier", "learned"])
def test_verification_gives_a_network_only_what_it_takes(tmp_path: Path, kind: str) -> None:
    """Fourier features have no log 0; a table of t takes labels embedded as t is only as its rows."""
    one_level = {"block_out_channels": [4], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    state = {"time_embedding_type": kind, "class_embed_type": "timestep", "num_train_timesteps": 9, **one_level}
    write(tmp_path / "unet", **state)
    write_scheduler(tmp_path, num_train_timesteps=9, steps_offset=0, timestep_spacing="trailing")
    metadata = convert(tmp_path, tmp_path / "out", settings={"num_inference_steps": "3"})
    assert metadata.provenance["verification"]["output_error"] <= 2e-5


# -- back -------------------------------------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "another network and scheduler": (
        {
            **{"sample_size": [8, 12], "block_out_channels": [4, 6, 4], "layers_per_block": 1, "act_fn": "gelu"},
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D"],
            **{"attention_head_dim": 2, "resnet_time_scale_shift": "scale_shift", "class_embed_type": "timestep"},
            **{"center_input_sample": True, "mid_block_scale_factor": 1.5, "freq_shift": 1, "flip_sin_to_cos": False},
        },
        {
            **{"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 40},
            **{"prediction_type": "sample", "thresholding": True, "timestep_spacing": "trailing"},
            **{"set_alpha_to_one": False, "_jddim": {"num_inference_steps": 7, "eta": 0.25}},
        },
    ),
    "tables, given betas": (
        {
            **{"time_embedding_type": "learned", "num_train_timesteps": 3, "num_class_embeds": 5, "norm_eps": 1e-6},
            **{"attention_head_dim": None, "downsample_padding": 0, "attn_norm_num_groups": 1, "add_attention": True},
        },
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3, "rescale_betas_zero_snr": True}
        | {"prediction_type": "v_prediction"},
    ),
    "learned variance, sigmoid": (
        {"out_channels": 2, "time_embedding_type": "fourier", "mid_block_type": None, "time_embedding_dim": 12},
        {"variance_type": "learned_range", "beta_schedule": "sigmoid", "steps_offset": 1},
    ),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_there_and_back_is_bit_identical(tmp_path: Path, name: str) -> None:
    network, scheduler = ROUND_TRIPS[name]
    write(tmp_path / "first" / "unet", **network)
    write_scheduler(tmp_path / "first" / "scheduler", **scheduler)
    first = convert(tmp_path / "first", tmp_path / "a", verify=False)
    assert export(tmp_path / "a", tmp_path / "second") == "diffusers"
    again = convert(tmp_path / "second", tmp_path / "b", verify=False)
    assert again.params_sha256 == first.params_sha256
    assert (again.model, again.schedule, again.sampler) == (first.model, first.schedule, first.sampler)
    assert again.provenance["assumed"] == []


def held(fields: dict[str, Any], sampler: dict[str, Any]) -> str:
    """Why a model with these fields cannot be written as diffusers; "" if it can."""
    base = {"image_size": (6, 6), "channels": 8, "channel_mults": (1, 2), "norm_groups": 2, "num_res_blocks": 1}
    config = UNetConfig(**{**base, **fields})
    metadata = Metadata(config, ScheduleConfig(), SamplerConfig(**sampler))
    problems = []
    for make in (lambda: configs.unet_json(config), lambda: configs.scheduler_json(metadata)):
        try:
            make()
        except ConversionError as error:
            problems.append(str(error))
    return "; ".join(problems)


@pytest.mark.parametrize(
    ("fields", "sampler", "reason"),
    [
        ({}, {}, ""),  # Ho et al.'s, linspace in 50 steps of 1000
        ({"conv_shortcut": True}, {}, "conv_shortcut is True, there always False"),
        ({"downsample": ("pool",)}, {}, "downsample is ('pool',), there conv or resnet"),
        ({"channel_mults": (2, 2)}, {}, "channels, stem and first level are 8, 8 and 16 wide"),
        ({"attention_levels": (0, 1), "num_heads": 2}, {}, "the attentions' heads are [4, 8] channels wide"),
        ({"attention_levels": (1,), "num_heads": 2}, {}, ""),
        ({"mid_norm_groups": 0}, {}, "mid_norm_groups is 0 without scale_shift"),
        (
            {"channel_mults": (1, 1, 1), "image_size": (8, 8), "attention_levels": (0, 1)}
            | {"upsample": ("conv", "resnet"), "downsample": ("conv", "resnet")},
            {},
            "downsample is ('conv', 'resnet') at levels with attention, there one downsample_type for all",
        ),
        ({}, {"spacing": "linspace", "num_steps": 30}, "as trailing only where num_steps divides 1000; it is 30"),
        ({}, {"spacing": "uniform", "num_steps": 20}, ""),
        ({}, {"spacing": "quad"}, "the spacing quad visits other timesteps"),
        ({}, {"clip_range": (-1.0, 2.0)}, "clip_range is (-1.0, 2.0), there -R..R"),
        ({}, {"timestep_scale": 0.25}, "the network is given t times 0.25"),
        ({}, {"self_condition": True}, "self_condition is True"),
    ],
)  # fmt: skip
def test_what_diffusers_cannot_hold_is_refused_with_the_reason(
    fields: dict[str, Any], sampler: dict[str, Any], reason: str
) -> None:
    assert held(fields, sampler) == reason if not reason else reason in held(fields, sampler)


def test_other_sources_defaults_keep_their_numbers(tmp_path: Path) -> None:
    """A schedule that diffusers has not goes by its betas; scaled_linear's ends differ from diffusers' defaults."""
    config = UNetConfig((6, 6), channels=8, channel_mults=(1, 2), norm_groups=2)
    for schedule in (ScheduleConfig("sigmoid_alpha_bar", 9), ScheduleConfig("scaled_linear", 9)):
        told = configs.read_configs(
            {
                "unet": configs.unet_json(config),
                "scheduler": configs.scheduler_json(Metadata(config, schedule, SamplerConfig(num_steps=3))),
            },
            {},
        )
        np.testing.assert_array_equal(
            make_schedule(configs.schedule_config(told.scheduler)).betas, make_schedule(schedule).betas
        )
