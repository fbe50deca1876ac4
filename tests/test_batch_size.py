"""The batch size that is found: what pays, and what fits."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import SIZE, random_model, small_config, write_checkpoint

from jddim.bulk.manifest import read_manifest
from jddim.cli.main import main
from jddim.config import SamplerConfig
from jddim.pipeline import DDIM
from jddim.scale import batch_size
from jddim.scale.batch_size import best_batch_size, free_memory
from jddim.schedule import linear_schedule

pytestmark = pytest.mark.unoptimised


@pytest.fixture(scope="module")
def ddim() -> DDIM:
    return DDIM(random_model(small_config()), linear_schedule(100), SamplerConfig())


class Device:
    """Networks that take seconds[size], and 10 bytes an image."""

    def __init__(self, seconds: dict[int, float]):
        self.seconds, self.tried = seconds, []

    def network(self, ddim: DDIM, size: int) -> tuple[int, int]:
        self.tried.append(size)
        return size, 10 * size


@pytest.mark.parametrize(
    ("seconds", "num", "memory", "expected", "tried"),
    [
        ({8: 1.0, 16: 1.1, 32: 2.3}, 100, None, 16, [8, 16, 32]),  # 32 is slower a second
        ({8: 1.0, 16: 1.95}, 100, None, 8, [8, 16]),  # 2.6 % are not worth the memory
        ({8: 1.0, 16: 1.0, 32: 1.0}, 100, 319, 16, [8, 16, 32]),  # 32 does not fit
        ({8: 1.0, 11: 1.1}, 11, None, 11, [8, 11]),  # never more than there are
        ({5: 1.0}, 5, None, 5, [5]),
        ({2: 1.0}, 100, 39, 2, [8, 4, 2]),
    ],
)
def test_the_largest_that_pays_and_fits(
    ddim: DDIM, monkeypatch: pytest.MonkeyPatch, seconds: dict, num: int, memory: int | None, expected: int, tried: list
) -> None:
    device = Device(seconds)
    monkeypatch.setattr(batch_size, "_network", device.network)
    monkeypatch.setattr(batch_size, "_seconds", lambda size: device.seconds[size])
    assert best_batch_size(ddim, num, memory=memory if memory is not None else 10**6) == expected
    assert device.tried == tried


def test_a_compiler_that_does_not_tell_of_memory(ddim: DDIM, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(batch_size, "_network", lambda ddim, size: (size, None))
    monkeypatch.setattr(batch_size, "_seconds", lambda size: 1.0)
    assert best_batch_size(ddim, 16, memory=100, say=said.append) == 16  # time alone decides
    assert said[:2] == ["batch 8: 8 images/s a step, memory not told", "batch 16: 16 images/s a step, memory not told"]
    assert said[2:] == ["batch size 16"]


def test_the_network_is_run_and_its_memory_grows_with_the_batch(ddim: DDIM) -> None:
    (run, small), (_, large) = batch_size._network(ddim, 3), batch_size._network(ddim, 6)
    assert jax.block_until_ready(run()).shape == (3, 6, 10, 1)
    assert 1.5 * small < large < 2.5 * small
    assert free_memory() > 10 * large
    with pytest.raises(MemoryError, match="does not hold one image"):
        best_batch_size(ddim, 3, memory=100)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        best_batch_size(ddim, 0)


def test_invert_asks_for_as_many_images_as_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    asked: list[int] = []
    monkeypatch.setattr(batch_size, "best_batch_size", lambda ddim, num, **_: asked.append(num) or 2)
    np.save(tmp_path / "images.npy", np.zeros((3, *SIZE, 1), np.float32))
    words = ["invert", str(ckpt), str(tmp_path / "images.npy"), str(tmp_path / "x_T.npy"), "--steps", "2"]
    assert main([*words, "--batch-size", "auto"]) == 0
    assert asked == [3]
    assert "3 images in 2 steps" in capsys.readouterr().out


def test_a_set_keeps_the_size_it_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt")
    words = ["bulk", str(ckpt), str(tmp_path / "set"), "--num", "5", "--steps", "2", "--batch-size", "auto"]
    monkeypatch.setattr(batch_size, "best_batch_size", lambda *_, **__: 3)
    assert main(words) == 0
    assert read_manifest(tmp_path / "set").bulk.batch_size == 3
    monkeypatch.setattr(batch_size, "best_batch_size", lambda *_, **__: 4)
    assert main(words) == 0
