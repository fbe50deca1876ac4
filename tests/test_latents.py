"""A checkpoint with a first stage: images by every door, equal to the pipelines it comes from."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the pipelines are built in torch: pip install 'jddim[convert]'")
diffusers = pytest.importorskip("diffusers", reason="the pipelines are diffusers'")

import yaml  # noqa: E402
from flax import nnx  # noqa: E402

import jddim  # noqa: E402
from convert.families import autoencoder  # noqa: E402
from convert.reference.openai_unet import OpenAIUNet  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.cli.main import main  # noqa: E402
from jddim.config import AutoencoderConfig, DiTConfig  # noqa: E402
from jddim.images import load_images, settings_of  # noqa: E402
from jddim.models import build  # noqa: E402
from jddim.models.autoencoder import Autoencoder  # noqa: E402
from jddim.run.request import Request, RequestError  # noqa: E402

pytestmark = pytest.mark.unoptimised

NUM, S = 3, 5
RNG = np.random.default_rng(3)
X_T = RNG.standard_normal((NUM, 5, 7, 3)).astype(np.float32)
NOISE = RNG.standard_normal((S, NUM, 5, 7, 3)).astype(np.float32)
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


STAGE = AutoencoderConfig(
    **{"image_size": (16, 16), "latent_channels": 3, "channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1},
    **{"norm_groups": 4, "num_codes": 37, "scaling_factor": 1.0},
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """diffusers' LDMPipeline, everything redrawn; as v its latents stay about 1."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"norm_num_groups": 4, "layers_per_block": 1, "sample_size": 14}
    stage = diffusers.VQModel(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=37,
        scaling_factor=0.7,
        **shape,
    )
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **shape
    )
    unet.register_to_config(sample_size=7)
    redraw_(stage, 1)
    redraw_(unet, 2)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **BETAS)
    return diffusers.LDMPipeline(vqvae=stage, unet=unet.eval(), scheduler=scheduler)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("ldm") / "pipeline"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ckpt(folder: Path) -> Path:
    jddim.convert(folder, folder.parent / "ldm")
    return folder.parent / "ldm"


@pytest.fixture(scope="module")
def ddim(ckpt: Path) -> jddim.DDIM:
    return jddim.load(ckpt)


