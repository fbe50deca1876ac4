"""convert.families.score_sde: its checkpoints, what their tensors and settings tell, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are PyTorch's: pip install 'jddim[convert]'")

from convert.conversion import convert  # noqa: E402
from convert.engine import ConversionError, UnsettledError, fill  # noqa: E402
from convert.families import FAMILIES, score_sde  # noqa: E402
from convert.foreign import what_it_is  # noqa: E402
from convert.writers import state_shapes  # noqa: E402
from jddim.checkpoint.folder import load_params  # noqa: E402
from jddim.checkpoint.metadata import Metadata  # noqa: E402
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig  # noqa: E402
from jddim.models.building import abstract_model, flat_params  # noqa: E402

pytestmark = pytest.mark.unoptimised

CONFIG = UNetConfig(
    **{"image_size": (8, 12), "channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_levels": (1,)},
    up_attention_last=True,
)
SONG = UNetConfig(
    **{"image_size": (8, 8), "channels": 128, "channel_mults": (1, 1), "num_res_blocks": 2, "attention_levels": ()},
    **{"downsample": ("resnet",), "upsample": ("resnet",), "resample_shortcut": True, "up_attention_last": True},
    **{"mid_scale": math.sqrt(2), "block_scale": math.sqrt(2)},
)
NCSN = {"resample_filter": (1.0, 3.0, 3.0, 1.0), "input_pyramid": True}
SETTINGS = {"image_size": "8x12", "sde": "vpsde", "continuous": "false", "num_scales": "20", "beta_max": "6"}


def state(config: UNetConfig = CONFIG, seed: int = 1, scales: int = 20) -> dict[str, np.ndarray]:
    """A state dict with the source's buffer, every tensor drawn; sizes alone where the seed is 0."""
    rng = np.random.default_rng(seed)
    shapes = state_shapes(lambda: score_sde.reference(config))
    draw = (lambda shape: rng.standard_normal(shape, np.float32)) if seed else np.zeros
    return {"sigmas": np.linspace(50, 0.01, scales), **{name: draw(shape) for name, shape in shapes.items()}}


def planned(tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None, **given: str) -> score_sde.Plan:
    return score_sde.plan(tensors, config, SETTINGS | given)


def test_a_checkpoints_ema_list_gets_the_models_names(tmp_path: Path) -> None:
    raw, ema = state(), state(seed=2)
    shadow = [torch.tensor(value) for name, value in ema.items() if name != "sigmas"]
    contents = {
        **{"optimizer": {"state": {}, "param_groups": []}, "step": 77},
        "model": {f"module.{name}": torch.tensor(value) for name, value in raw.items()},
        "ema": {"decay": 0.9999, "num_updates": 76, "shadow_params": shadow},
    }
    torch.save(contents, tmp_path / "checkpoint_2.pth")
    metadata = convert(tmp_path / "checkpoint_2.pth", tmp_path / "out", settings=SETTINGS)
    assert isinstance(metadata, Metadata)
    assert (metadata.model, metadata.provenance["step"]) == (CONFIG, 77)
    assert (metadata.provenance["weights"], metadata.provenance["taken"]) == ("ema", "ema.shadow_params")
    assert metadata.provenance["verification"]["output_error"] <= 2e-5
    params = load_params(tmp_path / "out", metadata)
    q = ema["all_modules.6.NIN_0.W"]  # (in, out), as Flax's kernels
    np.testing.assert_array_equal(params["down.1.attentions.0.q.kernel"], q)
    assert metadata.schedule == ScheduleConfig("linear", 20, 0.1 / 20, 6 / 20)
    assert metadata.sampler == SamplerConfig(num_steps=20, clip=False, variance="fixed_large")
    assert [fact.partition(" =")[0] for fact in metadata.provenance["assumed"]] == ["name", "centered", "beta_min"]

    contents["ema"]["shadow_params"] = [*shadow[:4], shadow[5], shadow[4], *shadow[6:]]
    torch.save(contents, tmp_path / "mixed.pth")
    with pytest.raises(ConversionError, match=r"no ema weights .*is a list of \d+ tensors without names"):
        convert(tmp_path / "mixed.pth", tmp_path / "no", settings=SETTINGS, weights="ema")


@pytest.mark.parametrize(("changes", "fir"), [({}, False), (NCSN, True)])
def test_blocks_that_resample_are_verified(tmp_path: Path, changes: dict[str, Any], fir: bool) -> None:
    config = UNetConfig(**(vars(SONG) | changes))
    torch.save({name: torch.tensor(value) for name, value in state(config, scales=1000).items()}, tmp_path / "a.pth")
    settings = {"image_size": "8", "sde": "vpsde", "continuous": "true"}
    metadata = convert(tmp_path / "a.pth", tmp_path / "out", settings=settings)
    assert isinstance(metadata, Metadata)
    assert metadata.model == config
    assert metadata.provenance["verification"]["output_error"] <= 2e-5
    assert metadata.schedule == ScheduleConfig("vp", t_min=1e-3, t_max=1.0, beta_start=0.1, beta_end=20.0)
    assert metadata.sampler == SamplerConfig(spacing="even", clip=False, timestep_scale=999.0)
    assumed = [fact.partition(" =")[0] for fact in metadata.provenance["assumed"]]
    assert assumed == ["centered", "skip_rescale", "fir_kernel" if fir else "fir", "beta_min", "beta_max"]


