"""The Python of the tutorials and how-to pages runs as it stands, in order, and what its asserts claim is so."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import state_dict, write_checkpoint

import jddim
from jddim import images
from jddim.pipeline import SampleOptions

pytestmark = pytest.mark.unoptimised

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = DOCS / "tutorials"


def run(page: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    path = DOCS / f"{page}.md"
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        exec(compile(block, page, "exec"), found)
    return found


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page's "mnist", of one level: what a page shows does not depend on the network."""
    write_checkpoint(tmp_path / "mnist", channel_mults=(1,), attention_levels=())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("mnist")
def test_ddim() -> None:
    found = run("tutorials/ddim")
    assert found["digits"].shape == (16, 6, 10, 1)
    assert images.read_metadata("digits.png")["steps"] == 30


@pytest.mark.usefixtures("mnist")
def test_eta() -> None:
    found = run("tutorials/eta")
    assert found["rows"].shape == (3, 8, 6, 10, 1)
    assert float(found["difference"]) < 1e-2  # random weights amplify rounding through 20 steps
    assert Path("etas.png").is_file()


@pytest.mark.usefixtures("mnist")
def test_invert() -> None:
    found = run("tutorials/invert")
    assert found["between"].shape == (5, 6, 10, 1)
    assert found["errors"].keys() == {0, 3}
    assert np.isfinite(list(found["errors"].values())).all()
    assert bool(jax.numpy.isfinite(found["edited"]).all())


@pytest.mark.usefixtures("mnist")
def test_sampler() -> None:
    found = run("tutorials/sampler")
    assert found["x_0"].shape == (4, 6, 10, 1)
    assert bool(jax.numpy.isfinite(found["x_0"]).all())
    page = (TUTORIALS / "sampler.md").read_text()
    for S, (euler, ours) in found["errors"].items():  # the figures in the text
        assert f"{euler:.3f}" in page, S
        assert f"{ours:.2g}" in page or f"{ours:.3f}" in page, S


def test_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    torch.save(state_dict(ch=32, ch_mult=(1,), attn_levels=(), norm_groups=32), tmp_path / "ckpt.pth")
    (tmp_path / "config.yml").write_text("data: {image_size: 28}\n")
    monkeypatch.chdir(tmp_path)
    found = run("tutorials/convert")
    said = capsys.readouterr().out
    assert "verified: largest error" in said
    assert found["ddim"].metadata.sha256 == found["metadata"].sha256


def test_gpu_and_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"channel_mults": (1,), "attention_levels": ()}
    write_checkpoint(tmp_path / "cifar10", in_channels=3, out_channels=3, **small)
    monkeypatch.chdir(tmp_path)
    gpu = run("gpu")
    assert gpu["fast"].shape == gpu["exact"].shape == (4, 6, 10, 3)
    assert 0 < float(gpu["difference"]) < 1
    fid = run("fid")
    assert fid["mine"].count == fid["other"].count == 24
    assert 0 < fid["chance"] < 10


@pytest.mark.usefixtures("mnist")
def test_coming_from() -> None:
    found = run("coming-from")
    assert found["x_0"].shape == found["between"].shape == found["x_t"].shape == (4, 6, 10, 1)
    assert found["pixels"].shape == (4, 1, 6, 10)


def test_the_names_that_coming_from_sets_side_by_side_are_there() -> None:
    rows = [line.split(" | ") for line in (DOCS / "coming-from.md").read_text().splitlines() if line.startswith("| ")]
    cells = [re.findall(r"`(.*?)`", row[-1]) for row in rows]
    told = [name for cell in cells for name in cell]
    keywords = {name for text in told for name in re.findall(r"^(\w+)=", text)}
    assert keywords <= {*SampleOptions.__annotations__, "trajectory_every"}
    assert len(keywords) > 10
    homes: dict[str, Any] = {"jddim": jddim, "ddim": jddim.DDIM, "guidance": jddim.guidance, "editing": jddim.editing}
    dotted = [match for text in told if (match := re.match(r"(\w+)\.([\w.]+)", text))]
    assert len(dotted) + len([text for text in told if re.match(r"\w+=", text)]) >= len(told) - 1  # and `key`
    for match in dotted:
        place = homes[match[1]]
        for name in match[2].split("."):
            assert name in getattr(place, "__annotations__", {}) or hasattr(place, name), match[0]
            place = getattr(place, name, jddim.NoiseSchedule if name == "schedule" else None)


def test_the_names_of_diffusers_in_it_are_there() -> None:
    diffusers = pytest.importorskip("diffusers")
    from inspect import signature

    rows = [line.split(" | ") for line in (DOCS / "coming-from.md").read_text().splitlines() if line.startswith("| ")]
    cells = [text for row in rows[2:] for text in re.findall(r"`([A-Za-z_]\w*)", row[1])]
    scheduler, pipeline = diffusers.DDIMScheduler, diffusers.DDIMPipeline
    known = {
        *dir(diffusers),
        *dir(scheduler),
        *signature(scheduler).parameters,
        *signature(pipeline.__call__).parameters,
    }
    known |= {*signature(diffusers.UNet2DModel.forward).parameters, "pipeline", *vars(scheduler())}
    assert len(cells) > 15
    assert set(cells) <= known


@pytest.mark.usefixtures("mnist")
def test_jax() -> None:
    found = run("jax")
    assert found["rows"].shape == (3, 2, 6, 10, 1)
    assert found["gradient"].shape == found["masked"].shape == (2, 6, 10, 1)
    assert found["images"].shape == (2, 1, 6, 10)
    assert (found["masked"][:, :3] == -1).all()
    assert (found["masked"][:, 3:] == found["once"][:, 3:]).all()


def test_cluster() -> None:
    found = run("cluster")
    assert found["seconds"](11, 3, 2, 1000, workers=2, shard=4) == 12  # 2 of 3 shards, of 2 batches each
    measured = (DOCS / "benchmarks.md").read_text()
    page = (DOCS / "cluster.md").read_text()
    for ms in re.findall(r"ms_a_step=([\d.]+)\b", page):
        assert re.search(rf"\b{re.escape(ms)}\b", measured), ms


def test_the_figures_of_the_page_on_methods_are_those_of_the_reproduction() -> None:
    said = (DOCS / "methods.md").read_text()
    measured = (DOCS / "reproduction.md").read_text()
    figures = re.findall(r"\d+\.\d\d", said)
    assert len(figures) == 18
    assert all(figure in measured for figure in figures)


@pytest.mark.skipif(find_spec("torchax") is None, reason="torchax is not installed: docs/torchax.md does not run here")
def test_torchax() -> None:
    """In a process of its own: torchax sets options of torch and jax when it is imported."""
    page = (DOCS / "torchax.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
