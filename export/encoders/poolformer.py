"""PoolFormer-3D: the PoolFormer of Yu et al., "MetaFormer Is Actually What You Need for Vision" (arXiv:2111.11418).

A rival of DCFormer in the published tables (arXiv:2502.05091). Nobody published its code or weights: sizes follow from
the published parameter and GFLOP counts, and what those do not fix is the natural choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hierarchy import ChannelNorm, Hierarchy
from ..registry import EncoderSpec, Published, register

LAYER_SCALE_START = 1e-5


class Pooling(nn.Module):
    """Mean over the 3 x 3 x 3 neighbours that exist, less the position itself; ``[B, C, H, W, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        # The mean over a box is a mean along each axis in turn, borders included. PyTorch's AvgPool3d on a CPU refuses
        # axes shorter than three, which the last stage of small volumes has.
        y = x
        for axis in (2, 3, 4):
            y = _mean_of_neighbours(y, axis)
        return y - x


def _mean_of_neighbours(x: Tensor, axis: int) -> Tensor:
    """Mean of each position and the one on either side along an axis, as far as there are such."""
    length = x.shape[axis]
    if length == 1:
        return x
    padding = [0, 0] * (4 - axis) + [1, 1]
    padded = F.pad(x, padding)
    total = sum((padded.narrow(axis, start, length) for start in (0, 1, 2)), torch.zeros((), device=x.device))
    inside = [2.0, *([3.0] * (length - 2)), 2.0]
    shape = [1] * x.ndim
    shape[axis] = length
    return total / torch.tensor(inside, device=x.device, dtype=x.dtype).view(shape)


class Block(nn.Module):
    """``x + g1 * pooling(norm(x))``, then ``x + g2 * MLP(norm(x))``; ``[B, C, H, W, D]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.token_mixer = Pooling()
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), LAYER_SCALE_START))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), LAYER_SCALE_START))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.layer_scale_1.view(-1, 1, 1, 1) * self.token_mixer(self.norm1(x))
        y = self.mlp(self.norm2(x.permute(0, 2, 3, 4, 1)))
        return x + (self.layer_scale_2 * y).permute(0, 4, 1, 2, 3)


def _spec(variant: str, channels: Sequence[int], depths: Sequence[int], published: Published) -> EncoderSpec:
    return EncoderSpec(f"poolformer-{variant}", lambda _: Hierarchy(channels, depths, Block), channels[-1],
                       (64, 64, 64), published=published)


register(_spec("nano", (40, 80, 160, 320), (2, 2, 2, 2), Published(2.79, 27.14, zero_shot_f1=37.0)))
register(_spec("naive", (64, 128, 320, 512), (2, 2, 6, 2), Published(11.31, 63.75, zero_shot_f1=39.1)))
register(_spec("tiny", (96, 192, 384, 768), (2, 2, 6, 2), Published(20.68, 117.46, zero_shot_f1=38.3)))
