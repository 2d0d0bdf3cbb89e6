"""The encoders this project knows; one joins by adding one file to ``export/encoders/`` that registers itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.errors import InputError, suggestion

if TYPE_CHECKING:
    from torch import nn

#: Width of the joint image-text space of every published model.
EMBEDDING_DIM = 512


@dataclass(frozen=True)
class Published:
    """Figures of the published tables (README of the original repository), at 512x512x256.

    ``gflops`` counts multiply-accumulates. ``params_include_projection`` says whether the published parameter count
    holds the Linear to the 512-wide joint space besides the encoder: it differs from row to row of the table.
    """

    params_m: float
    gflops: float
    params_include_projection: bool
    zero_shot_f1: float | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """How one image encoder is built and what it accepts.

    ``build()`` returns a module mapping ``[B, 1, D, H, W]`` to ``[B, channels, H/stride, W/stride, D/stride]``.
    ``checkpoint_name`` is the name used in ``args.model`` of the original training checkpoints.
    """

    name: str
    build: Callable[[], nn.Module]
    channels: int
    stride: int
    checkpoint_name: str | None = None
    published: Published | None = None

    def grid(self, input_size: int) -> tuple[int, int, int]:
        """Output grid (D', H', W') for a volume of (input_size/2, input_size, input_size)."""
        return input_size // 2 // self.stride, input_size // self.stride, input_size // self.stride


_REGISTRY: dict[str, EncoderSpec] = {}


def register(spec: EncoderSpec) -> None:
    """Add an encoder; a name can be taken once."""
    if spec.name in _REGISTRY:
        raise ValueError(f"encoder {spec.name!r} is registered twice")
    _REGISTRY[spec.name] = spec


def all_encoders() -> list[EncoderSpec]:
    """Every registered encoder, in registration order, after importing all files of ``export/encoders``."""
    from . import encoders

    for module in pkgutil.iter_modules(encoders.__path__):
        importlib.import_module(f"{encoders.__name__}.{module.name}")
    return list(_REGISTRY.values())


def get_encoder(name: str) -> EncoderSpec:
    """The encoder of that name.

    Raises:
        InputError: no such encoder; the message names the nearest one.
    """
    specs = {spec.name: spec for spec in all_encoders()}
    if name not in specs:
        raise InputError(f"encoder {name!r}: unknown{suggestion(name, specs)}. `dcformer encoders` lists all")
    return specs[name]
