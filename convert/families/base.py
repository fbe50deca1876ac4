"""What a checkpoint family provides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jddim.checkpoint.metadata import Metadata
from jddim.config import ModelConfig, SamplerConfig, ScheduleConfig
from jddim.ddim import StepTable, largest_eta, sampler_table
from jddim.sampling import check_prediction
from jddim.schedule import make_schedule

from ..engine import ConversionError, refusing
from ..rules import Rules
from .tensors import Tensors, check_tensors


@dataclasses.dataclass(frozen=True)
class Source:
    """One set of weights taken out of a file. tensors: torch names, without wrappers' prefixes -> arrays.

    weights: "ema", "raw" or "unstated". taken: the keys and prefixes that lead to them, with dots between; empty for a
    bare state dict. beside: what else the file has there; told: of that, what the family reads as a config where
    there is no file of one (`Family.entry`).
    """

    tensors: Tensors
    weights: str = "unstated"
    step: int | None = None
    note: str = ""
    taken: str = ""
    beside: str = ""
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def all_tensors(state: Mapping[Any, Any], file_name: str) -> Source:
    """A state dict's tensors under the names that it has; ConversionError if it holds anything else."""
    check_tensors(state, file_name)
    return Source({str(name): value for name, value in state.items()})


@dataclasses.dataclass(frozen=True)
class Wording:
    """The schedule and the sampler as the source says them: its name of each fact -> the value in its spelling.

    Kept in the checkpoint's provenance, for `jddim info`. settings: of a name that --set spells otherwise, --set's.
    """

    schedule: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sampler: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self, told: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """told: the names that --set or --preset gave -> which of them; "told" has those of the facts here."""
        origins = {name: told.get(self.settings.get(name, name)) for name in (*self.schedule, *self.sampler)}
        return {
            "schedule": dict(self.schedule),
            "sampler": dict(self.sampler),
            "told": {name: origin for name, origin in origins.items() if origin is not None},
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a source becomes a model: everything inferred, told or assumed, and the rename table.

    assumed: sentences, each a fact that neither the tensors nor the user gave. notes: what else a user should know;
    warnings: of that, what makes the samples wrong if it is not so. asks: the settings that neither the tensors nor the
    user told, that runs of the source differ in, and that a default stands for: KEY=VALUE (`values.asking`). unchecked:
    the settings that the user gave and that the tensors would not contradict if they were wrong; how to sample is none
    of either. schedule, sampler: None of a classifier and of a first stage. latent: by the source, what is sampled are
    latents.
    reference_options: what `Family.reference` needs beside the model's config to load these tensors; kept in the
    checkpoint's provenance, for the way back. wording: of schedule and sampler. implied: tensors that the source's
    network has the effect of, and its file not, or with other numbers in it: they take the place of the file's.
    null_label: the label that meant none in training, None where there was none. label_names: the source's name of a
    class -> its label.
    """

    model: ModelConfig
    schedule: ScheduleConfig | None
    sampler: SamplerConfig | None
    rules: Rules
    ignored: Mapping[str, str]
    assumed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reference_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wording: Wording = Wording()
    implied: Tensors = dataclasses.field(default_factory=dict)
    latent: bool = False
    null_label: int | None = None
    label_names: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """A checkpoint family: functions, so that a new one is a file and not a subclass.

    recognise: a state dict, by its names -> is it ours? What holds it is unwrapped elsewhere (`convert.recognition`).
    open_source: a state dict that is, the words for it -> Source. buffers: the tensors in it that are no parameters.
    entry: the name under which a run's options lie beside the weights, a dict or what argparse makes; empty: none does.
    plan: tensors, config file's contents or None, --set values -> Plan. reference: config, and the plan's
    reference_options by keyword -> a torch module with the source's parameter names, whose `activations(x_t NCHW, t,
    labels or None)` are (name, output) of each block, named as by the Flax network's. settings: what --set takes ->
    what it means. pointwise: the ends of the names of modules that are 1x1 convolutions there and linear here -> how
    many sides of 1 their kernels have. presets: what --preset takes -> the settings that it stands for, which --set
    overrides. formats: name -> a function that writes a checkpoint as the source does (`convert.export`), the one to
    use by default first.

    For sources of several files: locate: (folder, "ema" | "raw" | None, variant or None) -> the weights file or index
    of shards in it, None if the folder is not this family's. config_files: weights file -> where its configs lie, the
    preferred first. config_section: a config's contents -> which of the family's several configs it is; `plan` then
    gets them by section. placed: (source, weights file, config) -> the source with what the file's name and place tell
    of weights and step, where the file itself does not. hub_files:
    variant or None -> the file patterns of a hub repository, those to try first first. beside: weights file -> the
    folder of the first stage that belongs to it. first_stage: it is a first stage itself.
    """

    name: str
    title: str
    recognise: Callable[[Mapping[Any, Any]], bool]
    plan: Callable[[Tensors, Mapping[str, Any] | None, Mapping[str, str]], Plan]
    reference: Callable[..., Any]
    settings: Mapping[str, str]
    open_source: Callable[[Mapping[Any, Any], str], Source] = all_tensors
    buffers: frozenset[str] = frozenset()
    entry: str = ""
    pointwise: Mapping[str, int] = dataclasses.field(default_factory=dict)
    presets: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    formats: Mapping[str, Callable[[Metadata, Tensors, Path], None]] = dataclasses.field(default_factory=dict)
    locate: Callable[[Path, str | None, str | None], Path | None] | None = None
    config_files: Callable[[Path], Iterable[Path]] = lambda weights: [weights.parent / "config.yml"]
    config_section: Callable[[Mapping[str, Any]], str] | None = None
    placed: Callable[[Source, Path, Mapping[str, Any] | None], Source] = lambda source, weights, config: source
    hub_files: Callable[[str | None], Sequence[Sequence[str]]] | None = None
    beside: Callable[[Path], Path | None] = lambda weights: None
    first_stage: bool = False


FIRST_STAGES = frozenset({"vae", "vqvae", "vqmodel", "autoencoder", "first_stage", "first_stage_model"})
_CONDITIONERS = frozenset({"cond_stage_model", "conditioner", "text_encoder", "text_encoder_2", "text_model"})


def check_companions(what: str, network: str, beside: Iterable[str], *, handled: bool = False) -> None:
    """Raises ConversionError if what lies beside a network is a first stage of unknown kind, or encodes texts.

    what: the file or folder, for the message. network: where in it. beside: the names of the other parts. handled: the
    first stage among them is taken in.
    """
    names = set(beside)
    if not handled and (stages := sorted(names & FIRST_STAGES)):
        raise ConversionError(
            f"{what} holds a network of latents ({network}) and the first stage that turns them into images "
            f"({', '.join(stages)}), which is none of those that jddim reads (AutoencoderKL, VQModel)"
        )
    if conditioners := sorted(names & _CONDITIONERS):
        raise ConversionError(
            f"{what} holds a network ({network}) and what encodes its conditions ({', '.join(conditioners)}); "
            "jddim's networks take class labels or nothing"
        )


C = TypeVar("C", bound=ModelConfig)


def of_wiring(config: ModelConfig, wiring: type[C]) -> C:
    """The config itself. Raises ConversionError if it is of another wiring than this one, a family's own."""
    if not isinstance(config, wiring):
        raise ConversionError(f"another wiring than this family's ({type(config).__name__})")
    return config


def checked(schedule: ScheduleConfig) -> ScheduleConfig:
    """The schedule itself. Raises ConversionError if it cannot be built."""
    with refusing("the noise schedule cannot be built"):
        make_schedule(schedule)
    return schedule


def scaled_t(sampler: SamplerConfig) -> list[str]:
    """Why a source that gives its network t itself cannot hold this sampler; empty if it can."""
    scale = sampler.timestep_scale
    return [] if scale == 1 else [f"the network is given t times {scale:g}, there t itself"]


def check_sampler(sampler: SamplerConfig, schedule: ScheduleConfig) -> StepTable:
    """The table of the sampler's defaults, or ConversionError if sampling with them would fail."""
    with refusing("the sampler's defaults do not work"):
        table = sampler_table(make_schedule(schedule), sampler)
        check_prediction(table, sampler.prediction_type)
    limit = largest_eta(table)
    if not 0 <= sampler.eta <= limit:
        raise ConversionError(f"eta must lie in 0..{limit:.4g} for this table of steps, got {sampler.eta:g}")
    return table
