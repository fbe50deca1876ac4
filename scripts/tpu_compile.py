"""Compiles the sharded sampler ahead of time for described TPU topologies. Run by scripts/tpu_compile; needs libtpu.

No TPU is needed or used: libtpu compiles for a topology by its name (jax.experimental.topologies), and nothing is run.
For each topology and dtype, a row of what the compiler reports of one sampling step on one chip:

- FLOPs, of the whole program, in which the loop's body counts once. Zeros of padding are not counted.
- Cycles, as the compiler estimates them for each operation of the loop's body, added up.
- % of peak: FLOPs over cycles times what the chip's matrix units do in one, in bfloat16. float32 products are done in
  bfloat16 by default, so that is the peak for both.
- Memory of a chip: arguments (weights), temporaries, results and code.
- Padding: how much larger the results of the loop body's operations are in memory for lying in tiles (8 x 128, ...)
  that their shapes do not fill, over what they hold.
- Collectives in the program: sampling in data parallel has none.

They are estimates of a compiler, not measurements.
"""

from __future__ import annotations

import collections
import math
import os
import re
import sys
import time
from typing import Any, NamedTuple

from jddim.cli.options import OneLineParser

FLOPS_PER_CYCLE = {"v5e": 4 * 128 * 128 * 2, "v5p": 2 * 4 * 128 * 128 * 2}
"""What a chip's matrix units do in a cycle in bfloat16: v5e has four of 128 x 128, 197 TFLOP/s at 1.5 GHz; v5p two
cores with as many each, 459 TFLOP/s at 1.75 GHz."""

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10": {
        **{"type": "unet", "image_size": [32, 32], "channels": 128, "channel_mults": [1, 2, 2, 2]},
        **{"num_res_blocks": 2, "attention_levels": [1]},
    },
    "tiny": {
        **{"type": "unet", "image_size": [8, 8], "channels": 32, "channel_mults": [1]},
        **{"num_res_blocks": 1, "attention_levels": []},
    },
    "dit-xl-2": {"type": "dit", "image_size": [32, 32]},  # the defaults of DiTConfig are its
    "dit-s-2": {"type": "dit", "image_size": [32, 32], "channels": 384, "depth": 12, "num_heads": 6},
}
"""By name: the model's section of a configuration, as `jddim train` takes it."""


class Row(NamedTuple):
    """What the compiler reports of one program, for one chip."""

    topology: str
    chips: int
    dtype: str
    flops: float
    cycles: int
    memory: int
    padding: float
    collectives: dict[str, int]
    seconds: float

    @property
    def of_peak(self) -> float | None:
        """FLOPs a cycle over the most there can be, None for a chip that FLOPS_PER_CYCLE does not have."""
        peak = FLOPS_PER_CYCLE.get(self.topology.partition(":")[0])
        return None if peak is None else self.flops / self.cycles / peak


def loop_body(hlo: str) -> list[tuple[int, str]]:
    """The operations of the program's costliest loop body, as (estimated cycles, line).

    hlo: the compiled program's text, in which each computation is a block and each operation a line.
    """
    bodies = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    inside: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in hlo.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = []
            if found[1] in bodies:
                inside[found[1]] = lines
        lines.append((sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', line))), line))
    costliest = max(inside.values(), key=cycles_of, default=[])
    if not cycles_of(costliest):
        raise ValueError("the compiled program says no estimated cycles of a loop: this libtpu writes it otherwise")
    return costliest


def cycles_of(body: list[tuple[int, str]]) -> int:
    """The estimated cycles of its operations, added up."""
    return sum(cycles for cycles, _ in body)


WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def padding(body: list[tuple[int, str]]) -> float:
    """The bytes of padding in the results of operations that cost cycles, over the bytes that they hold."""
    held = padded = 0
    for cycles, line in body:
        result = re.split(r" [\w\-]+\(", line.partition(" = ")[2])[0] if cycles else ""
        for dtype, shape, order, tile in re.findall(r"(\w+)\[([\d,]+)\]\{([\d,]+):T\(([\d,]+)\)", result):
            sizes = [int(size) for size in shape.split(",")]
            tiled = [*sizes]
            minor_first = [int(axis) for axis in order.split(",")]
            for axis, size in zip(minor_first, map(int, reversed(tile.split(","))), strict=False):
                tiled[axis] = -(-sizes[axis] // size) * size
            held += WIDTHS[dtype] * math.prod(sizes)
            padded += WIDTHS[dtype] * math.prod(tiled)
    return padded / held - 1 if held else 0.0


def collectives(hlo: str) -> dict[str, int]:
    """How often each kind of communication between chips occurs."""
    kinds = r"= [^=]*?\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    return dict(collections.Counter(re.findall(kinds, hlo)))


def compile_for(topology: str, network: str, images: int, dtype: str, steps: int) -> Row:
    """The sampler of `images` images a chip, compiled for every chip of `topology`."""
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jddim.config import SamplerConfig, from_json
    from jddim.models import MODELS
    from jddim.models.building import abstract_model
    from jddim.pipeline import DDIM
    from jddim.scale.sharding import REPLICATED, lower, make_mesh
    from jddim.schedule import linear_schedule

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    section = dict(NETWORKS[network])
    config = from_json(MODELS[section.pop("type")][0], section)
    variance = "learned_range" if config.out_channels == 2 * config.in_channels else "fixed_small"
    sampler = SamplerConfig(num_steps=steps, variance=variance)
    ddim = DDIM(abstract_model(config, jnp.dtype(dtype)), linear_schedule(1000), sampler)
    started = time.perf_counter()
    compiled = lower(ddim, make_mesh(devices=devices), REPLICATED, images * len(devices)).compile()
    seconds = time.perf_counter() - started
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    parts = ("argument", "temp", "output", "generated_code")
    total = sum(getattr(memory, f"{part}_size_in_bytes") for part in parts)
    flops = compiled.cost_analysis()["flops"]
    body = loop_body(hlo)
    return Row(topology, len(devices), dtype, flops, cycles_of(body), total, padding(body), collectives(hlo), seconds)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| topology | chips | dtype | GFLOP a step | Mcycles a step | % of bf16 peak | MiB a chip | padding "
        "| collectives |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        of_peak = "-" if row.of_peak is None else f"{100 * row.of_peak:.1f}"
        sent = ", ".join(f"{count} {kind}" for kind, count in row.collectives.items()) or "none"
        lines.append(
            f"| {row.topology} | {row.chips} | {row.dtype} | {row.flops / 1e9:.2f} | {row.cycles / 1e6:.2f} "
            f"| {of_peak} | {row.memory / 2**20:.0f} | {row.padding:.1%} | {sent} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="scripts/tpu_compile", description=__doc__.split("\n")[0])
    parser.add_argument("--topology", nargs="+", default=["v5e:2x2"], metavar="NAME", help="default v5e:2x2")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--network", default="cifar10", choices=NETWORKS, help="default cifar10")
    parser.add_argument("--images", type=int, default=256, metavar="B", help="a chip; default 256")
    parser.add_argument("--steps", type=int, default=50, metavar="S", help="a loop; no figure depends on it")
    args = parser.parse_args(argv)
    # Said before libtpu looks for them on the network.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"  # where there is a TPU, it is left alone
    import importlib.metadata

    rows = []
    for topology in args.topology:
        for dtype in args.dtype:
            rows.append(compile_for(topology, args.network, args.images, dtype, args.steps))
            print(f"{topology} {dtype}: compiled in {rows[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    print(f"{args.network}, {args.images} images a chip; {versions}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
