"""Damage real files of every kind that jddim reads, for as long as asked, and see that only documented errors come out.

    scripts/fuzz --seconds 60 --seed 0

Each case is a function of (seed, its number) alone. Most only read; a fifth is converted, checkpoint folder and all,
into a new folder or over an old checkpoint. Of these an eighth is verified, and half cannot make one of their files.

A case fails if it raises anything but ConversionError or CheckpointError (readers of arrays, pictures, sets and
settings: ValueError or OSError), if it would run a program, import by pickle, connect, or write, rename or remove
outside its folder, or there where it only reads (audit hooks, which see what Python does whoever asks for it), if it
needs more than 1.5 GB or 60 seconds, if it changes its source, if a refusal leaves anything behind, or what was written
cannot be loaded. What failed is kept, and named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import hashlib
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
import types
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # verifying is compiling: half as long

import numpy as np
import torch
from flax import serialization
from safetensors.numpy import load, save

from convert.conversion import _open, convert
from convert.engine import ConversionError, fill, source_tensors
from convert.export import export
from convert.families import openai
from convert.families.ho import source_shapes
from convert.sources import find
from convert.writers import state_shapes
from jddim.bulk import collecting, shards
from jddim.bulk.manifest import BulkConfig, Manifest
from jddim.bulk.shards import FORMATS
from jddim.checkpoint.card import lines
from jddim.checkpoint.cite import bibtex, citations
from jddim.checkpoint.diff import diff
from jddim.checkpoint.folder import CheckpointError, load_metadata, load_params, save_checkpoint
from jddim.checkpoint.metadata import Metadata
from jddim.cli.options import OneLineParser
from jddim.cli.train import _begin
from jddim.config import LucidrainsConfig, ModelConfig, SamplerConfig, ScheduleConfig, UNetConfig
from jddim.evaluate.mnist_cnn import read_mnist
from jddim.files import read_arrays
from jddim.images import encode_png, grid, load_images, read_metadata, to_uint8
from jddim.models.building import abstract_model, flat_params
from jddim.train import data as training_data
from jddim.train.task import Task

MEMORY = 1_500_000_000
SECONDS_A_CASE = 60
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
    """Files that are read together, of which one is damaged.

    source: what is converted; None: nothing is, and `reader` is given the folder. seal: gives damaged contents the
    digest again that an attacker would.
    """

    files: Mapping[str, bytes]
    damaged: str
    source: str | None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: bool = False
    reader: Callable[[Path], object] | None = None
    seal: Callable[[bytes], bytes] | None = None


class Persistent:
    """What NVlabs' snapshots hold for a module: the source of its class, which is not to run, and its attributes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.state = {
            "training": False,
            "_parameters": {name: torch.nn.Parameter(value) for name, value in tensors.items()},
            "_buffers": {},
            "_modules": {},
            "_init_args": (),
            "_init_kwargs": {"img_resolution": 6},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": "import os; os.abort()", "class_name": "EDMPrecond"}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, ({**meta, "state": self.state},)


