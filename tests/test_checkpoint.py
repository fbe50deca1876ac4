"""Checkpoints: what is written is what loads, and nothing else loads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from tiny import tree

from jddim.checkpoint.card import lines
from jddim.checkpoint.cite import bibtex, citations
from jddim.checkpoint.folder import CheckpointError, check_destination, load_metadata, load_params, save_checkpoint
from jddim.checkpoint.metadata import Metadata
from jddim.checkpoint.orbax import orbax, quiet_orbax
from jddim.config import DiTConfig, LucidrainsConfig, SamplerConfig, ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, build_model, flat_params
from jddim.pipeline import load

pytestmark = pytest.mark.quick

CONFIG = UNetConfig(
    (6, 10), 2, 2, channels=6, channel_mults=(1, 2), num_res_blocks=1, attention_levels=(1,), norm_groups=3
)
METADATA = Metadata(
    CONFIG,
    ScheduleConfig("betas", 3, betas=(0.1, 1 / 3, 0.7)),
    SamplerConfig("quad", num_steps=3, eta=0.3),
    {"weights": "ema"},
)


def random_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: leaf.shape for name, leaf in flat_params(abstract_model(CONFIG)).items()}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    params = random_params()
    written = save_checkpoint(tmp_path / "a" / "ckpt", params, METADATA)
    metadata = load_metadata(tmp_path / "a" / "ckpt")
    assert metadata == written
    assert dataclasses.replace(metadata, params_sha256="") == METADATA
    chex.assert_trees_all_equal(load_params(tmp_path / "a" / "ckpt", metadata), params)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["ckpt"]  # no temporary folder is left
    ddim = load(tmp_path / "a" / "ckpt")
    chex.assert_trees_all_equal(flat_params(ddim.model), params)
    assert ddim.schedule.betas.tolist() == [0.1, 1 / 3, 0.7]
    assert ddim.sampler == METADATA.sampler


def test_saving_copies_no_parameters(tmp_path: Path) -> None:
    """Or the memory of a conversion would be twice its file's."""
    config = DiTConfig((4, 4), channels=256, depth=2, num_heads=2)
    shapes = {name: leaf.shape for name, leaf in flat_params(abstract_model(config)).items()}
    params = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    metadata = dataclasses.replace(METADATA, model=config)
    orbax()  # its modules take memory too
    tracemalloc.start()
    try:
        save_checkpoint(tmp_path / "ckpt", params, metadata)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.5 * sum(value.nbytes for value in params.values())


def test_the_same_contents_have_the_same_identity(tmp_path: Path) -> None:
    one, two = (save_checkpoint(tmp_path / name, random_params(), METADATA) for name in "ab")
    other = save_checkpoint(tmp_path / "c", random_params(1), METADATA)
    assert one.sha256 == two.sha256 != other.sha256


