"""Runs the scheduler tests of diffusers over the steps of jddim, and prints the table of docs/parity.md.

    PYTHONPATH=.:tests python tests/measure_scheduler_suite.py TREE     (TREE: a work tree of huggingface/diffusers)

TREE's own schedulers keep their configurations, timetables, sigmas and draws; `step` of each of `SCHEDULERS` becomes a
step of jddim, in float64, on a table of their sigmas. Exit status 1 if a test fails. A test is out of scope, with its
reason, where it asks a step for what jddim does not do; one that takes no step says nothing of jddim, and is not
counted. Past outputs that a test puts into a scheduler by hand are not looked at.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jddim import sampling
from jddim.ddim import StepTable, step_table
from jddim.denoisers import with_edm
from jddim.inversion import inversion_table, invert_update
from jddim.schedule import NoiseSchedule
from jddim.solvers import (
    SOLVERS,
    Solver,
    SolverTable,
    deis_plan,
    dpm_plan,
    dpm_singlestep_plan,
    lms_plan,
    memory_of,
    solver_update,
    unipc_plan,
)

ROUNDED = {
    "DDPMSchedulerTest::test_full_loop_with_noise": "387.9466, which is 387.9676 where they, too, take "
    "1 - alpha_bar_t / alpha_bar_prev in float64: at t = 1 float32 rounds it to 6e-4 of itself"
}
COUNTED = ("passed", "out of scope")
PUBLISHED = ("result_sum", "result_mean")  # what a test says that asserts a published number

taken: Counter[str] = Counter()  # steps of jddim by test


# -- a step of each kind: (scheduler, arguments) -> (x_prev, x0) -----------------------------------------------------


def array(x: Any) -> np.ndarray:
    """A tensor (N, C, ...) as ours, (N, ..., C)."""
    return np.moveaxis(x.double().numpy(), 1, -1)


@cache
def compiled(make: Callable[..., Any], **options: Any) -> Any:
    """One step of an update; tables and schedulers share it."""
    return jax.jit(make(**options))


def limits(config: Any) -> dict[str, Any]:
    if config.get("thresholding"):
        return {"threshold": (config.dynamic_thresholding_ratio, config.sample_max_value)}
    if config.get("clip_sample"):
        return {"clip_range": (-config.clip_sample_range, config.clip_sample_range)}
    return {"clip_range": None}


def drawn(given: dict[str, Any], dtype: Any = None) -> np.ndarray:
    from diffusers.utils.torch_utils import randn_tensor

    output = given["model_output"]
    if given.get("variance_noise") is not None:
        return array(given["variance_noise"])
    return array(randn_tensor(output.shape, generator=given.get("generator"), dtype=dtype or output.dtype))


def schedule_of(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule(scheduler.betas.double().numpy(), scheduler.alphas_cumprod.double().numpy())


def row_at(scheduler: Any, t: int, t_prev: int) -> StepTable:
    """The step from t to t_prev, -1 for what the scheduler ends at, as a table of one row."""
    to_one = scheduler.config.get("set_alpha_to_one", True)
    return step_table(
        schedule_of(scheduler), [t], np.float64, timesteps_prev=[max(t_prev, -1)], set_alpha_to_one=to_one
    )


def only(table: Any) -> Any:
    return type(table)(*(column[0] for column in table))


def ddim_step(scheduler: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    if scheduler.num_inference_steps is None:
        raise ValueError("set_timesteps comes first")
    config, t, eta = scheduler.config, int(given["timestep"]), given["eta"]
    row = only(row_at(scheduler, t, t - config.num_train_timesteps // scheduler.num_inference_steps))
    update = compiled(
        sampling.ddim_update,
        eta=eta,
        prediction_type=config.prediction_type,
        rederive_eps=given["use_clipped_model_output"],
        **limits(config),
    )
    noise = drawn(given) if eta > 0 else np.zeros(())
    return update(array(given["sample"]), array(given["model_output"]), noise, row)


def never(x_t: Any, t: Any) -> Any:
    """Inversion asks again only to refine."""
    return x_t


def inverse_step(scheduler: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    config, t = scheduler.config, int(given["timestep"])
    table = row_at(scheduler, t, t - config.num_train_timesteps // scheduler.num_inference_steps)
    update = compiled(invert_update, denoise=never, prediction_type=config.prediction_type, **limits(config))
    x, output = array(given["sample"]), array(given["model_output"])
    return update(x, output, np.zeros(()), only(inversion_table(table, "diffusers")))


def ddpm_step(scheduler: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    t, kind = int(given["timestep"]), scheduler.variance_type.removesuffix("_log")
    if scheduler.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        pytest.skip(f"variance_type {scheduler.variance_type}")
    if kind == "learned_range" and given["model_output"].shape[1] != 2 * given["sample"].shape[1]:
        pytest.skip("variance_type learned_range, of a network without a variance")
    row = only(row_at(scheduler, t, int(scheduler.previous_timestep(t))))
    update = compiled(
        sampling.ancestral_update,
        variance=kind,
        prediction_type=scheduler.config.prediction_type,
        **limits(scheduler.config),
    )
    noise = drawn(given) if t > 0 else np.zeros(())
    return update(array(given["sample"]), array(given["model_output"]), noise, row)


# -- solvers ----------------------------------------------------------------------------------------------------------


def multistep(scheduler: Any, given: dict[str, Any]) -> Solver:
    config = scheduler.config
    sde, history = config.algorithm_type.startswith("sde"), "x0" if config.algorithm_type.endswith("++") else "eps"
    plan = partial(
        dpm_plan,
        order=config.solver_order,
        history=history,
        sde=sde,
        solver_type=config.solver_type,
        lower_order_final=config.lower_order_final and len(scheduler.timesteps) < 15,
        euler_at_final=config.euler_at_final,
    )
    return Solver(plan, history, stochastic=sde)


def singlestep(scheduler: Any, given: dict[str, Any]) -> Solver:
    config = scheduler.config
    if config.algorithm_type.startswith("sde"):
        pytest.skip("the SDE by singlestep")
    options = {"history": "x0" if config.algorithm_type.endswith("++") else "eps", "solver_type": config.solver_type}
    started = scheduler.step_index

    def plan(table: StepTable) -> SolverTable:
        """Of the whole timetable; a first step that would go on from others is of first order."""
        whole = dpm_singlestep_plan(table, config.solver_order, lower_order_final=config.lower_order_final, **options)
        first = dpm_singlestep_plan(table, 1, **options)
        for name in ("base_x", "base_last", "step_x"):
            getattr(whole, name)[started] = getattr(first, name)[started]
        whole.step_history[started] = np.eye(1, config.solver_order) * first.step_history[started]
        return whole

    return Solver(plan, options["history"])


def unipc(scheduler: Any, given: dict[str, Any]) -> Solver:
    config = scheduler.config
    if not config.predict_x0 or config.disable_corrector or scheduler.solver_p is not None:
        pytest.skip("UniPC of eps, without its corrector, or around another scheduler")
    options = {"solver_type": config.solver_type, "lower_order_final": config.lower_order_final}
    return Solver(partial(unipc_plan, order=config.solver_order, **options))


def deis(scheduler: Any, given: dict[str, Any]) -> Solver:
    falls = scheduler.config.lower_order_final and len(scheduler.timesteps) < 15
    return Solver(partial(deis_plan, order=scheduler.config.solver_order, lower_order_final=falls), "eps")


def lms(scheduler: Any, given: dict[str, Any]) -> Solver:
    return Solver(partial(lms_plan, order=given["order"]), "eps")


# From the whole timetable, wherever a run starts (else from the rest of it); of x_t / alpha_t.
WHOLE = ("DPMSolverSinglestepScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
OF_SIGMA = (
    *("LMSDiscreteScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
)
OF_EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")


def solver_step(scheduler: Any, given: dict[str, Any], *, make: Callable[..., Solver]) -> tuple[Any, Any]:
    name = type(scheduler).__name__
    if scheduler.step_index is None:
        scheduler._init_step_index(given["timestep"])
    if getattr(scheduler, "ours", {}).get("sigmas") is not scheduler.sigmas:  # which set_timesteps makes anew
        scheduler.ours = begin(make(scheduler, given), scheduler)
    x, output, config = array(given["sample"]), given["model_output"], scheduler.config
    if config.get("variance_type") in ("learned", "learned_range"):
        output = output[:, :3]
    noise = np.zeros(())
    if scheduler.ours["solver"].stochastic:
        import torch

        noise = drawn(given, None if name in OF_SIGMA else torch.float32)
    scheduler._step_index += 1
    return advance(scheduler, x, array(output), noise, scaled=name in OF_SIGMA)


def begin(solver: Solver, scheduler: Any) -> dict[str, Any]:
    """The rows of a run, from the scheduler's sigmas."""
    s, config, name = scheduler.sigmas.double().numpy(), scheduler.config, type(scheduler).__name__
    start = scheduler.step_index
    if name == "HeunDiscreteScheduler":  # each but the first and the last is there twice
        s = np.append(s[:1], s[1::2])
    alpha = 1 - s if config.get("use_flow_sigmas") else np.ones_like(s) if name in OF_EDM else 1 / np.sqrt(1 + s**2)
    sigma = s if config.get("use_flow_sigmas") else s * alpha
    number = np.arange(len(s) - 1, dtype=np.int32)
    table = StepTable(
        number, number[::-1], number[::-1] - 1, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], np.zeros(len(number))
    )
    if name not in WHOLE:
        table, start = StepTable(*(column[start:] for column in table)), 0
    rows = planned(solver, table)
    return {"solver": solver, "rows": rows, "at": start, "memory": None, "sigmas": scheduler.sigmas}


