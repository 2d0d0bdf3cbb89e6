"""Rounding of weights that makes up for its own errors.

A layer's inputs are correlated: neighbouring voxels, channels of one edge. Rounding each weight to the nearest number
ignores that. Rounded one after the other instead, with the error of each passed on to those still to be rounded, the
sum over a typical input hardly changes. With H = E[x x^T] over inputs x of the layer and U the upper Cholesky factor
of its inverse, the weights w_k of an output, in the order of falling H_kk, become

    q_j = round(w_j),   w_k <- w_k - (w_j - q_j) U_jk / U_jj   for k > j

(Frantar et al., "GPTQ", arXiv:2210.17323, section 3; Hassibi and Stork 1993). The branches of a decomposed convolution
are rounded as one layer, as their results are added: x holds the taps of all three.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ..runtime.errors import InputError
from ..runtime.files import atomic_file
from .layers import Layer, weighted_layers

#: Places of one scan whose inputs enter H.
PLACES = 1024
#: Numbers in a layer's H, beyond which it would take more than 128 MB; such layers are rounded to the nearest.
LARGEST_H = 4096**2
#: Share of the mean of H's diagonal that is added to it, as activations of one scan may span less than all directions.
_DAMPING = 1e-4

#: From weights ``[outputs]`` to the nearest that can be held.
Rounding = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass
class _Group:
    """Layers that read one activation and are added up.

    ``moments`` [inputs, inputs], for depthwise layers [channels, taps, taps].
    """

    layers: list[Layer]
    moments: NDArray[np.float64]
    count: int = 0


@dataclass
class Correlations:
    """H of every layer, over any number of scans."""

    groups: dict[str, _Group] = field(default_factory=dict)

    @staticmethod
    def of(proto: onnx.ModelProto) -> Correlations:
        """For the layers of a graph, with nothing seen yet."""
        branches: dict[tuple[ir.Value, ir.Value, bool], list[Layer]] = {}
        for layer in weighted_layers(ir.from_proto(proto).graph):
            branches.setdefault((layer.x, _sum_with(layer.node.outputs[0]), layer.depthwise), []).append(layer)
        groups = {}
        for (_, result, depthwise), layers in branches.items():
            inputs = sum(_matrix(layer).shape[1] for layer in layers)
            shape = (len(_matrix(layers[0])), inputs, inputs) if depthwise else (inputs, inputs)
            if math.prod(shape) <= LARGEST_H:
                groups[f"{layers[0].x.name} to {result.name}"] = _Group(layers, np.zeros(shape))
        return Correlations(groups)

    def update(self, name: str, values: NDArray[np.float32], rng: np.random.Generator) -> None:
        """Add what the layers that read an activation read at some places."""
        for group in self.groups.values():
            if group.layers[0].x.name != name:
                continue
            x = _inputs(group.layers, values, rng).astype(np.float64)
            if group.layers[0].depthwise:
                taps = np.ascontiguousarray(x.transpose(2, 1, 0))
                group.moments += taps @ taps.transpose(0, 2, 1)
            else:
                rows = x.reshape(len(x), -1)
                group.moments += rows.T @ rows
            group.count += len(x)

    def save(self, path: Path) -> None:
        """Write what was seen, whole or not at all."""
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {f"moments/{name}": group.moments for name, group in self.groups.items()}
            arrays |= {f"count/{name}": np.array(group.count) for name, group in self.groups.items()}
            np.savez(file, **arrays)

    def read(self, path: Path) -> dict[str, tuple[NDArray[np.float64], int]]:
        """What ``save`` wrote for the same graph, for ``take``.

        Raises:
            InputError: not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = {name: (stored[f"moments/{name}"], int(stored[f"count/{name}"])) for name in self.groups}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: damaged ({error})") from error
        if any(moments.shape != self.groups[name].moments.shape for name, (moments, _) in found.items()):
            raise InputError(f"{path}: of another graph")
        return found

    def take(self, stored: Mapping[str, tuple[NDArray[np.float64], int]]) -> None:
        """Go on from what ``read`` found."""
        for name, (moments, count) in stored.items():
            self.groups[name].moments, self.groups[name].count = moments, count

    def rounded(self, rounding: Callable[[Layer], Rounding | None]) -> dict[str, NDArray[np.float32]]:
        """New weights by their names, for layers that were seen.

        Args:
            rounding: what a layer's weights are rounded to; None where they stay as they are.
        """
        found = {}
        for group in self.groups.values():
            rounds = [chosen for layer in group.layers if (chosen := rounding(layer)) is not None]
            if not group.count or len(rounds) < len(group.layers):
                continue
            parts = [_matrix(layer) for layer in group.layers]
            widths = np.cumsum([0, *(part.shape[1] for part in parts)])
            nearest = [round_part for round_part, part in zip(rounds, parts, strict=True) for _ in range(part.shape[1])]
            new = _compensate(np.concatenate(parts, axis=1), group.moments / group.count, nearest)
            for layer, start, end in zip(group.layers, widths[:-1], widths[1:], strict=True):
                found[str(layer.weight_name)] = _from_matrix(layer, new[:, start:end])
        return found


