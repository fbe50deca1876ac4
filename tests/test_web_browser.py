"""The page in a real browser: each control changes what it should, mistakes are shown, a reload keeps the state.

Chromium is driven by `browser.py`; where there is none the module skips. JDDIM_AXE names axe-core's axe.min.js, which
`.ci/run` gets by npm; without it the test of accessibility skips.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import write_checkpoint

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"THE PAGE IS NOT TRIED IN A BROWSER: jddim serve needs {package}")

from browser import CHROMIUM, Tab, browser  # noqa: E402
from web_server import SMALL, serving  # noqa: E402

if CHROMIUM is None:
    pytest.skip(
        "THE PAGE IS NOT TRIED IN A BROWSER: no chromium (Debian: apt install chromium)", allow_module_level=True
    )
pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    folder = tmp_path_factory.mktemp("browser")
    training = {"training": {"null_label": 4}}
    paths = {
        "classes": write_checkpoint(folder / "classes", class_embedding="learned", num_classes=5, **SMALL),
        "plain": write_checkpoint(folder / "plain", in_channels=3, out_channels=3, **SMALL),
        "guided": write_checkpoint(
            folder / "guided", class_embedding="learned", num_classes=5, provenance=training, **SMALL
        ),
    }
    paths["beside"] = write_checkpoint(folder / "beside", condition_channels=3, **SMALL)
    guided = {("classes", "ddim", True), ("guided", "ddim", True)}
    used = guided | {("plain", "ddim", False), ("beside", "ddim", False)}
    needed = lambda key: key in used or (key[0] == "classes" and not key[2])  # noqa: E731
    with serving(paths, ("ddim", "dpm++2m"), needed=needed) as (site, port):
        yield site, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started.tab()


class Page:
    """The page, by what a person sees of it."""

    def __init__(self, tab: Tab, address: str):
        self.tab, self.address = tab, address

    def open(self, state: str = "") -> Page:
        self.tab.open(self.address + (f"#{state}" if state else ""))
        return self

    def wait(self, condition: Callable[[], Any]) -> Any:
        return self.tab.wait(condition, lambda: f"{self.text('said')} {self.problems()} {self.tab.errors}")

    def text(self, name: str) -> str:
        """What is written in an element that is seen; of one that is not, nothing."""
        found = self.tab.all(f"#{name}", "innerText")
        return found[0].strip() if found else ""

    def value(self, name: str) -> str:
        return str(self.tab.of(f"#{name}", "value"))

    def runs(self) -> int:
        return int(self.tab.of("#results", "dataset.runs") or 0)

    def first(self) -> np.ndarray:
        """The images of the run that a page just loaded starts by itself."""
        self.wait(self.runs)
        return self.images()

    def done(self, act: Callable[[], Any]) -> np.ndarray:
        """The images `(num, h, w)`, red, of the run that `act` starts."""
        before = self.runs()
        act()
        self.wait(lambda: self.runs() > before)
        return self.images()

    def images(self, place: str = "images") -> np.ndarray:
        told = self.tab.js(
            f"[...document.querySelectorAll('#{place} canvas')].map((c) => [c.height, c.width, "
            "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0)])"
        )
        return np.stack([np.reshape(values, (height, width)) for height, width, values in told])

    def type(self, name: str, value: str) -> None:
        self.tab.type(f"#{name}", value)

    def choose(self, name: str, value: str) -> None:
        self.tab.choose(f"#{name}", value)

    def click(self, name: str) -> None:
        self.tab.click(f"#{name}")

    def mode(self, name: str) -> None:
        self.tab.click(f"input[name=mode][value={name}] + span")

    def press(self, name: str, *keys: str) -> None:
        self.tab.focus(f"#{name}")
        for key in keys:
            self.tab.press(key)

    def colour(self, name: str, value: str) -> None:
        """Of a chooser, which is the system's own."""
        set_it = f"one.value = '{value}'; one.dispatchEvent(new Event('input'))"
        self.tab.js(f"((one) => {{ {set_it} }})(document.getElementById('{name}'))")

    def captions(self) -> list[str]:
        return self.tab.all("#images span", "textContent")

    def python(self) -> str:
        return self.text("python")

    def stale(self) -> bool:
        """Whether the page says that what it shows is of before, and dims it."""
        said = len(self.tab.all(".before", "id"))
        faint = float(self.tab.js("getComputedStyle(document.querySelector('#images canvas')).opacity")) < 0.5
        assert (said == 2) == faint
        return faint

    def problems(self) -> dict[str, str]:
        shown = self.tab.js("[...document.querySelectorAll('.problem')].map((one) => [one.id, one.innerText])")
        return {name.removesuffix("-problem"): text for name, text in shown if text}

    def picture(self, layer: str = "picture", kind: str = "classes 6x10x1") -> np.ndarray:
        """What is drawn, as the tab keeps it."""
        kept = f"atob(JSON.parse(sessionStorage.getItem('{kind}')).{layer})"
        return np.array(self.tab.js(f"[...{kept}].map((c) => c.charCodeAt(0))"), np.uint8)


