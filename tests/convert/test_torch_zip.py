"""PyTorch's zip files without PyTorch: the same arrays as PyTorch's, and nothing but arrays."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.engine import ConversionError
from convert.files import torch_zip
from convert.files.mapped import FLOATS, MappedFile, UnreadableError
from convert.files.pickles import RefusedGlobalError, load, plain
from convert.files.readers import read

pytestmark = pytest.mark.quick

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]
needs_torch = pytest.mark.skipif(
    torch is None, reason="comparing with PyTorch needs torch: pip install 'jddim[convert]'"
)


def write(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, **entries: bytes) -> Path:
    """A zip as `torch.save` lays it out."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"a/{name}", content)
        for key, content in (storages or {}).items():
            archive.writestr(f"a/data/{key}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    offset: int = 0,
    numel: int = 6,
    kind: str = "torch\nFloatStorage",
    key: str = "0",
) -> bytes:
    """The opcodes of one tensor, any of its numbers wrong."""
    number = lambda value: pickle.dumps(value, 2)[2:-1]  # noqa: E731
    storage = b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, sides)) + b"t" for sides in (shape, strides))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"\x89}tR"


def as_pickle(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


SIX = np.arange(6, dtype="<f4")


# -- the same arrays --------------------------------------------------------------------------------------------------


def contents() -> dict[str, Any]:
    """Every kind of tensor and value that a checkpoint may hold."""
    torch.manual_seed(0)
    base = torch.randn(5, 7)
    tagged = torch.nn.Parameter(torch.randn(3))
    tagged.note = "kept by PyTorch, of no use here"  # type: ignore[attr-defined]
    floats = [torch.float16, torch.float32, torch.float64, torch.bfloat16]
    integers = [
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ]
    eighths = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
    return {
        **{str(dtype): (10 * torch.randn(3, 5)).to(dtype) for dtype in floats + eighths},
        **{str(dtype): torch.arange(11).to(dtype) for dtype in integers},
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "views": [base.T, base[1:, ::3], base[2], base[:0], base.view(-1)[3:4].squeeze(), base.flip(0)],
        "expanded": torch.randn(1, 3).expand(7, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "parameters": OrderedDict(
            a=torch.nn.Parameter(base), b=torch.nn.Parameter(base, requires_grad=False), c=tagged
        ),
        "module": torch.nn.Linear(2, 3).state_dict(),  # an OrderedDict with attributes
        "values": [None, True, 7, -(10**30), 0.1, "text", b"bytes\xff", (1, (2,)), {3: 4}, Counter("aab")],
        "inert": [torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3]), {5}],
    }