def scaled(actual: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def test_a_checkpoint_goes_back_to_a_pipeline(ckpt: Path, ddim: jddim.DDIM, tmp_path: Path) -> None:
    """Converted again, the parameters are the same to the bit; diffusers loads it, and its images are ours."""
    assert main(["export-torch", str(ckpt), str(tmp_path / "back")]) == 0
    again = jddim.convert(tmp_path / "back", tmp_path / "again", verify=False)
    assert ddim.metadata is not None
    assert (again.params_sha256, again.autoencoder) == (ddim.metadata.params_sha256, ddim.metadata.autoencoder)  # type: ignore[union-attr]
    theirs = diffusers.LDMPipeline.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        images = theirs.vqvae.decode(torch.from_numpy(X_T.transpose(0, 3, 1, 2).copy()) / 0.7).sample
    assert scaled(ddim.decode(X_T), images.numpy().transpose(0, 2, 3, 1)) < 2e-5
    assert main(["export-torch", str(ckpt), str(tmp_path / "openai.pt"), "--format", "openai"]) == 1
    assert not (tmp_path / "openai.pt").exists()


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_run_is_the_pipelines(pipeline: Any, ddim: jddim.DDIM, eta: float) -> None:
    """Latents injected, noise too: the images within 1e-4 of their scale (6e-7 measured)."""
    scheduler, z = pipeline.scheduler, torch.from_numpy(X_T.transpose(0, 3, 1, 2).copy())
    scheduler.set_timesteps(S)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            drawn = torch.from_numpy(NOISE[i].transpose(0, 3, 1, 2).copy()) if eta else None
            z = scheduler.step(pipeline.unet(z, t).sample, t, z, eta=eta, variance_noise=drawn).prev_sample
        images = pipeline.vqvae.decode(z / pipeline.vqvae.config.scaling_factor).sample
    how: dict[str, Any] = {"x_T": X_T, "noise": NOISE, "eta": eta, "steps": S}
    latents = ddim.sample(latents=True, **how)
    assert scaled(latents, z.numpy().transpose(0, 2, 3, 1)) < 1e-4
    made = ddim.sample(**how)
    assert made.shape == (NUM, 10, 14, 3)
    assert scaled(made, images.numpy().transpose(0, 2, 3, 1)) < 1e-4
    chex.assert_trees_all_equal(ddim.decode(latents), made)


def test_the_bits_of_an_image_do_not_depend_on_who_asks(ddim: jddim.DDIM) -> None:
    whole = ddim.sample(0, 4, steps=2, eta=0.5)
    chex.assert_trees_all_equal(ddim.sample(0, 4, steps=2, eta=0.5, on_segment=lambda now: None), whole)
    latents = ddim.sample(0, 4, steps=2, eta=0.5, latents=True)
    chex.assert_trees_all_equal(ddim.decode(latents[2:3]), whole[2:3])  # decoded one at a time, however many
    chex.assert_trees_all_close(ddim.sample(0, 4, steps=2, eta=0.5, decode_batch=3), whole, atol=1e-5)
    inside = jax.jit(lambda key: ddim.sample(key, 4, steps=2, eta=0.5))(jax.random.key(0))
    chex.assert_trees_all_close(inside, whole, atol=1e-5)


def test_images_are_encoded_before_they_are_edited_or_inverted(ddim: jddim.DDIM) -> None:
    images = np.tanh(RNG.standard_normal((2, 10, 14, 3))).astype(np.float32)
    z = ddim.encode(images)
    assert z.shape == (2, 5, 7, 3)
    pixels = dataclasses.replace(ddim, autoencoder=None)
    chex.assert_trees_all_close(
        ddim.invert(images / 2, steps=3, decode_batch=2), pixels.invert(ddim.encode(images / 2), steps=3), atol=1e-5
    )
    edited = ddim.edit(images, 0, strength=0.5, steps=4)
    chex.assert_trees_all_close(edited, ddim.decode(pixels.edit(z, 0, strength=0.5, steps=4)), atol=1e-4)


def test_a_latent_is_kept_where_all_of_its_pixels_are(ddim: jddim.DDIM) -> None:
    images = np.tanh(RNG.standard_normal((2, 10, 14, 3))).astype(np.float32)
    mask = -np.ones((10, 14, 1), np.float32)
    mask[3:, 5:] = 1  # the second row and third column of latents are cut by it
    latent_mask = -np.ones((5, 7, 1), np.float32)
    latent_mask[1:, 2:] = 1
    z, pixels = ddim.encode(images), dataclasses.replace(ddim, autoencoder=None)
    made = pixels.edit(z, 0, mask=latent_mask, steps=4)
    edited = ddim.edit(images, 0, mask=mask, steps=4)
    chex.assert_trees_all_close(edited, ddim.decode(made), atol=1e-4)
    pasted = ddim.edit(images, 0, mask=mask, steps=4, paste=True)
    chex.assert_trees_all_equal(pasted[:, :3], images[:, :3])
    chex.assert_trees_all_equal(pasted[:, 3:, 5:], edited[:, 3:, 5:])
    with pytest.raises(ValueError, match="paste is of what a mask keeps: give mask, or leave it out"):
        ddim.edit(images, 0, strength=0.5, paste=True)


def test_what_is_encoded_or_decoded_has_its_form(ddim: jddim.DDIM) -> None:
    images = np.zeros((2, 10, 14, 3), np.float32)
    for door, given, why in (
        (
            ddim.encode,
            (images * 0 + 9).astype(np.uint8),
            "images must be float32, got uint8: give images / 127.5 - 1 as",
        ),
        (ddim.encode, images + 200, r"images must lie in \[-1, 1\], got 200..200"),
        (ddim.encode, images.transpose(0, 3, 1, 2), r"images looks like \(N, C, H, W\), got \(2, 3, 10, 14\)"),
        (ddim.encode, torch.zeros(2, 3, 10, 14), r"got torch's Tensor: give images\.permute\(0, 2, 3, 1\)"),
        (ddim.decode, X_T.transpose(0, 3, 1, 2), r"z looks like \(N, C, H, W\)"),
        (ddim.decode, torch.zeros(2, 5, 7, 3), "z must be an array of jax or NumPy, got torch's Tensor"),
        (ddim.decode, X_T[..., :2], r"z must have shape \(3, 5, 7, 3\), got \(3, 5, 7, 2\)"),
    ):
        with pytest.raises(RequestError, match=why):
            door(given)  # type: ignore[operator]
    assert ddim.autoencoder is not None
    with pytest.raises(ValueError, match=r"images must be floats .* got uint8"):
        ddim.autoencoder.encode(jax.numpy.zeros((2, 10, 14, 3), np.uint8))


def test_what_is_asked_of_pixels_alone_or_of_latents_is_refused(ddim: jddim.DDIM) -> None:
    made = ddim.sample(0, image_size=(20, 14), steps=1)
    assert made.shape == (1, 20, 14, 3)
    with pytest.raises(ValueError, match="image size 21x14 does not divide"):
        ddim.sample(0, image_size=(21, 14))
    with pytest.raises(ValueError, match=r"latents is a switch here.* what diffusers calls latents is x_T"):
        ddim.sample(latents=X_T)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="decode_batch must be at least 1, got 0"):
        ddim.sample(0, decode_batch=0)
    pixels = dataclasses.replace(ddim, autoencoder=None)
    with pytest.raises(ValueError, match="paste is of a checkpoint with a first stage"):
        pixels.edit(X_T / 9, 0, mask=np.ones((5, 7, 1), np.float32), paste=True)
    for asked in ({"latents": True}, {"decode_batch": 2}):
        with pytest.raises(ValueError, match="is of a checkpoint with a first stage, of which this has none"):
            pixels.sample(0, **asked)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decode: this checkpoint has no first stage: its network makes images"):
        pixels.decode(X_T)


