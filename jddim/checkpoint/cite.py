"""BibTeX of what a result rests on: the method, where the weights come from, and the software in use.

Papers are `@inproceedings`; software and weights `@misc`, since plain BibTeX does not know `@software`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from importlib import metadata as packages
from typing import Any, NamedTuple

from jddim import __version__


class Entry(NamedTuple):
    """One BibTeX entry. fields: name -> value, LaTeX already."""

    kind: str
    key: str
    fields: Mapping[str, str]


def _paper(key: str, authors: str, title: str, where: str, year: int, arxiv: str) -> Entry:
    fields = {"author": authors, "title": title, "booktitle": where, "year": str(year)}
    return Entry("inproceedings", key, {**fields, "eprint": arxiv, "archivePrefix": "arXiv"})


_NEURIPS = "Advances in Neural Information Processing Systems"
DDIM = _paper(
    "song2021ddim",
    "Jiaming Song and Chenlin Meng and Stefano Ermon",
    "Denoising Diffusion Implicit Models",
    "International Conference on Learning Representations",
    2021,
    "2010.02502",
)
_DDPM = _paper(
    "ho2020ddpm",
    "Jonathan Ho and Ajay Jain and Pieter Abbeel",
    "Denoising Diffusion Probabilistic Models",
    _NEURIPS,
    2020,
    "2006.11239",
)
_IMPROVED = _paper(
    "nichol2021improved",
    "Alexander Quinn Nichol and Prafulla Dhariwal",
    "Improved Denoising Diffusion Probabilistic Models",
    "International Conference on Machine Learning",
    2021,
    "2102.09672",
)
_GUIDED = _paper(
    "dhariwal2021guided",
    "Prafulla Dhariwal and Alexander Quinn Nichol",
    "Diffusion Models Beat {GAN}s on Image Synthesis",
    _NEURIPS,
    2021,
    "2105.05233",
)
_DIFFUSERS = Entry(
    "misc",
    "diffusers",
    {
        "author": "Patrick von Platen and Suraj Patil and Anton Lozhkov and Pedro Cuenca and Nathan Lambert and "
        "Kashif Rasul and Mishig Davaadorj and Dhruv Nair and Sayak Paul and William Berman and Yiyi Xu and "
        "Thomas Wolf",
        "title": "Diffusers: State-of-the-art diffusion models",
        "url": "https://github.com/huggingface/diffusers",
    },
)
_LUCIDRAINS = Entry(
    "misc",
    "denoising-diffusion-pytorch",
    {
        "author": "Phil Wang",
        "title": "denoising-diffusion-pytorch",
        "url": "https://github.com/lucidrains/denoising-diffusion-pytorch",
    },
)
_PYTORCH_DDPM = Entry(
    "misc",
    "pytorch-ddpm",
    {
        "author": "w86763777",
        "title": "pytorch-ddpm",
        "url": "https://github.com/w86763777/pytorch-ddpm",
    },
)
_MONAI = Entry(
    "misc",
    "pinaya2023monai",
    {
        "author": "Walter H. L. Pinaya and Mark S. Graham and Eric Kerfoot and others",
        "title": "Generative {AI} for Medical Imaging: extending the {MONAI} Framework",
        "year": "2023",
        "eprint": "2307.15208",
        "archivePrefix": "arXiv",
    },
)
_PALETTE = _paper(
    "saharia2022palette",
    "Chitwan Saharia and William Chan and Huiwen Chang and Chris Lee and Jonathan Ho and Tim Salimans and "
    "David Fleet and Mohammad Norouzi",
    "Palette: Image-to-Image Diffusion Models",
    "{ACM SIGGRAPH} 2022 Conference Proceedings",
    2022,
    "2111.05826",
)
_EDM = _paper(
    "karras2022edm",
    "Tero Karras and Miika Aittala and Timo Aila and Samuli Laine",
    "Elucidating the Design Space of Diffusion-Based Generative Models",
    _NEURIPS,
    2022,
    "2206.00364",
)
_SCORE_SDE = _paper(
    "song2021scoresde",
    "Yang Song and Jascha Sohl-Dickstein and Diederik P. Kingma and Abhishek Kumar and Stefano Ermon and Ben Poole",
    "Score-Based Generative Modeling through Stochastic Differential Equations",
    "International Conference on Learning Representations",
    2021,
    "2011.13456",
)
_CONSISTENCY = _paper(
    "song2023consistency",
    "Yang Song and Prafulla Dhariwal and Mark Chen and Ilya Sutskever",
    "Consistency Models",
    "International Conference on Machine Learning",
    2023,
    "2303.01469",
)
_PALETTE_CODE = Entry(
    "misc",
    "palette-pytorch",
    {
        "author": "Liangwei Jiang",
        "title": "Palette-Image-to-Image-Diffusion-Models",
        "url": "https://github.com/Janspiry/Palette-Image-to-Image-Diffusion-Models",
    },
)
_LATENT = _paper(
    "rombach2022latent",
    'Robin Rombach and Andreas Blattmann and Dominik Lorenz and Patrick Esser and Bj{\\"o}rn Ommer',
    "High-Resolution Image Synthesis with Latent Diffusion Models",
    "{IEEE/CVF} Conference on Computer Vision and Pattern Recognition",
    2022,
    "2112.10752",
)
_DIT = _paper(
    "peebles2023dit",
    "William Peebles and Saining Xie",
    "Scalable Diffusion Models with Transformers",
    "{IEEE/CVF} International Conference on Computer Vision",
    2023,
    "2212.09748",
)
_JAX = Entry(
    "misc",
    "jax2018github",
    {
        "author": "James Bradbury and Roy Frostig and Peter Hawkins and Matthew James Johnson and Chris Leary and "
        "Dougal Maclaurin and George Necula and Adam Paszke and Jake Vander{P}las and Skye Wanderman-{M}ilne and "
        "Qiao Zhang",
        "title": "{JAX}: composable transformations of {P}ython+{N}um{P}y programs",
        "year": "2018",
        "url": "https://github.com/jax-ml/jax",
    },
)
_FLAX = Entry(
    "misc",
    "flax2020github",
    {
        "author": "Jonathan Heek and Anselm Levskaya and Avital Oliver and Marvin Ritter and Bertrand Rondepierre and "
        "Andreas Steiner and Marc van {Z}ee",
        "title": "{F}lax: A neural network library and ecosystem for {JAX}",
        "year": "2024",
        "url": "https://github.com/google/flax",
    },
)
_JDDIM = Entry(
    "misc",
    "jddim",
    {
        "author": "{The jddim authors}",
        "title": "{jddim}: {DDIM} sampling in {JAX} for diffusion models trained in {PyTorch}",
    },
)


def citations(provenance: Mapping[str, Any] | None = None) -> tuple[list[Entry], list[str]]:
    """What to cite, and what to know about it, of a checkpoint's provenance; of none, the method and the software.

    Entries in order: DDIM, the papers or software that the checkpoint's family comes from, its weights' file, jddim,
    jax and flax at the versions installed here.
    """
    family = None if provenance is None else str(provenance.get("family"))
    origin, notes = _origin(family, provenance or {})
    if (provenance or {}).get("autoencoder") and _LATENT not in origin:
        origin = [*origin, _LATENT]
    weights = [] if provenance is None else _weights(provenance)
    return [DDIM, *origin, *weights, *_software()], notes


def _origin(family: str | None, provenance: Mapping[str, Any]) -> tuple[list[Entry], list[str]]:
    if family is None:
        return [_DDPM], []
    if family == "jddim":  # trained here, perhaps from a converted checkpoint
        parent = (provenance.get("parent") or {}).get("family")
        return ([_DDPM], []) if parent in (None, "jddim") else _origin(str(parent), {})
    if family == "openai":
        named = {"guided": [_GUIDED], "improved": [_IMPROVED]}.get(str(provenance.get("preset")).partition("-")[0])
        if named is not None:
            return [_DDPM, *named], []
        return [_DDPM, _IMPROVED, _GUIDED], [
            "OpenAI's two repositories write the same files, and without a preset nothing says which: both are here"
        ]
    known = {
        **{"ho": [], "pytorch_ddpm": [_PYTORCH_DDPM], "monai": [_MONAI]},
        **{
            "diffusers": [_DIFFUSERS],
            "flax_autoencoder": [_DIFFUSERS],
            "lucidrains": [_LUCIDRAINS],
            "openai_classifier": [_GUIDED],
        },
        "palette": [_PALETTE, _PALETTE_CODE],
        **{"edm": [_EDM], "consistency": [_EDM, _CONSISTENCY], "score_sde": [_SCORE_SDE]},
        **{"autoencoder": [_LATENT], "dit": [_DIT], "diffusers_dit": [_DIT, _DIFFUSERS]},
    }
    if family not in known:
        return [_DDPM], [f"nothing is known to cite for the checkpoint family {re.sub(r'[^a-zA-Z0-9_-]', '?', family)}"]
    return [_DDPM, *known[family]], []


def _weights(provenance: Mapping[str, Any]) -> list[Entry]:
    source = provenance.get("source") or {}
    if not source.get("sha256"):
        return []
    told = [f"SHA-256 {source['sha256']}"]
    if provenance.get("weights") in ("ema", "raw"):
        step = provenance.get("step")
        told.append(f"{provenance['weights']} weights" + ("" if step is None else f" of step {step}"))
    if source.get("commit"):
        told.append(f"commit {source['commit']}")
    fields = {"title": f"{{{latex(source.get('file', 'weights'))}}}", "note": latex(", ".join(told))}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id := str(source.get("hub_id", ""))):
        fields |= {"howpublished": latex(hub_id), "url": f"https://huggingface.co/{hub_id}"}
    return [Entry("misc", f"weights-{re.sub('[^0-9a-f]', '', str(source['sha256']))[:12]}", fields)]


def _software() -> list[Entry]:
    found = []
    for entry, package in ((_JDDIM, "jddim"), (_JAX, "jax"), (_FLAX, "flax")):
        version = __version__ if package == "jddim" else None
        with contextlib.suppress(packages.PackageNotFoundError):
            version = version or packages.version(package)
        told = {} if version is None else {"note": latex(f"Version {version}")}
        found.append(Entry(entry.kind, entry.key, {**entry.fields, **told}))
    return found


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\textbraceleft{}",  # BibTeX counts braces, escaped ones too
    "}": r"\textbraceright{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "#$%&_"},
}


def latex(text: object) -> str:
    """Text as LaTeX shows it; what cannot be printed becomes `?`."""
    return "".join(_LATEX.get(c, c) if c.isprintable() else "?" for c in str(text))


def bibtex(entries: list[Entry], notes: list[str]) -> str:
    """The text of a .bib file, notes as comments first."""
    blocks = [f"% {note}\n" for note in notes]
    for entry in entries:
        fields = "".join(f"  {name} = {{{value}}},\n" for name, value in entry.fields.items())
        blocks.append(f"@{entry.kind}{{{entry.key},\n{fields}}}\n")
    return "\n".join(blocks)
