"""The methods of sampling, DDIM, DDPM and the solvers alike: how each walks down a table, and what it needs.

A method turns a float64 step table into the rows that the scan runs over, and takes those rows from a state. To add one
is to name it in `METHODS`, or a `Solver` in `jddim.solvers.SOLVERS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jddim import solvers
from jddim.config import UNUSED, did_you_mean
from jddim.ddim import StepTable, predict_both, rederive_eps
from jddim.guidance import cfg_plus_plus_update
from jddim.inversion import inversion_table, invert_update
from jddim.models.classifier import Classifier
from jddim.run.request import CFG_PLUS_PLUS
from jddim.sampling import Denoiser, Update, ancestral_update, consistency_update, ddim_update, limiter
from jddim.schedule import Schedule
from jddim.solvers import Solver, SolverTable, cast, memory_of, solver_update


class Guidance(NamedTuple):
    """scale: `(b,)`. null_label: a scalar. rescale: a scalar, interval: two t; None: not asked for."""

    scale: Array
    null_label: Array
    rescale: Array | None = None
    interval: tuple[Array, Array] | None = None


class Classified(NamedTuple):
    """What leads to labels by a classifier's gradient. labels: `(b,)`; scale: `(b,)`; alpha, sigma: `(T,)`."""

    model: Classifier
    labels: Array
    scale: Array
    alpha: Array
    sigma: Array


class Kept(NamedTuple):
    """What inpainting keeps. known: `(b, h, w, c)`; keep: `(h, w, 1)`; noise: x_T, which the known pixels carry, or
    None where they are clean in every x_t.
    """

    known: Array
    keep: Array
    noise: Array | None


class Given(NamedTuple):
    """What a batch's program is given beside its state and rows. Traced: another value is no other program.

    eta: `(b,)`. keys: `(b,)`, or None where noise is given or none is drawn. noise: `(n, b, ...)`, one entry a row.
    limits: the loops' clip_range or threshold. labels: `(b,)`. condition: `(b, h, w, channels)`, beside x_t.
    """

    eta: Array
    keys: Array | None
    noise: Array | None
    limits: dict[str, tuple[Array, Array]]
    labels: Array | None = None
    guidance: Guidance | None = None
    kept: Kept | None = None
    condition: Array | None = None
    classifier: Classified | None = None


class Statics(Protocol):
    """What a method reads of a `jddim.run.programs.Program`."""

    @property
    def prediction_type(self) -> str:
        """What the network predicts."""

    @property
    def rederive_eps(self) -> bool:
        """Whether the direction's eps comes from the limited x0."""

    @property
    def variance(self) -> str:
        """The ancestral sampler's."""

    @property
    def guidance(self) -> str | None:
        """The kind of guidance, or None."""

    @property
    def edm(self) -> tuple[float, float] | None:
        """Of a network of EDM's preconditioning, its sigma_data and the t where it returns x_t itself, 0: nowhere."""


class Method(Protocol):
    """A way from x_T to x_0 (or, inverting, from x_0 to x_T). Hashable: part of what identifies a program."""

    @property
    def takes_eta(self) -> bool:
        """Whether eta means something to it."""

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise whatever eta is."""

    @property
    def takes_variance(self) -> bool:
        """Whether the sampler's variance means something to it, a learned one too."""

    @property
    def rederives_eps(self) -> bool:
        """Whether it can take the direction's eps from the limited x0."""

    @property
    def remembers(self) -> bool:
        """Whether a step needs those before it."""

    def rows(self, table: StepTable, dtype: DTypeLike, schedule: Schedule) -> Any:
        """What the scan runs over, from a schedule's float64 table on the host, its floats cast to `dtype`."""

    def memory(self, rows: Any, x_T: Array) -> Any:
        """What the first step finds of those before it; None: steps remember nothing."""

    def update(self, denoise: Denoiser, given: Given, statics: Statics) -> Update:
        """One step, for `jddim.sampling.update_steps`. denoise: for a step that asks the network again."""


@dataclasses.dataclass(frozen=True)
class Ddim:
    """Eq. 12 of arXiv:2010.02502."""

    takes_eta = True
    stochastic = False
    takes_variance = False
    rederives_eps = True
    remembers = False

    def rows(self, table: StepTable, dtype: DTypeLike, schedule: Schedule) -> StepTable:
        """The table itself."""
        rows: StepTable = cast(table, dtype)
        return rows

    def memory(self, rows: StepTable, x_T: Array) -> None:
        """Nothing is remembered."""

    def update(self, denoise: Denoiser, given: Given, statics: Statics) -> Update:
        """`ddim_update`, or CFG++'s step under that guidance."""
        if statics.guidance == CFG_PLUS_PLUS:
            return cfg_plus_plus_update(eta=given.eta, prediction_type=statics.prediction_type, **given.limits)
        return ddim_update(
            eta=given.eta,
            prediction_type=statics.prediction_type,
            rederive_eps=statics.rederive_eps,
            **given.limits,
        )


