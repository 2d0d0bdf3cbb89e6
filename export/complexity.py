"""Parameters and multiply-accumulates of an encoder, counted the way the published tables count them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .clip import reduced_width
from .registry import EMBEDDING_DIM, EncoderSpec, all_encoders

#: What a normalisation with weight and bias costs per element in the published count (fvcore's convention).
NORM_OPERATIONS_PER_ELEMENT = 5


@dataclass(frozen=True)
class Complexity:
    """``multiply_accumulates`` of one forward pass of batch 1; ``params`` of the encoder without any head."""

    params: int
    multiply_accumulates: int


def count(spec: EncoderSpec, input_size: int | None = None) -> Complexity:
    """Count for volumes of (S/2, S, S), the published S by default.

    On shapes alone: nothing is allocated or computed, so every size takes well under a second.

    The published count is fvcore's with the module in training mode: one operation per multiply-add of convolutions
    and matrix products, five per element of BatchNorm and LayerNorm, none for anything else. fvcore itself needs real
    tensors (gigabytes and minutes at full size, and it silently drops convolutions on the meta device), so torch's
    own counter does the counting; a test holds the two equal.
    """
    input_size = input_size or spec.input_size
    with torch.device("meta"):
        encoder = spec.build(input_size).train()
        volume = torch.empty(1, 1, input_size // 2, input_size, input_size)

    norm_elements = 0

    def count_norm(input_shape: torch.Size, *_args: object, **_kwargs: object) -> int:
        nonlocal norm_elements
        norm_elements += math.prod(input_shape)
        return 0

    aten = torch.ops.aten
    norms = (aten.native_batch_norm, aten._native_batch_norm_legit, aten.native_layer_norm)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict.fromkeys(norms, count_norm)) as counter:
        encoder(volume)
    products = counter.get_total_flops() // 2  # torch counts a multiply-add as two
    return Complexity(
        params=sum(p.numel() for p in encoder.parameters()),
        multiply_accumulates=products + NORM_OPERATIONS_PER_ELEMENT * norm_elements,
    )


@dataclass(frozen=True)
class EncoderRow:
    """One line of ``dcformer encoders``; ``params_m`` is counted with the same parts as the published figure."""

    name: str
    input_size: int
    params_m: float
    gflops: float
    published_params_m: float | None
    published_gflops: float | None
    includes_projection: bool
    published_f1: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON output."""
        return asdict(self)


def table() -> list[EncoderRow]:
    """Count every registered encoder at the published size."""
    rows = []
    for spec in all_encoders():
        counted, published = count(spec), spec.published
        projection = 0
        if published is not None and published.params_include_projection:
            projection = reduced_width(spec.reduction, spec.grid(spec.input_size), spec.channels) * EMBEDDING_DIM
        rows.append(EncoderRow(
            name=spec.name,
            input_size=spec.input_size,
            params_m=(counted.params + projection) / 1e6,
            gflops=counted.multiply_accumulates / 1e9,
            published_params_m=published.params_m if published else None,
            published_gflops=published.gflops if published else None,
            includes_projection=projection > 0,
            published_f1=published.zero_shot_f1 if published else None,
        ))
    return rows
