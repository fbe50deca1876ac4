"""The entrance: bare `jddim` is the grouped help, each command stands in it once, in one line."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import pytest

from jddim.cli.doctor import PACKAGES
from jddim.cli.main import GROUPS, _parser, main
from jddim.cli.options import print_json

pytestmark = pytest.mark.quick

COMMANDS = next(a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))


def test_bare_jddim_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert (stop.value.code, bare.err) == (0, "")
    assert capsys.readouterr().out == bare.out
    assert re.findall(r"^([A-Z]\w+):$", bare.out, re.M) == list(GROUPS)
    assert all(len(line) <= 80 for line in bare.out.splitlines())


def test_each_command_stands_in_one_line_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    listed = capsys.readouterr().out.split("\noptions:")[0]
    found = re.findall(r"^  ([a-z-]+) +(\S.*)$", listed, re.M)
    assert [name for name, _ in found] == [name for names in GROUPS.values() for name in names]
    assert sorted(name for name, _ in found) == sorted(COMMANDS)
    for name, line in found:
        assert COMMANDS[name].description.split("\n")[0] == line
        assert COMMANDS[name].prog == f"jddim {name}"


@pytest.mark.parametrize(("word", "said"), [("smaple", "did you mean 'sample'?"), ("qqq", "choose from")])
def test_an_unknown_command(fails, word: str, said: str) -> None:
    assert said in fails(word, "a", "b", status=2)
    assert "unrecognized arguments: --stepz" in fails("--stepz", status=2)


@pytest.mark.parametrize("option", ["--set-alpha", "--step", "--cl"])  # --set-alpha-to-one, --steps, --clip and others
def test_the_beginning_of_an_option_is_not_the_option(fails, option: str) -> None:
    assert f"unrecognized arguments: {option}" in fails("sample", "a", "b", option, status=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-inference-steps 5", "did you mean --steps?"),
        ("x y --num_inference_steps=5", "did you mean --steps?"),  # the words that are left over come first
        ("--manual-seed 3", "did you mean --seed?"),
        ("--batch_size 3", "did you mean --batch-size?"),
        ("--guidance_scale 2", "did you mean --guidance-scale?"),
        ("--fp16", "did you mean --dtype?"),
        ("--device cuda", "jax chooses it: JAX_PLATFORMS=cpu, cuda or tpu in the environment"),
    ],
)
def test_options_as_other_libraries_call_them(fails, words: str, said: str) -> None:
    told = f"jddim sample: error: unrecognized arguments: {words}; {said} (see jddim sample --help)\n"
    assert fails("sample", "a", "b.png", *words.split(), status=2) == told


def test_what_has_the_dashes_in_common_is_not_meant(fails) -> None:
    told = "jddim diff: error: unrecognized arguments: --eta=1 --num-inference-steps 5 (see jddim diff --help)\n"
    assert fails("diff", "a", "b", "--eta=1", "--num-inference-steps", "5", status=2) == told
    assert "arguments: --set a=b (see" in fails("evaluate", "a", "--reference", "b", "--set", "a=b", status=2)


def test_help_is_a_word_too(capsys: pytest.CaptureFixture[str], fails) -> None:
    for words, flags in ((["help"], ["--help"]), (["help", "sample"], ["sample", "--help"])):
        told = []
        for line in (words, flags):
            with pytest.raises(SystemExit) as stop:
                main(line)
            assert stop.value.code == 0
            told.append(capsys.readouterr().out)
        assert told[0] == told[1] != ""
    assert "did you mean 'sample'?" in fails("help", "smaple", status=2)


def test_doctor_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 1  # in Python nobody keeps programs
    found = json.loads(capsys.readouterr().out)
    assert found["packages"].keys() == set(PACKAGES)
    assert found["devices"][0]["platform"] == "cpu"
    assert (found["programs"], found["cache"]) == (None, None)


def test_numbers_that_json_has_not_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), -float("inf"), 1e-300, "NaN", None]})
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": [None, None, 1e-300, "NaN", None]}


def test_a_mistake_prints_no_document(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["info", "absent"], ["diff", "a", "b"], ["schedule", "--eta", "-1"], ["verify", "a", "b"]):
        assert main([*words, "--json"]) == 1
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)


def test_help_waits_for_nothing_heavy() -> None:
    code = "import sys; from jddim.cli.main import main; main([]); sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "PIL", "torch", "convert", "tqdm"} & set(done.stderr.split())
