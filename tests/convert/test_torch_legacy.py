"""PyTorch's format before 1.6: its sizes are the file's, and its arrays lie in it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from convert.engine import ConversionError
from convert.files import torch_legacy
from convert.files.readers import read

torch = pytest.importorskip("torch", reason="PyTorch's old format is written by torch alone")


def write(path: Path) -> bytes:
    torch.save({"a": torch.arange(7.0)}, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


@pytest.mark.parametrize("numel", [6, 8, 200])
def test_a_storage_of_another_size(tmp_path: Path, numel: int) -> None:
    content = write(tmp_path / "a.pt")
    where = content.index(b"cpuq") + 5
    assert content[where : where + 2] == b"K\x07"
    (tmp_path / "a.pt").write_bytes(content[: where + 1] + bytes([numel]) + content[where + 2 :])
    with pytest.raises(ConversionError, match="is damaged or truncated"):
        read(tmp_path / "a.pt")


def test_a_storage_larger_than_the_file_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    content = write(tmp_path / "a.pt")
    where = content.index(b"cpuq") + 5
    huge = pickle.dumps(2**40, 2)[2:-1]
    (tmp_path / "a.pt").write_bytes(content[:where] + huge + content[where + 2 :])
    with pytest.raises(
        torch_legacy.DamagedFileError, match=r"storage \d+ should have 1099511627776 numbers; it has 7,"
    ):
        torch_legacy.read(tmp_path / "a.pt")


def test_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save([base.T, base[1]], tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    transposed, row = read(tmp_path / "a.pt")
    assert transposed.tolist() == base.T.tolist()
    assert row.tolist() == base[1].tolist()


def test_a_bomb_of_references(tmp_path: Path) -> None:
    bomb: list = []
    for _ in range(40):
        bomb = [bomb, bomb]
    torch.save(bomb, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="hold more than the file"):
        read(tmp_path / "a.pt")
