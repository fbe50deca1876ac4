"""The page in a real browser: each control changes what it should, mistakes are shown, a reload keeps the state."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tiny import write_checkpoint

for package in ("starlette", "uvicorn", "selenium"):
    pytest.importorskip(package, reason=f"THE PAGE IS NOT TRIED IN A BROWSER: pip install {package}")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    pytest.skip(
        "THE PAGE IS NOT TRIED IN A BROWSER: no chromium and chromedriver (Debian: apt install chromium-driver)",
        allow_module_level=True,
    )

from selenium import webdriver  # noqa: E402
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from web_server import SMALL, serving  # noqa: E402

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    folder = tmp_path_factory.mktemp("browser")
    paths = {
        "classes": write_checkpoint(folder / "classes", class_embedding="learned", num_classes=5, **SMALL),
        "plain": write_checkpoint(folder / "plain", in_channels=3, out_channels=3, **SMALL),
    }
    guided, plain = {("classes", "ddim", True)}, {("plain", "ddim", False)}
    needed = lambda key: key in guided | plain or (key[0] == "classes" and not key[2])  # noqa: E731
    with serving(paths, ("ddim", "dpm++2m"), needed=needed) as (site, port):
        yield site, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page, by what a person sees of it."""

    def __init__(self, driver: Any, address: str):
        self.driver, self.address = driver, address

    def open(self, state: str = "") -> Page:
        self.driver.get("about:blank")
        self.driver.get(self.address + (f"#{state}" if state else ""))
        return self

    def find(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 30
        while not (found := condition()):
            assert time.monotonic() < deadline, self.find("said").text
            time.sleep(0.02)
        return found

    def runs(self) -> int:
        return int(self.find("results").get_attribute("data-runs") or 0)

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

    def images(self) -> np.ndarray:
        told = self.driver.execute_script(
            "return [...document.querySelectorAll('#images canvas')].map((c) => [c.height, c.width, "
            "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 0)])"
        )
        return np.stack([np.reshape(values, (height, width)) for height, width, values in told])

    def type(self, name: str, value: str) -> None:
        field = self.find(name)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value)

    def choose(self, name: str, value: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"#{name} option[value='{value}']").click()

    def mode(self, name: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"input[name=mode][value={name}] + span").click()

    def captions(self) -> list[str]:
        return [span.text for span in self.driver.find_elements(By.CSS_SELECTOR, "#images span")]

    def python(self) -> str:
        return self.find("python").text

    def problems(self) -> dict[str, str]:
        shown = self.driver.find_elements(By.CSS_SELECTOR, ".problem")
        return {place.get_attribute("id").removesuffix("-problem"): place.text for place in shown if place.text}


@pytest.fixture
def page(chromium: Any, site: tuple[Any, str]) -> Iterator[Page]:
    yield Page(chromium, site[1])
    errors = [line["message"] for line in chromium.get_log("browser") if line["level"] == "SEVERE"]
    assert not [line for line in errors if "400 (Bad Request)" not in line]  # nor does its own policy refuse anything


START = "seed=3&steps=4&num=3&label=1&lock=1"


