"""The diffusion transformer of DiT in plain PyTorch, under the names of diffusers' DiTTransformer2DModel.

diffusers repeats what embeds t and the label in every block; here it is in the first alone. Inference only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Of t and the label, `(b,)` both: their sum, `(b, channels)`."""

    def __init__(self, channels: int, *, classes: int, features: int, shift: float):
        super().__init__()
        self.features, self.shift = features, shift
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(features, channels), "linear_2": nn.Linear(channels, channels)}
        )
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes, channels)})

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        """Cosines, then sines; float64 is for float64 networks alone."""
        mlp, table = self.timestep_embedder, self.class_embedder["embedding_table"]
        half, dtype = self.features // 2, next(self.parameters()).dtype
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype) / (half - self.shift))
        angles = t.to(dtype)[:, None] * frequencies[None]
        waves = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, self.features % 2))
        return mlp["linear_2"](F.silu(mlp["linear_1"](waves))) + table(labels)


class Block(nn.Module):
    """Attention and an MLP, each of a norm that is shifted and scaled, and gated, as the condition says.

    embedding: of t and the label, in the network's first block.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        mlp_channels: int,
        epsilon: float,
        mlp_epsilon: float,
        embedding: Embedding | None,
    ):
        super().__init__()
        self.heads, self.epsilon, self.mlp_epsilon = heads, epsilon, mlp_epsilon
        parts: dict[str, nn.Module] = {} if embedding is None else {"emb": embedding}
        self.norm1 = nn.ModuleDict({**parts, "linear": nn.Linear(channels, 6 * channels)})
        self.attn1 = nn.ModuleDict(
            {
                **{name: nn.Linear(channels, channels) for name in ("to_q", "to_k", "to_v")},
                "to_out": nn.ModuleList([nn.Linear(channels, channels)]),
            }
        )
        net = [nn.ModuleDict({"proj": nn.Linear(channels, mlp_channels)}), nn.Identity()]  # dropout's place
        self.ff = nn.ModuleDict({"net": nn.ModuleList([*net, nn.Linear(mlp_channels, channels)])})

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: `(b, n, channels)`, condition: `(b, channels)`. Returns x's shape."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            self.norm1["linear"](F.silu(condition))[:, None].chunk(6, dim=2)
        )  # fmt: skip
        x = x + gate_1 * self.attention(_norm(x, self.epsilon) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(_norm(x, self.mlp_epsilon) * (1 + scale_2) + shift_2)

    def attention(self, x: Tensor) -> Tensor:
        """Of every token to every token."""
        b, n, channels = x.shape
        q, k, v = (
            self.attn1[name](x).reshape(b, n, self.heads, -1).transpose(1, 2) for name in ("to_q", "to_k", "to_v")
        )
        weights = (q @ k.transpose(2, 3) * (channels // self.heads) ** -0.5).softmax(dim=3)
        return _first(self.attn1["to_out"])((weights @ v).transpose(1, 2).reshape(b, n, channels))

    def mlp(self, x: Tensor) -> Tensor:
        """With the gelu that is made of a tanh."""
        first, _, last = _modules(self.ff["net"])
        return last(F.gelu(first["proj"](x), approximate="tanh"))


class ReferenceDiT(nn.Module):
    """`activations(x_t NCHW, t, labels)`: (name, output) of each block, as those of `jddim.models.dit.DiT`."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        channels: int,
        depth: int,
        heads: int,
        mlp_channels: int,
        classes: int,
        time_features: int,
        frequency_shift: float,
        epsilon: float,
        mlp_epsilon: float,
    ):
        super().__init__()
        self.out_channels, self.patch_size, self.epsilon = out_channels, patch_size, epsilon
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)})
        embedding = Embedding(channels, classes=classes, features=time_features, shift=frequency_shift)
        self.transformer_blocks = nn.ModuleList(
            Block(
                channels,
                heads=heads,
                mlp_channels=mlp_channels,
                epsilon=epsilon,
                mlp_epsilon=mlp_epsilon,
                embedding=None if i else embedding,
            )
            for i in range(depth)
        )
        self.proj_out_1 = nn.Linear(channels, 2 * channels)
        self.proj_out_2 = nn.Linear(channels, patch_size * patch_size * out_channels)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The network's output, `(b, out_channels, h, w)`."""
        *_, (_, output) = self.activations(x_t, t, labels)
        return output

    def activations(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One pair for each block, in the order computed."""
        condition = _first(self.transformer_blocks).norm1["emb"](t, labels)
        yield "condition", condition
        patches = self.pos_embed["proj"](x_t)
        b, channels, rows, columns = patches.shape
        h = (patches + positions(rows, columns, channels).to(patches)).flatten(2).transpose(1, 2)
        yield "patch_embed", h
        for i, block in enumerate(self.transformer_blocks):
            h = block(h, condition)
            yield f"block.{i}", h
        shift, scale = self.proj_out_1(F.silu(condition))[:, None].chunk(2, dim=2)
        h = self.proj_out_2(_norm(h, self.epsilon) * (1 + scale) + shift)
        side = self.patch_size
        h = h.reshape(b, rows, columns, side, side, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        yield "output", h.reshape(b, self.out_channels, rows * side, columns * side)


def positions(rows: int, columns: int, channels: int) -> Tensor:
    """Where each patch is, float32 `(channels, rows, columns)`: sines and cosines of its column, then of its row."""
    count = channels // 4
    frequencies = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [frequencies[:, None, None] * place[None] for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())]).float()


def _norm(x: Tensor, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=epsilon)


def _modules(parts: nn.Module) -> list[Any]:
    assert isinstance(parts, nn.ModuleList)
    return list(parts)


def _first(parts: nn.Module) -> Any:
    return _modules(parts)[0]
