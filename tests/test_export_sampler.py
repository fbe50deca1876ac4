"""A sampler exported runs without jddim and flax, and makes the live one's images."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny import random_model, small_config, write_checkpoint

import jddim
from jddim.cli.main import main
from jddim.config import SamplerConfig
from jddim.ddim import StepTable
from jddim.installing import install_line
from jddim.pipeline import DDIM
from jddim.run.request import Request
from jddim.scale.export import Exported, export_sampler, export_step
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.unoptimised

NARROW: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (0,), "middle": False}
JAX_ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "jddim", "orbax", "convert"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(autouse=True)
def _needs_flatbuffers(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("flatbuffers", reason="exporting needs flatbuffers: pip install 'jddim[export]'")


def run(exported: Exported, *arguments: Any) -> Any:
    """As a reader of the file would, without the file."""
    program = jax.export.deserialize(exported.program.serialize())
    options = exported.about["compiler_options"]["cpu"]
    return jax.tree.map(np.asarray, jax.jit(program.call, compiler_options=options)(exported.weights, *arguments))


def test_the_pages_lines_run_with_jax_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "cifar10", **NARROW)
    out = tmp_path / "cifar10.jddim"
    assert main(["export", str(tmp_path / "cifar10"), str(out), "--steps", "4"]) == 0
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.S)[-1]
    code = f"{JAX_ALONE}\n{block}\nnp.save('x_0.npy', x_0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    live = jddim.load(tmp_path / "cifar10").sample(jax.random.key(0), 16, steps=4, eta=0.5)
    # an open batch is another program to XLA: rounding, in four steps of an untrained network
    np.testing.assert_allclose(np.load(tmp_path / "x_0.npy"), live, rtol=0, atol=1e-5 * np.abs(live).max())
    with zipfile.ZipFile(out) as file:
        about = json.loads(file.read("about.json"))
    with zipfile.ZipFile(out, "w") as older:
        older.writestr("about.json", json.dumps({**about, "format_version": 1}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="written by another version of jddim: export the checkpoint again"):
        exec(block, {})
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["arguments"] == {"seed": "uint32[]", "numbers": "uint32['b']", "eta": "float32[]"}
    assert about["jax"] == jax.__version__


@pytest.mark.usefixtures("users_emitters")
@pytest.mark.parametrize(("open_batch", "more"), [(True, {}), (False, {}), (False, {"reuse": 2})])
def test_labels_guidance_and_ancestral_sampling(open_batch: bool, more: dict[str, Any]) -> None:
    config = small_config(class_embedding="learned", num_classes=5, **NARROW)
    ddim = DDIM(random_model(config), linear_schedule(100), SamplerConfig(num_steps=3))
    how: dict[str, Any] = {"method": "ddpm", "guidance_scale": 1.5, "null_label": 4, **more}
    where = {} if open_batch else {"batch_size": 5, "platforms": ("cpu",)}
    labels = np.array([0, 3, 1, 2, 0], np.int32)
    seed = 2**32 - 1
    made = run(
        export_sampler(ddim, Request(**how), **where), np.uint32(seed), np.arange(7, 12, dtype=np.uint32), labels
    )
    live = ddim.sample(jax.random.key(seed), 5, start=7, labels=labels, **how)
    # the open program is another one to XLA: rounding, amplified by three steps of an untrained network
    np.testing.assert_allclose(made, live, rtol=0, atol=1e-3 if open_batch else 0)


def test_one_step_after_the_other_is_the_sampler(tmp_path: Path) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", **NARROW)
    out = tmp_path / "step.jddim"
    assert main(["export", str(ckpt), str(out), "--step", "--clip", "--weights-beside"]) == 0
    with zipfile.ZipFile(out) as file:
        assert file.namelist() == ["about.json", "program"]
        about = json.loads(file.read("about.json"))
        step = jax.jit(jax.export.deserialize(bytearray(file.read("program"))).call)
    weights = dict(np.load(tmp_path / about["weights"]))
    x_t = x_T = jax.random.normal(jax.random.key(1), (3, 6, 10, 1))
    noise = jax.random.normal(jax.random.key(2), (5, *x_T.shape))
    eta = np.float32(0.6)
    table = about["table"]
    for i in range(5):
        t, *ends = (table[name][i] for name in ("t", *StepTable._fields[3:]))
        row = (np.int32(t), *map(np.float32, ends))
        x_t, x0 = step(weights, x_t, *row, eta, noise[i])
    live = jddim.load(ckpt).sample(x_T=x_T, noise=noise, eta=0.6, clip=True)
    np.testing.assert_allclose(x_t, live, atol=1e-4)  # the step and the loop are two programs: rounding
    np.testing.assert_allclose(x0, live, atol=1e-4)  # the last step ends at its x0
    assert float(np.abs(live - np.asarray(x_T)).max()) > 0.1


def test_mistakes_are_one_line_and_write_nothing(tmp_path: Path, fails: Callable[..., str]) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", **NARROW)
    assert "end it in .jddim (a sampler)" in fails("export", ckpt, tmp_path / "a.zip")
    (tmp_path / "folder.jddim").mkdir()
    assert "folder.jddim" in fails("export", ckpt, tmp_path / "folder.jddim")
    out = tmp_path / "a.jddim"
    assert "--step is DDIM's" in fails("export", ckpt, out, "--step", "--method", "heun")
    assert "needs a network with learned class labels" in fails("export", ckpt, out, "--guidance-scale", 2)
    assert "no integer stride makes 60" in fails("export", ckpt, out, "--spacing", "ddim60")
    assert "takes some of cpu, cuda, rocm, tpu" in fails("export", ckpt, out, "--platforms", "cpu,gpu", status=2)


def test_without_flatbuffers_it_says_what_to_install(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", **NARROW)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for options in ([], ["--step"]):
        assert install_line("export") in fails("export", ckpt, tmp_path / "a.jddim", *options)


def test_equal_exports_are_equal_files(tmp_path: Path) -> None:
    from jddim.scale.export import save

    ddim = DDIM(random_model(small_config(**NARROW)), linear_schedule(100), SamplerConfig(num_steps=3))
    for name in ("a", "b"):
        save(tmp_path / f"{name}.jddim", export_step(ddim))
    assert (tmp_path / "a.jddim").read_bytes() == (tmp_path / "b.jddim").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.jddim") as file:
        assert np.load(io.BytesIO(file.read("weights.npz")))["conv_in.bias"].shape == (8,)
