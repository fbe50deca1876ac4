"""jddim.resolving: what names a checkpoint becomes a folder, converted once, and never half."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("safetensors", reason="the sources here are such files: pip install 'jddim[convert-core]'")

from safetensors.numpy import save_file

import jddim
from jddim import converting, resolving
from jddim.checkpoint.folder import CheckpointError, load_metadata
from jddim.cli import warmup
from jddim.cli.main import _parser, main
from jddim.cli.options import told_of
from jddim.config import UNetConfig
from jddim.converting import Told
from jddim.files import open_lock
from jddim.resolving import resolve
from jddim.run import cache, progress

pytestmark = pytest.mark.unoptimised

COMMANDS = next(a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
CONFIG: UNetConfig = tiny.small_config(channel_mults=(1,), attention_levels=(0,))
TOLD = "image_size: 6x10\nnorm_groups: 4\n"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, beside which a test works in `here`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("JDDIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jddim-checkpoints"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is converted, without verification, which is tried elsewhere."""
    done: list[str] = []
    real = converting.convert

    def convert(src: Any, *args: Any, **options: Any) -> Any:
        done.append(str(src))
        return real(src, *args, **options, verify=False)

    monkeypatch.setattr(converting, "convert", convert)
    monkeypatch.setattr("convert.verify.can_verify", lambda: False)
    return done


