"""convert.families.edm, convert.files.persistence: snapshots read without their code, what is told and refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="snapshots are PyTorch's: pip install 'jddim[convert]'")

import persistent  # noqa: E402

from convert.conversion import convert, describe  # noqa: E402
from convert.engine import ConversionError, UnsettledError, fill  # noqa: E402
from convert.export import export  # noqa: E402
from convert.families import edm  # noqa: E402
from convert.files.readers import read  # noqa: E402
from convert.reference.edm_unet import EDMUNet  # noqa: E402
from convert.reference.unet import redraw_  # noqa: E402
from jddim.checkpoint.folder import load_params  # noqa: E402
from jddim.checkpoint.metadata import Metadata  # noqa: E402
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig  # noqa: E402
from jddim.models.building import abstract_model, flat_params  # noqa: E402

pytestmark = pytest.mark.unoptimised

SONG: dict[str, Any] = {
    **{"side": 8, "images": 3, "channels": 128, "stem": 128, "widths": (128, 128), "blocks": 1, "time": 512},
    **{"attention_levels": (1,), "heads": (1, 1), "classes": 5, "song": True, "doubled": False},
    **{"frequencies": False, "pyramid": False, "taps": (1.0, 1.0)},
}
NCSN = {**SONG, "classes": None, "frequencies": True, "pyramid": True, "taps": (1.0, 3.0, 3.0, 1.0)}
ADM = {**SONG, "song": False, "doubled": True, "heads": (2, 2)}
INIT = {
    **{"img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_type": "SongUNet", "model_channels": 128},
    **{"channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [16, 4], "dropout": 0.13, "use_fp16": True},
}


def state(**network: Any) -> dict[str, np.ndarray]:
    """As the source has it: with one-hot labels' products, filters and frequencies."""
    model = EDMUNet(**network)
    redraw_(model, 1)
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    if network["classes"] is not None:
        found["map_label.weight"] = np.ascontiguousarray(found["map_label.weight"].T)
        if network["song"]:
            found["map_label.bias"] = np.full(128, 0.25, np.float32)
    if network["frequencies"]:
        found["map_noise.freqs"] = found.pop("map_noise.weight")
    taps = np.outer(network["taps"], network["taps"]).astype(np.float32) / sum(network["taps"]) ** 2
    return found | {f"enc.4x4_down.{part}.resample_filter": taps[None, None] for part in ("conv0", "skip")}


def planned(tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None, **given: str) -> edm.Plan:
    return edm.plan(tensors, config, {"class_name": "EDMPrecond"} | given)


def test_a_snapshot_is_converted_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = state(**SONG) | {"map_augment.weight": np.ones((128, 9), np.float32)}
    whole = persistent.module("EDMPrecond", {f"model.{name}": value for name, value in tensors.items()}, **INIT)
    contents = {"ema": whole, "loss_fn": persistent.Persistent("EDMLoss", sigma_data=0.5), "dataset_kwargs": {"a": 1}}
    file = persistent.write(tmp_path / "snapshot.pkl", contents, monkeypatch)
    found = read(file)
    assert found.keys() == {"ema"}
    assert found["ema"].pop("network") == {"class_name": "EDMPrecond", **INIT}
    assert found["ema"].keys() == {f"model.{name}" for name in tensors}
    assert all(np.array_equal(found["ema"][f"model.{name}"], value) for name, value in tensors.items())
    metadata = convert(file, tmp_path / "ckpt")
    assert isinstance(metadata, Metadata)
    provenance = metadata.provenance
    assert (provenance["weights"], provenance["taken"]) == ("ema", "ema.model")
    assert provenance["verification"]["output_error"] <= 2e-5
    assert [fact.partition(" =")[0] for fact in provenance["assumed"]] == ["sigma_data"]
    assert metadata.model == UNetConfig(
        **{"image_size": (8, 8), "channels": 128, "channel_mults": (1, 1), "num_res_blocks": 1},
        **{"attention_levels": (1,), "downsample": ("resnet",), "upsample": ("resnet",)},
        **{"class_embedding": "learned", "num_classes": 5, "early_class": True, "mid_scale": math.sqrt(2)},
        **{"block_scale": math.sqrt(2), "resample_shortcut": True, "up_attention_last": True},
    )
    assert metadata.schedule == ScheduleConfig("edm", t_min=0.002, t_max=80.0)
    assert metadata.sampler == SamplerConfig(
        spacing="karras", num_steps=18, clip=False, prediction_type="edm", timestep_scale=0.25
    )
    params = load_params(tmp_path / "ckpt", metadata)
    rows = tensors["map_label.weight"].T * np.float32(math.sqrt(5)) + 0.25
    np.testing.assert_allclose(params["class_embed.embedding"], rows, rtol=1e-6)
    with pytest.raises(ConversionError, match=r"block_scale is 1\.414.* there always 1\.0"):
        export(tmp_path / "ckpt", tmp_path / "out", "openai")


