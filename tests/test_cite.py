"""What `jddim cite` prints is BibTeX, of the right things; CITATION.cff says the same of jddim."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import write_checkpoint

import jddim
from jddim.checkpoint.cite import DDIM, bibtex, citations, latex
from jddim.cli.main import main

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parent.parent
REQUIRED = {"inproceedings": {"author", "title", "booktitle", "year"}, "misc": {"title"}}  # of BibTeX's own styles


def parsed(text: str) -> dict[str, dict[str, str]]:
    """Key -> fields of a .bib file, by BibTeX's grammar without its leniency; anything else is an AssertionError."""
    found: dict[str, dict[str, str]] = {}
    at = 0
    while at < len(text):
        if text[at] in "%\n":  # between entries: comments, which may not begin an entry, and empty lines
            end = text.index("\n", at)
            assert "@" not in text[at:end]
            at = end + 1
            continue
        head = re.compile(r"@([a-z]+)\{([a-zA-Z0-9-]+),\n").match(text, at)
        assert head, text[at : at + 60]
        fields: dict[str, str] = {}
        at = head.end()
        while text[at] != "}":
            field = re.compile(r"  ([a-zA-Z]+) = \{").match(text, at)
            assert field, text[at : at + 60]
            start = at = field.end()
            depth = 1
            while depth:  # as BibTeX counts: a backslash before a brace changes nothing
                depth += {"{": 1, "}": -1}.get(text[at], 0)
                at += 1
            value = text[start : at - 1]
            assert text[at : at + 2] == ",\n"
            at += 2
            assert value.strip()
            assert value.isprintable()
            if field[1] not in ("url", "eprint"):
                assert not re.search(r"(?<!\\)[#$%&_~^]", value), value  # LaTeX would stop
            assert field[1] not in fields
            fields[field[1]] = value
        assert text[at : at + 2] == "}\n"
        at += 2
        assert REQUIRED[head[1]] <= fields.keys()
        assert head[2] not in found
        found[head[2]] = fields
    return found


def test_the_parser_refuses_what_bibtex_would() -> None:
    good = bibtex([DDIM], [])
    assert parsed(good) == {"song2021ddim": DDIM.fields}
    for bad in (
        good.replace("},\n", "}\n", 1),
        good.replace("Song", "So{ng"),
        good + good,
        good.replace("title", "name"),
    ):
        with pytest.raises((AssertionError, IndexError, ValueError)):
            parsed(bad)


@pytest.mark.parametrize(
    ("provenance", "keys"),
    [
        (None, ["ho2020ddpm"]),
        ({"family": "ho"}, ["ho2020ddpm"]),
        ({"family": "diffusers"}, ["ho2020ddpm", "diffusers"]),
        ({"family": "lucidrains"}, ["ho2020ddpm", "denoising-diffusion-pytorch"]),
        ({"family": "pytorch_ddpm"}, ["ho2020ddpm", "pytorch-ddpm"]),
        ({"family": "palette"}, ["ho2020ddpm", "saharia2022palette", "palette-pytorch"]),
        ({"family": "consistency"}, ["ho2020ddpm", "karras2022edm", "song2023consistency"]),
        ({"family": "edm"}, ["ho2020ddpm", "karras2022edm"]),
        ({"family": "monai"}, ["ho2020ddpm", "pinaya2023monai"]),
        ({"family": "openai", "preset": "guided-256"}, ["ho2020ddpm", "dhariwal2021guided"]),
        ({"family": "openai", "preset": "improved-cifar10"}, ["ho2020ddpm", "nichol2021improved"]),
        ({"family": "openai", "preset": None}, ["ho2020ddpm", "nichol2021improved", "dhariwal2021guided"]),
        ({"family": "jddim"}, ["ho2020ddpm"]),
        ({"family": "jddim", "parent": {"family": "diffusers"}}, ["ho2020ddpm", "diffusers"]),
        ({"family": "of@my}own"}, ["ho2020ddpm"]),
    ],
)
def test_each_family_has_what_it_comes_from(provenance: dict | None, keys: list[str]) -> None:
    entries, notes = citations(provenance)
    found = parsed(bibtex(entries, notes))
    assert list(found) == ["song2021ddim", *keys, "jddim", "jax2018github", "flax2020github"]
    assert found["jddim"]["note"] == f"Version {jddim.__version__}"
    assert found["jax2018github"]["note"] == f"Version {version('jax')}"
    unsure = provenance is not None and (provenance["family"] == "of@my}own" or provenance.get("preset", 1) is None)
    assert bool(notes) == unsure


def test_every_family_that_converts_is_known() -> None:
    pytest.importorskip("ml_dtypes")
    from convert.families import FAMILIES

    for family, entry in FAMILIES.items():
        entries, notes = citations({"family": family, "preset": next(iter(entry.presets), None)})
        assert not notes, family
        assert len(entries) >= 5


def test_the_weights_are_named_whatever_their_file_is_called() -> None:
    source = {"file": r"my_{50%}\~x^2&#$@é.pt" + "\x1b\n", "sha256": "ab12" * 16, "hub_id": "google/ddpm_cifar"}
    entries, notes = citations({"family": "ho", "source": source, "weights": "ema", "step": 7})
    weights = parsed(bibtex(entries, notes))["weights-ab12ab12ab12"]
    assert weights["title"] == "{" + latex(source["file"]) + "}"
    assert "é.pt??" in weights["title"]
    assert weights["note"] == f"SHA-256 {'ab12' * 16}, ema weights of step 7"
    assert weights["url"] == "https://huggingface.co/google/ddpm_cifar"
    source["hub_id"] = "../{}"
    assert "url" not in parsed(bibtex(*citations({"family": "ho", "source": source})))["weights-ab12ab12ab12"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], fails) -> None:
    assert main(["cite"]) == 0
    assert next(iter(parsed(capsys.readouterr().out))) == "song2021ddim"
    write_checkpoint(tmp_path / "ckpt")
    assert main(["cite", str(tmp_path / "ckpt")]) == 0
    assert "ho2020ddpm" in parsed(capsys.readouterr().out)
    assert "no checkpoint at" in fails("cite", tmp_path / "nothing")


def test_citation_cff() -> None:
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= said.keys()  # what CFF 1.2.0 asks for
    known = {"cff-version", "message", "type", "title", "version", "authors", "license", "keywords", "references"}
    assert said.keys() <= known
    assert said["cff-version"] == "1.2.0"
    assert said["version"] == jddim.__version__
    assert said["authors"] == [{"name": "The jddim authors"}]
    assert said["license"] == "MIT"
    (paper,) = said["references"]
    assert paper["title"] == DDIM.fields["title"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert " and ".join(f"{a['given-names']} {a['family-names']}" for a in paper["authors"]) == DDIM.fields["author"]
    assert paper["identifiers"][0]["value"] == f"arXiv:{DDIM.fields['eprint']}"
