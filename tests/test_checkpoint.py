"""Checkpoints: what is written is what loads, and nothing else loads."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from jddim.checkpoint.folder import CheckpointError, load_metadata, load_params, save_checkpoint
from jddim.checkpoint.metadata import Metadata
from jddim.checkpoint.orbax import quiet_orbax
from jddim.config import LucidrainsConfig, SamplerConfig, ScheduleConfig, UNetConfig
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
    rename = Path.rename

    def fails_on_the_new_one(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_on_the_new_one)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, random_params(1), METADATA, overwrite=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]
    chex.assert_trees_all_equal(load_params(path, load_metadata(path)), random_params())


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
    import subprocess
    import sys

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
