"""`jddim bulk`, `collect`, `check`, `reproduce`: the images are the sampler's, and mistakes are one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny import tree, write_checkpoint

import jddim
from jddim.bulk import collecting
from jddim.bulk import run as bulk
from jddim.bulk.manifest import read_manifest
from jddim.bulk.shards import decode
from jddim.cli.main import main
from jddim.images import read_metadata, save_picture, to_uint8

pytestmark = pytest.mark.unoptimised

NUMBERS = {"num": 13, "batch-size": 3, "shard-size": 6, "seed": 5, "eta": 0.5, "null-label": 4, "guidance-scale": 1.5}
SETTINGS = ["--labels", "balanced", *(word for name, value in NUMBERS.items() for word in (f"--{name}", str(value)))]
SMALL: dict = {"class_embedding": "learned", "num_classes": 5, "channel_mults": (1,), "attention_levels": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with five classes, and sets made with it."""
    path = tmp_path_factory.mktemp("bulk")
    write_checkpoint(path / "ckpt", **SMALL)
    for format in ("npz", "png"):
        command("bulk", path / "ckpt", path / format, *SETTINGS, "--format", format)
    return path


def command(*words: object, status: int = 0) -> None:
    assert main([str(word) for word in words]) == status


def test_a_set_of_ermongroups_ddpm_noisy_is_its_numpy_loop(tmp_path: Path) -> None:
    """Its `sample_type: ddpm_noisy`, `skip_type: uniform`, for the network and the noise of the set."""
    ckpt = write_checkpoint(tmp_path / "ckpt", **(SMALL | {"class_embedding": None, "num_classes": None}))
    how = ["--method", "ddpm", "--variance", "fixed_large", "--steps", "7", "--clip", "--seed", "3"]
    command("bulk", ckpt, tmp_path / "set", "--num", 5, "--batch-size", 5, *how)
    with np.load(tmp_path / "set" / "shard-00000.npz") as held:
        images = held["arr_0"].astype(int)

    ddim = jddim.load(ckpt)
    keys, network = jddim.sample_keys(jax.random.key(3), 5), jax.jit(ddim.model)
    shape = images.shape[1:]
    at = dict(enumerate([1.0, *ddim.schedule.alphas_cumprod], start=-1))
    seq = list(range(0, 1000, 1000 // 7))
    x = np.asarray(jddim.initial_noise(keys, shape), np.float64)
    for s, (t, t_next) in enumerate(zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True)):
        e = np.asarray(network(x.astype(np.float32), np.full(5, t)), np.float64)
        noise = [jax.random.normal(jax.random.fold_in(key, s + 1), shape) for key in keys]
        beta_t = 1 - at[t] / at[t_next]
        x0_from_e = np.clip(np.sqrt(1 / at[t]) * x - np.sqrt(1 / at[t] - 1) * e, -1, 1)
        mean = (np.sqrt(at[t_next]) * beta_t * x0_from_e + np.sqrt(1 - beta_t) * (1 - at[t_next]) * x) / (1 - at[t])
        x = mean + (t != 0) * np.sqrt(beta_t) * np.asarray(noise, np.float64)
    again = to_uint8(x.astype(np.float32)).astype(int)
    assert np.ptp(again) > 100
    apart = np.abs(images - again)  # float32 beside float64: a value may fall on the other side of a rounding
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.02


def test_the_images_are_the_samplers(folder: Path, tmp_path: Path) -> None:
    command("collect", folder / "png", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as held:
        images, labels = held["arr_0"], held["arr_1"]
    assert labels.tolist() == [i % 4 for i in range(13)]  # the null label is none of the balanced
    ddim = jddim.load(folder / "ckpt")
    expected = ddim.sample(
        jax.random.key(5), 13, eta=0.5, labels=labels, guidance_scale=1.5, null_label=4, batch_size=3
    )
    np.testing.assert_array_equal(images, to_uint8(expected))
    # an image's neighbours change nothing in it
    alone = bulk.sampler(ddim.with_sampler(eta=0.5), read_manifest(folder / "npz").bulk)(11)[0]
    np.testing.assert_array_equal(alone, images[11])


def test_workers_apart_make_the_same_set(folder: Path, tmp_path: Path) -> None:
    for i in range(2):
        command("bulk", folder / "ckpt", tmp_path / f"w{i}", *SETTINGS, "--shard", f"{i}/2")
    assert {path.name for path in (tmp_path / "w1").glob("shard-*")} == {"shard-00001.npz", "shard-00001.json"}
    command("collect", tmp_path / "w0", tmp_path / "w1", tmp_path / "two.npz")
    command("collect", folder / "npz", tmp_path / "one.npz")
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_check_and_reproduce_say_identical(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("check", folder / "npz", "--resample", 2, "--seed", 0)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 shards, 13 images: every checksum agrees"
    assert [line.split(": ")[1] for line in said[1:]] == ["identical"] * 2
    command("reproduce", folder / "npz", "--index", 12, "--out", tmp_path / "again.png")
    command("reproduce", folder / "png" / "shard-00001" / "00000007.png")
    assert capsys.readouterr().out == "image 12: identical\nimage 7: identical\n"
    kept = collecting.kept(folder / "npz", read_manifest(folder / "npz"), 12)
    np.testing.assert_array_equal(decode((tmp_path / "again.png").read_bytes())[0], kept)


def test_reproduce_says_how_far_a_picture_is_off(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    source = folder / "png" / "shard-00000" / "00000002.png"
    picture = decode(source.read_bytes())[0].copy()
    picture[1, 2] ^= 4
    save_picture(tmp_path / "mine.png", picture, read_metadata(source))
    assert "name the checkpoint by --ckpt" in fails("reproduce", tmp_path / "mine.png")
    command("reproduce", tmp_path / "mine.png", "--ckpt", folder / "ckpt", status=1)
    assert capsys.readouterr().out == "image 2: 1 of 60 values differ, by at most 4 of 255\n"
    assert "is image 2, not 3" in fails("reproduce", tmp_path / "mine.png", "--index", 3)
    other = write_checkpoint(tmp_path / "other", seed=1, **SMALL)
    assert "is another checkpoint" in fails("reproduce", tmp_path / "mine.png", "--ckpt", other)
    save_picture(tmp_path / "plain.png", picture, {})
    assert "is no picture that jddim bulk wrote" in fails("reproduce", tmp_path / "plain.png")


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    ckpt, out = folder / "ckpt", tmp_path / "out"
    bad = [
        (["--num", 0], "num must be at least 1, got 0"),
        (["--num", 9, "--eta", 9, "--labels", 1], "eta 9 is too large"),
        (["--num", 9], "class-conditional: give --labels"),
        (["--num", 9, "--labels", "7"], "labels must lie in 0..4, got 7"),
        (["--num", 9, "--labels", "1", "--method", "ddpm", "--eta", 1], "eta is DDIM's"),
        (
            ["--num", 9, "--labels", "2:6", "--batch-size", 3],
            "labels must lie in 0..4, got 5",
        ),  # not in its first batch
        (["--num", 9, "--labels", 1, "--batch-size", "auto", "--shard", "0/2"], "that workers would not agree on"),
        (["--num", 9, "--shard-size", 65], "multiple of the batch size 64"),
    ]
    for options, message in bad:
        assert message in fails("bulk", ckpt, out, *options)
    assert "I from 0 to N-1" in fails("bulk", ckpt, out, "--num", 9, "--shard", "2/2", status=2)
    assert "holds other things (ckpt" in fails("bulk", ckpt, folder, "--num", 9)
    assert "sampler.eta is 0.5 there, 0.25 here" in fails("bulk", ckpt, folder / "npz", *SETTINGS, "--eta", 0.25)
    assert "has no manifest.json" in fails("check", tmp_path)
    assert "0..12, got 13" in fails("reproduce", folder / "npz", "--index", 13)
    assert "ends in .npz" in fails("collect", folder / "npz", tmp_path / "all.zip")
    assert "cannot write" in fails("bulk", ckpt, "/proc/set", "--num", 9, "--labels", 1)
    shutil.copytree(folder / "npz", out)
    (out / "shard-00001.npz").write_bytes(b"")
    assert "shard-00001.npz has 0 bytes" in fails("check", out)
    assert "shard-00001.npz has 0 bytes" in fails("collect", out, tmp_path / "all.npz")
    (out / "shard-00001.npz").unlink()
    assert "shard-00001.npz is missing" in fails("check", out)
    Image.new("L", (5, 5)).save(tmp_path / "a.jpg")
    assert "no picture that jddim bulk wrote" in fails("reproduce", tmp_path / "a.jpg")


TERMINATE = """
import os, signal, sys
def hook(name, arguments):
    if name == "open" and ".shard-00001" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGTERM)
from jddim.__main__ import run
sys.addaudithook(hook)
run()
"""


def test_sigterm_ends_cleanly_and_the_run_goes_on(folder: Path, tmp_path: Path) -> None:
    words = ["bulk", str(folder / "ckpt"), str(tmp_path / "out"), *SETTINGS]
    done = subprocess.run([sys.executable, "-c", TERMINATE, *words], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "jddim: interrupted; nothing half-written was left")
    left = {name for name in tree(tmp_path / "out") if not name.startswith(".lock")}
    assert all(name == "manifest.json" or name.startswith("shard-") for name in left)
    assert {"shard-00000.npz", "shard-00000.json"} <= left
    command(*words)
    made, expected = (
        {n: v for n, v in tree(path).items() if n[0] == "s"} for path in (tmp_path / "out", folder / "npz")
    )
    assert made == expected
