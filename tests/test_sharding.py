"""Sampling on a mesh of 8 host devices (in a process of its own), and the rules that place parameters."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT
from jax.sharding import PartitionSpec as P
from tiny import random_model, small_config

from jddim.config import DiTConfig
from jddim.models.building import abstract_model
from jddim.scale.sharding import CHANNELS, REPLICATED, TRANSFORMER, Sharded, make_mesh, param_shardings

EIGHT = """
import re
import jax, numpy as np
from tiny import random_model, small_config
from jddim.config import SamplerConfig
from jddim.pipeline import DDIM
from jddim.run.request import Request
from jddim.schedule import linear_schedule
from jddim.scale.sharding import CHANNELS, REPLICATED, Sharded, lower, make_mesh

config = small_config(channel_mults=(1,), attention_levels=(), middle=False, class_embedding="learned", num_classes=5)
ddim = DDIM(random_model(config), linear_schedule(100), SamplerConfig(num_steps=3))
key, labels, how = jax.random.key(3), np.arange(24) % 5, {"eta": 0.7, "clip": True}
one = np.asarray(ddim.sample(key, 24, labels=labels, batch_size=3, **how))
for n in (1, 2, 8):  # three images a device and call, as in `one`
    sharded = Sharded(ddim, make_mesh(n))
    parts = [sharded.sample(key, 3 * n, start=i, labels=labels[i : i + 3 * n], **how) for i in range(0, 24, 3 * n)]
    assert len(parts[0].sharding.device_set) == n
    np.testing.assert_array_equal(np.concatenate(parts), one, err_msg=f"{n} devices")
try:
    sharded.sample(key, 8, labels=np.arange(8))
except ValueError as error:
    assert "labels must lie in 0..4, got 5" in str(error)
else:
    raise AssertionError
compiled = lower(ddim, make_mesh(4), REPLICATED, 12, Request(**how), labelled=True).compile()
firsts = np.arange(12, 24, 3, dtype=np.uint32)
np.testing.assert_array_equal(compiled(ddim.model, key, firsts, labels[12:], None), one[12:])
assert not re.search("all-(reduce|gather|to-all)|collective-permute|reduce-scatter", compiled.as_text())

from jddim.bulk import run as bulk
from jddim.bulk.manifest import BulkConfig
config = BulkConfig(num=40, batch_size=3, shard_size=6, request=Request(seed=3, labels="balanced"))
ddim = ddim.with_sampler(**how)
make, made = bulk.sampler(ddim, config), bulk.sampler_on(jax.devices(), ddim, config, worker=(1, 3))
assert bulk.following(config, 9, 8, (1, 3)) == [9, 24, 27, *[27] * 5]
for first in (6, 9, 24, 27):
    np.testing.assert_array_equal(made(first), make(first))

wide = Sharded(ddim, make_mesh(2, 2), CHANNELS)
kernel = wide.ddim.model.conv_in.kernel.get_value()
assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 1, 4)}, kernel.shape
# sums over channels are cut in two: rounding, which three steps of an untrained network leave below this
np.testing.assert_allclose(wide.sample(key, 24, labels=labels, **how), one, atol=1e-3)

from jddim.config import DiTConfig
from jddim.scale.sharding import TRANSFORMER

config = DiTConfig((6, 10), channels=24, depth=2, num_heads=2, num_classes=5)
dit = DDIM(random_model(config), linear_schedule(100), SamplerConfig(num_steps=3, variance="learned_range"))
one = np.asarray(dit.sample(key, 4, labels=labels[:4], eta=0.7))
cut = Sharded(dit, make_mesh(2, 2), TRANSFORMER)
assert {shard.data.shape for shard in cut.ddim.model.blocks[1].mlp.linear_2.kernel.get_value().addressable_shards} == {
    (48, 24)
}
np.testing.assert_allclose(cut.sample(key, 4, labels=labels[:4], eta=0.7), one, atol=1e-3)
counted = lower(dit, make_mesh(1, 2), TRANSFORMER, 2, Request(), labelled=True).compile().as_text()
gathered = set(re.findall("(all-gather|all-to-all|collective-permute|reduce-scatter)[-(]", counted))
assert not gathered and "all-reduce" in counted, gathered

