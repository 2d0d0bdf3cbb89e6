"""What the transformers among the encoders share: cutting volumes into patches and widths into heads."""

from __future__ import annotations

from torch import Tensor


def to_patches(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """``[B, C, X, Y, Z]`` to ``[B, X/p, Y/q, Z/r, p*q*r*C]``: the voxels of a patch in the order (p, q, r, C)."""
    p, q, r = size
    batch, channels, *sides = x.shape
    grid = [side // step for side, step in zip(sides, size, strict=True)]
    cut = x.view(batch, channels, grid[0], p, grid[1], q, grid[2], r)
    return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * c]`` to ``[B, heads, N, c]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
