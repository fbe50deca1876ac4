"""Training a checkpoint that has a first stage: on images, which are encoded, or on latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from PIL import Image
from tiny import write_checkpoint

import jddim
from jddim.checkpoint.folder import load_metadata, load_params
from jddim.checkpoint.metadata import FIRST_STAGE
from jddim.cli.main import main
from jddim.config import AutoencoderConfig
from jddim.images import from_uint8
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.train import loop
from jddim.train.data import Data, read
from jddim.train.task import Task

pytestmark = pytest.mark.unoptimised

STAGE = AutoencoderConfig(
    **{"image_size": (10, 14), "latent_channels": 2, "channels": 4, "channel_mults": (1, 1), "num_res_blocks": 1},
    **{"norm_groups": 2, "mid_attention": False, "scaling_factor": 0.7},
)
RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (11, 10, 14, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 2, 11).astype(np.int32)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields: dict[str, Any] = {"image_size": (5, 7), "in_channels": 2, "out_channels": 2, "attention_levels": ()}
    fields |= {"class_embedding": "learned", "num_classes": 3}
    recorded: dict[str, Any] = {"autoencoder": {"family": "autoencoder"}}  # as a conversion has them
    recorded |= {"null_label": 2, "label_names": {"cat": 0, "dog": 1}}
    return write_checkpoint(tmp_path_factory.mktemp("train") / "c", autoencoder=STAGE, provenance=recorded, **fields)


def test_images_are_encoded_and_the_first_stage_stays(ckpt: Path, tmp_path: Path, capsys: Any) -> None:
    np.savez(tmp_path / "images.npz", arr_0=PIXELS, arr_1=LABELS)
    ddim = jddim.load(ckpt)
    z = np.asarray(ddim.encode(from_uint8(PIXELS)))
    np.savez(tmp_path / "latents.npz", arr_0=z, arr_1=LABELS)
    how = ["--devices", "1", "--sample-every", "2", "--sample-num", "1", "--set", "label_dropout=0.3"]
    how += ["--set", "batch_size=4", "--set", "warmup_steps=0", "--set", "ema_decay=0.5"]
    images, latents, out = (str(tmp_path / name) for name in ("images.npz", "latents.npz", "out"))
    assert main(["train", str(ckpt), images, out, "--set", "steps=2", *how]) == 0
    made, before = load_metadata(Path(out)), load_params(ckpt, load_metadata(ckpt))
    assert made.provenance["data"]["latents"] == "encoded by the mean"
    assert (made.autoencoder, made.null_label, made.label_names) == (STAGE, 2, {"cat": 0, "dog": 1})
    assert made.provenance["autoencoder"] == {"family": "autoencoder"}
    for name, value in load_params(Path(out), made).items():
        assert np.array_equal(value, before[name]) == name.startswith(FIRST_STAGE), name
    with Image.open(tmp_path / "out.run" / "samples" / "step-00000002.png") as grid:
        assert grid.mode == "RGB"
    task = Task(ddim.model.config)  # type: ignore[arg-type]
    assert ddim.autoencoder is not None
    encoded = loop._encoded(Data(PIXELS, LABELS), task, ddim.autoencoder).pixels
    chex.assert_trees_all_close(encoded, z, atol=1e-5)
    assert loop._encoded(Data(z, None), task, ddim.autoencoder).pixels is z
    (tmp_path / "out.run").rename(tmp_path / "other.run")
    capsys.readouterr()
    for setting, data, told in (
        ("flip=true", images, "flip would mirror latents"),
        ("null_label=1", images, "null_label 1 is the label of"),
        ("steps=9", latents, "data.latents was encoded by the mean, now as they are"),
    ):
        assert main(["train", str(ckpt), data, str(tmp_path / "other"), *how, "--set", setting]) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_what_is_neither_image_nor_latent_is_refused(tmp_path: Path) -> None:
    config = jddim.config.UNetConfig((5, 7), 2, 2, channels=8, channel_mults=(1,), attention_levels=(), norm_groups=4)
    for array, told in (
        (
            np.zeros((2, 5, 7, 2), np.uint8),
            "images are 5x7x2, the network's are 10x14x3 and its latents, as floats, 5x7x2$",
        ),
        (np.full((2, 10, 14, 3), 1.5, np.float32), r"floats must lie in \[-1, 1\]; those of image 0 do not"),
        (np.array([[np.zeros((7, 2))] * 5, [np.full((7, 2), np.inf)] * 5], np.float32), "latent 1 holds a NaN or inf"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=told):
            read(tmp_path / "a.npy", config, STAGE)
    np.save(tmp_path / "a.npy", 9 * np.ones((2, 5, 7, 2), np.float32))
    assert read(tmp_path / "a.npy", config, STAGE).pixels.max() == 9
    with pytest.raises(ValueError, match="floats must lie in"):
        read(tmp_path / "a.npy", config)


def test_an_encoder_that_makes_no_numbers_is_told(tmp_path: Path) -> None:
    params = {
        name: np.full(leaf.shape, np.inf, np.float32) for name, leaf in flat_params(abstract_model(STAGE)).items()
    }
    stage: Any = build_model(STAGE, params, "float32")
    config = jddim.config.UNetConfig((5, 7), 2, 2, channels=8, channel_mults=(1,), attention_levels=(), norm_groups=4)
    with pytest.raises(FloatingPointError, match=r"encoder made a NaN or infinity of an image among 0\.\.2 of"):
        loop._encoded(Data(PIXELS[:3], None), Task(config), stage)
