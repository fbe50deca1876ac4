"""The pictures of the first page and of the DDIM tutorial are the script's, and show what the captions say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import write_checkpoint

import jddim

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "tutorial_pictures.py"
    spec = importlib.util.spec_from_file_location("tutorial_pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.unoptimised
def test_rows_show_what_the_captions_say(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ddim = jddim.load(write_checkpoint(tmp_path / "ckpt", channel_mults=(1,), attention_levels=()))
    x_T = jax.random.normal(jax.random.key(3), (8, 6, 10, 1))
    one, again, other, another = script.twice(ddim, x_T).values()
    assert (one == again).all()
    assert (other != another).any()

    rows = script.by_hand(ddim, x_T)
    t, s = (int(text.split()[0]) for text in capsys.readouterr().out.split("t = ")[1:])
    page = (ROOT / "docs" / "tutorials" / "ddim.md").read_text()
    assert f"from t = {t} to t = {s}" in page
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((ddim.schedule.alpha(at), ddim.schedule.sigma(at)) for at in (t, s))
    eps = (rows["x_t"] - alpha_t * rows["x0_hat"]) / sigma_t
    unclipped = np.abs(rows["x0_hat"]) < 1
    assert unclipped.any()
    np.testing.assert_allclose(rows["x_s"][unclipped], (alpha_s * rows["x0_hat"] + sigma_s * eps)[unclipped], atol=1e-4)

    monkeypatch.setattr(script, "EVERY", 60)  # enough for rounding to show if the two differed
    ddpm, ddim_, *_ = script.every_step(ddim, x_T).values()
    np.testing.assert_allclose(ddpm, ddim_, atol=1e-3)


def test_the_pictures_are_small_and_shown_and_their_t_are_those_of_the_captions(script) -> None:
    shown = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md")]
    text = "".join(page.read_text() for page in shown)
    for name in script.PICTURES:
        path = ROOT / "docs" / f"{name}.png"
        assert path.stat().st_size < 60_000
        assert f"({path.name})" in text
        with Image.open(path) as picture:
            assert (picture.height - 4) % 60 == 0
    table = jddim.step_table(jddim.linear_schedule(), jddim.linspace_timesteps(1000, script.STEPS))
    *before, end = table.t_prev[script.KEPT].tolist()
    assert end == -1
    assert text.count(f"at t = {', '.join(map(str, before))} and the end") == 2
