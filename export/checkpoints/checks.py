"""What the tensors of any checkpoint must be: those of the model, finite, and named as this project names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.errors import InputError
from ..clip import ClipSpec


def require_fit(path: Path, spec: ClipSpec, tensors: Mapping[str, Tensor]) -> None:
    """Keys, shapes and kinds of number must be those of the model."""
    with torch.device("meta"):
        expected = spec.build().state_dict()
    require_same_keys(path, {key: tuple(value.shape) for key, value in expected.items()},
                       {key: tuple(value.shape) for key, value in tensors.items()}, spec.encoder.name)
    for key, value in expected.items():
        if value.is_floating_point() != tensors[key].is_floating_point():
            raise InputError(f"{path}: {key} is {tensors[key].dtype}; expected "
                             f"{'floating point' if value.is_floating_point() else 'integers'} (quantized weights have "
                             "lost their scale)")


def with_both_norm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every BatchNorm is saved as ``c1.1`` and ``norm.0``; safetensors drops one name of tensors that share memory."""
    complete = dict(tensors)
    for key, value in tensors.items():
        if twin := _twin_name(key):
            complete.setdefault(twin, value)
    return complete


def _twin_name(key: str) -> str | None:
    match = re.fullmatch(r"(.*)\.(c[123]\.1|norm\.[012])\.(\w+)", key)
    if match is None:
        return None
    stem, slot, leaf = match.groups()
    return f"{stem}.{f'norm.{int(slot[1]) - 1}' if slot.startswith('c') else f'c{int(slot[-1]) + 1}.1'}.{leaf}"


def require_equal_twins(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Both names of a norm must hold the same numbers."""
    for key, value in tensors.items():
        if (twin := _twin_name(key)) and not torch.equal(tensors[twin].double(), value.double()):
            raise InputError(f"{path}: {key} and {twin} must be the same tensor but differ; the file was edited or "
                             "merged from two trainings")


def require_same_keys(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]],
                      name: str, prefix: str = "") -> None:
    """Names and shapes must be those expected of ``name``; ``prefix`` is what the file has before each."""
    problems = []
    for what, keys in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if keys:
            problems.append(f"{len(keys)} {what} ({_some(prefix + key for key in sorted(keys))})")
    misshaped = [key for key in sorted(expected.keys() & found.keys()) if expected[key] != found[key]]
    if misshaped:
        shown = (f"{prefix}{key} is {list(found[key])}, expected {list(expected[key])}" for key in misshaped)
        problems.append(f"{len(misshaped)} misshaped ({_some(shown)})")
    if problems:
        raise InputError(f"{path}: tensors do not fit {name}: {'; '.join(problems)}")


def _some(items: Iterable[str], limit: int = 10) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """No tensor may hold NaN or infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {key} holds NaN or infinity; the training diverged or the file is damaged")
