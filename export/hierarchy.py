"""The skeleton that ConvNeXt-3D and PoolFormer-3D share: a stem, four stages, a norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of ``[B, C, …]``, eps 1e-6, as ConvNeXt's code writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        centred = x - x.mean(dim=1, keepdim=True)
        unit = centred / torch.sqrt(centred.square().mean(dim=1, keepdim=True) + 1e-6)
        shape = (-1, *(1 for _ in x.shape[2:]))
        return unit * self.weight.view(shape) + self.bias.view(shape)


class Hierarchy(nn.Module):
    """``[B, 1, D, H, W]`` to ``[B, C4, H/64, W/64, D/64]``.

    The stem divides each axis by 8, each stage after the first by 2.

    Args:
        channels: widths of the four stages.
        depths: blocks in each.
        block: makes a block of a width.
    """

    def __init__(self, channels: Sequence[int], depths: Sequence[int], block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        first = channels[0]
        stem = nn.Sequential(nn.Conv3d(1, first, 7, stride=4, padding=3), ChannelNorm(first),
                             nn.Conv3d(first, first, 3, stride=2, padding=1), ChannelNorm(first))
        halvings = (nn.Sequential(ChannelNorm(width_in), nn.Conv3d(width_in, width, 2, stride=2))
                    for width_in, width in itertools.pairwise(channels))
        self.downsample_layers = nn.ModuleList((stem, *halvings))
        self.stages = nn.ModuleList(nn.Sequential(*(block(width) for _ in range(depth)))
                                    for width, depth in zip(channels, depths, strict=True))
        self.norm = ChannelNorm(channels[-1])

    def forward(self, volume: Tensor) -> Tensor:
        """See the class."""
        x = volume.permute(0, 1, 3, 4, 2)
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x)
