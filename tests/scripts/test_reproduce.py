"""scripts/reproduce.py on a tiny network and made-up digits: it goes on where it stopped, and tables say what is."""

from __future__ import annotations

import gzip
import importlib.util
import re
import struct
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from tiny import tree, write_checkpoint

import jddim
from jddim import images
from jddim.evaluate import metrics, mnist_cnn

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce.py"
pytestmark = pytest.mark.unoptimised
RNG = np.random.default_rng(0)
SIZES = [
    word
    for option in (
        "--steps 2,4",
        "--etas 0,sigma-hat",
        "--quad-etas 1",
        "--long-etas 0,0.5",
        "--num 5",
        "--num-long 3",
        "--batch-size 2",
        "--table2-steps 2",
        "--table2-num 2",
        "--interpolation-steps 2",
        "--seed 3",
    )
    for word in option.split()
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mnist")
    for part, n in (("train", 30), ("t10k", 4)):
        for name, array in (
            ("images-idx3", RNG.integers(0, 256, (n, 28, 28), np.uint8)),
            ("labels-idx1", RNG.integers(0, 10, n, np.uint8)),
        ):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"channel_mults": (1,), "attention_levels": (), "image_size": (28, 28)}
    return write_checkpoint(tmp_path_factory.mktemp("reproduce") / "ckpt", **small)


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "reproduce", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LONG", 4)  # in place of 1000
    yield module
    jax.config.update("jax_compilation_cache_dir", None)


def test_stopped_and_gone_on_with(
    reproduce: ModuleType, ckpt: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    command = ["--ckpt", str(ckpt), "--data", str(data), "--out", str(tmp_path / "out"), *SIZES]
    made: list[object] = []
    make = reproduce.make_batch

    def counting(ddim, batch):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(batch)
        return make(ddim, batch)

    assert reproduce.main([*command, "--dry-run"]) == 0
    assert "5 cells of Table 1, 15 files in all, 0 of them there already" in capsys.readouterr().out
    monkeypatch.setattr(reproduce, "make_batch", counting)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(command)
    there = {name: content for name, content in tree(tmp_path / "out" / "cells").items() if content is not None}
    assert len(there) == 4
    assert all(re.fullmatch(r"batch-[0-9a-f]{20}\.npz", name) for name in there)  # nothing half-written

    monkeypatch.setattr(reproduce, "make_batch", lambda ddim, batch: (made.append(batch), make(ddim, batch))[1])
    assert reproduce.main(command) == 0
    assert "11 files" not in capsys.readouterr().err
    assert len(made) == len(set(made)) == 13
    after = tree(tmp_path / "out" / "cells")
    assert {name: after[name] for name in there} == there
    page = (tmp_path / "out" / "results.md").read_text()
    assert reproduce.main(command) == 0
    assert len(made) == 13
    assert (tmp_path / "out" / "results.md").read_text() == page

    # A table's entries, by hand: the first of 5 images, the second of the 3 that S = 4, the long one, has
    ddim = jddim.load(ckpt)
    real = mnist_cnn.features(mnist_cnn.read_mnist(data, "train")[0])
    x_0 = ddim.sample(jax.random.key(3), 6, steps=2, spacing="uniform", eta=0.0, batch_size=2)
    features = mnist_cnn.features(images.from_uint8(images.to_uint8(x_0)))
    for n in (5, 3):
        distance = metrics.frechet_distance(metrics.Moments.of(features[:n]), metrics.Moments.of(real))
        table = page.split(f"`uniform`, FD (mnist-cnn-v1) of {n} images:")[1].split("KD")[0]
        assert f"| 0 | {distance:.2f} |" in table.split("of 3 images")[0]
    assert "| eta | S = 2 | S = 4 |" in page
    assert re.search(r"\| sigma-hat \| [\d.]+ \|  \|", page)  # not among the long ones
    assert len(re.findall(r"^\| error \| [\d.e+-]+ \|$", page, re.M)) == 1
    for picture in re.findall(r"!\[\]\((.*?)\)", page):
        assert (tmp_path / "out" / picture).stat().st_size > 0


def test_sigma_hat_is_the_larger_variance_about_the_mean_of_eta_1(reproduce: ModuleType, ckpt: Path) -> None:
    ddim = jddim.load(ckpt)
    noise = np.zeros((3, 2, 28, 28, 1), np.float32)
    options = {"x_T": np.asarray(RNG.standard_normal((2, 28, 28, 1)), np.float32), "steps": 3, "spacing": "linspace"}
    mean, hat = (reproduce.sample(ddim, eta, noise=noise, **options) for eta in ("1", "sigma-hat"))
    np.testing.assert_allclose(hat, mean, rtol=1e-3, atol=1e-3 * np.abs(mean).max())
    noise[:2] = RNG.standard_normal((2, *noise.shape[1:]))
    assert np.abs(reproduce.sample(ddim, "sigma-hat", noise=noise, **options) - hat).max() > 0.1


def test_what_it_refuses(reproduce: ModuleType, data: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="does not hold train-images-idx3-ubyte"):
        reproduce.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    for words, said in (
        (["--num", "1"], "--num must be at least 2, got 1"),
        (["--etas", "0,0.3"], "takes of 0, 0.2, 0.5, 1, sigma-hat, got '0.3'"),
    ):
        with pytest.raises(SystemExit):
            reproduce.main(["--data", str(data), "--out", str(tmp_path / "out"), *words])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
