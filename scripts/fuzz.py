"""Damage real files of every kind that jddim reads, for as long as asked, and see that only documented errors come out.

    scripts/fuzz --seconds 60 --seed 0

Each case is a function of (seed, its number) alone. Most only read; a fifth is converted, checkpoint folder and all,
into a new folder or over an old checkpoint. Of these an eighth is verified, and half cannot make one of their files.

A case fails if it raises anything but ConversionError or CheckpointError, if it would run a program, import by pickle,
connect, or write, rename or remove outside its folder, or there where it only reads (audit hooks, which see what Python
does whoever asks for it), if it needs more than 1.5 GB or 20 seconds, if it changes its source, if a refusal leaves
anything behind, or what was written cannot be loaded. What failed is kept, and named.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # verifying is compiling: half as long

import numpy as np
import torch
from safetensors.numpy import load, save

from convert.conversion import _open, convert
from convert.engine import ConversionError, fill, source_tensors
from convert.export import export
from convert.families import openai
from convert.families.ho import source_shapes
from convert.sources import find
from convert.writers import state_shapes
from jddim.checkpoint.folder import CheckpointError, load_metadata, load_params, save_checkpoint
from jddim.checkpoint.metadata import Metadata
from jddim.cli.options import OneLineParser
from jddim.config import LucidrainsConfig, ModelConfig, SamplerConfig, ScheduleConfig, UNetConfig
from jddim.models.building import abstract_model, flat_params

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
OPENAI = UNetConfig(
    image_size=(6, 6),
    in_channels=1,
    out_channels=2,
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    downsample=("resnet",),
    upsample=("resnet",),
    symmetric_padding=True,
    scale_shift=True,
    norm_groups=4,
    norm_epsilon=1e-5,
    cosine_first=True,
    frequency_shift=0.0,
    divide_last=True,
)
FLAGS = {
    **{"image_size": "6", "num_heads": "2", "norm_groups": "4", "use_new_attention_order": "True"},
    **{"diffusion_steps": "400", "rescale_timesteps": "True", "noise_schedule": "cosine", "learn_sigma": "True"},
    **{"timestep_respacing": "10,15,20", "attention_resolutions": "3", "dropout": "0.1"},
}
LUCIDRAINS = LucidrainsConfig(
    image_size=(6, 6),
    full_attention=(False, True),
    num_heads=(2, 2),
    head_channels=(3, 3),
    in_channels=1,
    out_channels=1,
    channels=4,
    channel_mults=(1, 2),
)
CONVERTED, VERIFIED, OVER, FAULTY = 0.2, 0.125, 0.25, 0.5
"""Of the cases, those that go on to writing; of these, those that are verified (two seconds each, where it comes to
that), those that overwrite a checkpoint, those whose disk is full."""


class Forbidden(BaseException):
    """What a file must not make happen. Not an Exception, so that nothing on the way handles it."""


# -- what is damaged --------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    """A whole network's tensors under the source's names, all equal numbers: small files are damaged more often."""
    return {name: np.full(shape, 0.5, np.float32) for name, shape in source_shapes(MODEL).items()}


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
    checkpoint(folder / "ckpt", MODEL, ScheduleConfig(), sampler)
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
    # not by export, which refuses a network with fewer groups than the source's 32: it would be sixteen times as large
    new_order = {"use_new_attention_order": True}
    shapes = state_shapes(lambda: openai.reference(OPENAI, **new_order))
    weights = source_tensors(parameters(OPENAI), openai.rules(OPENAI, **new_order), shapes)
    unet = {"model000007.pt": saved({name: torch.from_numpy(value) for name, value in weights.items()})}
    flags = "".join(f"{key}: {value}\n" for key, value in FLAGS.items()).encode()
    specimens["openai"] = Specimen(unet, "model000007.pt", "model000007.pt", FLAGS)
    specimens["openai config.yml"] = Specimen({"config.yml": flags, **unet}, "config.yml", "model000007.pt")
    objective = SamplerConfig(prediction_type="v_prediction", rederive_eps=True)
    checkpoint(folder / "lucidrains", LUCIDRAINS, ScheduleConfig("cosine", 100), objective)
    for name, format in (("model-7.pt", "lucidrains"), ("unet.pt", "lucidrains-unet")):
        export(folder / "lucidrains", folder / name, format)
        content = (folder / name).read_bytes()
        specimens[format] = Specimen({name: content}, name, name, {"image_size": "6"})
    return specimens


def checkpoint(path: Path, model: ModelConfig, schedule: ScheduleConfig, sampler: SamplerConfig) -> None:
    """A jddim checkpoint with random parameters."""
    save_checkpoint(path, parameters(model), Metadata(model, schedule, sampler, {"family": "ho", "source": {}}))


def parameters(model: ModelConfig) -> dict[str, np.ndarray]:
    """Random ones."""
    rng = np.random.default_rng(0)
    return {
        name: 0.2 * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in flat_params(abstract_model(model)).items()
    }


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
"""While a case runs, the folder in which it may write."""
fault = 0
"""Which folder made, file opened for writing or renaming fails from here on, as on a full disk; 0: none."""
forbidden: list[str] = []
"""What a case did for all that: other threads' exceptions do not reach this one."""
FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"}
FORBIDDEN |= {"socket.connect", "socket.bind", "ctypes.dlopen"}
CHANGING = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}
"""Events -> how many paths they begin with. Folders that relative paths are in follow, or the mode first."""


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise for what a case has no reason to do; see `sys.addaudithook`. And the `fault`."""
    global fault
    if armed is None:
        return
    paths: tuple[Any, ...] = ()
    if event in CHANGING:
        paths = arguments[: CHANGING[event]]
    elif event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        paths = arguments[:1]
    within = next((number for number in reversed(arguments) if type(number) is int), -1) if event in CHANGING else -1
    if event in FORBIDDEN or not all(_in(armed, path, within) for path in paths):
        forbidden.append(f"{event} {arguments}"[:300])
        raise Forbidden(forbidden[-1])
    if paths and fault and event in ("open", "os.mkdir", "os.rename"):
        fault -= 1
        if not fault:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[0]))


def _in(folder: Path, path: Any, within: int) -> bool:
    """Whether a path lies in a folder; relative ones, in the open folder of number `within` if that is none of -1."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return True  # a file that is open already
    base = Path(os.readlink(f"/proc/self/fd/{within}")) if within >= 0 else Path.cwd()
    return (base / os.fsdecode(path)).is_relative_to(folder)


