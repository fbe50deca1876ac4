"""The shipped colour checkpoint: pictures of the classes that were asked for, in colour, and few of them copies."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
from conftest import ROOT

import jddim

pytestmark = pytest.mark.unoptimised

FOLDER = ROOT / "scripts" / "assets" / "emoji"
NAMES = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Hands & Body Parts", "Objects", "People & Body"),
    *("Smileys & Emotion", "Symbols", "Travel & Places"),
)
TRAINED_ON = ROOT.parent / "shared" / "data" / "emoji" / "emoji32.npz"


@pytest.fixture(scope="module")
def ddim() -> jddim.DDIM:
    return jddim.load(FOLDER)


ASKED = [*["Smileys & Emotion"] * 8, *["Animals & Nature"] * 4, *["People & Body"] * 4, *["Flags"] * 4]


@pytest.fixture(scope="module")
def samples(ddim: jddim.DDIM) -> np.ndarray:
    """Of the classes of ASKED: 12 steps, eta 0, guidance 2."""
    labels = np.array([NAMES.index(name) for name in ASKED])
    return np.asarray(ddim.sample(jax.random.key(1), len(labels), labels=labels, guidance_scale=2.0, steps=12))


def test_what_it_says_of_itself(ddim: jddim.DDIM) -> None:
    assert (ddim.null_label, ddim.label_names) == (10, {name: i for i, name in enumerate(NAMES)})
    assert ddim.metadata is not None
    assert ddim.metadata.provenance["license"] == "Apache-2.0"
    assert "Noto Color Emoji" in (FOLDER / "NOTICE").read_text()
    assert "Apache License" in (FOLDER / "LICENSE").read_text()
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 12e6


def test_pictures_are_of_the_classes_asked_for_and_in_colour(samples: np.ndarray) -> None:
    corners = samples[:16][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.median(corners) > 0.8  # what is cut out stands on white
    inside = samples[:, 8:24, 8:24]
    colourful = (inside.max(-1) - inside.min(-1)).mean((1, 2))
    assert np.median(colourful) > 0.3, colourful  # grey has 0
    red, green, blue = np.moveaxis(inside.mean((1, 2)), -1, 0)
    yellow = (red - blue > 0.5) & (green - blue > 0.3)
    assert yellow[:8].sum() >= 4, yellow  # faces, but for hearts and the like
    assert yellow[16:].sum() <= 1, yellow  # flags


def test_few_are_copies(samples: np.ndarray) -> None:
    """Beside pictures that are in that file but for skin tones: docs/emoji.md has the figures."""
    if not TRAINED_ON.exists():
        warnings.warn(f"NOT CHECKED AGAINST WHAT IT WAS TRAINED ON: no {TRAINED_ON}", stacklevel=1)
        pytest.skip("the training pictures are not here")
    with np.load(TRAINED_ON) as arrays:
        pictures = arrays[next(name for name in arrays.files if arrays[name].ndim == 4)] / 127.5 - 1
    both = np.concatenate([pictures, pictures[:, :, ::-1]]).reshape(2 * len(pictures), -1)
    far = [np.sqrt(((both - x.reshape(1, -1)) ** 2).mean(1)).min() for x in samples]
    assert np.median(far) > 0.2, far
    assert np.mean(np.less(far, 0.1)) < 0.2, far