def as_arrays(value: Any) -> Any:
    """What PyTorch reads, in the form in which `read` gives it."""
    if isinstance(value, Mapping):
        return {key: as_arrays(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [as_arrays(item) for item in value]
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if not isinstance(value, torch.Tensor):
        return value
    foreign = FLOATS.get(str(value.dtype).removeprefix("torch."))
    bits = torch.uint8 if value.element_size() == 1 else torch.uint16
    value = value.detach()
    return value.numpy() if foreign is None else value.view(bits).numpy().view(foreign)


def assert_same(actual: Any, expected: Any) -> None:
    """Like containers of arrays with the same dtype, shape and bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()
    else:
        assert actual == expected


@needs_torch
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_our_reader_and_pytorch_give_identical_arrays(tmp_path: Path, protocol: int) -> None:
    torch.save(contents(), tmp_path / "two.pt")
    # PyTorch itself does not read its newer protocols this way
    expected = as_arrays(torch.load(tmp_path / "two.pt", weights_only=True))
    torch.save(contents(), tmp_path / "any.pt", pickle_protocol=protocol)
    assert_same(read(tmp_path / "any.pt"), expected)


@needs_torch
def test_both_formats_give_identical_arrays(tmp_path: Path) -> None:
    torch.save(contents(), tmp_path / "zip.pt")
    torch.save(contents(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert_same(read(tmp_path / "zip.pt"), read(tmp_path / "legacy.pt"))


@needs_torch
def test_the_shipped_checkpoint_is_read_as_pytorch_reads_it() -> None:
    from conftest import MNIST_SOURCE

    actual = read(MNIST_SOURCE / "ckpt.pth")
    expected = torch.load(MNIST_SOURCE / "ckpt.pth", weights_only=True)
    assert actual[4].keys() == expected[4].keys()
    for name, value in expected[4].items():
        np.testing.assert_array_equal(actual[4][name], value.numpy())
    assert actual[3] == expected[3]


@needs_torch
def test_files_without_plain_arrays(tmp_path: Path) -> None:
    for value, what in (
        (torch.ones(3).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "meta"),
        (torch.ones(3, dtype=torch.complex64).conj(), "conjugated"),
        (torch.ones(3).untyped_storage(), "storage without a tensor"),
    ):
        torch.save({"a": value}, tmp_path / "a.pt")
        with pytest.raises(ConversionError, match=f"not a plain array of numbers: .*{what}"):
            read(tmp_path / "a.pt")


def test_arrays_lie_in_the_file_and_cannot_change_it(tmp_path: Path) -> None:
    value = read(write(tmp_path / "a.pt", as_pickle(tensor((2, 3), (1, 2))), {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(value, SIX.reshape(3, 2).T)
    assert not value.flags.owndata
    assert not value.flags.writeable


@pytest.mark.parametrize("kind", ["Float", "BFloat16", "Long"])
def test_big_endian_files(tmp_path: Path, kind: str) -> None:
    numbers = {"Float": SIX, "BFloat16": SIX.view("<u2")[1::2], "Long": np.arange(6)}[kind]
    swapped = np.ascontiguousarray(numbers).byteswap().tobytes()
    pickled = as_pickle(tensor((2, 2), (3, 1), offset=1, kind=f"torch\n{kind}Storage"))
    value = read(write(tmp_path / "a.pt", pickled, {"0": swapped}, byteorder=b"big"))
    np.testing.assert_array_equal(value.astype(np.float32), [[1, 2], [4, 5]])


# -- nothing else -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor((7,), (1,)), "lies outside"),
        (tensor((2, 3), (3, 2)), "lies outside"),
        (tensor((6,), (1,), offset=1), "lies outside"),
        (tensor((6,), (1,), offset=-1), "no tensor's"),
        (tensor((6,), (-1,), offset=5), "no tensor's"),
        (tensor((-6,), (1,)), "no tensor's"),
        (tensor((2, 3), (1,)), "no tensor's"),
        (tensor((1,) * 33, (1,) * 33), "no tensor's"),
        (tensor((2**40,), (0,)), "more numbers than the file"),
        (tensor((0, 2**62), (1, 1)), "no tensor's"),
        (tensor((6,), (1,), numel=7), "storage 0 of 28 bytes has 24 bytes"),
        (tensor((6,), (1,), numel=2**60), "has 24 bytes"),
        (tensor((6,), (1,), numel=-6), "not a storage"),
        (tensor((6,), (1,), key="1"), "storage 1 of 24 bytes is missing"),
        (tensor((6,), (1,), key="../data.pkl"), "is missing"),
        (tensor((6,), (1,), kind="torch\nfloat32\nR"), "damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x01\x85K\x01\x85tR", "something else than a storage"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "missing 1 required positional argument"),
        (b"K\x01)R", "calls a int"),
        (b"ctorch\nfloat32\n)R", "calls a Kind"),
        (b"ctorch\nfloat32\n)\x81", "calls a Kind"),
        (b"ctorch\nfloat32\n}b", "fills a Kind as if it were a dict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b", "fills a Constructor"),
        (b"ccollections\nOrderedDict\n(tR]b0", "opcode POP"),
        (b"(lp0\n.", "opcode LIST"),
        (b"}(K\x01u", "a key has no value"),
        (b"})K\x01s", "a tuple as its key"),
        (b"}]K\x01s", "a list as its key"),
        (b"K\x01K\x02a", "fills a int"),
        (b"h\x05", "KeyError"),
        (b"R", "takes more than it has"),
        (b"(R", "takes more than it has"),
        (b"\x85", "takes more than it has"),
        (b"t", "IndexError"),
        (b"]q\x00h\x00a", "deep in each other"),  # a list in itself
        (b"c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R", "encodes something else"),
        (b"cbuiltins\nset\nK\x07\x85R", "a sequence of something else"),
        (b"ccollections\nOrderedDict\n](]K\x01eae\x85R", "damaged"),
        (b"ccollections\nCounter\n]K\x01\x85a\x85R", "a dict of something else"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "ValueError"),  # BINBYTES8 of 2**63 - 1 bytes
        (b"\x8b\xff\xff\xff\x7f", "ValueError"),  # LONG4 of 2**31 - 1 bytes
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged"),  # FRAME
        (b"K\x01r\xff\xff\xff\xff", None),  # a memo entry at 2**32 - 1
    ],
)
def test_pickles_that_torch_save_does_not_write(tmp_path: Path, pickled: bytes, message: str | None) -> None:
    path = write(tmp_path / "a.pt", as_pickle(pickled), {"0": SIX.tobytes()})
    if message is None:
        assert read(path) == 1
        return
    with pytest.raises(ConversionError) as caught:
        read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["os\nsystem", "builtins\neval", "builtins\ngetattr", "torch\nload", "torch._utils\n_rebuild_tensor_v4",
     "os.path\njoin",
     "torch.nn.modules.linear\nLinear", "numpy.core.multiarray\n_reconstruct", "collections\nUserDict",
     "torch.\nfloat32", "torch\nfloat32.__class__", "\n", "argparse\nFileType"],
)  # fmt: skip
def test_every_other_global_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.pt", as_pickle(b"c" + name.encode() + b"\n)R"))
    with pytest.raises(ConversionError, match="refused: its pickle calls") as caught:
        read(path)
    assert name.replace("\n", ".") in str(caught.value)


def test_a_global_by_the_stack_is_refused_with_a_printable_name(tmp_path: Path) -> None:
    pickled = as_pickle(text("os\n\x1b[2J") + text("system" + "m" * 999) + b"\x93")
    with pytest.raises(ConversionError, match="refused") as caught:
        read(write(tmp_path / "a.pt", pickled))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_bomb_of_references() -> None:
    opcodes = b"]q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    value = load(io.BytesIO(as_pickle(opcodes)), {}, lambda identity: None)
    with pytest.raises(UnreadableError, match="hold more than the file"):
        plain(value, lambda leaf: leaf, 4 * len(opcodes) + 1000)


def test_many_names_for_the_same_bytes(tmp_path: Path) -> None:
    opcodes = b"]" + tensor((64, 64), (64, 1), numel=4096) + b"q\x00a" + b"h\x00a" * 2000
    path = write(tmp_path / "a.pt", as_pickle(opcodes), {"0": bytes(4 * 4096)})
    with pytest.raises(ConversionError, match="show the same bytes until they are"):
        read(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "opcodes",
    [
        b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(5000)) + b"uq\x00"
        b"ccollections\nOrderedDict\nq\x02](" + b"h\x02h\x00\x85R" * 20_000 + b"e",
        b"](" + b"N" * 10_000 + b"eq\x00](cbuiltins\nset\nq\x02" + b"h\x02h\x00\x85R" * 20_000 + b"e",
        b"ctorch\ndevice\nq\x02(" + b"K\x07" * 10_000 + b"tq\x00](" + b"h\x02h\x00R" * 20_000 + b"e",
        text("x" * 10_000) + b"q\x00c_codecs\nencode\nq\x02](" + b"h\x02h\x00\x85R" * 20_000 + b"e",
    ],
    ids=["dicts", "sets", "arguments", "bytes"],
)
def test_what_constructors_copy_is_no_more_than_the_file(opcodes: bytes) -> None:
    with pytest.raises(UnreadableError, match="copy the same values until they are more than the file has bytes"):
        load(io.BytesIO(as_pickle(opcodes)), torch_zip.known_globals(lambda *_: None), lambda identity: None)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("as_pairs", [False, True])
def test_integer_keys_that_collide(as_pairs: bool) -> None:
    number = lambda i: (value := (i * (2**61 - 1)).to_bytes(16, "little")) and b"\x8a\x10" + value  # noqa: E731
    pairs = [number(i) + b"N" for i in range(1, 30_000)]
    opcodes = b"}(" + b"".join(pairs) + b"u"
    if as_pairs:
        opcodes = b"ccollections\nOrderedDict\n](" + b"".join(pair + b"\x86" for pair in pairs) + b"e\x85R"
    with pytest.raises(UnreadableError, match="a dict has a int beyond 64 bits as its key"):
        load(io.BytesIO(as_pickle(opcodes)), torch_zip.known_globals(lambda *_: None), lambda identity: None)


def test_a_shape_of_many_large_numbers_is_told_of_in_short(tmp_path: Path) -> None:
    for sides in ((1,) * 1000, (256**250,) * 32):
        with pytest.raises(ConversionError) as caught:
            read(write(tmp_path / "a.pt", as_pickle(tensor(sides, sides)), {"0": SIX.tobytes()}))
        assert len(str(caught.value)) < 450 + len(str(tmp_path))


def test_the_machine_names_what_it_refuses() -> None:
    with pytest.raises(RefusedGlobalError) as caught:
        load(io.BytesIO(pickle.dumps(shutil.rmtree, 2)), {}, lambda identity: None)
    assert caught.value.name == "shutil.rmtree"


# -- the zip ----------------------------------------------------------------------------------------------------------


def test_zips_that_torch_save_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def refused(message: str) -> None:
        with pytest.raises(ConversionError, match=message):
            read(path)

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", as_pickle(b"}") + b"\x00" * 10**6)
    refused("is compressed or encrypted")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", as_pickle(b"}"))
        archive.writestr("b/data.pkl", as_pickle(b"]"))
    refused("it holds 2 files data.pkl")
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:  # zipfile's, of the same name
        archive.writestr("a/data.pkl", as_pickle(b"}"))
        archive.writestr("a/data.pkl", as_pickle(b"]"))
    refused("one name twice")
    write(path, as_pickle(b"}"), byteorder=b"middle")
    refused("byte order is b'middle'")


@pytest.mark.parametrize("field", ["compress_size", "file_size", "header_offset"])
def test_directories_that_lie(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "a.pt", as_pickle(tensor((6,), (1,))), {"0": SIX.tobytes()})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)  # the storage's record
    at = directory + {"compress_size": 20, "file_size": 24, "header_offset": 42}[field]
    for value in (0, 1, 23, 25, 1000, 2**31, 2**32 - 2):
        content[at : at + 4] = struct.pack("<I", value)
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="is damaged"):
            read(path)


def test_overlapping_entries(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", as_pickle(b"}"), {str(i): SIX.tobytes() * 50 for i in range(2)})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    for at in (directory + 20, directory + 24):  # the pickle's entry now reaches over both storages
        content[at : at + 4] = struct.pack("<I", directory - 60)
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="entries overlap"):
        torch_zip.check(path)


# -- without torch ----------------------------------------------------------------------------------------------------


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", as_pickle(tensor((6,), (1,))), {"0": SIX.tobytes()})
    code = (
        "import sys; sys.modules['torch'] = None; from convert.files.readers import read; "
        f"assert read({str(path)!r}).tolist() == [0, 1, 2, 3, 4, 5]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(torch_zip.__file__).parent.parent)


def test_mapping_an_array_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8))
    with pytest.raises(UnreadableError, match="lies outside"):
        MappedFile.open(tmp_path / "a").array(np.dtype(np.float32), (2,), start=4, length=8)
