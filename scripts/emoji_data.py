"""Makes images to train on from Google's emoji, the npm package emoji-datasource-google 16.0.0, unpacked.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz    # the folder "package"
    python scripts/emoji_data.py package DATA [--size 64]
    jddim train scripts/emoji.json DATA/train.npz emoji

DATA receives three files, each with arr_0, `(n, size, size, 3)` uint8 on white, arr_1, `(n,)` int32 labels, names,
`(n,)`, and categories, the names of the labels:

- all.npz: every motif once, without skin tones, without what looks exactly like another.
- held-out.npz: a tenth of each category's motifs, to compare samples and losses with.
- train.npz: the other motifs, also mirrored where that may be, and repeated until the categories are of one size.

What differs by gender, number of people or direction alone is held out together or not at all. The labels are the
package's categories without "Component" (bare skin tones), with hands and other parts of the body apart: ten.

The pictures are Noto Color Emoji's, Apache License 2.0; the package is under the MIT License (Cal Henderson). Keep the
former's notice beside whatever ships the pictures, or a model trained on them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

PEOPLE, HANDS = "People & Body", "Hands & Body Parts"
MIRRORED = ("Smileys & Emotion", PEOPLE, HANDS, "Animals & Nature", "Food & Drink", "Activities")
"""Categories whose pictures stay plausible the other way round; the others have letters, digits, arrows and flags."""
WRITTEN_ON = ("emotion", "award-medal", "game")
"""Subcategories of those that are signs or bear letters and digits: "100", medals, cards and tiles."""

HELD_OUT = 10  # one root motif of so many
ZWJ, VARIATION = "-200D-", "-FE0F"
ADULT, CHILD, OLD = "1F9D1", "1F9D2", "1F9D3"
UNGENDERED = {"1F468": ADULT, "1F469": ADULT, "1F466": CHILD, "1F467": CHILD, "1F474": OLD, "1F475": OLD}
ADDED = ("2640", "2642", "27A1")  # after a joiner: female, male, facing right
VARIANTS = {  # those with a code point of their own
    "1F449": "1F448",  # pointing right, left
    "1F91C": "1F91B",  # fists
    "1FAF2": "1FAF1",  # open hands
    "1FAF8": "1FAF7",  # pushing hands
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), f"{ADULT}-200D-1F91D-200D-{ADULT}"),  # holding hands
    "1F48F": f"{ADULT}-200D-2764-200D-1F48B-200D-{ADULT}",
    "1F491": f"{ADULT}-200D-2764-200D-{ADULT}",
    "1F46A": f"{ADULT}-200D-{CHILD}",  # a family
}


class Motif(NamedTuple):
    """One picture, `(size, size, 3)` uint8. root: the same for what should not lie on both sides of the split."""

    name: str
    category: str
    root: str
    mirrored: bool
    pixels: np.ndarray


def root_of(unified: str) -> str:
    """What a sequence of code points shares with its variants of gender, number, direction and presentation."""
    plain = unified.replace(VARIATION, "")
    first, *more = VARIANTS.get(plain, plain).split(ZWJ)
    parts = [UNGENDERED.get(part, part) for part in (first, *(part for part in more if part not in ADDED))]
    return ZWJ.join(sorted(set(parts)))


def category_of(entry: dict[str, Any]) -> str:
    """The package's category, but for hands and parts of the body."""
    apart = entry["subcategory"].startswith("hand") or entry["subcategory"] == "body-parts"
    return HANDS if entry["category"] == PEOPLE and apart else entry["category"]


def picture(path: Path, size: int) -> np.ndarray:
    """A 64x64 RGBA file as `(size, size, 3)` uint8: first put on white, then averaged over areas."""
    with Image.open(path) as file:
        rgba = file.convert("RGBA")
    on_white = Image.new("RGBA", rgba.size, "white")
    on_white.alpha_composite(rgba)
    return np.asarray(on_white.convert("RGB").resize((size, size), Image.Resampling.BOX))


def motifs(package: Path, size: int) -> list[Motif]:
    """Every motif once, in order of code points; of equal pictures the first, mirrored ones counted where allowed."""
    seen: set[bytes] = set()
    found = []
    for entry in sorted(json.loads((package / "emoji.json").read_text()), key=lambda entry: entry["unified"]):
        if entry["category"] == "Component" or not entry["has_img_google"]:
            continue
        category = category_of(entry)
        mirrored = category in MIRRORED and entry["subcategory"] not in WRITTEN_ON
        pixels = picture(package / "img" / "google" / "64" / entry["image"], size)
        if pixels.tobytes() in seen:
            continue
        seen.add(pixels.tobytes())
        if mirrored:
            seen.add(pixels[:, ::-1].tobytes())
        found.append(Motif(entry["short_name"], category, root_of(entry["unified"]), mirrored, pixels))
    return found


def split(found: list[Motif]) -> tuple[list[Motif], list[Motif]]:
    """Those to train on and those held out: of each category's roots, in order, every tenth."""
    held = set()
    for category in {motif.category for motif in found}:
        roots = sorted({motif.root for motif in found if motif.category == category})
        held |= {(category, root) for root in roots[HELD_OUT - 1 :: HELD_OUT]}
    kept = [motif for motif in found if (motif.category, motif.root) not in held]
    return kept, [motif for motif in found if (motif.category, motif.root) in held]


def balanced(kept: list[Motif]) -> list[Motif]:
    """Those and their mirror images, repeated until every category has as many as the largest; evenly."""
    by_category: dict[str, list[Motif]] = {}
    for motif in kept:
        pair = [motif, motif._replace(pixels=motif.pixels[:, ::-1])] if motif.mirrored else [motif]
        by_category.setdefault(motif.category, []).extend(pair)
    most = max(map(len, by_category.values()))
    chosen = []
    for category in sorted(by_category):
        rows = by_category[category]
        spread = np.arange(most % len(rows)) * len(rows) // max(most % len(rows), 1)  # of the last, incomplete round
        chosen += rows * (most // len(rows)) + [rows[i] for i in spread]
    return chosen


def save(path: Path, chosen: list[Motif], categories: list[str]) -> None:
    """The file that `jddim train` reads, with names beside."""
    labels = np.array([categories.index(motif.category) for motif in chosen], np.int32)
    named = {"names": np.array([motif.name for motif in chosen]), "categories": np.array(categories)}
    np.savez_compressed(path, np.stack([motif.pixels for motif in chosen]), labels, **named)
    print(f"{path}: {len(chosen)} images, {', '.join(map(str, np.bincount(labels, minlength=len(categories))))}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the npm package's folder")
    parser.add_argument("data", type=Path, help="folder for train.npz, held-out.npz and all.npz")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels a side (32)")
    args = parser.parse_args(argv)
    try:
        found = motifs(args.package, args.size)
        kept, held = split(found)
        categories = sorted({motif.category for motif in found})
        args.data.mkdir(parents=True, exist_ok=True)
        for label, category in enumerate(categories):
            print(f"{label}  {category}")
        save(args.data / "all.npz", found, categories)
        save(args.data / "held-out.npz", held, categories)
        save(args.data / "train.npz", balanced(kept), categories)
    except OSError as error:
        print(f"emoji_data: {error.filename or args.data}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
