"""One program a shape, whoever watches: counted by what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import write_checkpoint

import jddim
from jddim.cli.main import main

pytestmark = pytest.mark.unoptimised


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of what is compiled from here on."""
    found: list[str] = []

    def note(event: str, *_: Any, **more: Any) -> None:
        if "backend_compile" in event:
            found.append(str(more.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope="module")
def ddim(tmp_path_factory: pytest.TempPathFactory) -> jddim.DDIM:
    narrow: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (), "middle": False}
    return jddim.load(write_checkpoint(tmp_path_factory.mktemp("one") / "ckpt", **narrow))


def test_one_program_serves_whoever_watches(ddim: jddim.DDIM, compiled: list[str]) -> None:
    asked: dict[str, Any] = {"steps": 11, "num": 3}  # a prime: eleven segments of one row
    x_T = np.random.default_rng(0).standard_normal((3, *ddim.model.config.image_size, 1)).astype(np.float32)
    ways: dict[str, Callable[[], Any]] = {
        "sample": lambda: ddim.sample(0, **asked),
        "with a bar": lambda: ddim.sample(1, progress=True, **asked),
        "watched": lambda: ddim.sample(2, on_segment=lambda now: None, **asked),
        "its way kept": lambda: ddim.sample(2, trajectory_every=4, **asked),
        "at another eta": lambda: ddim.sample(2, eta=0.7, **asked),
        "without a key": lambda: ddim.sample(x_T=x_T, eta=0.0, steps=11),
        "in another spacing": lambda: ddim.sample(2, spacing="quad", **asked),
    }
    images = np.asarray(ways["sample"]())
    assert "segment" in " ".join(compiled)
    for name, way in ways.items():
        compiled.clear()
        way()
        assert not [one for one in compiled if "segment" in one], name
    np.testing.assert_array_equal(ddim.sample(0, on_segment=lambda now: None, **asked), images)


def test_interpolate_runs_what_warmup_compiled(tmp_path: Path, compiled: list[str]) -> None:
    ckpt = write_checkpoint(tmp_path / "ckpt", channel_mults=(1,), attention_levels=(), middle=False)
    assert main(["sample", str(ckpt), str(tmp_path / "a.npy"), "--num", "5", "--steps", "7"]) == 0
    assert "segment" in " ".join(compiled)
    compiled.clear()
    preview = ["--preview", str(tmp_path / "now.png")]
    assert main(["sample", str(ckpt), str(tmp_path / "b.npy"), "--num", "5", "--steps", "7", *preview]) == 0
    assert main(["interpolate", str(ckpt), str(tmp_path / "c.npz"), "--num", "5", "--steps", "7"]) == 0
    assert not [one for one in compiled if "segment" in one]


def test_nothing_can_be_watched_inside_a_transformation(ddim: jddim.DDIM) -> None:
    with pytest.raises(ValueError, match="on_segment sees no values inside jit"):
        jax.jit(lambda key: ddim.sample(key, 2, steps=2, on_segment=lambda now: None))(jax.random.key(0))
