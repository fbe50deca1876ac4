"""jddim.files: nothing is lost at a destination, whoever comes between or kills; readers take what they can bear."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tiny import tree

from jddim import files
from jddim.files import atomic, parse_json, read_arrays, read_json, recover, rename_new, replacing, write_array

pytestmark = pytest.mark.quick


@pytest.fixture(params=["linux", "portable"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "portable":
        monkeypatch.setattr(files, "_renameat2", lambda: None)
    return request.param


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "text").write_text(text)
    return path


def ours(path: Path) -> bool:
    return (path / "text").exists()


def write(target: Path, may_replace: Callable[[Path], bool] | None, during: Callable[[], object]) -> None:
    """A folder of ours; what happens while it is written."""
    with replacing(target, may_replace) as new:
        folder(new, "new")
        during()


# -- writing ----------------------------------------------------------------------------------------------------------


def test_of_two_writers_the_second_is_refused(tmp_path: Path, system: str) -> None:
    target = tmp_path / "a" / "ckpt"
    with pytest.raises(FileExistsError, match="ckpt"):
        write(target, None, lambda: write(target, None, lambda: None))
    assert tree(tmp_path) == {"a": None, "a/ckpt": None, "a/ckpt/text": b"new"}


@pytest.mark.parametrize("may_replace", [None, ours])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_appears_meanwhile_stays(
    tmp_path: Path, system: str, kind: str, may_replace: Callable[[Path], bool] | None
) -> None:
    target = tmp_path / "ckpt"

    def appears() -> None:
        if kind == "link":
            target.symlink_to("nowhere")
        elif kind == "file":
            target.write_text("years of work")
        else:
            target.mkdir()
            (target / "thesis").write_text("years of work")

    with pytest.raises(FileExistsError):
        write(target, may_replace, appears)
    assert os.readlink(target) == "nowhere" if kind == "link" else b"years of work" in tree(tmp_path).values()
    assert os.listdir(tmp_path) == ["ckpt"]


def test_what_appears_after_it_was_looked_at_stays(tmp_path: Path, system: str) -> None:
    folder(tmp_path / "ckpt", "old")
    looked = []

    def may_replace(path: Path) -> bool:
        looked.append(path)
        if len(looked) == 1:
            (path / "text").rename(path / "thesis")
            return True
        return ours(path)

    with pytest.raises(FileExistsError):
        write(tmp_path / "ckpt", may_replace, lambda: None)
    assert tree(tmp_path) == {"ckpt": None, "ckpt/thesis": b"old"}


def test_a_folder_or_a_link_to_one_is_replaced_where_it_may_be(tmp_path: Path, system: str) -> None:
    folder(tmp_path / "elsewhere", "another's")
    folder(tmp_path / "ckpt", "old")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("ckpt", "link"):
        write(tmp_path / name, ours, lambda: None)
        assert (tmp_path / name / "text").read_text() == "new"
    assert (tmp_path / "elsewhere" / "text").read_text() == "another's"
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "elsewhere", "link"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "ckpt", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "ckpt", ours, full)
    assert tree(tmp_path) == {"ckpt": None, "ckpt/text": b"old"}
    with monkeypatch.context() as broken:
        broken.setattr(files, "_rename" if system == "linux" else "rename_new", full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "ckpt", ours, lambda: None)
    recover(tmp_path / "ckpt")  # elsewhere than on Linux moving it back failed too
    assert tree(tmp_path) == {"ckpt": None, "ckpt/text": b"old"}


KILLED = """
import contextlib, json, os, signal, sys
from pathlib import Path
from jddim import files

base, count, event = Path(sys.argv[1]), 0, 0

def hook(name, arguments):
    global count
    if event and name in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir"):
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)

def write(target, text, overwrite):
    with files.replacing(target, (lambda path: (path / "text").exists()) if overwrite else None) as new:
        new.mkdir()
        (new / "text").write_text(text)

sys.addaudithook(hook)
linux, said = files._renameat2, []
for portable in (False, True):
    files._renameat2 = (lambda: None) if portable else linux
    for overwrite in (False, True):
        for number in range(1, 20):
            folder = base / f"{portable}-{overwrite}-{number}"
            folder.mkdir()
            target = folder / "ckpt"
            if overwrite:
                write(target, "old", False)
            child = os.fork()
            if child == 0:
                event = number
                write(target, "new", overwrite)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            at_once = target.exists()
            files.recover(target)
            text = (target / "text").read_text() if target.exists() else None
            said.append([portable, overwrite, os.WIFSIGNALED(status), at_once, text, os.listdir(folder)])
