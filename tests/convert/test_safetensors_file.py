"""`.safetensors` files: the same arrays as the format's own library, every size checked against the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.engine import ConversionError
from convert.files.readers import read

pytestmark = pytest.mark.quick


def write(path: Path, header: Any, content: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 3), offsets: tuple[int, int] = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_same_arrays_as_the_library_gives(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    tensors = {
        f"{dtype}": np.asarray(9 * rng.standard_normal((3, 5))).astype(dtype)
        for dtype in (np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.bfloat16)
    }
    tensors |= {"scalar": np.array(2.5), "empty": np.zeros((0, 3), np.float32)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    actual, expected = read(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape)
        assert actual[name].tobytes() == value.tobytes()


def test_arrays_lie_in_the_file(tmp_path: Path) -> None:
    value = read(write(tmp_path / "a.safetensors", {"a": entry()}, np.arange(6, dtype="<f4").tobytes()))["a"]
    np.testing.assert_array_equal(value, np.arange(6).reshape(2, 3))
    assert not value.flags.owndata
    assert not value.flags.writeable


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry()}, 23, "have 24 bytes, the file holds 23"),
        ({"a": entry()}, 25, "have 24 bytes, the file holds 25"),
        ({"a": entry(), "b": entry()}, 24, "gap or overlap"),
        ({"a": entry(offsets=(4, 28))}, 28, "gap or overlap"),
        ({"a": entry(offsets=(24, 0))}, 24, "has -24 bytes"),
        ({"a": entry(shape=(2**40, 2**40))}, 24, "has 24 bytes for a F32"),
        ({"a": entry(shape=(2,) * 4000)}, 24, "has 24 bytes for a F32"),
        ({"a": entry(shape=(1,) * 40, offsets=(0, 4))}, 4, "no tensor's"),
        ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0, "no tensor's"),
        ({"a": entry(shape=(-2, -3))}, 24, "no dtype, shape and data_offsets"),
        ({"a": entry(shape=(True, 6))}, 24, "no dtype, shape and data_offsets"),
        ({"a": entry() | {"shape": [2.0, 3.0]}}, 24, "no dtype, shape and data_offsets"),
        ({"a": {}}, 0, "no dtype, shape and data_offsets"),
        ({"a": entry(dtype="F4")}, 24, "unknown dtype F4"),
        ([1], 0, "not a table of tensors"),
        (b"{", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        (b"1" * 5000, 0, "not JSON"),
        (b"\xff\xff", 0, "not JSON"),
        (b'{"a": 1, "a": 2}', 0, "a name occurs twice"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, size: int, message: str) -> None:
    with pytest.raises(ConversionError, match=r"is not a whole \.safetensors file") as caught:
        read(write(tmp_path / "a.safetensors", header, bytes(size)))
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 1000, 5])
def test_header_lengths_that_lie(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}  ")
    with pytest.raises(ConversionError, match=f"its header would have {length} bytes, the file has 12"):
        read(tmp_path / "a.safetensors")
