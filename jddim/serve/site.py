"""The local page's server: Starlette routes over a queue of runs, server-sent events while one is made.

No file is opened for a request: the page's own files are read when the server starts, checkpoints are named by what was
given on the command line, results are kept in memory and named by random words. `Guard` stands before everything.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import io
import ipaddress
import json
import math
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jddim import __version__
from jddim.ddim import largest_eta, sampler_table
from jddim.files import parse_json
from jddim.images import encode_gif, encode_png, grid, to_uint8
from jddim.inversion import reconstruction_error
from jddim.pipeline import DDIM
from jddim.run.plan import classes_in_turn, spacing_of
from jddim.run.request import CFG_PLUS_PLUS
from jddim.run.request import Request as SamplingRequest
from jddim.scale.stepping import Decoded, Run
from jddim.serve import snippets
from jddim.serve.jobs import Busy, Frame, Job, Key, Queue, status
from jddim.serve.request import (
    GOOD_CFG_PLUS_PLUS,
    GOOD_SCALE,
    GUIDED,
    MANY_LABELS,
    Asked,
    Bounds,
    Refused,
    etas_of,
    fields,
    labels_of,
    parse,
    picture_of,
    run_of,
    shape_of,
    spacings,
)
from jddim.timetables import traps

KEPT = 256 * 2**20
"""Bytes of results that can be downloaded; beyond, the oldest are forgotten."""

PAGE = {
    "index.html": "text/html",
    "style.css": "text/css",
    **dict.fromkeys(("app.js", "results.js", "gallery.js", "stream.js", "draw.js", "plot.js"), "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run made. images: float32; x_T: what it was sampled from; frames: steps of its way."""

    request: Asked
    settings: dict[str, Any]
    images: NDArray[np.float32]
    x_T: NDArray[np.float32]
    frames: list[Frame]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.images.nbytes + self.x_T.nbytes + sum(2 * frame.x_t.nbytes for frame in self.frames)