# What XLA cuts by a rule of its own, as jax has cuDNN's attention, it must not have to cut where data is cut alone.
from flax import nnx
from jax.experimental.custom_partitioning import custom_partitioning

def refuse(*_):
    raise AssertionError("XLA asks how to cut it")

ruled = custom_partitioning(jax.numpy.tanh)
ruled.def_partition(partition=refuse, infer_sharding_from_operands=refuse, sharding_rule="b h w c -> b h w c")

class Ruled(nnx.Module):
    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x):
        return ruled(self.conv(x))

ddim.model.conv_in = Ruled(ddim.model.conv_in)
alone = ddim.sample(key, 24, labels=labels, batch_size=3)
np.testing.assert_array_equal(Sharded(ddim, make_mesh()).sample(key, 24, labels=labels), alone)
print("equal")
"""


def test_the_same_bits_on_1_2_4_and_8_devices() -> None:
    flags = "--xla_force_host_platform_device_count=8"  # and XLA's emitters as users have them: to the bit they differ
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", EIGHT],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "equal\n"


def test_rules_place_parameters_by_their_first_match() -> None:
    mesh = make_mesh(1, 1)
    places = param_shardings(random_model(small_config()), mesh, CHANNELS)
    assert places.conv_in.kernel.get_value().spec == P(None, None, None, "model")
    assert places.conv_out.kernel.get_value().spec == P()
    assert places.conv_in.bias.get_value().spec == P()
    whole = param_shardings(random_model(small_config()), mesh)
    assert {place.spec for place in jax.tree.leaves(whole)} == {P()}


def test_a_transformers_heads_and_mlps_are_cut_and_nothing_else() -> None:
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"))
    model = abstract_model(DiTConfig((6, 10), channels=24, depth=1, num_heads=2, num_classes=5))
    places = param_shardings(model, mesh, TRANSFORMER)
    block = places.blocks[0]
    for layer in (block.attention.q, block.attention.k, block.attention.v, block.mlp.linear_1):
        assert layer.kernel.get_value().spec == P(None, "model")
        assert layer.bias.get_value().spec == P("model")
    for layer in (block.attention.out, block.mlp.linear_2):
        assert layer.kernel.get_value().spec == P("model", None)
        assert layer.bias.get_value().spec == P()
    assert sum(place.spec != P() for place in jax.tree.leaves(places)) == 10


def test_rules_that_do_not_fit_are_told_by_name() -> None:
    model = random_model(small_config())
    for rules, message in (
        ((("kernel", P()),), "no rule is for"),
        ((("", P("model", "data", None)),), r"conv_in\.bias \(8,\) has fewer axes than its rule"),
        ((("", P("modle")),), r"conv_in\.bias: the mesh has axes data, model, not modle"),
    ):
        with pytest.raises(ValueError, match=message):
            param_shardings(model, make_mesh(1, 1), rules)
    with pytest.raises(ValueError, match=r"conv_out\.kernel .*: 1 cannot be cut into 2 by its rule"):
        param_shardings(
            model, jax.sharding.AbstractMesh((1, 2), ("data", "model")), (("kernel", P("model")), ("", P()))
        )


def test_a_mesh_needs_its_devices() -> None:
    with pytest.raises(ValueError, match="a mesh of 3 x 2 needs 6 devices, there are 1"):
        make_mesh(3, 2, jax.devices()[:1])
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "model": 1}


def test_what_cannot_be_compiled_in_is_refused() -> None:
    from jddim.config import SamplerConfig
    from jddim.pipeline import DDIM
    from jddim.schedule import linear_schedule

    ddim = DDIM(random_model(small_config()), linear_schedule(10), SamplerConfig(num_steps=3))
    sharded = Sharded(ddim, make_mesh(1), REPLICATED)
    with pytest.raises(TypeError, match=r"Sharded.sample\(\) takes no 'progress'"):
        sharded.sample(jax.random.key(0), 2, progress=True)
    with pytest.raises(ValueError, match="num must be a multiple of 1, the data axis, got 0"):
        sharded.sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="this network has no classes"):
        sharded.sample(jax.random.key(0), 2, labels=[1, 2])