def _compensate(matrix: NDArray[np.float64], moments: NDArray[np.float64],
                nearest: Sequence[Rounding]) -> NDArray[np.float64]:
    """The module's recursion for all outputs at once; ``moments`` shared by them, or one for each.

    Args:
        nearest: for each column.
    """
    shared = moments.ndim == 2
    diagonal = np.diagonal(moments, axis1=-2, axis2=-1)
    order = np.argsort(-(diagonal if shared else diagonal.mean(axis=0)), kind="stable")
    damping = np.maximum(_DAMPING * diagonal.mean(axis=-1), np.finfo(np.float32).tiny)
    h = moments[..., order[:, None], order] + damping[..., None, None] * np.eye(len(order))
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(h)), -2, -1)
    work, result = matrix[:, order].copy(), np.zeros_like(matrix)
    for j, column in enumerate(order):
        result[:, column] = nearest[column](work[:, j])
        pivot = upper[..., j, j]
        error = (work[:, j] - result[:, column]) / pivot
        work[:, j + 1 :] -= error[:, None] * upper[..., j, j + 1 :]
    return result


def _matrix(layer: Layer) -> NDArray[np.float64]:
    """``[outputs, inputs]``: of a convolution taps first and channels last; of a depthwise one taps alone."""
    weight = layer.weight.astype(np.float64)
    if layer.node.op_type == "Conv":
        return np.moveaxis(weight.reshape(*weight.shape[:2], -1), 1, 2).reshape(len(weight), -1)
    return weight if layer.axis == 0 else weight.T


def _from_matrix(layer: Layer, matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    shape = layer.weight.shape
    if layer.node.op_type == "Conv":
        new = np.moveaxis(matrix.reshape(len(matrix), -1, shape[1]), 2, 1).reshape(shape)
    else:
        new = matrix if layer.axis == 0 else matrix.T
    return np.ascontiguousarray(new, np.float32)


def _sum_with(result: ir.Value) -> ir.Value:
    """The sum of activations that a layer's result is part of and nothing else reads; else the result."""
    while len(uses := list(result.uses())) == 1 and uses[0][0].op_type == "Add":
        result = uses[0][0].outputs[0]
    return result


def _inputs(layers: Sequence[Layer], values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """``[places, taps, channels]`` at random places of the output, zero outside the volume."""
    if layers[0].node.op_type != "Conv":
        rows = values.reshape(-1, values.shape[-1])
        return rows[rng.integers(0, len(rows), PLACES)][:, None]
    sides = np.array(values.shape[2:])
    strides = np.array(layers[0].node.attributes.get_ints("strides", [1] * len(sides)))
    places = np.stack([rng.integers(0, -(-side // stride), PLACES) for side, stride in
                       zip(sides, strides, strict=True)], axis=1) * strides
    columns = []
    for layer in layers:
        kernel = layer.weight.shape[2:]
        pads = layer.node.attributes.get_ints("pads", [0] * 2 * len(sides))[: len(sides)]
        dilations = layer.node.attributes.get_ints("dilations", [1] * len(sides))
        for tap in np.ndindex(*kernel):
            at = places + np.array(tap) * dilations - np.array(pads)
            inside = np.asarray(((at >= 0) & (at < sides)).all(axis=1))
            read = values[0][(slice(None), *np.clip(at, 0, sides - 1).T)].T
            columns.append(read * inside[:, None])
    return np.stack(columns, axis=1)


def half_rounding(layer: Layer) -> Rounding:
    """To FP16."""
    del layer
    return lambda weights: weights.astype(np.float16).astype(np.float64)


def bfloat16_rounding(layer: Layer) -> Rounding:
    """To BF16."""
    del layer
    return lambda weights: weights.astype(ml_dtypes.bfloat16).astype(np.float64)


def integer_rounding(scales: NDArray[np.float64], levels: int) -> Rounding:
    """To whole multiples of each output's scale, up to ``levels`` of them."""
    return lambda weights: np.clip(np.rint(weights / scales), -levels, levels) * scales


def replace_weights(proto: onnx.ModelProto, weights: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """A graph with other values for some of its weights."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for tensor in found.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    return found