@pytest.fixture
def page(tab: Tab, site: tuple[Any, str]) -> Iterator[Page]:
    tab.errors.clear()
    tab.js("try { sessionStorage.clear() } catch {}")
    yield Page(tab, site[1])
    tab.js("0")  # hears what came last
    assert not [
        line for line in tab.errors if "400 (Bad Request)" not in line
    ]  # nor does its own policy refuse anything


START = "seed=3&steps=4&num=3&label=1&lock=1"


def test_each_control_changes_what_it_should(page: Page) -> None:
    first = page.open(START).first()
    assert len(first) == 3
    assert "steps=4, eta=0.0, labels=[1] * 3" in page.python()
    seen, waited = {first.tobytes()}, []

    def changes(act: Callable[[], Any], told: str) -> None:
        images = page.done(act)
        assert told in page.python()
        assert images.tobytes() not in seen
        assert not page.stale()
        seen.add(images.tobytes())
        waited.append(float(page.text("said").split()[-2]))

    dots = lambda: len(page.tab.all("#plot .dot", "id"))  # noqa: E731
    page.wait(lambda: dots() == 4)
    changes(lambda: page.press("steps-slider", "ArrowRight"), "steps=5")
    page.wait(lambda: dots() == 5)
    changes(lambda: page.press("eta-slider", "ArrowRight"), "eta=0.05")
    changes(lambda: page.type("eta", "0.7"), "eta=0.7")
    changes(lambda: page.choose("method", "dpm++2m"), 'method="dpm++2m"')
    assert page.tab.of("#eta", "disabled")
    page.done(lambda: page.choose("method", "ddim"))
    assert not page.tab.of("#eta", "disabled")
    changes(lambda: page.choose("label", "each"), "labels=[i % 5 for i in range(3)]")
    assert page.captions() == ["label 0", "label 1", "label 2"]
    assert not page.tab.seen("#null_label")
    page.click("guided")  # this checkpoint records no null label: it has to be said
    page.wait(lambda: page.text("null_label-problem") == "null label must be a whole number in 0..4, got nothing")
    assert page.stale()
    changes(lambda: page.type("null_label", "4"), "guidance_scale=3.0, null_label=4")
    changes(lambda: page.type("guidance_scale", "5.5"), "guidance_scale=5.5")
    changes(lambda: page.press("guidance_scale-slider", "ArrowLeft"), "guidance_scale=5.25")
    changes(lambda: page.type("null_label", "2"), "null_label=2")
    page.done(lambda: page.choose("spacing", "leading"))  # for 5 steps the checkpoint's own, uniform, is the same table
    page.tab.click("#more summary")  # the controls that the server lists
    changes(lambda: page.type("steps_offset", "1"), "steps_offset=1")
    page.done(lambda: page.choose("set_alpha_to_one", "false"))  # less than a grey level here
    assert "set_alpha_to_one=False" in page.python()
    page.type("clip_range", "0.5")
    page.wait(lambda: "clip range" in page.text("clip_range-problem"))  # this checkpoint clips nothing
    page.done(lambda: page.type("clip_range", ""))
    changes(lambda: page.choose("spacing", "quad"), 'spacing="quad"')
    changes(lambda: page.type("seed", "12"), "jax.random.key(12)")
    assert len(page.done(lambda: page.press("num-slider", "ArrowRight"))) == 4
    assert len(page.done(lambda: page.type("num", "5"))) == 5
    page.click("live")  # nothing runs by itself any more
    before = page.images()
    page.type("steps", "7")
    page.click("lock")
    time.sleep(0.5)
    assert "steps=5" in page.python()
    assert page.stale()
    assert page.text("said") == "Changed: press Run."
    page.type("steps", "240")
    page.click("run")
    page.wait(lambda: page.text("said").endswith("of 240"))
    before = page.done(lambda: page.type("steps", "7"))  # which the run that is being made does not have
    assert "steps=240" in page.python()
    assert page.stale()
    changes(lambda: page.click("run"), "steps=7")  # and draws a seed, which is not locked any more
    seed = page.value("seed")
    assert seed != "12"
    page.click("lock")
    again = page.done(lambda: page.click("run"))
    assert page.value("seed") == seed
    assert again.tobytes() in seen
    assert again.tobytes() != before.tobytes()
    page.click("noise")
    page.wait(lambda: page.images().tobytes() not in seen)
    page.choose("checkpoint", "plain")
    assert page.tab.all("#images canvas", "width") == []  # they were another network's
    assert page.done(lambda: page.click("run")).tobytes() not in seen
    assert not page.tab.seen("#label")
    assert "plain" in page.python()
    assert page.text("summary") == "10 × 6 colour images"
    assert np.median(waited) < 1  # seconds to the first preview


