"""Fixtures that several test modules share. Without torch or the MNIST images, tests that need them skip and say so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

# No test may depend on a GPU being there, nor compete for its memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compiling. With XLA's older emitters of fusions, and code in one part, it takes half as
# long where LLVM does not optimise, 0.7 where it does. XLA ends a process that names a flag it does not know: these are
# jaxlib 0.10's. Where XLA_FLAGS is set, as for `quick` in .ci/run, XLA has the emitters that users have.
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with two torch threads each wait for one another more than they compute: 204 s against 121 for the
    # parity tests, on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
MNIST_SOURCE = ROOT / "scripts" / "assets" / "mnist-ddpm"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The commands that tests start keep their compiled programs for one another, not for the user.

    They compile as modules marked `unoptimised` do: a test that compares their bits with its own process's is in one.
    """
    os.environ["JDDIM_CACHE"] = str(tmp_path_factory.mktemp("programs"))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def optimisation_of_modules(request: pytest.FixtureRequest) -> None:
    """Modules and tests marked `unoptimised` compile as fast as XLA can: many programs that each run for moments.

    Tests in such modules that compare bits, or the programs that users run, are marked `optimised`, and stand first:
    programs are not kept across.
    """
    _optimise(request)


@pytest.fixture(autouse=True)
def optimisation(request: pytest.FixtureRequest) -> None:
    """The same of a single test."""
    _optimise(request)


def _optimise(request: pytest.FixtureRequest) -> None:
    import jax

    marked = request.node.get_closest_marker
    unoptimised = marked("unoptimised") is not None and marked("optimised") is None
    if jax.config.read("jax_disable_most_optimizations") and not unoptimised:
        # jit finds programs whatever the flag was: a test that compares bits would get one of each kind.
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", unoptimised)


@pytest.fixture
def users_emitters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """XLA's present emitters of fusions for samplers: with the older ones two programs of equal maths round apart."""
    from jddim.run import compiling, programs

    loops = [value for value in vars(programs).values() if isinstance(value, compiling.Jit)]
    assert loops
    if "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
        monkeypatch.setitem(compiling.CPU_OPTIONS, "xla_cpu_use_fusion_emitters", True)
    for loop in loops:
        loop.on.cache_clear()
    yield
    for loop in loops:
        loop.on.cache_clear()


@pytest.fixture(scope="session")
def mnist_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped MNIST checkpoint, converted once (needs torch)."""
    pytest.importorskip("torch", reason="converting the shipped checkpoint needs torch: pip install 'jddim[convert]'")
    from convert.conversion import convert

    path = tmp_path_factory.mktemp("converted") / "mnist"
    convert(MNIST_SOURCE / "ckpt.pth", path)
    return path


@pytest.fixture(scope="session")
def mnist_images() -> Path:
    """The folder of the real MNIST's IDX files, which the repository does not ship."""
    path = ROOT.parent / "shared" / "data" / "mnist"
    if not (path / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"the real MNIST is not at {path.parent.parent.name}/data/mnist beside the checkout")
    return path


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail; its one line on stderr. Nothing in tmp_path may have changed."""
    from jddim.cli.main import main

    def run(*command: object, status: int = 1) -> str:
        before = sorted(tmp_path.rglob("*"))
        try:
            code = main([str(word) for word in command])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        assert code == status, error
        assert error.count("\n") == 1, error
        assert error.startswith("jddim")
        assert "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


if find_spec("torch") is None:
    print("tests of the PyTorch side are left out: torch is not installed (pip install 'jddim[convert]')")
    measured = [
        "measure_digits.py",
        "measure_training.py",
        "parity/make_source_golden.py",
        "parity/make_ddnm_golden.py",
        "parity/make_flax_golden.py",
    ]
    collect_ignore_glob = ["convert/reference/*", *measured]
