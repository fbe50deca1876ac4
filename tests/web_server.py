"""The page's server in a thread, on a free port, and a client for its events; for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jddim

SMALL: dict[str, Any] = {
    "channel_mults": (1,),
    "attention_levels": (),
    "middle": False,
    "prediction_type": "v_prediction",  # so that pixels are not all black or white
}
"""Of `tiny.write_checkpoint`: the network of the checkpoints that are served."""


@contextlib.contextmanager
def serving(
    paths: Mapping[str, Path],
    methods: tuple[str, ...] = ("ddim",),
    *,
    needed: Callable[[tuple[str, str, bool]], bool] = lambda key: True,
    **options: Any,
) -> Iterator[tuple[Any, int]]:
    """(the Site, its port), compiled. needed: which programs a test uses, by their keys. options: Site's."""
    import uvicorn

    from jddim.serve.connections import Timed
    from jddim.serve.site import Site, loopback

    served = {name: jddim.load(path) for name, path in paths.items()}
    options = {"methods": methods, "say": lambda line: None} | options
    site = Site(served, {name: str(path) for name, path in paths.items()}, **options)
    site.compiling = [(key, program) for key, program in site.compiling if needed(key)]
    site.total = len(site.compiling)
    site.compile()
    assert not site.refused
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(site.app(loopback), http=Timed, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield site, listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        site.queue.close()


def send(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
    """A request, its answer still to be read. headers: `_` for `-`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def post(port: int, path: str, data: Any, **headers: str) -> http.client.HTTPResponse:
    return send(port, "POST", path, json.dumps(data).encode(), Content_Type="application/json", **headers)


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a run, until the server ends them."""
    assert response.status == 200, response.read()
    name = ""
    for line in response:
        kind, _, value = line.decode().rstrip("\n").partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            yield name, json.loads(value)


def made(port: int, **asked: Any) -> dict[str, Any]:
    """What the last event of a run says; it must be "done"."""
    *_, (name, data) = events(post(port, "/api/run", asked))
    assert name == "done", data
    return data
