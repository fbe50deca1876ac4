"""Configs that people have: `info` names all that it takes to convert each, and what the tensors tell is held to them.

The weights are holes in files (`real_configs`), so the conversion is run as far as values are not needed: every
parameter is matched with exactly one part of a tensor, of its shape.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the networks' names and shapes are PyTorch's: pip install 'jddim[convert]'")

from real_configs import ROWS, Row

from convert.conversion import describe
from convert.engine import matched, refuse_misfits
from convert.families import Family, Plan, Source, consistency, openai
from convert.rules import to_layout
from jddim.checkpoint.metadata import Metadata
from jddim.cli.main import main
from jddim.config import ModelConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

SAME_SHAPES: dict[str, Any] = {
    **{"image_size": (512, 512), "num_heads": 1, "num_heads_up": None, "head_channels": None, "norm_groups": 1},
    **{"norm_epsilon": 1e-6, "symmetric_padding": False, "cosine_first": False, "frequency_shift": 1.0},
    "divide_last": False,
}
"""UNetConfig's fields that no parameter's shape depends on: one abstract network does for many configs."""


@cache
def leaves(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}


def params(family: Family, source: Source, plan: Plan) -> dict[str, np.ndarray]:
    """In place of the conversion's: the same by shapes alone."""
    model = plan.model
    expected = leaves(dataclasses.replace(model, **SAME_SHAPES) if isinstance(model, UNetConfig) else model)
    fitting, problems = matched(source.tensors, expected, plan.rules, plan.ignored, family.pointwise)
    refuse_misfits(problems)
    pairs = [pair for pieces in fitting.values() for pair in pieces]
    assert len(pairs) == len(expected)
    assert all(to_layout(piece, expected[leaf], leaf).shape == expected[leaf] for leaf, piece in pairs)
    return {leaf: np.broadcast_to(np.float32(0), expected[leaf]) for leaf, _ in pairs}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Metadata]:
    """What the conversions of a test would write."""
    found: list[Metadata] = []

    def save(path: Any, params: Any, metadata: Metadata, **options: Any) -> Metadata:
        found.append(metadata)
        return metadata

    for name, stand_in in {"_params": params, "save_checkpoint": save}.items():
        monkeypatch.setattr(f"convert.conversion.{name}", stand_in)
    monkeypatch.setattr("convert.sources.digest", lambda path: "0" * 64)  # of gigabytes of zeros
    return found


def filled(lines: list[str], row: Row, out: Path) -> tuple[list[str], list[str]]:
    """The arguments of the command on `info`'s last line, with what the source tells in it; and the settings asked.

    Those that the line `untold` names come last.
    """
    words = shlex.split(lines[-1].removeprefix("convert it:"))[1:]
    untold = [line.split(":")[0].replace(",", "").split()[1:] for line in lines if line.startswith("  untold ")]
    words += [part for names in untold for name in names for part in ("--set", f"{name}=VALUE")]
    asked = [word.partition("=")[0] for word in words if re.search(r"=(SIDE|N|BOOLEAN|VALUE)$", word)]
    values = {"DST": str(out), "NAME": str(row.preset)}
    words = [f"{key}={row.told[key]}" if (key := word.partition("=")[0]) in asked else word for word in words]
    return [values.get(word, word) for word in words] + ["--no-verify"], asked


def check(metadata: Metadata, row: Row, **sampling: Any) -> None:
    assert metadata.model == row.network
    assert metadata.schedule == row.schedule
    plain = {"prediction_type": "epsilon", "timestep_scale": 1.0, "clip": True, "steps_offset": 0}
    expected = {**plain, **row.sampler, **sampling}
    assert {field: getattr(metadata.sampler, field) for field in expected} == expected
    if row.family == "openai":
        order = row.told["use_new_attention_order"] == "True"
        assert metadata.provenance["reference_options"] == {"use_new_attention_order": order}
    # a default stands in for nothing that the source says
    said = [*metadata.provenance["assumed"], *metadata.provenance.get("warnings", ())]
    assumed = {key for fact in said for key in re.findall(r"(\w+) = ", fact)}
    assert not assumed & (row.told.keys() if row.said is None else row.said)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.alone])
def test_the_weights_alone_convert_with_what_info_asks_for(
    tmp_path: Path, name: str, written: list[Metadata], fails: Callable[..., str]
) -> None:
    row = dataclasses.replace(ROWS[name], files={})
    file = row.write(tmp_path)
    lines = describe(file)
    if row.millions is not None:
        (parameters,) = [line for line in lines if line.startswith("  parameters")]
        assert round(int(parameters.split()[1].replace(",", "")) / 1e6, 1) == row.millions
    words, asked = filled(lines, row, tmp_path / "out")
    assert row.preset is None or any(line.startswith("  presets") and row.preset in line for line in lines)
    assert bool(asked) is ("--preset" not in words) is (row.preset is None)
    assert main(words) == 0
    check(*written, row)
    assert f"{row.wrong[0]} is " in fails(*words, "--set", "=".join(row.wrong))


def test_every_preset_of_openais_networks_is_held_to_its_flags() -> None:
    assert {row.preset for row in ROWS.values() if row.family == "openai"} == {*openai.PRESETS, None}
    assert {row.preset for row in ROWS.values() if row.family == "consistency"} == {*consistency.PRESETS}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.files])
def test_the_weights_beside_their_configs(tmp_path: Path, name: str, written: list[Metadata]) -> None:
    row = ROWS[name]
    file = row.write(tmp_path)
    src = file if "config.yml" in row.files else tmp_path
    lines = describe(src)
    if row.refused:
        assert any(line.startswith(("  refused", "  needs")) and row.refused in line for line in lines)
        assert not lines[-1].startswith("convert it:") or lines[-1].endswith("--autoencoder SRC")
        return
    words, asked = filled(lines, row, tmp_path / "out")
    assert asked == list(row.asked)
    assert main(words) == 0
    check(*written, row, **row.sampling)