def write(path: Path, seed: int = 1) -> Path:
    """A PyTorch source that needs to be told nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tiny.arrays(CONFIG, seed), path)
    (path.parent / "config.yml").write_text(TOLD)
    return path


def test_a_source_is_converted_once(kept: Path, conversions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    source = write(Path("run/model.safetensors"))
    ddim = jddim.load(source)
    assert ddim.model.config == CONFIG
    told = capsys.readouterr()
    (folder,) = kept.glob("[!.]*")
    assert told.out == ""
    assert told.err.startswith(f"run/model.safetensors is converted once, into {folder}\n")
    assert "\n  config: run/config.yml (found)\n" in told.err
    assert "\n  assumed: norm_eps = 1e-06 (" in told.err
    assert jddim.load("run/model.safetensors").metadata == ddim.metadata
    assert capsys.readouterr().err == (
        f"run/model.safetensors: converted before, {folder} (not verified: PyTorch is not installed)\n"
    )
    shutil.copytree("run", "elsewhere/run")  # of the same contents and names
    assert resolve("elsewhere/run/model.safetensors") == resolve(source.absolute()) == folder
    assert conversions == ["run/model.safetensors"]


def test_other_bytes_configs_and_options_are_other_entries(kept: Path, conversions: list[str]) -> None:
    source = write(Path("run/model.safetensors"))
    folders = [resolve(source)]
    folders.append(resolve(source, settings={"eta": 0.5}))
    Path("run/config.yml").write_text(TOLD + "beta_end: 0.01\n")
    folders.append(resolve(source))
    write(source, seed=2)
    folders.append(resolve(source))
    renamed = shutil.copy(source, "run/ema_model.safetensors")  # whose name says what it holds
    folders.append(resolve(renamed))
    assert len(set(folders)) == len(conversions) == len(folders)
    found = [load_metadata(folder) for folder in folders]
    assert [each.sampler.eta for each in found] == [0, 0.5, 0, 0, 0]
    assert [each.schedule.beta_end for each in found] == [0.02, 0.02, 0.01, 0.02, 0.02]
    assert len({each.params_sha256 for each in found}) == 2
    assert [each.provenance["weights"] for each in found[3:]] == ["unstated", "ema"]


def test_a_damaged_entry_is_made_anew_or_refused(
    kept: Path, conversions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(Path("run/model.safetensors"))
    folder = resolve(source)
    for content in (b"", (folder / "metadata/metadata").read_bytes()[:-30]):
        (folder / "metadata/metadata").write_bytes(content)
        capsys.readouterr()
        assert resolve(source) == folder
        assert capsys.readouterr().err.startswith("note: the copy in the cache is damaged, and made anew: ")
    assert len(conversions) == 3
    for path in [path for path in (folder / "params").rglob("*") if path.is_file()]:
        content = bytearray(path.read_bytes() or b"x")
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="it is removed, and the same call makes it anew"):
        jddim.load(source)
    assert not folder.exists()
    assert jddim.load(source).metadata is not None
    assert len(conversions) == 4
    (tiny.write_checkpoint(Path("mine")) / "metadata/metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="metadata cannot be read"):
        jddim.load("mine")  # which lies outside the cache, and stays
    assert Path("mine").is_dir()


def test_of_two_at_once_one_converts(kept: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, folders, lines = write(Path("run/model.safetensors")), [], []
    begun, convert = threading.Event(), converting.convert

    def slowly(*args: Any, **options: Any) -> Any:
        begun.set()
        time.sleep(0.3)
        return convert(*args, **options)

    monkeypatch.setattr(converting, "convert", slowly)
    first = threading.Thread(target=lambda: folders.append(resolve(source)))
    first.start()
    assert begun.wait(30)
    folders.append(resolve(source, say=lines.append))
    first.join()
    assert folders[0] == folders[1]
    assert lines[0] == "another process is converting the same: waiting for it"
    assert len(conversions) == 1
    assert {path.name for path in kept.iterdir()} == {folders[0].name, ".sources"}  # no lock is left


def test_large_files_are_read_once(kept: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    monkeypatch.setattr(resolving, "LARGE", 100)
    source = write(Path("run/model.safetensors"))
    found = converting.locate(source)

    kept.mkdir(parents=True)
    first = resolving._key(found, {}, kept)
    assert len(read) == 2  # just written, so no receipt
    old = time.time() - 60
    os.utime(source, (old, old))
    keys = {first, resolving._key(found, {}, kept)}
    read.clear()
    keys.add(resolving._key(found, {}, kept))
    assert len(read) == 1  # the config, which is small
    assert len(keys) == 1
    (receipt,) = (kept / ".receipts").iterdir()
    receipt.write_text("nonsense")
    read.clear()
    assert {resolving._key(found, {}, kept)} == keys
    assert len(read) == 2
    write(source, seed=2)
    os.utime(source, (old + 1, old + 1))
    assert resolving._key(found, {}, kept) not in keys


def test_what_lies_here_comes_first_and_that_is_said(
    kept: Path, conversions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("google/ddpm-cifar10-32/model.safetensors"))
    metadata = load_metadata(resolve("google/ddpm-cifar10-32"))
    assert "hub_id" not in metadata.provenance["source"]
    told = capsys.readouterr().err
    assert told.count("is a path here") == 1
    assert told.startswith("note: google/ddpm-cifar10-32 is a path here, so the hub is not asked\n")
    mine = tiny.write_checkpoint(Path("guided-256"))
    assert resolve("guided-256") == mine
    assert capsys.readouterr().err == ""  # for it is never fetched
    with pytest.raises(TypeError, match="wieghts"):
        jddim.load("guided-256", wieghts="ema")
    with pytest.raises(CheckpointError, match="guided-256 is converted already, so it takes no weights or preset"):
        resolve("guided-256", weights="ema", preset="guided-256")


def test_without_a_place_to_keep_it_the_command_is_said(
    kept: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(Path("run/model.safetensors"))
    monkeypatch.setenv("JDDIM_CACHE", "")
    with pytest.raises(CheckpointError, match=r"JDDIM_CACHE is empty\): jddim convert run/model.safetensors DST, then"):
        resolve(source)
    Path("file").touch()
    monkeypatch.setenv("JDDIM_CACHE", "file")
    with pytest.raises(CheckpointError, match=r"the cache cannot keep the result .*JDDIM_CACHE names another folder"):
        resolve(source)
    assert resolve(tiny.write_checkpoint(Path("mine"))) == Path("mine")
    assert conversions == []


def test_what_was_not_verified_is_verified_where_it_can_be(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="verifying needs torch: pip install 'jddim[convert]'")
    from convert import verify

    source, lines = write(Path("run/model.safetensors")), []
    with monkeypatch.context() as without:
        without.setattr(verify, "can_verify", lambda: False)
        folder = resolve(source, say=lines.append)
        untold, warning = [line for line in lines if isinstance(line, converting.Warns)]
        assert "no tensor tells beta_schedule, " in untold
        assert "NOT VERIFIED: PyTorch is not installed" in warning
        before = load_metadata(folder)
    assert resolve(source, say=lines.append) == folder
    assert any("made without PyTorch, which is here" in line for line in lines)
    after = load_metadata(folder)
    assert after.params_sha256 == before.params_sha256
    assert after.provenance["verification"]["output_error"] < 2e-5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "guided-256",
            "256x256_diffusion.pt, of openai/guided-diffusion; then jddim convert 256x256_diffusion.pt DST ",
        ),
        ("guided-265", "no checkpoint at guided-265; did you mean guided-256? (jddim list: all)"),
        ("absent", "no checkpoint at absent; jddim list names published ones\n"),
        ("run/modle.pt", "no checkpoint at run/modle.pt; did you mean run/model.pt? (jddim list: published ones)\n"),
    ],
)
def test_names_that_are_no_files(kept: Path, fails: Callable[..., str], name: str, said: str) -> None:
    Path("run").mkdir()
    Path("run/model.pt").touch()
    assert said in fails("sample", name, "a.png")
    assert said.replace("no checkpoint at", "no such file:") in fails("info", name)


@pytest.mark.parametrize(
    "command",
    [
        *("sample X a.png", "sweep X a.png", "interpolate X a.png", "edit X a.npy a.png --strength 0.5"),
        *("invert X a.npy x.npy", "bulk X set --num 3", "serve X", "export X a.jddim", "warmup X", "schedule X"),
        *("cite X", "export-torch X a", "train X data out"),
    ],
)
def test_every_command_takes_whatever_names_a_checkpoint(
    kept: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(warmup, "_kept", lambda: True)
    Path("a.npy").touch()
    assert "lsun_bedroom.pt, of openai/guided-diffusion" in fails(*command.replace("X", "guided-lsun-bedroom").split())


OF_CKPT = [name for name, parser in COMMANDS.items() if {"ckpt", "preset"} <= {a.dest for a in parser._actions}]


def test_every_command_with_a_checkpoint_takes_what_its_conversion_is_told() -> None:
    assert {"sample", "bulk", "serve", "export", "schedule", "cite", "export-torch", "check"} <= {*OF_CKPT}
    told = ["--set", "a=1", "--set", "b=c=d", "--config", "x.yml", "--preset", "p", "--weights", "raw"]
    for name in (*OF_CKPT, "convert", "info"):
        parser = argparse.ArgumentParser(add_help=False)
        for action in COMMANDS[name]._actions:
            if action.dest in {"set", *Told.__annotations__}:
                parser._add_action(action)
        assert told_of(parser.parse_args([*told, "--variant", "v", "--revision", "r", "--autoencoder", "a"])) == {
            **{"config": [Path("x.yml")], "settings": {"a": "1", "b": "c=d"}, "preset": "p", "weights": "raw"},
            **{"variant": "v", "revision": "r", "autoencoder": "a"},
        }


def test_what_a_file_needs_may_be_said_to_any_command(
    kept: Path, conversions: list[str], fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(Path("run/model.safetensors"))
    Path("run/config.yml").unlink()
    kept.mkdir(parents=True)
    told = ["--set", "image_size=6x10", "--set", "norm_groups=4"]
    said = fails("schedule", source)
    assert "convert it once: jddim convert run/model.safetensors DST --set image_size=SIDE " in said
    assert said.endswith("; or add to this command: --set image_size=SIDE --set norm_groups=N\n")
    assert main(["schedule", str(source), *told]) == 0
    assert main(["cite", str(source), *told]) == 0
    assert main(["schedule", str(source), *told, "--set", "eta=0.5"]) == 0
    assert len(conversions) == 3  # the first was refused
    capsys.readouterr()
    mine = tiny.write_checkpoint(Path("mine"))
    refused = "mine is converted already, so it takes no config or settings (--set) or weights"
    assert refused in fails("sample", mine, "a.png", *told, "--weights", "raw", "--config", "x")
    for command in ("schedule", "cite"):
        assert "--set: said of a PyTorch checkpoint, and no checkpoint is named" in fails(command, *told)
    assert "--set takes KEY=VALUE, got 'x'" in fails("sample", source, "a.png", "--set", "x")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *(("sample S a.png", "a.png exists"), ("invert S x.npy x.npy", "x.npy exists")),
        *(("interpolate S a.png", "a.png exists"), ("export S a.jddim", "a.jddim exists")),
        *(("bulk S run --num 3", "run holds other things"), ("export-torch S a.png", "a.png exists")),
        *(("edit S b.npy b.png --strength 1", "b.npy: No such file"), ("invert S b.npy y.npy", "b.npy: No such")),
        ("sample S b.png", "class-conditional: give --labels, one for all or one an image, integers in 0..4"),
        ("warmup S", "class-conditional: give --labels"),
        ("sample S b.png --labels 1 --condition c.npy", "c.npy: No such file"),
    ],
)
def test_what_a_command_lacks_is_said_before_a_conversion(
    kept: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    def plan(*args: Any, check: converting.Check, **options: Any) -> None:
        check(load_metadata(classes))
        pytest.fail("it is converted")

    classes = tiny.write_checkpoint(Path("classes"), class_embedding="learned", num_classes=5)
    monkeypatch.setattr(converting, "convert", plan)
    monkeypatch.setattr(warmup, "_kept", lambda: True)
    source = write(Path("run/model.safetensors"))
    kept.mkdir(parents=True)
    for name in ("a.png", "x.npy", "a.jddim"):
        Path(name).touch()
    assert said in fails(*command.replace(" S", f" {source}").split())


def test_the_cache_is_listed_and_emptied(
    kept: Path, conversions: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve(write(Path("run/model.safetensors")))
    programs = kept.parent / "jaxlib-0.1-0123abcd"
    programs.mkdir()
    (programs / "a-cache").write_bytes(bytes(10**6))
    (kept / f".{'d' * 16}.lock").touch()
    capsys.readouterr()
    assert main(["cache"]) == 0
    listed = capsys.readouterr().out
    assert f"{folder.name}  from {Path('run/model.safetensors').absolute()}\n" in listed
    kept_inside = b"".join(filter(None, tiny.tree(folder).values()))
    assert bytes(Path.cwd()) not in kept_inside  # a folder that is copied says nothing of this machine
    assert f"1.0 MB  {programs.name}  compiled programs\n" in listed
    assert main(["cache", "--empty", "programs"]) == 0
    assert (programs.exists(), folder.exists()) == (False, True)
    with open_lock(kept / f".{'b' * 16}.lock") as busy:
        assert resolving.lock(busy)
        assert main(["cache", "--empty", "--json"]) == 0
        assert [path.name for path in kept.iterdir()] == [f".{'b' * 16}.lock"]
    monkeypatch.setenv("JDDIM_CACHE", "")
    assert main(["cache", "--empty"]) == 0
    assert capsys.readouterr().out.endswith("no cache: JDDIM_CACHE is empty\n")


def test_what_is_not_the_caches_stays(kept: Path, conversions: list[str]) -> None:
    folder = resolve(write(Path("run/model.safetensors")))
    own = [
        *("checkpoints/run1/ckpt.pth", "checkpoints/.git/HEAD", "jaxlib-0.1/setup.py", "jaxlib-0.1-0123abcd/README"),
        *("jddim-checkpoints/mine/ckpt.pth", "jddim-checkpoints/.git/HEAD", f"checkpoints/{folder.name}/ckpt.pth"),
    ]
    for file in [kept.parent / name for name in own]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (kept / f"x-{'0' * 16}").symlink_to(Path.cwd())
    for place in (kept / "damaged", kept / f"y-{'1' * 16}"):  # one by an entry's name, but named itself
        tiny.write_checkpoint(place)
        for file in (place / "params").rglob("*"):
            if file.is_file():
                file.write_bytes(b"x")
        with pytest.raises(CheckpointError, match="convert the checkpoint again"):
            jddim.load(place)
        assert place.is_dir()
    assert cache.found("checkpoints") == [folder, kept / f"y-{'1' * 16}"]
    assert main(["cache", "--empty"]) == 0
    assert cache.found("checkpoints", "programs", "left") == []
    assert all((kept.parent / name).exists() for name in [*own, "jddim-checkpoints/damaged/params"])
    assert Path("run/model.safetensors").exists()


def test_beside_a_living_process(kept: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "found", lambda *kinds: [kept / ".gone.lock"] if kinds == ("left",) else [])
    assert main(["cache", "--empty"]) == 0

    def gone(path: Path) -> Path:
        raise FileNotFoundError(path)

    monkeypatch.setattr(resolving, "atomic", gone)
    monkeypatch.setattr(resolving, "LARGE", 1)
    source = write(Path("run/model.safetensors"))
    os.utime(source, (1e9, 1e9))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert resolving._sha256(source, kept) == digest


@pytest.mark.parametrize("change", [lambda source: write(source, seed=2), Path.unlink], ids=["other", "gone"])
def test_a_source_that_changes_meanwhile_is_not_kept(
    kept: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    source, convert = write(Path("run/model.safetensors")), converting.convert

    def beside(*args: Any, **options: Any) -> Any:
        metadata = convert(*args, **options)
        change(source)
        return metadata

    monkeypatch.setattr(converting, "convert", beside)
    with pytest.raises(CheckpointError, match=r"model.safetensors changed while it"):
        resolve(source)
    assert list(kept.iterdir()) == []


def test_the_key_does_not_depend_on_spelling(kept: Path) -> None:
    found = converting.locate(write(Path("run/model.safetensors")))
    told = [{"norm_groups": 4, "eta": 0.5}, {"eta": "0.5", "norm_groups": "4"}, {"eta": "0.5", "norm_groups": "2"}]
    first, same, other = [resolving._key(found, {"settings": each}, kept) for each in told]
    assert first == same != other


def test_a_folder_of_jddims_is_not_converted_again(kept: Path, fails: Callable[..., str]) -> None:
    tiny.write_checkpoint(Path("mnist"))
    assert fails("convert", "mnist", "out") == "jddim: error: mnist is converted already: jddim sample mnist out.png\n"


def test_ids_beside_a_folder_of_the_owner(kept: Path, fails: Callable[..., str]) -> None:
    Path("google").mkdir()
    assert converting.hub_id("google/ddpm-cifar10-32") == ("google/ddpm-cifar10-32", None)
    assert converting.hub_id("google/mine@main") == ("google/mine", "main")
    assert converting.hub_id("google/mine") == converting.hub_id("google/mine@2.pt") is None
    said = "google/mine; google is a folder here, so the hub is not asked (it is for google/mine@main)"
    assert f"no checkpoint at {said}" in fails("sample", "google/mine", "a.png")
    assert f"no such file: {said}" in fails("info", "google/mine")


def test_under_silence_only_warnings_are_said(
    kept: Path, conversions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(Path("run/model.safetensors"))
    with progress.silence():
        folder = resolve(source)
        assert capsys.readouterr().err.startswith("  WARNING: no tensor tells beta_schedule, ")
        resolve(source)
        assert capsys.readouterr().err.endswith("(not verified: PyTorch is not installed)\n")
        (folder / "metadata/metadata").write_bytes(b"")
        resolve(source)
        assert capsys.readouterr().err.startswith("note: the copy in the cache is damaged, and made anew: ")
        resolving.to_stderr("a line")
    assert capsys.readouterr().err == ""


def test_errors_name_what_was_given(
    kept: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(Path("run/model.safetensors"))
    monkeypatch.setattr(converting, "convert", lambda src, folder, **_: tiny.write_classifier(folder))
    for _ in range(2):  # made, and made before
        with pytest.raises(CheckpointError, match=r"^run/model\.safetensors is a classifier.* --classifier run/model"):
            jddim.load(source)
    capsys.readouterr()
    assert "jddim: error: run/model.safetensors is a classifier" in fails("sample", source, "a.png", "-q")
    with pytest.raises(TypeError, match=r"load_classifier\(\) takes no 'licence'"):
        jddim.load_classifier(source, licence=3)
