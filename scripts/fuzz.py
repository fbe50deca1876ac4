"""Damage real files of every kind that jddim reads, for as long as asked, and see that only documented errors come out.

    scripts/fuzz --seconds 60 --seed 0

Each case is a function of (seed, its number) alone. A case fails if reading raises anything but ConversionError or
CheckpointError, if it would run a program, import by pickle, connect, or write outside its folder (audit hooks, which
see what Python does whoever asks for it), if it needs more than 1.5 GB or 20 seconds. What failed is kept, and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
from safetensors.numpy import load, save

from convert.convert import _open
from convert.engine import ConversionError, fill
from convert.export import export
from convert.families.ho import rules
from convert.rules import source_of
from convert.sources import find
from jddim.checkpoint import (
    CheckpointError,
    Metadata,
    abstract_model,
    flat_params,
    load_metadata,
    save_checkpoint,
)
from jddim.config import SamplerConfig, ScheduleConfig, UNetConfig

MEMORY = 1_500_000_000
SECONDS_A_CASE = 20
CONFIG = b"""\
data: {image_size: 6, channels: 1, rescaled: true}
model: {ch: 8, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [3], in_channels: 1, out_ch: 1}
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.02, num_diffusion_timesteps: 1000}
"""
MODEL = UNetConfig(
    image_size=(6, 6),
    in_channels=1,
    out_channels=1,
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    norm_groups=4,
)


class Forbidden(BaseException):
    """What a file must not make happen. Not an Exception, so that nothing on the way handles it."""


# -- what is damaged --------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    """A whole network's tensors under the source's names, all equal numbers: small files are damaged more often."""
    tensors = {}
    for leaf, abstract in flat_params(abstract_model(MODEL)).items():
        name, shape = source_of(leaf, rules(MODEL)), abstract.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        elif len(shape) == 2:
            shape = (shape[1], shape[0]) + ((1, 1) if ".attn" in name or "nin_shortcut" in name else ())
        tensors[name] = np.full(shape, 0.5, np.float32)
    return tensors


class Runs:
    """A pickle that would leave a mark if it were read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it-ran",)


@dataclasses.dataclass(frozen=True)
class Specimen:
    """Files that are read together, of which one is damaged. source: what is converted; None: a jddim checkpoint."""

    files: Mapping[str, bytes]
    damaged: str
    source: str | None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: bool = False