@pytest.mark.parametrize("latents", [None, True])
def test_an_exported_sampler_has_the_decoder_or_not(ddim: jddim.DDIM, latents: bool | None) -> None:
    pytest.importorskip("flatbuffers", reason="exports are written by flatbuffers: pip install 'jddim[export]'")
    from jddim.scale.export import export_sampler

    made = export_sampler(ddim, Request(steps=2, latents=latents), platforms=("cpu",))
    assert any(name.startswith("autoencoder.") for name in made.weights) == (latents is None)
    images = made.program.call(made.weights, np.uint32(0), np.arange(3, dtype=np.uint32), np.float32(0.5))
    chex.assert_trees_all_close(images, ddim.sample(0, 3, steps=2, eta=0.5, latents=latents), atol=1e-5)


def test_on_a_mesh_each_device_decodes_its_own(ddim: jddim.DDIM) -> None:
    from jddim.scale.sharding import Sharded, make_mesh

    sharded = Sharded(ddim, make_mesh())
    num = 2 * len(jax.devices())
    whole = ddim.sample(0, num, steps=2, eta=0.5)
    made = sharded.sample(0, num, steps=2, eta=0.5)
    chex.assert_trees_all_close(made, whole, atol=1e-5)
    latents = sharded.sample(0, num, steps=2, eta=0.5, latents=True)
    chex.assert_trees_all_equal(ddim.decode(np.asarray(latents)), made)  # decoded by the same program
    assert sharded.sample(0, num, steps=1, image_size=(20, 14)).shape == (num, 20, 14, 3)
    for asked, why in (
        ({"image_size": (21, 14)}, "image size 21x14 does not divide"),
        ({"decode_batch": 0}, "at least 1"),
    ):
        with pytest.raises(RequestError, match=why):
            sharded.sample(0, num, steps=1, **asked)


