"""Reading files: whole or not at all, and never running anything in them."""

from __future__ import annotations

import argparse
import builtins
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reading PyTorch files needs torch: pip install 'jddim[convert]'")

from tiny import state_dict  # noqa: E402

from convert.engine import ConversionError  # noqa: E402
from convert.files.readers import read, sha256  # noqa: E402


def write_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_safetensors(content: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(content, path)


FORMATS: dict[str, Callable[[Any, Path], None]] = {
    "file.pth": write_zip,
    "legacy.pth": write_legacy,
    "file.safetensors": write_safetensors,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_arrays(tmp_path: Path, name: str) -> None:
    expected = state_dict()
    FORMATS[name](expected, tmp_path / name)
    actual = read(tmp_path / name)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value.numpy())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    value = torch.randn(3, 5, dtype=torch.float64).to(dtype)
    FORMATS[name]({"a": value}, tmp_path / name)
    actual = read(tmp_path / name)["a"]
    assert actual.dtype.name == str(dtype).removeprefix("torch.")  # bfloat16 is ml_dtypes', and widened when used
    np.testing.assert_array_equal(actual.astype(np.float64), value.double().numpy())  # widening is exact


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"a": torch.tensor([1.5, -0.25]).to(dtype)}, tmp_path / "a.pth")
    np.testing.assert_array_equal(read(tmp_path / "a.pth")["a"], np.array([1.5, -0.25], np.float32))


def test_containers_and_plain_values_are_kept(tmp_path: Path) -> None:
    content = [OrderedDict(a=torch.nn.Parameter(torch.ones(2))), {"lr": 0.1, "on": True}, 7, (None, "text")]
    torch.save(content, tmp_path / "a.pth")
    state, optimizer, step, last = read(tmp_path / "a.pth")
    np.testing.assert_array_equal(state["a"], np.ones(2))
    assert (optimizer, step, last) == ({"lr": 0.1, "on": True}, 7, [None, "text"])


def test_a_view_is_read_as_what_it_shows(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"transposed": base.T, "strided": base[:, ::2]}, tmp_path / "a.pth")
    actual = read(tmp_path / "a.pth")
    np.testing.assert_array_equal(actual["transposed"], base.T.numpy())
    np.testing.assert_array_equal(actual["strided"], base[:, ::2].numpy())


@pytest.mark.parametrize("kind", ["to_sparse", "meta"])
def test_tensors_without_plain_numbers(tmp_path: Path, kind: str) -> None:
    value = torch.ones(3).to_sparse() if kind == "to_sparse" else torch.ones(3, device="meta")
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="not a plain array of numbers"):
        read(tmp_path / "a.pth")


# -- files that are broken --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("keep", [0, 1, 2, 10, 100, 0.5, 0.9, -100, -1])
def test_truncated_files(tmp_path: Path, name: str, keep: float) -> None:
    FORMATS[name](state_dict(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / name).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ConversionError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message
    # Nothing of PyTorch's advice to switch weights_only off, which is how files run code.
    assert "weights_only" not in message
    if keep == 0:
        assert "is empty (0 bytes)" in message
    elif keep != 1:
        assert "truncated" in message or "not a whole" in message


def test_a_flipped_byte_in_the_weights(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ConversionError, match="is damaged: Bad CRC-32"):
        read(tmp_path / "a.pth")


def test_a_file_written_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(read(tmp_path / "a.pth")["a"], np.arange(5.0))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.pth", b"\x00" * 64, "is not a PyTorch checkpoint"),
        ("a.pth", b"\x80\x02garbage", "is damaged or truncated"),
        ("a.pth", b"\x80\x02" + bytes(range(256)), "is damaged or truncated"),
        ("a.pth", b"<!DOCTYPE html><html>log in", "is a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer"),
        ("a.pth", b"\x89PNG\r\n\x1a\n" + b"\x00" * 64, "is not a PyTorch checkpoint: it begins with"),
        ("a.safetensors", b"\x80\x02garbage", "is not a whole .safetensors file"),
        ("a.safetensors", b"<html>log in", "is a web page"),
        (
            "a.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "is a Git LFS pointer",
        ),
        ("a.safetensors", b"\xff" * 100, "is not a whole .safetensors file"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        read(tmp_path / name)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "what"),
    [
        (
            {"notes.txt": b"x", "more.txt": b"y"},
            "is a zip archive, but not a PyTorch checkpoint (holds notes.txt, more.t",
        ),
        ({}, "is a zip archive, but not a PyTorch checkpoint (holds nothing)"),
        ({"archive/data.pkl": b"not a pickle"}, "is damaged or truncated"),
        ({"archive/data.pkl": b"\x80\x02}.", "archive/version": b"3\n"}, None),
        ({"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/m.py": b"import os"}, "is a TorchScript program"),
    ],
)
def test_zips(tmp_path: Path, members: dict[str, bytes], what: str | None) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    if what is None:
        assert read(tmp_path / "a.pth") == {}  # an empty dict saved: a whole file, for the families to refuse
        return
    with pytest.raises(ConversionError) as caught:
        read(tmp_path / "a.pth")
    assert what in str(caught.value)
    assert "report an enhancement" not in str(caught.value)