def test_where_the_null_label_is_recorded_guidance_is_on_and_the_label_stands_apart(page: Page) -> None:
    page.open("checkpoint=guided&steps=2&seed=1").first()
    assert "guidance_scale=3.0, null_label=4, labels=[i % 4 for i in range(4)]" in page.python()
    assert page.tab.of("#guided", "checked")
    assert not page.tab.seen("#null_label")
    assert page.tab.js("[...document.querySelectorAll('#label option')].map((one) => one.textContent)") == [
        *("each in turn", "0", "1", "2", "3"),
        "4: no label",
    ]
    for mode in ("strip", "grid", "slerp"):  # compare one thing alone
        page.done(lambda mode=mode: page.mode(mode))
        assert page.value("label") == "0"
        assert "labels=[0] * 4" in page.python()
    page.mode("invert")
    page.wait(lambda: page.text("said") == "Draw a picture first.")
    assert page.value("label") == "4"  # nobody knows a picture's
    page.done(lambda: page.mode("slerp"))
    page.done(lambda: page.choose("label", "4"))
    assert page.captions()[0] == "no label, seed 1"
    page.done(lambda: page.mode("sample"))
    assert page.value("label") == "4"
    page.done(lambda: page.choose("label", "each"))
    page.done(lambda: page.mode("strip"))
    page.done(lambda: page.mode("sample"))
    assert page.value("label") == "each"  # as it was chosen


def test_mistakes_are_shown_beside_their_controls_and_go_away(page: Page) -> None:
    page.open(START).first()
    page.type("steps", "9999")
    assert page.wait(page.problems) == {"steps": "steps must be a whole number in 1..250, got 9999"}
    assert page.tab.of("#steps", "ariaInvalid") == "true"
    assert page.stale()  # the images and the programs are not of 9999 steps
    page.type("num", "99")
    page.wait(lambda: page.problems().get("num") == "images must be a whole number in 1..16, got 99")
    page.type("num", "3")
    page.type("eta", "-1")
    page.wait(lambda: page.problems().keys() == {"steps", "eta"})
    page.type("eta", "0")
    page.type("seed", "")
    page.wait(lambda: page.problems().get("seed", "").endswith("got nothing"))
    page.type("seed", "1")
    page.done(lambda: page.type("steps", "3"))
    assert page.problems() == {}
    page.open("steps=0&num=2&mode=nothing&method=nothing&label=1").wait(page.problems)  # a link that someone made up
    assert page.problems().keys() == {"steps"}


def test_a_reload_keeps_the_state(page: Page) -> None:
    page.open(START).first()
    page.type("eta", "0.35")
    page.mode("slerp")
    page.done(lambda: page.type("seed_to", "77"))
    page.wait(lambda: "(3, 77)" in page.python())
    before = page.images()
    page.tab.reload()
    np.testing.assert_array_equal(page.first(), before)
    assert page.captions()[::2] == ["label 1, seed 3", "label 1, seed 77"]
    page.done(lambda: page.mode("sample"))
    values = {name: page.value(name) for name in ("eta", "seed", "steps", "num", "label")}
    assert values == {"eta": "0.35", "seed": "3", "steps": "4", "num": "3", "label": "1"}
    assert page.tab.of("#lock", "checked")
    ends = page.images()[0]  # slerp's first image is that of its seed, at eta 0
    page.done(lambda: page.type("eta", "0"))
    np.testing.assert_allclose(page.images()[0], before[0], atol=1)
    assert ends.tobytes() != before[0].tobytes()