def test_the_pages_python_runs(ckpt: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "families" / "autoencoder.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    shutil.copytree(ckpt, tmp_path / "faces")
    jddim.convert(folder / "vqvae", tmp_path / "stage", verify=False)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["images"].shape == (4, 14, 14, 3)
    assert found["z"].shape == (4, 7, 7, 3)


def test_images_of_other_channels_than_the_latents_are_edited_and_inverted(ddim: jddim.DDIM) -> None:
    """Most first stages have latents of 4 channels: what is given in pixels has their size and channels, not z's."""
    config = dataclasses.replace(ddim.model.config, in_channels=4, out_channels=4)  # type: ignore[type-var]
    stage = Autoencoder(dataclasses.replace(STAGE, latent_channels=4, num_codes=None), rngs=nnx.Rngs(0))
    four = dataclasses.replace(ddim, model=build(config, dtype=np.float32, rngs=nnx.Rngs(1)), autoencoder=stage)
    for size in ((14, 14), (10, 22)):
        images = jax.ShapeDtypeStruct((2, *size, 3), np.float32)
        edited = jax.eval_shape(lambda images: four.edit(images, 0, strength=0.5, steps=4), images)
        assert edited.shape == images.shape
        inverted = jax.eval_shape(lambda images: four.invert(images, steps=4), images)
        assert inverted.shape == (2, size[0] // 2, size[1] // 2, 4)
    for wrong, told in (
        (np.zeros((2, 7, 7, 4), np.float32), r"images must have shape \(2, 14, 14, 3\), got \(2, 7, 7, 4\)$"),
        (np.zeros((14, 14, 3), np.float32), r"images must have shape \(num, h, w, 3\) with num .* got \(14, 14, 3\)$"),
    ):
        with pytest.raises(RequestError, match=told):
            four.edit(wrong, 0, strength=0.5, steps=4)
    with pytest.raises(RequestError, match="latents of 3 channels, the network samples 4: they do not belong together"):
        dataclasses.replace(four, autoencoder=ddim.autoencoder).sample(0, steps=1)


def test_a_size_that_does_not_divide_is_told_in_pixels(ddim: jddim.DDIM) -> None:
    """A patch of 2x2 latents of 2x2 pixels each: what is nearest is of pixels, too."""
    config = DiTConfig((8, 8), in_channels=3, out_channels=3, channels=8, depth=1, num_heads=1)
    patches = dataclasses.replace(ddim, model=build(config, dtype=np.float32, rngs=nnx.Rngs(0)))
    told = "image size 18x16 does not divide: height and width must be multiples of 4 .nearest: 16x16 or 20x16.$"
    with pytest.raises(RequestError, match=told):
        patches.sample(0, image_size=(18, 16), steps=1)
    with pytest.raises(TypeError, match=r"edit\(\) takes no 'latents' \(allowed: "):  # nor x_T
        ddim.edit(X_T, 0, strength=0.5, latents=True)  # type: ignore[call-arg]


def test_decode_and_encode_refuse_what_they_have_no_program_for(ddim: jddim.DDIM) -> None:
    for call, told in (
        (lambda: ddim.decode(X_T, decode_batch=0), "decode_batch must be at least 1, got 0"),
        (lambda: ddim.decode(X_T[:0]), r"z must have shape \(1, 5, 7, 3\), got \(0, 5, 7, 3\)"),
        (lambda: ddim.encode(np.zeros((0, 10, 14, 3), np.float32)), r"must have shape \(1, 10, 14, 3\), got \(0, 10, "),
    ):
        with pytest.raises(RequestError, match=told):
            call()


def test_an_image_that_the_decoder_makes_no_number_of_is_told(ddim: jddim.DDIM) -> None:
    """By each door; of three images the one that has it, by its number."""
    from jddim.run.programs import check_decoded
    from jddim.scale.sharding import Sharded, make_mesh

    assert ddim.autoencoder is not None
    graph, state = nnx.split(ddim.autoencoder)
    state["decoder"]["conv_out"]["bias"][...] = np.full(3, np.inf, np.float32)
    bad = dataclasses.replace(ddim, autoencoder=nnx.merge(graph, state))
    images, mask = np.zeros((1, 10, 14, 3), np.float32), np.ones((10, 14, 1), np.float32)
    told = "decoder made a NaN or infinity of finite latents, in image {}, in 1 of 1 images"
    for call, number in (
        (lambda: bad.sample(0, steps=1, start=5), 5),
        (lambda: bad.edit(images, 0, mask=mask, steps=1, paste=True), 0),
        (lambda: bad.decode(X_T[:1]), 0),
        (lambda: Sharded(bad, make_mesh(devices=jax.devices()[:1])).sample(0, 1, start=7, steps=1), 7),
    ):
        with pytest.raises(FloatingPointError, match=told.format(number)):
            call()
    assert bad.sample(0, steps=1, latents=True).shape == (1, 7, 7, 3)
    images = np.zeros((3, 2, 2, 1), np.float32)
    images[1, 0, 1] = np.nan
    with pytest.raises(FloatingPointError, match="in image 8, in 1 of 3 images"):
        check_decoded(jax.numpy.asarray(images), [7, 8, 9])


def test_what_is_no_key_no_first_stage_and_no_convention_is_told_in_a_line(ddim: jddim.DDIM) -> None:
    images = np.zeros((2, 10, 14, 3), np.float32)
    for key in ("a", 1.5, jax.random.split(jax.random.key(0), 3)):
        with pytest.raises(RequestError, match="encode: key must be "):
            ddim.encode(images, key)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"autoencoder must be what jddim\.load_autoencoder gives, got 'x'"):
        dataclasses.replace(ddim, autoencoder="x")  # type: ignore[arg-type]
    for given, told in (
        ({"latents": True}, "no 'latents': it is an option of DDIM.sample, no convention"),
        ({"steps": 3}, "no 'steps' .did you mean 'num_steps'"),
    ):
        with pytest.raises(TypeError, match=told):
            ddim.with_sampler(**given)  # type: ignore[arg-type]


def test_a_drawn_z_is_the_first_stages_own(ddim: jddim.DDIM) -> None:
    stage = Autoencoder(dataclasses.replace(STAGE, num_codes=None), rngs=nnx.Rngs(0))
    images = np.tanh(RNG.standard_normal((3, 6, 4, 3))).astype(np.float32)
    drawn = dataclasses.replace(ddim, autoencoder=stage).encode(images, 5)
    chex.assert_trees_all_close(drawn, stage.encode(jax.numpy.asarray(images), jax.random.key(5)), atol=1e-5)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(np.arange(3))
    chex.assert_trees_all_equal(dataclasses.replace(ddim, autoencoder=stage).encode(images, keys), drawn)


def test_latents_are_not_decoded_in_batches(ckpt: Path, tmp_path: Path, fails: Any) -> None:
    command = ["sample", ckpt, tmp_path / "out.npy", "--latents", "--decode-batch", "2"]
    assert "latents are asked for" in fails(*command)
    assert not [*tmp_path.iterdir()]


def test_the_command_line_makes_pictures_of_images(ckpt: Path, tmp_path: Path, capsys: Any) -> None:
    few = ["--num", "2", "--steps", "2"]
    assert main(["sample", str(ckpt), str(tmp_path / "a.png"), *few]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert settings_of(picture)["decode_batch"] == 1
    assert main(["sample", str(ckpt), str(tmp_path / "images.npy"), *few]) == 0
    assert np.load(tmp_path / "images.npy").shape == (2, 14, 14, 3)
    assert main(["sample", str(ckpt), str(tmp_path / "z.npy"), *few, "--latents"]) == 0
    assert np.load(tmp_path / "z.npy").shape == (2, 7, 7, 3)
    assert (
        main(["sample", str(ckpt), str(tmp_path / "z.png"), *few, "--latents"]) == 1
    )  # three channels, but no picture
    assert "z.png: end it in .npy (latents are no pictures)" in capsys.readouterr().err
    assert not (tmp_path / "z.png").exists()
    assert main(["sample", str(ckpt), str(tmp_path / "a.gif"), *few]) == 0
    assert main(["sample", str(ckpt), str(tmp_path / "t.png"), *few, "--trajectory"]) == 0
    assert (
        main(["interpolate", str(ckpt), str(tmp_path / "i.npz"), "--num", "3", "--images", "0,1", "--steps", "2"]) == 0
    )
    assert np.load(tmp_path / "i.npz")["x_0"].shape == (3, 14, 14, 3)


def test_a_set_of_images_is_resumed_and_reproduced(ckpt: Path, tmp_path: Path, capsys: Any) -> None:
    asked = [str(ckpt), str(tmp_path / "set"), "--num", "5", "--batch-size", "2", "--shard-size", "2", "--steps", "2"]
    assert main(["bulk", *asked]) == 0
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert "decode_batch" in json.dumps(manifest)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("shard-*.npz")}
    lost = tmp_path / "set" / sorted(kept)[1]
    lost.unlink()
    assert main(["bulk", *asked]) == 0
    assert lost.read_bytes() == kept[lost.name]  # bit for bit
    images = np.load(lost)["arr_0"]
    assert images.shape == (2, 14, 14, 3)
    assert main(["check", str(tmp_path / "set"), "--resample", "2"]) == 0
    assert load_images(tmp_path / "set" / lost.name, (14, 14)).shape == (2, 14, 14, 3)


UNET: dict[str, Any] = {
    "model_channels": 32,
    "widths": (32,),
    "num_res_blocks": 1,
    "attention_levels": (),
    "heads": (1,),
    "heads_up": (1,),
}


def latent_diffusion(path: Path, config: dict[str, Any]) -> None:
    """A `.ckpt` as latent-diffusion saves it, with its YAML beside it."""
    stage, raw, ema = (
        autoencoder.reference(STAGE, compvis=True),
        *(OpenAIUNet(**UNET, in_channels=3, out_channels=3, scale_shift=False) for _ in "12"),
    )
    for seed, module in enumerate((stage, raw, ema)):
        redraw_(module, seed)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 50, dtype=torch.float64).square().float()
    state = {"betas": betas} | {f"model.diffusion_model.{name}": value for name, value in raw.state_dict().items()}
    for name, value in ema.state_dict().items():
        state[f"model_ema.diffusion_model{name.replace('.', '')}"] = value
    state |= {f"first_stage_model.{name}": value for name, value in stage.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 7}, path / "model.ckpt")
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"params": config}}))


