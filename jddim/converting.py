"""PyTorch checkpoints from Python: `jddim.convert`, `verify`, `info` and `export_torch`, through the package `convert`.

This is the one module of jddim that knows that package. It is the folder beside jddim's own, in a checkout as in a
wheel, and nothing else is taken for it, so that a script named convert.py may call `jddim.convert`. Where `import
convert` gives that folder, it is imported by that name and there is one copy, whoever asks. Where the name is another
module's, the same files are imported as `jddim_convert` and the other module is neither run nor touched; the relative
imports within the package allow it. What the package raises and returns is defined here, and so is one class under both
names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from jddim.installing import install_line
from jddim.known import presets, published

if TYPE_CHECKING:  # it imports jax, which the command line must not wait for
    from jddim.checkpoint.metadata import Metadata, PartMetadata

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Settings = Mapping[str, str | int | float | bool]

_FOLDER = Path(__file__).resolve().parent.parent / "convert"
_OTHER_NAME = "jddim_convert"


class ConversionError(ValueError):
    """A source that cannot be converted, with what was found and what to do about it."""


class UnsettledError(ConversionError):
    """A source that nothing is wrong with but that settings are missing.

    asks: each as `--set` takes it, KEY=WHAT. options: the words of `jddim convert` that give them. command: the whole
    line; "" where none is known.
    """

    def __init__(self, said: str, asks: Iterable[str], options: Iterable[str] = ()):
        super().__init__(said)
        self.asks, self.options, self.command = tuple(asks), tuple(options), ""


class Warns(str):
    """A line for `say` that warns: it is shown where other lines are not wanted."""


class Told(TypedDict, total=False):
    """What may be said of a PyTorch source beside its name; `convert` says what each is."""

    config: Paths | None
    settings: Settings | None
    preset: str | None
    weights: str | None
    variant: str | None
    revision: str | None
    autoencoder: str | os.PathLike[str] | None


Check = Callable[["Metadata | PartMetadata"], None]
"""Raises what is wrong with a conversion's result, of which it is given the metadata without provenance."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was compared of the Flax network and PyTorch's, and how far apart it was; its `str` is a table.

    blocks: name -> largest absolute error over the reference block's largest magnitude, in forward order; the last
    is the network's output. t, image_size (height, width), seed: the inputs `(len(t), height, width, channels)`, of
    normal numbers. torch, jax: versions. tolerance: the largest error that passes. all_zero: PyTorch's output was, as
    it is where a network's last layer starts at zero and was not trained.
    """

    blocks: Mapping[str, float]
    t: tuple[float, ...]
    image_size: tuple[int, int]
    seed: int
    torch: str
    jax: str
    tolerance: float
    all_zero: bool = False

    @property
    def output_error(self) -> float:
        """The last block's error: the network's output."""
        return list(self.blocks.values())[-1]

    @property
    def first_bad(self) -> str | None:
        """The first block out of tolerance (a NaN is), or None."""
        return next((name for name, error in self.blocks.items() if not error <= self.tolerance), None)

    def to_json(self) -> dict[str, Any]:
        """For provenance and `verify.json`."""
        return {
            **dataclasses.asdict(self),
            "output_error": self.output_error,
            "first_bad": self.first_bad,
            "matmul_precision": "highest",
        }

    def __str__(self) -> str:
        from jddim.checkpoint.card import ALL_ZERO

        width = max(map(len, self.blocks))
        lines = [f"{'block':<{width}}  error / scale"]
        for name, error in self.blocks.items():
            mark = "" if error <= self.tolerance else "  out of tolerance"
            lines.append(f"{name:<{width}}  {error:.2e}{mark}{' (first)' if name == self.first_bad else ''}")
        return "\n".join([*lines, *([ALL_ZERO] if self.all_zero else [])])


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: Paths | None = None,
    settings: Settings | None = None,
    preset: str | None = None,
    weights: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    check: Check | None = None,
) -> Metadata | PartMetadata:
    """Convert a PyTorch checkpoint into a jddim checkpoint folder, for `jddim.load`. Nothing in the file is run.

    A classifier's, of guided-diffusion, is for `jddim.load_classifier`; a first stage's (AutoencoderKL, VQModel) for
    `jddim.load_autoencoder`, or to be put beside a network of its latents.

    src: a checkpoint file, a folder that a family knows (a run's with `ckpt.pth`, a diffusers pipeline's), or a hub id,
    `google/ddpm-cifar10-32`. dst: the folder to write, whole or not at all. config: the source's config file or files;
    those that lie where the family has them are used for the rest. settings: facts that the tensors do not tell, under
    the source's own names and over the config's, `{"image_size": 32}` (pixels); each is read as the text that `--set`
    takes. preset: a published model's name, `"guided-256"`, which stands for all of its settings; `settings` override
    it. weights: "ema", "raw", or where they lie in the file, `"state_dict.model"`, as `info` and errors about them list
    it; None takes the EMA's where there are any. variant: which of a folder's files, such as "fp16".
    revision: branch, tag or commit of a hub id. autoencoder: the first stage of a network of latents, where it does not
    lie with it: a jddim folder, or a source as `src`. license: the weights', recorded; no file tells it. verify: run
    both networks on the same inputs and refuse where a block differs by more than 1e-4 of its scale; without PyTorch it
    is not done, which `say` is told and the metadata records. overwrite: replace `dst` if it is a jddim
    checkpoint. say: is given what is found, line by line, a `Warns` where it warns; `print`, say.
    check: is given the configs before the weights are converted; what it raises ends the conversion.

    Returns the metadata written: the configs of model, schedule and sampler (a classifier's has the model's alone), and
    in `provenance` the source, all that was assumed and the verification's figures.

    Raises ConversionError if jddim does not read the source, or it is not whole, needs settings, or differs from
    PyTorch; CheckpointError if `dst` cannot be written. Both are ValueErrors, one message has all that is wrong, and
    nothing is then written. Raises ModuleNotFoundError where what `jddim[convert-core]` installs is missing.
    """
    metadata: Metadata | PartMetadata = _part("conversion").convert(
        src,
        dst,
        config=config,
        settings=as_text(settings),
        preset=preset,
        weights=weights,
        variant=variant,
        revision=revision,
        license=license,
        autoencoder=autoencoder,
        verify=verify,
        overwrite=overwrite,
        say=say or (lambda line: None),
        check=check,
    )
    return metadata


def can_verify() -> bool:
    """Whether PyTorch is installed here."""
    found: bool = _part("verify").can_verify()
    return found


def verify(ckpt: str | os.PathLike[str], src: str | os.PathLike[str], *, config: Paths | None = None) -> Verification:
    """Compare a converted checkpoint with the PyTorch source it came from, block by block. Nothing is written.

    ckpt: a folder that `convert` wrote. src: the file, folder or hub id that it was converted from. config: as given to
    `convert`. Returns each block's error; `first_bad` is None where all are within tolerance.

    Raises ConversionError if `src` is not that source (by its SHA-256), or PyTorch is not installed;
    ModuleNotFoundError where what `jddim[convert-core]` installs is missing.
    """
    result: Verification = _part("conversion").verify(ckpt, src, config=config)
    return result


def info(
    path: str | os.PathLike[str],
    *,
    config: Paths | None = None,
    settings: Settings | None = None,
    preset: str | None = None,
    weights: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> list[str]:
    """What a checkpoint is, in the lines that `jddim info` prints. Nothing in a file is run.

    path: a jddim folder, of which the lines are a card of what is known; or a PyTorch source as `convert` takes it, of
    which they are its family, weights and parameters, what its conversion would assume or still need, and the command
    for it. weights: of a PyTorch source, as `convert` takes them. config, settings, preset, variant, revision: so, too.
    autoencoder: likewise. The lines are for people, and may change; what they quote of a file is as it stands there,
    control characters included.

    Raises ConversionError if no family knows the source, CheckpointError if a jddim folder is damaged; of a PyTorch
    source, ModuleNotFoundError where what `jddim[convert-core]` installs is missing.
    """
    if (found := _folder(path)) is not None:
        from jddim.checkpoint.card import lines

        return [f"{'checkpoint':<15} {path}", *lines(*found)]
    described: list[str] = _part("conversion").describe(
        path,
        config=config,
        settings=as_text(settings),
        preset=preset,
        weights=weights,
        variant=variant,
        revision=revision,
        autoencoder=autoencoder,
    )
    return described


def recorded(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """All that a jddim folder's metadata holds, and how many parameters there are; None for what is no such folder.

    Raises CheckpointError if it is damaged.
    """
    if (found := _folder(path)) is None:
        return None
    metadata, parameters = found
    return {"checkpoint": str(path), "parameters": parameters, **metadata.written()}


def _folder(path: str | os.PathLike[str]) -> tuple[Metadata | PartMetadata, int] | None:
    """A jddim folder's metadata and its number of parameters; None for what is no such folder."""
    if not (Path(path) / "metadata").is_dir():
        return None
    from jddim.checkpoint.folder import load_recorded, shapes_of

    metadata = load_recorded(path)
    return metadata, sum(leaf.size for leaf in shapes_of(metadata).values())