@pytest.mark.parametrize("name", score_sde.PRESETS)
def test_presets_are_the_published_networks(name: str) -> None:
    told = score_sde.PRESETS[name]
    mults = tuple(map(int, told["ch_mult"].split(",")))
    side, blocks = int(told["image_size"]), int(told["num_res_blocks"])
    fields = {"image_size": (side, side), "channel_mults": mults, "num_res_blocks": blocks, "channels": 128}
    fields |= {"attention_levels": tuple(i for i in range(len(mults)) if side >> i == 16)}
    of_ddpm = vars(CONFIG) | fields
    config = UNetConfig(
        **(of_ddpm if "/ddpm/" in name else vars(SONG) | fields | (NCSN if "ncsnpp" in name else {})),
    )
    plan = score_sde.plan(state(config, 0, 1000), None, told)
    assert (plan.model, plan.assumed, plan.asks) == (config, (), ())
    assert plan.schedule == (
        ScheduleConfig("vp", t_min=1e-3, t_max=1.0, beta_start=0.1, beta_end=20.0)
        if "continuous" in name
        else ScheduleConfig("linear", 1000, 1e-4, 0.02)
    )


def test_the_source_asks_for_what_no_tensor_tells() -> None:
    with pytest.raises(UnsettledError, match=r"image size: --set image_size=SIDE.*vpsde and subvpsde.*t was cont") as e:
        score_sde.plan(state(), None, {})
    assert e.value.asks == (
        *("image_size=SIDE", "sde=vpsde", "continuous=BOOLEAN"),
        *("name=VALUE", "beta_min=VALUE", "beta_max=VALUE", "centered=VALUE"),
    )
    config = {"training": {"sde": "vpsde", "continuous": True, "lr": 1}, "data": {"image_size": 12}}
    config |= {"model": {"nf": 32, "attn_resolutions": [6, 50]}}
    plan = score_sde.plan(state(), config, {})
    assert plan.schedule == ScheduleConfig("vp", t_min=1e-3, t_max=1.0, beta_start=0.1, beta_end=20.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sde": "subvpsde"}, r"a subvpsde's noise is not sqrt\(1 - alpha\^2\)"),
        ({"sde": "vesde"}, r"vesde's models predict the score of images in \[0, 1\] under noise"),
        ({"centered": "false"}, r"centered is false, a model of images in \[0, 1\]"),
        ({"scale_by_sigma": "true"}, "scale_by_sigma is true: its output is divided by sigmas"),
        ({"conditional": "false"}, "conditional is false by the settings, but the tensors have an embedding of t"),
        ({"num_scales": "1000", "nf": "64"}, "nf is 64 by the settings, but 32.*num_scales is 1000 .* but 20 by the"),
        ({"attn_resolutions": "12"}, r"attn_resolutions is \[12\] by the settings, but \[6\] by the tensors"),
        ({"name": "ncsnpp"}, "a norm of 32 channels has fewer than 32 groups there"),
        ({"beta_max": "20"}, r"schedule cannot be built: betas must lie in \(0, 1\)"),
        ({"sed": "vpsde"}, "unknown --set key 'sed'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, str], told: str) -> None:
    with pytest.raises(ConversionError, match=told):
        planned(state(), **given)


def _moved(tensors: dict[str, np.ndarray], by: int) -> dict[str, np.ndarray]:
    """The modules under other numbers."""
    parts = [(name.split("."), value) for name, value in tensors.items() if name != "sigmas"]
    return {".".join([head, str(int(number) + by), *rest]): value for (head, number, *rest), value in parts}


def test_the_sources_other_networks_are_refused() -> None:
    tensors, last = state(), 17
    others = {
        r"told the logarithm of sigma \(embedding_type fourier\): vesde's": {
            **_moved(tensors, 1),
            "all_modules.0.W": np.ones(16, np.float32),
        },
        r"the network is not told t \(conditional=False\)": {
            name: value for name, value in _moved(tensors, -2).items() if not re.search(r"s\.-|Dense", name)
        },
        r"its output is summed over levels \(progressive\)": tensors
        | {f"all_modules.{last + 1}.weight": np.ones(32, np.float32)},
        r"its input comes in again without a filter \(progressive_input\)": tensors
        | {f"all_modules.{last + 1}.Conv_0.weight": np.ones((32, 3, 1, 1), np.float32)},
        r"filtered convolutions \(fir, resblock_type ddpm\)": tensors
        | {f"all_modules.{last + 1}.Conv2d_0.weight": np.ones((32, 3, 3, 3), np.float32)},
        r"no tensor of all_modules\.4 is there": {k: v for k, v in tensors.items() if "modules.4." not in k},
    }
    assert max(int(name.split(".")[1]) for name in tensors if name != "sigmas") == last
    for told, state_dict in others.items():
        with pytest.raises(ConversionError, match=told):
            planned(state_dict)
    pyramid = state(UNetConfig(**(vars(SONG) | NCSN)), 0, 1000)
    with pytest.raises(ConversionError, match="which jddim divides by sqrt"):
        score_sde.plan(
            pyramid, None, {"image_size": "8", "sde": "vpsde", "continuous": "true", "skip_rescale": "false"}
        )


def test_any_damaged_tensor_is_named() -> None:
    tensors = state()
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(CONFIG)).items()}

    def filled(damaged: dict[str, np.ndarray]) -> None:
        plan = planned(damaged)
        fill(damaged, expected, plan.rules, plan.ignored, score_sde.FAMILY.pointwise)

    for name in tensors.keys() - {"sigmas"}:
        damaged = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(ConversionError, match=f"^1 tensor does not fit the model: missing {re.escape(name)}$"):
            filled(damaged)


def test_a_file_with_few_of_its_names_is_called_so() -> None:
    assert "score_sde" in what_it_is({"all_modules.0.weight": np.ones(3)})
    assert not FAMILIES["score_sde"].recognise({"all_modules.0.weight": np.ones(3)})
