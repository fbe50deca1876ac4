"""Small checkpoints of the Ho et al. family, every layer redrawn, for tests that read, convert and sample them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jddim.config import AutoencoderConfig, ClassifierConfig, ModelConfig, SamplerConfig, ScheduleConfig, UNetConfig

# Two levels: one down- and one upsampling, a change of width, attention below. 44,969 parameters.
SMALL: dict[str, Any] = {
    "ch": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_levels": (1,),
    "in_channels": 1,
    "out_ch": 1,
    "norm_groups": 4,
}
SIZE = (6, 10)  # height and width differ from each other and from every width, so no axis can stand in for another
SETTINGS = {"norm_groups": "4", "image_size": "6x10"}
"""What `convert` must be told of a bare state dict of SMALL."""
SETTING_OPTIONS = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]

SOLVER_KINDS = ("dpm++2m", "dpm++3s", "dpm++2m-sde", "unipc", "heun", "plms", "pndm", "euler-a")
"""Names of `jddim.solvers.SOLVERS`, one of each kind, where a test is slow: those of a kind differ in numbers alone."""


def state_dict(seed: int = 1, **changes: Any) -> dict[str, Any]:
    """A PyTorch state dict with this family's names. changes: over SMALL, arguments of `ReferenceUNet`."""
    from convert.reference.unet import ReferenceUNet, redraw_

    model = ReferenceUNet(**(SMALL | changes))
    redraw_(model, seed)
    return dict(model.state_dict())


def small_config(**changes: Any) -> UNetConfig:
    """SMALL as jddim's config."""
    fields: dict[str, Any] = {
        "image_size": SIZE,
        "in_channels": 1,
        "out_channels": 1,
        "channels": 8,
        "channel_mults": (1, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
        "norm_groups": 4,
    }
    return UNetConfig(**(fields | changes))


def arrays(config: UNetConfig | None = None, seed: int = 1) -> dict[str, np.ndarray]:
    """A state dict as NumPy arrays, as `convert.files.readers.read` gives it, made without torch.

    Names and shapes are compared with the PyTorch reference's in test_families_ho.py.
    """
    from convert.families.ho import source_shapes

    config = config or small_config()
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in source_shapes(config).items()}


def write_checkpoint(
    path: Path,
    *,
    edit: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
    seed: int = 0,
    prediction_type: str = "epsilon",
    schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008  # frozen
    sampler: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    autoencoder: AutoencoderConfig | None = None,
    **fields: Any,
) -> Path:
    """A jddim checkpoint with random parameters, made without torch.

    edit: (dotted name, array) -> what to store instead. prediction_type: what the random network is taken to predict;
    as eps its images reach hundreds, as v ("v_prediction") they stay about 1. schedule, sampler: other conventions.
    provenance: more of it. autoencoder: with this first stage, random too.
    fields: of `small_config`, over one level with attention: what reads a checkpoint does not care, and compiling takes
    half the time.
    """
    from jddim.checkpoint.folder import save_checkpoint
    from jddim.checkpoint.metadata import FIRST_STAGE, Metadata
    from jddim.models.building import abstract_model, flat_params

    one_level: dict[str, Any] = {"channel_mults": (1,), "attention_levels": (0,), "middle": False}
    config = small_config(**(one_level | fields))
    rng = np.random.default_rng(seed)
    shapes = flat_params(abstract_model(config))
    if autoencoder is not None:
        shapes |= {FIRST_STAGE + name: leaf for name, leaf in flat_params(abstract_model(autoencoder)).items()}
    params = {
        name: edit(name, (name.endswith("scale") + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32))
        for name, leaf in shapes.items()
    }
    own = {"spacing": "uniform", "num_steps": 5, "clip": False, "prediction_type": prediction_type} | (sampler or {})
    metadata = Metadata(
        config,
        schedule,
        SamplerConfig(**own),
        {"family": "ho", "source": {}} | (provenance or {}),
        autoencoder=autoencoder,
    )
    save_checkpoint(path, params, metadata)
    return path


def classifier_config(**changes: Any) -> ClassifierConfig:
    """A classifier of images as `small_config`'s, of one level without attention but the pooling's."""
    fields: dict[str, Any] = {"image_size": SIZE, "num_classes": 4, "in_channels": 1, "channels": 8}
    fields |= {"channel_mults": (1,), "num_res_blocks": 1, "head_channels": 4, "norm_groups": 4}
    return ClassifierConfig(**(fields | changes))


def write_classifier(path: Path, **fields: Any) -> Path:
    """A classifier's checkpoint with random parameters. fields: of `classifier_config`."""
    from jddim.checkpoint.folder import save_checkpoint
    from jddim.checkpoint.metadata import PartMetadata
    from jddim.models.building import flat_params

    config = classifier_config(**fields)
    params = {name: np.asarray(value) for name, value in flat_params(random_model(config)).items()}
    save_checkpoint(path, params, PartMetadata(config, {"family": "openai_classifier", "source": {}}))
    return path


def random_model(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Any:
    """The network that `config` describes with every parameter random: norms start at 1 and 0, which would hide
    mistakes. (Its own initialisers would compile a program for every shape, too.)
    """
    from jddim.models.building import abstract_model, build_model, flat_params

    rng = np.random.default_rng(seed)
    params = {
        name: (name.endswith("scale") + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in flat_params(abstract_model(config)).items()
    }
    return build_model(config, params, dtype)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too: path -> contents, None for a folder. To compare before and after."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