def test_a_grid_of_eta_and_steps(page: Page) -> None:
    page.open(f"{START}&mode=grid&columns=2,5").first()
    assert page.captions() == [f"η {eta}, {steps} steps" for eta in ("0", "0.5", "1") for steps in (2, 5)]
    assert page.tab.js("getComputedStyle(images).gridTemplateColumns.split(' ').length") == 2
    assert not page.tab.seen("#way")  # the columns' steps are not the same
    grid = page.images()
    assert not page.tab.seen("#steps")
    page.type("columns", "2, x")
    page.wait(
        lambda: page.problems().get("columns", "").startswith("steps of the columns must be 1 to 6 whole numbers")
    )
    assert len(page.done(lambda: page.type("columns", "4"))) == 3
    strip = page.done(lambda: page.mode("strip"))
    five = page.done(lambda: page.type("steps", "5"))
    np.testing.assert_array_equal(five, grid[1::2])
    assert strip.tobytes() != five.tobytes()


def test_four_seeds(page: Page) -> None:
    ends = [page.open(f"label=1&steps=3&num=1&seed={seed}").first()[0] for seed in (5, 6, 7, 8)]
    page.done(lambda: page.mode("corners"))
    assert not page.tab.seen("#num")
    assert not page.tab.seen("#seed")
    page.done(lambda: page.type("corners", "5, 6, 7, 8"))
    assert "(5, 6, 7, 8)" in page.python()
    middle = page.images()[0]
    page.done(lambda: page.press("across", "Home"))
    page.done(lambda: page.press("down", "Home"))
    np.testing.assert_allclose(page.images()[0], ends[0], atol=1)
    page.done(lambda: page.press("down", "End"))
    np.testing.assert_allclose(page.images()[0], ends[2], atol=1)
    x, y, width, height = page.tab.box("#square")
    page.tab.drag([(x + 5, y + 5), (x + width / 2, y + height / 3), (x + width - 1, y + 1)])
    down, across = (float(page.value(name)) for name in ("down", "across"))
    assert down < 0.03 < 0.97 < across
    page.wait(lambda: f"x_T = slerp(slerp(a, c, {down}), slerp(b, d, {down}), {across})" in page.python())
    assert not np.allclose(page.images()[0], middle, atol=3)
    page.type("corners", "5, 6, 7")
    page.wait(lambda: page.problems().get("corners", "").startswith("seeds of the corners must be 4 whole numbers"))


def test_the_way_can_be_gone_through(page: Page) -> None:
    images = page.open(START + "&eta=0.5").first()
    assert page.value("way") == "4"
    page.press("way", "Home")
    page.wait(lambda: page.images().shape == (3, 6, 21))  # a pair, with a pixel between
    assert re.match(r"Step 1 of 4, t = \d+\. Left: x_t, before it\. Right: x0_hat", page.text("way-said"))
    pairs = page.images()
    page.click("noise")
    page.wait(lambda: page.images().shape == (3, 6, 10))
    np.testing.assert_array_equal(page.images(), pairs[..., :10])  # x_T
    page.click("noise")
    page.press("way", "ArrowLeft")
    page.wait(lambda: page.text("way-said").startswith("Step 4 of 4"))
    np.testing.assert_allclose(page.images()[..., 11:], images, atol=1)
    page.press("way", "Home")
    page.click("play")
    assert page.text("play") == "Pause"
    page.wait(lambda: page.text("play") == "Play")
    assert page.value("way") == "4"
    page.wait(lambda: page.images().shape == (3, 6, 10))
    np.testing.assert_array_equal(page.images(), images)


