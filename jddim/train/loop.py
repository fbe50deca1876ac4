"""Training from the first step to a checkpoint, in a folder that a run goes on from, however it ended.

`OUT.run` holds run.json (what is trained, on what), steps/ (Orbax: the last and the best states), logs and samples/. A
step is a function of the state, the data and (seed, step), so what goes on from a saved step does, to the bit on a CPU,
what an undisturbed run would have done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jddim import __version__, images, interrupt
from jddim.checkpoint.diff import diff_mappings
from jddim.checkpoint.folder import CheckpointError, check_destination, save_checkpoint
from jddim.checkpoint.metadata import FIRST_STAGE, Metadata
from jddim.checkpoint.orbax import is_full_disk, orbax, quiet_orbax
from jddim.config import first_few, image_shape
from jddim.files import lock, open_lock, read_json
from jddim.installing import install_line
from jddim.models.autoencoder import Autoencoder
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.pipeline import DDIM
from jddim.run.programs import by_parts, encode
from jddim.run.progress import Progress
from jddim.schedule import make_schedule
from jddim.train import step as training
from jddim.train.data import HUB, Data, batches, in_range
from jddim.train.logs import open_logs
from jddim.train.objective import Params
from jddim.train.step import TrainState
from jddim.train.task import Task

FORMAT_VERSION = 1


class TrainError(ValueError):
    """A run that cannot begin, or go on, as asked, with what to do about it."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What is said and kept on the way; it changes nothing of the result, and may change between a run's parts.

    log_every, save_every, sample_every: steps between lines, saved states and grids of samples; 0: no samples.
    keep_last, keep_best: how many saved states remain, the newest and those of least loss. sample_num: in a grid.
    csv, tensorboard: whether log.csv and tensorboard/ are written beside log.jsonl.
    """

    log_every: int = 100
    save_every: int = 1000
    sample_every: int = 0
    keep_last: int = 2
    keep_best: int = 1
    sample_num: int = 16
    csv: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that cannot be, ModuleNotFoundError where tensorboard is asked for in vain."""
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (
                *((name, 1) for name in ("log_every", "save_every", "keep_last", "sample_num")),
                *((name, 0) for name in ("sample_every", "keep_best")),
            )
            if getattr(self, name) < least
        ]
        if problems:
            raise ValueError("; ".join(problems))
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(f"--tensorboard needs tensorboard: {install_line('tensorboard')}")


def run_folder(out: Path) -> Path:
    """Where a training whose result is `out` keeps what it goes on from."""
    return out.with_name(f"{out.name}.run")


