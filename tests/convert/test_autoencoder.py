"""convert.families.autoencoder: first stages of diffusers and of CompVis, alone and beside a network of latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the first stages are built in torch: pip install 'jddim[convert]'")
diffusers = pytest.importorskip("diffusers", reason="parity is with diffusers' own first stages")

import yaml  # noqa: E402

import jddim  # noqa: E402
from convert.engine import ConversionError, UnsettledError  # noqa: E402
from convert.families import autoencoder  # noqa: E402
from convert.reference.autoencoder import ReferenceAutoencoder  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.checkpoint.folder import CheckpointError, load_metadata, load_recorded  # noqa: E402
from jddim.cli.main import main  # noqa: E402
from jddim.config import AutoencoderConfig  # noqa: E402
from jddim.models.autoencoder import Autoencoder  # noqa: E402

pytestmark = pytest.mark.unoptimised

SHAPE: dict[str, Any] = {
    **{"block_out_channels": (8, 12), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 14},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("AutoencoderKL", {"scaling_factor": 0.6, "latent_channels": 5}),
    "kl, shifted, without quant_conv": (
        "AutoencoderKL",
        {"scaling_factor": 0.36, "shift_factor": 0.12, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "kl, without attention": ("AutoencoderKL", {"mid_block_add_attention": False, "latent_channels": 3}),
    "vq": ("VQModel", {"num_vq_embeddings": 37, "latent_channels": 3, "scaling_factor": 0.7}),
    "vq, attention, another width": (
        "VQModel",
        {
            **{"num_vq_embeddings": 37, "latent_channels": 3, "vq_embed_dim": 5, "layers_per_block": 2},
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        },
    ),
}
RNG = np.random.default_rng(5)
IMAGES = np.tanh(RNG.standard_normal((3, 10, 14, 3))).astype(np.float32)


def made(name: str) -> Any:
    """diffusers' own first stage with everything redrawn."""
    kind, changes = CASES[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**(SHAPE | changes))
    redraw_(model, 3)
    return model.eval()


def nchw(array: Any, dtype: Any = None) -> Any:
    return torch.from_numpy(np.array(array, dtype).transpose(0, 3, 1, 2).copy())


def nhwc(tensor: Any) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy().transpose(0, 2, 3, 1)
    return array


