"""Bad input: one line on stderr, a non-zero exit status, nothing written, and no code run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jddim.checkpoint.folder import CheckpointError, load_metadata, load_params
from jddim.cli.main import main
from jddim.cli.options import OneLineParser

torch = pytest.importorskip("torch", reason="most bad input is a bad PyTorch file")

from conftest import MNIST_SOURCE, ROOT  # noqa: E402

CKPT = MNIST_SOURCE / "ckpt.pth"


class Runs:
    """A pickle that runs a command when loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def ema() -> dict[str, torch.Tensor]:
    return torch.load(CKPT, weights_only=True)[4]


@pytest.mark.parametrize("size", [0, 10, 4_000_000, -100])
def test_a_truncated_file(tmp_path: Path, fails: Callable[..., str], size: int) -> None:
    source = tmp_path / "ckpt.pth"
    source.write_bytes(CKPT.read_bytes()[:size])
    message = fails("convert", source, tmp_path / "dst")
    assert "empty" in message if size == 0 else ("truncated" in message or "not a PyTorch" in message)


def test_files_that_are_something_else(tmp_path: Path, fails: Callable[..., str]) -> None:
    source = tmp_path / "file.pth"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("holiday.jpg", b"x")
    assert "zip archive, but not a PyTorch checkpoint" in fails("convert", source, tmp_path / "dst")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    for content, what in (
        (optimizer, "optimizer"),
        ({"down_blocks.0.resnets.0.norm1.weight": torch.zeros(2)}, "has down_blocks as diffusers' "),
        ({"input_blocks.0.0.weight": torch.zeros(2)}, "has input_blocks as OpenAI's "),
        ({"step": 3, "model": {}, "opt": {}, "ema": {}}, "it holds step, model, opt, ema"),
        (
            {"weight": torch.zeros(2)},
            "no checkpoint that jddim knows: it holds weight; jddim reads: a first stage (Auto",
        ),
        ({"weight": torch.zeros(2)}, "diffusers UNet2DModel, OpenAI (a classifier of guided-diffusion), "),
        ({"weight": torch.zeros(2)}, " (docs/families.md)\n"),
    ):
        torch.save(content, source)
        assert what in fails("convert", source, tmp_path / "dst")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, fails: Callable[..., str], zipped: bool) -> None:
    source, mark = tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save({"temb.dense.0.weight": Runs(mark)}, source, _use_new_zipfile_serialization=zipped)
    message = fails("convert", source, tmp_path / "dst")
    assert "never runs code" in message
    assert "system" in message
    assert not mark.exists()


def test_what_a_file_says_cannot_steer_the_terminal(
    tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    steering = "\x1b[31m\x9b2J\rred\x07"
    named, noted = tmp_path / "named.pt", tmp_path / "noted.pt"
    torch.save({**ema(), steering: torch.zeros(2), "long" * 1000: torch.zeros(2)}, named)
    error = fails("convert", named, tmp_path / "out", "--config", MNIST_SOURCE / "config.yml")
    assert "unexpected ?[31m?2J red? (2,)" in error
    assert len(error) < 1000
    unet = {f"downs.0.{i}.block1.proj.weight": torch.zeros(2, 2, 3, 3) for i in range(4)}
    torch.save({"model": unet, "step": 1, "version": steering}, noted)
    assert main(["info", str(noted)]) == 0
    assert "version ?[31m?2J?red?" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps({"a": steering}))
    (tmp_path / "b.json").write_text("{}")
    assert main(["diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_four_kinds_of_misfit_in_one_report(tmp_path: Path, fails: Callable[..., str]) -> None:
    state = ema()
    del state["down.1.block.0.conv1.bias"]
    state["down.0.block.0.extra.weight"] = torch.zeros(3)
    state["mid.attn_1.q.bias"] = torch.zeros(5)
    state["norm_out.weight"][3] = float("nan")
    source = tmp_path / "state.pth"
    torch.save(state, source)
    message = fails("convert", source, tmp_path / "dst", "--set", "image_size=28")
    assert "4 tensors do not fit" in message
    for name in (
        "missing down.1.block.0.conv1.bias",
        "unexpected down.0.block.0.extra.weight",
        "mid.attn_1.q.bias has shape (5,), expected (64,)",
        "norm_out.weight holds NaN",
    ):
        assert name in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "ch=64"], "ch is 64 in --set, but 32 in the tensors"),
        (["--set", "imagesize=28"], "did you mean 'image_size'"),
        (["--set", "image_size=30", "--set", "attn_resolutions=7"], "multiples of 4"),
        (["--set", "attn_resolutions=14"], "attention at [7]"),
        (["--set", "beta_end=x"], "beta_end must be a number"),
        (["--set", "novalue"], "KEY=VALUE"),
        (["--config", "/nowhere/config.yml"], "no such config file"),
    ],
)
def test_settings_that_contradict(tmp_path: Path, fails: Callable[..., str], options: list[str], message: str) -> None:
    assert message in fails("convert", CKPT, tmp_path / "dst", *options)


