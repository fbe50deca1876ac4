"""flax's msgpack files: arrays alone, each as large as it says; and the first stage whose names they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from flax import serialization

from convert import recognition
from convert.engine import ConversionError
from convert.families import flax_autoencoder
from convert.files import readers

pytestmark = pytest.mark.quick


def array(shape: Any, name: Any, data: Any, kind: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(kind, msgpack.packb((shape, name, data)))


def written(folder: Path, content: bytes) -> Path:
    file = folder / "diffusion_flax_model.msgpack"
    file.write_bytes(content)
    return file


def test_every_array_comes_back_under_its_path(tmp_path: Path) -> None:
    import ml_dtypes

    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.int64):
        tree = {"a": {"b_0": {"kernel": rng.normal(0, 9, (2, 3, 5)).astype(dtype)}, "c": np.zeros((), dtype)}}
        found = readers.read(written(tmp_path, serialization.to_bytes(tree)))
        assert [*found] == ["a.b_0.kernel", "a.c"]
        for value, expected in zip(found.values(), (tree["a"]["b_0"]["kernel"], tree["a"]["c"]), strict=True):
            assert value.dtype == dtype
            assert value.shape == np.shape(expected)
            assert (value == expected).all()


WHOLE = serialization.to_bytes({"a": np.zeros((3, 5), np.float32)})
DEEP: Any = {"a": np.zeros(3)}
for _ in range(16):
    DEEP = {"a": DEEP}
BAD = {
    "cut short": WHOLE[:-1],
    "more after it": WHOLE + b"x",
    "a list": msgpack.packb([1, 2]),
    "a list that claims to be long": b"\xdd\xff\xff\xff\xff",
    "a dict that claims to be long": b"\xdf\xff\xff\xff\xff",
    "a number": msgpack.packb({"a": 3}),
    "bytes": msgpack.packb({"a": b"12"}),
    "a number as key": msgpack.packb({1: array([1], "uint8", b"1")}),
    "a complex number": serialization.msgpack_serialize({"a": 1j}),
    "a name twice": b"\x82" + WHOLE[1:] * 2,
    "a path twice": serialization.to_bytes({"a": {"b": np.zeros(3)}, "a.b": np.zeros(3)}),
    "deep": serialization.to_bytes(DEEP),
    "deeper than msgpack goes": b"\x81\xa1a" * 5000,
    "in chunks": msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 1}}}),
    "too few bytes": msgpack.packb({"a": array([2, 3], "float32", b"1234")}),
    "a large shape": msgpack.packb({"a": array([1 << 40, 1 << 40], "float32", b"1234")}),
    "a negative side": msgpack.packb({"a": array([-1, -4], "uint8", b"1234")}),
    "a side that is no integer": msgpack.packb({"a": array([True, 4.0], "uint8", b"1234")}),
    "many sides": msgpack.packb({"a": array([1] * 33, "uint8", b"1")}),
    "sides and none": msgpack.packb({"a": array([0] + [1 << 62] * 31, "uint8", b"")}),
    "objects": msgpack.packb({"a": array([1], "object", b"12345678")}),
    "text for bytes": msgpack.packb({"a": array([1], "uint8", "1")}),
    "no array": msgpack.packb({"a": msgpack.ExtType(1, b"\xc1")}),
    "nothing in it": msgpack.packb({"a": msgpack.ExtType(1, b"")}),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_what_is_no_tree_of_arrays_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"is not a whole \.msgpack file: .+") as caught:
        readers.read(written(tmp_path, content))
    assert len(str(caught.value)) < 500


def test_two_names_that_would_be_one_are_refused() -> None:
    state = {f"encoder.down_blocks_0.resnets_{i}.conv1.kernel": np.zeros((3, 3, 5, 7), np.float32) for i in range(2)}
    assert flax_autoencoder.recognise(state)
    twice = state | {"encoder.down_blocks.0.resnets_0.conv1.kernel": np.zeros((3, 3, 5, 7), np.float32)}
    with pytest.raises(ConversionError, match="under names that PyTorch would have as one"):
        flax_autoencoder.open_source(twice, "file")


def test_a_network_of_text_is_called_so() -> None:
    places = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out")
    names = [f"{place}.{kind}" for place in places for kind in ("kernel", "bias")]
    names += ["down_blocks_0.attentions_0.transformer_blocks_0.attn2.to_k.kernel"]
    with pytest.raises(ConversionError, match="is a diffusers model with cross-attention to text"):
        recognition.recognise({name: np.zeros(3, np.float32) for name in names}, "file")
