"""The stem of DCFormer as one linear map, for training on a CPU.

The stem has no activation. With the statistics of its norms held fixed (set once from data, as in evaluation), every
decomposed convolution is linear, and its three branches add up to one convolution:

    y = sum_a g_a * (w_a (*) x + b_a - mean_a) + beta_a,  g_a = gamma_a / sqrt(var_a + eps)
      = (sum_a g_a w_a) (*) x + sum_a (g_a (b_a - mean_a) + beta_a)

with the lines w_a laid into one k x k x k kernel; the first layer's 19 taps make it a matrix product. Gradients reach
every original weight through the sum, so what is trained and saved are the original tensors. On two cores with bfloat16
matrix units a training step takes about a quarter of the time of the unmerged form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...export.encoders.dcformer import Block, DCFormer, DecomposedConv3d
from .samples import REACH, TAPS


class _Branch(NamedTuple):
    """One of the three convolutions of a decomposed one, and the tensors of its norm."""

    axis: int
    conv: nn.Conv3d
    bias: Tensor
    norm: nn.BatchNorm3d
    running_mean: Tensor
    running_var: Tensor


def _branches(layer: nn.Module) -> Iterator[_Branch]:
    assert isinstance(layer, DecomposedConv3d)
    for axis, branch in enumerate((layer.c1, layer.c2, layer.c3)):
        conv, norm = branch
        assert isinstance(conv, nn.Conv3d)
        assert isinstance(norm, nn.BatchNorm3d)
        assert conv.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        yield _Branch(axis, conv, conv.bias, norm, norm.running_mean, norm.running_var)


def _folded_branches(layer: nn.Module) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Axis, weight and bias of each branch with its norm folded in; differentiable."""
    for axis, conv, bias, norm, mean, var in _branches(layer):
        gain = norm.weight * torch.rsqrt(var + norm.eps)
        yield axis, conv.weight * gain.view(-1, 1, 1, 1, 1), (bias - mean) * gain + norm.bias


def _tap_matrix(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The first layer as ``[C, 19]`` and ``[C]``."""
    branches = list(_folded_branches(layer))
    lines = [weight.flatten(1) for _, weight, _ in branches]
    centre = torch.stack([line[:, REACH] for line in lines]).sum(dim=0)
    columns = [lines[axis][:, REACH + offset] if offset else centre for axis, offset in TAPS]
    return torch.stack(columns, dim=1), torch.stack([bias for _, _, bias in branches]).sum(dim=0)


def _star_kernel(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A stride-1 layer as ``[C_out, C_in, 3, 3, 3]`` and ``[C_out]``: seven taps of 27 are not zero."""
    device = layer.get_parameter("c1.0.bias").device
    kernel, total_bias = torch.zeros((), device=device), torch.zeros((), device=device)
    for axis, weight, bias in _folded_branches(layer):
        padding = [0 if axis == i else 1 for i in (2, 2, 1, 1, 0, 0)]  # torch pads from the last axis on
        kernel, total_bias = kernel + F.pad(weight, padding), total_bias + bias
    return kernel, total_bias


def run_stem(encoder: DCFormer, taps: Tensor) -> Tensor:
    """The stem's output ``[B, C, H/4, W/4, D/4]`` for taps ``[B, H/4, W/4, D/4, 19]``, values in [-1, 1]."""
    first, *others = _layers(encoder)
    x = F.linear(taps, *_tap_matrix(first)).permute(0, 4, 1, 2, 3)  # channels last in memory
    for layer in others:
        kernel, bias = _star_kernel(layer)
        x = F.conv3d(x, kernel.to(memory_format=torch.channels_last_3d), bias, padding=1)
    return x


def _layers(encoder: DCFormer) -> list[nn.Module]:
    return list(encoder.s0.get_submodule("0").children())


@torch.no_grad()
def calibrate_stem(encoder: DCFormer, taps: Tensor) -> None:
    """Set the running statistics of the stem's norms to those of a batch of taps, layer by layer."""
    x = taps
    for index, layer in enumerate(_layers(encoder)):
        for axis, conv, bias, _, mean, var in _branches(layer):
            if index == 0:
                line = [TAPS.index((axis, o)) if o else TAPS.index((0, 0)) for o in range(-REACH, REACH + 1)]
                y = F.linear(x[..., line], conv.weight.flatten(1), bias).flatten(0, -2).t()
            else:
                y = conv(x).transpose(0, 1).flatten(1)
            mean.copy_(y.mean(dim=1))
            var.copy_(y.var(dim=1))
        if index == 0:
            x = F.linear(x, *_tap_matrix(layer)).permute(0, 4, 1, 2, 3)
        else:
            x = F.conv3d(x, *_star_kernel(layer), padding=1)


def line_convolution(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Depthwise convolution of ``[B, C, H, W, D]`` with ``[C, k]`` along one axis, zero-padded to the same length.

    As a product with a banded matrix per channel: axes are at most 64 long here, and PyTorch's backward pass for
    depthwise 3-D convolutions is ten to a hundred times slower on a CPU.
    """
    length, reach = x.shape[axis + 2], weight.shape[1] // 2
    position = torch.arange(length, device=x.device)
    offset = position[None, :] - position[:, None] + reach
    band = weight[:, offset.clamp(0, 2 * reach)] * ((offset >= 0) & (offset <= 2 * reach))
    if axis == 0:
        return (band @ x.flatten(3)).view_as(x)
    if axis == 1:
        return band[:, None] @ x
    return (x.flatten(2, 3) @ band.transpose(1, 2)).view_as(x)


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """What one block computes, its depthwise convolutions as matrix products."""
    assert isinstance(block, Block)
    if block.downsample:
        x = block.proj(block.pool(x)).contiguous()
    branches = []
    for axis, conv, bias, norm, _, _ in _branches(block.dwconv):
        y = line_convolution(x, conv.weight.flatten(1), axis)
        branches.append(norm(y + bias.view(-1, 1, 1, 1).to(y.dtype)))
    return x + block.gamma.view(-1, 1, 1, 1) * block.mlp(sum(branches))


def blocks(encoder: DCFormer) -> list[nn.Module]:
    """The blocks of stages s1 to s4 in order."""
    return [block for stage in (encoder.s1, encoder.s2, encoder.s3, encoder.s4) for block in stage]


def run_stages(encoder: DCFormer, x: Tensor) -> Tensor:
    """Stages s1 to s4 after the stem."""
    for block in blocks(encoder):
        x = run_block(block, x)
    return x


class Centre(nn.Module):
    """Subtracts the mean of each channel, of the batch in training and a running one in evaluation.

    Unit vectors of features with a large common part are all alike, and learn slowly. ``fold`` makes it part of the
    encoder, which has a bias to take it, so that nothing of it is left in the checkpoint.
    """

    def __init__(self, channels: int, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.mean: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, …]`` float32."""
        mean = self.mean
        if self.training:
            mean = features.mean(dim=(0, *range(2, features.ndim)))
            self.mean.lerp_(mean.detach(), self.momentum)
        return features - mean.view(-1, *(1 for _ in features.shape[2:]))

    @torch.no_grad()
    def fold(self, encoder: DCFormer) -> None:
        """Move the running mean into the last block: ``x + gamma * (W h + b)`` with ``b - mean / gamma``."""
        block = blocks(encoder)[-1]
        assert isinstance(block, Block)
        last = block.mlp.mlp[3]
        assert isinstance(last, nn.Linear)
        last.bias.sub_(self.mean / block.gamma)
        self.mean.zero_()
