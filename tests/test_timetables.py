"""Timetables for a schedule: Karras' spacing, the dynamic programme against every way there is, and the known traps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from jddim.cli import schedule as schedule_command
from jddim.cli.main import main
from jddim.config import SamplerConfig
from jddim.ddim import ddim_sigma, sampler_table, step_table
from jddim.installing import install_line
from jddim.schedule import NoiseSchedule, cosine_schedule, linear_schedule, zero_terminal_snr
from jddim.timesteps import linspace_timesteps, make_timesteps, previous_timesteps, quad_timesteps
from jddim.timetables import elbo_costs, karras_timesteps, search_timesteps, traps

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("S", [2, 5, 13])
def test_karras_steps_are_even_in_the_root_of_sigma(S: int, rho: float) -> None:
    schedule = linear_schedule(1000)
    t = karras_timesteps(schedule, S, rho)
    assert (len(t), t[0], t[-1]) == (S, 999, 0)
    sigma = np.sqrt(1 / schedule.alphas_cumprod - 1)
    wanted = np.linspace(sigma[999] ** (1 / rho), sigma[0] ** (1 / rho), S) ** rho
    # the nearest of 1000: within the gap between neighbours, largest (0.5 in log sigma) near t = 0
    gap = np.abs(np.diff(np.log(sigma)))
    near = np.minimum(t, 998)
    assert (np.abs(np.log(sigma[t] / wanted)) <= np.maximum(gap[near], gap[np.maximum(near - 1, 0)])).all()


def test_what_karras_refuses() -> None:
    with pytest.raises(ValueError, match=r"fall .* times on a t already taken: take fewer"):
        karras_timesteps(linear_schedule(1000), 300)
    with pytest.raises(ValueError, match="at least 2"):
        karras_timesteps(linear_schedule(1000), 1)
    with pytest.raises(ValueError, match="sigma_t / alpha_t is infinite"):
        karras_timesteps(zero_terminal_snr(linear_schedule(1000)), 10)


@pytest.mark.parametrize("S", [1, 2, 4, 9])
def test_the_search_finds_the_best_of_all_ways(S: int) -> None:
    T = 9
    cost = np.random.default_rng(S).uniform(size=(T, T + 1))
    cost[np.arange(-1, T)[None] >= np.arange(T)[:, None]] = np.inf

    def total(way) -> float:
        return sum(cost[t, s + 1] for t, s in itertools.pairwise([*way, -1]))

    ways = [(T - 1, *middle[::-1]) for middle in itertools.combinations(range(T - 1), S - 1)]
    found = search_timesteps(cost, S)
    assert total(found) == pytest.approx(min(map(total, ways)))
    assert tuple(found) == min(ways, key=total)


def test_the_search_may_start_lower_and_skip_what_is_barred() -> None:
    cost = np.where(np.arange(-1, 7)[None] < np.arange(7)[:, None], 1.0, np.inf)
    cost[:, 3] = np.inf  # never at t = 2
    assert search_timesteps(cost, 5, start=5).tolist() == [5, 4, 3, 1, 0]
    cost[:, 0] = np.inf
    with pytest.raises(ValueError, match="no way of 3 steps from t = 6 has a finite cost"):
        search_timesteps(cost, 3)
    with pytest.raises(ValueError, match=r"num_steps must lie in 1..start \+ 1 = 4"):
        search_timesteps(cost, 5, start=3)
    with pytest.raises(ValueError, match=r"costs must be \(T, T \+ 1\), got \(7, 7\)"):
        search_timesteps(cost[:, 1:], 3)


def test_the_bounds_costs_are_gaussian_divergences() -> None:
    """KL of two Gaussians of the posterior's variance, whose means differ by its coefficient of x0 times the error."""
    schedule, error, (t, s) = linear_schedule(50), 0.37, (30, 11)
    a, a_s = schedule.alphas_cumprod[[t, s]]
    beta = 1 - a / a_s
    coefficient = np.sqrt(a_s) * beta / (1 - a)  # Eq. 7 of arXiv:2006.11239
    variance = beta * (1 - a_s) / (1 - a)
    expected = coefficient**2 * error / (2 * variance)
    costs = elbo_costs(schedule, np.full(50, error))
    assert costs[t, s + 1] == pytest.approx(expected, rel=1e-10)
    assert np.isinf(costs[t, t + 1 :]).all()
    assert np.isfinite(costs[t, : t + 1]).all()
    assert len(search_timesteps(costs, 7)) == 7
    with pytest.raises(ValueError, match="mean_squared_errors must be 50 numbers >= 0"):
        elbo_costs(schedule, np.zeros(49))


