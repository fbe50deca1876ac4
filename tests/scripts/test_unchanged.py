"""scripts/unchanged.py on arrays and trees made for it: what it calls different, what it counts, how it ends."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from scripts import unchanged
from scripts.unchanged import against_float64, arrows, circles, compare, house, longest_path

pytestmark = pytest.mark.quick

IMAGES = np.linspace(-1, 1, 8, dtype=np.float32)


def with_one_changed(amount: float) -> np.ndarray:
    changed = IMAGES.copy()
    changed[3] += np.float32(amount)
    return changed


def test_a_single_bit_is_named_and_a_tolerance_allows_it() -> None:
    next_up = IMAGES.copy()
    next_up[7] = np.nextafter(next_up[7], np.float32(2))
    assert compare({"ddim": IMAGES, "ddpm": IMAGES}, {"ddim": IMAGES.copy(), "ddpm": next_up}) == (
        ["ddpm: 12% of the numbers, max abs 1.19e-07"],
        [],
    )
    assert compare({"ddpm": IMAGES}, {"ddpm": next_up}, 2e-7) == ([], [])
    assert compare({"ddpm": IMAGES}, {"ddpm": with_one_changed(1e-3)}, 2e-7)[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (np.array("refused"), np.array("refused"), None),
        (np.array("refused"), IMAGES, "refused -> an array"),
        (IMAGES, np.array("broken: ImportError: x"), "an array -> broken: ImportError: x"),
        (np.array("broken: ImportError: x"), np.array("broken: ImportError: x"), "broken: ImportError: x -> broken"),
        (IMAGES, IMAGES[:7], "float32[8] -> float32[7]"),
        (IMAGES, IMAGES.astype(np.float64), "float32[8] -> float64[8]"),
        (np.zeros(2), -np.zeros(2), "in the sign of zeros"),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), None),
        (np.array([1.0, np.inf]), np.array([2.0, np.inf]), "50% of the numbers, max abs 1"),
        (np.array([1.0, 2.0]), np.array([1.0, np.nan]), "50% of the numbers, max abs nan"),
    ],
)
def test_what_counts_as_different(old: np.ndarray, new: np.ndarray, said: str | None) -> None:
    found = unchanged.difference(old, new)
    assert found is None if said is None else found is not None and found.startswith(said)
    if said is not None and ("broken" in said or "nan" in said or "->" in said):
        assert unchanged.difference(old, new, tolerance=10.0) == found  # no tolerance is for these


def test_what_is_gone_counts_and_what_is_added_does_not() -> None:
    assert compare({"gone": IMAGES}, {"added": IMAGES}) == (["gone: no longer there"], ["added"])


def test_errors_are_against_the_old_float64_run() -> None:
    exact = {"ddim": IMAGES.astype(np.float64), "keys (float32)": IMAGES.astype(np.float64), "t": np.arange(3)}
    near, far = ({name: array + np.float64(off) for name, array in exact.items()} for off in (1e-6, 2e-6))
    (kept,) = against_float64([near, near], [exact, exact])
    assert (kept.name, kept.lost) == ("ddim", False)
    assert kept.old == kept.new == pytest.approx(1e-6)
    (worse,) = against_float64([near, far], [exact, exact])
    assert worse.lost
    assert not against_float64([far, near], [exact, exact])[0].lost
    assert against_float64([near, near], [exact, far])[0].lost, "the two float64 runs do not agree"
    nan = exact | {"ddim": np.full_like(exact["ddim"], np.nan)}
    assert against_float64([near, nan], [exact, exact])[0].lost


MODULES = {
    "jddim/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jddim.load import load\n",
    "jddim/load.py": "from jddim import __version__, maths\n",
    "jddim/maths.py": "import jddim.models.unet\n\ndef lazy():\n    from jddim import table\n",
    "jddim/table.py": "import numpy\nfrom jddim.maths import step\n",
    "jddim/models/__init__.py": "from .unet import UNet\n",
    "jddim/models/unet.py": "from ..config import C\nfrom jddim.models import other\n",
    "jddim/config.py": "",
    "convert/__init__.py": "x = 1\n",
    "scripts/a.py": "if x:\n    y = 1\n",
    "tests/helper.py": "z = 1\n",
    "tests/test_a.py": "z = 1\nz = 2\n",
    "tests/deeper/helper.py": "z = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_arrows_circles_and_the_longest_path(tree: Path) -> None:
    graph = arrows(tree)
    assert graph == {
        "jddim": {"jddim.load"},
        "jddim.load": {"jddim.maths"},
        "jddim.maths": {"jddim.models.unet", "jddim.table"},
        "jddim.table": {"jddim.maths"},
        "jddim.models": {"jddim.models.unet"},
        "jddim.models.unet": {"jddim.config"},
        "jddim.config": set(),
    }
    assert circles(graph) == [["jddim.maths", "jddim.table"]]
    assert longest_path(graph) == [
        "jddim",
        "jddim.load",
        "jddim.maths+jddim.table",
        "jddim.models.unet",
        "jddim.config",
    ]
    assert [*house(tree).values()] == ["5", "16", "7", "5", "jddim.maths jddim.table"]


@pytest.fixture
def repository(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for args in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tree), *args], check=True)
    monkeypatch.setattr(unchanged, "ROOT", tree)
    return tree


def test_the_house_alone_and_a_commit_that_is_none(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "jddim" / "more.py").write_text("import jddim.config\n")
    assert unchanged.main(["HEAD", "--house"]) == 0
    said = capsys.readouterr().out
    assert "with uncommitted changes" in said
    assert "| modules at the top of jddim | 5 | 6 |" in said
    assert "| imports between jddim's modules | 7 | 8 |" in said
    for name in ("nothing", "--output=x", "HEAD:jddim"):
        assert unchanged.main(["--", name]) == 2
        assert (
            capsys.readouterr().err
            == f"error: {name!r} is no commit of this repository; `git log --oneline` lists some\n"
        )


@pytest.mark.parametrize(("off", "more", "status"), [(0, [], 0), (1e-6, [], 1), (1e-6, ["--tolerance", "1e-5"], 0)])
def test_the_exit_status_says_whether_anything_differs(
    off: float,
    more: list[str],
    status: int,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def arrays(self: unchanged.Tree, task: str, *args: str, x64: bool = False) -> dict[str, np.ndarray]:
        return {f"{task} at eta 1": with_one_changed(off if self.side == "new" and task == "samples" else 0)}

    monkeypatch.setattr(unchanged.Tree, "arrays", arrays)
    monkeypatch.setattr(unchanged.Tree, "convert", lambda self: None)
    assert unchanged.main(["HEAD", "--quick", *more]) == status
    said = capsys.readouterr().out
    assert "loops: 1 of 1 results equal" in said
    assert ("differs: samples at eta 1: 12% of the numbers, max abs" in said) == (status == 1)


def test_what_fails_in_a_tree_is_one_line_without_paths(tree: Path, tmp_path: Path) -> None:
    (tree / "jddim" / "__init__.py").write_text("raise RuntimeError(__file__)\n")
    run = unchanged.Tree("old", tree, tmp_path / "run")
    with pytest.raises(unchanged.UnchangedError, match=r"^the old tree's `-m jddim --help` failed; .*: \.\.\./jddim"):
        run.run("-m", "jddim", "--help", cache=None)
    servers = unchanged.Servers([unchanged.Tree("new", tree, tmp_path / "run")])
    with pytest.raises(unchanged.UnchangedError, match=r"^the new tree's `sample` failed; "), servers:
        pass