def test_strip_draw_invert_and_inpaint(page: Page) -> None:
    page.open(START).first()
    strip = page.done(lambda: page.mode("strip"))
    assert page.captions() == ["η 0, label 1", "η 0.5, label 1", "η 1, label 1"]
    assert len({image.tobytes() for image in strip}) == 3
    page.mode("invert")
    page.wait(lambda: page.text("said") == "Draw a picture first.")
    assert page.stale()
    x, y, width, height = page.tab.box("#pad")
    line = [(x + width * part, y + height * part) for part in (0.2, 0.5, 0.8)]
    inverted = page.done(lambda: page.tab.drag(line))
    assert re.search(r"the first is \S+ from the picture \(mean squared\)", page.text("said"))
    assert page.captions() == ["η 0, label 1", "η 0.5, label 1", "η 1, label 1"]
    assert len({image.tobytes() for image in inverted}) == 3
    assert page.text("command").startswith("None: ")
    page.done(lambda: page.type("num", "1"))
    assert page.text("command").startswith("jddim invert ")
    page.press("way", "Home")
    page.wait(lambda: page.text("way-said").startswith("Up, step 1 of 4"))
    np.testing.assert_array_equal(page.images()[0][:, :10].ravel(), page.picture())
    page.type("num", "3")
    sent = page.picture()
    page.done(lambda: page.press("pad", "ArrowUp", "ArrowLeft", " "))  # by keys alone
    assert page.picture().tobytes() != sent.tobytes()
    page.mode("inpaint")
    page.wait(lambda: page.text("said") == "Paint a mask first.")
    page.done(lambda: page.click("half"))
    filled, picture = page.images(), page.picture().astype(int)
    np.testing.assert_allclose(filled[0][:3].ravel(), picture[:30], atol=1)  # to_uint8 truncates
    assert np.abs(filled[0][3:].ravel() - picture[30:]).max() > 10
    page.tab.reload()
    np.testing.assert_array_equal(page.first(), filled)  # the drawing and its mask too
    page.done(lambda: page.tab.click("#images button:nth-child(2)"))  # an image becomes the picture
    np.testing.assert_array_equal(page.picture().reshape(6, 10), filled[1])
    files = page.tab.all("#downloads a", "textContent")
    assert files == ["images.png", "images.npz", "images.gif", "picture.png", "mask.png"]
    links = "[...document.querySelectorAll('#downloads a')]"
    assert page.tab.js(f"Promise.all({links}.map(async (a) => (await fetch(a)).status))") == [200] * 5
    assert page.text("command").startswith("jddim edit ")


def test_brushes(page: Page) -> None:
    page.open(f"{START}&mode=inpaint&live=0")
    page.wait(lambda: page.tab.seen("#pad"))
    middle = lambda: (lambda x, y, w, h: [(x + w / 2, y + h / 2)])(*page.tab.box("#pad"))  # noqa: E731
    page.tab.drag(middle())
    small = np.count_nonzero(page.picture())
    page.press("brush", "End")
    page.tab.drag(middle())
    assert np.count_nonzero(page.picture()) > small
    page.click("negative")
    assert page.picture().reshape(6, 10)[3, 5] == 0
    page.tab.click("#tools input[value=mask] + span")
    page.tab.drag(middle())
    assert page.picture("mask").any()
    page.tab.click("#tools input[value=unmask] + span")
    page.tab.drag(middle())
    assert not page.picture("mask").any()
    page.click("negative")
    page.tab.click("#tools input[value=erase] + span")
    page.tab.drag(middle())
    assert page.picture().reshape(6, 10)[3, 5] == 0
    page.click("clear")
    assert not page.picture().any()
    page.choose("checkpoint", "plain")
    page.mode("inpaint")
    page.tab.click("#tools input[value=ink] + span")
    page.colour("colour", "#ff0080")
    page.tab.drag(middle())
    inked = page.picture(kind="plain 6x10x3").reshape(60, 3)
    assert [255, 0, 128] in inked.tolist()