def planned(solver: Solver, table: StepTable, schedule: NoiseSchedule | None = None) -> SolverTable:
    """The solver's plan, its history at least 4 long, so that many share a compiled step."""
    rows = solver.rows(table, schedule)
    missing = ((0, 0), (0, max(4 - rows.step_history.shape[1], 0)))
    return rows._replace(
        base_history=np.pad(rows.base_history, missing), step_history=np.pad(rows.step_history, missing)
    )


def advance(scheduler: Any, x: Any, output: Any, noise: Any, *, scaled: bool = False) -> tuple[Any, Any]:
    run, config = scheduler.ours, scheduler.config
    if run["solver"].history == "eps" and (config.get("thresholding") or config.get("clip_sample")):
        pytest.skip("a limited x0 of a solver that remembers eps")
    row = SolverTable(*(column[run["at"]] for column in run["rows"]))
    kind = {"flow_prediction": "velocity"}.get(config.prediction_type, config.prediction_type)
    if type(scheduler).__name__ in OF_EDM:
        kind, sign = "velocity", -1 if config.prediction_type == "v_prediction" else 1
        output = velocity(x, sign * output, np.asarray(row.sigma_t), config.sigma_data)
    update = compiled(made, history=run["solver"].history, prediction_type=kind, **limits(config))
    x = x * row.alpha_t if scaled else x
    memory = memory_of(run["rows"], x) if run["memory"] is None else run["memory"]
    x_prev, x0, run["memory"] = update(x, output, noise, row, memory)
    run["at"] += 1
    return x_prev / row.alpha_prev if scaled else x_prev, x0


