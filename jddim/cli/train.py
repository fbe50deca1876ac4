"""`jddim train`: from a configuration, or from a checkpoint, to a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jddim import interrupt
from jddim.cli.options import CKPT, say
from jddim.config import first_few

if TYPE_CHECKING:
    from jddim.checkpoint.metadata import Metadata
    from jddim.models.autoencoder import Autoencoder
    from jddim.train.task import Task


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command. command: `(name, run, text, examples)` -> its parser."""
    sub = command(
        "train",
        _train,
        "train a network from scratch, or a checkpoint further\n"
        "Needs jddim[train]. The same command again goes on where it was stopped.",
        "mnist.json DATA mnist --sample-every 1000\nmnist faces tuned --set steps=5000 --set lr=2e-5 "
        "--set warmup_steps=100\nmnist DATA guided --classes 11 --set label_dropout=0.1 --set null_label=10 "
        "--set steps=5000 --set warmup_steps=100",
    )
    sub.add_argument(
        "start",
        metavar="CONFIG|CKPT",
        help="a .json with the sections model, schedule, sampler and train (docs/training.md); or a checkpoint: "
        f"{CKPT}",
    )
    sub.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        help="MNIST's folder, a folder of pictures, a .npy or .npz of images, or hf:NAME[#CONFIG][@SPLIT] of "
        "Hugging Face (jddim[datasets])",
    )
    sub.add_argument(
        "out", metavar="OUT", type=Path, help="the checkpoint to write; OUT.run is what a run goes on from"
    )
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the section train, such as lr=1e-4"
    )
    sub.add_argument(
        "--classes",
        type=int,
        metavar="N",
        help="give a checkpoint without classes so many, the null label included, with which it starts as it was",
    )
    sub.add_argument("--log-every", type=int, default=100, metavar="N", help="steps between lines (default 100)")
    sub.add_argument("--save-every", type=int, default=1000, metavar="N", help="steps between saves (default 1000)")
    sub.add_argument("--keep-last", type=int, default=2, metavar="K", help="newest saved states to keep (default 2)")
    sub.add_argument("--keep-best", type=int, default=1, metavar="K", help="and those of least loss (default 1)")
    sub.add_argument(
        "--sample-every", type=int, default=0, metavar="N", help="steps between grids of samples (default: none)"
    )
    sub.add_argument("--sample-num", type=int, default=16, metavar="N", help="images in a grid (default 16)")
    sub.add_argument("--csv", action="store_true", help="write OUT.run/log.csv too; log.jsonl is always there")
    sub.add_argument(
        "--tensorboard",
        action="store_true",
        help="write OUT.run/tensorboard too, figures and samples (jddim[tensorboard])",
    )
    sub.add_argument(
        "--devices", type=int, metavar="N", help="train on so many, the batch cut among them (default: all)"
    )
    sub.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew: an earlier run is moved to OUT.run.old, OUT replaced at the end",
    )


def _train(args: argparse.Namespace) -> int:
    from jddim.train.loop import LoopConfig, check_out, train

    loop = LoopConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(LoopConfig)})
    task, parent, params, stage = _begin(args.start, args.set, args.classes)
    check_out(args.out, overwrite=args.overwrite)

    import jax

    from jddim.models.building import abstract_model, flat_params
    from jddim.scale.sharding import make_mesh
    from jddim.train import data as training_data
    from jddim.train.step import make_optimizer

    make_optimizer(task)  # says what to install
    mesh = make_mesh(args.devices) if args.devices is not None or len(jax.devices()) > 1 else None
    data = training_data.read(args.data, task.model, None if stage is None else stage.config)
    if data.bad:
        total = len(data.bad) + len(data.pixels)
        say(f"note: {len(data.bad)} of {total} pictures are left out: {first_few(data.bad, 5)}")
    count = sum(leaf.size for leaf in flat_params(abstract_model(task.model)).values())
    devices = jax.devices() if mesh is None else mesh.devices.ravel().tolist()
    say(f"{count:,} parameters, {len(data.pixels):,} images, {len(devices)} {devices[0].platform}")
    if task.model.class_embedding is not None and not (task.train.label_dropout and task.train.null_label is not None):
        say("note: no label is dropped, so the result is not for guidance: --set label_dropout=0.1 --set null_label=N")
    done = train(
        task,
        data,
        args.out,
        loop,
        params=params,
        parent=parent,
        source=str(args.data),
        mesh=mesh,
        stage=stage,
        overwrite=args.overwrite,
        say=say,
    )
    if done < task.train.steps:
        kept = f"saved in {args.out}.run: the same command goes on" if done else "nothing was trained yet"
        print(f"jddim: interrupted after step {done} of {task.train.steps}; {kept}", file=sys.stderr)
        return interrupt.status()
    say(f"wrote {args.out}: the averaged weights after {done} steps")
    return 0


def _begin(
    start: str, settings: Sequence[str], classes: int | None
) -> tuple[Task, Metadata | None, dict[str, Any] | None, Autoencoder | None]:
    """What CONFIG or CKPT, --set and --classes say, and the checkpoint's metadata, parameters and first stage."""
    from jddim.checkpoint.folder import load_metadata, load_params, part_of
    from jddim.checkpoint.metadata import FIRST_STAGE
    from jddim.config import from_json
    from jddim.files import parse_json, read_json
    from jddim.models.building import build_model
    from jddim.resolving import resolve
    from jddim.train.step import with_classes
    from jddim.train.task import Task, TrainConfig

    told: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {setting!r}")
        try:
            told[name] = parse_json(value)
        except ValueError:
            told[name] = value
    if not start.endswith(".json"):
        folder = resolve(start)
        parent = load_metadata(folder, start)
        if classes is None:
            told.setdefault("null_label", parent.null_label)
        train = from_json(TrainConfig, told)
        model, held = parent.model, load_params(folder, parent)
        params: Any = part_of(held, "")
        stage: Any = parent.autoencoder and build_model(parent.autoencoder, part_of(held, FIRST_STAGE), "float32")
        if classes is not None:
            model, params = with_classes(model, params, classes, null_label=train.null_label, seed=train.seed)
        return Task(model, parent.schedule, parent.sampler, train), parent, params, stage
    if classes is not None:
        raise ValueError("--classes is for a checkpoint; a configuration has num_classes in its section model")
    try:
        data = read_json(Path(start))
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{start} is no configuration in JSON ({error})") from error
    section = data.get("train", {})
    if told and isinstance(section, dict):
        data = {**data, "train": {**section, **told}}
    try:
        task = Task.from_json(data)
    except (TypeError, ValueError) as error:
        said = f" with --set {' '.join(settings)}" if settings else ""
        raise ValueError(f"{start}{said}: {error}") from error
    return task, None, None, None