def notes(schedule: NoiseSchedule, spacing: str, steps: int, prediction_type: str = "epsilon", **options) -> list[str]:
    T = schedule.num_train_timesteps
    t = make_timesteps(spacing, T, steps)
    table = step_table(schedule, t, np.float64, timesteps_prev=previous_timesteps(t, spacing, T), **options)
    return traps(table, schedule, prediction_type)


def test_traps() -> None:
    linear = linear_schedule(1000)
    assert notes(linear, "linspace", 10) == []
    assert notes(zero_terminal_snr(linear), "trailing", 10, "v_prediction") == []
    (first, last) = notes(linear, "leading", 10)
    assert "the first step is at t = 900, not at the noisiest, T-1 = 999" in first
    assert "the last step goes over 1 timesteps, each of the others over 100" in last
    (terminal,) = notes(linear, "linspace", 10, "v_prediction")
    assert "pure noise (alpha_bar at T-1 is 4e-05, not 0), as that of networks" in terminal
    (end,) = notes(linear, "linspace", 10, set_alpha_to_one=False)
    assert "leaves a little noise in the image (sigma 0.01, not 0: set_alpha_to_one=False)" in end
    quad = step_table(linear, quad_timesteps(1000, 100), np.float64)
    assert any("steps go from a t to itself" in note for note in traps(quad, linear))
    short = step_table(linear, [999, 500, 100], np.float64, timesteps_prev=[500, 100, 50])
    assert "the last step ends at t = 50, short of the clean image" in traps(short, linear)
    assert any("training never saw pure noise" in note for note in notes(linear_schedule(100), "linspace", 10))
    cosine = cosine_schedule(1000)
    assert traps(step_table(cosine, linspace_timesteps(1000, 50), np.float64), cosine) == []


def test_the_command_compares_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--spacing", "linspace", "--compare", "leading", "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert "linspace beside leading" in printed
    assert "note (leading): the first step is at t = 750, not at the noisiest, T-1 = 999" in printed
    assert "\nnote: " not in printed
    rows = [line.split() for line in printed.splitlines() if line.endswith("differs")]
    assert [(row[1], row[3]) for row in rows] == [("999", "750"), ("749", "500"), ("499", "250"), ("249", "0")]


def test_the_command_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["schedule", "--spacing", "leading", "--compare", "linspace", "--steps", "7", "--eta", "0.5", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [table["spacing"] for table in found["tables"]] == ["leading", "linspace"]
    (leading, other), schedule = found["tables"], linear_schedule(1000)
    table = sampler_table(schedule, SamplerConfig("leading"), 7, np.float64)
    assert [row["t"] for row in leading["steps"]] == table.t.tolist()
    assert [row["alpha_prev"] for row in leading["steps"]] == table.alpha_prev.tolist()
    sigma = ddim_sigma(sigma_prev=table.sigma_prev, fresh=table.fresh, eta=0.5)
    np.testing.assert_allclose([row["added"] for row in leading["steps"]], sigma, rtol=1e-6)
    assert leading["notes"] == traps(table, schedule)
    assert other["notes"] == []
    words = ["schedule", "--spacing", "linspace", "--compare", "leading", "--eta", "1.1", "--json"]
    assert main(words) == 0
    _, other = json.loads(capsys.readouterr().out)["tables"]
    assert other["largest_eta"] < 1.1
    assert {row["added"] for row in other["steps"]} == {None}
    assert main(["schedule", "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"][0]["largest_eta"] is None  # infinity, which JSON has not


def test_the_plot_needs_matplotlib(tmp_path: Path, fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_command, "find_spec", lambda name: None)
    assert install_line("plot") in fails("schedule", "--plot", tmp_path / "a.png")
