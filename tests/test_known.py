"""jddim.known: the table of published checkpoints, and `jddim list`."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest

import jddim
from jddim import converting
from jddim.cli.main import main
from jddim.schedule import CONTINUOUS, SCHEDULES

pytestmark = pytest.mark.quick


def test_each_row_is_whole() -> None:
    assert isinstance(jddim.presets, tuple)
    assert len({each.name for each in jddim.presets}) == len(jddim.presets)
    for each in jddim.presets:
        assert each.schedule in {**SCHEDULES, **CONTINUOUS}
        assert each.prediction == {"flow": "velocity", "edm": "edm"}.get(each.schedule, "epsilon")
        assert (each.fid is None) == (each.fid_from == "")
        assert each.variance in ("", "fixed_small", "fixed_large", "learned_range")
        on_hub = converting.hub_id(each.name) is not None
        assert on_hub == (each.file == each.options == each.origin == "")
        assert bool(each.advice) == (not on_hub)
        assert each.licence


def test_what_is_told_of_a_file_is_what_its_preset_says() -> None:
    families = pytest.importorskip(
        "convert.families", reason="it reads YAML: pip install 'jddim[convert-core]'"
    ).FAMILIES
    named = set()
    for each in jddim.presets:
        assert each.family in families
        if not each.options.startswith("--preset "):
            continue
        preset = shlex.split(each.options)[1]
        named.add(preset)
        told = families[each.family].presets[preset]
        assert each.image_size == int(told.get("large_size") or told["image_size"])
        counts, schedules = (
            ("diffusion_steps", "num_diffusion_timesteps", "n_timestep"),
            ("noise_schedule", "beta_schedule", "schedule"),
        )
        assert [each.train_timesteps or None] == [int(told[name]) for name in counts if name in told] or [None]
        assert [each.schedule] == [told[name] for name in schedules if name in told] or [
            {"dit": "flow"}.get(each.family, "edm")
        ]
        assert each.classes == (1000 if told.get("class_cond") == "True" or "num_classes" in told else 0)
        if "var_type" in told:
            assert each.variance == {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}[told["var_type"]]
    # score_sde's files lie in one folder, without addresses of their own
    published = {name for family in families.values() if family.name != "score_sde" for name in family.presets}
    # of which no PyTorch file is published
    rest = {"celebahq", "uncropping_places2", "colorization_mirflickr25k", "SiT-XL/2-512"}
    sizes = {
        f"{kind}-{size}/{patch}" for kind in ("DiT", "SiT") for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)
    }
    assert published - named == rest | sizes


def test_the_list(capsys: pytest.CaptureFixture[str], fails) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(jddim.presets) + 2
    assert all(len(line) <= 120 for line in listed)
    assert "google/ddpm-cifar10-32" in listed[1]
    assert listed[-1] == "jddim list NAME says how to get one"
    assert "3.17" in listed[1]
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [dataclasses.asdict(each) for each in jddim.presets]
    assert main(["list", "guided-256"]) == 0
    assert "jddim convert 256x256_diffusion.pt DST --preset guided-256, and name DST" in capsys.readouterr().out
    assert main(["list", "google/ddpm-cifar10-32"]) == 0
    assert capsys.readouterr().out.endswith("  get it        jddim sample google/ddpm-cifar10-32 out.png\n")
    assert "no published checkpoint is known as guided-265 (did you mean 'guided-256'?)" in fails("list", "guided-265")
