"""ConvNeXt-3D: the ConvNeXt of Liu et al., "A ConvNet for the 2020s" (arXiv:2201.03545), with 3-D convolutions.

A rival of DCFormer in the published tables (arXiv:2502.05091). Nobody published its code or weights: sizes follow from
the published parameter and GFLOP counts, and what those do not fix is the natural choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..hierarchy import Hierarchy
from ..registry import EncoderSpec, Published, register

LAYER_SCALE_START = 1e-6


class Block(nn.Module):
    """``x + gamma * MLP(LN(dwconv(x)))`` on ``[B, C, H, W, D]``; depthwise kernel of 7 x 7 x 7."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv3d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE_START))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 4, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 4, 1, 2, 3)


def _spec(variant: str, channels: Sequence[int], depths: Sequence[int], published: Published) -> EncoderSpec:
    return EncoderSpec(f"convnext-{variant}", lambda _: Hierarchy(channels, depths, Block), channels[-1], (64, 64, 64),
                       published=published)


register(_spec("nano", (40, 80, 160, 320), (2, 2, 2, 2), Published(3.19, 31.92, zero_shot_f1=39.4)))
register(_spec("naive", (80, 160, 320, 640), (2, 2, 6, 2), Published(15.63, 96.84, zero_shot_f1=42.4)))
register(_spec("tiny", (96, 192, 384, 768), (3, 3, 9, 3), Published(31.59, 156.31, zero_shot_f1=42.1)))
