"""The page's server, asked over HTTP: runs, files, what is copied from it; refusals; sessions side by side."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import io
import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import SIZE, write_checkpoint

import jddim
from jddim.cli import main as cli
from jddim.config import ScheduleConfig
from jddim.images import cut_grid, load_images, read_metadata, to_uint8
from jddim.run.request import Request as SamplingRequest
from jddim.schedule import make_schedule
from jddim.serve.jobs import FRAMES
from jddim.serve.request import Refused, parse, run_of

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"jddim serve needs {package}: pip install 'jddim[web]'")

from web_server import SMALL, events, made, post, send, serving  # noqa: E402

from jddim.serve import connections  # noqa: E402
from jddim.serve.site import PAGE, Site  # noqa: E402

pytestmark = pytest.mark.unoptimised

PICTURE = np.random.default_rng(3).integers(0, 256, (*SIZE, 1), dtype=np.uint8)
MASK = np.random.default_rng(4).integers(0, 2, (*SIZE, 1), dtype=np.uint8) * 255
TEXTS = {"picture": base64.b64encode(PICTURE.tobytes()).decode(), "mask": base64.b64encode(MASK.tobytes()).decode()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    return write_checkpoint(folder / "classes", class_embedding="learned", num_classes=5, **SMALL)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[Any, int]]:
    guided = {("ddim", True)}
    needed = lambda key: not key[2] or key[1:] in guided  # noqa: E731
    with serving({"classes": checkpoint}, ("ddim", "dpm++2m"), needed=needed, waiting=12) as found:
        yield found


@pytest.fixture
def port(server: tuple[Any, int]) -> int:
    return server[1]


def file(port: int, data: dict[str, Any], name: str) -> bytes:
    response = send(port, "GET", f"/api/results/{data['id']}/{name}")
    assert response.status == 200
    assert response.headers["content-disposition"] == f'attachment; filename="{name}"'
    return response.read()


def pixels(sprite: str) -> np.ndarray:
    """The images `(num, h, w, 1)` of an event's picture."""
    with Image.open(io.BytesIO(base64.b64decode(sprite))) as image:
        return np.stack(np.split(np.asarray(image), image.width // SIZE[1], axis=1))[..., None]


def test_a_run_shows_itself_until_it_is_done(port: int) -> None:
    asked = {"steps": 100, "num": 5, "eta": 0.5, "seed": 3, "label": "each"}
    *on_the_way, (name, data) = events(post(port, "/api/run", asked))
    assert name == "done"
    running = [said for _, said in on_the_way if said["state"] == "running" and said["done"]]
    assert all((said["row"], said["rows"]) == (said["done"] // 2, 100) for said in running)
    assert running
    for said in running:
        assert said["total"] == data["calls"] == 200  # two groups of images
        assert pixels(said["images"]).shape == (5, *SIZE, 1)
    assert [said["done"] for said in running] == sorted({said["done"] for said in running})
    assert data["labels"] == [0, 1, 2, 3, 4]
    with np.load(io.BytesIO(file(port, data, "images.npz"))) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], pixels(data["images"]))
        np.testing.assert_array_equal(to_uint8(arrays["x_0"]), arrays["arr_0"])
        np.testing.assert_array_equal(to_uint8(arrays["x_T"]), pixels(data["x_T"]))
        assert json.loads(str(arrays["settings"]))["seed"] == 3
    with Image.open(io.BytesIO(file(port, data, "images.gif"))) as gif:
        assert 2 < gif.n_frames <= 1 + FRAMES  # its way, and the end; Pillow merges what looks the same
        assert gif.info["duration"] == 80
    assert send(port, "GET", f"/api/results/{data['id']}/mask.png").status == 404


def test_each_step_that_was_kept_can_be_looked_at(port: int) -> None:
    data = made(port, steps=5, num=3, label=2, seed=4)
    assert (data["way"], data["rows"]) == ([0, 1, 2, 3, 4], 5)
    ways = [pixels(base64.b64encode(file(port, data, f"way-{i}.png")).decode()) for i in range(5)]
    halves = [(way[:, : SIZE[0]], way[:, SIZE[0] :]) for way in ways]
    np.testing.assert_array_equal(halves[0][0], pixels(data["x_T"]))
    np.testing.assert_allclose(halves[-1][1].astype(int), pixels(data["images"]), atol=1)  # the last step ends there
    for name in ("way-5.png", "way-.png", "way-100.png", "way--1.png", "way-0.gif"):
        assert send(port, "GET", f"/api/results/{data['id']}/{name}").status == 404


RUNS: list[dict[str, Any]] = [
    {"mode": "sample", "eta": 0.6, "label": "each"},
    {"mode": "sample", "method": "dpm++2m", "label": 2, "spacing": "linspace"},
    {"mode": "sample", "label": 1, "guidance_scale": 1.5, "null_label": 4},
    {"mode": "strip", "label": 1},
    {"mode": "grid", "label": 4, "columns": [2, 5]},
    {"mode": "slerp", "seed_to": 9, "label": 0},
    {"mode": "corners", "corners": [3, 5, 2, 7], "at": [0.25, 0.7], "label": 0},
    {"mode": "strip", "label": 3, "guidance_scale": 1.5, "null_label": 4},
    {"mode": "slerp", "seed_to": 9, "label": 2, "guidance_scale": 1.5, "null_label": 4},
    {"mode": "invert", "label": 3, "num": 1, **TEXTS},
    {"mode": "invert", "label": 1, **TEXTS},
    {"mode": "inpaint", "label": 2, "eta": 0.6, **TEXTS},
]
TRIED = [RUNS[0], *RUNS[3:6], RUNS[7], RUNS[11]]
"""Those whose commands are run too."""


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, list(run.values())[:3])))
def test_what_is_copied_makes_the_images_again(
    port: int, run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"steps": 3, "seed": 7, "num": 3} | run
    asked = {name: value for name, value in asked.items() if name != "mask" or run["mode"] == "inpaint"}
    data = made(port, **asked)
    images = pixels(data["images"])
    for name in data["files"]:
        (tmp_path / name).write_bytes(file(port, data, name))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(data["python"], found)
    close = {"atol": 1}  # of 255: a rounding may fall on the other side of a step
    np.testing.assert_allclose(to_uint8(found["x_0"]).astype(int), images.astype(int), **close)
    assert read_metadata("images.png")["columns"] == list(run.get("columns", []))
    assert (data["command"] is None) == (data["no_command"] is not None)
    if data["command"] is None:
        assert run["mode"] in ("invert", "corners")  # of several images, of which the command makes the first
        return
    assert ("error" in data) == (run["mode"] == "invert")
    words = shlex.split(data["command"])
    assert words.pop(0) == "jddim"
    cli._parser().parse_args(words)
    if run not in TRIED:  # each compiles another program
        return
    if run["mode"] == "grid":
        words[words.index("grid.png")] = "grid.npz"  # its arrays in place of an atlas with words in it
    assert cli.main([*words, "--overwrite"]) == 0  # beside the file of the page
    out = {"sample": "images.png", "strip": "strip.png", "slerp": "line.png", "inpaint": "filled.png"}
    if run["mode"] == "grid":
        with np.load("grid.npz") as arrays:
            again = to_uint8(arrays["x_0"].swapaxes(0, 1).reshape(-1, *SIZE, 1))  # by column, then by row
    elif run["mode"] == "strip":  # with the etas written beside
        with Image.open(out["strip"]) as picture:
            factor = round(128 / max(SIZE))
            strip = np.asarray(picture)[..., None][:, -factor * (SIZE[1] + 4) :]
            again = cut_grid(strip, SIZE)
    else:
        again = to_uint8(load_images(out[run["mode"]], SIZE))
    np.testing.assert_allclose(again.astype(int), images.astype(int), **close)