@pytest.mark.parametrize("network", [NCSN, ADM])
def test_the_tensors_tell_the_other_networks(network: dict[str, Any]) -> None:
    tensors = state(**network)
    plan = planned(tensors, sigma_data="0.7", sigma_min="0.01", sigma_max="50")
    assert (plan.sampler.sigma_data, plan.schedule) == (0.7, ScheduleConfig("edm", t_min=0.01, t_max=50.0))
    model = plan.model
    assert isinstance(model, UNetConfig)
    assert model.resample_filter == ((1.0, 3.0, 3.0, 1.0) if network is NCSN else ())
    assert (model.input_pyramid, model.time_embedding == "frequencies") == (network["pyramid"],) * 2
    assert model.head_channels == (None if network["song"] else 64)
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(model)).items()}
    params = fill({**tensors, **plan.implied}, expected, plan.rules, plan.ignored, edm.FAMILY.pointwise)
    q, k, v = (params[f"mid.attention.{part}.bias"] for part in "qkv")
    np.testing.assert_array_equal(tensors["dec.4x4_in0.qkv.bias"], np.stack([q, k, v], axis=1).reshape(-1))


@pytest.mark.parametrize(
    ("changed", "given", "told"),
    [
        ({}, {"class_name": "VPPrecond"}, "its preconditioning is VPPrecond, of another network's training"),
        ({}, {"class_name": "Precond"}, "class_name must be one of EDMPrecond, VPPrecond"),
        (
            {},
            {"num_blocks": "2", "attn_resolutions": "8"},
            r"num_blocks is 2 by the settings, but 1.*resolutions is \(8,\)",
        ),
        ({"enc.4x4_down.skip.resample_filter": np.ones((1, 1, 4, 4), np.float32)}, {}, "resamples by several filters"),
        ({"enc.4x4_aux_skip.weight": np.ones((128, 3, 1, 1), np.float32)}, {}, "its encoder is the source's 'skip'"),
        (
            {"enc.8x8_block0.norm0.weight": np.ones(64, np.float32)},
            {},
            "a norm of 64 channels has fewer than 32 groups",
        ),
        ({"map_layer0.weight": np.ones((512, 0), np.float32)}, {}, "too few tensors of the network are there"),
        ({"map_label.bias": np.ones(3, np.float32)}, {}, "map_label.bias is not of map_label.weight"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, np.ndarray], given: dict[str, str], told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        planned(state(**SONG) | changed, **given)


def test_of_a_state_dict_the_preconditioning_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnsettledError, match="the tensors do not tell its preconditioning, which a snapshot says"):
        edm.plan(state(**ADM), None, {})
    save_file(state(**ADM), tmp_path / "a.safetensors")
    assert describe(tmp_path / "a.safetensors")[-1].endswith("--set class_name=PRECOND")


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        ({"ema": 1}, "none of its objects is a network"),
        ({"ema": persistent.Persistent("A", _modules=3, _parameters={}, _buffers={})}, "one of its modules is none"),
        (
            {"ema": persistent.Persistent("A", _modules={"a": 3}, _parameters={}, _buffers={})},
            "one of its modules is none",
        ),
        ({"ema": persistent.Persistent(3)}, "it makes an object of something else than its attributes"),  # type: ignore[arg-type]
        ({"ema": torch.nn.Linear(2, 3)}, r"refused: its pickle calls torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_damaged_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any, told: str) -> None:
    named = {**contents, "loss_fn": persistent.Persistent("EDMLoss")}
    file = persistent.write(tmp_path / "a.pkl", dict(reversed(named.items())), monkeypatch)
    with pytest.raises(ConversionError, match=told):
        read(file)


def test_modules_within_modules_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of which holds the one before twice."""
    node = persistent.module("A", {"w": np.ones(2, np.float32)})
    for _ in range(40):
        node = persistent.Persistent("A", _modules={"a": node, "b": node}, _parameters={}, _buffers={})
    file = persistent.write(tmp_path / "a.pkl", {"ema": node}, monkeypatch)
    with pytest.raises(ConversionError, match="its modules lie in each other without end"):
        read(file)


def test_a_storage_that_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = persistent.write(
        tmp_path / "a.pkl", {"ema": persistent.module("A", {"w": np.ones(5, np.float32)})}, monkeypatch
    )
    assert read(file)["ema"]["w"].tolist() == [1.0] * 5
    whole = file.read_bytes()
    count = (5).to_bytes(8, "little") + np.ones(5, np.float32).tobytes()
    assert whole.count(count) == 1
    file.write_bytes(whole.replace(count, (4).to_bytes(8, "little") + count[8:]))
    with pytest.raises(ConversionError, match="a storage of 5 numbers has 4, in 20 bytes"):
        read(file)