print(json.dumps(said))
"""


def test_killed_at_every_change_of_a_name_nothing_is_lost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    ends = json.loads(done.stdout)
    for portable, overwrite, killed, at_once, text, left in ends:
        assert left == ([] if text is None else ["ckpt"])  # the next start sweeps
        assert text in (["old", "new"] if overwrite else [None, "new"] if killed else ["new"])
        assert at_once or portable or not overwrite  # by the exchange there always is one or the other
    for portable in (False, True):
        for overwrite in (False, True):
            of = [end for end in ends if end[:2] == [portable, overwrite]]
            assert {end[4] for end in of if end[2]} == ({"old", "new"} if overwrite else {None, "new"})
            assert not all(end[2] for end in of)  # every change of a name was struck
    assert any(not at_once for portable, overwrite, _, at_once, *_ in ends if portable and overwrite)


def test_what_a_living_process_writes_is_not_swept(tmp_path: Path) -> None:
    with replacing(tmp_path / "ckpt") as new:
        folder(new, "new")
        recover(tmp_path / "ckpt")
        assert ours(new)
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_file_is_only_replaced_where_it_may_be(tmp_path: Path, system: str) -> None:
    target = tmp_path / "a.bin"

    def write_new(during: Callable[[], object], overwrite: bool) -> None:
        with atomic(target, overwrite=overwrite) as staging:
            staging.write_text("new")
            during()

    with pytest.raises(FileExistsError):
        write_new(lambda: target.write_text("appeared"), False)
    assert tree(tmp_path) == {"a.bin": b"appeared"}
    write_new(lambda: None, True)
    with pytest.raises(FileExistsError):
        rename_new(target, folder(tmp_path / "b", "b"))
    rename_new(target, tmp_path / "c")
    assert tree(tmp_path) == {"b": None, "b/text": b"b", "c": b"new"}


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy as np; from pathlib import Path; from jddim.files import atomic, write_array\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n with atomic(Path(sys.argv[1])) as staging: write_array(staging, np.zeros(1000))\n"
        "except OSError as error: print(error.strerror, error.filename)\n"
    )
    path = tmp_path / "a.npy"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"File too large {path}\n"
    assert not list(tmp_path.iterdir())


def test_arrays_are_written_as_numpy_writes_them(tmp_path: Path) -> None:
    for array in (
        np.arange(15.0, dtype=np.float32).reshape(3, 5),
        np.asfortranarray(np.ones((2, 3))),
        np.zeros((0, 4)),
    ):
        write_array(tmp_path / "ours.npy", array)
        np.testing.assert_array_equal(np.load(tmp_path / "ours.npy"), array)


# -- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(tmp_path: Path, *, megabytes: int = 300) -> Iterator[None]:
    """An address space of so many MB more than there is: what takes more raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + content


