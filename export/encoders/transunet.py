"""TransUNet-3D's encoder: residual convolutions, then a transformer (Chen et al., arXiv:2102.04306).

A rival of DCFormer in the published tables (arXiv:2502.05091). Nobody published its weights; widths and depths follow
from the published parameter and GFLOP counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import EncoderSpec, Published, register
from ..tokens import split_heads

HEADS, MLP_WIDTH, STRIDE = 4, 512, 32


class Bottleneck(nn.Module):
    """Residual bottleneck ``[B, C, …]`` to ``[B, 2C, …]`` on half the grid."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.downsample = nn.Sequential(nn.Conv3d(channels_in, channels, 1, stride=2, bias=False),
                                        nn.BatchNorm3d(channels))
        self.main = nn.Sequential(
            nn.Conv3d(channels_in, channels, 1, bias=False), nn.BatchNorm3d(channels), nn.ReLU(),
            nn.Conv3d(channels, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm3d(channels), nn.ReLU(),
            nn.Conv3d(channels, channels, 1, bias=False), nn.BatchNorm3d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.relu(self.main(x) + self.downsample(x))


class Block(nn.Module):
    """Post-norm transformer block on ``[B, N, C]``.

    Scores are *multiplied* by the root of the heads' width, as in the implementation that the published model follows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = (channels / HEADS) ** 0.5
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, MLP_WIDTH), nn.GELU(), nn.Linear(MLP_WIDTH, channels))
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = (split_heads(part, HEADS) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.mlp(x))


class TransUNet(nn.Module):
    """``[B, 1, D, H, W]`` to ``[B, 8C, H/32, W/32, D/32]``; the class token is dropped at the end.

    Args:
        channels: C, width of the first convolution.
        depth: transformer blocks.
        input_size: S of volumes (S/2, S, S), which fixes the number of learned positions.
    """

    def __init__(self, channels: int, depth: int, input_size: int) -> None:
        super().__init__()
        side = input_size // STRIDE
        self.grid = side, side, side // 2
        width = 8 * channels
        self.stem = nn.Sequential(nn.Conv3d(1, channels, 7, stride=4, padding=3, bias=False), nn.BatchNorm3d(channels),
                                  nn.ReLU())
        self.bottlenecks = nn.Sequential(*(Bottleneck(channels << i, channels << (i + 1)) for i in range(3)))
        self.projection = nn.Linear(width, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, side * side * (side // 2) + 1, width))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, volume: Tensor) -> Tensor:
        """See the class."""
        features = self.bottlenecks(self.stem(volume.permute(0, 1, 3, 4, 2)))
        x = self.projection(features.flatten(2).transpose(1, 2))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embedding
        return self.blocks(self.dropout(x))[:, 1:].transpose(1, 2).unflatten(2, self.grid)


def _spec(variant: str, channels: int, depth: int, published: Published) -> EncoderSpec:
    return EncoderSpec(f"transunet-{variant}", lambda size: TransUNet(channels, depth, size), 8 * channels,
                       (STRIDE, STRIDE, STRIDE), published=published)


register(_spec("naive", 48, 6, Published(12.48, 118.9, zero_shot_f1=41.4)))
register(_spec("tiny", 64, 8, Published(23.93, 207.5, zero_shot_f1=35.8)))