class Site:
    """The checkpoints served, by name, the queue, what is compiled, and results for a while.

    paths: how each is named in what is copied from the page. start: options of sampling in place of the defaults.
    say: for the terminal. stopping: set, runs end soon.
    """

    def __init__(
        self,
        served: Mapping[str, DDIM],
        paths: Mapping[str, str],
        *,
        methods: Sequence[str],
        bounds: Bounds | None = None,
        start: SamplingRequest | None = None,
        waiting: int = 64,
        say: Callable[[str], None] = print,
    ):
        self.served, self.paths, self.say = dict(served), dict(paths), say
        self.bounds, self.start = bounds or Bounds(), start or SamplingRequest()
        self.offered = tuple(methods)
        self.methods = {name: list(methods) for name in served}
        self.queue = Queue(waiting)
        self.compiled: set[Key] = set()
        self.compiling: list[tuple[Key, Callable[[], Any]]] = self._programs()
        self.total = len(self.compiling)
        self.now = ""
        self.stopping = False
        self.refused: dict[Key, str] = {}
        self._kept: collections.OrderedDict[str, Result] = collections.OrderedDict()
        self._lock = threading.Lock()
        shapes = [(*shape_of(ddim), ddim.model.config.condition_channels) for ddim in self.served.values()]
        pixels = max(h * w * (c + 1 + beside) for h, w, c, beside in shapes)
        self.most_bytes = 2 * pixels + 2**14

    # -- programs -----------------------------------------------------------------------------------------------------

    def _programs(self) -> list[tuple[Key, Callable[[], Any]]]:
        """Every program that a request can need: its key, and a run that it makes the first call of."""
        programs: list[tuple[Key, Callable[[], Any]]] = []
        for name, ddim in self.served.items():
            classes = ddim.model.config.num_classes
            picture = base64.b64encode(bytes(math.prod(shape_of(ddim)))).decode()
            mask = base64.b64encode(bytes([255]) * math.prod(shape_of(ddim)[:2])).decode()
            for guided in [False] if classes is None else [False, True]:  # guidance is between classes
                how: dict[str, Any] = {"checkpoint": name, "steps": 2, "num": 1}
                how |= GUIDED if guided else {}
                if (beside := ddim.model.config.condition_channels) > 0:
                    how["condition"] = base64.b64encode(bytes(math.prod(shape_of(ddim)[:2]) * beside)).decode()
                asked: dict[str, Any] = {method: {"method": method} for method in self.methods[name]}
                asked["ddim"] = {"mode": "corners", "corners": [0, 1, 2, 3], "at": [0.5, 0.5]}  # slerp's program too
                asked["inpaint"] = {"mode": "inpaint", "picture": picture, "mask": mask}
                if not ddim.sampler.self_condition:
                    asked["invert"] = {"mode": "invert", "picture": picture}
                for part, more in asked.items():
                    programs.append(((name, part, guided), partial(self._first_call, {**how, **more})))
        order = {"ddim": 0, "inpaint": 1, "invert": 2}

        def late(key: Key) -> tuple[int, bool]:
            name, part, guided = key
            return order.get(part, 3), guided != (self.served[name].null_label is not None)

        return sorted(programs, key=lambda program: late(program[0]))  # what the page begins with comes first

    def _first_call(self, data: dict[str, Any]) -> Run:
        """A run of what is asked, whose first call compiles."""
        asked = parse(data, self.served, dict.fromkeys(self.served, self.offered), self.bounds, self.start)
        return run_of(asked, self.served[data["checkpoint"]])

    def compile(self) -> None:
        """Compile everything, one after the other: what a run waits for, and the rest while none is made.

        A method that a checkpoint does not take is left out from then.
        """
        started, left = time.perf_counter(), dict(self.compiling)
        while left and (key := self.queue.to_compile([*left])) is not None:
            name, method, _ = key
            i, self.now = len(self.compiled) + len(self.refused) + 1, named(key)
            before = time.perf_counter()
            try:
                run = left.pop(key)()
                run.step()
                run.x_t()
                self.compiled.add(key)
                self.say(f"compiled {i} of {self.total}: {self.now} [{time.perf_counter() - before:.1f} s]")
            except Exception as error:
                if method in self.methods[name]:
                    self.methods[name].remove(method)
                self.refused[key] = str(error)
                self.say(f"left out {i} of {self.total}: {self.now}: {error}")
            self.now = ""
            self.queue.wake()
        if not left:
            ready = "ready" if self.compiled else "nothing can be drawn, for the reasons above"
            self.say(f"{ready} [{time.perf_counter() - started:.1f} s]")

    def needs(self, request: Asked) -> set[Key]:
        """The programs of a request."""
        guided = request.guided
        parts = {"inpaint": ["inpaint"], "invert": ["invert", "ddim"]}.get(request.mode, [request.request.method])
        return {(request.checkpoint, part, guided) for part in parts}

    # -- routes -------------------------------------------------------------------------------------------------------

    async def about(self, _: Request) -> Response:
        """What there is to choose from, and how far compiling is."""
        return JSONResponse(
            {
                "version": __version__,
                "checkpoints": [self._about(name, ddim) for name, ddim in self.served.items()],
                "bounds": dataclasses.asdict(self.bounds),
                "fields": fields(),
                "many_labels": MANY_LABELS,
                "compiling": {"done": len(self.compiled) + len(self.refused), "total": self.total, "now": self.now},
                "queue": self.queue.counts(),
            }
        )

    def _about(self, name: str, ddim: DDIM) -> dict[str, Any]:
        height, width, channels = shape_of(ddim)
        return {
            "name": name,
            "summary": ddim.model.config.summary,
            "height": height,
            "width": width,
            "channels": channels,
            "latent": ddim.autoencoder is not None,
            "condition_channels": ddim.model.config.condition_channels,
            "classes": ddim.model.config.num_classes,
            "null_label": ddim.null_label,
            "guidance_scale": GOOD_CFG_PLUS_PLUS if self.start.guidance == CFG_PLUS_PLUS else GOOD_SCALE,
            "train_timesteps": ddim.schedule.most_steps,
            "spacings": spacings(ddim),
            "methods": self.methods[name],
            "invertible": not ddim.sampler.self_condition,
        }

    async def table(self, http: Request) -> Response:
        """Log SNR over t, the timesteps visited, and each step's noise."""
        request = await self._asked(http)
        return JSONResponse(await asyncio.to_thread(self._table, request))

    def _table(self, request: Asked) -> dict[str, Any]:
        ddim, asked = self.served[request.checkpoint], request.request
        sampler = asked.sampler(ddim.sampler)
        spacing = spacing_of(asked, sampler, ddim.schedule.most_steps)
        table = sampler_table(ddim.schedule, sampler, asked.steps, np.float64, spacing)
        shown = ddim.schedule.shown_times()
        with np.errstate(divide="ignore"):
            log_snr = 2 * (np.log(ddim.schedule.alpha(shown)) - np.log(ddim.schedule.sigma(shown)))
            visited_log_snr = 2 * (np.log(table.alpha_t) - np.log(table.sigma_t))
        sigma = np.asarray((asked.eta or 0.0) * table.sigma_prev * table.fresh)
        return {
            "last_t": shown[-1].item(),
            "t": shown.tolist(),
            "log_snr": _finite(log_snr),
            "visited": np.asarray(table.t).tolist(),
            "visited_log_snr": _finite(visited_log_snr),
            "sigma": _finite(sigma),
            "largest_eta": _finite(np.array([largest_eta(table)]))[0],
            "notes": traps(table, ddim.schedule, ddim.sampler.prediction_type),
        }

    async def run(self, http: Request) -> Response:
        """Put a run in the queue; its events, until it is done. To close the connection drops it."""
        request = await self._asked(http)
        needs = self.needs(request)
        if why := [self.refused[key] for key in needs & self.refused.keys()]:
            raise Refused({"mode": f"{request.mode} does not work with this checkpoint: {why[0]}"})
        run = await asyncio.to_thread(run_of, request, self.served[request.checkpoint])
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(news.set)

        job = Job(run, changed, lambda: needs <= self.compiled | self.refused.keys(), needs)
        try:
            self.queue.submit(job)
        except Busy as error:
            return JSONResponse({"error": str(error)}, status_code=503, headers={"retry-after": "2"})
        return StreamingResponse(self._events(request, job, news), media_type="text/event-stream")

    async def _events(self, request: Asked, job: Job, news: asyncio.Event) -> AsyncIterator[str]:
        said: Any = None
        began = time.monotonic()
        try:
            while not job.finished:
                news.clear()
                if self.stopping:
                    yield _event("failed", {"error": "the server was stopped"})
                    return
                now = status(job, self.queue)
                if now["state"] == "compiling":
                    needs = [named(key) for key in sorted(job.needs - self.compiled or job.needs)]
                    now |= {"now": self.now, "needs": needs, "waited": int(time.monotonic() - began)}
                if now != said:
                    said = dict(now)
                    if now["state"] == "running" and now["done"]:
                        seen = await asyncio.to_thread(_preview, job)
                        now |= {} if seen is None else {"images": seen}
                    yield _event("status", now)
                else:
                    yield ":\n\n"  # whether anyone still listens
                if not job.finished and "images" in now:
                    await asyncio.sleep(0.08)  # at most 12 previews a second: drawing them takes the browser time
                with contextlib.suppress(asyncio.TimeoutError):
                    if not job.finished:
                        await asyncio.wait_for(news.wait(), 0.5)
            if job.error is not None:
                yield _event("failed", {"error": job.error})
            else:
                yield _event("done", await asyncio.to_thread(self._done, request, job))
        finally:
            job.cancel()

    def _done(self, request: Asked, job: Job) -> dict[str, Any]:
        ddim, path = self.served[request.checkpoint], self.paths[request.checkpoint]
        run = job.run
        settings = request.settings | {
            "jddim": __version__,
            "checkpoint_sha256": ddim.metadata.sha256 if ddim.metadata else None,
        }
        if isinstance(run, Decoded):
            settings |= {"decode_batch": run.plan.decode_batch}
        images, noise = run.x_t(), run.noise()
        result = Result(request, settings, images, noise, job.frames)
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._kept[name] = result
            while len(self._kept) > 1 and sum(kept.size for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        command, why = snippets.command(request, ddim, path)
        labels, etas = labels_of(request, classes_in_turn(ddim, request.request)), etas_of(request)
        files = ["images.png", "images.npz", *(["images.gif"] if job.frames else [])]
        files += ["picture.png"] if request.picture is not None else []
        files += ["mask.png"] if request.mask is not None else []
        files += ["condition.png"] if request.condition is not None else []
        said = {
            "id": name,
            "seconds": round(job.seconds, 3),
            "calls": run.total,
            "images": _sprite(to_uint8(images)),
            "x_T": _sprite(to_uint8(run.seen(noise) if isinstance(run, Decoded) else noise)),
            "etas": np.broadcast_to(0.0 if etas is None else etas, (request.num,)).round(4).tolist(),
            "columns": request.columns,
            "way": [frame.row for frame in job.frames],
            "rows": run.rows,
            "labels": None if labels is None else labels.tolist(),
            "python": snippets.python(request, ddim, path),
            "command": command,
            "no_command": why,
            "files": files,
        }
        if request.mode == "invert":
            picture = picture_of(request, ddim)[None]
            said["error"] = float(np.asarray(reconstruction_error(picture, result.images[:1]))[0])
        return said

    async def result(self, http: Request) -> Response:
        """A file made of a result that is kept."""
        with self._lock:
            kept = self._kept.get(http.path_params["name"])
        file = http.path_params["file"]
        step = re.fullmatch(r"way-(\d{1,2})\.png", file)
        make = partial(_way, int(step[1])) if step else FILES.get(file)
        if kept is None or make is None:
            return JSONResponse({"error": "no longer kept here: run it again"}, status_code=404)
        found = await asyncio.to_thread(make, kept)
        if found is None:
            return JSONResponse({"error": "this run has no such file"}, status_code=404)
        headers = {"content-disposition": f'attachment; filename="{file}"'}
        kind = "image/png" if step else "application/octet-stream"
        return Response(found, media_type=kind, headers=headers)

    async def _asked(self, http: Request) -> Asked:
        """The request in the body. Raises Refused."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":  # which another site's page cannot send
            raise Refused({"request": "must be application/json"})
        body = bytearray()
        async for chunk in http.stream():
            body += chunk
            if len(body) > self.most_bytes:
                raise Refused({"request": f"is longer than {self.most_bytes} bytes"})
        try:
            data = parse_json(bytes(body))
        except ValueError:
            raise Refused({"request": "is not JSON"}) from None
        return parse(data, self.served, self.methods, self.bounds, self.start)

    def app(self, allowed: Callable[[str], bool]) -> ASGIApp:
        """The application. allowed: which host names it may be addressed by."""
        folder = resources.files("jddim") / "serve" / "page"
        files = {name: (folder / name).read_bytes() for name in PAGE}

        def page(name: str) -> Callable[[Request], Response]:
            return lambda _: Response(files[name], media_type=PAGE[name])

        async def refused(_: Request, error: Exception) -> Response:
            assert isinstance(error, Refused)
            return JSONResponse({"error": str(error), "fields": error.fields}, status_code=400)

        app = Starlette(
            routes=[
                Route("/", page("index.html")),
                *(Route(f"/{name}", page(name)) for name in PAGE),
                Route("/api/about", self.about),
                Route("/api/table", self.table, methods=["POST"]),
                Route("/api/run", self.run, methods=["POST"]),
                Route("/api/results/{name:str}/{file:str}", self.result),
            ],
            exception_handlers={Refused: refused},
        )
        return Guard(app, allowed)


class Guard:
    """Refuses other sites' pages, by Host (DNS rebinding) and Origin, and adds the headers to every response."""

    def __init__(self, app: ASGIApp, allowed: Callable[[str], bool]):
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        problem = None
        if not self.allowed(host_name(host)):
            problem = "this server is not to be addressed by that host name (jddim serve --host adds one)"
        elif origin is not None and origin.partition("://")[2] != host:
            problem = "requests of other sites' pages are refused"

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        if problem is not None:
            await JSONResponse({"error": problem}, status_code=403)(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)


def host_name(host: str) -> str:
    """A Host header without its port, in lower case; nothing if it is no name with or without one."""
    found = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]{1,5})?", host)
    return found[1].lower().strip("[]") if found else ""


