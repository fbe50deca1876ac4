"""Configs that are damaged or hostile: refused with a reason, before any number in them is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from convert.conversion import _read_config
from convert.engine import ConversionError
from convert.families import ho
from convert.files.shards import read_weights
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.quick

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yml", "T: " + "9" * 5000, "a whole number of 5000 digits"),
        ("c.yml", "T: 18446744073709551616", "a whole number of 20 digits"),
        ("c.yml", "T: 0x10000000000000000", "a whole number of 20 digits"),
        ("c.yml", "T: 1" + ":59" * 50, "a whole number of 151 digits"),  # YAML 1.1 has numbers to base 60
        ("c.yml", "[" * 3000, "cannot be read as YAML"),
        ("c.yml", "a: !!bool maybe", "cannot be read as YAML"),
        ("c.yml", "a: !!timestamp never", "cannot be read as YAML"),
        ("c.yml", "a: !!python/object/apply:os.system [touch it-ran]", "never runs code from a config"),
        ("c.yml", "a: &a [*a]", "cannot be read as YAML"),
        ("c.yml", BOMB, "hold more than the file"),
        ("c.yml", MERGES, "a merge key"),
        ("c.json", '{"T": 18446744073709551616}', "a whole number of 20 digits"),
        ("c.json", '{"T": 1, "T": 2}', "a name occurs twice"),
        ("c.json", "[" * 100_000, "cannot be read as JSON"),
        ("c.json", '{"T": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_a_config_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConversionError) as caught:
        _read_config(tmp_path / name)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_an_absl_flagfile_is_read_wherever_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "flagfile.txt").write_bytes(b"--T=1000\r\n--train\r\n--attn=1\n--attn=2")
    assert _read_config(tmp_path / "flagfile.txt") == {"T": "1000", "train": True, "attn": ["1", "2"]}


@pytest.mark.parametrize("name", ["../a.bin", "/a.bin", "a/b.bin", "a" * 300, ".hidden", "", ["a"] * 1000])
def test_an_index_that_names_files_elsewhere(tmp_path: Path, name: object) -> None:
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConversionError, match="names files that do not lie beside it") as caught:
        read_weights(index)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_schedule_longer_than_memory() -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.1000000, got 2147483647"):
        linear_schedule(2**31 - 1)


@pytest.mark.parametrize("name", ["const", "quad", "sigmoid"])
def test_a_config_with_such_a_schedule(name: str) -> None:
    config = {"diffusion": {"beta_schedule": name, "num_diffusion_timesteps": 10**12}}
    with pytest.raises(ConversionError, match=r"must lie in 1\.\.1000000, got 1000000000000"):
        ho.plan(tiny.arrays(), config, tiny.SETTINGS)