def test_a_picture_beside_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = np.random.default_rng(6).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    text = base64.b64encode(beside.tobytes()).decode()
    path = write_checkpoint(tmp_path / "beside", condition_channels=3, **SMALL)
    monkeypatch.chdir(tmp_path)
    with serving({"beside": path}, needed=lambda key: key[1] in ("ddim", "invert")) as (_, port):
        refused = post(port, "/api/run", {"steps": 3})
        assert json.loads(refused.read())["fields"] == {"condition": "must be 6x10x3 bytes in base64, got nothing"}
        for mode in ("sample", "invert"):
            asked = {"mode": mode, "steps": 3, "num": 2, "condition": text, **TEXTS}
            data = made(port, **asked)
            for name in data["files"]:
                (tmp_path / name).write_bytes(file(port, data, name))
            found: dict[str, Any] = {}
            exec(data["python"], found)
            images = pixels(data["images"]).astype(int)
            np.testing.assert_allclose(to_uint8(found["x_0"]).astype(int), images, atol=1)
            if mode == "sample":
                other = made(port, **asked | {"condition": base64.b64encode(bytes(180)).decode()})
                assert np.abs(images - pixels(other["images"])).max() > 10
                words = shlex.split(data["command"])
                assert "--condition" in words
                words = [word.replace("images.png", "images.npz") for word in words[1:]]
                assert cli.main([*words, "--overwrite"]) == 0
                with np.load("images.npz") as arrays:
                    np.testing.assert_allclose(arrays["arr_0"].astype(int), images, atol=1)