def npz(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def encrypted(content: bytes) -> bytes:
    at = content.index(b"PK\x01\x02") + 8
    return content[:6] + bytes([content[6] | 1]) + content[7:at] + bytes([content[at] | 1]) + content[at + 1 :]


BAD = {
    "huge": npy(header("(1000000000000,)")),
    "wrapping": npy(header("(4294967296, 4294967296, 16)")),
    "many, of nothing": npy(header("(1000000000000, 0)")),
    "negative": npy(header("(-1, -1)"), bytes(8)),
    "of bools": npy(header("(True, 2.5)"), bytes(8)),
    "a thousand dimensions": npy(header(f"({'1, ' * 1000})"), bytes(8)),
    "short": npy(header("(3,)"), bytes(8)),
    "objects": npy(header("(1,)", "'|O'"), b"\x80\x04N."),
    "records": npy(header("(1,)", "[('a', '<f4'), ('b', '<f4')]"), bytes(8)),
    "text": npy(header("(1,)", "'<U2'"), bytes(8)),
    "no bytes each": npy(header("(9,)", "'<U0'"), bytes(8)),
    "dates": npy(header("(1,)", "'<M8[s]'"), bytes(8)),
    "no dtype": npy(header("(1,)", "'&&'"), bytes(8)),
    "deep": npy(header("(" * 4000), bytes(8)),
    "deep, long": npy(header("(" * 70_000), bytes(8), b"\x02\x00"),
    "no dict": npy("3", bytes(8)),
    "no text": npy("\xff\x00", bytes(8)),
    "unclosed": npy("{'descr': '''", bytes(8)),
    "newer": npy(header("(2,)"), bytes(8), b"\x03\x00"),
    "newest": npy(header("(2,)"), bytes(8), b"\x09\x00"),
    "cut": b"\x93NUM",
    "nothing": b"",
    "a web page": b"<!DOCTYPE html>",
    "a zip's beginning": b"PK\x03\x04, and no more",
    "no .npy inside": npz(("arr_0", b"text")),
    "one name twice": npz(("arr_0.npy", npy(header("(2,)"), bytes(8))), ("arr_0", b"")),
    "longer than it says": npz(("arr_0.npy", npy(header("(1,)"), bytes(8)))),
    "lzma": npz(("arr_0.npy", npy(header("(2,)"), bytes(8))), method=zipfile.ZIP_LZMA),
    "encrypted": encrypted(npz(("arr_0.npy", npy(header("(2,)"), bytes(8))))),
    "broken deflate": npz(("arr_0.npy", npy(header("(99,)"), os.urandom(396)))).replace(b"NUMPY", b"NUMBY"),
    "broken deflate inside": (lambda c: c[:60] + bytes(40) + c[100:])(
        npz(("arr_0.npy", npy(header("(99,)"), bytes(range(198)) * 2)))
    ),
    "gigabytes": npz(("arr_0.npy", npy(header("(100000000,)"), bytes(400_000_000)))),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BAD)
def test_arrays_that_are_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(BAD[name])
    with limited(tmp_path):
        for mapped in (False, True):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                read_arrays(path, mapped=mapped)
            assert 0 < len(str(caught.value)) <= 300
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "save", [np.save, lambda path, x: np.savez(path, x=x), lambda p, x: np.savez_compressed(p, x=x)]
)
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, save: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    for array in (
        rng.standard_normal((3, 5, 7)),
        np.asfortranarray(rng.integers(0, 9, (3, 5)).astype(">i2")),
        np.zeros((0, 3), np.uint8),
        np.float32(3),
        rng.standard_normal(11) > 0,
    ):
        with open(tmp_path / "a", "wb") as file:
            save(file, array)
        found = read_arrays(tmp_path / "a")
        found = found["x"] if isinstance(found, dict) else found
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.ones(3), words=np.array(["a", "bc"]), more=np.zeros(2))
    assert read_arrays(tmp_path / "a.npz", ["arr_0", "arr_1"]).keys() == {"arr_0"}
    assert read_arrays(tmp_path / "a.npz", text=True)["words"].tolist() == ["a", "bc"]
    with pytest.raises(ValueError, match="it holds <U2, not numbers"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.timeout(20)
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "zeros", "loop", "", "absent"):
        for read in (read_json, read_arrays, files.read_regular):
            with pytest.raises(OSError, match=name or "Is a directory"):
                read(tmp_path / name)
    (tmp_path / "loop").unlink()
    with pytest.raises(OSError, match="is a pipe or a device"):
        files.check_regular(tmp_path)
    for name in ("pipe", "zeros"):
        (tmp_path / name).unlink()
    (tmp_path / "in" / "in").mkdir(parents=True)
    (tmp_path / "in" / "round").symlink_to("..")
    (tmp_path / "in" / "in" / "round").symlink_to("../..")
    files.check_regular(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "deep in each other"),
        ('{"a":' * 400 + "1" + "}" * 400, "deep in each other"),
        ("[" * 101 + "]" * 101, "deep in each other"),
        ('{"a": 1, "a": 2}', "a name occurs twice"),
        ("9" * 5000, "beyond 64 bits"),
        ("-9223372036854775809", "beyond 64 bits"),
        ("", "Expecting value"),
        (b"\x80\x02", "utf-8"),
    ],
)
def test_json_that_is_none(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_is_read(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None, True, "ü"], "b": {"a": -(2**63), "c": 2**64 - 1}}
    (tmp_path / "a.json").write_text(json.dumps(data))
    assert read_json(tmp_path / "a.json") == data
    assert parse_json("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="it has 98 bytes, 10 are the most"):
        read_json(tmp_path / "a.json", 10)