def test_an_npz_is_named_by_its_contents(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(3))
    with pytest.raises(ConversionError, match=r"zip archive, but not .* \(holds arr_0\.npy\)"):
        read(tmp_path / "samples.npz")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such file"):
        read(tmp_path / "absent.pth")
    with pytest.raises(ConversionError, match="is a folder; name the checkpoint file in it"):
        read(tmp_path)


# -- files that run code ----------------------------------------------------------------------------------------------


class Calls:
    """Unpickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile(mark: Path) -> dict[str, Calls]:
    """Objects that create the file `mark` when they are unpickled."""
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    return {
        "posix.system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
    }


def write_pickle(protocol: int) -> Callable[[Any, Path], None]:
    return lambda content, path: path.write_bytes(pickle.dumps(content, protocol)) and None


WRITERS = {"zip": write_zip, "legacy": write_legacy} | {f"pickle {n}": write_pickle(n) for n in (2, 3, 4, 5)}


@pytest.mark.filterwarnings("error")  # PyTorch warns of pickle protocols, which would be more lines on stderr
@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("what", ["posix.system", "eval", "exec"])
def test_a_pickle_that_runs_code_is_refused_and_never_run(tmp_path: Path, how: str, what: str) -> None:
    mark, path = tmp_path / "it-ran", tmp_path / "a.pth"
    WRITERS[how](OrderedDict({"temb.dense.0.weight": hostile(mark)[what]}), path)
    with pytest.raises(ConversionError) as caught:
        read(path)
    assert not mark.exists()
    message = str(caught.value)
    assert "refused: its pickle calls" in message
    assert what.rpartition(".")[2] in message
    assert "never runs code" in message
    assert "torch.save(model.state_dict(), FILE)" in message
    # The same file does run code when it is read without care: the test would otherwise prove nothing.
    if how.startswith("pickle"):
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_text_pickles_are_not_checkpoints(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "it-ran"
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": hostile(mark)["posix.system"]}, protocol))
    with pytest.raises(ConversionError, match="is not a PyTorch checkpoint"):
        read(tmp_path / "a.pth")
    assert not mark.exists()


def test_a_whole_module_is_refused_with_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"refused: its pickle calls torch\.nn\.modules\.linear\.Linear"):
        read(tmp_path / "a.pth")


def test_networks_with_their_source_in_a_file_of_torch_save_are_named(tmp_path: Path) -> None:
    pickled = b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R."
    with zipfile.ZipFile(tmp_path / "state.pt", "w") as archive:
        archive.writestr("state/data.pkl", pickled)
    with pytest.raises(ConversionError, match=r"state\.pt is a file of torch\.save with NVIDIA's networks in it"):
        read(tmp_path / "state.pt")


# -- what stands for objects ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("new", [True, False])
def test_objects_of_data_are_read_as_data(tmp_path: Path, protocol: int, new: bool) -> None:
    tree: defaultdict[str, Any] = defaultdict(list)
    tree["losses"].append(np.float32(0.5))
    content = {
        "args": argparse.Namespace(
            lr=1e-4, out=PurePosixPath("/runs/a"), sizes=(64, np.int64(32)), deep=SimpleNamespace(a=1)
        ),
        "path": Path("runs/b"),
        "windows": PureWindowsPath("C:\\runs\\c"),
        "tree": tree,
        "nothing": defaultdict(None, a=1),
        "counts": [np.int8(-3), np.uint16(65535), np.float16(0.5), np.float64(0.1), np.bool_(True), np.str_("an é")],
        "foreign": np.dtype(">f8").type(2.5),
        "kinds": [np.dtype("float32"), torch.float16, int],
        "weight": torch.ones(2),
    }
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    actual = read(tmp_path / "a.pt")
    np.testing.assert_array_equal(actual.pop("weight"), np.ones(2))
    assert actual == {
        "args": {"lr": 1e-4, "out": "/runs/a", "sizes": [64, 32], "deep": {"a": 1}},
        "path": "runs/b",
        "windows": "C:\\runs\\c",
        "tree": {"losses": [0.5]},
        "nothing": {"a": 1},
        "counts": [-3, 65535, 0.5, 0.1, True, "an é"],
        "foreign": 2.5,
        "kinds": ["numpy.<f4", "torch.float16", "int"],
    }
    assert all(type(value) in (int, float, bool, str) for value in actual["counts"])


SCALAR = b"\x80\x02cnumpy.core.multiarray\nscalar\n"
F8 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (SCALAR + F8 + b"C\x03abc\x86R.", "3 bytes as a NumPy value of 8"),
        (SCALAR + F8.replace(b"f8", b"O8") + b"C\x08abcdefgh\x86R.", "a NumPy value of type O8"),
        (
            SCALAR + F8.replace(b"\x02\0\0\0f8", b"\x09\0\0\0U99999999") + b"C\x01a\x86R.",
            "1 bytes as a NumPy",
        ),
        (SCALAR + F8 + b"(K\x03X\x01\x00\x00\x00?NNNK\x01tbC\x08abcdefgh\x86R.", "not of numbers or text"),
        (SCALAR + b"K\x01C\x08abcdefgh\x86R.", "something else than a dtype and bytes"),
        (b"\x80\x02cnumpy\ndtype\nK\x01\x85R.", "something else than its name"),
        (b"\x80\x02cpathlib\nPosixPath\nK\x01\x85R.", "a path of something else than names"),
        (b"\x80\x02cargparse\nNamespace\n)\x81K\x01b.", "something else than attributes"),
        (b"\x80\x02cargparse\nNamespace\n}\x85\x81.", "takes 0 positional arguments"),
        (b"\x80\x02cargparse\nNamespace\n)\x81}K\x01K\x01sb.", "something else than attributes"),
        (b"\x80\x02cbuiltins\nint\n)R.", "it calls a str"),
        (b"\x80\x02ccollections\ndefaultdict\ncbuiltins\nlist\nK\x01\x86R.", "a dict of something else"),
    ],
)
def test_what_stands_for_objects_takes_only_their_data(tmp_path: Path, pickled: bytes, message: str) -> None:
    (tmp_path / "a.pt").write_bytes(pickled)
    with pytest.raises(ConversionError, match=f"is damaged or truncated: .*{message}"):
        read(tmp_path / "a.pt")


def test_a_torchscript_archive(tmp_path: Path) -> None:
    # As torch.jit.save lays it out; torch.jit itself is deprecated.
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"a/{name}", b"x")
    with pytest.raises(ConversionError, match=r"is a TorchScript program, not a checkpoint; save its state_dict\(\)"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_harmless_pickle_of_another_protocol(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": [1, 2.0]}, protocol))
    with pytest.raises(ConversionError, match=r"is a pickle, but not one that torch\.save wrote"):
        read(tmp_path / "a.pth")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