def test_the_timetable(port: int) -> None:
    said = json.loads(post(port, "/api/table", {"steps": 4, "spacing": "linspace", "eta": 1, "label": 0}).read())
    assert said["visited"] == [999, 749, 499, 249]
    assert said["sigma"][-1] == 0 < said["sigma"][0]
    assert said["log_snr"][0] > 0 > said["log_snr"][-1]
    assert said["t"][-1] == 999
    curve = np.interp(said["visited"], said["t"], said["log_snr"])
    np.testing.assert_allclose(said["visited_log_snr"], curve, atol=0.05)  # drawn at 200 points


def test_mistakes_are_all_said_by_their_controls(port: int) -> None:
    response = post(port, "/api/run", {"steps": 0, "num": 99, "label": 5})
    assert response.status == 400
    said = json.loads(response.read())
    assert said["fields"].keys() == {"steps", "num", "label"}
    assert "steps: must be a whole number in 1..250, got 0" in said["error"]


@pytest.mark.parametrize(
    ("body", "kind", "problem"),
    [
        (b"{", "application/json", "is not JSON"),
        (b"[" * 5000, "application/json", "is not JSON"),
        (b"{}", "text/plain", "must be application/json"),  # all that another site's page can send
        (b" " * 10**6, "application/json", "is longer than"),
    ],
)
def test_bodies_that_are_refused(port: int, body: bytes, kind: str, problem: str) -> None:
    response = send(port, "POST", "/api/run", body, Content_Type=kind)
    assert response.status == 400
    assert problem in json.loads(response.read())["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.example"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "192.168.0.7"}, 403),
        ({"Host": "localhost:evil"}, 403),
        ({"Host": "localhost:80:80"}, 403),
        ({"Host": "[::1]evil"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
    ],
)
def test_only_this_machines_pages_are_answered(port: int, headers: dict[str, str], status: int) -> None:
    response = send(port, "GET", "/api/about", **headers)
    assert response.status == status
    assert "access-control-allow-origin" not in response.headers
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/..%2f..%2fetc/passwd",
        "/../pyproject.toml",
        "/app.py",
        "/api/results/../../x",
        "/api/results/x/%2e%2e",
        "//etc",
    ],
)
def test_no_path_reaches_the_disk(port: int, path: str) -> None:
    assert send(port, "GET", path).status == 404


def test_the_page_needs_nothing_from_elsewhere(port: int) -> None:
    page = send(port, "GET", "/").read().decode()
    names = [name for name in PAGE if name != "index.html"]
    files = [send(port, "GET", f"/{name}").read().decode() for name in names]
    for text in [page, *files]:
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
        assert "style=" not in text  # which the page's own policy would refuse
    for name in ("style.css", "app.js"):
        assert f'"/{name}"' in page


def test_ten_sessions_at_once_all_finish(port: int, server: tuple[Any, int]) -> None:
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        runs = [pool.submit(made, port, seed=seed, steps=7, num=2, label=1) for seed in range(10)]
        results = [run.result(timeout=60) for run in runs]
    assert len({result["images"] for result in results}) == 10
    for seed in (0, 9):
        assert results[seed]["images"] == made(port, seed=seed, steps=7, num=2, label=1)["images"]


def test_who_hangs_up_is_not_worked_for_and_a_full_queue_says_so(port: int, server: tuple[Any, int]) -> None:
    site = server[0]
    started = site.queue.at_once
    long = {"steps": 250, "num": 16, "label": 0}
    responses = [post(port, "/api/run", long) for _ in range(started + 12)]
    assert all(response.status == 200 for response in responses)
    refused = post(port, "/api/run", long)
    assert refused.status == 503
    assert "12 runs are waiting already" in json.loads(refused.read())["error"]
    deadline = time.monotonic() + 20
    while json.loads(send(port, "GET", "/api/about").read())["queue"] != {"running": started, "waiting": 12}:
        assert time.monotonic() < deadline, site.queue.counts()
    for response in responses:
        response.fp.raw._sock.shutdown(socket.SHUT_RDWR)  # what a closed tab does
    deadline = time.monotonic() + 20
    while any(site.queue.counts().values()):
        assert time.monotonic() < deadline, site.queue.counts()
        time.sleep(0.02)
    assert made(port, steps=2, num=1, label=0)["images"]