def corpus(folder: Path) -> dict[str, Specimen]:
    """Name -> specimen, of each container and family."""
    tensors = arrays()
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    runner = [{f"module.{name}": value for name, value in state.items()}, {"state": {}, "lr": 1e-4}, 3, 7, state]
    told = {"norm_groups": "4", "image_size": "6"}

    def saved(value: Any, **options: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    def file(name: str, content: bytes, refused: bool = False) -> Specimen:
        return Specimen({name: content}, name, name, told, refused)

    sampler = SamplerConfig(spacing="uniform", num_steps=5, clip=False)
    params = {name: np.zeros(leaf.shape, np.float32) for name, leaf in flat_params(abstract_model(MODEL)).items()}
    save_checkpoint(folder / "ckpt", params, Metadata(MODEL, ScheduleConfig(), sampler, {"family": "ho", "source": {}}))
    hostile = {**state, "temb.dense.0.weight": Runs()}
    specimens = {
        "zip": file("a.pt", saved(state)),
        "runner": file("a.pth", saved(runner)),
        "zip of protocol 4": file("a.pt", saved(state, pickle_protocol=4)),
        "hostile zip": file("a.pt", saved(hostile), refused=True),
        "old format": file("a.pt", saved(state, _use_new_zipfile_serialization=False)),
        "hostile old format": file("a.pt", saved(hostile, _use_new_zipfile_serialization=False), refused=True),
        "hostile pickle": file("a.pkl", pickle.dumps({"a": Runs()}, 4), refused=True),
        "safetensors": file("a.safetensors", save(tensors)),
        "config.yml": Specimen(
            {"config.yml": CONFIG, "a.pt": saved(state)}, "config.yml", "a.pt", {"norm_groups": "4"}
        ),
        "metadata": Specimen(contents_of(folder / "ckpt"), str(metadata_file(folder / "ckpt")), None),
    }
    export(folder / "ckpt", folder / "pipeline", "diffusers")
    pipeline = contents_of(folder / "pipeline")
    for name in pipeline:
        if name.endswith(".json") and name != "model_index.json":
            specimens[f"diffusers {Path(name).name}"] = Specimen(pipeline, name, ".")
    weights = load(pipeline["unet/diffusion_pytorch_model.safetensors"])
    configs = {name: content for name, content in pipeline.items() if name.endswith(".json")}
    halves = [dict(list(weights.items())[start::2]) for start in (0, 1)]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {
        "metadata": {},
        "weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half},
    }
    shards = {f"unet/{name}": save(half) for name, half in zip(names, halves, strict=True)}
    index_name = "unet/diffusion_pytorch_model.safetensors.index.json"
    files = configs | shards | {index_name: json.dumps(index).encode()}
    specimens["index of shards"] = Specimen(files, index_name, ".")
    specimens["shard"] = Specimen(files, f"unet/{names[1]}", ".")
    return specimens


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metadata_file(ckpt: Path) -> Path:
    """The JSON file of a checkpoint folder, by its path in it."""
    return next(path for path in (ckpt / "metadata").iterdir() if "success" not in path.name).relative_to(ckpt)


# -- how --------------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b"-1", b"0", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""', b"9" * 30, b"9" * 5000, b"[" * 3000, b"true"]
WORDS += [
    b"!!python/object/apply:os.system [touch it-ran]",
    b"&a [*a, *a]",
    b"\x00",
    b"\xff\xfe",
    b"../../x",
    b"~",
    b"\n",
]
WORDS += [b"cos\nsystem\n", b"R", b"b", b"\x81", b"h\x00", b"q\x00", b"Q", b"(", b"t", b"\x85", b"]", b"}", b"."]


def damage(rng: random.Random, content: bytes) -> bytes:
    """One to four changes anywhere: bits, bytes, numbers, words, pieces moved, repeated or cut."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        length = min(rng.choice([1, 2, 4, 8, 40, 400]), len(changed) - at)
        match rng.randrange(7):
            case 0 if length:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if length:
                changed[at] = rng.randrange(256)
            case 2:
                size = rng.choice([1, 2, 4, 8])
                number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, rng.choice(["little", "big"]))
                changed[at : at + size] = number
            case 3:
                changed[at : at + rng.choice([0, length])] = rng.choice(WORDS)
            case 4:
                changed[at : at + length] = b""
            case 5:
                to = rng.randrange(len(changed) + 1)
                changed[to:to] = changed[at : at + length] * rng.choice([1, 2, 50])
            case _:
                if rng.random() < 0.2:
                    del changed[at:]
    return bytes(changed)


def damage_numbers(rng: random.Random, content: bytes) -> bytes:
    """A text whose numbers are others: what stays JSON or YAML, and says something else."""
    spans = [found.span() for found in re.finditer(rb"\d[\d.]*", content)]
    start, end = rng.choice(spans)
    return content[:start] + rng.choice([str(rng.choice(NUMBERS)).encode(), rng.choice(WORDS)]) + content[end:]


def damage_zip(rng: random.Random, content: bytes) -> bytes:
    """A whole zip with right checksums, one of whose entries is damaged: what the checksums would otherwise catch."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        entries = {name: source.read(name) for name in source.namelist()}
        chosen = rng.choice([name for name in entries if name.endswith("data.pkl")] * 9 + list(entries))
        entries[chosen] = damage(rng, entries[chosen])
        if rng.random() < 0.1:
            entries[rng.choice(list(entries))] = b""
        for name, value in entries.items():
            target.writestr(name, value)
    return stream.getvalue()


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A header that has its own length again, and may be JSON still."""
    length = int.from_bytes(content[:8], "little")
    header = rng.choice([damage, damage_numbers])(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damaged(rng: random.Random, name: str, content: bytes) -> bytes:
    """Damage that a file of this kind feels, or any."""
    ways: list[Callable[[random.Random, bytes], bytes]] = [damage]
    if content.startswith(b"PK"):
        ways += [damage_zip] * 4
    if name.endswith(".safetensors"):
        ways += [damage_safetensors] * 3
    if name.endswith((".yml", ".json", "metadata")):
        ways += [damage_numbers]
    return rng.choice(ways)(rng, content)


# -- what happens -----------------------------------------------------------------------------------------------------

armed: Path | None = None
FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"}
FORBIDDEN |= {"socket.connect", "socket.bind", "ctypes.dlopen", "os.remove", "os.rename", "os.rmdir", "os.link"}


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise for what reading a file has no reason to do; see `sys.addaudithook`."""
    if armed is None:
        return
    if event in FORBIDDEN:
        raise Forbidden(f"{event} {arguments}")
    if event in ("open", "os.mkdir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        writes = event == "os.mkdir" or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and not Path(os.fsdecode(arguments[0])).absolute().is_relative_to(armed):
            raise Forbidden(f"{event} {arguments}")


def read(folder: Path, specimen: Specimen) -> str:
    """Do all that a conversion does up to verifying and writing; the documented error's type, or "read"."""
    try:
        if specimen.source is None:
            load_metadata(folder)
            return "read"
        opened = _open(find(folder / specimen.source), (), specimen.settings, None, None, lambda line: None)
        expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(opened.plan.model)).items()}
        fill(opened.source.tensors, expected, opened.plan.rules, opened.plan.ignored)
    except (ConversionError, CheckpointError) as error:
        return type(error).__name__
    return "read"


