"""A checkpoint of each family gives a picture by the first command one thinks of, or by the two that its error says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

pytest.importorskip("torch", reason="the sources are PyTorch's: pip install 'jddim[convert]'")

from safetensors.numpy import save_file
from test_recognition import CASES, DIFFUSERS, state

import jddim
from convert.writers import save_torch
from jddim.checkpoint.folder import load_metadata
from jddim.cli.main import main

pytestmark = pytest.mark.unoptimised

QUICK = ("--num", "1", "--steps", "1")
COMMIT = "1234567890abcdef1234567890abcdef12345678"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JDDIM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch is not installed: each family's verification is tried in its own tests."""
    monkeypatch.setattr("convert.verify.can_verify", lambda: False)


def write_unet(folder: Path) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    save_file(state("diffusers"), folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **DIFFUSERS}))
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')


def write_run(folder: Path) -> None:
    folder.mkdir()
    save_torch([tiny.arrays(), {}, 3, 100], folder / "ckpt.pth")
    (folder / "config.yml").write_text("data: {image_size: 6x10}\nmodel: {norm_groups: 4}\n")


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize(
    ("write", "folder", "inside"), [(write_unet, "pipeline", "unet"), (write_run, "logs", "ckpt.pth")]
)
def test_what_lies_with_its_settings_needs_one_command(write: Callable[[Path], None], folder: str, inside: str) -> None:
    write(Path(folder))
    assert main(["sample", folder, "a.png", *QUICK]) == 0
    assert Path("a.png").is_file()
    assert jddim.load(Path(folder, inside)).metadata.params_sha256 == jddim.load(folder).metadata.params_sha256


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("case", ["ho", "diffusers", "openai", "pytorch_ddpm", "MONAI core", "lucidrains' diffusion"])
def test_a_bare_file_says_the_two_commands(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, _, config, settings = CASES[case]
    settings = settings or {"sample_size": "6", "attention_head_dim": "3", "norm_num_groups": "2"}
    save_torch(state(case), Path("model.pt"))
    assert main(["sample", "model.pt", "a.png", *QUICK]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    (command,) = re.findall(
        r"convert it once: jddim (convert model\.pt DST .*), then name DST in place of model\.pt; or", said.err
    )
    asked = re.findall(r"--set (\w+)=(?:SIDE|N|BOOLEAN)", command)
    assert set(asked) <= set(settings)
    for key in asked:
        command = re.sub(rf"--set {key}=\S+", f"--set {key}={settings[key]}", command)
    more = [part for key in settings.keys() - set(asked) for part in ("--set", f"{key}={settings[key]}")]
    assert main([*shlex.split(command), *more]) == 0
    assert main(["sample", "DST", "a.png", *QUICK]) == 0
    assert Path("a.png").is_file()
    assert load_metadata("DST").provenance["family"] == family
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert main(["cite", "model.pt", *options]) == 0  # without a conversion of one's own
    assert jddim.load("model.pt", settings=settings).model.config == load_metadata("DST").model


def test_what_no_setting_makes_right_gets_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    damaged = {name: value for name, value in state("ho").items() if name != "norm_out.weight"}
    save_torch(damaged, Path("model.pt"))
    assert main(["sample", "model.pt", "a.png"]) == 1
    said = capsys.readouterr().err
    assert "; and whatever is told, 1 tensor does not fit the model: missing norm_out.weight" in said
    assert "jddim convert" not in said


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache with `someone/tiny` in it, main at COMMIT; offline."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="hub ids need it: pip install 'jddim[hub]'")
    folder = tmp_path / "hub" / "models--someone--tiny"
    write_unet(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def test_a_hub_id_needs_one_command(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "someone/tiny", "a.png", *QUICK]) == 0
    (folder,) = Path("cache/jddim-checkpoints").glob("[!.]*")
    assert folder.name.startswith("tiny-")
    told = capsys.readouterr()
    assert told.err.startswith(f"someone/tiny is converted once, into {folder.absolute()}\n")
    assert "  verified: largest error " in told.err
    assert told.out.startswith("1 image in 1 ddim step")
    source = load_metadata(folder).provenance["source"]
    assert (source["hub_id"], source["commit"]) == ("someone/tiny", COMMIT)
    for name in (f"someone/tiny@{COMMIT}", "someone/tiny@main"):  # the same commit
        assert jddim.load(name).metadata == load_metadata(folder)
        assert capsys.readouterr().err == f"{name}: converted before, {folder.absolute()}\n"
    assert jddim.load("someone/tiny", revision=COMMIT).metadata == load_metadata(folder)
    assert main(["cache"]) == 0
    assert f"from someone/tiny@{COMMIT}\n" in capsys.readouterr().out


def test_offline_and_without_the_package_one_line_says_why(
    hub: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "no such file or folder: google/ddpm-cifar10-32, and as a hub id it cannot be had: it is not in the hub's"
    assert f"{missing} cache, and HF_HUB_OFFLINE is set" in fails("sample", "google/ddpm-cifar10-32", "a.png")
    near = fails("sample", "google/ddpm-cifar-32", "a.png")
    assert near.endswith("is not fetched; did you mean google/ddpm-cifar10-32? (jddim list: all)\n")
    (weights,) = hub.rglob("*.safetensors")
    weights.unlink()
    assert f"the hub's cache holds no weights of someone/tiny ({COMMIT}), and" in fails(
        "sample", "someone/tiny", "a.png"
    )


def test_why_the_hub_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("huggingface_hub.errors", reason="hub ids need it: pip install 'jddim[hub]'")
    from convert import hub

    def raised(kind: type[Exception]) -> Exception:
        return kind.__new__(kind)

    assert "consent first" in hub._why(raised(errors.GatedRepoError))
    assert "not that revision" in hub._why(raised(errors.RevisionNotFoundError))
    assert "none of that name" in hub._why(raised(errors.RepositoryNotFoundError))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "the hub cannot be reached" in hub._why(raised(errors.LocalEntryNotFoundError))
    assert hub._why(ValueError("\n  a\nb")) == "a"
    assert hub._why(ValueError()) == "ValueError"