def read(folder: Path, specimen: Specimen) -> str:
    """Do all that a conversion does up to verifying and writing; the documented error's type, or "read"."""
    try:
        if specimen.source is None:
            load_metadata(folder)
            return "read"
        opened = _open(find(folder / specimen.source), (), specimen.settings, None, None, lambda line: None)
        expected = {name: leaf.shape for name, leaf in flat_params(abstract_model(opened.plan.model)).items()}
        fill(opened.source.tensors, expected, opened.plan.rules, opened.plan.ignored, opened.family.pointwise)
    except (ConversionError, CheckpointError) as error:
        return type(error).__name__
    return "read"


def converted(folder: Path, specimen: Specimen, to: Path, verify: bool, overwrite: bool) -> str:
    """Convert, and load what was written; the documented error's type, the fault's OSError, "written" or "verified"."""
    assert specimen.source is not None
    try:
        convert(folder / specimen.source, to, settings=specimen.settings, verify=verify, overwrite=overwrite)
    except (ConversionError, CheckpointError) as error:
        return type(error).__name__
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return type(error).__name__
    load_params(to, load_metadata(to))
    return "verified" if verify else "written"


def check_left(folder: Path, to: Path, before: Mapping[str, bytes | None], outcome: str) -> None:
    """Raise Forbidden unless the folder is as it was: but for `to`, where a checkpoint was written."""
    after = everything(folder)
    if outcome in ("written", "verified"):
        made = [str(path) for path in (to, *to.parents) if path.is_relative_to(folder)]
        inside = f"{to.relative_to(folder)}/"
        before, after = (
            {name: value for name, value in tree.items() if not f"{name}/".startswith(inside)}
            for tree in (before, after)
        )
        after = {name: value for name, value in after.items() if str(folder / name) not in made}
    if changed := sorted(name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0)):
        raise Forbidden(f"{outcome}, and left or changed {changed[:5]}")


def everything(folder: Path) -> dict[str, bytes | None]:
    """What is below a folder: path in it -> contents, None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write(folder: Path, specimen: Specimen, content: bytes) -> None:
    """The specimen's files, with `content` in place of the damaged one, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, whole in {**specimen.files, specimen.damaged: content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(whole)


def run(seconds: float, seed: int, first: int, keep: Path) -> int:
    """Cases from number `first` until the time is over; how many failed."""
    global armed, fault
    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, _too_slow)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # what Orbax's threads say of a fault
    sys.unraisablehook = threading.excepthook = lambda _: None
    counts: Counter[str] = Counter()
    failures, number = 0, first
    with tempfile.TemporaryDirectory() as scratch:
        whole = corpus(Path(scratch))
        folder = Path(scratch) / "case"
        for name, specimen in whole.items():  # whole files are read or refused, and warm what later cases use
            write(folder, specimen, specimen.files[specimen.damaged])
            outcome = read(folder, specimen)
            if (outcome == "read") is specimen.refused:
                raise AssertionError(f"undamaged, {name}: {outcome}")
            if name in ("zip", "shard", "openai", "lucidrains"):  # one of each network
                outcome = converted(folder, specimen, Path(scratch) / f"whole {name}", True, False)
                if outcome != "verified":
                    raise AssertionError(f"undamaged, {name}: {outcome}")
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(list(whole))
            specimen = whole[name]
            content = damaged(rng, specimen.damaged, specimen.files[specimen.damaged])
            write(folder, specimen, content)
            to = folder / "made" / "out"
            goes_on = specimen.source is not None and rng.random() < CONVERTED
            verify, overwrite = rng.random() < VERIFIED, rng.random() < OVER
            if goes_on and overwrite:
                to = folder / "out"
                shutil.copytree(Path(scratch) / "whole zip", to)
            before = everything(folder)
            fault = rng.randint(1, 20) if goes_on and rng.random() < FAULTY else 0
            forbidden.clear()
            signal.alarm(SECONDS_A_CASE)
            armed = folder if goes_on else folder / "nowhere"
            try:
                outcome = converted(folder, specimen, to, verify, overwrite) if goes_on else read(folder, specimen)
                armed = None
                check_left(folder, to, before, outcome)
                if forbidden:
                    raise Forbidden(forbidden[0])
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


def main() -> NoReturn:
    """Parse, run, report."""
    parser = OneLineParser(prog="scripts/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, metavar="CASE", help="the number to begin with: to see one again"
    )
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="where to put the files that failed")
    args = parser.parse_args()
    failures = run(args.seconds, args.seed, args.first, args.keep.absolute())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failures > 0))  # where a fault struck, threads of Orbax's wait five minutes for one another


if __name__ == "__main__":
    main()
