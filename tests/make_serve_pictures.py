"""The pictures of docs/serve.md: python tests/make_serve_pictures.py scripts/assets/mnist-guided docs/serve.

Serves the checkpoint and takes the page at 1280 and 390 pixels, light and dark. Look at them before they are kept.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from browser import Tab, browser
from PIL import Image
from web_server import serving


def run(tab: Tab, address: str) -> None:
    """Open the page, and wait for the run that it starts by itself."""
    tab.open(address)
    tab.wait(lambda: tab.of("#results", "dataset.runs"), lambda: str(tab.of("#said", "textContent")))


def keep(tab: Tab, path: Path) -> None:
    tab.js("(document.activeElement.blur(), scrollTo(0, 0))")
    with Image.open(io.BytesIO(tab.picture())) as picture:
        picture.convert("RGB").save(path, "WEBP", quality=80, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    used = lambda key: key[2] and key[1] != "invert"  # noqa: E731
    with (
        serving({args.ckpt.name: args.ckpt}, needed=used) as (_, port),
        tempfile.TemporaryDirectory() as profile,
        browser(Path(profile)) as started,
    ):
        tab, page = started.tab(), f"http://127.0.0.1:{port}/"
        for scheme in ("light", "dark"):
            tab.scheme(scheme)
            tab.screen(390, 1200)
            run(tab, f"{page}#steps=20&seed=2")
            keep(tab, args.out / f"narrow-{scheme}.webp")
        tab.scheme("light")
        tab.screen(1280, 1080)
        run(tab, f"{page}#steps=20&seed=2&eta=0.5")
        tab.js("(way.value = 8, way.dispatchEvent(new Event('input')))")
        tab.wait(lambda: tab.of("#images", "className").endswith("pairs"))
        keep(tab, args.out / "wide-light.webp")
        tab.scheme("dark")
        tab.screen(1280, 1280)
        run(tab, f"{page}#mode=grid&label=4&columns=3,5,10,20,50&seed=1")
        keep(tab, args.out / "wide-dark.webp")


if __name__ == "__main__":
    main()
