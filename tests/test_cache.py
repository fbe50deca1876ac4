"""The cache of compiled programs: where it is, that it is found again, and that nothing depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_checkpoint

from jddim.run import cache

pytestmark = pytest.mark.unoptimised
ROOT = Path(__file__).parent.parent


def started(*words: object, **variables: str) -> subprocess.Popen[str]:
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **os.environ, **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "jddim", *map(str, words)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"JDDIM_CACHE": str(tmp_path / "mine")})
    assert cache.folder().parent == tmp_path / "mine"
    assert cache.use() == cache.folder() == Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    assert cache.folder().parent == tmp_path / "jddim"
    for told in ({"JDDIM_CACHE": ""}, {"JAX_COMPILATION_CACHE_DIR": ""}):
        monkeypatch.setattr(os, "environ", told.copy())
        assert cache.use() is None
        assert os.environ == told
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "theirs"})
    assert cache.use() == Path("theirs")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "environ", {"JDDIM_CACHE": str(tmp_path / "file")})
    assert cache.use() is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_runs_at_once_share_it_and_a_damaged_entry_costs_only_time(tmp_path: Path) -> None:
    ckpt, programs = write_checkpoint(tmp_path / "ckpt"), tmp_path / "programs"
    runs = [
        started("sample", ckpt, tmp_path / f"{i}.npy", "--num", 3, "--steps", 2, JDDIM_CACHE=str(programs))
        for i in range(2)
    ]
    for run in runs:
        assert run.wait(300) == 0, run.stderr.read()
    entries = sorted(programs.glob("*/*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    run = started("sample", ckpt, tmp_path / "2.npy", "--num", 3, "--steps", 2, JDDIM_CACHE=str(programs))
    assert run.wait(300) == 0, run.stderr.read()
    images = [np.load(tmp_path / f"{i}.npy") for i in range(3)]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert sorted(programs.glob("*/*-cache")) == entries


def test_warmup_leaves_nothing_to_compile_and_doctor_says_whether_it_works(tmp_path: Path) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", class_embedding="learned", num_classes=3)
    programs = tmp_path / "programs"
    options = ("--num", 3, "--steps", 2, "--eta", 0.5, "--labels", 1, "--null-label", 2)
    options += ("--batch-size", 2)  # fewer than the images
    run = started("warmup", ckpt, *options, "--guidance-scale", 2, JDDIM_CACHE=str(programs))
    assert run.wait(300) == 0, run.stderr.read()
    assert run.stdout.read().startswith("ready for 2 images a call")
    large = sorted(programs.glob("*/jit_segment-*-cache"))  # the network's; what joins batches compiles in no time
    assert len(large) == 1
    options += ("--guidance-scale", 3)  # no other program
    run = started("sample", ckpt, tmp_path / "a.npy", *options, JDDIM_CACHE=str(programs))
    assert run.wait(300) == 0, run.stderr.read()
    assert sorted(programs.glob("*/jit_segment-*-cache")) == large
    entries = sorted(programs.glob("*/*-cache"))

    run = started("doctor", JDDIM_CACHE=str(programs))
    told, errors = run.communicate(timeout=300)
    assert run.returncode == 0, told + errors
    for expected in ("jax ", "cpu 0: ", f"{len(entries)}, ", "works: compiled in"):
        assert expected in told
    run = started("doctor", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))  # with jax's own limits on what is kept
    told, errors = run.communicate(timeout=300)
    assert run.returncode == 0, told + errors
    run = started("doctor", JDDIM_CACHE="")
    told, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "not kept" in told
    run = started("warmup", ckpt, *options, JDDIM_CACHE="")
    told, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    assert errors.count("\n") == 1
    assert "see jddim doctor" in errors
