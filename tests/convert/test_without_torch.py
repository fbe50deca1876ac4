"""Where PyTorch is not installed: conversion works, says that it was not verified, and records it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import MNIST_SOURCE, ROOT

from jddim.checkpoint.folder import load_metadata
from jddim.installing import install_line

pytestmark = pytest.mark.quick


def without_torch(*command: object) -> subprocess.CompletedProcess[str]:
    """`jddim COMMAND` in a Python where importing torch fails, as it does where it is not installed."""
    code = "import sys; sys.modules['torch'] = None; from jddim.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The shipped checkpoint, converted without torch, and what that printed."""
    path = tmp_path_factory.mktemp("without-torch") / "mnist"
    run = without_torch("convert", MNIST_SOURCE / "ckpt.pth", path)
    assert run.returncode == 0, run.stderr
    return path, run.stdout


def test_conversion_says_and_records_that_it_was_not_verified(converted: tuple[Path, str]) -> None:
    path, printed = converted
    command = f"jddim verify {path} {MNIST_SOURCE / 'ckpt.pth'}"
    assert f"NOT VERIFIED: PyTorch is not installed; where it is, run: {command}" in printed
    provenance = load_metadata(path).provenance
    assert provenance["verification"] == {"skipped": True, "reason": "PyTorch is not installed"}


def test_verifying_needs_torch_and_says_so(converted: tuple[Path, str]) -> None:
    run = without_torch("verify", converted[0], MNIST_SOURCE / "ckpt.pth")
    assert run.returncode == 1
    assert run.stderr == f"jddim: error: comparing with PyTorch needs PyTorch: {install_line('convert')}\n"


def test_the_old_format_is_read_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="only torch writes its old format")
    state = {name: torch.from_numpy(value) for name, value in tiny.arrays().items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    run = without_torch("info", tmp_path / "old.pth", *tiny.SETTING_OPTIONS)
    assert run.returncode == 0, run.stderr
    assert "convert it:" in run.stdout


def test_the_parameters_are_those_that_conversion_with_torch_gives(
    converted: tuple[Path, str], mnist_checkpoint: Path
) -> None:
    path, _ = converted
    with_torch, without = load_metadata(mnist_checkpoint), load_metadata(path)
    assert without.params_sha256 == with_torch.params_sha256
    assert (without.model, without.schedule, without.sampler) == (
        with_torch.model,
        with_torch.schedule,
        with_torch.sampler,
    )