def test_a_picture_of_ones_own(page: Page, tmp_path: Path) -> None:
    levels = np.random.default_rng(5).integers(0, 256, (3, 5, 3), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
    wide = np.concatenate([levels[:, :7] * 0, levels, levels[:, :7] * 0], axis=1)  # what is cut off
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(levels[..., 0]).save(tmp_path / "grey.png")
    (tmp_path / "none.png").write_bytes(b"no picture")
    page.open(f"{START}&mode=invert")
    page.wait(lambda: page.text("said") == "Draw a picture first.")
    page.tab.give("#file", [tmp_path / "none.png"])
    page.wait(lambda: page.problems() == {"picture": "none.png: is no picture that this browser reads"})
    page.done(lambda: page.tab.give("#file", [tmp_path / "grey.png"]))
    assert page.problems() == {}
    grey = page.picture().reshape(6, 10)
    np.testing.assert_allclose(grey.astype(int), levels[::6, ::6, 0], atol=24)  # the browser's interpolation
    page.done(lambda: page.tab.give("#file", [tmp_path / "wide.png"]))
    luma = np.array(Image.fromarray(levels).convert("L"))[::6, ::6].astype(int)
    np.testing.assert_allclose(page.picture().reshape(6, 10).astype(int), luma, atol=24)
    data = list((tmp_path / "grey.png").read_bytes())
    bring = (
        f"const d = new DataTransfer(); d.items.add(new File([new Uint8Array({data})], 'p.png', {{type: 'image/png'}}))"
    )
    paste = f"(() => {{ {bring}; dispatchEvent(new ClipboardEvent('paste', {{clipboardData: d}})) }})()"
    page.done(lambda: page.tab.js(paste))
    np.testing.assert_array_equal(page.picture().reshape(6, 10), grey)
    page.done(lambda: page.click("negative"))
    drop = (
        f"(() => {{ {bring}; drawing.dispatchEvent(new DragEvent('drop', {{dataTransfer: d, cancelable: true}})) }})()"
    )
    page.done(lambda: page.tab.js(drop))
    np.testing.assert_array_equal(page.picture().reshape(6, 10), grey)
    page.done(lambda: page.mode("sample"))
    page.tab.js(paste)  # there is no pad to put it on


def test_a_picture_beside_the_noise(page: Page, tmp_path: Path) -> None:
    levels = np.random.default_rng(5).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "beside.png")
    page.open("checkpoint=beside&steps=3&num=2")
    page.wait(lambda: page.text("said") == "Choose or draw the picture beside the noise first.")
    first = page.done(lambda: page.tab.give("#beside-file", [tmp_path / "beside.png"]))
    kind = "beside beside 6x10x3"
    np.testing.assert_allclose(page.picture(kind=kind).reshape(levels.shape).astype(int), levels, atol=2)
    page.colour("beside-colour", "#00ff00")
    x, y, width, height = page.tab.box("#beside-pad")
    drawn = page.done(lambda: page.tab.drag([(x + width * 0.2, y + height / 2), (x + width * 0.8, y + height / 2)]))
    assert [0, 255, 0] in page.picture(kind=kind).reshape(60, 3).tolist()
    assert drawn.tobytes() != first.tobytes()
    assert "condition.png" in page.tab.all("#downloads a", "textContent")
    page.click("beside-clear")
    page.wait(lambda: page.stale() and page.text("said").startswith("Choose or draw"))
    page.choose("checkpoint", "plain")
    assert not page.tab.seen("#beside")


def test_runs_of_before_and_one_that_is_kept(page: Page) -> None:
    first = page.open(START).first()
    assert not page.tab.seen("#recent")
    page.click("keep")
    np.testing.assert_array_equal(page.images("kept-images"), first)
    second = page.done(lambda: page.type("steps", "7"))
    change = page.wait(
        lambda: re.search(r"steps 4 → 7\. Mean difference of the pixels: (\S+) of 255", page.text("difference"))
    )
    apart = np.abs(first.astype(int) - second).mean()
    assert float(change[1]) == pytest.approx(apart, abs=0.06)
    assert page.tab.all("#runs button", "innerText") == ["sample, 7 steps, seed 3", "sample, 4 steps, seed 3"]
    runs = page.runs()
    page.tab.click("#runs li:nth-child(2) button")
    page.wait(lambda: page.value("steps") == "4")
    page.wait(lambda: page.images().tobytes() == first.tobytes())
    assert (page.runs(), page.stale()) == (runs, False)  # nothing was run for it
    assert "steps=4" in page.python()
    assert page.text("difference").startswith("This run.")
    page.click("drop")
    assert not page.tab.seen("#kept")