def test_what_a_checkpoint_has_not_is_left_out_not_waited_for(checkpoint: Path) -> None:
    ddim = jddim.load(checkpoint)
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))  # where a solver in sigma / alpha has no step
    zero = dataclasses.replace(ddim.with_sampler(spacing="linspace"), schedule=schedule)
    said: list[str] = []
    site = Site({"zero": zero}, {"zero": "zero"}, methods=["ddim", "heun"], say=said.append)
    site.compiling = [(key, program) for key, program in site.compiling if key[1] == "heun"]
    site.compile()
    site.queue.close()
    assert site.methods == {"zero": ["ddim"]}
    assert all("no step from alpha_t = 0" in why for why in site.refused.values())
    assert site.refused.keys() == {("zero", "heun", False), ("zero", "heun", True)}
    assert said[0].startswith("left out 1 of ")
    assert said[-1].startswith("nothing can be drawn, for the reasons above")
    with pytest.raises(Refused, match="method: must be one of ddim; got 'heun'"):
        parse({"method": "heun", "label": 0}, site.served, site.methods, site.bounds)


def test_what_is_compiled_first_has_the_programs_of_slerp_too(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", image_size=(5, 7), **SMALL)  # a size that no other test compiles for
    site = Site({"c": jddim.load(path)}, {"c": "c"}, methods=["ddim"], say=lambda line: None)
    site.compiling = site.compiling[:1]
    compiled: list[str] = []

    def note(event: str, *_: Any, **how: Any) -> None:
        if "backend_compile" in event:
            compiled.append(how.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        site.compile()
        assert [name for name in compiled if "slerp" in name]  # that is how it is called
        compiled.clear()
        run = run_of(parse({"mode": "slerp", "steps": 2}, site.served, site.methods, site.bounds), site.served["c"])
        run.step()
        assert not [name for name in compiled if "slerp" in name]
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
        site.queue.close()


def test_the_page_begins_with_guidance_where_a_null_label_is_recorded(tmp_path: Path) -> None:
    classes = {"class_embedding": "learned", "num_classes": 3, **SMALL}
    trained = write_checkpoint(tmp_path / "a", provenance={"training": {"null_label": 2}}, **classes)
    served = {"a": jddim.load(trained), "b": jddim.load(write_checkpoint(tmp_path / "b", **classes))}
    for guidance, scale in ((None, 3.0), ("cfg++", 0.6)):
        site = Site(served, {"a": "a", "b": "b"}, methods=["ddim"], start=SamplingRequest(guidance=guidance))
        site.queue.close()
        assert {key for key, _ in site.compiling[:2]} == {("a", "ddim", True), ("b", "ddim", False)}
        about = [site._about(name, ddim) for name, ddim in served.items()]
        assert [(one["null_label"], one["guidance_scale"]) for one in about] == [(2, scale), (None, scale)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /api/about HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /api/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=["nothing", "half its headers", "half its body"],
)
def test_who_sends_half_a_request_is_not_waited_for(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], sent: bytes
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as held:
        held.sendall(sent)
        started = time.monotonic()
        with contextlib.suppress(TimeoutError):
            held.settimeout(0.4)
            while held.recv(1):
                pass
        if sent:
            held.sendall(b" ")  # a byte now and then does not help
        held.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while held.recv(1000):
                pass
        assert 0.5 < time.monotonic() - started < 20
    assert send(port, "GET", "/api/about").status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_connection_may_stay_for_the_next_request(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(3):
        kept.request("GET", "/api/about")
        response = kept.getresponse()
        assert (response.status, bool(response.read())) == (200, True)
        time.sleep(0.5)


@pytest.mark.timeout(60)
def test_half_sent_requests_keep_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"here"})

    monkeypatch.setattr(connections, "PATIENCE", 1.0)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    settings = uvicorn.Config(
        app, http=connections.Timed, limit_concurrency=4, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    with contextlib.ExitStack() as held:
        for _ in range(4):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)).sendall(b"GET / HTTP/1.1\r\n")
        statuses = []
        while not statuses or statuses[-1] != 200:
            statuses.append(send(port, "GET", "/").status)
            time.sleep(0.1)
    assert statuses[0] == 503
    server.should_exit = True
    thread.join(20)
