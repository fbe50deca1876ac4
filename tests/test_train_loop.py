"""A run that was stopped, or killed, equals one that was not; what it keeps, says and refuses; what comes out of it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from tiny import random_model, small_config, tree

import jddim
from jddim.checkpoint.folder import load_metadata, load_params
from jddim.cli.main import main
from jddim.config import SamplerConfig, ScheduleConfig
from jddim.images import from_uint8
from jddim.installing import install_line
from jddim.models.building import build_model, flat_params
from jddim.train import logs as train_logs
from jddim.train import loop as train_loop
from jddim.train import step as training
from jddim.train.data import Data, Order
from jddim.train.loop import LoopConfig, TrainError, train
from jddim.train.task import Task, TrainConfig

pytestmark = pytest.mark.unoptimised

RNG = np.random.default_rng(9)
PIXELS = RNG.integers(0, 256, (11, 6, 10, 1), dtype=np.uint8)
CLASSES = RNG.integers(0, 3, 11).astype(np.int32)
DATA = Data(PIXELS, CLASSES)
MODEL: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
MODEL |= {"class_embedding": "learned", "num_classes": 4}
TRAIN: dict[str, Any] = {
    "batch_size": 4,
    "warmup_steps": 3,
    "lr": 1e-3,
    "flip": True,
    "accumulate": 2,
    "ema_decay": 0.9,
}
TRAIN |= {"label_dropout": 0.3, "null_label": 3, "seed": 5}


def job(**fields: Any) -> Task:
    sampler = SamplerConfig(spacing="uniform", num_steps=2, clip=True)
    return Task(
        small_config(**MODEL), ScheduleConfig("linear", 50, 1e-3, 0.2), sampler, TrainConfig(**(TRAIN | fields))
    )


CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The compiled step is kept for the module's runs, as the command keeps it for the next."""
    names = dict(zip(CACHE, (str(tmp_path_factory.mktemp("cache")), 0, 0), strict=True))
    before = {name: getattr(jax.config, name) for name in names}
    for settings in (names, before):
        compilation_cache.reset_cache()
        for name, value in settings.items():
            jax.config.update(name, value)
        if settings is names:
            yield
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def start() -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in flat_params(random_model(small_config(**MODEL))).items()}


@pytest.fixture
def run(start: dict[str, np.ndarray]) -> Callable[..., list[str]]:
    """Train, from the same weights each time; what was said."""

    def of(task: Task, out: Path, loop: LoopConfig | None = None, data: Data = DATA, **options: Any) -> list[str]:
        said: list[str] = []
        train(task, data, out, loop, params=start, say=said.append, **options)
        return said

    return of


