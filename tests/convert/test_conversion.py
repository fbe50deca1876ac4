"""convert.conversion: what `describe` says of a source, and that the command it gives is one that works."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from convert.conversion import describe
from jddim.checkpoint.folder import load_metadata
from jddim.cli.main import main
from jddim.config import ScheduleConfig, UNetConfig

pytestmark = pytest.mark.unoptimised


def command(lines: list[str], out: Path, **filled: str) -> list[str] | None:
    """The arguments after `jddim` of the command among the lines, with what it leaves open filled in."""
    (given,) = [line for line in lines if line.startswith("convert it:")] or [None]
    if given is None:
        return None
    words = shlex.split(given.removeprefix("convert it:"))[1:]
    filled["DST"] = str(out)
    untold = [line.split(":")[0].replace(",", "").split()[1:] for line in lines if line.startswith("  untold ")]
    words += [part for names in untold for name in names for part in ("--set", f"{name}={UNTOLD[name]}")]
    return [*("=".join(filled.get(part, part) for part in word.split("=")) for word in words), "--no-verify"]


UNTOLD = {"beta_schedule": "quad", "beta_start": "1e-3", "beta_end": "0.03", "num_diffusion_timesteps": "70"}
UNTOLD |= {"rescaled": "true"}


# Ho's SMALL at 32 groups cannot be; a network that 32 divides asks for its size alone.
WIDE = UNetConfig((6, 10), 1, 1, channels=32, channel_mults=(1,), num_res_blocks=1, attention_levels=())


@pytest.mark.parametrize(
    ("tensors", "told", "asked"),
    [
        (lambda: tiny.arrays(WIDE), {}, ["image_size=SIDE"]),
        (tiny.arrays, {}, ["image_size=SIDE", "norm_groups=N"]),
        (tiny.arrays, {"image_size": "6x10"}, ["norm_groups=N"]),
        (tiny.arrays, tiny.SETTINGS, []),
        (tiny.arrays, tiny.SETTINGS | UNTOLD, []),
    ],
)
def test_the_command_works_once_what_it_asks_for_is_filled_in(
    tmp_path: Path, tensors: Callable[[], dict[str, np.ndarray]], told: dict[str, str], asked: list[str]
) -> None:
    source = tmp_path / "my weights.safetensors"
    save_file(tensors(), source)
    lines = describe(source, settings=told)
    words = command(lines, tmp_path / "out", SIDE="6x10", N="4")
    assert words is not None
    assert bool(asked) is any(line.startswith("  needs") for line in lines)
    assert all(any(line.endswith(part) or f"{part} " in line for line in lines) for part in asked)
    assert any(line.startswith("  untold      beta_schedule, ") for line in lines) is ("beta_end" not in told)
    assert main(words) == 0
    metadata = load_metadata(tmp_path / "out")
    assert metadata.schedule == ScheduleConfig("scaled_linear", 70, 1e-3, 0.03)
    assert not any("beta" in fact or "rescaled" in fact for fact in metadata.provenance["assumed"])


@pytest.mark.parametrize(
    ("edit", "told", "reason"),
    [
        (lambda state: state.pop("conv_in.bias"), {}, "missing conv_in.bias"),
        (lambda state: state.update(extra=np.zeros(2, np.float32)), {}, "unexpected extra"),
        (lambda state: state.pop("conv_in.bias"), {"image_size": None}, "missing conv_in.bias"),
        (lambda state: state.pop("conv_in.bias"), {"norm_groups": None}, "missing conv_in.bias"),
        (lambda state: None, {"ch": "16"}, "ch is 16 in --set, but 8 in the tensors"),
        (lambda state: None, {"rescaled": "false", "image_size": "6x10"}, "rescaled: false"),
        (lambda state: None, {"eta": "50"}, "eta must lie in"),
    ],
)
def test_what_is_refused_has_no_command(
    tmp_path: Path, edit: Callable[[dict[str, Any]], Any], told: dict[str, str | None], reason: str
) -> None:
    state = tiny.arrays()
    edit(state)
    save_file(state, tmp_path / "a.safetensors")
    settings = {key: value for key, value in {**tiny.SETTINGS, **told}.items() if value is not None}
    lines = describe(tmp_path / "a.safetensors", settings=settings)
    (refused,) = [line for line in lines if line.startswith("  refused")]
    assert reason in refused
    assert command(lines, tmp_path) is None


def test_ho_settings_may_be_flat_and_others_are_said(tmp_path: Path) -> None:
    save_file(tiny.arrays(), tmp_path / "a.safetensors")
    (tmp_path / "c.json").write_text(json.dumps({"image_size": 6, "norm_groups": 4, "lr": 1, "training": {"eta": 3}}))
    lines = describe(tmp_path / "a.safetensors", config=tmp_path / "c.json")
    assert "  note        config: not read: lr; training" in lines
    assert any(line.startswith("convert it:") for line in lines)


def test_a_checkpoint_of_no_file_is_not_verified(tmp_path: Path, fails: Callable[..., str]) -> None:
    tiny.write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "model.pt").write_bytes(b"0")
    assert "ckpt does not say which file it was converted from" in fails(
        "verify", tmp_path / "ckpt", tmp_path / "model.pt"
    )