def test_keys(page: Page) -> None:
    page.open(START).first()
    page.done(lambda: page.press("results", "r"))
    page.press("results", ",")
    page.wait(lambda: page.text("way-said").startswith("Step 4 of 4"))
    page.press("results", ".")
    page.wait(lambda: page.text("way-said").startswith("The end"))
    page.press("results", "k")
    page.wait(lambda: page.tab.seen("#kept"))
    page.press("results", "l")
    assert not page.tab.of("#lock", "checked")
    page.press("results", "p")
    page.wait(lambda: page.text("play") == "Pause")
    page.done(lambda: page.press("results", "2"))
    assert page.tab.of("input[name=mode]:checked", "value") == "strip"
    before = page.runs()
    page.press("seed", "5")  # is typed
    page.wait(lambda: page.runs() > before)
    assert page.tab.of("input[name=mode]:checked", "value") == "strip"
    page.press("results", "?")
    page.wait(lambda: page.tab.seen("#keys"))
    assert "r\nrun\ns\nstop" in page.text("keys-list")
    page.click("shortcuts")
    page.click("keys-close")
    assert not page.tab.seen("#keys")
    page.press("results", "1")
    assert page.tab.of("input[name=mode]:checked", "value") == "strip"  # switched off
    page.click("help")
    page.click("shortcuts")
    page.press("keys-close", "Escape")
    assert not page.tab.seen("#keys")


def test_tips_say_what_a_control_does(page: Page) -> None:
    page.open(START).first()
    shown = lambda: page.tab.js(  # noqa: E731
        "[...document.querySelectorAll('.tip')].filter((one) => getComputedStyle(one).visibility === 'visible')"
        ".map((one) => one.id)"
    )
    assert shown() == []
    x, y, width, height = page.tab.box("#eta-name")
    page.tab.hover((x + 5, y + height / 2))
    page.wait(lambda: shown() == ["eta-tip"])
    page.tab.hover((1, 1))
    page.press("eta-slider", "Tab")
    page.wait(lambda: shown() == ["eta-tip"])  # of eta's number
    page.tab.press("Escape")
    assert shown() == []
    described = "[...document.querySelectorAll('.field [aria-describedby]')].flatMap((one) => one.getAttribute"
    assert (
        page.tab.js(f"{described}('aria-describedby').split(' ')).filter((id) => !document.getElementById(id))") == []
    )
    page.wait(lambda: page.tab.seen("#notes-details"))  # this timetable does not begin at T - 1
    page.tab.click("#notes-details summary")
    assert "the first step is at t = " in page.text("notes")


def test_a_stopped_run_and_one_left_behind_are_dropped(page: Page, site: tuple[Any, str]) -> None:
    page.open(START).first()
    counts = site[0].queue.counts
    page.type("num", "16")
    page.type("steps", "250")
    page.wait(lambda: re.fullmatch(r"step \d+ of 250", page.text("said")))
    page.click("stop")
    page.wait(lambda: page.text("said") == "Stopped.")
    page.wait(lambda: counts() == {"running": 0, "waiting": 0})
    page.click("run")
    page.wait(lambda: counts()["running"] == 1)
    page.open("label=1&steps=3").first()  # another page in its place
    page.wait(lambda: counts() == {"running": 0, "waiting": 0})


def test_what_a_run_waits_for_is_said(page: Page, site: tuple[Any, str]) -> None:
    page.open(START).first()
    key = ("classes", "dpm++2m", False)
    site[0].compiled.remove(key)
    page.choose("method", "dpm++2m")
    page.wait(lambda: "waits for its program: about to compile. 0 s so far" in page.text("said"))
    page.wait(lambda: "1 s so far" in page.text("said"))
    site[0].now = "ddpm (classes)"
    page.wait(lambda: "ddpm (classes), is being compiled first; then dpm++2m (classes)." in page.text("said"))
    site[0].now = "dpm++2m (classes)"
    page.wait(lambda: "program: compiling dpm++2m (classes). " in page.text("said"))
    site[0].now = ""

    def compiled() -> None:
        site[0].compiled.add(key)
        site[0].queue.wake()

    page.done(compiled)


def test_a_server_that_stops_is_said(page: Page, site: tuple[Any, str]) -> None:
    page.open(START).first()
    page.type("num", "16")
    page.type("steps", "250")
    page.wait(lambda: "of 250" in page.text("said"))
    site[0].stopping = True
    page.wait(lambda: page.problems() == {"request": "the server was stopped"})
    site[0].stopping = False
    page.type("num", "2")
    page.done(lambda: page.type("steps", "3"))
    assert page.problems() == {}


