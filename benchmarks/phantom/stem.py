"""The stem of DCFormer as one linear map, for training on a CPU.

The stem has no activation. With the statistics of its norms held fixed (set once from data, as in evaluation), every
decomposed convolution is linear, and the norms go into its weights:

    y = sum_a g_a * (w_a (*) x + b_a - mean_a) + beta_a,  g_a = gamma_a / sqrt(var_a + eps)
      = sum_a (g_a w_a) (*) x + (g_a (b_a - mean_a) + beta_a)

The first layer reads 19 voxels per position, which makes it a matrix product. Gradients reach every original weight
through the sum, so what is trained and saved are the original tensors.

The layers after the first, 88 % of the model's multiply-adds, begin as the identity and are left out of the computation
until training opens them.
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


def run_stem(encoder: DCFormer, taps: Tensor, first_only: bool = False) -> Tensor:
    """The stem's output ``[B, C, H/4, W/4, D/4]`` for taps ``[B, H/4, W/4, D/4, 19]``, values in [-1, 1].

    ``first_only``: of the first layer; the same while the others are the identity.
    """
    first, *others = _layers(encoder)
    x = F.linear(taps, *_tap_matrix(first)).permute(0, 4, 1, 2, 3)  # channels last in memory
    for layer in () if first_only else others:
        x = sum((_line(x, axis, weight, bias) for axis, weight, bias in _folded_branches(layer)), torch.zeros(()))
    return x


def _line(x: Tensor, axis: int, weight: Tensor, bias: Tensor) -> Tensor:
    padding = [int(axis == i) for i in range(3)]
    return F.conv3d(x, weight.to(memory_format=torch.channels_last_3d), bias, padding=padding)


def _layers(encoder: DCFormer) -> list[nn.Module]:
    return list(encoder.s0.get_submodule("0").children())


def late_parameters(encoder: DCFormer) -> Iterator[nn.Parameter]:
    """Of the layers that begin as the identity."""
    for layer in _layers(encoder)[1:]:
        yield from layer.parameters()


@torch.no_grad()
def calibrate_stem(encoder: DCFormer, taps: Tensor) -> None:
    """Set the running statistics of the stem's norms to those of a batch of taps.

    All layers but the first become the identity: each branch passes on a third of what it reads.
    """
    x = taps
    for index, layer in enumerate(_layers(encoder)):
        if index:
            _make_identity(layer)
        for axis, conv, bias, norm, mean, var in _branches(layer):
            if index == 0:
                line = [TAPS.index((axis, o)) if o else TAPS.index((0, 0)) for o in range(-REACH, REACH + 1)]
                y = F.linear(x[..., line], conv.weight.flatten(1), bias).flatten(0, -2).t()
            else:
                y = conv(x).transpose(0, 1).flatten(1)
            mean.copy_(y.mean(dim=1))
            var.copy_(y.var(dim=1))
            if index:
                norm.weight.copy_((var + norm.eps).sqrt() / 3)
                norm.bias.copy_(mean / 3)
        if index == 0:
            x = F.linear(x, *_tap_matrix(layer)).permute(0, 4, 1, 2, 3)


def _make_identity(layer: nn.Module) -> None:
    for _, conv, bias, _, _, _ in _branches(layer):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(bias)


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
    return [block for stage in _stages(encoder) for block in stage]


def stage_channels(encoder: DCFormer) -> list[int]:
    """Widths of stages s1 to s4."""
    return [stage.get_parameter("0.gamma").numel() for stage in _stages(encoder)]


def _stages(encoder: DCFormer) -> tuple[nn.Sequential, ...]:
    return encoder.s1, encoder.s2, encoder.s3, encoder.s4


def run_stages(encoder: DCFormer, x: Tensor) -> list[Tensor]:
    """What stages s1 to s4 compute after the stem; the last is the encoder's output."""
    outputs = []
    for stage in _stages(encoder):
        for block in stage:
            x = run_block(block, x)
        outputs.append(x)
    return outputs


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
