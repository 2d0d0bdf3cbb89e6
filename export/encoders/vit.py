"""ViT-3D: the vision transformer of Dosovitskiy et al. (arXiv:2010.11929) on patches of 32 x 32 x 32 voxels.

A rival of DCFormer in the published tables (arXiv:2502.05091). Nobody published its weights; the feed-forward layers
are four wide, which is what the published counts give.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import EncoderSpec, Published, register
from ..tokens import split_heads, to_patches

PATCH, HEADS, HEAD_WIDTH, MLP_WIDTH = 32, 8, 64, 4


class Attention(nn.Module):
    """Pre-norm multi-head self-attention on ``[B, N, C]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = (split_heads(part, HEADS) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _feed_forward(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, MLP_WIDTH), nn.GELU(),
                         nn.Linear(MLP_WIDTH, channels))


class ViT(nn.Module):
    """``[B, 1, D, H, W]`` to ``[B, C, H/32, W/32, D/32]``; the class token is dropped at the end.

    Args:
        channels: width of the tokens.
        depth: number of blocks.
        input_size: S of volumes (S/2, S, S), which fixes the number of learned positions.
    """

    def __init__(self, channels: int, depth: int, input_size: int) -> None:
        super().__init__()
        side = input_size // PATCH
        self.grid = side, side, side // 2
        voxels = PATCH**3
        self.to_patch_embedding = nn.Sequential(nn.LayerNorm(voxels), nn.Linear(voxels, channels),
                                                nn.LayerNorm(channels))
        self.cls_token = nn.Parameter(torch.randn(1, 1, channels))
        self.pos_embedding = nn.Parameter(torch.randn(1, side * side * (side // 2) + 1, channels))
        self.layers = nn.ModuleList(nn.ModuleList((Attention(channels), _feed_forward(channels))) for _ in range(depth))

    def forward(self, volume: Tensor) -> Tensor:
        """See the class."""
        x = self.to_patch_embedding(to_patches(volume.permute(0, 1, 3, 4, 2), (PATCH, PATCH, PATCH)).flatten(1, 3))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embedding
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            attention, feed_forward = layer
            x = x + attention(x)
            x = x + feed_forward(x)
        return x[:, 1:].transpose(1, 2).unflatten(2, self.grid)


def _spec(variant: str, channels: int, depth: int, published: Published) -> EncoderSpec:
    return EncoderSpec(f"vit-{variant}", lambda size: ViT(channels, depth, size), channels, (PATCH, PATCH, PATCH),
                       published=published)


register(_spec("naive", 256, 4, Published(11.10, 39.05, zero_shot_f1=42.5)))
register(_spec("tiny", 512, 8, Published(26.34, 86.43, zero_shot_f1=43.2)))