def states(out: Path) -> dict[int, Any]:
    """Every leaf of every saved state, by step."""
    import orbax.checkpoint as ocp

    with train_loop._saved_steps(train_loop.run_folder(out), LoopConfig(keep_last=99)) as manager:
        found = {}
        for step in manager.all_steps():
            args = ocp.args.Composite(state=ocp.args.StandardRestore())
            found[step] = jax.tree.map(np.asarray, manager.restore(step, args=args)["state"])
        return found


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def test_going_on_is_as_if_nothing_had_stopped_it(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    loop = LoopConfig(log_every=2, save_every=3, sample_every=6, sample_num=5, keep_last=2, keep_best=0)
    straight = run(job(steps=14), tmp_path / "a", loop)
    run(job(steps=8), tmp_path / "b", loop)
    (tmp_path / "b").rename(tmp_path / "first")
    log = train_loop.run_folder(tmp_path / "b") / "log.jsonl"
    with log.open("a") as file:  # what a killed run had logged beyond its last saved state
        file.write('{"step": 10, "loss": 0}\n{"step": 1')
    again = run(job(steps=14), tmp_path / "b", dataclasses.replace(loop, csv=True))
    a, b = states(tmp_path / "a"), states(tmp_path / "b")
    assert sorted(a) == sorted(b) == [12, 14]
    assert_same_bits(a, b)
    assert load_metadata(tmp_path / "a").params_sha256 == load_metadata(tmp_path / "b").params_sha256
    assert again[0] == f"going on after step 8 of {train_loop.run_folder(tmp_path / 'b')}"
    assert straight[-1].startswith("step 14/14  loss ")
    assert "0 s left" in straight[-1]
    logs = [json.loads(line) for line in log.read_text().splitlines()]
    expected = (train_loop.run_folder(tmp_path / "a") / "log.jsonl").read_text().splitlines()
    with (train_loop.run_folder(tmp_path / "b") / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in table] == logs  # the steps before --csv was given too
    for mine, theirs in zip(logs, map(json.loads, expected), strict=True):
        assert {k: mine[k] for k in ("step", "images", "loss", "grad_norm", "lr")} == {
            k: theirs[k] for k in ("step", "images", "loss", "grad_norm", "lr")
        }
    pictures = sorted((train_loop.run_folder(tmp_path / "b") / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:08d}.png" for step in (6, 12)]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (
            13 * (3 * 12 + 2),
            13 * (2 * 8 + 2),
        )  # 5 of 10 x 6, in 3 columns, as large as can be seen


def test_a_damaged_log_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged: move it away"):
        train_logs.JsonLines(tmp_path / "log.jsonl", 3)


def test_no_more_states_are_kept_however_often_it_was_stopped(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    loop = LoopConfig(log_every=1, save_every=1, keep_last=1, keep_best=1)
    for steps in (4, 8, 12):
        run(job(steps=steps), tmp_path / "out", loop)
        (tmp_path / "out").rename(tmp_path / f"after-{steps}")
    log = (train_loop.run_folder(tmp_path / "out") / "log.jsonl").read_text().splitlines()
    best = 1 + int(np.argmin([json.loads(line)["loss"] for line in log]))
    assert sorted(states(tmp_path / "out")) == sorted({12, best})


def test_tensorboard_shows_what_the_log_has(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    pytest.importorskip("tensorboard", reason="reading TensorBoard's files needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = LoopConfig(log_every=2, save_every=3, sample_every=4, sample_num=2, tensorboard=True)
    run(job(steps=4), tmp_path / "out", loop)
    (tmp_path / "out").rename(tmp_path / "first")
    folder = train_loop.run_folder(tmp_path / "out")
    beyond = train_logs.TensorBoard(folder / "tensorboard", 4)  # what a killed run said beyond its last saved state
    beyond.write({"step": 6, "loss": 7.0})
    beyond.close()
    run(job(steps=6), tmp_path / "out", loop)
    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm", "lr", "images_per_s"):
        assert [(event.step, event.value) for event in shown.Scalars(name)] == [
            (record["step"], np.float32(record[name])) for record in logged
        ]
    (picture,) = shown.Images("samples")
    assert picture.step == 4
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_a_null_label_that_images_have(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    with pytest.raises(TrainError, match=rf"null_label 1 is the label of {(CLASSES == 1).sum()} images, and must be"):
        run(job(null_label=1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tensorboard_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape(install_line("tensorboard"))):
        LoopConfig(tensorboard=True)


def test_what_comes_out_is_a_checkpoint_and_the_best_state_is_kept(
    tmp_path: Path, run: Callable[..., list[str]]
) -> None:
    task = job(steps=6)
    loop = LoopConfig(log_every=1, save_every=1, keep_last=1, keep_best=1)
    run(task, tmp_path / "out", loop, source=str(tmp_path / "DATA"))
    ddim = jddim.load(tmp_path / "out")
    assert ddim.sample(jax.random.key(0), 3, labels=np.array([0, 1, 2])).shape == (3, 6, 10, 1)
    assert (ddim.sampler, ddim.metadata.model) == (task.sampler, task.model)
    said = ddim.metadata.provenance
    assert (said["family"], said["weights"], said["step"]) == ("jddim", "ema", 6)
    assert said["training"]["ema_decay"] == 0.9
    assert said["data"]["source"] == "DATA"  # and not where it lies on its maker's disk
    assert not [name for name, held in tree(tmp_path / "out").items() if held and tmp_path.name.encode() in held]
    log = (train_loop.run_folder(tmp_path / "out") / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    kept = states(tmp_path / "out")
    assert sorted(kept) == sorted({6, 1 + int(np.argmin(losses))})
    state = kept[6]
    params = load_params(tmp_path / "out", ddim.metadata)
    for name, value in state["ema"].items():
        np.testing.assert_array_equal(params[name], value)


def test_it_goes_back_to_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="writing PyTorch's files needs torch")
    config = small_config(image_size=(8, 8))
    task = Task(config)
    params = flat_params(random_model(config))
    about = train_loop._about(task, Data(np.zeros((3, 8, 8, 1), np.uint8), None), "DATA", None)
    written = train_loop.write_checkpoint(tmp_path / "out", task, params, 7, about, None)
    assert main(["export-torch", str(tmp_path / "out"), str(tmp_path / "back"), "--format", "ermongroup"]) == 0
    assert main(["convert", str(tmp_path / "back"), str(tmp_path / "again"), "--no-verify"]) == 0
    again = load_metadata(tmp_path / "again")
    assert again.params_sha256 == written.params_sha256
    assert again.model == config


def test_a_loss_that_is_not_finite_stops_it_and_the_last_good_state_is_named(
    tmp_path: Path, run: Callable[..., list[str]]
) -> None:
    order = Order(11, 4, seed=5)
    second = order.rows(1)[0][0]
    assert second not in order.rows(0)[0].tolist()
    pixels = from_uint8(PIXELS)
    pixels[second, 3, 5, 0] = np.inf
    with pytest.raises(
        FloatingPointError, match=r"step 2: the loss is (nan|inf), .*; the last good state is step 1 in "
    ):
        run(job(steps=20), tmp_path / "out", LoopConfig(save_every=1), Data(pixels, CLASSES))
    assert not (tmp_path / "out").exists()
    assert list(states(tmp_path / "out")) == [1]


def test_nothing_is_overwritten_silently(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    out, loop = tmp_path / "out", LoopConfig()
    run(job(steps=2), out, loop)
    with pytest.raises(ValueError, match=r"out exists, the result of .*out\.run: move it away to go on with that run"):
        run(job(steps=4), out, loop)
    out.rename(tmp_path / "kept")
    for task, data, message in (
        (job(steps=4, seed=6), DATA, "task.train.seed was 5, now 6"),
        (job(steps=4), Data(PIXELS[::-1], CLASSES), "data.sha256_of_1000 was"),
    ):
        with pytest.raises(TrainError, match=f"another training: {message}"):
            run(task, out, loop, data)
    other = train_loop._about(job(steps=4, seed=6), DATA, "", None)
    claimed = train_loop._claimed(train_loop.run_folder(out), other, False, print)
    with pytest.raises(TrainError, match="another training"), claimed:  # one that began between its check and its lock
        pass
    mine = train_loop._about(job(steps=4), DATA, "", None)
    with train_loop._claimed(train_loop.run_folder(out), mine, False, print):
        for _ in range(2):  # neither takes the lock away
            with pytest.raises(TrainError, match=r"another process is training in .*out\.run"):
                run(job(steps=4), out, loop)
    run(job(steps=4), out, loop)  # further
    assert not list(tmp_path.glob(".*"))
    out.rename(tmp_path / "further")
    with pytest.raises(TrainError, match="is after step 4 already, beyond the 2 asked for"):
        run(job(steps=2), out, loop)
    (tmp_path / "kept").rename(out)
    before = (train_loop.run_folder(out) / "log.jsonl").read_text()
    said = run(job(steps=2, seed=6), out, loop, overwrite=True)
    old = tmp_path / "out.run.old"
    assert f"beginning anew; the run that was there is now {old}" in said
    assert (old / "log.jsonl").read_text() == before
    assert load_metadata(out).provenance["training"]["seed"] == 6


# -- the command ------------------------------------------------------------------------------------------------------


def write_config(folder: Path, **fields: Any) -> list[str]:
    """A configuration and its data; the command's first words."""
    (folder / "config.json").write_text(json.dumps(job(**fields).to_json()))
    np.savez(folder / "data.npz", PIXELS, CLASSES)
    return ["train", str(folder / "config.json"), str(folder / "data.npz")]


def test_killed_and_told_to_stop_at_any_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*write_config(tmp_path, steps=1200), "--log-every", "10", "--save-every", "10", "--keep-best", "0"]

    def stopped(number: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "jddim", *words[:3], str(tmp_path / "b"), *words[3:]]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        # the same programs as this process has
        env = os.environ | {name.upper(): str(getattr(jax.config, name)) for name in CACHE}
        process = subprocess.Popen(command, env=env, **pipes)
        assert process.stdout is not None
        lines = []
        while sum(line.startswith("step ") for line in lines) < 3:
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        process.send_signal(number)
        rest, error = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, "".join(lines) + rest, error)

    assert stopped(signal.SIGKILL).returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    ended = stopped(signal.SIGTERM)
    assert ended.returncode == 143, ended
    assert "going on after step " in ended.stdout
    last = int(ended.stderr.removeprefix("jddim: interrupted after step ").partition(" ")[0])
    assert ended.stderr == (
        f"jddim: interrupted after step {last} of 1200; saved in {tmp_path / 'b'}.run: the same command goes on\n"
    )
    assert max(states(tmp_path / "b")) == last
    end = ["--set", f"steps={last // 2 * 2 + 4}"]  # a constant learning rate: the end may be another
    assert main([*words[:3], str(tmp_path / "b"), *words[3:], *end]) == 0
    assert main([*words[:3], str(tmp_path / "a"), *end]) == 0
    assert f"going on after step {last} of" in capsys.readouterr().out
    a, b = states(tmp_path / "a"), states(tmp_path / "b")
    assert_same_bits(a[max(a)], b[max(b)])
    assert load_metadata(tmp_path / "a").params_sha256 == load_metadata(tmp_path / "b").params_sha256


def test_a_checkpoint_is_trained_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = write_config(tmp_path, steps=2)
    assert main([*words, str(tmp_path / "one")]) == 0
    words[1] = str(tmp_path / "one")
    words += [w for name, value in {**TRAIN, "flip": "true"}.items() for w in ("--set", f"{name}={value}")]
    assert main([*words[:3], str(tmp_path / "two"), *words[3:], "--set", "steps=4", "--set", "seed=6"]) == 0
    one, two = (load_metadata(tmp_path / name) for name in ("one", "two"))
    assert two.provenance["parent"] == {"sha256": one.sha256, "family": "jddim"}
    before, after = (load_params(tmp_path / name, m) for name, m in (("one", one), ("two", two)))
    moved = max(np.abs(after[name] - before[name]).max() for name in before)
    assert 0 < moved <= 1e-3  # the second update has a third of lr, Adam's step about that
    capsys.readouterr()
    assert main(["info", str(tmp_path / "two")]) == 0
    assert ", seed=6, " in capsys.readouterr().out


def test_classes_are_given_to_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    ckpt, task = tmp_path / "ckpt", job()
    plain = small_config(**{**MODEL, "class_embedding": None, "num_classes": None})
    before = dataclasses.replace(task, model=plain, train=TrainConfig())
    about = train_loop._about(before, Data(PIXELS, None), "", None)
    train_loop.write_checkpoint(ckpt, before, flat_params(random_model(plain)), 7, about, None)
    metadata = load_metadata(ckpt)
    model, params = training.with_classes(metadata.model, load_params(ckpt, metadata), 4, null_label=2)
    x, t = RNG.standard_normal((3, 6, 10, 1), dtype=np.float32), np.array([3, 999, 41])
    labelled = jax.jit(lambda m, *rest: m(*rest))(build_model(model, params), x, t, np.array([2, 3, 1]))
    unlabelled = jax.jit(lambda m, *rest: m(*rest))(jddim.load(ckpt).model, x, t)
    np.testing.assert_array_equal(labelled[0], unlabelled[0])
    # Labels must matter from the start, or training has nothing to begin with.
    assert (np.abs(labelled[1:] - unlabelled[1:]).max(axis=(1, 2, 3)) > 1e-3).all()

    words = [write_config(tmp_path)[0], str(ckpt), str(tmp_path / "data.npz"), str(tmp_path / "out"), "--classes", "4"]
    settings = {**TRAIN, "flip": "true", "steps": 4}
    assert main([*words, *(w for name, value in settings.items() for w in ("--set", f"{name}={value}"))]) == 0
    table = load_params(tmp_path / "out", load_metadata(tmp_path / "out"))["class_embed.embedding"]
    assert table.shape == (4, 32)
    assert 0 < np.abs(table[3]).max() < 0.1  # the null label's, which no image of the data has: 0 but for training
    with pytest.raises(ValueError, match=r"null_label must be one of the 4 classes, 0\.\.3, got 4"):
        training.with_classes(plain, params, 4, null_label=4)
    with pytest.raises(ValueError, match="this network has classes"):
        training.with_classes(model, params, 5)


def test_mistakes_are_one_line(tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = write_config(tmp_path, steps=2)
    out = tmp_path / "out"
    (tmp_path / "bad.json").write_text('{"model": {}')
    (tmp_path / "typo.json").write_text(json.dumps({**job(steps=2).to_json(), "train": {"lrr": 1}}))
    assert "unknown key 'lrr' (did you mean 'lr'" in fails("train", tmp_path / "typo.json", words[2], out)
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04\x80\x02")
    assert "weights.pt is truncated" in fails("train", tmp_path / "weights.pt", words[2], out)
    assert "is no configuration in JSON" in fails("train", tmp_path / "bad.json", words[2], out)
    assert "no checkpoint at" in fails("train", tmp_path / "absent", words[2], out)
    assert "no such file or folder" in fails(*words[:2], tmp_path / "absent", out)
    assert "--set takes KEY=VALUE" in fails(*words, out, "--set", "lr")
    assert "config.json with --set lr=-1: train: lr must be above 0, got -1" in fails(*words, out, "--set", "lr=-1")
    assert "clip_norm must be float or None, got 'none'" in fails(*words, out, "--set", "clip_norm=none")
    assert "null_label must be int or None, got 'abc'" in fails(*words, out, "--set", 'null_label="abc"')
    assert "null_label must be one of the labels, or null" in fails(*words, out, "--set", "null_label=-1")
    assert "KEY=VALUE" in fails(*words, out, "--set", "[" * 50_000)
    (tmp_path / "deep.json").write_text('{"model":' * 50_000)
    assert "deep in each other" in fails("train", tmp_path / "deep.json", words[2], out)
    os.mkfifo(tmp_path / "pipe.json")
    assert "is a pipe or a device" in fails("train", tmp_path / "pipe.json", words[2], out)
    assert "save_every must be at least 1" in fails(*words, out, "--save-every", 0)
    assert "--classes is for a checkpoint" in fails(*words, out, "--classes", 3)
    assert "is not a jddim checkpoint" in fails(*words, tmp_path / "data.npz", "--overwrite")
    monkeypatch.setitem(sys.modules, "optax", None)
    assert install_line("train") in fails(*words, out)


def test_the_same_on_devices_of_a_mesh(tmp_path: Path) -> None:
    """In a process of its own: a run begun on two devices goes on on one, equal to rounding."""
    words = [*write_config(tmp_path, steps=6), str(tmp_path / "out")]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    code = f"from jddim.cli.main import main; assert main({[*words, '--set', 'steps=4', '--devices', '2']!r}) == 0"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, "11 images, 2 cpu" in done.stdout) == (0, True), done
    (tmp_path / "out").rename(tmp_path / "four")
    for name in ("out", "alone"):
        assert main([*words[:3], str(tmp_path / name)]) == 0
    a, b = (load_params(tmp_path / name, load_metadata(tmp_path / name)) for name in ("out", "alone"))
    far = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
    assert np.median(far) < 1e-6  # where a gradient is nearly 0, Adam makes a step of rounding
    assert dataclasses.asdict(job(steps=6).train)["steps"] == load_metadata(tmp_path / "out").provenance["step"]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    half = tmp_path / "steps" / "step_00000007.orbax-checkpoint-tmp"

    def save() -> None:
        half.mkdir(parents=True)  # now, since Orbax clears up as it begins
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 25387 bytes: No space left on device")

    with (
        pytest.raises(OSError, match="with room there, the same command goes on") as caught,
        train_loop._saved_steps(tmp_path, LoopConfig()),
    ):
        save()
    assert caught.value.filename == str(tmp_path)
    assert not half.exists()
