"""Training in PyTorch: a run in parts is a whole one, the result converts, and emoji.json is a configuration for it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="scripts/train_diffusers.py trains diffusers' network")
torch = pytest.importorskip("torch")

import jddim  # noqa: E402
from jddim.checkpoint.folder import load_params  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.unoptimised


def of_scripts(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return of_scripts("train_diffusers")


SMALL = {
    "sample_size": 6,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """scripts/emoji.json with a smaller network and fewer steps."""
    own = json.loads((ROOT / "scripts" / "emoji.json").read_text())
    short = {"steps": 4, "batch_size": 3, "warmup_steps": 2, "decay_steps": 2}
    return {**own, "unet": own["unet"] | SMALL, "train": own["train"] | short}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "train.npz"
    np.savez(path, arr_0=rng.integers(0, 256, (7, 6, 6, 3), np.uint8), arr_1=np.arange(7, dtype=np.int32))
    return path


def test_a_run_in_parts_is_a_whole_one_and_converts(
    script: Any, config: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = script.Recipe(**config["train"])
    assert [recipe.lr_at(step) / recipe.lr for step in range(4)] == [0.5, 1, 1, 0.5]

    def run(name: str) -> int:
        return script.train(config, recipe, data, tmp_path / name, None, log_every=2, save_every=2)

    assert run("whole") == 0
    calls, loss_of = [], script.loss_of

    def killed(*of: Any) -> Any:
        calls.append(of)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return loss_of(*of)

    monkeypatch.setattr(script, "loss_of", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run("parts")
    monkeypatch.setattr(script, "loss_of", loss_of)
    assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == 2
    assert run("parts") == 0
    whole, parts = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    for kind in ("unet", "average"):
        assert all(torch.equal(value, parts[kind][name]) for name, value in whole[kind].items())
    assert not torch.equal(whole["unet"]["conv_in.weight"], whole["average"]["conv_in.weight"])
    assert [json.loads(line)["step"] for line in (tmp_path / "parts.jsonl").read_text().splitlines()] == [2, 4]

    metadata = jddim.convert(tmp_path / "parts", tmp_path / "checkpoint")
    assert metadata.sampler.prediction_type == "v_prediction"
    params = load_params(tmp_path / "checkpoint", metadata)
    np.testing.assert_array_equal(params["conv_in.bias"], parts["average"]["conv_in.bias"].numpy())

    begun = tmp_path / "begun"
    script.train(config, script.Recipe(**config["train"] | {"lr": 0.0}), data, begun, tmp_path / "parts", 2, 2)
    again = torch.load(tmp_path / "begun.pt", weights_only=True)["unet"]
    assert all(torch.equal(value, parts["average"][name]) for name, value in again.items())

    ship, shipped = of_scripts("emoji_model").ship, tmp_path / "shipped"
    names = [f"class {i}" for i in range(10)]
    ship(tmp_path / "parts", names, shipped)
    (shipped / "NOTICE").write_text("whose pictures they are")
    ship(tmp_path / "whole", names[::-1], shipped)  # again, in its place
    ddim = jddim.load(shipped)
    assert (ddim.null_label, ddim.label_names) == (10, {f"class {9 - i}": i for i in range(10)})
    assert (shipped / "NOTICE").read_text() == "whose pictures they are"


@pytest.mark.parametrize(
    ("words", "change", "told"),
    [
        (["gone.json", "train.npz", "out"], {}, "No such file or directory: 'gone.json'"),
        (["it.json", "gone.npz", "out"], {}, "No such file or directory: 'gone.npz'"),
        (["it.json", "train.npz", "out"], {"train": {"step": 4}}, "unknown key 'step'"),
        (["it.json", "train.npz", "out"], {"train": {"steps": "4"}}, "steps must be"),
        (["it.json", "train.npz", "out"], {"more": {}}, "the sections unet, scheduler and train, got unet, "),
        (["it.json", "train.npz", "out"], {"unet": {"channels": 3}}, "unexpected keyword argument 'channels'"),
        (["it.json", "train.npz", "out", "--step", "3"], {}, "unrecognized arguments: --step"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    script: Any,
    config: dict[str, Any],
    data: Path,
    words: list[str],
    change: dict[str, Any],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.npz").write_bytes(data.read_bytes())
    Path("it.json").write_text(json.dumps(config | change))
    with pytest.raises(SystemExit) as stop:
        script.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert told in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "train.npz"]


def test_the_loss_is_min_snrs(script: Any) -> None:
    """In float64's place: of a network that returns 0, the weight times the mean square of v, at every t."""
    acp = torch.tensor([0.97, 0.5, 0.01])
    recipe = script.Recipe(steps=1, gamma=5.0, label_dropout=0.5)
    told = []

    class Zero:
        config = type("Config", (), {"num_class_embeds": 5})

        def __call__(self, x_t: Any, t: Any, labels: Any) -> Any:
            told.append((x_t, t, labels))
            return type("Out", (), {"sample": torch.zeros_like(x_t)})

    x0 = torch.randn(97, 3, 2, 2)
    labels = torch.full((97,), 2)
    got = script.loss_of(Zero(), recipe, acp, x0, labels, torch.Generator().manual_seed(3))
    ((x_t, t, dropped),) = told
    alpha, sigma = acp[t].sqrt()[:, None, None, None], (1 - acp[t]).sqrt()[:, None, None, None]
    eps = (x_t - alpha * x0) / sigma
    v = alpha * eps - sigma * x0
    snr = (acp / (1 - acp))[t]
    expected = (torch.minimum(snr, torch.tensor(5.0)) / (snr + 1) * v.square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert set(t.tolist()) == {0, 1, 2}
    assert set(dropped.tolist()) == {2, 4}
    assert abs(float(eps.std()) - 1) < 0.1
