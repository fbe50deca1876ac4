"""Chromium driven by its DevTools protocol over two pipes (--remote-debugging-pipe), with the standard library alone.

Messages are JSON, each ended by a zero byte (https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Home": 36,
    "End": 35,
    "Tab": 9,
    "Backspace": 8,
    "Enter": 13,
    "Escape": 27,
}


class Browser:
    """A chromium without a window. Use `browser()`."""

    def __init__(self, profile: Path):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--force-prefers-reduced-motion"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--force-device-scale-factor=1"]
        (low_theirs, self._write), (self._read, low_answers) = os.pipe(), os.pipe()
        theirs, answers = (fcntl.fcntl(low, fcntl.F_DUPFD, 100) for low in (low_theirs, low_answers))  # not 3, not 4
        command = shlex.join([str(CHROMIUM), *options, "about:blank"])
        self.process = subprocess.Popen(  # which reads from 3 and writes to 4
            ["bash", "-c", f"exec {command} 3<&{theirs} 4>&{answers} {theirs}<&- {answers}>&-"],
            pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs, answers, low_theirs, low_answers):
            os.close(end)
        self._number, self._held = 0, b""
        self.tabs: dict[str, Tab] = {}

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """What chromium answers. Raises AssertionError for a refusal, and after 60 seconds."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + 60
        while (said := self._next(deadline)).get("id") != self._number:
            if said.get("sessionId") in self.tabs:
                self.tabs[said["sessionId"]].heard(said["method"], said["params"])
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "chromium does not answer"
            more = os.read(self._read, 2**20)
            assert more, "chromium has ended"
            self._held += more
        message, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(message))

    def tab(self) -> Tab:
        """A new one."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tabs[session] = tab = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        return tab

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self._read)
        os.close(self._write)


class Tab:
    """A page that is open. errors: exceptions, console errors, and what the browser itself complains of."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self.target, self.session = browser, target, session
        self.errors: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def heard(self, method: str, params: dict[str, Any]) -> None:
        match method, params:
            case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled", {"type": "error" | "assert", "args": args}:
                self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in args))
            case "Log.entryAdded", {"entry": {"level": "error", "text": text}}:
                self.errors.append(text)

    def open(self, address: str) -> None:
        """Anew, also where the address differs in its hash alone."""
        for url in ("about:blank", address):
            self.call("Page.navigate", url=url)
        self.wait(lambda: self.js("document.readyState") == "complete" and self.js("location.href") != "about:blank")

    def reload(self) -> None:
        self.js("window.before = true")
        self.call("Page.reload")
        self.wait(lambda: self.js("document.readyState === 'complete' && !window.before"))

    def wait(self, condition: Callable[[], Any], said: Callable[[], str] = lambda: "") -> Any:
        deadline = time.monotonic() + 60
        while not (found := condition()):
            assert time.monotonic() < deadline, said()
            time.sleep(0.02)
        return found

    def js(self, expression: str) -> Any:
        """The value of an expression, of a promise what it comes to."""
        said = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def of(self, selector: str, property: str) -> Any:
        """A property of the first element that a selector finds."""
        return self.js(f"document.querySelector({json.dumps(selector)}).{property}")

    def all(self, selector: str, property: str) -> list[Any]:
        """A property of each element that is seen."""
        seen = f"[...document.querySelectorAll({json.dumps(selector)})].filter((one) => one.checkVisibility())"
        return list(self.js(f"{seen}.map((one) => one.{property})"))

    def seen(self, selector: str) -> bool:
        return bool(self.of(selector, "checkVisibility()"))

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height in the window, once it is scrolled there."""
        found = json.dumps(selector)
        at = f"(() => {{ const one = document.querySelector({found}); one.scrollIntoView({{block: 'center'}});"
        return tuple(
            self.js(f"{at} const b = one.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})()")
        )

    def click(self, selector: str) -> None:
        """By the mouse, in the middle of what must be seen and not be covered."""
        assert self.seen(selector), f"{selector} is not to be seen"
        x, y, width, height = self.box(selector)
        x, y = x + width / 2, y + height / 2
        there = f"document.elementFromPoint({x}, {y})"
        assert self.js(f"{there} && document.querySelector({json.dumps(selector)}).contains({there})"), (
            f"{selector} is covered by {self.js(f'{there}?.outerHTML.slice(0, 200)')}"
        )
        self.drag([(x, y)])

    def drag(self, points: list[tuple[float, float]]) -> None:
        """The mouse pressed at the first point, moved over the others, let go."""
        self.hover(points[0])
        self._mouse("mousePressed", points[0], 1)
        for point in points[1:]:
            self._mouse("mouseMoved", point, 1)
        self._mouse("mouseReleased", points[-1], 0)

    def hover(self, at: tuple[float, float]) -> None:
        """The mouse there, not pressed."""
        self._mouse("mouseMoved", at, 0)

    def _mouse(self, kind: str, at: tuple[float, float], buttons: int) -> None:
        how = {"button": "none" if kind == "mouseMoved" and not buttons else "left", "buttons": buttons}
        self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], clickCount=1, **how)

    def press(self, key: str, *, shift: bool = False, control: bool = False) -> None:
        """A key down and up, at what has the focus."""
        letter = len(key) == 1
        code = KEYS.get(key) or ord(key.upper())
        how: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift + 2 * control}
        how |= {"code": "Space" if key == " " else f"Key{key.upper()}" if key.isalpha() and letter else key}
        text = {"text": key} if letter and not control else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **how, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    def focus(self, selector: str) -> None:
        self.of(selector, "focus()")

    def type(self, selector: str, text: str) -> None:
        """In place of what stands there; "" empties it."""
        self.js(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.focus(); one.select(); }})()"
        )
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.press("Backspace")

    def choose(self, selector: str, value: str) -> None:
        """An option of a select, whose list is the system's own and not to be clicked."""
        options = self.js(f"[...document.querySelector({json.dumps(selector)}).options].map((one) => one.value)")
        assert value in options, (value, options)
        change = "for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, {bubbles: true}))"
        find = f"const one = document.querySelector({json.dumps(selector)})"
        self.js(f"(() => {{ {find}; one.value = {json.dumps(value)}; {change}; }})()")

    def give(self, selector: str, files: list[Path]) -> None:
        """Files, to an input for them."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screen(self, width: int, height: int = 900) -> None:
        """A window of that size; a narrow one is a telephone's, with touch."""
        phone = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def scheme(self, name: str) -> None:
        """light or dark"""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def front(self) -> None:
        self.call("Page.bringToFront")

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        del self.browser.tabs[self.session]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A chromium with an empty profile in that folder."""
    started = Browser(profile)
    try:
        yield started
    finally:
        started.close()
