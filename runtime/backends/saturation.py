"""Whether an inference library's INT8 convolutions are exact on this CPU.

x86 CPUs without VNNI multiply bytes by VPMADDUBSW, which adds two products and cuts their sum to 16 bits (Intel 64 and
IA-32 Architectures Software Developer's Manual, volume 2). Libraries that choose it lose what is beyond: cosines of 0.2
with float32 were seen for whole embeddings. No flag of a CPU tells what a library chooses, so it is given a sum that is
known.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DcformerWarning

#: ``x [1, 16, 4, 4] float32 -> y``: a convolution of 1x1 over 16 channels between QuantizeLinear and DequantizeLinear,
#: all weights 127. The tests make it anew.
SUM = Path(__file__).with_name("int8_sum.onnx")
CHANNELS, LARGEST = 16, 127
#: Of the output.
STEP = 4096.0


def largest_input() -> NDArray[np.float32]:
    """What makes every product the largest."""
    return np.full((1, CHANNELS, 4, 4), LARGEST, np.float32)


def is_exact(sums: NDArray[np.float32]) -> bool:
    """Whether the output is the true sum, rounded to a step."""
    return bool(np.all(np.abs(sums - CHANNELS * LARGEST**2) <= STEP))


@functools.cache
def warn(library: str) -> None:
    """Tell, once a process, that INT8 is computed otherwise here."""
    warnings.warn(f"int8: INT8 sums of {library} overflow on this CPU, which has no VNNI; they are computed in "
                  "float32, and fp32 is faster", DcformerWarning, stacklevel=6)