def train(
    task: Task,
    data: Data,
    out: Path,
    loop: LoopConfig | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    parent: Metadata | None = None,
    source: str = "",
    mesh: Mesh | None = None,
    stage: Autoencoder | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Train, or go on, until `task.train.steps`, and write the checkpoint `out` with the averaged weights.

    params: to begin from, `parent`'s; None: fresh ones. source: where the data came from, for the records. mesh: data
    parallel on its devices. stage: of a network of latents; images are encoded before the first step, by the mean, and
    it lies beside the result. overwrite: begin anew where there is a run (moved to OUT.run.old) or a checkpoint.
    say: told a line every `log_every` steps.

    Returns the steps taken in all. They are fewer than asked after Ctrl-C or SIGTERM, which end the run after the step
    under way, its state saved; no checkpoint is then written. Raises TrainError or CheckpointError for folders that
    cannot be used, and FloatingPointError if a loss or gradient is not finite; nothing of that step is saved.
    """
    loop = loop or LoopConfig()
    check_out(out, overwrite=overwrite)
    null_label = task.train.null_label
    if null_label is not None and data.labels is not None and (found := int((data.labels == null_label).sum())):
        raise TrainError(
            f"null_label {null_label} is the label of {found} images, and must be one that none has: "
            f"give the network a class more, and that as null_label"
        )
    if stage is not None and task.train.flip:
        raise TrainError("flip would mirror latents, which are not a mirrored image's: mirror the images in DATA")
    folder = run_folder(out)
    about = _about(task, data, source, parent, stage)
    if folder.exists() and not overwrite:
        check_run(folder, about)
    if stage is not None:
        data = _encoded(data, task, stage)
    train_step = training.make_train_step(task, mesh)
    placed = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())
    cut = placed if mesh is None else NamedSharding(mesh, P("data"))
    key = jax.device_put(jax.random.key(task.train.seed), placed)
    shapes = jax.eval_shape(lambda: training.init_state(task, _zeros(task)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), shapes)
    feed = partial(batches, data, batch_size=task.train.batch_size, seed=task.train.seed, flip=task.train.flip)
    example = jax.device_put(next(feed()), cut)
    with _claimed(folder, about, overwrite, say), _saved_steps(folder, loop) as saved:
        latest = saved.latest_step()
        if latest is None:
            begun = training.init_state(
                task, training.fresh_params(task.model, task.train.seed) if params is None else params
            )
            state = jax.device_put(begun, placed)
        else:
            if latest > task.train.steps:
                raise TrainError(
                    f"{folder} is after step {latest} already, beyond the {task.train.steps} asked for: ask for more, "
                    "choose another OUT, or begin anew with --overwrite"
                )
            state = _restore(saved, latest, abstract)
            say(f"going on after step {latest} of {folder}")
        started = time.perf_counter()
        program = train_step.lower(abstract, example, key).compile()
        say(f"compiled in {time.perf_counter() - started:.1f} s")
        with (
            contextlib.closing(_Run(task, stage, loop, folder, saved, say, int(state.step))) as run,
            interrupt.deferred() as stopped,
        ):
            for batch in feed(start=run.step):
                if run.step >= task.train.steps or stopped():
                    break
                state, said = program(state, jax.device_put(batch, cut), key)
                run.after(state, said)
            run.save(state)
            saved.wait_until_finished()
        if run.step >= task.train.steps:
            write_checkpoint(out, task, state.ema, run.step, about, parent, stage, overwrite=overwrite)
    return run.step


class _Run:
    """What follows a step: looking at its loss, the log, saving, samples."""

    def __init__(
        self,
        task: Task,
        stage: Autoencoder | None,
        loop: LoopConfig,
        folder: Path,
        saved: Any,
        say: Callable[[str], None],
        step: int,
    ):
        self.task, self.loop, self.folder, self.saved, self.say = task, loop, folder, saved, say
        self.stage = stage
        self.step = step
        self.rate = training.learning_rate(task.train)
        self.losses: list[float] = []  # since the last line
        self.loss = math.nan  # of the last line, or of what has come since the start
        self.norm = math.nan
        self.pending: list[dict[str, Any]] = []
        self.logged, self.since, self.seconds = step, time.perf_counter(), 0.0
        self.logs = open_logs(folder, step, csv=loop.csv, tensorboard=loop.tensorboard)

    def after(self, state: TrainState, said: dict[str, Any]) -> None:
        """Take note of the step that made `state`, which may still be computing."""
        self.step += 1
        self.pending.append(said)
        self._look(behind=1)  # so the device always has the next step to go on with
        last = self.step == self.task.train.steps
        if self.step % self.loop.log_every == 0 or last:
            self._look(behind=0)
            self._line()
        if self.step % self.loop.save_every == 0 and not last:
            self.save(state)
        if self.loop.sample_every and self.step % self.loop.sample_every == 0:
            self._look(behind=0)
            self._sample(state)

    def _look(self, behind: int) -> None:
        while len(self.pending) > behind:
            said = self.pending.pop(0)
            loss, norm = float(said["loss"]), float(said["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.saved.wait_until_finished()
                good = self.saved.latest_step()
                where = (
                    "nothing had been saved" if good is None else f"the last good state is step {good} in {self.folder}"
                )
                raise FloatingPointError(
                    f"step {self.step - len(self.pending)}: the loss is {loss}, its gradient's norm {norm}; {where}; "
                    "try a smaller lr, a longer warmup_steps, or float32"
                )
            self.losses.append(loss)
            self.norm = norm

    def _line(self) -> None:
        config, now = self.task.train, time.perf_counter()
        elapsed, steps = now - self.since, self.step - self.logged
        self.seconds += elapsed
        self.loss = sum(self.losses) / len(self.losses)
        speed = steps * config.batch_size / elapsed
        left = (config.steps - self.step) * elapsed / steps
        lr = float(self.rate(self.step // config.accumulate))
        self.say(
            f"step {self.step}/{config.steps}  loss {self.loss:.4f}  grad norm {self.norm:.3g}  {speed:.0f} images/s  "
            f"{_duration(left)} left"
        )
        record = {"step": self.step, "images": self.step * config.batch_size, "loss": self.loss, "grad_norm": self.norm}
        record |= {"lr": lr, "images_per_s": round(speed, 2), "seconds": round(self.seconds, 2)}
        for log in self.logs:
            log.write(record)
        self.losses, self.logged, self.since = [], self.step, time.perf_counter()

    def save(self, state: TrainState) -> None:
        """Save the state in the background, if it is not saved yet; only after its loss has been looked at."""
        self._look(behind=0)
        if self.step in (0, self.saved.latest_step()):
            return
        loss = sum(self.losses) / len(self.losses) if self.losses else self.loss
        with self._pause():
            ocp = orbax()
            self.saved.save(
                self.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    about=ocp.args.JsonSave({"step": self.step, "seed": self.task.train.seed, "loss": loss}),
                ),
                metrics={"loss": loss},
            )

    def _sample(self, state: TrainState) -> None:
        config = self.task.model
        labels = None
        if config.num_classes is not None:
            drawn = [i for i in range(config.num_classes) if i != self.task.train.null_label]
            labels = np.array(drawn)[np.arange(self.loop.sample_num) % len(drawn)]
        with self._pause():
            model = build_model(config, jax.device_put(state.ema, jax.devices()[0]))
            ddim = DDIM(model, make_schedule(self.task.schedule), self.task.sampler, autoencoder=self.stage)
            path = self.folder / "samples" / f"step-{self.step:08d}.png"
            try:
                drawn_images = ddim.sample(jax.random.key(self.task.train.seed), self.loop.sample_num, labels=labels)
                images.save_picture(path, images.grid(drawn_images), {"step": self.step})
                for log in self.logs:
                    log.picture(self.step, path)
            except FloatingPointError as error:
                self.say(f"no samples at step {self.step}: {error}")

    def close(self) -> None:
        """End the logs."""
        for log in self.logs:
            log.close()

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Time that is not training's."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _zeros(task: Task) -> Params:
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in flat_params(abstract_model(task.model)).items()}


def write_checkpoint(
    out: Path,
    task: Task,
    ema: Params,
    step: int,
    about: Mapping[str, Any],
    parent: Metadata | None,
    stage: Autoencoder | None = None,
    *,
    overwrite: bool = False,
) -> Metadata:
    """The averaged weights as an ordinary checkpoint, which says how it was trained."""
    provenance: dict[str, Any] = {
        "family": "jddim",
        "weights": "ema",
        "step": step,
        "training": about["task"]["train"],
        "data": about["data"],
        "versions": about["versions"],
    }
    if parent is not None:
        provenance["parent"] = about["parent"]
        kept = ("reference_options", "label_names", "autoencoder")
        provenance |= {name: parent.provenance[name] for name in kept if name in parent.provenance}
    weights = {name: np.asarray(value, np.float32) for name, value in ema.items()}
    if stage is not None:
        weights |= {FIRST_STAGE + name: np.asarray(value) for name, value in flat_params(stage).items()}
    own = None if stage is None else stage.config
    metadata = Metadata(task.model, task.schedule, task.sampler, provenance, autoencoder=own)
    return save_checkpoint(out, weights, metadata, overwrite=overwrite)


ENCODED = 8
"""Images that are encoded at a time."""


def _encoded(data: Data, task: Task, stage: Autoencoder) -> Data:
    """Latents of images, by the mean of the first stage's Gaussian; latents as they are.

    Raises FloatingPointError if the encoder makes a NaN or infinity.
    """
    if data.pixels.shape[1:] != image_shape(task.model, stage.config):
        return data
    program, latents = encode.bound(stage), []
    with Progress(len(data.pixels), "encoder") as progress:
        progress.compiling()
        for low in range(0, len(data.pixels), ENCODED):
            part = in_range(data.pixels[low : low + ENCODED])
            latents.append(np.asarray(by_parts(program, jnp.asarray(part), ENCODED)))
            if not np.isfinite(latents[-1]).all():
                told = f"a NaN or infinity of an image among {low}..{low + len(part) - 1} of the data"
                raise FloatingPointError(f"the first stage's encoder made {told}; check its weights (jddim verify)")
            progress.add(len(part))
    return data._replace(pixels=np.concatenate(latents))


# -- the folder -------------------------------------------------------------------------------------------------------


def _about(
    task: Task, data: Data, source: str, parent: Metadata | None, stage: Autoencoder | None = None
) -> dict[str, Any]:
    """What run.json says."""
    optax = training._optax()

    chosen = np.unique(np.linspace(0, len(data.pixels) - 1, 1000).astype(int))
    digest = hashlib.sha256(np.ascontiguousarray(data.pixels[chosen]).data)
    if data.labels is not None:
        digest.update(data.labels.data)
    shape = [int(n) for n in data.pixels.shape]
    latents = {}
    if stage is not None:
        encoded = data.pixels.shape[1:] == image_shape(task.model, stage.config)
        latents = {"latents": "encoded by the mean" if encoded else "as they are"}
    return {
        "format": "jddim-train",
        "format_version": FORMAT_VERSION,
        "task": task.to_json(),
        "data": {
            "source": _name(source),
            "shape": shape,
            "left_out": len(data.bad),
            "sha256_of_1000": digest.hexdigest(),
            **latents,
        },
        "parent": None if parent is None else {"sha256": parent.sha256, "family": parent.provenance.get("family")},
        "versions": {"jddim": __version__, "jax": jax.__version__, "optax": optax.__version__},
    }


def _name(source: str) -> str:
    """What is recorded of where data came from: of a path its last part, as nobody needs to know the rest."""
    return source if source.startswith(HUB) else Path(source).name


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError if the result may not be written to `out`."""
    if out.exists() and run_folder(out).exists() and not overwrite:
        raise CheckpointError(
            f"{out} exists, the result of {run_folder(out)}: move it away to go on with that run, with more steps, or "
            "begin anew with --overwrite"
        )
    check_destination(out, overwrite=overwrite)


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change between a run's parts; the number of steps may, where nothing else depends on it."""
    task = {name: dict(section) for name, section in about["task"].items()}
    if task["train"]["lr_schedule"] == "constant":
        del task["train"]["steps"]
    data = {name: value for name, value in about["data"].items() if name != "source"}
    return {"task": task, "data": data, "parent": about["parent"]}


def check_run(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise TrainError if `folder` is not a run of this task on this data."""
    try:
        before = read_json(folder / "run.json")
        if before["format"] != "jddim-train" or before["format_version"] != FORMAT_VERSION:
            raise ValueError("another format")
        rows = diff_mappings(_identity(before), _identity(about))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainError(f"{folder} exists and is no run of this jddim ({error}): remove it, or rename OUT") from error
    if rows:
        told = first_few([f"{row.name} was {row.a}, now {row.b}" for row in rows], 5)
        raise TrainError(
            f"{folder} is a run of another training: {told}. Choose another OUT, or begin anew with --overwrite"
        )


@contextlib.contextmanager
def _claimed(folder: Path, about: Mapping[str, Any], overwrite: bool, say: Callable[[str], None]) -> Iterator[None]:
    """The folder, there and this process's alone."""
    interrupt.unwind()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with open_lock(path) as file:
        if not lock(file):
            raise TrainError(f"another process is training in {folder}")
        try:
            if folder.exists() and overwrite:
                aside = next(
                    p for i in range(10**6) if not (p := folder.with_name(f"{folder.name}.old{i or ''}")).exists()
                )
                folder.rename(aside)
                say(f"beginning anew; the run that was there is now {aside}")
            if folder.exists():
                check_run(folder, about)  # again: another may have begun since
            folder.mkdir(exist_ok=True)
            with images.atomic(folder / "run.json") as staging:
                staging.write_text(json.dumps(about, indent=2) + "\n")
            yield
        finally:
            path.unlink(missing_ok=True)


class _Best:
    """Which saved states are among the n of least loss: Orbax's BestN, but for states that an earlier process saved.

    Of those Orbax knows no metrics, and keeps all; their loss stands in their own item "about".
    """

    def __init__(self, folder: Path, n: int):
        self.folder, self.n = folder, n

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = {info.step: self._loss(info) for info in checkpoints}
        best = sorted(losses, key=lambda step: losses[step])[: self.n]
        return [info.step in best for info in checkpoints]

    def _loss(self, info: Any) -> float:
        if info.metrics:
            return float(info.metrics["loss"])
        try:
            return float(read_json(self.folder / f"step_{info.step:08d}" / "about" / "metadata")["loss"])
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf  # a damaged one is no best


@contextlib.contextmanager
def _saved_steps(folder: Path, loop: LoopConfig) -> Iterator[Any]:
    ocp = orbax()
    from orbax.checkpoint import checkpoint_managers as managers

    kept: list[Any] = [managers.LatestN(loop.keep_last)]
    if loop.keep_best:
        kept.append(_Best(folder / "steps", loop.keep_best))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(kept),
        step_prefix="step",
        step_format_fixed_length=8,
        cleanup_tmp_directories=True,  # of saves that were cut short
        enable_async_checkpointing=True,
    )
    try:
        steps, names = (folder / "steps").absolute(), ("state", "about")
        with quiet_orbax(), ocp.CheckpointManager(steps, options=options, item_names=names) as manager:
            yield manager
    except Exception as error:  # whatever Orbax makes of it
        if not is_full_disk(error):
            raise
        for half in (folder / "steps").glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(half, ignore_errors=True)
        told = f"{os.strerror(errno.ENOSPC)}; with room there, the same command goes on from the last whole save"
        raise OSError(errno.ENOSPC, told, str(folder)) from error


def _restore(saved: Any, step: int, abstract: TrainState) -> TrainState:
    ocp = orbax()
    target = ocp.args.StandardRestore(abstract._asdict())
    try:
        restored = saved.restore(step, args=ocp.args.Composite(state=target))["state"]
    except Exception as error:  # whatever Orbax raises: the folder is not as it was written
        told = str(error).strip().splitlines()
        raise CheckpointError(
            f"step {step} cannot be read ({type(error).__name__}: {told[0][:200] if told else ''}): remove its folder "
            f"in {saved.directory} to go on from the one before"
        ) from error
    return TrainState(**restored)
