"""The Python of the tutorials and how-to pages runs as it stands, in order, and what its asserts claim is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import state_dict, write_checkpoint

from jddim import images

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