def loopback(name: str) -> bool:
    """Whether a host name is this machine's own for itself."""
    if name == "localhost":
        return True
    return is_address(name) and ipaddress.ip_address(name).is_loopback


def is_address(name: str) -> bool:
    """Whether a host name is an IP address, which no name server can point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _png(result: Result) -> bytes:
    return encode_png(grid(result.images), result.settings)


def _npz(result: Result) -> bytes:
    file = io.BytesIO()
    settings = json.dumps(result.settings)
    np.savez(file, arr_0=to_uint8(result.images), x_0=result.images, x_T=result.x_T, settings=settings)
    return file.getvalue()


def _gif(result: Result) -> bytes | None:
    if not result.frames:
        return None
    frames = [*(frame.x_t for frame in result.frames), to_uint8(result.images)]
    return encode_gif([grid(frame) for frame in frames], result.settings)


def _condition(result: Result) -> bytes | None:
    if result.request.condition is None:
        return None
    pixels = np.frombuffer(result.request.condition, np.uint8)
    return encode_png(pixels.reshape(*result.images.shape[1:3], -1), {})


def _way(i: int, result: Result) -> bytes | None:
    """Of the i-th step that was kept, all x_t side by side, and below them the x0_hat."""
    if i >= len(result.frames):
        return None
    rows = [np.concatenate(list(images), axis=1) for images in (result.frames[i].x_t, result.frames[i].x0_hat)]
    return encode_png(np.concatenate(rows), {})


def _picture(result: Result) -> bytes | None:
    """The picture; of an inpainting, as often as there are images, as a grid: what `jddim edit` reads."""
    if result.request.picture is None:
        return None
    picture = np.frombuffer(result.request.picture, np.uint8).reshape(result.images.shape[1:])
    if result.request.mode == "invert":
        return encode_png(picture, {})
    return encode_png(grid(np.repeat(picture[None], len(result.images), axis=0)), {})


def _mask(result: Result) -> bytes | None:
    if result.request.mask is None:
        return None
    return encode_png(np.frombuffer(result.request.mask, np.uint8).reshape(*result.images.shape[1:3], 1), {})


def named(key: Key) -> str:
    """A program, in words."""
    name, part, guided = key
    return f"{part}{', guided' if guided else ''} ({name})"


FILES: dict[str, Callable[[Result], bytes | None]] = {
    "images.png": _png,
    "images.npz": _npz,
    "images.gif": _gif,
    "picture.png": _picture,
    "mask.png": _mask,
    "condition.png": _condition,
}


def _preview(job: Job) -> str | None:
    """What a job's page sees on the way."""
    seen = job.preview()
    return None if seen is None else _sprite(seen)


def _sprite(pixels: NDArray[np.uint8]) -> str:
    """Images side by side as a PNG in base64."""
    return base64.b64encode(encode_png(np.concatenate(list(pixels), axis=1), {})).decode()


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _finite(values: NDArray[Any]) -> list[float | None]:
    """Numbers for JSON, which has no infinity."""
    return [float(value) if np.isfinite(value) else None for value in values]
