"""Timetables: equal to the sources', integer by integer."""

from __future__ import annotations

import numpy as np
import pytest

from jddim.timesteps import (
    SPACINGS,
    check_timesteps,
    linspace_timesteps,
    make_timesteps,
    previous_timesteps,
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
@pytest.mark.parametrize(("T", "S"), [(1000, 1), (1000, 10), (1000, 100), (1000, 1000), (300, 7), (7, 7)])
def test_quad_is_ermongroups_formula(T: int, S: int) -> None:
    assert quad_timesteps(T, S).tolist() == [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), S) ** 2)][::-1]


@pytest.mark.quick
def test_quad_repeats_what_the_source_repeats() -> None:
    assert quad_timesteps(1000, 100)[-6:].tolist() == [2, 1, 0, 0, 0, 0]


@pytest.mark.quick
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_table_descends_within_range(spacing: str) -> None:
    for T in (1, 3, 100, 1000):
        for S in range(1, T + 1, max(1, T // 37)):
            if spacing == "trailing" and np.round(np.arange(T, 0, -T / S))[-1] == 0:
                continue  # refused, see below
            table = make_timesteps(spacing, T, S)
            assert table.dtype == np.int64
            assert (np.diff(table) < (1 if spacing == "quad" else 0)).all()
            assert 0 <= table[-1] <= table[0] < T
            if spacing != "uniform":
                assert len(table) == S
            if spacing in ("linspace", "trailing"):
                assert table[0] == T - 1
            previous = previous_timesteps(table, spacing, T)
            assert (previous >= -1).all()
            assert (previous <= table).all()
            # diffusers' "trailing" may end short of the clean image: at T = 1000 and S = 28, at t = 0
            assert previous[-1] == -1 or (spacing == "trailing" and T % S)


@pytest.mark.quick
def test_diffusers_spacings_and_where_their_steps_end() -> None:
    T, S = 1000, 30  # does not divide: a step is 33
    expected = {
        ("leading", 0): [i * 33 for i in range(30)][::-1],
        ("leading", 1): [i * 33 + 1 for i in range(30)][::-1],
        ("trailing", 0): [round(1000 - i * 1000 / 30) - 1 for i in range(30)],
        ("linspace_diffusers", 0): [round(i * 999 / 29) for i in range(30)][::-1],
    }
    for (spacing, offset), t in expected.items():
        table = make_timesteps(spacing, T, S, offset)
        assert table.tolist() == t
        assert previous_timesteps(table, spacing, T).tolist() == [max(entry - 33, -1) for entry in t]
    with pytest.raises(ValueError, match=r"0\.\.999, got 1\.\.1000"):
        make_timesteps("leading", T, T, 1)  # diffusers' first step fails: it has no alphas_cumprod[1000]
    for offset in (T, -T, 2**63):  # the last is beyond what NumPy adds
        with pytest.raises(ValueError, match="steps_offset must lie between -1000 and 1000"):
            make_timesteps("leading", T, S, offset)


@pytest.mark.quick
def test_trailing_is_refused_where_it_would_ask_for_t_below_zero() -> None:
    refused = []
    for S in range(1, 1001):
        try:
            make_timesteps("trailing", 1000, S)
        except ValueError:
            refused.append(S)
    with pytest.raises(ValueError, match="num_steps = 61 rounds to 62 entries"):
        make_timesteps("trailing", 1000, 61)
    assert (len(refused), refused[:3]) == (62, [61, 103, 121])


@pytest.mark.quick
def test_openai_spacings() -> None:
    feasible = [n for n in range(1, 501) if _ddim_fits(n)]
    assert set(feasible) >= {10, 20, 25, 30, 40, 50, 100, 125, 200, 250, 334, 500}
    assert not set(feasible) & {1, 60, 75, 80, 150, 300, 400}  # 1: OpenAI tries strides below T only
    assert make_timesteps("ddim30", 1000).tolist() == list(range(0, 1000, 34))[::-1]
    with pytest.raises(ValueError, match=r"ddimN.*nearest that fit: \[59, 63, 56\]"):
        make_timesteps("ddim60", 1000)
    # sections of 100 with 10, 15 and 20 entries; strides 11, 7.07 and 5.21, summed up in float64, rounded half to even
    sections = make_timesteps("10,15,20", 300)[::-1]
    assert sections[:10].tolist() == list(range(0, 100, 11))
    assert sections[10:15].tolist() == [100, 107, 114, 121, 128]
    assert (len(sections), sections[25], sections[-1]) == (45, 200, 299)
    assert make_timesteps("20", 300).tolist() == make_timesteps("openai", 300, 20).tolist()
    assert make_timesteps("openai", 1000, 1).tolist() == [0]
    for S in (1, 25, 60, 334):
        alike = f"ddim{S}" if S in feasible else str(S)
        assert make_timesteps("openai_ddim", 1000, S).tolist() == make_timesteps(alike, 1000).tolist()
    for spacing, message in (("200,1", "length"), ("0,5", "length"), ("ddim0", r"1\.\.300")):
        with pytest.raises(ValueError, match=message):
            make_timesteps(spacing, 300)
    with pytest.raises(ValueError, match="'ddim25' of 25 timesteps does not take num_steps=20"):
        make_timesteps("ddim25", 1000, 20)


def _ddim_fits(n: int) -> bool:
    try:
        return len(make_timesteps(f"ddim{n}", 1000)) == n
    except ValueError:
        return False


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
@pytest.mark.parametrize("spacing", SPACINGS)
def test_bad_numbers_of_steps_raise(spacing: str, S: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.1000.*got {S}"):
        make_timesteps(spacing, 1000, S)


@pytest.mark.quick
def test_unknown_spacing_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'linspace'"):
        make_timesteps("linspce", 1000, 10)
