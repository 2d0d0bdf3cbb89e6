"""The stem's first two layers as one.

Neither has an activation behind it. Layer 1 is a decomposed convolution of one input channel with kernel k1 and stride
s; at an output position p it reads a star of T = 3 (k1 - 1) + 1 voxels, P_t(p), and is

    h_c(p) = sum_t L[c, t] P_t(p) + b_c  =  sum_t L'[c, t] P'_t(p)

with P' = P and a channel of ones, and L' = [L | b]. Layer 2 is a decomposed convolution of stride 1 with kernels K_a:

    Before: y_o(p) = sum_a sum_c sum_d K_a[o, c, d] h_c(p + d e_a) + bias_o,   h = 0 outside the grid
    After:  y_o(p) = sum_a sum_t sum_d (K_a L')[o, t, d] P'_t(p + d e_a) + bias_o,   P' = 0 outside the grid

P' is zero outside the grid exactly where h is, so ordinary zero padding stays exact at the borders, and the channel of
ones is what makes it so for the bias. P' comes from convolutions with one-hot kernels, which read what layer 1 read.
Worth it where T + 1 is smaller than the width of layer 1 (20 instead of 32 in nano, 64 in tiny).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .base import Refused, Rule
from .convolution import Convolution, star_of


class ComposeStem(Rule):
    """See the module."""

    title = "compose_stem"

    def pattern(self, op: Any, x: Any) -> Any:
        """See onnxscript."""

        def star(y: Any, names: str) -> Any:
            a, b, c = (op.Conv(y, _allow_other_inputs=True, _outputs=[names + digit]) for digit in "123")
            return op.Add(op.Add(a, b), c)

        return star(star(x, "first"), "second")

    def require(self, **bound: ir.Value) -> None:
        """Two stars with constant weights, the first over one channel, the second without stride and groups."""
        first, second = _stars(bound)
        if first[0].weight.shape[1] != 1 or first[0].group != 1:
            raise Refused(f"the first layer reads {first[0].weight.shape[1]} channels, not one")
        if second[0].group != 1 or set(second[0].strides) != {1}:
            raise Refused("the second layer has groups or strides")
        if (taps := _tap_count(first)) + 1 >= first[0].out_channels:
            raise Refused(f"{taps} voxels and a constant are no fewer than the first layer's {first[0].out_channels} "
                          "channels")

    def rewrite(self, op: Any, x: ir.Value, **bound: ir.Value) -> Any:
        """See onnxscript."""
        first, second = _stars(bound)
        del x
        taps = op.Concat(*self._taps(op, first), axis=1)
        matrix = tap_matrix(first)
        terms = []
        for branch in second:
            line = np.einsum("ocd,ct->otd", branch.line.astype(np.float64), matrix)
            weight = line.astype(np.float32).reshape(*line.shape[:2], *branch.kernel)
            terms.append(replace(branch, x=taps, weight=weight).emit(op, self))
        return op.Add(op.Add(terms[0], terms[1]), terms[2])

    def _taps(self, op: Any, star: Sequence[Convolution]) -> list[ir.Value]:
        """One convolution per axis with one-hot kernels; the first adds the centre, at its place, and the ones."""
        parts = []
        for branch in star:
            length = branch.kernel[branch.axis]
            one_hot = np.eye(length, dtype=np.float32)
            bias = None
            if branch.axis == 0:
                one_hot = np.vstack([one_hot, np.zeros((1, length), np.float32)])
                bias = np.append(np.zeros(length, np.float32), np.float32(1))
            else:
                one_hot = np.delete(one_hot, length // 2, axis=0)
            weight = one_hot.reshape(-1, 1, *branch.kernel)
            parts.append(replace(branch, weight=weight, bias=bias).emit(op, self))
        return parts


def tap_matrix(star: Sequence[Convolution]) -> NDArray[np.float64]:
    """L' of the module's docstring, ``[C, T + 1]``: columns as the taps are concatenated, axis 0 with the ones."""
    lines = [branch.line[:, 0].astype(np.float64) for branch in star]
    centre = np.sum([line[:, line.shape[1] // 2] for line in lines], axis=0)
    bias = np.stack([branch.bias_or_zero for branch in star]).astype(np.float64).sum(axis=0)
    columns = []
    for axis, line in enumerate(lines):
        middle = line.shape[1] // 2
        if axis == 0:
            columns += [line[:, :middle], centre[:, None], line[:, middle + 1 :], bias[:, None]]
        else:
            columns.append(np.delete(line, middle, axis=1))
    return np.concatenate(columns, axis=1)


def _tap_count(star: Sequence[Convolution]) -> int:
    return sum(branch.kernel[branch.axis] - 1 for branch in star) + 1


def _stars(bound: dict[str, ir.Value]) -> tuple[list[Convolution], list[Convolution]]:
    return (star_of(bound["first1"], bound["first2"], bound["first3"]),
            star_of(bound["second1"], bound["second2"], bound["second3"]))


RULES = (ComposeStem,)