@partial(jax.jit, static_argnames="sigma_data")
def velocity(x: Any, F: Any, t: Any, sigma_data: float) -> Any:
    """Of the output of a network of EDM's preconditioning."""
    return with_edm(lambda *_: F, sigma_data)(x, jax.numpy.broadcast_to(t, x.shape[:1]))


def consistency_step(scheduler: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Of x0 itself, which its network's boundary gives."""
    if scheduler.step_index is None:
        scheduler._init_step_index(given["timestep"])
    config, s, i = scheduler.config, scheduler.sigmas.double().numpy(), scheduler.step_index
    least, x, output = config.sigma_min, array(given["sample"]), array(given["model_output"])
    denoiser = with_edm(lambda *_: output, config.sigma_data, 0.25, least)
    velocity = denoiser(jax.numpy.asarray(x), jax.numpy.full(len(x), s[i]))
    clip = (-1.0, 1.0) if config.clip_denoised else None
    row = StepTable(*(np.asarray(c) for c in (i, s[i], s[i + 1], 1.0, s[i], 1.0, s[i + 1], 0.0)))
    update = sampling.consistency_update(least_sigma=least, prediction_type="velocity", clip_range=clip)
    scheduler._step_index += 1
    noise = drawn(given) if len(scheduler.timesteps) > 1 else np.zeros_like(x)
    return update(x, velocity, noise, row)


def made(history: str, **options: Any) -> Any:
    return solver_update(Solver(deis_plan, history), **options)


def pndm_step(scheduler: Any, given: dict[str, Any], *, plms: bool = False) -> tuple[Any, Any]:
    config = scheduler.config
    if config.prediction_type == "v_prediction":
        pytest.skip("PNDM sums v of several t before it makes eps of the sum, jddim sums eps")
    if scheduler.num_inference_steps is None:
        raise ValueError("set_timesteps comes first")
    if plms and not config.skip_prk_steps and scheduler.counter < len(scheduler.prk_timesteps):
        if scheduler.ets:
            pytest.skip("PNDM's past outputs, put in by hand")
        raise ValueError("the Runge-Kutta steps come first")
    if scheduler.counter == 0:
        t = np.int64(scheduler._timesteps)[::-1].copy()
        schedule = schedule_of(scheduler)
        previous = np.maximum(t - config.num_train_timesteps // scheduler.num_inference_steps, -1)
        to_one = config.set_alpha_to_one
        table = step_table(schedule, t, np.float64, timesteps_prev=previous, set_alpha_to_one=to_one)
        solver = SOLVERS["plms" if config.skip_prk_steps else "pndm"]
        scheduler.ours = {"solver": solver, "rows": planned(solver, table, schedule), "at": 0, "memory": None}
    scheduler.counter += 1
    return advance(scheduler, array(given["sample"]), array(given["model_output"]), np.zeros(()))


SCHEDULERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "DDIMScheduler": ("ddim", ddim_step),
    "DDIMInverseScheduler": ("ddim_inverse", inverse_step),
    "DDPMScheduler": ("ddpm", ddpm_step),
    "DPMSolverMultistepScheduler": ("dpm_multi", partial(solver_step, make=multistep)),
    "DPMSolverSinglestepScheduler": ("dpm_single", partial(solver_step, make=singlestep)),
    "UniPCMultistepScheduler": ("unipc", partial(solver_step, make=unipc)),
    "HeunDiscreteScheduler": ("heun", partial(solver_step, make=lambda *_: SOLVERS["heun"])),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", partial(solver_step, make=lambda *_: SOLVERS["euler-a"])),
    "PNDMScheduler": ("pndm", pndm_step),
    "DEISMultistepScheduler": ("deis", partial(solver_step, make=deis)),
    "LMSDiscreteScheduler": ("lms", partial(solver_step, make=lms)),
    "EulerDiscreteScheduler": ("euler", partial(solver_step, make=lambda *_: SOLVERS["ddim"])),
    "EDMEulerScheduler": ("edm_euler", partial(solver_step, make=lambda *_: SOLVERS["ddim"])),
    "EDMDPMSolverMultistepScheduler": ("edm_dpmsolver_multistep", partial(solver_step, make=multistep)),
    "CMStochasticIterativeScheduler": ("consistency_model", consistency_step),
}


def replace(scheduler_class: Any, method: str, ours: Callable[..., Any]) -> None:
    """The class's method becomes ours, with its signature and its forms of a result."""
    import torch
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    theirs = getattr(scheduler_class, method)
    signature = inspect.signature(theirs)

    @wraps(theirs)  # with its signature, which tests look into
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        with jax.enable_x64(True):
            x_prev, x0 = (np.array(x) for x in ours(self, given))
        taken[os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]] += 1
        result = [torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(given["sample"].dtype) for x in (x_prev, x0)]
        return DDIMSchedulerOutput(*result) if given["return_dict"] else tuple(result)

    setattr(scheduler_class, method, step)