PARAMS: dict[str, Any] = {
    "timesteps": 50,
    "unet_config": {"params": {"image_size": 8, "model_channels": 32, "attention_resolutions": [], "num_heads": 1}},
    "first_stage_config": {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            **{"embed_dim": 3, "n_embed": 37},
            "ddconfig": {"resolution": 16, "z_channels": 3, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1},
        },
    },
}


def test_of_several_first_stages_one_is_asked_for(tmp_path: Path, fails: Any) -> None:
    """In a file; one given, they are left."""
    latent_diffusion(tmp_path, PARAMS)
    src, other = tmp_path / "model.ckpt", autoencoder.reference(STAGE, compvis=True)
    redraw_(other, 9)
    state = torch.load(src, weights_only=True)["state_dict"]
    state |= {f"refiner.{name}": value for name, value in other.state_dict().items()}
    torch.save({"state_dict": state}, src)
    few = ["--config", tmp_path / "config.yaml"]
    told = fails("convert", src, tmp_path / "out", *few)
    assert (
        "several first stages lie with it (state_dict.first_stage_model; state_dict.refiner): convert one alone" in told
    )
    assert any("needs       several first stages lie with it" in line for line in jddim.info(src, config=few[1]))
    stage = tmp_path / "stage"
    how: dict[str, Any] = {"weights": "state_dict.refiner", "settings": {"norm_num_groups": 4}, "verify": False}
    jddim.convert(src, stage, config=few[1], **how)
    made = jddim.convert(src, tmp_path / "out", config=few[1], autoencoder=stage, verify=False)
    assert made.provenance["autoencoder"]["taken"] == "state_dict.refiner"