def test_each_control_changes_what_it_should(page: Page) -> None:
    first = page.open(START).first()
    assert len(first) == 3
    assert "steps=4, eta=0.0, labels=[1] * 3" in page.python()
    seen = {first.tobytes()}

    def changes(act: Callable[[], Any], told: str) -> None:
        images = page.done(act)
        assert told in page.python()
        assert images.tobytes() not in seen
        seen.add(images.tobytes())

    dots = lambda: len(page.driver.find_elements(By.CSS_SELECTOR, "#plot .dot"))  # noqa: E731
    page.wait(lambda: dots() == 4)
    changes(lambda: page.find("steps-slider").send_keys(Keys.ARROW_RIGHT), "steps=5")
    page.wait(lambda: dots() == 5)
    changes(lambda: page.find("eta-slider").send_keys(Keys.ARROW_RIGHT), "eta=0.05")
    changes(lambda: page.type("eta", "0.7"), "eta=0.7")
    assert page.find("eta").is_enabled()
    changes(lambda: page.choose("method", "dpm++2m"), 'method="dpm++2m"')
    assert not page.find("eta").is_enabled()
    page.done(lambda: page.choose("method", "ddim"))
    changes(lambda: page.choose("label", "each"), "labels=[i % 5 for i in range(3)]")
    assert page.captions() == ["label 0", "label 1", "label 2"]
    assert not page.find("null_label").is_displayed()
    page.find("guided").click()  # this checkpoint records no null label: it has to be said
    page.wait(lambda: page.find("null_label-problem").text == "null_label must be a whole number in 0..4, got nothing")
    changes(lambda: page.type("null_label", "4"), "guidance_scale=2.0, null_label=4")
    changes(lambda: page.type("guidance_scale", "5.5"), "guidance_scale=5.5")
    changes(lambda: page.type("null_label", "2"), "null_label=2")
    page.done(lambda: page.choose("spacing", "leading"))  # for 5 steps the checkpoint's own, uniform, is the same table
    page.driver.find_element(By.CSS_SELECTOR, "#more summary").click()  # the controls that the server lists
    changes(lambda: page.type("steps_offset", "1"), "steps_offset=1")
    page.done(lambda: page.choose("set_alpha_to_one", "false"))  # less than a grey level here
    assert "set_alpha_to_one=False" in page.python()
    page.type("clip_range", "0.5")
    page.wait(lambda: "clip_range" in page.find("clip_range-problem").text)  # this checkpoint clips nothing
    page.done(lambda: page.type("clip_range", Keys.BACKSPACE))
    changes(lambda: page.choose("spacing", "quad"), 'spacing="quad"')
    changes(lambda: page.type("seed", "12"), "jax.random.key(12)")
    assert len(page.done(lambda: page.type("num", "5"))) == 5
    page.find("live").click()  # nothing runs by itself any more
    before = page.images()
    page.type("steps", "7")
    page.driver.find_element(By.CSS_SELECTOR, "#lock").click()
    time.sleep(0.5)
    assert "steps=5" in page.python()
    changes(page.find("run").click, "steps=7")  # and draws a seed, which is not locked any more
    seed = page.find("seed").get_attribute("value")
    assert seed != "12"
    page.find("lock").click()
    again = page.done(page.find("run").click)
    assert page.find("seed").get_attribute("value") == seed
    assert again.tobytes() in seen
    assert again.tobytes() != before.tobytes()
    page.find("noise").click()
    page.wait(lambda: page.images().tobytes() not in seen)
    other = page.done(lambda: (page.choose("checkpoint", "plain"), page.find("run").click()))
    assert other.tobytes() not in seen
    assert not page.find("label").is_displayed()
    assert "plain" in page.python()


def test_mistakes_are_shown_beside_their_controls_and_go_away(page: Page) -> None:
    page.open(START).first()
    page.type("steps", "9999")
    assert page.wait(page.problems) == {"steps": "steps must be a whole number in 1..250, got 9999"}
    assert page.find("steps").get_attribute("aria-invalid") == "true"
    page.type("eta", "-1")
    page.wait(lambda: page.problems().keys() == {"steps", "eta"})
    page.type("eta", "0")
    page.find("seed").send_keys(Keys.CONTROL, "a", Keys.DELETE)
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
    page.driver.refresh()
    np.testing.assert_array_equal(page.first(), before)
    assert page.captions()[::2] == ["label 1, seed 3", "label 1, seed 77"]
    page.done(lambda: page.mode("sample"))
    values = {name: page.find(name).get_attribute("value") for name in ("eta", "seed", "steps", "num", "label")}
    assert values == {"eta": "0.35", "seed": "3", "steps": "4", "num": "3", "label": "1"}
    assert page.find("lock").is_selected()
    ends = page.images()[0]  # slerp's first image is that of its seed, at eta 0
    page.done(lambda: page.type("eta", "0"))
    np.testing.assert_allclose(page.images()[0], before[0], atol=1)
    assert ends.tobytes() != before[0].tobytes()


