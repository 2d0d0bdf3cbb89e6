"""How much noise a precision adds to each activation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from .observe import BUDGET_BYTES, activation_bytes, open_part, split_by_bytes

#: Stands for an activation that is exactly the same.
EXACT_DB = 200.0


@dataclass(frozen=True)
class LayerNoise:
    """Signal to quantization noise of an activation: ``10 log10(sum x^2 / sum (x - y)^2)`` over all scans, in dB."""

    activation: str
    operator: str
    sqnr_db: float


def signal_to_noise_db(signal: float, noise: float) -> float:
    """Of two energies."""
    return EXACT_DB if noise == 0 or signal == 0 else float(10 * np.log10(signal / noise))


def energy(x: NDArray[np.floating], y: NDArray[np.floating] | None = None) -> float:
    """``sum (x - y)^2``, or ``sum x^2``, in float64."""
    return float(np.square(x if y is None else x - y.astype(np.float32), dtype=np.float64).sum())


def layer_noise(reference: onnx.ModelProto, graph: onnx.ModelProto, feeds: Sequence[Mapping[str, NDArray[np.floating]]],
                threads: int, budget_bytes: int = BUDGET_BYTES) -> tuple[LayerNoise, ...]:
    """Compare the activations that both graphs have under the same name; noisiest first.

    Args:
        feeds: inputs of the reference by scan; cast to what the other graph reads.
    """
    made_by = {name: node.op_type for node in reference.graph.node for name in node.output}
    there = {name for node in graph.graph.node for name in node.output}
    sizes = {name: size for name, size in activation_bytes(reference).items() if name in there}
    kinds = {entry.name: onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
             for entry in graph.graph.input}
    noise = []
    for group in split_by_bytes(sizes, budget_bytes // 2):
        sessions = [open_part(proto, group, threads) for proto in (reference, graph)]
        signal, error = dict.fromkeys(group, 0.0), dict.fromkeys(group, 0.0)
        for feed in feeds:
            values = []
            for session, cast in zip(sessions, (None, kinds), strict=True):
                wanted = {entry.name: feed[entry.name] if cast is None else feed[entry.name].astype(cast[entry.name])
                          for entry in session.get_inputs()}
                values.append(session.run(group, wanted))
            for name, x, y in zip(group, *values, strict=True):
                signal[name] += energy(x)
                error[name] += energy(x, y)
        noise += [LayerNoise(name, made_by[name], signal_to_noise_db(signal[name], error[name])) for name in group]
    return tuple(sorted(noise, key=lambda entry: entry.sqnr_db))