def theirs(model: Any, images: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z of images by the mode, scaled; and images of z: as diffusers' pipelines do both."""
    shift, scale = model.config.get("shift_factor") or 0.0, model.config.scaling_factor
    with torch.no_grad():
        found = model.encode(nchw(images))
        mean = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        decoded = model.decode(nchw(z) / scale + shift).sample
    return nhwc((mean - shift) * scale), nhwc(decoded)


def scaled(actual: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """diffusers' first stage, and the checkpoint converted from its folder."""
    folder = tmp_path_factory.mktemp("stage")
    model = made(request.param)
    model.save_pretrained(folder / "vae")
    jddim.convert(folder / "vae", folder / "stage", verify=False)
    return model, folder / "stage"


def test_encoder_and_decoder_are_diffusers_own(pair: tuple[Any, Path]) -> None:
    """2e-5 of the output's scale is the bound of every network here in float32; 1e-11 in float64."""
    model, path = pair
    stage = jddim.load_autoencoder(path)
    z = RNG.standard_normal((3, 5, 7, stage.config.latent_channels)).astype(np.float32)
    for dtype, bound in ((np.float32, 2e-5), (np.float64, 1e-11)):
        with jax.enable_x64(dtype is np.float64):
            stage = jddim.load_autoencoder(path, dtype=dtype)
            encoded, decoded = theirs(
                model.to(torch.from_numpy(np.zeros(0, dtype)).dtype), IMAGES.astype(dtype), z.astype(dtype)
            )
            assert scaled(jax.jit(Autoencoder.encode)(stage, jnp.asarray(IMAGES, dtype)), encoded) < bound
            assert scaled(jax.jit(Autoencoder.decode)(stage, jnp.asarray(z, dtype)), decoded) < bound
    model.float()


def test_a_first_stage_goes_back_to_diffusers(pair: tuple[Any, Path], tmp_path: Path) -> None:
    """Its own class loads what is written, with every tensor as it was."""
    model, path = pair
    assert jddim.converting.export_torch(path, tmp_path / "back") == "diffusers"
    again = type(model).from_pretrained(tmp_path / "back").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_drawn_z_has_the_encoders_mean_and_variance(pair: tuple[Any, Path]) -> None:
    model, path = pair
    stage = jddim.load_autoencoder(path)
    if stage.config.num_codes is not None:
        with pytest.raises(ValueError, match="encode: a VQModel's z is not drawn: leave key out"):
            stage.encode(IMAGES, jax.random.key(0))
        return
    with torch.no_grad():
        gaussian = model.encode(nchw(IMAGES)).latent_dist
    mean, logvar = stage.moments(jnp.asarray(IMAGES))
    assert logvar is not None
    assert scaled(mean, nhwc(gaussian.mean)) < 2e-5
    assert scaled(logvar, nhwc(gaussian.logvar)) < 2e-5
    drawn = stage.encode(jnp.asarray(IMAGES), jax.random.key(0))
    alone = stage.encode(jnp.asarray(IMAGES[:2]), jax.random.key(0))
    np.testing.assert_allclose(alone, drawn[:2], atol=1e-5)  # image i by (key, i), however many there are
    eps = (np.asarray(drawn) / stage.config.scaling_factor + stage.config.shift_factor - mean) / np.exp(0.5 * logvar)
    assert abs(eps.mean()) < 4 * eps.size**-0.5  # standard normal: four standard errors
    assert abs(eps.std() - 1) < 4 * (2 * eps.size) ** -0.5


CONFIG = AutoencoderConfig(
    **{"image_size": (14, 14), "latent_channels": 3, "hidden_channels": 5, "channels": 8, "channel_mults": (1, 1.5)},
    **{"num_res_blocks": 2, "attention_levels": (1,), "norm_groups": 4, "scaling_factor": 0.31},
)
YAML = {
    "model": {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 3,
            "ddconfig": {
                **{"double_z": True, "z_channels": 5, "resolution": 14, "in_channels": 3, "out_ch": 3, "ch": 8},
                **{"ch_mult": [1, 1.5], "num_res_blocks": 2, "attn_resolutions": [7], "dropout": 0.0},
            },
        },
    }
}


def compvis() -> dict[str, Any]:
    """A state dict under CompVis' names."""
    model: ReferenceAutoencoder = autoencoder.reference(CONFIG, compvis=True)
    redraw_(model, 1)
    return dict(model.state_dict())


def test_compvis_names_are_the_same_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A first stage's own file: its loss lies beside it, its config does not tell how z is scaled."""
    state = compvis() | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 3)}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(YAML))
    with pytest.raises(UnsettledError, match=r"do not tell how z is scaled; --set scaling_factor=0\.18215"):
        jddim.convert(tmp_path / "model.ckpt", tmp_path / "stage", settings={"norm_num_groups": 4})
    settings = ["--set", "scaling_factor=0.31", "--set", "norm_num_groups=4"]
    assert main(["convert", str(tmp_path / "model.ckpt"), str(tmp_path / "stage"), *settings]) == 0
    assert "verified: largest error" in capsys.readouterr().out
    metadata = load_recorded(tmp_path / "stage")
    assert metadata.model == CONFIG
    assert metadata.provenance["ignored"].keys() == {"loss.logvar", "loss.discriminator.main.0.weight"}
    with pytest.raises(CheckpointError, match="is a first stage, which is not sampled but decodes what is"):
        load_metadata(tmp_path / "stage")
    assert main(["verify", str(tmp_path / "stage"), str(tmp_path / "model.ckpt")]) == 0
    assert main(["info", str(tmp_path / "stage")]) == 0
    assert "jddim convert NETWORK DST --autoencoder CKPT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "_class_name is 'AutoencoderKLWan'; jddim has AutoencoderKL and VQModel"),
        ({"norm_type": "spatial"}, "norm_type must be one of group, got 'spatial'"),
        ({"act_fn": "relu"}, "act_fn must be one of silu, got 'relu'"),
        ({"latents_mean": [0.0, 1.0]}, "latents_mean: z is scaled channel by channel"),
        ({"block_out_channels": [8, 16]}, r"block_out_channels is \(8, 16\) by the settings, but \(8, 12\) by the ten"),
        ({"down_block_types": ["DownBlock3D"] * 2}, "down_block_types has 'DownBlock3D'"),
        ({"scaling_factor": 0}, "scaling_factor must be a number above 0, got 0"),
        ({"scaling_facter": 2}, "unknown key 'scaling_facter', which diffusers ignores .did you mean 'scaling_factor'"),
        ({"vq_embed_dim": 3}, "vq_embed_dim is of a VQModel, and the tensors have no codebook"),
    ],
)
def test_what_is_not_held_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    made("kl").save_pretrained(tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ConversionError, match=why):
        jddim.convert(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_first_stage_that_must_be_told_something_is_told_by_itself(tmp_path: Path, fails: Any) -> None:
    """The options of the network's conversion are the network's: what is missing here, they cannot tell."""
    torch.save(made("kl").state_dict(), tmp_path / "stage.pt")
    lines = jddim.info(tmp_path / "stage.pt")
    assert lines[-1].endswith("--set norm_num_groups=N --set scaling_factor=NUMBER")  # neither is assumed
    assert not any("untold" in line and "scaling_factor" in line for line in lines)
    unet = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    diffusers.UNet2DModel(**unet, norm_num_groups=4, layers_per_block=1, sample_size=7).save_pretrained(
        tmp_path / "net"
    )
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "net")
    told = fails("convert", tmp_path / "net", tmp_path / "out", "--autoencoder", tmp_path / "stage.pt")
    command = f"jddim convert {tmp_path / 'stage.pt'} STAGE --set norm_num_groups=N --set scaling_factor=NUMBER"
    assert f"This is of the first stage: convert it first, {command}, then give --autoencoder STAGE" in told
    assert not (tmp_path / "out").exists()