def test_narrow_wide_light_and_dark(page: Page) -> None:
    page.open(START).first()
    page.click("keep")
    page.done(lambda: page.type("steps", "3"))
    colours = set()
    for mode in ("sample", "corners", "grid", "inpaint"):
        page.mode(mode)
        for width in (390, 1280):
            page.tab.screen(width)
            assert page.tab.js("document.documentElement.scrollWidth") <= width
            assert (page.tab.box("#results")[0] > page.tab.box("#controls")[0]) == (width > 500)
            if width == 390:
                check_touch(page)
    for scheme in ("light", "dark"):
        page.tab.scheme(scheme)
        pair = page.tab.js("((s) => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        levels = [np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in pair]
        assert abs(levels[0] - levels[1]) > 150
        colours.add(tuple(pair))
    assert len(colours) == 2
    page.tab.screen(1280)
    unnamed = page.tab.js(
        "[...document.querySelectorAll('input, select, button')].filter((e) => !(e.labels?.length || "
        "e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []


def check_touch(page: Page) -> None:
    """Whatever is pressed is 44 px high and wide; images stand two in a row, but for a grid's columns."""
    small = page.tab.js(
        "[...document.querySelectorAll('button, select, input, summary, a')].filter((e) => e.checkVisibility({"
        "visibilityProperty: true}) && !e.matches('.skip')).map((e) => [e, (['radio', 'checkbox'].includes(e.type) ? "
        "e.closest('label') : e).getBoundingClientRect()]).filter(([, b]) => b.width < 44 || b.height < 44)"
        ".map(([e, b]) => `${e.id || e.outerHTML.slice(0, 60)} ${b.width}x${b.height}`)"
    )
    assert small == []
    left = "new Set([...images.children].map((e) => Math.round(e.getBoundingClientRect().x))).size"
    columns = "(Number(images.dataset.columns) || Math.min(2, images.children.length))"
    page.wait(lambda: page.tab.js(f"{left} === {columns}"))  # a mode's first run may be on its way


AXE = os.environ.get("JDDIM_AXE", "")


@pytest.mark.skipif(not AXE, reason="THE PAGE'S ACCESSIBILITY IS NOT CHECKED: JDDIM_AXE names no axe.min.js")
def test_axe_finds_no_serious_fault(page: Page) -> None:
    code = Path(AXE).read_text()
    page.open(START).first()
    page.tab.js(f"{code}; 0")

    def faults() -> dict[str, Any]:
        said = page.tab.js(
            "axe.run(document).then((r) => ({passes: r.passes.length, bad: r.violations.filter((v) => "
            "['serious', 'critical'].includes(v.impact)).map((v) => [v.id, v.nodes.map((n) => n.html)])}))"
        )
        assert said["passes"] > 20
        return dict(said["bad"])

    for scheme in ("light", "dark"):
        page.tab.scheme(scheme)
        for width in (1280, 390):
            page.tab.screen(width)
            page.done(lambda: page.press("steps-slider", "ArrowRight"))
            page.press("way", "Home")
            page.wait(lambda: page.tab.of("#images", "className").endswith("pairs"))
            assert faults() == {}
            page.type("steps", "0")
            page.wait(page.problems)
            assert faults() == {}
            page.done(lambda: page.type("steps", "4"))
            page.mode("inpaint")
            page.wait(lambda: page.text("said") == "Paint a mask first.")
            assert faults() == {}
            page.press("results", "?")
            assert faults() == {}
            page.click("keys-close")
            page.done(lambda: page.mode("sample"))
    page.tab.scheme("light")
    page.tab.screen(1280)


def test_ten_tabs_at_once_all_finish(page: Page) -> None:
    tabs = [page.tab.browser.tab() for _ in range(10)]
    pages = [Page(tab, page.address) for tab in tabs]
    for seed, one in enumerate(pages):
        one.open(f"seed={seed}&steps=9&num=2&label=2")
    made = set()
    for one in pages:
        one.tab.front()
        made.add(one.first().tobytes())
        assert one.tab.errors == []
        one.tab.close()
    assert len(made) == 10
