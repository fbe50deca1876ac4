"""The PyTorch reference UNet: its pieces against independent arithmetic, the whole on a real checkpoint."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.reference.unet import (
    AttnBlock,
    Downsample,
    ReferenceUNet,
    ResnetBlock,
    Upsample,
    redraw_,
    timestep_embedding,
)

CHECKPOINT = Path(__file__).parents[3] / "scripts" / "assets" / "mnist-ddpm" / "ckpt.pth"
MNIST = {
    "ch": 32,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attn_levels": (2,),
    "in_channels": 1,
    "out_ch": 1,
}
F64 = torch.float64
# Sums of at most a few hundred float64 products of order 1, whatever their order.
assert_exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def make(**changes) -> ReferenceUNet:
    config = {
        "ch": 10,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "attn_levels": (1,),
        "in_channels": 3,
        "out_ch": 5,
        "norm_groups": 5,
    }
    model = ReferenceUNet(**(config | changes))  # type: ignore[arg-type]
    redraw_(model, seed=11)
    return model


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize("dim", [4, 7, 32])
def test_timestep_embedding_is_the_papers_formula(dim: int):
    half = dim // 2
    for t in (0, 1, 617, 999):
        angles = [t * 10000 ** (-i / (half - 1)) for i in range(half)]
        want = [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [0.0] * (dim % 2)
        got = timestep_embedding(torch.tensor([t]), dim, F64)[0].tolist()
        # An angle near 1000 carries 1000 * 2**-53 of rounding into its sine.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_timestep_embedding_rounds_its_angles_in_float32():
    # What the published weights were trained with, step by step in NumPy's float32.
    step = np.float32(-math.log(10000) / 15)
    frequencies = torch.from_numpy(np.arange(16, dtype=np.float32) * step).exp()
    angles = torch.tensor([[1.0], [999.0]]) * frequencies
    got = timestep_embedding(torch.tensor([1, 999]), 32, torch.float32)
    assert torch.equal(got, torch.cat([angles.sin(), angles.cos()], dim=1))
    # It is not the float64 table rounded at the end.
    assert not torch.equal(got, timestep_embedding(torch.tensor([1, 999]), 32, F64).float())


def test_attention_is_softmax_over_all_positions():
    block = AttnBlock(6, norm_groups=3, norm_eps=1e-6).double()
    redraw_(block, seed=2)
    x = draw(2, 6, 3, 5, dtype=F64)
    normed = block.norm(x).flatten(2).transpose(1, 2)  # (b, positions, c)
    p = dict(block.named_parameters())
    q, k, v = (normed @ p[f"{name}.weight"][:, :, 0, 0].T + p[f"{name}.bias"] for name in "qkv")
    attended = F.scaled_dot_product_attention(q, k, v)
    projected = attended @ p["proj_out.weight"][:, :, 0, 0].T + p["proj_out.bias"]
    want = x + projected.transpose(1, 2).reshape(x.shape)
    assert_exact(block(x), want)


def test_norm_is_per_group_with_the_given_epsilon():
    block = AttnBlock(6, norm_groups=3, norm_eps=0.37).double()
    redraw_(block, seed=3)
    x = draw(2, 6, 3, 5, dtype=F64)
    groups = x.numpy().reshape(2, 3, 2 * 3 * 5)
    scaled = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 0.37)
    want = scaled.reshape(2, 6, 3, 5) * block.norm.weight.detach().numpy()[:, None, None]
    want += block.norm.bias.detach().numpy()[:, None, None]
    np.testing.assert_allclose(block.norm(x).detach().numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_conv", [True, False])
def test_downsample_sees_padding_at_the_bottom_and_right_only(with_conv: bool):
    down = Downsample(2, with_conv=with_conv).double()
    redraw_(down, seed=4)
    x = draw(1, 2, 4, 6, dtype=F64)
    want = np.zeros((1, 2, 2, 3))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)))
    for i in range(2):
        for j in range(3):
            if with_conv:
                window = padded[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                weight, bias = (p.detach().numpy() for p in down.parameters())
                want[0, :, i, j] = (weight * window).sum((1, 2, 3)) + bias
            else:
                want[0, :, i, j] = padded[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    np.testing.assert_allclose(down(x).detach().numpy(), want, rtol=1e-12, atol=1e-13)


def test_upsample_repeats_each_pixel_before_its_conv():
    x = draw(1, 2, 3, 5, dtype=F64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(Upsample(2, with_conv=False)(x), repeated)
    up = Upsample(2, with_conv=True).double()
    redraw_(up, seed=5)
    assert_exact(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1))


@pytest.mark.parametrize("conv_shortcut", [True, False])
def test_resnet_block_adds_the_time_embedding_between_its_convs(conv_shortcut: bool):
    block = ResnetBlock(6, 9, temb_channels=7, conv_shortcut=conv_shortcut, norm_groups=3, norm_eps=1e-6).double()
    redraw_(block, seed=6)
    x, temb = draw(2, 6, 3, 5, dtype=F64), draw(2, 7, seed=1, dtype=F64)
    p = dict(block.named_parameters())
    shortcut, padding = ("conv_shortcut", 1) if conv_shortcut else ("nin_shortcut", 0)

    h = F.silu(F.group_norm(x, 3, p["norm1.weight"], p["norm1.bias"], 1e-6))
    h = F.conv2d(h, p["conv1.weight"], p["conv1.bias"], padding=1)
    h = h + (F.silu(temb) @ p["temb_proj.weight"].T + p["temb_proj.bias"]).reshape(2, 9, 1, 1)
    h = F.silu(F.group_norm(h, 3, p["norm2.weight"], p["norm2.bias"], 1e-6))
    h = F.conv2d(h, p["conv2.weight"], p["conv2.bias"], padding=1)
    h = h + F.conv2d(x, p[f"{shortcut}.weight"], p[f"{shortcut}.bias"], padding=padding)
    assert_exact(block(x, temb), h)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_shipped_checkpoint_loads_strictly_and_predicts_noise(weights: str):
    states = torch.load(CHECKPOINT, weights_only=True)
    if weights == "raw":
        assert all(name.startswith("module.") for name in states[0])
        state = {name.removeprefix("module."): value for name, value in states[0].items()}
    else:
        state = states[4]
    model = ReferenceUNet(**MNIST)  # type: ignore[arg-type]
    model.load_state_dict(state, strict=True)
    assert sum(p.numel() for p in model.parameters()) == 1_112_801
    # The optimizer's state is indexed by parameter order, so that too must be the source's.
    assert list(model.state_dict()) == list(state)

    # At t = 999 alpha_bar is 4e-5: x_t is its own noise but for 0.6% of an image, so a network that was
    # trained through exactly this wiring returns its input: measured mean squared error
    # 1.2e-4 for both sets of weights, 1.2 before they are loaded.
    x = draw(7, 1, 28, 28)
    with torch.no_grad():
        error = (model(x, torch.full((7,), 999)) - x).square().mean()
    assert error < 5e-4


def test_activations_come_in_forward_order_and_end_in_the_output():
    model = make(ch_mult=(1, 1, 2), num_res_blocks=2, attn_levels=(0, 2), ch=10)
    x, t = draw(2, 3, 4, 8), torch.tensor([3, 997])
    outputs = dict(model.activations(x, t))
    assert list(outputs) == [
        *["time_embed", "conv_in"],
        *["down.0.block.0", "down.0.attn.0", "down.0.block.1", "down.0.attn.1", "down.0.downsample"],
        *["down.1.block.0", "down.1.block.1", "down.1.downsample"],
        *["down.2.block.0", "down.2.attn.0", "down.2.block.1", "down.2.attn.1"],
        *["mid.block_1", "mid.attn_1", "mid.block_2"],
        *["up.2.block.0", "up.2.attn.0", "up.2.block.1", "up.2.attn.1", "up.2.block.2", "up.2.attn.2"],
        "up.2.upsample",
        *["up.1.block.0", "up.1.block.1", "up.1.block.2", "up.1.upsample"],
        *["up.0.block.0", "up.0.attn.0", "up.0.block.1", "up.0.attn.1", "up.0.block.2", "up.0.attn.2"],
        "conv_out",
    ]
    assert outputs["time_embed"].shape == (2, 40)
    assert outputs["down.1.downsample"].shape == (2, 10, 1, 2)
    assert outputs["up.2.upsample"].shape == (2, 20, 2, 4)
    with torch.no_grad():
        assert torch.equal(outputs["conv_out"], model(x, t))
    # Each is the output of the module of that name, and no hook stays behind.
    with torch.no_grad():
        down = model.get_submodule("down.0.downsample")(outputs["down.0.attn.1"])
    assert torch.equal(down, outputs["down.0.downsample"])
    assert not any(module._forward_hooks for module in model.modules())


def test_skips_are_taken_in_reverse():
    """Each decoder block must read the newest unread skip: a swap of two skips of equal shape shows here."""
    model = make(ch_mult=(1, 1), num_res_blocks=2, attn_levels=())
    x, t = draw(2, 3, 4, 6), torch.tensor([3, 997])
    out = dict(model.activations(x, t))
    temb = out["time_embed"]
    skips = ["down.0.downsample", "down.1.block.0", "down.1.block.1"]
    h = out["mid.block_2"]
    for i, skip in enumerate(reversed(skips)):
        block = model.get_submodule(f"up.1.block.{i}")
        with torch.no_grad():
            h = block(torch.cat([h, out[skip]], dim=1), temb)
        assert torch.equal(h, out[f"up.1.block.{i}"])
    h = out["up.1.upsample"]
    for i, skip in enumerate(["down.0.block.1", "down.0.block.0", "conv_in"]):
        block = model.get_submodule(f"up.0.block.{i}")
        with torch.no_grad():
            h = block(torch.cat([h, out[skip]], dim=1), temb)
        assert torch.equal(h, out[f"up.0.block.{i}"])


@pytest.mark.parametrize(
    "changes",
    [
        {"ch": 15, "ch_mult": (1, 3)},  # an odd embedding
        {"resamp_with_conv": False},
        {"conv_shortcut": True, "ch_mult": (2, 1, 3)},
        {"attn_levels": (), "num_res_blocks": 3},
        {"ch_mult": (1,), "attn_levels": (0,)},
    ],
)
def test_float64_is_float64_throughout(changes: dict):
    single, double = make(**changes), make(**changes).double()
    redraw_(double, seed=11)
    x, t = draw(2, 3, 4, 12, dtype=F64), torch.tensor([0, 737])
    outputs = dict(double.activations(x, t))
    assert {value.dtype for value in outputs.values()} == {F64}
    with torch.no_grad():
        got = single(x.float(), t)
        # A float angle of 737 is what an int one is.
        assert torch.equal(got, single(x.float(), t.float()))
    want = outputs["conv_out"]
    # float32 rounding, grown by the some 20 layers of these nets; measured 1.2e-6 at most.
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    # Were any part of the float64 model computed in float32, rounding its input would change nothing.
    with torch.no_grad():
        assert (double(x + 1e-11, t) != want).any()


def test_each_sample_sees_only_its_own_timestep():
    model = make()
    x, t = draw(3, 3, 6, 10), torch.tensor([1, 500, 999])
    with torch.no_grad():
        together = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
        same_t = model(x, torch.tensor([1, 1, 1]))
    # Another batch size may sum in another order.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[1:] - same_t[1:]).abs().max() > 1e-2


def test_bfloat16_keeps_its_angles_in_float32():
    model = make().bfloat16()
    seen: list[Tensor] = []
    model.temb.dense[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        out = model(draw(1, 3, 4, 4).bfloat16(), torch.tensor([999]))
    assert out.dtype == torch.bfloat16
    assert torch.equal(seen[0], timestep_embedding(torch.tensor([999]), 10, torch.float32).bfloat16())


def test_redraw_leaves_nothing_at_its_default():
    model = make()
    for name, param in model.named_parameters():
        assert (param != 0).all(), name
        # Two of some hundred float32 draws may coincide; a constant would leave one value.
        assert param.unique().numel() > 0.99 * param.numel(), name
    scales = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.GroupNorm)])
    assert abs(scales.mean() - 1) < 0.1
    weight = model.get_parameter("up.0.block.0.conv1.weight")
    # 2,700 draws: the standard error of a standard deviation is 1.4%.
    assert weight.std().item() == pytest.approx((30 * 9) ** -0.5, rel=0.07)

    again, other = make(), make()
    redraw_(other, seed=12)
    assert torch.equal(weight, again.get_parameter("up.0.block.0.conv1.weight"))
    assert not torch.equal(weight, other.get_parameter("up.0.block.0.conv1.weight"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ch": 3, "norm_groups": 1}, "ch must be at least 4"),
        ({"attn_levels": (0, 2)}, r"within 0..1 for ch_mult=\(1, 2\), got \[2\]"),
        ({"ch_mult": ()}, "ch_mult must have at least one"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
        ({"norm_groups": 4}, "norm_groups=4 does not divide the 10 channels"),
    ],
)
def test_bad_configurations_say_what_is_allowed(changes: dict, says: str):
    with pytest.raises(ValueError, match=says):
        make(**changes)


def test_sizes_that_do_not_divide_say_which_do():
    with pytest.raises(ValueError, match=r"divisible by 4 \(ch_mult has 3 levels\), got 8x10"):
        make(ch_mult=(1, 1, 1))(draw(1, 3, 8, 10), torch.tensor([0]))


def test_an_embedding_too_narrow_for_its_exponent_is_refused():
    with pytest.raises(ValueError, match="at least 4 channels, got ch=3"):
        timestep_embedding(torch.tensor([0]), 3, torch.float32)
