"""Read the tensors of a checkpoint file without running any code that the file brings."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...runtime.errors import InputError
from ...runtime.files import require_file

#: Keys under which training scripts store the state dict beside optimizer and arguments.
_STATE_DICT_KEYS = ("model", "state_dict")
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace | None]:
    """State dict and training arguments (None when the file holds no arguments).

    Accepts a ``torch.save`` file (training checkpoint or bare state dict) and ``.safetensors``. A leading
    ``module.`` of DistributedDataParallel is removed.

    Raises:
        InputError: no such file, another format, damaged, or a pickle that names anything but tensors.
    """
    require_file(path, "checkpoint")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":  # safetensors: eight bytes of header length, then JSON
        content: Any = _read_safetensors(path)
    elif head[:4] == b"PK\x03\x04":
        content = _read_torch(path, is_zip=True)
    elif head[:1] == b"\x80":
        content = _read_torch(path, is_zip=False)
    else:
        raise InputError(f"{path}: not a checkpoint (neither a torch.save file nor safetensors)")

    arguments = None
    if isinstance(content, dict):
        found = content.get("args")
        if isinstance(found, dict) and all(isinstance(key, str) for key in found):
            found = argparse.Namespace(**found)
        arguments = found if isinstance(found, argparse.Namespace) else None
        nested = [content[key] for key in _STATE_DICT_KEYS if isinstance(content.get(key), dict)]
        content = nested[0] if nested else content
    if not isinstance(content, dict) or not content or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise InputError(f"{path}: holds no state dict; expected tensors by name, or such a dict under 'model'")
    for key, value in content.items():
        _require_plain(path, key, value)
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content, arguments


def _require_plain(path: Path, key: str, value: Tensor) -> None:
    """A dense tensor of a common type whose elements are all really in the file."""
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        kind = f"{value.layout} tensor on {value.device}" + ", quantized" * value.is_quantized
        raise InputError(f"{path}: {key} is a {kind}; expected a plain one")
    if value.dtype not in _TYPES:
        raise InputError(f"{path}: {key} is {value.dtype}; expected 16, 32 or 64 bit numbers")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(f"{path}: {key} claims shape {list(value.shape)} but the file holds fewer numbers")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged safetensors file ({_first_line(error)}); copy it again") from error


def _read_torch(path: Path, is_zip: bool) -> Any:
    if is_zip:
        _check_archive(path)
    try:
        # The published training script saves its argparse.Namespace; it holds data only, so it alone is let through.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes make the unpickler raise almost anything; all of it means "refused"
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path}: refused: loading it would call {name[1]}, and a checkpoint needs only tensors. "
                "If you trust its origin, load it yourself and save the state dict alone"
            ) from error
        # torch wraps the reason in a paragraph of advice, to load unsafely among others; the reason is the inner error.
        inner = error.__context__ if isinstance(error.__context__, Exception) else error
        raise InputError(f"{path}: damaged or not a PyTorch checkpoint ({_first_line(inner)})") from error


def _check_archive(path: Path) -> None:
    """torch.save stores its records uncompressed: a compressed one can only be there to expand without limit."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            # torch itself does not compare the checksums.
            damaged = None if compressed else archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged or truncated checkpoint ({_first_line(error)}); copy it again") from error
    if damaged:
        raise InputError(f"{path}: record {damaged!r} does not match its checksum: damaged; copy the file again")
    if compressed:
        raise InputError(f"{path}: refused: record {compressed[0]!r} is compressed, which torch.save never does")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