def test_of_a_pipeline_that_is_given_as_first_stage_its_own_is_taken(folder: Path, ckpt: Path, tmp_path: Path) -> None:
    made = jddim.convert(folder / "unet", tmp_path / "out", autoencoder=folder, verify=False)
    assert made.autoencoder == jddim.load(ckpt).metadata.autoencoder  # type: ignore[union-attr]
    assert (folder / "vqvae" / "config.json") in jddim.converting.locate(folder / "unet", autoencoder=folder).files


def test_latent_diffusions_file_has_both_networks(tmp_path: Path) -> None:
    latent_diffusion(tmp_path, PARAMS)
    config = ["--config", str(tmp_path / "config.yaml")]
    src, stage, out = (str(tmp_path / name) for name in ("model.ckpt", "stage", "out"))
    assert main(["convert", src, out, *config]) == 1  # no config tells the 4 groups of its norms, so: alone
    assert (
        main(
            ["convert", src, stage, "--weights", "state_dict.first_stage_model", "--set", "norm_num_groups=4", *config]
        )
        == 0
    )
    assert main(["convert", src, out, *config, "--autoencoder", stage]) == 0
    ddim = jddim.load(out)
    assert ddim.metadata is not None
    assert ddim.metadata.autoencoder == STAGE
    assert (ddim.metadata.provenance["weights"], ddim.metadata.provenance["step"]) == ("ema", 7)
    assert (ddim.sampler.steps_offset, ddim.sampler.set_alpha_to_one, ddim.sampler.clip) == (1, False, False)
    # LDM's make_ddim_timesteps: 1, 11, 21, ...; the last step ends at the alpha_bar of t = 0.
    table = ddim.table(5)
    assert table.t.tolist() == [41, 31, 21, 11, 1]
    np.testing.assert_allclose(table.alpha_prev[-1] ** 2, ddim.schedule.alphas_cumprod[0], rtol=1e-6)
    assert ddim.sample(0, steps=2).shape == (1, 16, 16, 3)
    assert main(["verify", out, src, *config]) == 0
