"""convert.families.pytorch_ddpm: its runs' files, what their flags and tensors tell, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import named
import numpy as np
import pytest

from convert.conversion import convert, describe
from convert.engine import ConversionError, UnsettledError, fill
from convert.export import export
from convert.families import pytorch_ddpm
from convert.recognition import recognise
from jddim.checkpoint.folder import load_params
from jddim.config import ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

pytestmark = pytest.mark.unoptimised

CONFIG = UNetConfig(
    **{"image_size": (6, 10), "channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "attention_levels": (1,)},
    **{"norm_groups": 2, "norm_epsilon": 1e-5, "symmetric_padding": True},
    **{"time_embedding": "learned", "num_timesteps": 30},
)
SETTINGS = {"img_size": "6x10", "norm_groups": "2"}
# As absl writes it, of all flags; ch_mult is given once for each level.
FLAGS = """--T=30
--attn=1
--beta_1=0.001
--beta_T=0.2
--ch=8
--ch_mult=1
--ch_mult=2
--noeval
--img_size=6
--logdir=./logs/a
--mean_type=xstart
--num_res_blocks=1
--train
--var_type=fixedsmall
"""


def state(seed: int = 1) -> dict[str, np.ndarray]:
    return named.state_dict(pytorch_ddpm, CONFIG, seed)


def planned(tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None, **given: str) -> pytorch_ddpm.Plan:
    return pytorch_ddpm.plan(tensors, config, SETTINGS | given)


def test_a_run_is_converted_with_its_flags_and_verified(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writing the run's file needs torch: pip install 'jddim[convert]'")
    raw, ema = ({name: torch.tensor(value) for name, value in state(seed).items()} for seed in (1, 2))
    rest = {"sched": {"last_epoch": 7}, "optim": {"state": {}, "param_groups": []}, "x_T": torch.zeros(2, 3, 6, 6)}
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"net_model": raw, "ema_model": ema, "step": 700, **rest}, run / "ckpt.pt")
    with pytest.raises(ConversionError, match="is a folder that no family knows"):
        describe(run)
    (run / "flagfile.txt").write_text(FLAGS)
    metadata = convert(run, tmp_path / "out", settings={"norm_groups": "2"})
    provenance = metadata.provenance
    assert (provenance["weights"], provenance["step"], provenance["taken"]) == ("ema", 700, "ema_model")
    assert provenance["config"][0]["file"] == "flagfile.txt"
    assert provenance["assumed"] == []
    assert provenance["unchecked"] == ["norm_groups"]  # the rest is the flagfile's
    assert provenance["verification"]["output_error"] < 2e-5
    assert metadata.model.image_size == (6, 6)
    assert metadata.schedule == ScheduleConfig("linear", 30, 0.001, 0.2)
    assert (metadata.sampler.prediction_type, metadata.sampler.variance) == ("sample", "fixed_small")
    assert not metadata.sampler.clip
    params = load_params(tmp_path / "out", metadata)
    np.testing.assert_array_equal(params["time_proj.embedding"], state(2)["time_embedding.timembedding.0.weight"])
    with pytest.raises(ConversionError, match="comes from no family that has a format to write; give --format"):
        export(tmp_path / "out", tmp_path / "back")
    assert export(tmp_path / "out", tmp_path / "pipeline", "diffusers") == "diffusers"


def test_what_nothing_tells_is_the_sources_default_and_said() -> None:
    plan = planned(state())
    assert plan.model == CONFIG
    assert plan.schedule == ScheduleConfig("linear", 30, 1e-4, 0.02)
    assert (plan.sampler.prediction_type, plan.sampler.variance) == ("epsilon", "fixed_large")
    assert [fact.partition(" =")[0] for fact in plan.assumed] == ["beta_1", "beta_T", "mean_type", "var_type"]
    told = planned(state(), {"model": {"ch": "8"}, "dropout": "0.1"}, ch_mult="1,2", attn="1", T="30")
    assert told.model == CONFIG
    assert told.notes[-1] == "config: not read: dropout"


def test_one_level_has_no_resampling() -> None:
    config = UNetConfig((3, 5), channels=4, channel_mults=(1,), num_res_blocks=3, attention_levels=(), norm_groups=2)
    found = pytorch_ddpm.infer(named.state_dict(pytorch_ddpm, config, 3))
    assert (found["ch_mult"], found["num_res_blocks"], found["attn"], found["T"]) == ((1,), 3, (), None)


def test_contradictions_are_in_one_report() -> None:
    with pytest.raises(ConversionError) as caught:
        planned(state(), {"T": "31", "attn": ["0", "1"]}, ch="9", mean_type="xprev")
    for part in (
        "ch is 9 by the flags, but 8 by the tensors",
        "attn is (0, 1) by the flags, but (1,) by the tensors",
        "T is 31 by the flags, but 30 by the tensors",
        "mean_type is xprev: jddim has no sampler for networks that predict x_(t-1)",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConversionError, match=r"var_type must be one of fixedlarge.*unknown --set key 'chmult'"):
        planned(state(), {"var_type": "learned"}, chmult="1")
    with pytest.raises(UnsettledError, match=r"give the run's flagfile\.txt by --config") as asked:
        pytorch_ddpm.plan(state(), None, {"norm_groups": "2"})
    assert asked.value.asks == ("img_size=SIDE", "beta_1=VALUE", "beta_T=VALUE", "mean_type=VALUE")
    with pytest.raises(UnsettledError, match=r"32 groups of a norm, .* do not divide 8 times \[1, 2\]"):
        pytorch_ddpm.plan(state(), None, {"img_size": "6x10"})
    wide = state() | {"head.weight": np.zeros((8, 4, 3, 3), np.float32)}
    with pytest.raises(ConversionError, match="the network has 4 channels in and 3 out"):
        planned(wide)


def test_damage_is_in_one_report_under_the_sources_names() -> None:
    tensors = state()
    del tensors["downblocks.2.block1.2.weight"]
    tensors["upblocks.4.c1.weight"] = np.zeros(3, np.float32)  # as in conditional forks
    tensors["middleblocks.0.attn.proj_q.weight"] = tensors["middleblocks.0.attn.proj_q.weight"][:, :, 0, 0]
    tensors["tail.2.weight"][0, 0, 0, 0] = np.nan
    del tensors["time_embedding.timembedding.0.weight"]
    plan = planned(tensors, T="30")
    expected = {leaf: value.shape for leaf, value in flat_params(abstract_model(plan.model)).items()}
    with pytest.raises(ConversionError) as caught:
        fill(tensors, expected, plan.rules, plan.ignored, pytorch_ddpm.FAMILY.pointwise)
    for part in (
        "missing downblocks.2.block1.2.weight",
        "missing time_embedding.timembedding.0.weight",
        "unexpected upblocks.4.c1.weight",
        "middleblocks.0.attn.proj_q.weight has shape (16, 16), expected (16, 16, 1, 1)",
        "tail.2.weight holds NaN",
    ):
        assert part in str(caught.value)


def test_blocks_that_do_not_add_up_are_refused() -> None:
    tensors = state()
    few = {name: value for name, value in tensors.items() if not name.startswith("upblocks.4")}
    for broken in (few, tensors | {"upblocks.999999.main.weight": np.zeros(1)}, {**few, "upblocks.5.x": np.zeros(1)}):
        with pytest.raises(ConversionError, match="the blocks do not add up to a UNet"):
            pytorch_ddpm.infer(broken)
    with pytest.raises(ConversionError, match="too few tensors"):
        pytorch_ddpm.infer({name: value for name, value in tensors.items() if ".bias" not in name})
    with pytest.raises(ConversionError, match=r"has a timembedding .* but too few of their blocks"):
        recognise({"time_embedding.timembedding.0.weight": np.zeros(3)}, "file")
