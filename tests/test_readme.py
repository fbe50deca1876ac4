"""The README is short; its commands and Python, and the Python of docs/, run as they stand; links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import write_checkpoint

from jddim.cli.main import main
from jddim.config import to_json
from jddim.solvers import SOLVERS

pytestmark = pytest.mark.unoptimised

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 100
    assert len(README.split()) <= 700


def test_the_readmes_commands_and_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ml_dtypes")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^jddim (.*)$", "".join(re.findall(r"```sh\n(.*?)```", README, re.S)), re.M)
    assert [command.split()[0] for command in commands] == ["sample", "info", "convert"]
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0, command
    assert Path("digits.png").is_file()
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict = {}
    exec(block, found)
    assert found["x_0"].shape == (16, 28, 28, 1)  # as its comment says
    assert found["sweep"].shape == (5, 2, 28, 28, 1)
    assert bool(jax.numpy.isfinite(found["sweep"]).all())
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.S)
    exec(block, found)
    assert found["ddim"].model.config.image_size == (28, 28)


def test_the_readmes_scripts_are_there_and_ci_runs_its_tests() -> None:
    named = re.findall(r"^(scripts/\w+)( -.*?)? +#", README, re.M)
    assert [name for name, _ in named] == ["scripts/demo", "scripts/test", "scripts/test"]
    assert all((ROOT / name).is_file() for name, _ in named)
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r'^ +section "tests \(scripts/test\)" scripts/test ', ci, re.M)


def test_the_first_steps_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "cifar10", image_size=(32, 32), in_channels=3, out_channels=3, attention_levels=())
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "start.md").read_text(), re.S)
    names: list[dict] = [{}, {}]
    for block, found in zip(blocks, names, strict=True):
        exec(block, found)
    assert names[0]["x_0"].shape == (64, 32, 32, 3)  # as its comment says
    assert names[0]["sweep"].shape == (5, 8, 32, 32, 3)
    assert names[1]["x_0"].shape == (4, 32, 32, 3)
    assert names[1]["trajectory"].x_t.shape == (4, 4, 32, 32, 3)  # 20 steps, every 5th
    assert all(bool(jax.numpy.isfinite(found["x_0"]).all()) for found in names)


def test_the_inversion_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "inversion.md").read_text(), re.S)
    write_checkpoint(tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)
    found: dict = {"images": jax.random.uniform(jax.random.key(0), (3, 6, 10, 1), minval=-1)}
    exec(block, found)
    assert found["x_T"].shape == found["again"].shape == (3, 6, 10, 1)
    assert found["error"].shape == (3,)


def test_the_research_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"channel_mults": (1,), "attention_levels": ()}  # some forty programs are compiled
    write_checkpoint(tmp_path / "ckpt", class_embedding="learned", num_classes=5, **small)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "research.md").read_text(), re.S)
    assert len(blocks) == 18
    monkeypatch.setattr("jddim.solvers.SOLVERS", dict(SOLVERS))  # the page registers one
    found: dict = {}
    for block in blocks:
        exec(block, found)
    shapes = {"rows": (3, 3), "by_scale": (3, 3), "seeds": (2, 3), "guided": (3,), "filled": (3,), "edited": (3,)}
    assert {name: found[name].shape[:-3] for name in shapes} == shapes
    for name in ("filled", "by_unipc"):  # the left half of 10 columns
        assert (found[name][:, :, :5] == found["images"][:, :, :5]).all()
    assert bool(jax.numpy.isfinite(found["x_0"]).all())
    assert bool(jax.numpy.isfinite(found["bits"]).all())
    before, after = (found["log_probability"](found[x], found["ddim"].model) for x in ("x_T", "better_x_T"))
    assert after.mean() > before.mean()


def test_the_scale_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"channel_mults": (1,), "attention_levels": ()}
    write_checkpoint(tmp_path / "cifar10", in_channels=3, out_channels=3, **small)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.S)
    found: dict = {}
    for block in blocks[:-1]:  # the last one is test_export_sampler.py's
        exec(block, found)
    assert found["images"].shape == (11, 6, 10, 3)
    assert found["x_0"].shape == (found["num"], 6, 10, 3)
    assert found["doubles"] == 0


def test_the_serve_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "mnist", channel_mults=(1,), attention_levels=(), prediction_type="v_prediction")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.S)
    found: dict = {}
    exec(block, found)
    expected = found["ddim"].sample(jax.random.key(7), 5, steps=4, eta=0.5)  # as its comment says
    np.testing.assert_allclose(found["x_0"], np.asarray(expected), atol=1e-5)  # of images of about 1


def test_the_training_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jddim.config import UNetConfig
    from jddim.train.task import Task

    page = (ROOT / "docs" / "training.md").read_text()
    text, *others = re.findall(r"```json\n(.*?)```", page, re.S)
    written = json.loads(text)
    shipped = Task.from_json(written)
    assert len([Task.from_json({**written, **json.loads(other)}) for other in others]) == 2
    assert shipped.model == UNetConfig((28, 28), 1, 1, 32, (1, 2, 2), num_res_blocks=1, attention_levels=(2,))
    for name in to_json(shipped.train):
        assert f"`{name}`" in page, name  # every field is told of
    # as it stands, on a network and a run as small as can be
    small = {"channels": 8, "channel_mults": [1], "norm_groups": 4, "attention_levels": [], "middle": False}
    written["model"] |= {**small, "image_size": [6, 10]}
    written["train"] |= {"steps": 2, "batch_size": 3}
    monkeypatch.chdir(tmp_path)
    Path("mnist.json").write_text(json.dumps(written))
    np.savez("digits.npz", np.random.default_rng(0).integers(0, 256, (5, 6, 10, 1), dtype=np.uint8))
    found: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, found)
    assert found["steps"] == int(found["state"].step) == 2
    assert Path("mnist").is_dir()
    assert bool(jax.numpy.isfinite(found["said"]["loss"]))


OTHERS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
PAGES = [*OTHERS, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    broken = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not broken


def test_the_limits_that_the_security_page_states() -> None:
    pytest.importorskip("ml_dtypes")
    from convert.files import flax_msgpack, pickles, safetensors_file
    from jddim import schedule

    page = (ROOT / "docs" / "security.md").read_text()
    assert f"depth {pickles.MAX_DEPTH}" in page
    assert f"dicts deeper than {flax_msgpack.MAX_DEPTH}" in page
    assert f"header | {safetensors_file.MAX_HEADER // 10**6} MB" in page
    assert f"| {schedule.LARGEST_T:,} |" in page
    named = re.findall(r"`((?:convert|scripts|tests|[.]ci)/[\w./]+)`", page)
    assert len(named) >= 5
    assert all((ROOT / name).exists() for name in named)
