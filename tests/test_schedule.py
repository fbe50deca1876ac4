"""Schedules: equal to the peers' own formulas, written out here in plain Python loops."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jddim.config import ScheduleConfig, from_json, to_json
from jddim.curve import alpha_bar_curve
from jddim.schedule import (
    SCHEDULES,
    cosine_schedule,
    from_betas,
    linear_schedule,
    make_schedule,
    scaled_linear_schedule,
    schedule_config_from_betas,
    sigmoid_alpha_bar_schedule,
    sigmoid_schedule,
)

pytestmark = pytest.mark.quick


def cumulative(betas: list[float]) -> list[float]:
    out, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        out.append(product)
    return out


def capped(alpha_bar, T: int) -> list[float]:
    return [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("T", [1, 2, 7, 300, 1000, 4000])
def test_alphas_cumprod_equal_the_peers_formulas(T: int) -> None:
    grid = [i / max(T - 1, 1) for i in range(T)]
    lo, hi = 1e-4, 0.02
    peers = {
        linear_schedule: [lo + (hi - lo) * u for u in grid],
        scaled_linear_schedule: [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * u) ** 2 for u in grid],
        cosine_schedule: capped(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T),
        sigmoid_schedule: [lo + (hi - lo) * sigmoid(-6 + 12 * u) for u in grid],
        sigmoid_alpha_bar_schedule: capped(
            lambda u: float(np.float32(sigmoid(3))) - sigmoid(-3 + 6 * u),
            T,  # its ends are float32 there
        ),
    }
    for schedule, betas in peers.items():
        built = schedule(T)
        # 1e-12 is asked for; both sides are float64 and differ by rounding alone, which 1 - cos^2 ratios amplify.
        np.testing.assert_allclose(built.alphas_cumprod, cumulative(betas), rtol=1e-12, atol=1e-12)
        assert built.betas.dtype == built.alphas_cumprod.dtype == np.float64
        assert built.num_train_timesteps == T


def test_the_ends_of_the_published_linear_schedule() -> None:
    schedule = linear_schedule()
    assert schedule.betas[0] == 1e-4
    assert schedule.betas[-1] == 0.02
    assert schedule.alphas_cumprod[-1] == pytest.approx(
        4.0358e-5, rel=1e-4
    )  # the T = 1000 figure that the field quotes


@pytest.mark.parametrize("T", [1, 2, 7, 1000, 4001])
def test_a_notebook_draws_alpha_bar_with_the_visited_t(T: int) -> None:
    schedule = linear_schedule(T, beta_end=0.3 if T < 9 else 0.02)
    drawn = ElementTree.fromstring(schedule._repr_html_())
    assert drawn.findtext("code") == repr(schedule)
    _, curve, dots = (path.get("d") for path in drawn.iter("path"))
    assert dots == ""
    x, y = np.array([point.split() for point in curve[1:].split("L")], float).T
    np.testing.assert_allclose(
        np.interp(x, x, y), 110 - 100 * schedule.alphas_cumprod[((x - 40) / 320 * (T - 1)).round().astype(int)], atol=1
    )
    visited = np.arange(T - 1, -1, -max(T // 5, 1))
    svg = alpha_bar_curve(schedule.alphas_cumprod, np.append(visited, visited[-1]))  # a t may repeat
    *_, dots = (path.get("d") for path in ElementTree.fromstring(svg).iter("path"))
    points = [f"M{40 + 320 * t / max(T - 1, 1):.1f} {110 - 100 * schedule.alphas_cumprod[t]:.1f}h0" for t in visited]
    assert dots == "".join(points)
    assert f"dots: {len(visited)} t of the timetable" in svg
    assert len(alpha_bar_curve(schedule.alphas_cumprod, np.arange(T))) < 50_000


def test_openai_rescales_the_linear_ends_by_1000_over_T() -> None:
    rescaled = linear_schedule(4000, 1e-4 / 4, 0.02 / 4)
    assert rescaled.alphas_cumprod[-1] == pytest.approx(linear_schedule(1000).alphas_cumprod[-1], rel=0.1)


def test_alpha_bar_at_minus_one_is_the_clean_image() -> None:
    schedule = cosine_schedule(7)
    np.testing.assert_array_equal(
        schedule.alpha_bar([6, -1, 0]), [schedule.alphas_cumprod[6], 1, schedule.alphas_cumprod[0]]
    )
    with pytest.raises(ValueError, match=r"-1\.\.6"):
        schedule.alpha_bar([7])
    with pytest.raises(ValueError, match=r"-1\.\.6"):
        schedule.alpha_bar([-2])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=40))
def test_from_betas_round_trips_through_json(betas: list[float]) -> None:
    config = schedule_config_from_betas(betas)
    again = from_json(ScheduleConfig, to_json(config))
    assert again == config
    np.testing.assert_array_equal(make_schedule(again).betas, betas)
    assert (np.diff(from_betas(betas).alphas_cumprod) < 0).all()


@pytest.mark.parametrize("bad", [[0.1, 0.0], [0.1, 1.0], [0.1, -0.2], [0.1, float("nan")], [], [[0.1]]])
def test_bad_betas_raise(bad: list) -> None:
    with pytest.raises(ValueError, match="betas must"):
        from_betas(bad)


def test_a_schedule_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        linear_schedule(3).betas[0] = 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_name_builds_from_its_config(name: str) -> None:
    config = ScheduleConfig(name, 13)
    np.testing.assert_array_equal(make_schedule(config).betas, SCHEDULES[name](13).betas)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig("liner"), "did you mean 'linear'"),
        (ScheduleConfig("cosine", beta_start=0.1), "takes no beta_start"),
        (ScheduleConfig("linear", betas=(0.1,)), "takes no list"),
        (ScheduleConfig("betas", 2, betas=(0.1,)), "num_train_timesteps numbers"),
        (ScheduleConfig("linear", 0), r"1\.\.1000000, got 0"),
        (ScheduleConfig("linear", 4, 0.1, 1.5), r"must lie in \(0, 1\)"),
    ],
)
def test_bad_configs_raise(config: ScheduleConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(config)


@pytest.mark.parametrize("T", [2, 7, 1000])
def test_zero_terminal_snr_is_algorithm_1(T: int) -> None:
    for name in ("linear", "scaled_linear", "cosine"):
        root = [math.sqrt(a) for a in make_schedule(ScheduleConfig(name, T)).alphas_cumprod]
        expected = [((r - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for r in root]
        built = make_schedule(ScheduleConfig(name, T, zero_terminal_snr=True))
        np.testing.assert_allclose(built.alphas_cumprod, expected, rtol=1e-12, atol=0)
        np.testing.assert_allclose(np.cumprod(1 - built.betas), expected, rtol=1e-9, atol=1e-15)
        assert (built.alphas_cumprod[-1], built.betas[-1]) == (0, 1)
    with pytest.raises(ValueError, match="one timestep"):
        make_schedule(ScheduleConfig("linear", 1, zero_terminal_snr=True))
