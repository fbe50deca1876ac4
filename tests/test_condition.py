"""Networks that are given an image beside each x_t: what they see, at every door of `DDIM`."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import random_model, small_config, write_checkpoint

import jddim
from jddim import sampling
from jddim.cli.main import main
from jddim.config import SamplerConfig, UNetConfig, from_json, to_json
from jddim.denoisers import with_condition
from jddim.images import read_metadata, to_uint8
from jddim.models.building import build_model, flat_params
from jddim.pipeline import DDIM
from jddim.run.request import Request
from jddim.scale.sharding import Sharded, make_mesh
from jddim.scale.sweeping import sweep
from jddim.schedule import linear_schedule
from jddim.train.task import Task

pytestmark = pytest.mark.unoptimised
NUM, SIZE = 3, (6, 10)
BESIDE = jax.random.uniform(jax.random.key(1), (NUM, *SIZE, 2), minval=-1)
X_T = jax.random.normal(jax.random.key(2), (NUM, *SIZE, 1))


FIELDS: dict[str, Any] = {
    "image_size": SIZE,
    "condition_channels": 2,
    "channel_mults": (1,),
    "middle": False,
    "attention_levels": (),
}


def config(**changes: Any) -> UNetConfig:
    return small_config(**(FIELDS | changes))


def ddim_of(config: UNetConfig) -> DDIM:
    return DDIM(random_model(config), linear_schedule(100), SamplerConfig(num_steps=5, spacing="linspace", clip=False))


def test_the_order_of_the_channels() -> None:
    seen = []
    denoise = lambda x, t, *rest: seen.append((x, rest)) or x[..., :1]  # noqa: E731
    for first in (False, True):
        with_condition(denoise, BESIDE, first=first)(X_T, jnp.zeros(NUM), "rest")
        x, rest = seen.pop()
        assert rest == ("rest",)
        chex.assert_trees_all_equal(x, jnp.concatenate([BESIDE, X_T] if first else [X_T, BESIDE], axis=-1))


@pytest.mark.parametrize("first", [False, True])
def test_it_is_the_loop_around_the_network_with_both(first: bool) -> None:
    ddim = ddim_of(config(condition_first=first))
    order = (lambda x: [BESIDE, x]) if first else (lambda x: [x, BESIDE])
    noise = jax.random.normal(jax.random.key(3), (5, *X_T.shape))

    def by_hand(model, x_T, noise):
        def denoise(x_t, t):
            return model(jnp.concatenate(order(x_t), axis=-1), t)

        return sampling.sample_loop(denoise, x_T, ddim.table(), eta=0.7, noise=noise)

    made = ddim.sample(x_T=X_T, noise=noise, eta=0.7, condition=BESIDE)
    chex.assert_trees_all_close(made, jax.jit(by_hand)(ddim.model, X_T, noise), atol=1e-4)  # another program
    other = ddim.sample(x_T=X_T, noise=noise, eta=0.7, condition=-BESIDE)
    assert jnp.abs(made - other).max() > 1e-2
    by_denoiser = sampling.sample_loop(ddim.denoiser(condition=BESIDE), X_T, ddim.table(), eta=0.7, noise=noise)
    chex.assert_trees_all_close(made, by_denoiser, atol=1e-4)


def test_image_i_has_condition_i_in_batches_too() -> None:
    ddim = ddim_of(config())
    whole = ddim.sample(jax.random.key(0), NUM, condition=BESIDE, eta=0.5)
    chex.assert_trees_all_close(
        whole, ddim.sample(jax.random.key(0), NUM, condition=BESIDE, eta=0.5, batch_size=2), atol=1e-5
    )
    last = ddim.sample(jax.random.key(0), 1, start=2, condition=BESIDE[2:], eta=0.5)
    chex.assert_trees_all_close(whole[2:], last, atol=1e-5)


def test_a_smaller_one_is_enlarged_as_torch_does() -> None:
    torch = pytest.importorskip("torch", reason="compared with torch's bilinear interpolation")
    small = np.asarray(BESIDE[:, ::2, ::5])
    enlarged = torch.nn.functional.interpolate(torch.tensor(small).permute(0, 3, 1, 2), SIZE, mode="bilinear")
    seen = []
    with_condition(lambda x, t: seen.append(x), jnp.asarray(small))(X_T, jnp.zeros(NUM))
    chex.assert_trees_all_close(seen[0][..., 1:], enlarged.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    ddim = ddim_of(config())
    made = [ddim.sample(x_T=X_T, eta=0.0, condition=c) for c in (small, np.asarray(seen[0][..., 1:]))]
    chex.assert_trees_all_close(*made, atol=1e-4)  # two programs
    with pytest.raises(ValueError, match=r"condition must have shape \(3, 6, 10, 2\), got \(3, 4, 10, 2\)"):
        ddim.sample(x_T=X_T, eta=0.0, condition=BESIDE[:, :4])


def test_guided_labels_see_the_same_condition() -> None:
    ddim = ddim_of(config(class_embedding="learned", num_classes=4))
    labels = np.array([0, 2, 1], np.int32)

    def guided(model, x_T):
        def network(labels):
            return lambda x_t, t: model(jnp.concatenate([x_t, BESIDE], axis=-1), t, labels)

        pair = jddim.guidance.pair(network(labels), network(jnp.full(NUM, 3)))
        return sampling.sample_loop(jddim.guidance.classifier_free(pair, 1.7), x_T, ddim.table())

    made = ddim.sample(x_T=X_T, eta=0.0, labels=labels, guidance_scale=1.7, null_label=3, condition=BESIDE)
    chex.assert_trees_all_close(made, jax.jit(guided)(ddim.model, X_T), atol=1e-4)


def test_inverting_and_editing_take_one_too() -> None:
    ddim = ddim_of(config())
    images = ddim.sample(x_T=X_T, eta=0.0, condition=BESIDE) / 4
    x_T = ddim.invert(images, condition=BESIDE, refine=20)
    chex.assert_trees_all_close(ddim.sample(x_T=x_T, eta=0.0, condition=BESIDE), images, atol=1e-3)
    edited = [ddim.edit(images, 0, strength=0.6, eta=0.0, condition=c) for c in (BESIDE, -BESIDE)]
    assert jnp.abs(edited[0] - edited[1]).max() > 1e-2


def test_what_is_missing_or_too_much_is_said() -> None:
    ddim = ddim_of(config())
    with pytest.raises(ValueError, match=r"condition is needed, an image of 2 channels for each: \(3, 6, 10, 2\)"):
        ddim.sample(0, NUM)
    with pytest.raises(ValueError, match=r"condition must have shape \(3, 6, 10, 2\), got \(3, 6, 10, 1\)"):
        ddim.sample(0, NUM, condition=X_T)
    with pytest.raises(ValueError, match=r"condition looks like \(N, C, H, W\)"):
        ddim.sample(0, NUM, condition=BESIDE.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="condition is needed"):
        ddim.denoiser()
    with pytest.raises(ValueError, match=r"condition must have shape \(1, 6, 10, 2\), got \(6, 10, 2\)"):
        ddim.denoiser(condition=BESIDE[0])
    for shape in ((NUM, 4, 10, 2), (NUM, 12, 20, 2)):
        with pytest.raises(ValueError, match="a condition for images of 6x10 is as large, or smaller by whole factors"):
            ddim.denoiser(condition=jnp.ones(shape))(X_T, jnp.zeros(NUM))
    with pytest.raises(TypeError):  # one image each, not blended over the batch
        ddim.denoiser(condition=jnp.ones((2, 3, 5, 2)))(X_T, jnp.zeros(NUM))
    with pytest.raises(ValueError, match=r"condition must have shape \(3, 6, 10, 2\), got \(2, 6, 10, 2\)"):
        Sharded(ddim, make_mesh()).sample(0, NUM, condition=BESIDE[:2])
    with pytest.raises(ValueError, match=r"condition must be float32, got float64: give condition.astype"):
        Sharded(ddim, make_mesh()).sample(0, NUM, condition=np.asarray(BESIDE, np.float64))
    with pytest.raises(ValueError, match=r"sweep: condition must have shape \(2, 6, 10, 2\), got \(3, 6, 10, 2\)"):
        sweep(ddim, 0, 2, [0.5], condition=BESIDE)
    plain = ddim_of(config(condition_channels=0))
    with pytest.raises(ValueError, match="is given no image beside x_t: leave condition out"):
        plain.sample(0, NUM, condition=BESIDE)
    with pytest.raises(ValueError, match=r"x_t must be \(b, h, w, 3, x_t's and the condition's\)"):
        ddim.model(X_T, jnp.zeros(NUM))


def test_the_config() -> None:
    made = config(condition_first=True)
    assert (made.in_channels, made.input_channels) == (1, 3)
    assert made.summary.endswith("given an image of 2 channels")
    assert from_json(UNetConfig, to_json(made)) == made
    plain = config(condition_channels=0)
    assert not [name for name in to_json(plain) if name.startswith("condition")]  # files without them keep their digest
    with pytest.raises(ValueError, match="condition_first is of a network with condition_channels"):
        dataclasses.replace(made, condition_channels=0)
    with pytest.raises(ValueError, match="condition_channels=-1 must not be negative"):
        dataclasses.replace(made, condition_channels=-1)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", **FIELDS)
    one_ckpt = write_checkpoint(tmp_path / "one", **{**FIELDS, "condition_channels": 1})
    ddim = jddim.load(ckpt)
    for name, images in (("beside.npy", BESIDE), ("x_T.npy", X_T)):
        np.save(tmp_path / name, images)
    options = ["--steps", "3", "--eta", "0", "--condition", str(tmp_path / "beside.npy")]
    out = tmp_path / "out.npy"
    assert main(["sample", str(ckpt), str(out), "--x-T", str(tmp_path / "x_T.npy"), *options]) == 0
    made = np.load(out)
    np.testing.assert_array_equal(made, ddim.sample(x_T=X_T, steps=3, eta=0.0, condition=BESIDE))

    picture = tmp_path / "a.png"
    assert main(["sample", str(ckpt), str(picture), "--num", "3", *options]) == 0
    digest = hashlib.sha256((tmp_path / "beside.npy").read_bytes()).hexdigest()
    assert read_metadata(picture)["condition"] == {"file": "beside.npy", "sha256": digest}

    np.save(tmp_path / "one.npy", BESIDE[:1])  # one for all
    one = ["--steps", "3", "--condition", str(tmp_path / "one.npy")]
    assert main(["interpolate", str(ckpt), str(tmp_path / "line.npz"), "--num", "3", *one]) == 0
    held = np.load(tmp_path / "line.npz")
    all_alike = np.repeat(BESIDE[:1], 3, axis=0)
    np.testing.assert_array_equal(held["x_0"], ddim.sample(x_T=held["x_T"], steps=3, eta=0.0, condition=all_alike))

    np.save(tmp_path / "images.npy", made.clip(-1, 1))
    images = str(tmp_path / "images.npy")
    assert main(["invert", str(ckpt), images, str(tmp_path / "up.npy"), "--steps", "3", *options[4:]]) == 0
    up = ddim.invert(made.clip(-1, 1), steps=3, condition=BESIDE)
    np.testing.assert_array_equal(np.load(tmp_path / "up.npy"), up)
    edited = ["edit", str(ckpt), images, str(tmp_path / "b.npy"), "--strength", "0.7"]
    assert main([*edited, *options]) == 0
    again = ddim.edit(made.clip(-1, 1), 0, strength=0.7, steps=3, eta=0.0, condition=BESIDE)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), again)
    capsys.readouterr()
    for i in range(2):  # small pictures, in a folder with more in it
        (tmp_path / "folder" / "more").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 5), 100 * i, np.uint8)).save(tmp_path / "folder" / f"{i}.png")
    grey = ["--condition", str(tmp_path / "folder")]
    assert main(["sample", str(one_ckpt), str(tmp_path / "small.png"), "--num", "2", "--steps", "2", *grey]) == 0
    pictures = [(tmp_path / "folder" / f"{i}.png").read_bytes() for i in range(2)]
    recorded = {"file": "folder", "sha256": hashlib.sha256(b"".join(pictures)).hexdigest()}
    assert read_metadata(tmp_path / "small.png")["condition"] == recorded
    capsys.readouterr()
    assert main(["sample", str(ckpt), str(tmp_path / "c.png"), "--num", "2"]) == 1
    assert "--condition is needed, an image of 2 channels for each: (2, 6, 10, 2)" in capsys.readouterr().err
    assert main(["serve", str(ckpt)]) == 1
    assert (
        "the page draws a picture of 1 or 3 channels beside x_t, and this network is given 2" in capsys.readouterr().err
    )
    for command in ("warmup", "export"):
        with pytest.raises(SystemExit) as caught:
            main([command, str(ckpt), *([] if command == "warmup" else [str(tmp_path / "d.png")]), *options[4:]])
        assert caught.value.code == 2
        assert f"--condition is not for jddim {command}" in capsys.readouterr().err


def test_a_set_and_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", **FIELDS)
    ddim = jddim.load(ckpt)
    np.save(tmp_path / "beside.npy", BESIDE)
    given = ["--steps", "3", "--condition", str(tmp_path / "beside.npy")]
    assert main(["sweep", str(ckpt), str(tmp_path / "etas.npz"), "--num", "3", "--eta", "0,0.7", *given]) == 0
    row = ddim.sample(jax.random.key(0), NUM, steps=3, eta=0.7, condition=BESIDE)
    chex.assert_trees_all_close(np.load(tmp_path / "etas.npz")["x_0"][0, 1], row, atol=1e-5)  # another batch size

    out = tmp_path / "set"
    make = ["bulk", str(ckpt), str(out), "--num", "3", "--batch-size", "2", "--format", "png", *given]
    assert main([*make[:3], "--num", "5", *make[5:]]) == 1
    assert "--condition holds 3 images: give 5, or one for all" in capsys.readouterr().err
    assert main(make[:-2]) == 1
    assert "--condition is needed, an image of 2 channels for each: (3, 6, 10, 2)" in capsys.readouterr().err
    np.save(tmp_path / "nan.npy", BESIDE.at[2, 1, 3, 1].set(jnp.nan))
    assert main([*make[:-1], str(tmp_path / "nan.npy")]) == 1
    assert "--condition holds a NaN or infinity, first at (2, 1, 3, 1)" in capsys.readouterr().err
    assert not out.exists()
    assert main(make) == 0
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(out.glob("*/*.png"))])
    live = ddim.sample(jax.random.key(0), NUM, steps=3, condition=BESIDE)
    assert np.abs(to_uint8(live)[..., 0].astype(int) - pixels).max() <= 1
    assert main(["check", str(out)]) == 0
    last = next(out.glob("*/*2.png"))
    assert main(["reproduce", str(last)]) == 0
    capsys.readouterr()

    moved = (tmp_path / "beside.npy").rename(tmp_path / "moved.npy")
    assert main(["reproduce", str(last)]) == 1
    assert "say where it is, --condition FILE" in capsys.readouterr().err
    assert main(["reproduce", str(last), "--condition", str(moved)]) == 0
    np.save(tmp_path / "other.npy", -BESIDE)
    assert main(["reproduce", str(last), "--condition", str(tmp_path / "other.npy")]) == 1
    assert "other images than those that the set was made with" in capsys.readouterr().err
    assert main([*make[:-1], str(tmp_path / "other.npy")]) == 1
    assert "condition_sha256 is" in capsys.readouterr().err


def test_on_a_mesh_image_i_has_condition_i() -> None:
    ddim = ddim_of(config())
    made = Sharded(ddim, make_mesh(1)).sample(0, NUM, steps=3, eta=0.7, condition=BESIDE)
    chex.assert_trees_all_close(made, ddim.sample(0, NUM, steps=3, eta=0.7, condition=BESIDE), atol=1e-5)


def test_a_network_may_be_told_the_noise_level_of_t() -> None:
    told = config(time_embedding="noise_level", num_timesteps=100)
    model = random_model(told)
    params = flat_params(model)
    levels = params.pop("time_proj.embedding")[:, 0]
    plain = build_model(dataclasses.replace(told, time_embedding="sinusoidal", num_timesteps=None), params)
    x, t = jnp.concatenate([X_T, BESIDE], axis=-1), jnp.array([0, 7, 99])
    chex.assert_trees_all_close(model(x, t), plain(x, levels[t]), atol=1e-6)
    with pytest.raises(ValueError, match="num_timesteps=None goes with time_embedding='learned' or 'noise_level', and"):
        dataclasses.replace(told, num_timesteps=None)


def test_such_a_network_is_not_trained() -> None:
    with pytest.raises(ValueError, match="a network that is given an image beside x_t is not trained here"):
        Task(config())
    with pytest.raises(ValueError, match="told the noise level in place of t is sampled, but not trained here"):
        Task(config(condition_channels=0, time_embedding="noise_level", num_timesteps=100))


def test_an_exported_program_takes_one() -> None:
    pytest.importorskip("flatbuffers", reason="exporting needs flatbuffers: pip install 'jddim[export]'")
    from jddim.scale.export import export_sampler, export_step

    ddim = ddim_of(config())
    exported = export_sampler(ddim, Request(steps=3), batch_size=3, platforms=("cpu",))
    arguments = (np.uint32(0), np.arange(3, dtype=np.uint32), np.float32(0.5), np.asarray(BESIDE))
    options = exported.about["compiler_options"]["cpu"]
    made = jax.jit(exported.program.call, compiler_options=options)(exported.weights, *arguments)
    live = ddim.sample(jax.random.key(0), 3, steps=3, eta=0.5, condition=BESIDE)
    chex.assert_trees_all_close(made, live, atol=1e-4)
    step = export_step(ddim, platforms=("cpu",))
    assert list(step.about["arguments"])[-1] == "condition"