def test_strip_draw_invert_and_inpaint(page: Page) -> None:
    page.open(START).first()
    strip = page.done(lambda: page.mode("strip"))
    assert page.captions() == ["η 0, label 1", "η 0.5, label 1", "η 1, label 1"]
    assert len({image.tobytes() for image in strip}) == 3
    page.mode("invert")
    page.wait(lambda: page.find("said").text == "Draw a picture first.")
    pad = page.find("pad")
    drag = ActionChains(page.driver, duration=20).move_to_element_with_offset(pad, -80, -30).click_and_hold()
    page.done(lambda: drag.move_to_element_with_offset(pad, 60, 40).release().perform())
    assert "mean squared error of the first" in page.find("said").text
    sent = page.driver.execute_script("return sessionStorage.getItem('classes 6x10x1')")
    page.done(lambda: pad.send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT, " "))  # by keys alone
    drawn = page.driver.execute_script("return sessionStorage.getItem('classes 6x10x1')")
    assert drawn != sent
    page.mode("inpaint")
    page.wait(lambda: page.find("said").text == "Paint a mask first.")
    page.done(page.find("half").click)
    filled = page.images()
    picture = page.driver.execute_script(
        "return [...atob(JSON.parse(sessionStorage.getItem('classes 6x10x1')).picture)].map((c) => c.charCodeAt(0))"
    )
    np.testing.assert_allclose(filled[0][:3].ravel(), picture[:30], atol=1)  # to_uint8 truncates
    assert np.abs(filled[0][3:].ravel() - np.array(picture[30:])).max() > 10
    page.driver.refresh()
    np.testing.assert_array_equal(page.first(), filled)  # the drawing and its mask too
    page.done(page.driver.find_elements(By.CSS_SELECTOR, "#images button")[1].click)  # an image becomes the picture
    files = [link.text for link in page.driver.find_elements(By.CSS_SELECTOR, "#downloads a")]
    assert files == ["images.png", "images.npz", "images.gif", "picture.png", "mask.png"]
    status = (
        "return Promise.all([...document.querySelectorAll('#downloads a')].map(async (a) => (await fetch(a)).status))"
    )
    assert page.driver.execute_script(status) == [200] * 5
    assert page.find("command").text.startswith("jddim edit ")


def test_a_stopped_run_and_one_left_behind_are_dropped(page: Page, site: tuple[Any, str]) -> None:
    page.open(START).first()
    counts = site[0].queue.counts
    page.type("num", "16")
    page.type("steps", "250")
    page.wait(lambda: "of 1000" in page.find("said").text)
    page.find("stop").click()
    page.wait(lambda: page.find("said").text == "Stopped.")
    page.wait(lambda: counts() == {"running": 0, "waiting": 0})
    page.find("run").click()
    page.wait(lambda: counts()["running"] == 1)
    page.open("label=1").first()  # another page in its place
    page.wait(lambda: counts() == {"running": 0, "waiting": 0})


def test_a_server_that_stops_is_said(page: Page, site: tuple[Any, str]) -> None:
    page.open(START).first()
    page.type("num", "16")
    page.type("steps", "250")
    page.wait(lambda: "of 1000" in page.find("said").text)
    site[0].stopping = True
    page.wait(lambda: page.problems() == {"request": "the server was stopped"})
    site[0].stopping = False
    page.type("num", "2")
    page.done(lambda: page.type("steps", "3"))
    assert page.problems() == {}


def test_narrow_wide_light_and_dark(page: Page) -> None:
    page.open(START)
    colours = set()
    for mode in ("sample", "inpaint"):
        page.mode(mode)
        for width in (390, 1280):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
            beside = page.find("results").location["x"] > page.find("controls").location["x"]
            assert beside == (width > 500)
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        body = page.driver.find_element(By.TAG_NAME, "body")
        pair = [body.value_of_css_property(name) for name in ("color", "background-color")]
        levels = [np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in pair]
        assert abs(levels[0] - levels[1]) > 150
        colours.add(tuple(pair))
    assert len(colours) == 2
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    unnamed = page.driver.execute_script(
        "return [...document.querySelectorAll('input, select, button')].filter((e) => !(e.labels?.length || "
        "e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unnamed == []


def test_ten_tabs_at_once_all_finish(page: Page) -> None:
    first = page.driver.current_window_handle
    for seed in range(10):
        page.driver.switch_to.new_window("tab")
        page.open(f"seed={seed}&steps=9&num=2&label=2")
    tabs = [handle for handle in page.driver.window_handles if handle != first]
    assert len(tabs) == 10
    made = set()
    for tab in tabs:
        page.driver.switch_to.window(tab)
        page.wait(page.runs)
        made.add(page.images().tobytes())
        page.driver.close()
    page.driver.switch_to.window(first)
    assert len(made) == 10
