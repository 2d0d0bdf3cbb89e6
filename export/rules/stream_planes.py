"""The stem plane by plane, so that what one layer writes is still in the cache when the next one reads it.

The stem's layers are wide (134 MB each in nano at 512x512x256) and short (a few multiply-adds per number), so a CPU
that computes them one after the other waits for its memory. Every layer is local: plane p of its output along D needs
few planes of its input. With x_p the plane p of x, ``[B, C, H, W]``, zero outside the volume:

    y = sum_a K_a * x  along the axes a   ->   y_p = K_H * x_{sp} + K_W * x_{sp} + sum_k K_D[k] x_{sp + k - pad}
    z = MaxPool(y)                        ->   z_p = max_k MaxPool_HW(y_{sp + k - pad})

with kernels of two dimensions on the right and s the stride along D. Terms outside the volume are left out, the tap of
K_D that reads the plane of K_H is added to it, and where x has one channel, neighbouring planes are the channels of one
product, or of a copy if the kernels are one-hot. The sums run in another order, no more. The graph computes plane by
plane through all layers, from its input to where the first other operator reads: 2 MB per plane and layer, which stay
in the cache.

Whether it is faster depends on caches and on the library; it is measured, not known (``pipeline.MEASURED``).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from .base import Refused, sides_of
from .convolution import convolution_of
from .plane_sums import PlaneSum, Tap, inputs_of, operator, plane_sum

TITLE = "stream_planes"
#: Plane 7 of a value x is called x@7, all planes put together again x@.
PLANE = "@"


class StreamPlanes:
    """The whole rewrite: one pattern cannot say how many planes there are. See the module and ``pipeline.Step``."""

    def __init__(self) -> None:
        self.title = TITLE
        self.refused: list[str] = []

    def apply(self, model: ir.Model) -> int:
        """Rewrite in place; returns how many operators over volumes are now streamed."""
        self.refused = []
        region = _find_region(model.graph)
        if not any(operator(value) == "Conv" and inputs_of(value)[0] in region for value in region):
            return 0
        leaving = [value for value in region if any(use.outputs[0] not in region for use, _ in value.uses())]
        try:
            if len(leaving) != 1 or any(value.is_graph_output() for value in region):
                raise Refused(f"{len(leaving)} volumes are read by other operators, not one")
            readers = [use for use, _ in leaving[0].uses()]
            stream = _Stream(region)
            stacked = stream.volume(leaving[0])
        except Refused as reason:
            self.refused.append(f"{leaving[0].name if leaving else TITLE}: {reason}")
            return 0
        model.graph.insert_before(next(node for node in model.graph if node in readers), stream.tape.nodes)
        for value in stream.tape.initializers:
            model.graph.initializers[str(value.name)] = value
        ir.convenience.replace_all_uses_with(leaving[0], stacked)
        return len(region)


def _find_region(graph: ir.Graph) -> dict[ir.Value, None]:
    """Values that can be computed plane by plane, in the graph's order."""
    region: dict[ir.Value, None] = {}
    for node in graph:
        try:
            if _is_local(node, region):
                sides_of(node.outputs[0])
                region[node.outputs[0]] = None
        except Refused:
            continue
    return region


def _is_local(node: ir.Node, region: dict[ir.Value, None]) -> bool:
    """Whether it is a dense convolution along an axis, a sum, a concatenation or a max-pool, of values of the region.

    A convolution of a volume of one channel begins a region.
    """
    inside = all(x in region for x in node.inputs if x is not None and x.const_value is None)
    if node.op_type == "Conv":
        convolution = convolution_of(node.outputs[0])
        sides_of(convolution.x)
        # Asking for the axis refuses kernels along none or several.
        return convolution.group == 1 and convolution.axis >= 0 and (inside or convolution.weight.shape[1] == 1)
    if node.op_type == "MaxPool":
        given = node.attributes
        return (inside and len(node.outputs) == 1 and given.get_string("auto_pad", "NOTSET") == "NOTSET"
                and not given.get_int("ceil_mode", 0) and set(given.get_ints("dilations", [1])) == {1})
    if node.op_type == "Concat":
        return inside and node.attributes.get_int("axis") == 1
    return node.op_type == "Add" and inside and all(x is not None and x.const_value is None for x in node.inputs)