def snapshot(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A snapshot of one module, pickled where a stand-in has the name of NVlabs' module."""

    def _reconstruct_persistent_obj(meta: object) -> None:
        raise AssertionError("a snapshot was unpickled")

    stand_in: Any = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = stand_in.__name__
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    stand_in._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": types.ModuleType("torch_utils"), stand_in.__name__: stand_in}
    try:
        return pickle.dumps({"ema": Persistent(tensors)})
    finally:
        del sys.modules["torch_utils"], sys.modules[stand_in.__name__]


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

    exported = io.BytesIO()
    with zipfile.ZipFile(exported, "w") as archive:  # what `jddim export` writes, which nothing here reads
        for name in ("about.json", "program", "weights.npz"):
            archive.writestr(name, b"{}")
    sampler = SamplerConfig(spacing="uniform", num_steps=5, clip=False)
    checkpoint(folder / "ckpt", MODEL, ScheduleConfig(), sampler)
    hostile = {**state, "temb.dense.0.weight": Runs()}
    specimens = {
        "zip": file("a.pt", saved(state)),
        "runner": file("a.pth", saved(runner)),
        "zip of protocol 4": file("a.pt", saved(state, pickle_protocol=4)),
        "exported": file("a.jddim", exported.getvalue(), refused=True),
        "hostile zip": file("a.pt", saved(hostile), refused=True),
        "old format": file("a.pt", saved(state, _use_new_zipfile_serialization=False)),
        "hostile old format": file("a.pt", saved(hostile, _use_new_zipfile_serialization=False), refused=True),
        "hostile pickle": file("a.pkl", pickle.dumps({"a": Runs()}, 4), refused=True),
        "snapshot": file("a.pkl", snapshot(state), refused=True),  # a family's networks are too large for this
        "safetensors": file("a.safetensors", save(tensors)),
        "msgpack": file("a.msgpack", serialization.to_bytes({"encoder": tensors}), refused=True),
        "config.yml": Specimen(
            {"config.yml": CONFIG, "a.pt": saved(state)}, "config.yml", "a.pt", {"norm_groups": "4"}
        ),
    }
    whole, metadata = contents_of(folder / "ckpt"), str(metadata_file(folder / "ckpt"))
    specimens["metadata"] = Specimen(whole, metadata, None, reader=read_folder)
    specimens["metadata, sealed"] = Specimen(whole, metadata, None, reader=read_folder, seal=sealed)
    for name in whole:
        if re.fullmatch(r"_CHECKPOINT_METADATA|params/(_METADATA|manifest.ocdbt|d/.*)", name):
            kind = re.sub("d/.*", "d", name)
            specimens[kind] = Specimen(whole, name, None, reader=read_folder)
    specimens |= samples(folder) | sets(folder)
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


def read_folder(ckpt: Path) -> None:
    """All that is read of a jddim checkpoint."""
    metadata = load_metadata(ckpt)
    lines(metadata, 1)
    bibtex(*citations(metadata.provenance))
    load_params(ckpt, metadata)


def samples(folder: Path) -> dict[str, Specimen]:
    """Arrays, pictures and settings, and whoever reads them."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 6, 6, 1)).astype(np.float32).clip(-1, 1)
    stream, packed, idx = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(stream, images)
    np.savez_compressed(packed, arr_0=to_uint8(images), arr_1=np.arange(3), mu=np.zeros(3), sigma=np.eye(3))
    idx.write(b"\0\0\x08\x03" + np.array([3, 6, 6], ">u4").tobytes() + bytes(108))
    picture = encode_png(grid(images), {"seed": 3, "a": [1, {"b": None}]})
    task = json.dumps(Task(MODEL).to_json()).encode()
    labels = gzip.compress(b"\0\0\x08\x01" + np.array([3], ">u4").tobytes() + bytes(3), mtime=0)

    def arrays_in(name: str) -> Callable[[Path], object]:
        def read(folder: Path) -> None:
            for way in (
                lambda path: training_data.read(path, MODEL),
                lambda path: diff(path, folder / f"whole{path.suffix}"),
                lambda path: read_arrays(path, text=True),
                lambda path: read_metadata(path) if path.suffix == ".png" else None,
            ):
                with contextlib.suppress(ValueError, OSError):
                    way(folder / name)
            load_images(folder / name, (6, 6))

        return read

    found = {}
    for name, content in (("a.npy", stream.getvalue()), ("a.npz", packed.getvalue()), ("a.png", picture)):
        files = {name: content, f"whole{Path(name).suffix}": content}
        found[name] = Specimen(files, name, None, reader=arrays_in(name))
    mnist = {"train-images-idx3-ubyte": idx.getvalue(), "train-labels-idx1-ubyte.gz": labels}
    for name in mnist:
        found[name] = Specimen(mnist, name, None, reader=lambda folder: read_mnist(folder, "train"))
    found["task"] = Specimen(
        {"a.json": task}, "a.json", None, reader=lambda folder: _begin(str(folder / "a.json"), [], None)
    )
    found["settings"] = Specimen(
        {"a.json": task, "b.json": task},
        "a.json",
        None,
        reader=lambda folder: diff(folder / "a.json", folder / "b.json"),
    )
    return found


def sets(folder: Path) -> dict[str, Specimen]:
    """Sets of shards in each format, of which the manifest, a receipt or a shard is damaged; and a picture of one."""
    found, label = {}, np.arange(4, dtype=np.int32)
    for format in FORMATS:
        bulk = BulkConfig(4, batch_size=2, shard_size=2, format=format)
        manifest = Manifest("../ckpt", "0" * 64, bulk, SamplerConfig(), {"jax": "none"})
        out = folder / f"set-{format}"
        out.mkdir()
        (out / "manifest.json").write_text(manifest.text())
        for k in range(2):
            pixels = np.random.default_rng(k).integers(0, 256, (2, 5, 7, 3), np.uint8)
            numbers = bulk.layout.images(k)
            encoded = shards.encode(bulk.layout, k, pixels, label[numbers.start : numbers.stop], manifest.settings)
            shards.write(out, bulk.layout, k, encoded, manifest.run)
        files = contents_of(out)

        def check(folder: Path) -> None:
            collecting.problems(folder)

        def look(folder: Path, layout: shards.Layout = bulk.layout) -> None:  # as where the receipt fits too
            for k in range(2):
                shards.read(folder, layout, k)

        shard = next(name for name in files if name.startswith("shard-00001") and not name.endswith("01.json"))
        found[f"{format} manifest"] = Specimen(files, "manifest.json", None, reader=check)
        found[f"{format} manifest, sealed"] = Specimen(files, "manifest.json", None, reader=check, seal=sealed)
        found[f"{format} receipt"] = Specimen(files, "shard-00001.json", None, reader=check)
        found[f"{format} shard"] = Specimen(files, shard, None, reader=look)
        if format == "png":
            found["a set's picture"] = Specimen(files, shard, None, reader=lambda folder, s=shard: said_of(folder / s))
    return found


def said_of(picture: Path) -> None:
    """What `jddim reproduce` takes from a picture."""
    said = read_metadata(picture)
    Manifest.of(said)


def sealed(content: bytes) -> bytes:
    """JSON with its own "sha256" again, as an attacker would write it; what is no JSON as it is."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        rest = {name: value for name, value in json.loads(content).items() if name != "sha256"}
        text = json.dumps(rest, sort_keys=True)
        return (json.dumps({**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=2) + "\n").encode()
    return content


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


VALUES: list[Any] = [None, True, False, -1, 0, 7, 2**31, 2**40, 2**63, 10**30, 0.5, 1e999, -1e999, "", "x", "9" * 5000]
VALUES += [[], {}, [[]], [None], {"a": 1}, ["x"] * 1000, {"sha256": []}, "../../x", "\x1b[2J"]


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """JSON of which one value, however deep, is another, is gone, or has another name."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return content
    node: Any = data
    while isinstance(node, (dict, list)) and node:
        at = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[at], (dict, list)) or not node[at] or rng.random() < 0.3:
            match rng.randrange(6):
                case 0:
                    del node[at]
                case 1 if isinstance(node, dict):
                    node[rng.choice(["x", "type", "sha256"])] = node.pop(at)
                case _:
                    node[at] = rng.choice(VALUES)
            break
        node = node[at]
    return json.dumps(data).encode()


def damage_picture(rng: random.Random, content: bytes) -> bytes:
    """A PNG with right checksums, one of whose chunks is damaged."""
    chunks, at = [], 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    chosen = rng.randrange(len(chunks))
    kind, data = chunks[chosen]
    if kind == b"tEXt" and rng.random() < 0.7:
        data = b"jddim\0" + damage_json(rng, data.partition(b"\0")[2])
    elif rng.random() < 0.2:
        kind = rng.choice([b"zTXt", b"iTXt", b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT"])
    else:
        data = damage(rng, data)
    chunks[chosen] = kind, data
    body = b"".join(len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks)
    return content[:8] + body


def damage_tar(rng: random.Random, content: bytes) -> bytes:
    """A tar of whose members one has another kind, name, size or contents, under a right checksum."""
    changed = bytearray(content)
    heads = [at for at in range(0, len(changed), 512) if changed[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(heads)
    match rng.randrange(4):
        case 0:
            changed[at + 156] = rng.choice(b"0123456789gxLKSDMNV\0")
        case 1:
            size = rng.choice([b"00000000000", b"77777777777", b"-0000000001", b"\x80" + bytes(9) + b"\xff"])
            changed[at + 124 : at + 124 + len(size)] = size
        case 2:
            changed[at : at + 100] = changed[(other := rng.choice(heads)) : other + 100]
        case _:
            where = at + rng.randrange(512)
            changed[where] = rng.randrange(256)
    changed[at + 148 : at + 156] = b" " * 8
    changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def damage_npy(rng: random.Random, content: bytes) -> bytes:
    """An .npy whose header has its own length again."""
    length = int.from_bytes(content[8:10], "little")
    header = rng.choice([damage, damage_numbers])(rng, content[10 : 10 + length])[:65535]
    return content[:8] + len(header).to_bytes(2, "little") + header + content[10 + length :]


def damage_zip(rng: random.Random, content: bytes) -> bytes:
    """A whole zip with right checksums, one of whose entries is damaged: what the checksums would otherwise catch."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(stream, "w") as target:
        entries = {name: source.read(name) for name in source.namelist()}
        chosen = rng.choice([name for name in entries if name.endswith("data.pkl")] * 9 + list(entries))
        way = damage_npy if chosen.endswith(".npy") and rng.random() < 0.7 else damage
        entries[chosen] = way(rng, entries[chosen])
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
    if name.endswith((".json", "metadata", "_METADATA")):
        ways += [damage_json] * 2
    for suffix, way in ((".png", damage_picture), (".tar", damage_tar), (".npy", damage_npy)):
        ways += [way] * 3 if name.endswith(suffix) else []
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
            assert specimen.reader is not None
            try:
                specimen.reader(folder)
            except CheckpointError:
                raise
            except (ValueError, OSError) as error:
                return type(error).__name__
            return "read"
        opened = _open(find(folder / specimen.source), (), specimen.settings, None, None)
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
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if number % 500 == first % 500:  # compiled programs are kept, and are no case's
                limit = _address_space() + MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            rng = random.Random(f"{seed} {number}")
            name = rng.choice(list(whole))
            specimen = whole[name]
            content = damaged(rng, specimen.damaged, specimen.files[specimen.damaged])
            content = specimen.seal(content) if specimen.seal is not None else content
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