def export_torch(
    ckpt: str | os.PathLike[str], dst: str | os.PathLike[str], format: str | None = None, *, overwrite: bool = False
) -> str:
    """Write a checkpoint folder in the format of a PyTorch source, for that source's own loader.

    Parameters keep their bits, so that converting the result again gives the same `params_sha256`.

    ckpt: a jddim checkpoint folder. dst: the file or folder to write, whole or not at all. format: "ermongroup",
    "pesser", "diffusers", "openai", "lucidrains", "lucidrains-unet" or "dit"; None is where the checkpoint came from.
    overwrite: replace `dst` if it is a file, never a folder. Returns the format's name.

    Raises ConversionError if the format is unknown or cannot hold the model (with every reason), `dst` exists, or
    PyTorch is not installed; nothing is then written. Raises ModuleNotFoundError where what `jddim[convert-core]`
    installs is missing.
    """
    name: str = _part("export").export(ckpt, dst, format, overwrite=overwrite)
    return name


@dataclasses.dataclass(frozen=True)
class Located:
    """A PyTorch source found: its name, and every file that its conversion may read, the weights' first.

    hub_id, commit: None of what lies here.
    """

    name: str
    files: tuple[Path, ...]
    hub_id: str | None
    commit: str | None


def locate(
    src: str | os.PathLike[str],
    *,
    config: Paths | None = None,
    weights: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> Located:
    """Where the files of a source lie; those of a hub id are fetched. The arguments are `convert`'s.

    Raises ConversionError if there are none, ModuleNotFoundError where what `jddim[convert-core]` installs is missing.
    """
    found: Located = _part("conversion").locate(src, config, weights, variant, revision, autoencoder)
    return found


def hub_id(src: str, *, here: bool = False) -> tuple[str, str | None] | None:
    """The hub id and revision of OWNER/NAME or OWNER/NAME@REVISION; None for what names a file, if anything.

    A weights file is none. Nor, unless `here`, is a name without a revision of which OWNER is a folder here, except for
    the names of `jddim.presets`. Whether anything lies here under the whole name is for the caller to see.
    """
    match = re.fullmatch(r"(([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*))(?:@([\w./-]+))?", src)
    if match is None or match[3].endswith(_FILES) or src.endswith(_FILES):
        return None
    if not (here or match[4] or published(match[1])) and Path(match[2]).exists():
        return None
    return match[1], match[4]


def not_asked(src: str) -> str:
    """Why the hub is not asked for what is no path, in words that follow an error's; "" where that is plain."""
    if hub_id(src) is not None or hub_id(src, here=True) is None:
        return ""
    return f"; {src.partition('/')[0]} is a folder here, so the hub is not asked (it is for {src}@main)"


def near(src: str) -> str:
    """What may have been meant by a name of nothing, in words that follow an error's; "" for a published one."""
    if published(src) is not None:
        return ""
    path = Path(src)
    with contextlib.suppress(OSError):  # there is no such folder
        if close := difflib.get_close_matches(path.name, os.listdir(path.parent), 1):
            return f"; did you mean {path.parent / close[0]}? (jddim list: published ones)"
    close = difflib.get_close_matches(src, [each.name for each in presets], 1)
    return f"; did you mean {close[0]}? (jddim list: all)" if close else "; jddim list names published ones"


def shadowed(src: str) -> str:
    """A note where a path here has the name of what would be fetched; "" elsewhere."""
    if hub_id(src) is None or not Path(src).exists():
        return ""
    return f"note: {src} is a path here, so the hub is not asked"


_FILES = (".safetensors", ".msgpack", ".bin", ".pt", ".pth", ".ckpt", ".json", ".yml", ".yaml")


def as_text(settings: Settings | None) -> dict[str, str]:
    """Settings as `--set` takes them."""
    return {key: str(value) for key, value in (settings or {}).items()}


def _part(name: str) -> Any:
    """A module of the package `convert`. Raises ModuleNotFoundError that says what to install."""
    try:
        return importlib.import_module(f"{_package()}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        raise ModuleNotFoundError(
            f"reading PyTorch checkpoints needs {error.name}: {install_line('convert')} "
            "(or [convert-core], to go without PyTorch and its verification)",
            name=error.name,
        ) from error


def _package() -> str:
    """The name by which the folder beside jddim's is, or can be, imported as a package."""
    start = _FOLDER / "__init__.py"
    if _OTHER_NAME in sys.modules:
        return _OTHER_NAME
    if _is(start, "convert"):
        return "convert"
    if not start.is_file():
        raise ModuleNotFoundError(f"jddim is not whole: its package convert is not at {_FOLDER}; install it again")
    spec = importlib.util.spec_from_file_location(_OTHER_NAME, start, submodule_search_locations=[str(_FOLDER)])
    assert spec is not None
    sys.modules[_OTHER_NAME] = importlib.util.module_from_spec(spec)  # its __init__ holds nothing to run
    return _OTHER_NAME


def _is(file: Path, name: str) -> bool:
    """Whether `import name` gives the module of this file; found out without running what it would give."""
    if name in sys.modules:
        found = getattr(sys.modules[name], "__file__", None)
    else:
        spec = importlib.util.find_spec(name)
        found = None if spec is None else spec.origin
    return found is not None and Path(found).resolve() == file