def test_half_a_first_stage_and_one_of_video_are_refused(tmp_path: Path) -> None:
    state = compvis()
    torch.save({k: v for k, v in state.items() if not k.startswith("encoder.")}, tmp_path / "half.ckpt")
    torch.save({k: v[..., None] if v.ndim == 4 else v for k, v in state.items()}, tmp_path / "video.ckpt")
    with pytest.raises(ConversionError, match="has a first stage's names, but no encoder; is the file whole"):
        jddim.convert(tmp_path / "half.ckpt", tmp_path / "out")
    with pytest.raises(ConversionError, match="is a first stage of video: encoder"):
        jddim.convert(tmp_path / "video.ckpt", tmp_path / "out")


def test_a_vqmodel_without_a_scaling_factor_is_not_scaled(tmp_path: Path) -> None:
    """diffusers since 0.22 divides by its default of 0.18215, which no VQModel was trained with (its issue 6725)."""
    made("vq").save_pretrained(tmp_path / "vqvae")
    config = tmp_path / "vqvae" / "config.json"
    filed = json.loads(config.read_text())
    del filed["scaling_factor"]
    config.write_text(json.dumps(filed))
    metadata = jddim.convert(tmp_path / "vqvae", tmp_path / "out", verify=False)
    assert isinstance(metadata.model, AutoencoderConfig)
    assert metadata.model.scaling_factor == 1
    assert any(
        fact.startswith("scaling_factor = 1.0 (a VQModel's z is not scaled") for fact in metadata.provenance["assumed"]
    )