# -- the run ----------------------------------------------------------------------------------------------------------


class Report:
    """What became of each test: (file, whether it asserts published numbers) -> counts."""

    def __init__(self) -> None:
        self.published: set[str] = set()
        self.counts: Counter[tuple[str, bool, str]] = Counter()
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        # test_compatibles makes schedulers of other libraries, and takes no step.
        items[:] = [i for i in items if i.cls.scheduler_classes and i.name != "test_compatibles"]
        for item in items:
            for name, reason in ROUNDED.items():
                if item.nodeid.endswith(name):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
            if any(word in inspect.getsource(item.function) for word in PUBLISHED):
                self.published.add(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not report.failed:
            return
        file, published = Path(report.nodeid.split("::")[0]).stem, report.nodeid in self.published
        if report.failed:
            self.failed.append(report.nodeid)
            self.counts[file, published, "failed"] += 1
        elif report.skipped:
            reason = getattr(report, "wasxfail", None) or report.longrepr[2].removeprefix("Skipped: ")
            if reason != "Test not supported.":  # theirs, of a test that all schedulers share
                self.counts[file, published, "out of scope"] += 1
                self.reasons[file, reason] += 1
        elif taken[report.nodeid]:
            self.counts[file, published, "passed"] += 1

    def table(self) -> str:
        lines = ["| scheduler | published numbers: met | out of scope | other tests: passed | out of scope |"]
        lines.append("|---|--:|--:|--:|--:|")
        for name, (file, _) in SCHEDULERS.items():
            numbers = [self.counts[f"test_scheduler_{file}", p, what] for p in (True, False) for what in COUNTED]
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
        reasons = [f"- {file.removeprefix('test_scheduler_')}: {n} of {why}" for (file, why), n in self.reasons.items()]
        return "\n".join([*lines, "", *sorted(reasons)])


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not (Path(argv[0]) / "tests" / "schedulers").is_dir():
        print(
            "SKIPPED: THE TESTS OF DIFFUSERS ARE NOT HERE. Give a work tree of huggingface/diffusers", file=sys.stderr
        )
        return 2
    tree = Path(argv[0]).resolve()
    sys.path[:0] = [str(tree / "src")]
    import diffusers

    diffusers.DiffusionPipeline = (
        None  # their test files name it; it needs more packages, and only tests of downloads it
    )
    for name, (_, ours) in SCHEDULERS.items():
        replace(getattr(diffusers, name), "step", ours)
    replace(diffusers.PNDMScheduler, "step_prk", pndm_step)
    replace(diffusers.PNDMScheduler, "step_plms", partial(pndm_step, plms=True))
    files = [str(tree / "tests" / "schedulers" / f"test_scheduler_{file}.py") for file, _ in SCHEDULERS.values()]
    report = Report()
    status = pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={tree}", *files], plugins=[report])
    print(f"diffusers {diffusers.__version__}\n\n{report.table()}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
