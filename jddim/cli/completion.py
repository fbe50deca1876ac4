"""`jddim completion`: the script with which a shell completes jddim's words, made from the parsers."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from jddim.cli.options import summary

Commands = Mapping[str, argparse.ArgumentParser]


def add(command: Callable[..., argparse.ArgumentParser], commands: Commands) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser. commands: all, at the end."""

    def run(args: argparse.Namespace) -> int:
        print(SHELLS[args.shell](commands))
        return 0

    sub = command(
        "completion",
        run,
        "print the script that completes jddim's words in a shell",
        "bash > ~/.local/share/bash-completion/completions/jddim\n"
        'zsh > "${fpath[1]}/_jddim"    # any folder of fpath, before compinit\n'
        "fish > ~/.config/fish/completions/jddim.fish",
    )
    sub.add_argument("shell", choices=SHELLS, help="which shell's")


def _bash(commands: Commands) -> str:
    cases = [f'"1 "*) words={shlex.quote(" ".join(commands))} ;;']  # the first word
    for name, parser in commands.items():
        shown = list(_shown(parser))
        for action in shown:
            for option in action.option_strings if action.choices else ():
                cases.append(f'*" {name} {option}") words={shlex.quote(" ".join(action.choices or ()))} ;;')
        options = " ".join(option for action in shown for option in action.option_strings)
        cases.append(f'*" {name} "*) options={shlex.quote(options)} words={shlex.quote(" ".join(_values(parser)))} ;;')
    branches = "\n    ".join(cases)
    return f"""_jddim() {{
  local words='' options='' current=${{COMP_WORDS[COMP_CWORD]}}
  case "$COMP_CWORD ${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}" in
    {branches}
  esac
  case $current in -*) words=$options ;; esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o bashdefault -o default -F _jddim jddim"""


def _zsh(commands: Commands) -> str:
    names = "\n    ".join(shlex.quote(f"{name}:{summary(parser)}") for name, parser in commands.items())
    branches = []
    for name, parser in commands.items():
        specs = [_zsh_option(parser, action, option) for action in _shown(parser) for option in action.option_strings]
        values = " ".join(_values(parser))
        specs.append(f"'*:word:({values})'" if values else "'*:file:_files'")
        branches.append(f"{name}) _arguments {' '.join(specs)} ;;")
    arguments = "\n    ".join(branches)
    return f"""#compdef jddim
_jddim() {{
  local command=$words[2]
  local -a commands
  commands=(
    {names}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $command in
    {arguments}
  esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _jddim "$@"
else
  compdef _jddim jddim
fi"""


def _zsh_option(parser: argparse.ArgumentParser, action: argparse.Action, option: str) -> str:
    """An option as zsh's `_arguments` takes it: its description, then what each of its values is."""
    text = re.sub(r"([][:\\])", r"\\\1", _help(parser, action))
    again = "*" if isinstance(action, argparse._AppendAction) else ""
    if action.nargs == 0:
        return shlex.quote(f"{again}{option}[{text}]")
    what = f"({' '.join(action.choices)})" if action.choices else "_files" if action.type is Path else " "
    count = action.nargs if isinstance(action.nargs, int) else 1
    value = f"{':' if action.nargs == '?' else ''}:value:{what}"
    return shlex.quote(f"{again}{option}[{text}]{value * count}")


def _fish(commands: Commands) -> str:
    lines = []
    for name, parser in commands.items():
        text = shlex.quote(summary(parser))
        lines.append(f"complete -c jddim -n __fish_use_subcommand -f -a {name} -d {text}")
        here = f"complete -c jddim -n '__fish_seen_subcommand_from {name}'"
        if values := " ".join(_values(parser)):
            lines.append(f"{here} -f -a {shlex.quote(values)}")
        for action in _shown(parser):
            names = " ".join(f"-l {o[2:]}" if o.startswith("--") else f"-s {o[1:]}" for o in action.option_strings)
            takes = "-r -F" if action.type is Path else "-x"
            takes += f" -a {shlex.quote(' '.join(action.choices))}" if action.choices else ""
            takes = "" if action.nargs == 0 else f" {takes}"
            lines.append(f"{here} {names}{takes} -d {shlex.quote(_help(parser, action))}")
    return "\n".join(lines)


SHELLS: Mapping[str, Callable[[Commands], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def _shown(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """A command's options, but for those that it only refuses."""
    return (action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS)


def _values(parser: argparse.ArgumentParser) -> list[str]:
    """The words that may stand where no option does; none where that is a file, or anything."""
    return [str(each) for action in parser._actions if not action.option_strings for each in action.choices or ()]


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action)
