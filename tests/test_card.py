"""The model card says what the metadata says, in each folder that is written, and cannot become markup."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import chex
import numpy as np
import pytest
from tiny import SETTINGS, arrays, small_config, tree, write_checkpoint

from jddim.checkpoint import folder as checkpoint
from jddim.checkpoint.card import ALL_ZERO, NAME, card, facts, lines
from jddim.checkpoint.folder import load_metadata, load_params, save_checkpoint
from jddim.checkpoint.metadata import Metadata
from jddim.cli.main import main
from jddim.config import SamplerConfig, ScheduleConfig

pytestmark = pytest.mark.quick

CONFIG = small_config()
PROVENANCE = {
    "family": "diffusers",
    "source": {"file": "model.safetensors", "sha256": "5" * 64, "hub_id": "some/one", "commit": "c" * 40},
    "config": [{"file": "config.json", "sha256": "7" * 64}],
    "preset": None,
    "set": {"eta": "0.3"},
    "weights": "raw",
    "step": 12345,
    "assumed": ["steps_offset = 0 (the class's default)"],
    "wording": {"schedule": {"beta_schedule": "sigmoid"}, "sampler": {"timestep_spacing": "trailing"}, "told": {}},
    "verification": {"output_error": 3.21e-7, "torch": "2.6", "tolerance": 1e-4},
    "versions": {"jddim": "0.1.0", "torch": None},
    "license": "CC0-1.0",
}


def written(provenance: dict) -> str:
    return card(Metadata(CONFIG, ScheduleConfig(), SamplerConfig("quad"), provenance, "a" * 64), 44_969)


def test_everything_recorded_is_said() -> None:
    text = written(PROVENANCE)
    for fact in (
        "# `some/one`",
        "licence: `CC0-1.0`",
        "family: `diffusers`",
        "`model.safetensors`",
        f"`{'5' * 64}`",
        f"commit: `{'c' * 40}`",
        f"`config.json`, SHA-256 `{'7' * 64}`",
        "`raw`, step 12,345",
        "told: `eta=0.3`",
        "(in the source's words): `beta_schedule=sigmoid`",
        "(in the source's words): `timestep_spacing=trailing`",
        "assumed: `steps_offset = 0 (the class's default)`",
        "equal to PyTorch `2.6`",
        "3.2e-07 of its scale (allowed: 0.0001)",
        "44,969 parameters",
        "jddim=0.1.0, torch=None",
        Metadata(CONFIG, ScheduleConfig(), SamplerConfig("quad"), PROVENANCE, "a" * 64).sha256,
    ):
        assert fact in text, fact
    assert "not verified" not in text


def infos(provenance: dict, sampler: SamplerConfig, schedule: ScheduleConfig, **network: object) -> list[str]:
    return lines(Metadata(small_config(**network), schedule, sampler, provenance, "a" * 64), 44_969)


def test_info_is_a_card() -> None:
    sampler = SamplerConfig(
        "quad", 20, 0.5, prediction_type="v_prediction", clip_range=(-2.0, 2.0), self_condition=True
    )
    schedule = ScheduleConfig("linear", 500, 0.0001, 0.03, zero_terminal_snr=True)
    assert infos(PROVENANCE, sampler, schedule) == [
        f"network         {CONFIG.summary}",
        "parameters      44,969",
        "classes         none",
        "schedule        linear, T = 500, beta_start 0.0001, beta_end 0.03, zero terminal SNR",
        "  in diffusers  beta_schedule=sigmoid",
        "sampler         quad, 20 steps, eta 0.5, predicts v_prediction, x_0 clipped to -2..2, self_condition=true",
        "  in diffusers  timestep_spacing=trailing",
        "family          diffusers",
        f"source          file=model.safetensors, sha256={'5' * 64}, hub_id=some/one, commit={'c' * 40}",
        f"config          file=config.json, sha256={'7' * 64}",
        "set             eta=0.3",
        "weights         raw",
        "step            12345",
        "assumed         steps_offset = 0 (the class's default)",
        "verification    3.2e-07 of the output's scale, against PyTorch 2.6",
        "versions        jddim=0.1.0",
        "license         CC0-1.0",
        f"sha256          {Metadata(CONFIG, schedule, sampler, PROVENANCE, 'a' * 64).sha256}",
    ]


def test_infos_other_facts() -> None:
    provenance = {"training": {"null_label": 6, "lr": 0.1}, "verification": {"skipped": True, "reason": "no torch"}}
    provenance["unchecked"] = ["num_heads"]
    classes = {"class_embedding": "learned", "num_classes": 7}
    betas = ScheduleConfig("betas", 3, betas=(0.1, 0.2, 0.3))
    text = infos(provenance, SamplerConfig(clip=False), betas, **classes)
    assert "classes         7, labels 0 to 6; 6 is the null label" in text
    assert "schedule        betas listed one by one, T = 3" in text
    assert "sampler         linspace, 50 steps, eta 0, predicts epsilon, x_0 not clipped" in text
    assert "training        null_label=6, lr=0.1" in text
    assert "verification    skipped (no torch); jddim verify CKPT SRC does it" in text
    assert "license         not stated" in text
    assert "unchecked       num_heads: told, not checked by the file" in text
    zero = infos({"verification": {**PROVENANCE["verification"], "all_zero": True}}, SamplerConfig(), betas)
    assert "verification    3.2e-07 of the output's scale, against PyTorch 2.6; " + ALL_ZERO in zero


def test_info_for_programs_has_all_that_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "ckpt")
    assert main(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"checkpoint": str(path), "parameters": 8_273, **load_metadata(path).written()}
    assert main(["info", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "parameters      8,273" in printed
    assert "{" not in printed


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    text = written({"family": "ho", "verification": {"skipped": True, "reason": "PyTorch is not installed"}})
    assert "licence: not stated" in text
    assert "not verified when it was written (PyTorch is not installed)" in text
    assert "spacing=quad, num_steps=50" in text  # no words of a source: jddim's
    assert "not verified when it was written;" in written({})


def test_what_a_file_says_stays_code() -> None:
    nasty = "a`b\n# heading <script>\x1b[31m" + "x" * 3000
    source = {"file": nasty, "sha256": nasty, "shards": [nasty]}
    text = written({"source": source, "assumed": [nasty], "set": {nasty: nasty}, "license": nasty, "family": nasty})
    assert len(text) < 9000
    assert "\x1b" not in text
    for line in text.replace("```", "").splitlines():
        assert line.count("`") % 2 == 0
        outside = "".join(line.split("`")[::2])
        assert "script" not in outside
    assert sum(line.startswith("#") for line in text.splitlines()) == 1


def test_training_is_told() -> None:
    provenance = {
        "family": "jddim",
        "step": 700,
        "training": {"steps": 700, "lr": 0.001, "null_label": None},
        "data": {"source": "/home/someone/digits.npz", "shape": [70, 6, 10, 1]},
        "parent": {"sha256": "d" * 64, "family": "ho"},
    }
    text = written(provenance)
    assert "700 steps; averaged weights; `steps=700, lr=0.001`" in text
    assert "`digits.npz`, 70 images of 6x10x1" in text
    assert "/home" not in text
    assert f"family `ho`, SHA-256 `{'d' * 64}`" in text
    assert "PyTorch" not in text


def test_it_lies_in_the_folder_and_nothing_depends_on_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "ckpt")
    metadata = load_metadata(path)
    assert (path / NAME).read_text(encoding="utf-8") == card(metadata, 8_273)
    params = load_params(path, metadata)
    (path / NAME).write_text("edited")
    chex.assert_trees_all_equal(load_params(path, load_metadata(path)), params)
    (path / NAME).unlink()
    assert load_metadata(path) == metadata
    chex.assert_trees_all_equal(load_params(path, metadata), params)
    save_checkpoint(path, params, dataclasses.replace(metadata, sampler=SamplerConfig("quad")), overwrite=True)
    assert "quad" in (path / NAME).read_text()  # a folder without a card is still ours


def test_a_card_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "ckpt")
    before = tree(tmp_path)
    metadata = load_metadata(path)
    params = load_params(path, metadata)

    def full(metadata: Metadata, parameters: int) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "card", full)
    for target, overwrite in ((path, True), (tmp_path / "new", False)):
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(target, params, metadata, overwrite=overwrite)
    assert tree(tmp_path) == before


def test_convert_records_the_licence(tmp_path: Path, fails: Callable[..., str]) -> None:
    pytest.importorskip("ml_dtypes")
    from convert.conversion import convert

    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({name: np.asarray(value) for name, value in arrays().items()}, tmp_path / "state.safetensors")
    source = tmp_path / "state.safetensors"
    plain = convert(source, tmp_path / "plain", settings=SETTINGS, verify=False)
    told = convert(source, tmp_path / "told", settings=SETTINGS, verify=False, license=" CC-BY-4.0 ")
    assert told.provenance == plain.provenance | {"license": "CC-BY-4.0"}
    assert told.params_sha256 == plain.params_sha256
    assert "licence: `CC-BY-4.0`" in (tmp_path / "told" / NAME).read_text()
    assert "licence: not stated" in (tmp_path / "plain" / NAME).read_text()
    shutil.rmtree(tmp_path / "told")
    options = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    for bad in ("", " ", "MIT\nGPL", "x" * 201):
        assert "a licence is a line" in fails("convert", source, tmp_path / "told", *options, "--license", bad)


def test_the_facts_in_short() -> None:
    provenance = {"family": "ho", "source": {"file": "a.pth", "sha256": "ab"}, "weights": "ema", "step": 21634}
    about = Metadata(small_config(), ScheduleConfig(), SamplerConfig(), provenance)
    first = {"family": "ho", "source": "a.pth", "SHA-256 of it": "ab", "weights": "ema", "step": "21,634"}
    said = first | {"verification": "not verified when it was written", "SHA-256": about.sha256}
    assert facts(about) == said
    compared = {"verification": {"output_error": 7.55e-7, "torch": "2.6"}}
    about = dataclasses.replace(about, provenance=provenance | compared)
    assert facts(about)["verification"] == "7.5e-07 of the output's scale, against PyTorch 2.6"
    provenance["source"]["hub_id"] = "o" * 600
    assert facts(about)["source"] == "o" * 480 + " ... (cut)"
    about = dataclasses.replace(about, provenance={"training": {}})
    assert facts(about) == {"family": "jddim", "verification": "trained by jddim", "SHA-256": about.sha256}
