"""convert.sources: which file of a trainer's folder is taken, and that it is found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

pytest.importorskip("torch", reason="the files are PyTorch's: pip install 'jddim[convert]'")

from safetensors.numpy import save_file

from convert.conversion import convert, describe, verify
from convert.engine import ConversionError
from convert.families import ho
from convert.sources import find
from convert.writers import save_torch

pytestmark = pytest.mark.unoptimised


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_guided_diffusions_folder_has_its_newest_average(tmp_path: Path) -> None:
    touch(tmp_path, "model090000.pt", "model100000.pt", "opt100000.pt", "log.txt")
    assert find(tmp_path).file.name == "model100000.pt"
    with pytest.raises(ConversionError, match="holds no ema weights"):
        find(tmp_path, "ema")
    touch(tmp_path, "ema_0.9999_090000.pt", "ema_0.9999_100000.pt")
    for weights, name in ((None, "ema_0.9999_100000.pt"), ("ema", "ema_0.9999_100000.pt"), ("raw", "model100000.pt")):
        assert find(tmp_path, weights).file.name == name
    rest = "ema_0.9999_090000.pt; model090000.pt; model100000.pt; opt100000.pt"
    assert find(tmp_path).choice == f"{tmp_path}/ema_0.9999_100000.pt, chosen among {rest}"
    touch(tmp_path, "ema_0.999_100000.pt")
    with pytest.raises(
        ConversionError, match=r"several rates; name one: ema_0\.9999_100000\.pt, ema_0\.999_100000\.pt"
    ):
        find(tmp_path)


def test_accelerates_folder_and_an_unknown_one(tmp_path: Path) -> None:
    touch(tmp_path, "optimizer.bin", "random_states_0.pkl")
    with pytest.raises(ConversionError, match=r"no family knows; name the checkpoint file in it: optimizer\.bin$"):
        find(tmp_path)
    touch(tmp_path, "model.safetensors")
    assert find(tmp_path).file.name == "model.safetensors"
    touch(tmp_path, "model_1.safetensors")
    with pytest.raises(
        ConversionError, match=r"several models: model\.safetensors; model_1\.safetensors; name the file"
    ):
        find(tmp_path)


def test_a_run_that_has_not_finished_gives_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (500, 1500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        touch(tmp_path / f"checkpoint-{step}" / "unet", "diffusion_pytorch_model.safetensors")
    (tmp_path / "checkpoint-2000").mkdir()  # whose writing was stopped
    assert find(tmp_path).file.parent.parent.name == "checkpoint-1500"
    assert find(tmp_path).to_json()["place"] == "checkpoint-1500/unet/diffusion_pytorch_model.safetensors"
    touch(tmp_path / "unet", "diffusion_pytorch_model.safetensors")
    assert find(tmp_path).file.parent.parent == tmp_path


def test_the_emas_folder_of_pesser_says_so(tmp_path: Path) -> None:
    for name, weights, step in (
        ("ema_diffusion_x/model-1.ckpt", "ema", 1),
        ("diffusion_x/model-70.ckpt", "unstated", 70),
        ("ema_x.ckpt", "ema", None),
        ("ema_diffusion_x/other.ckpt", "unstated", None),
    ):
        source = ho.placed(ho.FAMILY.open_source(tiny.arrays(), name), tmp_path / name, None)
        assert (source.weights, source.step) == (weights, step)


def test_the_weights_that_were_taken_are_found_again(tmp_path: Path) -> None:
    """In a file of two sets, and in a folder that has got newer files since."""
    run = tmp_path / "run"
    run.mkdir()
    save_torch({"a": tiny.arrays(seed=1), "b": {"net": tiny.arrays(seed=2)}, "step": 3}, run / "two.pt")
    lines: list[str] = []
    metadata = convert(
        run / "two.pt", tmp_path / "out", settings=tiny.SETTINGS, weights="b", verify=False, say=lines.append
    )
    assert (metadata.provenance["taken"], metadata.provenance["step"]) == ("b.net", 3)
    assert "  taken: b.net, beside a; step 3" in lines
    assert verify(tmp_path / "out", run / "two.pt").first_bad is None
    with pytest.raises(ConversionError, match="several sets of weights"):
        describe(run / "two.pt", settings=tiny.SETTINGS)

    save_file(tiny.arrays(seed=3), run / "model.safetensors")
    convert(run, tmp_path / "folder", settings=tiny.SETTINGS, verify=False)
    touch(run, "model_1.safetensors")
    assert verify(tmp_path / "folder", run).first_bad is None
