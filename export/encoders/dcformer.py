"""DCFormer: a 3-D encoder built from decomposed convolutions.

Paper: Ates et al., "DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions",
arXiv:2502.05091 (2025). Where the paper and the published code disagree, checkpoints follow the code,
and so does this module; the places are marked "published code".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..registry import CheckpointFormat, EncoderSpec, Published, register

STAGE_KERNELS = (13, 11, 9, 7)
MLP_RATIO = 4
#: The stem divides each axis by 4, each of the four stages by 2.
TOTAL_STRIDE = 64


class DecomposedConv3d(nn.Module):
    """Sum of three parallel 1-D convolutions along H, W and D, each followed by its own BatchNorm.

    ``y = BN1(conv_(k,1,1)(x)) + BN2(conv_(1,k,1)(x)) + BN3(conv_(1,1,k)(x))``

    Input and output are ``[B, C, H, W, D]`` float. The stride acts on all three axes of every branch, so with
    stride 4 a branch reads single lines of voxels. The norms appear in the state dict twice, as ``c1.1`` and as
    ``norm.0``: one module registered under two names, as in the published checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.BatchNorm3d(out_channels) for _ in range(3))
        branches = []
        for axis in range(3):
            kernel_h, kernel_w, kernel_d = (kernel_size if axis == i else 1 for i in range(3))
            kernel = kernel_h, kernel_w, kernel_d
            padding = kernel_h // 2, kernel_w // 2, kernel_d // 2
            conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, groups=groups)
            branches.append(nn.Sequential(conv, self.norm[axis]))
        self.c1, self.c2, self.c3 = branches

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.c1(x) + self.c2(x) + self.c3(x)


class MLP(nn.Module):
    """Linear(C, 4C) - GELU (exact) - Linear(4C, C) on the channel axis of ``[B, C, H, W, D]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * channels
        # Index 2 is the published code's dropout: it keeps the second Linear at the key "mlp.3".
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.mlp(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Block(nn.Module):
    """``x + gamma * MLP(dwconv(x))``; the first block of a stage halves the grid and changes the width first."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, downsample: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.downsample = downsample
        if downsample:
            self.pool = nn.MaxPool3d(3, stride=2, padding=1)
            self.proj = nn.Conv3d(in_channels, channels, 1, bias=False)
        self.dwconv = DecomposedConv3d(channels, channels, kernel_size, groups=channels)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W, D]`` to ``[B, C, …]``, on half the grid if this block downsamples."""
        if self.downsample:
            x = self.proj(self.pool(x))
        return x + self.gamma.view(-1, 1, 1, 1) * self.mlp(self.dwconv(x))


def _stem(out_channels: int) -> nn.Sequential:
    """Four dense decomposed convolutions, k7 stride 4 then three k3.

    Published code: there is no activation between them. It hands GELU to the parameter that switches the norm on,
    so in evaluation the whole stem is one linear map. Adding the paper's GELU breaks every published checkpoint.
    """
    rest = (DecomposedConv3d(out_channels, out_channels, 3) for _ in range(3))
    return nn.Sequential(DecomposedConv3d(1, out_channels, 7, stride=4), *rest)


def _stage(in_channels: int, channels: int, count: int, kernel_size: int) -> nn.Sequential:
    first = Block(in_channels, channels, kernel_size, downsample=True)
    return nn.Sequential(first, *(Block(channels, channels, kernel_size, downsample=False) for _ in range(count - 1)))


class DCFormer(nn.Module):
    """The image encoder.

    Args:
        blocks: blocks in the four stages s1..s4.
        channels: widths of the stem and of the four stages, s0..s4.

    Input: ``[B, 1, D, H, W]`` float, every side a multiple of 64. Output: ``[B, C4, H/64, W/64, D/64]``.
    State-dict keys are those of the published checkpoints below ``visual_transformer.encoder.``.
    """

    def __init__(self, blocks: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        # The published code can repeat the stem; every variant has exactly one, hence the extra ".0" in its keys.
        self.s0 = nn.Sequential(_stem(channels[0]))
        self.s1, self.s2, self.s3, self.s4 = (
            _stage(width_in, width, count, kernel)
            for width_in, width, count, kernel in zip(channels, channels[1:], blocks, STAGE_KERNELS, strict=False)
        )

    def forward(self, volume: Tensor) -> Tensor:
        """See the class."""
        x = volume.permute(0, 1, 3, 4, 2)
        return self.s4(self.s3(self.s2(self.s1(self.s0(x)))))


def _spec(variant: str, blocks: Sequence[int], channels: Sequence[int], checkpoint_name: str,
          published: Published | None) -> EncoderSpec:
    return EncoderSpec(
        name=f"dcformer-{variant}",
        build=lambda _: DCFormer(blocks, channels),
        channels=channels[-1],
        stride_dhw=(TOTAL_STRIDE, TOTAL_STRIDE, TOTAL_STRIDE),
        checkpoint=CheckpointFormat("visual_transformer.encoder.", checkpoint_name),
        published=published,
    )


register(_spec("nano", (1, 1, 1, 1), (32, 32, 64, 128, 256), "decomp_nano",
               Published(params_m=0.92, gflops=34.21, params_include_projection=True, zero_shot_f1=41.9)))
register(_spec("naive", (2, 2, 2, 2), (32, 64, 128, 256, 512), "decomp_naive",
               Published(params_m=5.85, gflops=49.48, zero_shot_f1=44.5)))
register(_spec("tiny", (2, 3, 3, 2), (64, 96, 192, 384, 768), "decomp_tiny",
               Published(params_m=15.1, gflops=168.2, params_include_projection=True, zero_shot_f1=46.3)))
register(_spec("small", (2, 3, 6, 2), (64, 96, 192, 384, 768), "decomp_small", None))
register(_spec("base", (2, 6, 6, 2), (64, 128, 256, 512, 1024), "decomp_base", None))
register(_spec("large", (2, 6, 12, 2), (64, 256, 512, 1024, 2048), "decomp_large", None))