def test_no_image_size(tmp_path: Path, fails: Callable[..., str]) -> None:
    torch.save(ema(), tmp_path / "ema_state.ckpt")
    assert "--set image_size=" in fails("convert", tmp_path / "ema_state.ckpt", tmp_path / "dst")


def test_destinations(tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / "file").touch()
    assert "--overwrite" in fails("convert", CKPT, tmp_path / "thesis")
    assert "not a jddim checkpoint" in fails("convert", CKPT, tmp_path / "thesis", "--overwrite")
    assert "not a writable folder" in fails("convert", CKPT, tmp_path / "file" / "dst")
    assert "not a writable folder" in fails("sample", mnist_checkpoint, tmp_path / "file" / "a.png")
    assert "a.bmp: end it in .png (exact), .jpg (quality 95)" in fails("sample", mnist_checkpoint, tmp_path / "a.bmp")
    assert "not empty" in fails("sample", mnist_checkpoint, tmp_path / "thesis")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "1..1000"),
        (["--steps", "1001"], "1..1000"),
        (["--steps", "-3"], "got -3"),
        (["--eta", "-0.5"], "got -0.5"),
        (["--eta", "nan"], "got nan"),
        (["--num", "0"], "num must be at least 1"),
        (["--spacing", "cubic"], "unknown spacing"),
        (["--clip-range", "-1", "1"], "--clip-range without clip"),
    ],
)
def test_sampling_options(
    tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path, options: list[str], message: str
) -> None:
    assert message in fails("sample", mnist_checkpoint, tmp_path / "a.npy", *options)


@pytest.mark.parametrize("seed", ["-1", "4294967296", "x"])
def test_seeds_that_would_be_another_seed(
    tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path, seed: str
) -> None:
    assert "--seed" in fails("sample", mnist_checkpoint, tmp_path / "a.npy", "--seed", seed, status=2)


@pytest.mark.parametrize("option", ["--x-T", "--noise"])
def test_noise_files_that_hold_no_array(
    tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path, option: str
) -> None:
    np.savez(tmp_path / "x.npz", first=np.zeros(3), second=np.zeros(3))
    np.save(tmp_path / "number.npy", np.float32(3))
    (tmp_path / "text.npy").write_text("noise")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04, and no more")
    for name, message in (
        ("x.npz", "archive of first, second; save one array as .npy"),
        ("number.npy", "must have shape ("),
        ("text.npy", "is not an .npy file of numbers (EOF: reading magic string, expected 8 bytes got 5)"),
        ("zip.npy", "is not an .npy file of numbers"),
    ):
        assert message in fails("sample", mnist_checkpoint, tmp_path / "a.npy", option, tmp_path / name)


def test_tables_that_cannot_be(tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path) -> None:
    assert "--eta 99 is too large" in fails("schedule", mnist_checkpoint, "--eta", "99")
    assert ".png, .svg, .pdf" in fails("schedule", mnist_checkpoint, "--plot", tmp_path / "x.txt")