@dataclasses.dataclass(frozen=True)
class Ddpm(Ddim):
    """Algorithm 2 of arXiv:2006.11239 on any table."""

    takes_eta = False
    stochastic = True
    takes_variance = True
    rederives_eps = False

    def update(self, denoise: Denoiser, given: Given, statics: Statics) -> Update:
        """`ancestral_update`."""
        limits: Any = {"clip_range": None, **given.limits}
        variance = "fixed_small" if statics.variance == UNUSED else statics.variance
        return ancestral_update(variance=variance, prediction_type=statics.prediction_type, **limits)


@dataclasses.dataclass(frozen=True)
class Consistency(Ddim):
    """Multistep consistency sampling: each x0 is noised anew."""

    takes_eta = False
    stochastic = True
    rederives_eps = False

    def update(self, denoise: Denoiser, given: Given, statics: Statics) -> Update:
        """`consistency_update`."""
        least = 0.0 if statics.edm is None else statics.edm[1]
        return consistency_update(least_sigma=least, prediction_type=statics.prediction_type, **given.limits)


@dataclasses.dataclass(frozen=True)
class BySolver:
    """One of `jddim.solvers`, or a `Solver` of the caller's."""

    solver: Solver
    takes_eta = False
    takes_variance = False
    remembers = True

    @property
    def rederives_eps(self) -> bool:
        """Whether it remembers eps, and so can take it from the limited x0."""
        return self.solver.history == "eps"

    @property
    def stochastic(self) -> bool:
        """As the solver says."""
        return self.solver.stochastic

    def rows(self, table: StepTable, dtype: DTypeLike, schedule: Schedule) -> SolverTable:
        """The solver's plan, of two remembered predictions at least, so that one step has several steps' program."""
        rows: SolverTable = cast(self.solver.rows(table, schedule), dtype)
        missing = ((0, 0), (0, max(2 - rows.step_history.shape[1], 0)))
        return rows._replace(
            base_history=np.pad(rows.base_history, missing), step_history=np.pad(rows.step_history, missing)
        )

    def memory(self, rows: SolverTable, x_T: Array) -> tuple[Array, Array]:
        """Zeros."""
        return memory_of(rows, x_T)

    def update(self, denoise: Denoiser, given: Given, statics: Statics) -> Update:
        """`solver_update`, of the eps that the limited x0 implies where the source derives it so."""
        limit = limiter(given.limits.get("clip_range"), given.limits.get("threshold"))
        if limit is None or not (self.rederives_eps and statics.rederive_eps):
            return solver_update(self.solver, prediction_type=statics.prediction_type, **given.limits)
        step = solver_update(self.solver)

        def update(x_t: Array, output: Array, noise: Array, row: Any, *memory: Any) -> Any:
            x0, eps = predict_both(output, x_t, row.alpha_t, row.sigma_t, statics.prediction_type)
            return step(x_t, rederive_eps(x_t, limit(x0), eps, row.alpha_t, row.sigma_t), noise, row, *memory)

        return update


@dataclasses.dataclass(frozen=True)
class Inversion(Ddim):
    """DDIM's steps backwards (`jddim.inversion`), of which one may ask the network again."""

    convention: str = "diffusers"
    refine: int = 0

    takes_eta = False

    def rows(self, table: StepTable, dtype: DTypeLike, schedule: Schedule) -> StepTable:
        """From x_0 up."""
        return inversion_table(cast(table, dtype), self.convention)

    def update(self, denoise: Denoiser, given: Given, statics: Statics) -> Update:
        """`invert_update`."""
        return invert_update(
            denoise,
            refine=self.refine,
            prediction_type=statics.prediction_type,
            rederive_eps=statics.rederive_eps,
            **given.limits,
        )


METHODS: dict[str, Method] = {"ddim": Ddim(), "ddpm": Ddpm(), "consistency": Consistency()}
"""By name, beside the solvers of `jddim.solvers.SOLVERS` whose names are not here."""


def find(method: str | Solver) -> Method:
    """The method of that name, or by the solver given. Raises ValueError for an unknown name."""
    if isinstance(method, Solver):
        return BySolver(method)
    if method in METHODS:
        return METHODS[method]
    if method not in solvers.SOLVERS:
        raise ValueError(f"unknown method {method!r}{did_you_mean(str(method), names())}")
    return BySolver(solvers.SOLVERS[method])


def names() -> tuple[str, ...]:
    """Every method's name; `config.METHODS` says the same to the command line, which does not import this."""
    return tuple(dict.fromkeys((*METHODS, *solvers.SOLVERS)))
