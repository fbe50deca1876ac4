"""jddim.converting: PyTorch checkpoints from Python, wherever a module of the user's own is named convert."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MNIST_SOURCE, ROOT

import convert.conversion
import convert.engine
import convert.export
import jddim
from jddim import converting
from jddim.cli.main import main
from jddim.installing import install_line

CKPT = MNIST_SOURCE / "ckpt.pth"
STRANGER = "raise SystemExit('the stranger was run')\n"


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python in another folder, which finds jddim behind what lies there."""
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def file(folder: Path) -> None:
    (folder / "convert.py").write_text(STRANGER)


def package(folder: Path) -> None:
    (folder / "convert").mkdir()
    (folder / "convert" / "__init__.py").write_text(STRANGER)
    (folder / "convert" / "conversion.py").write_text(STRANGER)


def plain_folder(folder: Path) -> None:
    (folder / "convert").mkdir()
    (folder / "convert" / "conversion.py").write_text(STRANGER)


@pytest.mark.parametrize("stranger", [file, package, plain_folder])
def test_the_command_runs_beside_a_strangers_module(stranger: Callable[[Path], None], tmp_path: Path) -> None:
    stranger(tmp_path)
    done = run("-m", "jddim", "convert", CKPT, "mnist", "--no-verify", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = run("-m", "jddim", "info", CKPT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith(f"{CKPT}: Ho et al.")


def test_a_script_named_convert_calls_jddim_convert(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the conversion is verified")
    (tmp_path / "convert.py").write_text(
        f"import jddim\nfrom pathlib import Path\n"
        f"metadata = jddim.convert({str(CKPT)!r}, 'mnist')\n"
        f"assert jddim.verify('mnist', {str(CKPT)!r}).first_bad is None\n"
        "assert jddim.load('mnist').metadata.params_sha256 == metadata.params_sha256\n"
        "assert jddim.export_torch('mnist', 'back') == 'ermongroup'\n"
        "try:\n    jddim.convert('absent.pth', 'x')\n"
        "except jddim.ConversionError as error:\n    print(error)\n"
    )
    done = run("convert.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no such file: absent.pth; jddim list names published ones\n"
    assert (tmp_path / "back" / "ckpt.pth").is_file()


def test_a_strangers_module_that_is_imported_stays_imported(tmp_path: Path) -> None:
    (tmp_path / "convert.py").write_text("mine = 1\n")
    (tmp_path / "script.py").write_text(
        f"import convert, sys, jddim\njddim.info({str(CKPT)!r})\n"
        "assert sys.modules['convert'] is convert and convert.mine == 1\n"
    )
    done = run("script.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_there_is_one_copy_where_the_name_is_free() -> None:
    code = (
        f"import sys, jddim; jddim.info({str(CKPT)!r}); import convert.conversion; "
        "assert 'jddim_convert' not in sys.modules; assert convert.engine.ConversionError is jddim.ConversionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import sys; sys.modules['yaml'] = None; import jddim; jddim.info({str(CKPT)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert f"reading PyTorch checkpoints needs yaml: {install_line('convert')}" in done.stderr
    monkeypatch.setattr(converting, "_FOLDER", tmp_path / "convert")
    with pytest.raises(ModuleNotFoundError, match="its package convert is not at"):
        jddim.info(CKPT)


@pytest.mark.parametrize(
    ("public", "own"),
    [
        (jddim.convert, convert.conversion.convert),
        (jddim.verify, convert.conversion.verify),
        (jddim.info, convert.conversion.describe),
        (jddim.export_torch, convert.export.export),
    ],
)
def test_options_are_those_of_the_package(public: Callable[..., object], own: Callable[..., object]) -> None:
    ours, theirs = ([*inspect.signature(each).parameters.values()] for each in (public, own))
    assert [p.name for p in ours][1:] == [p.name for p in theirs][1:]  # `path` of info is `src` there
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.default == its.default or mine.name == "say"
        assert "Any" not in str(mine.annotation)
    for option in [p.name for p in ours]:
        assert f"{option}: " in str(public.__doc__) or option in (
            "settings",
            "preset",
            "variant",
            "config",
            "revision",
        ), option


def test_settings_are_values_or_text_and_say_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "bare").mkdir()
    source = tmp_path / "bare" / "ckpt.pth"
    source.write_bytes(CKPT.read_bytes())
    with pytest.raises(jddim.ConversionError, match="image size"):
        jddim.convert(source, tmp_path / "x")
    settings = {"image_size": 28, "rescaled": True, "eta": 0.5, "beta_schedule": "linear"}
    metadata = jddim.convert(source, tmp_path / "x", settings=settings, verify=False, say=told.append)
    assert metadata.model.image_size == (28, 28)
    assert metadata.sampler.eta == 0.5
    assert metadata.provenance["set"] == {key: str(value) for key, value in settings.items()}
    assert told[-1] == f"wrote {tmp_path / 'x'}"
    lines = jddim.info(tmp_path / "x")
    assert lines[0] == f"checkpoint      {tmp_path / 'x'}"
    assert "parameters      1,112,801" in lines
    assert "eta=0.5" in next(line for line in lines if line.startswith("set ")).split(", ")


def test_a_verification_prints_its_table() -> None:
    result = jddim.Verification({"conv_in": 1e-7, "mid": 0.5, "out": float("nan")}, (0,), (2, 3), 0, "2", "0", 1e-4)
    assert result.first_bad == "mid"
    assert str(result).splitlines() == [
        "block    error / scale",
        "conv_in  1.00e-07",
        "mid      5.00e-01  out of tolerance (first)",
        "out      nan  out of tolerance",
    ]


def test_a_verification_for_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"conv_in": 1e-7, "mid": 0.5, "out": float("nan")}
    result = jddim.Verification(blocks, (0,), (2, 3), 0, "2", "0", 1e-4)
    monkeypatch.setattr(converting, "verify", lambda ckpt, src, config: result)
    assert main(["verify", str(tmp_path), "a.pt", "--json"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (found["blocks"], found["first_bad"]) == ({**blocks, "out": None}, "mid")
    assert "first at mid" in told.err
    assert (tmp_path / "verify.json").is_file()


def test_a_source_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(CKPT), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"source": str(CKPT), "lines": jddim.info(CKPT)}


@pytest.mark.parametrize("weights", ["RAW", "emaa"])
def test_weights_that_are_not_there_are_listed(weights: str, tmp_path: Path) -> None:
    with pytest.raises(
        jddim.ConversionError, match=rf"no weights {weights}; it has: raw \(model\.module: .*ema \(ema: "
    ):
        jddim.convert(MNIST_SOURCE, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()