def test_damaged_parameters_are_one_line_whatever_threads_say(mnist_checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(mnist_checkpoint, damaged)
    largest = max((damaged / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    with open(largest, "r+b") as file:
        file.truncate(1000)
    command = [sys.executable, "-m", "jddim", "sample", str(damaged), str(tmp_path / "a.npy")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "incomplete or damaged" in ended.stderr
    assert not (tmp_path / "a.npy").exists()


def test_noise_files(tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path) -> None:
    path, out = tmp_path / "x.npy", tmp_path / "a.npy"
    good = np.zeros((2, 28, 28, 1), np.float32)
    for array, message in (
        (good[..., 0], "must have shape"),
        (good[:, :27, :27], "27x27 does not divide"),
        (good.astype(np.float64), "must be float32, got float64"),
        (good + np.float32("nan"), "NaN"),
    ):
        np.save(path, array)
        assert message in fails("sample", mnist_checkpoint, out, "--x-T", path)
    path.write_text("no array")
    assert "not an .npy file" in fails("sample", mnist_checkpoint, out, "--x-T", path)
    np.save(path, np.zeros((3, 2, 28, 28, 1), np.float32))
    message = fails("sample", mnist_checkpoint, out, "--num", 2, "--steps", 10, "--noise", path)
    assert "one row for each of 10 steps" in message


def test_damaged_checkpoint_folders(tmp_path: Path, fails: Callable[..., str], mnist_checkpoint: Path) -> None:
    assert "no checkpoint at" in fails("sample", tmp_path / "absent", tmp_path / "a.npy")
    metadata, refused = load_metadata(mnist_checkpoint), 0
    for number, path in enumerate(sorted(p for p in (mnist_checkpoint / "params").rglob("*") if p.is_file())):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(mnist_checkpoint, copy)
        damaged = copy / path.relative_to(mnist_checkpoint)
        content = bytearray(damaged.read_bytes() or b"x")
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        try:
            load_params(copy, metadata)  # what loads has the digest of what was written
        except CheckpointError as error:
            assert "convert the checkpoint again" in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 1
    for change, message in (({"format_version": 2}, "upgrade jddim"), ({"provenance": {}}, "edited")):
        copy = tmp_path / message.split()[0]
        shutil.copytree(mnist_checkpoint, copy)
        (written,) = (p for p in (copy / "metadata").iterdir() if "success" not in p.name)
        written.write_text(json.dumps(json.loads(written.read_text()) | change))
        assert message in fails("sample", copy, tmp_path / "a.npy")


def test_an_unknown_option_is_its_commands_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "ckpt", "a.png", "--setps=3", "--loud"])
    assert capsys.readouterr().err == (
        "jddim sample: error: unrecognized arguments: --setps=3 --loud; did you mean --steps? "
        "(see jddim sample --help)\n"
    )


def test_an_option_that_help_hides_is_not_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneLineParser(prog="it")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--fast"])
    assert capsys.readouterr().err == "it: error: unrecognized arguments: --fast (see it --help)\n"


def test_unknown_words_exit_with_two(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "--help" in fails("sample", "a", "b.png", "--stepz", "3", status=2)


def test_a_device_that_is_not_there(mnist_checkpoint: Path, tmp_path: Path) -> None:
    for command in (["doctor"], ["sample", str(mnist_checkpoint), "x.png"]):
        done = subprocess.run(
            [sys.executable, "-m", "jddim", *command],
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("jddim: error: jax has no device for JAX_PLATFORMS=cuda here: unset it"), done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none(tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "takes a number of images, or auto; got 'huge'" in fails(
        "sample", "c", tmp_path / "x.png", "--batch-size", "huge", status=2
    )
    assert "takes a whole number, got '1.5'" in fails("sample", "c", tmp_path / "x.png", "--seed", "1.5", status=2)