def test_overwriting_is_asked_for_and_only_of_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    save_checkpoint(path, random_params(), METADATA)
    with pytest.raises(CheckpointError, match=r"exists.*--overwrite"):
        save_checkpoint(path, random_params(1), METADATA)
    chex.assert_trees_all_equal(load_params(path, load_metadata(path)), random_params())
    save_checkpoint(path, random_params(1), METADATA, overwrite=True)
    chex.assert_trees_all_equal(load_params(path, load_metadata(path)), random_params(1))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "thesis" / "metadata").mkdir()
    (tmp_path / "thesis" / "metadata" / "metadata").write_text("{}")  # other tools write such, Orbax among them
    with pytest.raises(CheckpointError, match="not a jddim checkpoint"):
        save_checkpoint(tmp_path / "thesis", random_params(), METADATA, overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ckpt"
    save_checkpoint(path, random_params(), METADATA)

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("jddim.checkpoint.folder.card", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, random_params(1), METADATA, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    chex.assert_trees_all_equal(load_params(path, load_metadata(path)), random_params())


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_it_is_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    path = tmp_path / "ckpt"

    def appears(*_: object) -> str:
        path.mkdir()
        (path / "thesis").write_text("years of work")
        return ""

    monkeypatch.setattr("jddim.checkpoint.folder.card", appears)
    with pytest.raises(CheckpointError, match="ckpt appeared while the checkpoint was written, and was left as it is"):
        save_checkpoint(path, random_params(), METADATA, overwrite=overwrite)
    assert tree(tmp_path) == {"ckpt": None, "ckpt/thesis": b"years of work"}


def test_a_folder_moved_aside_by_a_killed_process_is_found(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ckpt", random_params(), METADATA)
    left = tmp_path / ".ckpt.0123abcd.tmp"
    for read in (load_metadata, lambda path: check_destination(path, overwrite=True)):
        (left / "new.orbax-checkpoint-tmp").mkdir(parents=True)
        (tmp_path / "ckpt").rename(left / "old")
        read(tmp_path / "ckpt")
        assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_nothing_written_says_where_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ckpt", random_params(), METADATA)
    for file in (tmp_path / "ckpt").rglob("*"):
        assert not file.is_file() or tmp_path.name.encode() not in file.read_bytes(), file


def test_a_full_disk_names_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 25387 bytes to file 5: No space left on device")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)  # its own way of saying so
    with pytest.raises(OSError, match="No space") as caught:
        save_checkpoint(tmp_path / "a" / "ckpt", random_params(), METADATA)
    assert caught.value.filename == str(tmp_path / "a" / "ckpt")
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit_are_all_named() -> None:
    params = random_params()
    del params["conv_in.bias"]
    params["extra.kernel"] = np.zeros(3, np.float32)
    params["conv_out.bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="3 parameters do not fit") as raised:
        build_model(CONFIG, params)
    for text in (
        "missing conv_in.bias (6,)",
        "unexpected extra.kernel (3,)",
        "conv_out.bias has shape (3,), the model's is (2,)",
    ):
        assert text in str(raised.value)


def test_a_checkpoint_loads_whatever_the_number_of_devices(tmp_path: Path) -> None:
    """Written here on one device; read in a process that has four."""
    save_checkpoint(tmp_path / "ckpt", random_params(), METADATA)
    code = (
        "import jax, jddim; assert jax.device_count() == 4; "
        f"print(float(jddim.load({str(tmp_path / 'ckpt')!r}).model.conv_in.bias[...].sum()))"
    )
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": ""}
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) == pytest.approx(random_params()["conv_in.bias"].sum(), rel=1e-6)


def test_the_model_is_built_without_allocating() -> None:
    leaves = jax.tree.leaves(abstract_model(UNetConfig((256, 256), channels=512)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(
            (2, 2), channels=10, channel_mults=(1,), attention_levels=(), norm_groups=5, time_embedding="fourier"
        ),
        LucidrainsConfig(
            (2, 2), (False, True), (1, 2), (3, 5), channels=10, channel_mults=(1, 1), time_embedding="learned"
        ),
    ],
)
def test_parameters_are_float32_whatever_jaxs_default_is(config: UNetConfig | LucidrainsConfig) -> None:
    # they were float64 in parts under JAX_ENABLE_X64, and so had another digest than the folder's
    with jax.enable_x64(True):
        dtypes = {leaf.dtype for leaf in flat_params(abstract_model(config)).values()}
    assert dtypes == {np.dtype(np.float32)}


def test_other_libraries_loggers_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Orbax logs through absl's logger, as much else does."""
    logger = logging.getLogger("absl")
    before = logger.level, list(logger.filters)
    save_checkpoint(tmp_path / "ckpt", random_params(), METADATA)
    load(tmp_path / "ckpt")
    with quiet_orbax():
        logger.warning("another's")
        logger.handle(logger.makeRecord("absl", logging.WARNING, "/orbax/checkpoint/it.py", 1, "Orbax's", (), None))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == ["another's"]
    assert (logger.level, logger.filters) == before


# -- folders of somebody else's ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "ckpt"
    save_checkpoint(path, random_params(), METADATA)
    return path


def sealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metadata, and give it its digest again."""
    path = folder / "metadata" / "metadata"
    data = json.loads(path.read_text())
    change(data)
    rest = {name: value for name, value in data.items() if name != "sha256"}
    path.write_text(
        json.dumps({**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()})
    )


WRONG: list[Any] = [None, True, -1, 1e999, "9" * 5000, [], {}, [[1]], {"a": [None]}, 2**40]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("part", ["", "model", "schedule", "sampler", "provenance"])
def test_metadata_of_other_types(whole: Path, tmp_path: Path, part: str) -> None:
    """Each field is each of WRONG: the folder is refused, or the value is one that the field may have."""
    folder = shutil.copytree(whole, tmp_path / "ckpt")
    sealed(folder, lambda data: data["provenance"].update(PROVENANCE))
    text = (folder / "metadata" / "metadata").read_text()
    names = json.loads(text)[part] if part else json.loads(text)
    refused = 0
    for name in names:
        for value in WRONG:
            (folder / "metadata" / "metadata").write_text(text)
            sealed(folder, lambda data, name=name, value=value: (data[part] if part else data).update({name: value}))
            try:
                metadata = load_metadata(folder)
                lines(metadata, 1)
                bibtex(*citations(metadata.provenance))
                repr(metadata.null_label)
            except CheckpointError as error:
                assert len(str(error)) < 1000  # noqa: PT017
                refused += 1
    assert refused > len(names)


PROVENANCE = {
    "family": "ho",
    "source": {"file": "a.pt", "sha256": "0" * 64},
    "preset": None,
    "set": {"image_size": "6"},
    "step": 7,
    "wording": {"schedule": {"beta_schedule": "linear"}, "sampler": {}, "told": {}},
    "verification": {"blocks": {"out": 1e-6}, "output_error": 1e-6, "torch": "2"},
    "training": {"null_label": 3},
    "parent": {"family": "openai", "sha256": "0" * 64},
    "reference_options": {},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(provenance=None), "provenance is missing or no dict"),
        (lambda data: data["model"].update(type=["unet"]), "unknown model type"),
        (lambda data: data["model"].update(num_res_blocks=1_000_000), "num_res_blocks=1000000 on 2 levels: beyond 100"),
        (lambda data: data["model"].update(channels=2**50), "channels=1125899906842624 is beyond 1,000,000"),
        (lambda data: data["model"].update(channel_mults=[1e6, float("nan")]), "channel_mults=.* is beyond"),
        (lambda data: data["model"].update(attention_levels=list(range(99))), "99 entries, more than 16 levels"),
        (
            lambda data: data["model"].update(image_size=[6, True]),
            r"image_size must be tuple\[int, int\], got \(6, True",
        ),
        (lambda data: data["schedule"].update(betas=["a"] * 1000), "betas must be .*, got \\('a', .{40,60}\\.\\.\\."),
        (lambda data: data["sampler"].update(clip=1), "clip must be bool, got 1"),
        (lambda data: data["provenance"].update(source={"file": 3}), "provenance.source.file must be str, got 3"),
        (lambda data: data["provenance"].update(training=[]), r"provenance.training must be an object, got \[\]"),
    ],
)
@pytest.mark.timeout(60)
def test_metadata_edited_and_sealed_again(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "ckpt")
    sealed(folder, change)
    with pytest.raises(CheckpointError, match=f"metadata is damaged or edited .*{message}"):
        load_metadata(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": "jddim", "format": "jddim"}', "9" * 9999, "", "\xff"])
def test_metadata_that_is_no_json_of_ours(whole: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "ckpt")
    (folder / "metadata" / "metadata").write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError, match=r"metadata cannot be read|does not say so"):
        load_metadata(folder)


def test_what_could_not_be_loaded_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"would not load again, so it is not written: .*beyond 64 bits"):
        save_checkpoint(tmp_path / "ckpt", random_params(), dataclasses.replace(METADATA, provenance={"step": 10**30}))
    assert not list(tmp_path.iterdir())


ATTACK = """
import resource, sys
from pathlib import Path
import jax
from jddim.checkpoint.card import lines
from jddim.checkpoint.cite import bibtex, citations
from jddim.checkpoint.folder import CheckpointError, load_metadata, load_params
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**32
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in sys.argv[1:]:
    try:
        load_params(folder, load_metadata(folder))
        print("read")
    except CheckpointError as error:
        print(error)
"""


def test_stored_arrays_that_are_not_the_configs(whole: Path, tmp_path: Path) -> None:
    """What they say of themselves would take terabytes: std::bad_alloc ends the process, so it is another one here."""
    ocp = orbax()
    plain = shutil.copytree(whole, tmp_path / "plain")
    shutil.rmtree(plain / "params")
    nested: dict[str, Any] = {}
    for name, value in random_params().items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_ocdbt=False, use_compression=False)
    with quiet_orbax(), ocp.Checkpointer(handler) as checkpointer:  # each array's zarr.json is a file of its own so
        checkpointer.save(plain / "params", args=ocp.args.PyTreeSave(nested))

    def edited(name: str, change: Callable[[dict[str, Any]], object]) -> None:
        file = shutil.copytree(plain, tmp_path / name) / "params" / "conv_out.kernel" / "zarr.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    def as_one_chunk(data: dict[str, Any]) -> None:
        data["chunk_grid"]["configuration"]["chunk_shape"] = [10**4] * 4
        data["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]

    def in_large_shards(data: dict[str, Any]) -> None:
        data["chunk_grid"]["configuration"]["chunk_shape"] = [3 * 10**3, 3 * 10**3, 6 * 10**2, 2]

    edited("shape", lambda data: data.update(shape=[10**9] * 4))
    edited("chunks", as_one_chunk)
    edited("shards", in_large_shards)
    shutil.rmtree(shutil.copytree(plain, tmp_path / "fewer") / "params" / "conv_out.bias")
    sealed(shutil.copytree(plain, tmp_path / "deeper"), lambda data: data["model"].update(num_res_blocks=2))
    sealed(shutil.copytree(plain, tmp_path / "config"), lambda data: data["model"].update(channels=600))
    empty = shutil.copytree(whole, tmp_path / "empty")
    for file in (empty / "params").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    pipe = shutil.copytree(whole, tmp_path / "pipe")
    for name in ("params/manifest.ocdbt", "metadata/commit_success.txt"):
        (pipe / name).unlink()
        os.mkfifo(pipe / name)
    asked = shutil.copytree(whole, tmp_path / "asked")
    (asked / "metadata" / "metadata").unlink()
    os.mkfifo(asked / "metadata" / "metadata")
    names = {
        "plain": "read",
        "shape": "conv_out.kernel is stored as (1000000000, ",
        "chunks": "conv_out.kernel is stored in chunks of (10000, ",
        "shards": "params",
        "fewer": "parameters are incomplete or damaged",
        "deeper": "arrays are stored or the config's alone, among them ",
        "config": " is stored as ",
        "empty": "parameters are incomplete or damaged",
        "pipe": "is a pipe or a device",
        "asked": "metadata cannot be read",
    }
    done = subprocess.run(
        [sys.executable, "-c", ATTACK, *(str(tmp_path / name) for name in names)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for line, (name, message) in zip(done.stdout.splitlines(), names.items(), strict=True):
        assert message in line, name
