"""Timetables: equal to the sources', integer by integer."""

from __future__ import annotations

import numpy as np
import pytest

from jddim.timesteps import (
    check_timesteps,
    linspace_timesteps,
    make_timesteps,
    quad_timesteps,
    uniform_timesteps,
)


@pytest.mark.parametrize("T", [1, 2, 7, 300, 1000, 4000])
def test_linspace_is_torchs_for_every_number_of_steps(T: int) -> None:
    torch = pytest.importorskip("torch", reason="the table is defined by torch.linspace")
    if T > 1000 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without AVX2, torch's linspace does not fuse its multiply-add and differs at 7 of 4000 S")
    for S in range(1, T + 1):
        expected = torch.linspace(-1, T - 1, steps=S + 1).int().tolist()[:0:-1]
        assert linspace_timesteps(T, S).tolist() == expected, S


@pytest.mark.quick
def test_float64_would_give_another_linspace_table() -> None:
    """The trap: 139 of the S in 1..1000 differ at T = 1000, the first of them 26."""

    def float64(S: int) -> list[int]:
        return np.linspace(-1, 999, S + 1).astype(int).tolist()[:0:-1]

    differ = [S for S in range(1, 1001) if linspace_timesteps(1000, S).tolist() != float64(S)]
    assert len(differ) == 139
    assert differ[:4] == [26, 38, 52, 60]


@pytest.mark.quick
@pytest.mark.parametrize(("T", "S"), [(1000, 10), (1000, 30), (1000, 600), (1000, 1000), (300, 7), (7, 7), (1, 1)])
def test_uniform_is_ermongroups_range(T: int, S: int) -> None:
    assert uniform_timesteps(T, S).tolist() == list(range(0, T, T // S))[::-1]


@pytest.mark.quick
def test_uniform_has_the_sources_uneven_lengths() -> None:
    assert [len(uniform_timesteps(1000, S)) for S in (10, 30, 60, 600)] == [10, 31, 63, 1000]


@pytest.mark.quick
@pytest.mark.parametrize(("T", "S"), [(1000, 1), (1000, 10), (1000, 29), (300, 7)])
def test_quad_is_ermongroups_formula(T: int, S: int) -> None:
    assert quad_timesteps(T, S).tolist() == [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), S) ** 2)][::-1]


@pytest.mark.quick
def test_quad_drops_the_sources_repeats() -> None:
    source = [int(s) for s in list(np.linspace(0, np.sqrt(1000 * 0.8), 100) ** 2)]
    assert source[:6] == [0, 0, 0, 0, 1, 2]
    assert quad_timesteps(1000, 100).tolist() == sorted(set(source), reverse=True)
    assert len(quad_timesteps(1000, 100)) == 96


@pytest.mark.quick
@pytest.mark.parametrize("spacing", ["linspace", "uniform", "quad"])
def test_every_table_descends_within_range(spacing: str) -> None:
    for T in (1, 3, 100, 1000):
        for S in range(1, T + 1, max(1, T // 37)):
            table = make_timesteps(spacing, T, S)
            assert table.dtype == np.int64
            assert (np.diff(table) < 0).all()
            assert 0 <= table[-1] <= table[0] < T
            if spacing == "linspace":
                assert (len(table), table[0]) == (S, T - 1)


@pytest.mark.quick
def test_explicit_lists_pass_through_checked() -> None:
    assert make_timesteps([999, 500, 3], 1000).tolist() == [999, 500, 3]
    with pytest.raises(ValueError, match="does not take num_steps=5"):
        make_timesteps([999, 500, 3], 1000, 5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "non-empty"),
        ([3, 3], "entry 0 is 3, entry 1 is 3"),
        ([3, 5], "strictly descend"),
        ([1000, 5], r"0\.\.999"),
        ([5, -1], r"0\.\.999"),
        ([5.0, 1.0], "integers"),
        ([[5, 1]], "shape"),
    ],
)
def test_bad_lists_raise(table: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_timesteps(table, 1000)


@pytest.mark.quick
@pytest.mark.parametrize("S", [0, -3, 1001])
@pytest.mark.parametrize("spacing", ["linspace", "uniform", "quad"])
def test_bad_numbers_of_steps_raise(spacing: str, S: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.1000.*got {S}"):
        make_timesteps(spacing, 1000, S)


@pytest.mark.quick
def test_unknown_spacing_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'linspace'"):
        make_timesteps("linspce", 1000, 10)
