"""`jddim serve`: a page on this machine that samples while one looks."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jddim.cli.options import CKPT, add_ckpt, add_request, request_of, resolved, say
from jddim.config import METHODS
from jddim.installing import install_line

OFFERED = ("ddim", "ddpm", "dpm++2m", "dpm++2m-sde", "unipc", "heun", "plms", "euler-a")
"""The default: each more is a program more, or two, to compile."""


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "serve",
        _serve,
        "serve a page for the browser that samples while one looks\n"
        "Sliders, previews, eta strips, drawn digits (docs/serve.md). Needs jddim[web].",
        "mnist\nmnist cifar10 --port 8123 --methods ddim,dpm++2m\nmnist --host 0.0.0.0",
    )
    add_ckpt(sub, "+", f"{CKPT}; each its name on the page")
    sub.add_argument("--port", type=int, default=8000, metavar="P", help="0: any that is free (default 8000)")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="an address others can reach: THEN EVERYONE WHO REACHES IT CAN USE THE PAGE (default 127.0.0.1, only you)",
    )
    sub.add_argument(
        "--methods",
        type=_methods,
        default=OFFERED,
        metavar="LIST",
        help=f"to compile and offer, ddim among them (default {','.join(OFFERED)})",
    )
    sub.add_argument("--max-steps", type=int, default=250, metavar="S", help="of a run (default 250)")
    sub.add_argument("--max-num", type=int, default=16, metavar="N", help="images of a run (default 16)")
    sub.add_argument("--queue", type=int, default=64, metavar="N", help="runs that may wait (default 64)")
    add_request(sub, "serve")


def _methods(text: str) -> tuple[str, ...]:
    given = tuple(text.split(","))
    if not set(given) <= set(METHODS) or len(set(given)) != len(given) or "ddim" not in given:
        raise argparse.ArgumentTypeError(f"takes ddim and others of {', '.join(METHODS)}; got {text!r}")
    return given


def _serve(args: argparse.Namespace) -> int:
    for option, value in (("--max-steps", args.max_steps), ("--max-num", args.max_num), ("--queue", args.queue)):
        if value < 2:
            raise ValueError(f"{option} must be at least 2, got {value}")
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port must lie in 0..65535, got {args.port}")
    names = [Path(ckpt).resolve().name for ckpt in args.ckpt]
    if len(set(names)) != len(names):
        raise ValueError(f"the checkpoints' names must differ, the page shows them: {', '.join(names)}")
    try:
        import uvicorn

        from jddim.serve.connections import Timed
        from jddim.serve.site import Site, is_address, loopback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"jddim serve needs {error.name}: {install_line('web')}") from error
    from jddim.checkpoint.folder import load_metadata
    from jddim.run.plan import stage_options
    from jddim.serve.request import Bounds

    request = request_of(args, "serve")
    folders = [resolved(ckpt, args) for ckpt in args.ckpt]
    for named, path in zip(args.ckpt, folders, strict=True):
        metadata = load_metadata(path, named)
        config, channels, stage = metadata.model, metadata.image_shape[2], metadata.autoencoder
        if channels not in (1, 3):
            raise ValueError(f"{path}: the page shows images of 1 or 3 channels, this one makes {channels}")
        if config.condition_channels and stage is not None:
            raise ValueError(f"{path}: the page draws no latents, and this network is given some beside x_t")
        if problems := stage_options(request, stage is not None):
            raise ValueError(f"{path}: {problems[0][1]}")
        if config.condition_channels not in (0, 1, 3):
            told = f"a picture of 1 or 3 channels beside x_t, and this network is given {config.condition_channels}"
            raise ValueError(f"{path}: the page draws {told}")
        if config.class_embedding not in (None, "learned"):
            raise ValueError(f"{path}: its labels are no numbers of classes ({config.class_embedding} embedding)")
    listening = _listen(args.host, args.port)

    import jddim

    served = {name: jddim.load(path, dtype=request.dtype) for name, path in zip(names, folders, strict=True)}
    for ddim in served.values():
        request.sampler(ddim.sampler)  # raises what is wrong before anything is compiled
    local = loopback(args.host.lower())
    paths = {name: str(path) if local else name for name, path in zip(names, args.ckpt, strict=True)}
    bounds = Bounds(args.max_steps, args.max_num)
    site = Site(served, paths, methods=args.methods, bounds=bounds, start=request, waiting=args.queue, say=say)

    def allowed(name: str) -> bool:
        own = {args.host.lower(), socket.gethostname().lower()}
        return loopback(name) or (not local and (is_address(name) or name in own))

    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not local:
        print(
            f"warning: --host {args.host}: whoever can reach this machine can use the page, without a password and "
            "unencrypted",
            file=sys.stderr,
        )
    say(f"http://{shown}:{port}/  (Ctrl-C ends it; the first images can be had once ddim is compiled)")
    settings = uvicorn.Config(
        site.app(allowed),
        http=Timed,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=256,
        timeout_graceful_shutdown=5,
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            site.stopping = True  # or it would wait for the runs that are being watched
            super().handle_exit(sig, frame)

    compiling = threading.Thread(target=site.compile, name="jddim compile", daemon=True)
    compiling.start()
    try:
        Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        site.queue.close()
    say("stopped")
    if compiling.is_alive():  # in XLA, which does not survive the interpreter's end in another thread
        os._exit(0)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket at once, so that a port in use is said before anything is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listening
