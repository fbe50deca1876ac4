"""The page of a checkpoint with a first stage: pictures everywhere, encoded or decoded, as the commands make them."""

from __future__ import annotations

import base64
import dataclasses
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import write_checkpoint

import jddim
from jddim.cli import main as cli
from jddim.config import AutoencoderConfig
from jddim.images import read_metadata, to_uint8
from jddim.scale.stepping import Decoded
from jddim.serve.request import Bounds, parse, run_of

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"jddim serve needs {package}: pip install 'jddim[web]'")

from web_server import SMALL, events, post, send, serving  # noqa: E402

from jddim.serve.jobs import DECODED, Job  # noqa: E402

pytestmark = pytest.mark.unoptimised

SIZE = (10, 14, 3)
STAGE = AutoencoderConfig(
    **{"image_size": (10, 14), "latent_channels": 2, "channels": 4, "channel_mults": (1, 1), "num_res_blocks": 1},
    **{"norm_groups": 2, "mid_attention": False, "scaling_factor": 0.7},
)
RNG = np.random.default_rng(3)
PICTURE = RNG.integers(0, 256, SIZE, dtype=np.uint8)
MASK = np.zeros((10, 14, 1), np.uint8)
MASK[3:, 5:] = 255
TEXTS = {"picture": base64.b64encode(PICTURE.tobytes()).decode(), "mask": base64.b64encode(MASK.tobytes()).decode()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    latents: dict[str, Any] = {"image_size": (5, 7), "in_channels": 2, "out_channels": 2, "autoencoder": STAGE}
    return write_checkpoint(tmp_path_factory.mktemp("web") / "latents", **latents, **SMALL)


@pytest.fixture(scope="module")
def port(checkpoint: Path) -> Iterator[int]:
    with serving({"latents": checkpoint}) as (_, port):
        yield port


def file(port: int, data: dict[str, Any], name: str) -> bytes:
    response = send(port, "GET", f"/api/results/{data['id']}/{name}")
    assert response.status == 200
    return response.read()


def pixels(sprite: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(sprite)) as image:
        return np.stack(np.split(np.asarray(image), image.width // SIZE[1], axis=1))


@pytest.mark.parametrize(
    "run",
    [
        {"mode": "sample", "eta": 0.6},
        {"mode": "grid", "columns": [2, 5]},
        {"mode": "slerp", "seed_to": 9},
        {"mode": "invert", **TEXTS},
        {"mode": "inpaint", "paste": True, **TEXTS},
    ],
    ids=lambda run: run["mode"],
)
def test_what_is_copied_makes_the_pictures_again(
    port: int, run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"steps": 9, "seed": 7, "num": 3} | run
    asked = {name: value for name, value in asked.items() if name != "mask" or run["mode"] == "inpaint"}
    *on_the_way, (name, data) = events(post(port, "/api/run", asked))
    assert name == "done", data
    previews = [told["images"] for _, told in on_the_way if "images" in told]
    assert len(data["way"]) == (0 if run["mode"] == "grid" else DECODED)
    assert len(previews) <= len(data["way"])  # each is sent once
    images = pixels(base64.b64decode(data["images"])).astype(int)
    assert images.shape[1:] == pixels(base64.b64decode(data["x_T"])).shape[1:] == SIZE
    for name in data["files"]:
        (tmp_path / name).write_bytes(file(port, data, name))
    with np.load(tmp_path / "images.npz") as arrays:
        assert arrays["x_0"].shape == images.shape
        assert arrays["x_T"].shape == (len(images), 5, 7, 2)
    assert read_metadata(str(tmp_path / "images.png"))["decode_batch"] == 1
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(data["python"], found)
    np.testing.assert_allclose(to_uint8(found["x_0"]).astype(int), images, atol=1)  # rounded apart, as without latents
    if run["mode"] == "inpaint":
        np.testing.assert_array_equal(images[:, :3], np.stack([PICTURE[:3]] * 3))
    if run["mode"] in ("sample", "inpaint"):
        words = shlex.split(data["command"])
        assert ("--paste" in words) == (run["mode"] == "inpaint")
        out = "images.npz" if run["mode"] == "sample" else "filled.npz"
        words = [out if word in ("images.png", "filled.png") else word for word in words[1:]]
        assert cli.main([*words, "--overwrite"]) == 0
        with np.load(out) as arrays:
            np.testing.assert_allclose(arrays["arr_0"].astype(int), images, atol=1)


def test_latents_are_decoded_a_few_at_a_call(checkpoint: Path) -> None:
    served = {"a": jddim.load(checkpoint)}
    asked = parse({"steps": 2, "num": 3}, served, {"a": ["ddim"]}, Bounds())
    asked = dataclasses.replace(asked, request=dataclasses.replace(asked.request, decode_batch=2))
    run = run_of(asked, served["a"])
    assert isinstance(run, Decoded)
    assert run.total == 2 + 2
    job, previews = Job(run, lambda: None), []
    while not job.finished:
        job.advance()
        previews.append(job.preview())
    assert [preview is not None for preview in previews] == [True, True, False, False]  # one a step that is kept
    assert previews[0] is job.frames[0].x0_hat
    assert previews[0].shape == (3, *SIZE)
    same = served["a"].sample(0, 3, steps=2, decode_batch=2)
    np.testing.assert_allclose(run.x_t(), same, atol=1e-5)
    graph, state = nnx.split(served["a"].autoencoder)
    state["decoder"]["conv_out"]["bias"][...] = np.full(3, np.inf, np.float32)
    run = run_of(asked, dataclasses.replace(served["a"], autoencoder=nnx.merge(graph, state)))
    run.step()
    run.step()
    with pytest.raises(
        FloatingPointError, match="decoder made a NaN or infinity of finite latents, in image 0, in 2 of"
    ):
        run.step()


def test_what_the_page_does_not_take_is_told_at_the_start(tmp_path: Path, fails: Any) -> None:
    pixels = write_checkpoint(tmp_path / "pixels", **SMALL)
    told = fails("serve", pixels, "--port", "0", "--decode-batch", "2")
    assert "decode_batch is of a checkpoint with a first stage, of which this has none" in told
    beside: dict[str, Any] = {"image_size": (5, 7), "in_channels": 2, "out_channels": 2, "condition_channels": 1}
    latents = write_checkpoint(tmp_path / "latents", autoencoder=STAGE, **beside, **SMALL)
    told = fails("serve", latents, "--port", "0")
    assert "the page draws no latents, and this network is given some beside x_t" in told