class _Stream:
    """Makes planes when they are asked for, each once; so the order of the nodes is that of a stream."""

    def __init__(self, region: dict[ir.Value, None]) -> None:
        self.tape = Tape()
        self._whole = {x for value in region for x in inputs_of(value) if x not in region and x.const_value is None}
        self._planes: dict[tuple[ir.Value, int], ir.Value] = {}
        self._pooled: dict[tuple[ir.Value, int], ir.Value] = {}
        self._sums: dict[ir.Value, PlaneSum] = {}
        self._without_channels: dict[ir.Value, ir.Value] = {}
        self._fills: dict[tuple[object, ...], ir.Value] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def volume(self, value: ir.Value) -> ir.Value:
        """All planes of a value, ``[B, C, D, H, W]``."""
        planes = [self._op("Unsqueeze", self.plane(value, index), self._integers(2))
                  for index in range(sides_of(value)[0])]
        stacked = self._op("Concat", *planes, axis=2)
        stacked.name = f"{value.name}{PLANE}"
        return stacked

    def plane(self, value: ir.Value, index: int) -> ir.Value:
        """One plane, ``[B, C, H, W]``."""
        if (value, index) not in self._planes:
            if value in self._whole:
                self._split(value)
            else:
                found = self._compute(value, index)
                # So that what is known of a value, such as its range, is known of its planes.
                found.name = f"{value.name}{PLANE}{index}"
                self._planes[value, index] = found
        return self._planes[value, index]

    def _compute(self, value: ir.Value, index: int) -> ir.Value:
        if operator(value) == "MaxPool":
            return self._pool(value, index)
        parts = self._parts(value, index)
        return parts[0] if len(parts) == 1 else self._op("Concat", *parts, axis=1)

    def _parts(self, value: ir.Value, index: int) -> list[ir.Value]:
        """The plane's channels in one or several pieces."""
        if operator(value) == "Concat":
            return [piece for part in inputs_of(value) for piece in self._parts(part, index)]
        if operator(value) == "MaxPool":
            return [self.plane(value, index)]
        if value not in self._sums:
            self._sums[value] = plane_sum(value, self._whole)
        recipe = self._sums[value]
        if (copied := recipe.copied) is not None:
            return self._copy(*copied, index)
        return [self._add(recipe, index)]

    def _add(self, recipe: PlaneSum, index: int) -> ir.Value:
        total, bias = None, recipe.bias
        for tap in recipe.taps:
            start, end, low = _reach(tap, index)
            if start >= end:
                continue
            weight = tap.weight if tap.count == 1 else tap.weight[:, start - low : end - low]
            x = self.plane(tap.x, start) if tap.count == 1 else self._window(tap.x, start, end)
            before, after = zip(*tap.pads, strict=True)
            term = self._op("Conv", x, *map(self._constant, [weight] if bias is None else [weight, bias]),
                            kernel_shape=list(weight.shape[2:]), strides=list(tap.strides), pads=[*before, *after],
                            dilations=list(tap.dilations))
            # A library that adds to what is there already does so with the convolution as the first operand.
            total, bias = term if total is None else self._op("Add", term, total), None
        for addend in recipe.addends:
            plane = self.plane(addend, index)
            total = plane if total is None else self._op("Add", plane, total)
        if total is None or bias is not None:
            raise Refused("a plane reads nothing inside the volume")
        return total

    def _copy(self, tap: Tap, constants: NDArray[np.float32], index: int) -> list[ir.Value]:
        start, end, low = _reach(tap, index)
        if start >= end:
            raise Refused("a plane reads nothing inside the volume")
        zeros = [self._fill(tap.x, 0.0, count) for count in (start - low, low + tap.count - end)]
        pieces = [zeros[0], self._window(tap.x, start, end), zeros[1], *(self._fill(tap.x, c, 1) for c in constants)]
        return [piece for piece in pieces if piece is not None]

    def _pool(self, value: ir.Value, index: int) -> ir.Value:
        (x,), node = inputs_of(value), value.producer()
        assert node is not None
        kernel, strides, pads = (list(node.attributes.get_ints(name, default)) for name, default in
                                 (("kernel_shape", []), ("strides", [1] * 3), ("pads", [0] * 6)))
        low = index * strides[0] - pads[0]
        planes = []
        for plane in range(max(low, 0), min(low + kernel[0], sides_of(x)[0])):
            if (x, plane) not in self._pooled:
                self._pooled[x, plane] = self._op("MaxPool", self.plane(x, plane), kernel_shape=kernel[1:],
                                                  strides=strides[1:], pads=[*pads[1:3], *pads[4:]])
            planes.append(self._pooled[x, plane])
        return self._op("Max", *planes) if len(planes) > 1 else planes[0]

    # ------------------------------------------------------------------ volumes of one channel

    def _as_image(self, value: ir.Value) -> ir.Value:
        """Without its channel, so that planes are channels: ``[B, D, H, W]``."""
        if value not in self._without_channels:
            self._without_channels[value] = self._op("Squeeze", value, self._integers(1))
        return self._without_channels[value]

    def _window(self, value: ir.Value, start: int, end: int) -> ir.Value:
        return self._op("Slice", self._as_image(value), *map(self._integers, (start, end, 1)))

    def _split(self, value: ir.Value) -> None:
        depth = sides_of(value)[0]
        planes = self.tape.op_multi_out("Split", [self._as_image(value)], {"axis": 1, "num_outputs": depth},
                                        num_outputs=depth)
        self._planes |= {(value, index): plane for index, plane in enumerate(planes)}

    def _fill(self, like: ir.Value, number: float, count: int) -> ir.Value | None:
        """Constant planes ``[B, count, H, W]`` with the batch of ``like``; None for none."""
        key = (like, float(number), count)
        if count and key not in self._fills:
            batch = self._op("Shape", like, start=0, end=1)
            shape = self._op("Concat", batch, self._integers(count, *sides_of(like)[1:]), axis=0)
            self._fills[key] = self._op("Expand", self._constant(np.array(number, np.float32)), shape)
        return self._fills[key] if count else None

    def _op(self, kind: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes)

    def _integers(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _constant(self, array: NDArray[np.generic]) -> ir.Value:
        key = (array.shape, array.dtype.str, array.tobytes())
        if key not in self._constants:
            tensor = ir.tensor(np.asarray(array, order="C"), name=f"{TITLE}.{len(self._constants)}")
            self._constants[key] = self.tape.initializer(tensor)
        return self._constants[key]


def _reach(tap: Tap, index: int) -> tuple[int, int, int]:
    """Planes that a tap reads for plane ``index`` of the output: inside the volume from, to, and where they begin."""
    low = index * tap.stride + tap.first
    return max(low, 0), min(low + tap.count, sides_of(tap.x)[0]), low
