"""`jddim completion`: each shell's script knows every command, option and choice; bash, zsh and fish read theirs."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jddim.cli.main import _parser, main

pytestmark = pytest.mark.quick

COMMANDS = next(a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
SHELLS = ("bash", "zsh", "fish")


def shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Path]:
    found = {}
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        found[shell] = tmp_path / f"jddim.{shell}"
        found[shell].write_text(capsys.readouterr().out)
    return found


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers in place of the last word."""
    code = 'source "$0"; COMP_WORDS=(jddim "$@"); COMP_CWORD=$#; _jddim; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "--norc", "-uc", code, script, *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes(scripts: dict[str, Path]) -> None:
    script = scripts["bash"]
    assert completed(script, "") == list(COMMANDS)
    assert completed(script, "sam") == ["sample"]
    assert completed(script, "sample", "mnist", "--preview") == ["--preview"]
    assert completed(script, "sample", "mnist", "out.png", "--eta", "0", "--method", "dpm++2m") == [
        "dpm++2m",
        "dpm++2m-sde",
    ]
    assert completed(script, "sample", "m") == []  # bash's own completion follows: files
    assert completed(script, "bulk", "a", "b", "--format", "") == ["npz", "png", "tar"]
    assert completed(script, "completion", "") == list(SHELLS)
    assert "--x-T" in completed(script, "sample", "--")
    assert "--x-T" not in completed(script, "bulk", "--")  # which would refuse it


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_in_each_script(scripts: dict[str, Path], name: str) -> None:
    options = sorted(option for action in shown(COMMANDS[name]) for option in action.option_strings)
    assert sorted(completed(scripts["bash"], name, "-")) == options
    (branch,) = re.findall(rf"^    {name}\) _arguments (.*) ;;$", scripts["zsh"].read_text(), re.M)
    assert sorted(re.findall(r"(?<=')\*?(--?[\w-]+)\[", branch)) == options
    lines = re.findall(
        rf"^complete -c jddim -n '__fish_seen_subcommand_from {name}' (.*)", scripts["fish"].read_text(), re.M
    )
    in_fish = [(dash, o) for line in lines for dash, o in re.findall(r"(?:^| )(-[ls]) ([\w-]+)", line.split(" -d ")[0])]
    assert sorted(f"{'--' if dash == '-l' else '-'}{option}" for dash, option in in_fish) == options


def test_values_are_choices_files_or_neither(scripts: dict[str, Path]) -> None:
    zsh, fish = scripts["zsh"].read_text(), scripts["fish"].read_text()
    for spec in (
        "'--dtype[of the network'\"'\"'s computation; default float32]:value:(float32 bfloat16)'",
        "'--x-T[start from this noise, (N, H, W, C) float32]:value:_files'",
        "'--guidance-interval[guide at these t alone, LOW <= t <= HIGH]:value: :value: '",
        "'--plot[draw it (needs jddim\\[plot\\])]:value:_files'",
        "]::value:_files'",  # evaluate's --json
        "'*--set[",  # which may come again
    ):
        assert spec in zsh, spec
    assert "' -l dtype -x -a 'float32 bfloat16' -d " in fish
    assert "' -l x-T -r -F -d " in fish
    assert "' -l overwrite -d " in fish
    assert "' -l num -x -d " in fish


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_its_script(scripts: dict[str, Path], shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell.upper()} IS NOT INSTALLED: its completion script is not tried")
    subprocess.run([shell, "-n", scripts[shell]], check=True)
    if shell == "fish":
        code = f"source {scripts[shell]}; complete -C 'jddim sam'; complete -C 'jddim sample a b --dtype '"
        done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
        offered = [line.split("\t")[0] for line in done.stdout.splitlines()]
        assert sorted(offered) == ["bfloat16", "float32", "sample"]


def test_another_shell(fails) -> None:
    assert "choose from" in fails("completion", "tcsh", status=2)