def write(folder: Path, specimen: Specimen, content: bytes) -> None:
    """The specimen's files, with `content` in place of the damaged one, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, whole in {**specimen.files, specimen.damaged: content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(whole)


def run(seconds: float, seed: int, first: int, keep: Path) -> int:
    """Cases from number `first` until the time is over; how many failed."""
    global armed
    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, _too_slow)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    failures, number, started = 0, first, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        whole = corpus(Path(scratch))
        folder = Path(scratch) / "case"
        for name, specimen in whole.items():  # whole files are read or refused, and warm what later cases use
            write(folder, specimen, specimen.files[specimen.damaged])
            outcome = read(folder, specimen)
            if (outcome == "read") is specimen.refused:
                raise AssertionError(f"undamaged, {name}: {outcome}")
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        while time.monotonic() - started < seconds:
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(list(whole))
            specimen = whole[name]
            content = damaged(rng, specimen.damaged, specimen.files[specimen.damaged])
            write(folder, specimen, content)
            signal.alarm(SECONDS_A_CASE)
            armed = folder
            try:
                outcome = read(folder, specimen)
            except BaseException as error:
                armed = None
                signal.alarm(0)
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome, failures = f"FAILED {type(error).__name__}", failures + 1
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}-{number}-{Path(specimen.damaged).name}").write_bytes(content)
                print(f"case {number} of seed {seed} ({name}): {type(error).__name__}: {error}"[:300])
                traceback.print_exc(limit=-4)
            armed = None
            signal.alarm(0)
            counts[f"{name}: {outcome}"] += 1
            number += 1
    print("\n".join(f"{count:6d}  {what}" for what, count in sorted(counts.items())))
    print(
        f"{number - first} cases from {first} on of seed {seed}, {failures} failed"
        + (f": see {keep}" if failures else "")
    )
    return failures


def _too_slow(*_: Any) -> None:
    raise Forbidden(f"more than {SECONDS_A_CASE} seconds")


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, metavar="CASE", help="the number to begin with: to see one again"
    )
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="where to put the files that failed")
    args = parser.parse_args()
    return int(run(args.seconds, args.seed, args.first, args.keep.absolute()) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
