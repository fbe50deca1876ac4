"""scripts/train_mnist.py on images made here: what it saves, that resuming is exact, what it refuses."""

import gzip
import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml

from convert.reference.unet import ReferenceUNet

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_mnist.py"
SHIPPED = SCRIPT.parent / "assets" / "mnist-ddpm"
# 5 images in batches of 3: an epoch is a whole batch and a smaller one.
SMALL = [
    "--ch",
    "8",
    "--ch-mult",
    "1,2",
    "--norm-groups",
    "4",
    "--attn-resolutions",
    "6",
    "--batch-size",
    "3",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # For tensors this small threads only wait for each other: on a busy machine ten times longer.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_mnist", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def idx(images: np.ndarray, magic: int = 0x803) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in (magic, *images.shape)) + images.tobytes()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.gz"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 12), dtype=np.uint8)
    path.write_bytes(gzip.compress(idx(pixels)))
    return path


def load(out: Path) -> list:
    return torch.load(out / "ckpt.pth", weights_only=True)


def shapes(value):
    """The structure of a loaded file with each tensor replaced by its type."""
    if isinstance(value, dict):
        return {str: shapes(next(iter(value.values())))} if value else {}
    return [shapes(item) for item in value] if isinstance(value, list) else type(value)


def test_it_saves_what_the_source_saves(script, images: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep" / "out"
    arguments = ["--images", str(images), "--out", str(out), "--steps", "3", "--seed", "7", *SMALL]
    assert script.main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {"ckpt.pth", "config.yml"}
    states = load(out)
    shipped = torch.load(SHIPPED / "ckpt.pth", weights_only=True)
    for index in (0, 2, 3, 4):
        assert shapes(states[index]) == shapes(shipped[index])
    assert len(states) == len(shipped)
    assert states[2:4] == [1, 3]  # the third step is the first of the second epoch

    model = ReferenceUNet(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_levels=(1,), in_channels=1, out_ch=1, norm_groups=4
    )
    names = [name for name, _ in model.named_parameters()]
    assert list(states[0]) == [f"module.{name}" for name in names]
    assert list(states[4]) == names
    model.load_state_dict(states[4], strict=True)
    # Adam's state is by parameter index; one that never got a gradient would be missing or zero.
    moments = states[1]["state"]
    assert list(moments) == list(range(len(names)))
    assert all(moment["exp_avg_sq"].abs().sum() > 0 for moment in moments.values())
    assert states[1]["param_groups"][0].keys() == shipped[1]["param_groups"][0].keys()
    assert states[1]["param_groups"][0]["lr"] == pytest.approx(1e-6)  # the end of the cosine

    config = yaml.safe_load((out / "config.yml").read_text())
    expected = yaml.safe_load((SHIPPED / "config.yml").read_text())
    for section in expected:
        assert set(config[section]) >= set(expected[section]), section
    assert config["data"] == expected["data"] | {"image_size": 12}
    assert config["diffusion"] == expected["diffusion"]
    assert config["optim"] == expected["optim"]
    assert config["model"]["ch_mult"] == [1, 2]
    assert config["model"]["norm_groups"] == 4
    assert "Training" in capsys.readouterr().out


def test_the_ema_is_an_average_of_the_weights_it_passed(script, images: Path, tmp_path: Path):
    weights = []
    for steps in ("1", "2"):
        out = tmp_path / steps
        # A constant learning rate: otherwise step 1 of 1 and step 1 of 2 differ.
        arguments = ["--lr-final", "0.001", "--ema-rate", "0.75", "--steps", steps, *SMALL]
        assert script.main(["--images", str(images), "--out", str(out), *arguments]) == 0
        states = load(out)
        weights.append((states[0]["module.conv_in.weight"], states[4]["conv_in.weight"]))
    (raw_1, ema_1), (raw_2, ema_2) = weights
    assert not torch.equal(raw_1, raw_2)
    # Rounding of one float32 interpolation of weights below 1.
    torch.testing.assert_close(ema_2, 0.75 * ema_1 + 0.25 * raw_2, rtol=0, atol=1e-7)


def test_interrupted_and_resumed_is_as_if_never_interrupted(script, images: Path, tmp_path: Path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ["--images", str(images), "--steps", "5", "--seed", "3", "--lr", "0.002", "--no-bf16", *SMALL]
    assert script.main([*given, "--out", str(whole)]) == 0

    real = script.Trainer.train_step
    handler = signal.getsignal(signal.SIGINT)

    def interrupted_at_step_3(trainer):
        loss = real(trainer)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(script.Trainer, "train_step", interrupted_at_step_3)
        assert script.main([*given, "--out", str(parts)]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step 3 is saved" in said
    assert load(parts)[3] == 3
    assert signal.getsignal(signal.SIGINT) is handler

    # All settings come back from config.yml.
    assert script.main(["--images", str(images), "--out", str(parts), "--resume"]) == 0
    a, b = load(whole), load(parts)
    assert a[2:4] == b[2:4]
    for index in (0, 4):
        assert all(torch.equal(a[index][name], b[index][name]) for name in a[index])
    for i, moment in a[1]["state"].items():
        assert all(torch.equal(value, b[1]["state"][i][key]) for key, value in moment.items())


def test_without_moments_the_file_is_smaller_and_resuming_says_so(script, images: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    given = ["--images", str(images), "--out", str(out), "--steps", "2", "--no-keep-optimizer", *SMALL]
    assert script.main(given) == 0
    assert load(out)[1]["state"] == {}
    assert script.main(["--images", str(images), "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert "saved without Adam's moments" in capsys.readouterr().out
    assert load(out)[3] == 3


def test_the_loss_falls(script, tmp_path: Path, capsys):
    path = tmp_path / "plain-idx"  # not gzipped
    path.write_bytes(idx(np.full((64, 8, 8), 40, np.uint8)))
    model = [
        "--ch",
        "8",
        "--ch-mult",
        "1",
        "--norm-groups",
        "4",
        "--attn-resolutions",
        "",
        "--batch-size",
        "64",
    ]
    given = ["--images", str(path), "--out", str(tmp_path / "out"), "--steps", "120", "--log-every", "20"]
    assert script.main([*given, *model, "--lr", "0.01", "--no-bf16"]) == 0
    losses = [float(x) for x in re.findall(r"smoothed loss (\d\.\d+)", capsys.readouterr().out)]
    assert len(losses) == 6
    # At a constant image a network can reach 0. Measured 0.20 after 20 steps and 0.04 after 120.
    assert losses[-1] < 0.4 * losses[0]


def test_the_network_sees_images_noised_as_eq_4_of_ddpm(script, tmp_path: Path, monkeypatch):
    path, seen = tmp_path / "white", []
    path.write_bytes(idx(np.full((300, 8, 8), 255, np.uint8)))
    real = ReferenceUNet.forward

    def spy(model, x, t):
        seen.append((x.double(), t))
        return real(model, x, t)

    monkeypatch.setattr(ReferenceUNet, "forward", spy)
    model = [
        "--ch",
        "8",
        "--ch-mult",
        "1",
        "--norm-groups",
        "4",
        "--attn-resolutions",
        "",
        "--batch-size",
        "300",
    ]
    given = ["--images", str(path), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert script.main([*given, *model]) == 0
    (x_t, t), (x_again, t_again) = seen
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t][:, None, None, None]
    eps = (x_t - alpha_bar.sqrt() * 1.0) / (1 - alpha_bar).sqrt()  # white is 1
    # 19,200 draws: standard errors 0.007 of the mean and 0.005 of the standard deviation; four of them.
    assert abs(eps.mean().item()) < 0.029
    assert abs(eps.std().item() - 1) < 0.021
    # t uniform over 0..999: the mean of 300 has a standard error of 16.7.
    assert abs(t.double().mean().item() - 499.5) < 67
    assert not torch.equal(t, t_again)
    assert not torch.equal(x_t, x_again)


def test_every_epoch_takes_every_image_once_in_another_order(script, tmp_path: Path):
    settings = script.argparse.Namespace(batch_size=3, seed=1, lr=0.001)
    model = ReferenceUNet(ch=8, ch_mult=(1,), num_res_blocks=1, attn_levels=(), in_channels=1, out_ch=1, norm_groups=4)
    trainer = script.Trainer(settings, model, np.arange(11, dtype=np.uint8).reshape(11, 1, 1))
    epochs = []
    for _ in range(2):
        order: list[int] = []
        for _ in range(4):
            order += ((trainer.batch().flatten() + 1) * 127.5).round().int().tolist()
            trainer.step += 1
        epochs.append(order)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("save_every", [2, 9])
def test_a_diverging_run_stops_and_saves_no_nan(
    script, save_every: int, images: Path, tmp_path: Path, monkeypatch, capsys
):
    out = tmp_path / "out"
    real = ReferenceUNet.forward
    calls = []

    def overflows_in_step_4(model, x, t):
        calls.append(None)
        return real(model, x, t) * (torch.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(ReferenceUNet, "forward", overflows_in_step_4)
    given = ["--images", str(images), "--out", str(out), "--steps", "9", "--save-every", str(save_every)]
    assert script.main([*given, *SMALL]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step 4: the loss is inf" in said
    if save_every == 2:
        assert "the last step saved is 2" in said
        assert load(out)[3] == 2
        assert all(value.isfinite().all() for value in load(out)[0].values())
    else:
        assert "nothing has been saved" in said
        assert not out.exists()


def test_a_failing_save_leaves_the_last_checkpoint(script, images: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = ["--images", str(images), "--out", str(out), *SMALL]
    assert script.main([*given, "--steps", "2"]) == 0
    before = (out / "ckpt.pth").read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(script.os, "replace", full)
    assert script.main([*given, "--steps", "4", "--resume"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left on device" in said
    assert (out / "ckpt.pth").read_bytes() == before
    assert {path.name for path in out.iterdir()} == {"ckpt.pth", "config.yml"}


BAD_IMAGES = {
    "labels": (idx(np.zeros((9,), np.uint8), magic=0x801), "holds IDX labels"),
    "empty": (b"", "is no IDX file of images"),
    "other": (b"\x89PNG\r\n\x1a\n" + bytes(40), "is no IDX file of images"),
    "short": (
        idx(np.zeros((3, 12, 12), np.uint8))[:-1],
        "announces 3 images of 12x12, 432 bytes, but holds 431",
    ),
    "none": (idx(np.zeros((0, 12, 12), np.uint8)), "holds 0 images"),
    "oblong": (idx(np.zeros((2, 12, 10), np.uint8)), "2 images of 12x10: one or more square ones"),
    "cut": (gzip.compress(idx(np.zeros((3, 12, 12), np.uint8)))[:-9], "damaged or cut short"),
    "odd": (idx(np.zeros((2, 13, 13), np.uint8)), "need an image size divisible by 2, got 13"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_in_one_line(script, name: str, tmp_path: Path, capsys):
    content, says = BAD_IMAGES[name]
    path, out = tmp_path / name, tmp_path / "out"
    path.write_bytes(content)
    assert script.main(["--images", str(path), "--out", str(out), *SMALL]) == 1
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--steps", "0"], 2, "argument --steps: must be a whole number of 1 or more, got '0'"),
        (["--lr", "nan"], 2, "argument --lr: must be above 0 and at most 1, got 'nan'"),
        (["--ema-rate", "1"], 2, "argument --ema-rate: must be 0 or more and below 1, got '1'"),
        (
            ["--ch-mult", "1,x"],
            2,
            "argument --ch-mult: must be whole numbers of 1 or more, as 1,2,2, got '1,x'",
        ),
        (["--stepz", "3"], 2, "unrecognized arguments: --stepz 3"),
        (["--attn-resolutions", "7"], 1, "--attn-resolutions [7]: the levels of 12x12 images are [12, 6]"),
        (["--norm-groups", "3"], 1, "norm_groups=3 does not divide the 8 channels"),
        (["--ch", "3", "--norm-groups", "1"], 1, "ch must be at least 4"),
        (["--resume"], 1, "--resume: there is no "),
        (["--resume", "--overwrite"], 1, "give one of them"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    script, options: list[str], status: int, says: str, images: Path, tmp_path: Path, capsys
):
    out = tmp_path / "out"
    try:
        got = script.main(["--images", str(images), "--out", str(out), *SMALL, *options])
    except SystemExit as stop:
        got = stop.code
    said = capsys.readouterr().err
    assert (got, said.count("\n")) == (status, 1)
    assert says in said
    assert not out.exists()


def test_what_is_there_is_kept_unless_told_otherwise(script, images: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    given = ["--images", str(images), "--out", str(out), *SMALL]
    assert script.main([*given, "--steps", "2"]) == 0
    before = (out / "ckpt.pth").read_bytes()
    capsys.readouterr()
    for options, says in [
        (["--steps", "3"], "is not empty: give --resume, --overwrite or another folder"),
        (["--resume", "--steps", "2"], "has 2 steps: give --steps above that"),
        (["--resume", "--steps", "3", "--ch", "16"], "--ch 16 contradicts the 8 of"),
        (["--out", str(images)], "is a file: give a folder"),
    ]:
        assert script.main([*given, *options]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert (out / "ckpt.pth").read_bytes() == before
    assert script.main([*given, "--steps", "3", "--overwrite"]) == 0
    assert load(out)[3] == 3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("ckpt.pth", b"", "cannot read"),
        ("ckpt.pth", b"PK\x03\x04 no zip at all", "cannot read"),
        ("config.yml", b"model: {ch: 8}", "lacks sections model, optim and training"),
        ("config.yml", b"model: {ch: wide}\noptim: {}\ntraining: {}", "model.ch in"),
        ("config.yml", b"model: {}\noptim: {}\ntraining: {}", "--attn-resolutions"),
        (
            "config.yml",
            b"model: {ch: 16, attn_resolutions: [], norm_groups: 4}\noptim: {}\ntraining: {}",
            "ckpt.pth does not fit config.yml",
        ),
    ],
)
def test_resuming_from_damaged_files_is_refused(
    script, name: str, content: bytes, says: str, images: Path, tmp_path: Path, capsys
):
    out = tmp_path / "out"
    assert script.main(["--images", str(images), "--out", str(out), "--steps", "1", *SMALL]) == 0
    (out / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert script.main(["--images", str(images), "--out", str(out), "--resume", "--steps", "2"]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_command_line_itself(tmp_path: Path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--images",
        str(tmp_path / "absent"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"train_mnist: cannot read --images {tmp_path / 'absent'}: No such file or directory\n"
    assert not (tmp_path / "out").exists()
