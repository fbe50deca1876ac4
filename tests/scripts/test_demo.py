"""scripts/demo.py: run again, it keeps what it has; another source or a broken result is converted again."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


def test_the_conversion_is_kept_while_it_is_of_this_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1]))

    demo.load_or_convert()
    assert "Converting" in capfd.readouterr().out
    kept = (tmp_path / "mnist" / "metadata" / "metadata").stat().st_ino
    demo.load_or_convert()
    assert "kept" in capfd.readouterr().out
    assert (tmp_path / "mnist" / "metadata" / "metadata").stat().st_ino == kept

    (tmp_path / "mnist" / "metadata" / "metadata").write_text("{}")
    demo.load_or_convert()
    assert "converting again" in capfd.readouterr().out
