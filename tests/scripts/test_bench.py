"""scripts/bench.py at its smallest: what it reports, that it checks the contestants before timing, what it refuses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jddim.config import AutoencoderConfig, ScheduleConfig, UNetConfig
from jddim.models.building import build_model
from scripts import contestants

torch = pytest.importorskip("torch", reason="the bench compares with torch: pip install 'jddim[convert]'")

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # For tensors this small threads only wait for each other: on a busy machine ten times longer.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case(bench: ModuleType):
    # Non-square, another width in each level, attention on one of them: whatever is misnamed or misplaced shows. 2
    # blocks, so that an index of a block may be none of a level.
    config = UNetConfig(
        image_size=(12, 8),
        in_channels=3,
        out_channels=3,
        channels=12,
        channel_mults=(1, 3),
        num_res_blocks=2,
        attention_levels=(0,),
        norm_groups=3,
    )
    return contestants.Case(
        size="mnist",  # the name under which the report looks a title up
        config=config,
        params=contestants.random_params(config, seed=7),
        schedule=ScheduleConfig("linear", 300, 1e-4, 0.02),
        timesteps=np.array([200, 100, 0]),  # what diffusers makes of 3 steps of 300
        x_T=np.random.default_rng(5).standard_normal((2, 12, 8, 3), dtype=np.float32),
    )


@pytest.mark.parametrize("kind", ["dit", "vae"])
def test_transformers_and_first_stages_agree_with_both_torchs(bench: ModuleType, kind: str):
    pytest.importorskip("diffusers", reason="it is one of the contestants: pip install diffusers")
    rng = np.random.default_rng(3)
    if kind == "dit":
        config: Any = dataclasses.replace(contestants.DIT_S_2, image_size=(6, 6), channels=24, depth=2, num_heads=3)
        x_T, timesteps = rng.standard_normal((2, 6, 6, 4), dtype=np.float32), np.array([500, 0])
    else:
        config = AutoencoderConfig((12, 12), channels=8, channel_mults=(1, 2), num_res_blocks=1, norm_groups=4)
        x_T, timesteps = rng.standard_normal((2, 6, 6, 4), dtype=np.float32), np.array([0])
    params = contestants.random_params(config, seed=7)
    case = contestants.Case(kind, config, params, ScheduleConfig("linear", 1000), timesteps, x_T)
    names = ("jddim", "torch", "torch-nhwc", "diffusers")
    found = {name: contestants.to_numpy(contestants.CONTESTANTS[name].build(case, "cpu")()) for name in names}
    errors = bench.agreement(found, "float32")
    assert 0 < max(errors.values()) < 2e-4  # rounding, of a network with random weights
    assert bench.arithmetic(case) > 0


def command(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


def test_report(tmp_path: Path):
    files: list[str | Path] = ["--json", tmp_path / "b.json", "--markdown", tmp_path / "b.md"]
    done = command("--quick", "--batch-sizes", "1", "--steps", "2", "--repeats", "2", *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "b.md").read_text()
    assert "| jddim |" in done.stdout
    assert "| PyTorch eager |" in done.stdout

    report = json.loads((tmp_path / "b.json").read_text())
    assert {"jax", "flax", "torch", "python", "jddim"} <= report["versions"].keys()
    assert report["machine"]["cpu"]
    assert 1 <= report["settings"]["threads"] <= report["machine"]["cores"]
    # The run restarted itself with what makes it fair.
    assert report["settings"]["environment"].keys() == {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "OMP_WAIT_POLICY",
    }
    assert all(report["settings"]["environment"].values())
    assert str(tmp_path) not in report["command"]  # a table for docs/benchmarks.md names no paths of the machine

    (result,) = report["cases"]
    assert (result["size"], result["batch_size"], result["steps"]) == ("mnist", 1, 2)
    assert result["model"]["channels"] == 32  # the shipped checkpoint's
    assert result["parameters"] == 1_112_801
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["jddim", "torch"]
    assert 0 < rows["torch"]["max_difference"] <= 1e-3  # two frameworks: the same, but not to the bit
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        median = sum(row["seconds"]) / 2
        # float64 arithmetic on the numbers above: rounding only
        assert row["seconds_per_step"] == pytest.approx(median / 2, rel=1e-12)
        assert row["images_per_s"] == pytest.approx(1 / median, rel=1e-12)
        assert row["first_call_s"] > 0
        # A process with a framework in it has tens of MiB; the peak covers what was there before.
        assert 30 < row["memory"]["before_mib"] <= row["memory"]["peak_mib"]
    assert rows["jddim"]["time_over_jddim"] == 1
    ratios = [theirs / ours for theirs, ours in zip(rows["torch"]["seconds"], rows["jddim"]["seconds"], strict=True)]
    assert rows["torch"]["time_over_jddim"] == pytest.approx(sum(ratios) / 2, rel=1e-12)


def test_memory_is_measured_on_timesteps_that_every_contestant_takes(
    bench: ModuleType, case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("diffusers", reason="it takes its own timesteps alone: pip install diffusers")
    run = subprocess.CompletedProcess([], 0, stdout='{"peak_mib": 1.0}\n', stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: run)
    bench.add_memory({"rows": [{"name": "diffusers"}]}, case, "cpu", 1, tmp_path)
    small = contestants.Case.load(tmp_path / "case.npz")
    assert small.timesteps.tolist() == [150, 0]
    bench.CONTESTANTS["diffusers"].build(small, "cpu")()  # it raises for another spacing


@pytest.mark.parametrize("name", ["torch", "torch-nhwc", "diffusers", "diffusers-nhwc"])
def test_contestants_make_the_same_images(bench: ModuleType, case, name: str):
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers", reason="the comparison with diffusers needs it: pip install diffusers")
    results = {n: bench.to_numpy(bench.CONTESTANTS[n].build(case, "cpu")()) for n in ("jddim", name)}
    assert np.abs(results["jddim"]).max() > 0.1
    # float32 rounding (1e-7 an operation, some hundred in sequence) times 1 / sqrt(alpha_bar) <= 3 in x0
    assert bench.agreement(results, "float32")[name] < 1e-4


@pytest.mark.parametrize(
    "name", ["down.0.attentions.1.q.kernel", "up.0.blocks.2.conv2.bias", "time_embed.linear_1.bias"]
)
def test_other_weights_are_noticed(bench: ModuleType, case, name: str):
    params = {**case.params, name: case.params[name][..., ::-1].copy()}
    wrong = dataclasses.replace(case, params=params)
    results = {
        "jddim": bench.to_numpy(bench.CONTESTANTS["jddim"].build(wrong, "cpu")()),
        "torch": bench.to_numpy(bench.CONTESTANTS["torch"].build(case, "cpu")()),
    }
    with pytest.raises(bench.BenchError, match=r"same x_0 from the same x_T: torch by .*nothing was timed"):
        bench.agreement(results, "float32")


@pytest.mark.parametrize("name", ["torch", "diffusers"])
def test_in_bfloat16_they_make_about_the_same_images(bench: ModuleType, case, name: str):
    pytest.importorskip("diffusers", reason="the comparison with diffusers needs it: pip install diffusers")
    half = dataclasses.replace(case, precision="bfloat16")
    made = {n: bench.to_numpy(bench.CONTESTANTS[n].build(half, "cpu")()) for n in ("jddim", name)}
    exact = bench.to_numpy(bench.CONTESTANTS["jddim"].build(case, "cpu")())
    assert bench.agreement(made, "bfloat16")[name] < 0.1  # 8 bits of mantissa, amplified by three steps
    for x_0 in made.values():  # and each differs from float32's, so it was in bfloat16
        assert 1e-4 < np.abs(x_0 - exact).mean() < 0.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nan_is_no_agreement(bench: ModuleType, precision: str):
    x = np.ones((1, 4, 4, 1), np.float32)
    with pytest.raises(bench.BenchError, match="torch by nan"):
        bench.agreement({"jddim": x, "torch": x * np.nan}, precision)


def test_a_contestant_that_cannot_take_part(bench: ModuleType, case, monkeypatch: pytest.MonkeyPatch):
    def build(case, device):
        raise bench.UnavailableError("no such thing here")

    monkeypatch.setitem(bench.CONTESTANTS, "torch", contestants.Contestant("PyTorch eager", build))
    result = bench.measure(case, ["jddim", "torch"], "cpu", 1, asked=False)
    row = result["rows"][1]
    assert row == {"name": "torch", "label": "PyTorch eager", "skipped": "no such thing here"}
    with pytest.raises(bench.BenchError, match="torch: no such thing here"):
        bench.measure(case, ["jddim", "torch"], "cpu", 1, asked=True)
    report = {
        "date": "2020-01-01",
        "command": "scripts/bench",
        "machine": {"cpu": "a CPU", "cores": 2, "gpu": "", "note": "", "load": 0.0, "matmul_peak": {"float32": 8e12}},
        "versions": {},
        "settings": {"threads": 2, "repeats": 1},
        "cases": [result],
    }
    table = bench.markdown(report)
    assert "PyTorch eager: left out; no such thing here." in table
    rate = result["rows"][0]["images_per_s"] * 3 * result["flops_per_image"]
    assert f"| {rate / 1e12:.0f} | {rate / 8e12:.0%} |" in table


def test_arithmetic_is_counted(bench: ModuleType):
    case = contestants.make_case("cifar10", 1, 1, "bfloat16")
    program = jax.jit(lambda model, x_t, t: model(x_t, t))
    model = build_model(case.config, case.params, np.float32)
    by_xla = program.lower(model, case.x_T, np.zeros(1, np.int32)).cost_analysis()["flops"]
    # XLA leaves out the products with the padding's zeros, 7 % of them at this size, and counts elementwise work.
    assert by_xla < bench.arithmetic(case) < 1.1 * by_xla


def test_cpus_have_no_tf32():
    done = command("--quick", "--precisions", "tf32", "--contestants", "torch")
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/bench: CPUs have no TF32, only float32 and bfloat16")


def test_case_survives_its_file(bench: ModuleType, case, tmp_path: Path):
    case.save(tmp_path / "case.npz")
    again = contestants.Case.load(tmp_path / "case.npz")
    assert (again.size, again.config, again.schedule) == (case.size, case.config, case.schedule)
    assert again.precision == case.precision
    assert again.params.keys() == case.params.keys()
    for name, value in case.params.items():
        np.testing.assert_array_equal(again.params[name], value)
    np.testing.assert_array_equal(again.timesteps, case.timesteps)
    np.testing.assert_array_equal(again.x_T, case.x_T)


def test_cifar10_is_the_published_size(bench: ModuleType):
    # 35.7M parameters: appendix B of arXiv:2006.11239
    assert sum(value.size for value in contestants.random_params(contestants.CIFAR10).values()) == 35_746_307


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "mnist,lsun"], "argument --sizes: knows mnist, cifar10, dit-s-2, vae; got 'lsun'"),
        (["--sizes", ","], "argument --sizes: needs at least one of mnist, cifar10, dit-s-2, vae"),
        (["--precisions", "fp8"], "argument --precisions: knows float32, tf32, bfloat16; got 'fp8'"),
        (["--contestants", "keras"], "argument --contestants: knows jddim, torch,"),
        (["--batch-sizes", "4,0"], "argument --batch-sizes: must be a whole number of at least 1, got '0'"),
        (["--batch-sizes", ""], "argument --batch-sizes: must be a whole number of at least 1, got ''"),
        (["--steps", "0"], "argument --steps: must be a whole number in 1..1000, got '0'"),
        (["--steps", "1001"], "argument --steps: must be a whole number in 1..1000, got '1001'"),
        (["--repeats", "-1"], "argument --repeats: must be a whole number of at least 1, got '-1'"),
        (["--threads", "100000"], "argument --threads: must be a whole number in 1.."),
        (["--json", "no/such/folder/b.json"], "argument --json: cannot write no/such/folder/b.json"),
        (["--markdown", "."], "argument --markdown: cannot write .: it must be a file"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options(bench: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str], said: str):
    with pytest.raises(SystemExit) as stopped:
        bench.main(options)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"scripts/bench: error: {said}")


def test_bad_option_of_the_command():
    done = command("--steps", "none")
    assert done.returncode == 2
    assert done.stderr == (
        "scripts/bench: error: argument --steps: must be a whole number in 1..1000, got 'none' "
        "(see scripts/bench --help)\n"
    )


def test_help():
    done = command("--help")
    assert done.returncode == 0
    assert "Time" in done.stdout
    assert "--quick" in done.stdout


def test_a_table_to_check_is_read_before_anything_is_timed(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("timed first"))
    assert bench.main(["--check", "nowhere.json", "--quick"]) == 1
    assert "--check nowhere.json cannot be read" in capsys.readouterr().err
