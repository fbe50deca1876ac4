"""scripts/tpu_compile.py: what it reads out of a compiled program, and a small one where libtpu is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import tpu_compile

SCRIPT = Path(__file__).parents[2] / "scripts" / "tpu_compile.py"

HLO = """\
HloModule jit_run
%body.1 (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = (f32[3,5]{0,1:T(8,128)S(1)}, bf16[256,32,8]{0,1,2:T(8,128)(2,1)}) fusion(%a), {"estimated_cycles":"1200"}
  %convolution.2 = f32[8] fusion(%fusion.1), kind=kOutput, calls=%g, backend_config={"estimated_cycles":"34"}
}
%small.2 (a: s32[]) -> s32[] {
  %add.1 = s32[] add(%a, %a), backend_config={"estimated_cycles":"9"}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %copy.1 = f32[8] copy(%x), backend_config={"estimated_cycles":"5000"}
  %while.1 = (s32[], f32[8]) while(%t), condition=%c, body=%body.1
  %while.2 = s32[] while(%i), condition=%d, body=%small.2
  %all-reduce.7 = f32[8] all-reduce(%copy.1), replica_groups={}
  %ar = (f32[8], f32[8]) all-gather-start(%all-reduce.7)
}
"""


def test_the_cycles_are_those_of_the_loops_body() -> None:
    body = tpu_compile.loop_body(HLO)
    assert tpu_compile.cycles_of(body) == 1234
    full = 2 * 256 * 32 * 8  # bytes: fills its tiles
    assert tpu_compile.padding(body) == pytest.approx((full + 4 * 8 * 128) / (full + 4 * 3 * 5) - 1)
    assert tpu_compile.collectives(HLO) == {"all-reduce": 1, "all-gather": 1}
    with pytest.raises(ValueError, match="no estimated cycles"):
        tpu_compile.loop_body(HLO.replace("estimated_cycles", "cycles"))


def test_the_share_of_the_peak() -> None:
    row = tpu_compile.Row("v5e:2x2", 4, "bfloat16", 131072 * 500.0, 1000, 3 * 2**20, 0.015, {}, 1.0)
    assert row.of_peak == 0.5
    assert (
        tpu_compile.table([row]).splitlines()[-1] == "| v5e:2x2 | 4 | bfloat16 | 0.07 | 0.00 | 50.0 | 3 | 1.5% | none |"
    )
    assert row._replace(topology="v9:1x1").of_peak is None


@pytest.mark.skipif(find_spec("libtpu") is None, reason="LIBTPU IS NOT INSTALLED: the TPU compiler is not tried")
def test_a_small_sampler_compiles_for_four_chips() -> None:
    words = ["--network", "tiny", "--images", "8", "--dtype", "bfloat16"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=True)
    row = done.stdout.splitlines()[-1].split(" | ")
    assert row[0] == "| v5e:2x2"
    assert row[1] == "4"
    assert float(row[4]) > 0
    assert 0 < float(row[5]) < 100
    assert row[-2].endswith("%")
    assert row[-1] == "none |"
