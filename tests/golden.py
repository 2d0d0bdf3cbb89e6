"""The golden cases: weights as a function of key and shape, inputs, and what the original code made of them.

The numbers in tests/data were produced by the original DCFormer code with exactly these weights and inputs.
"""

import argparse
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    name: str
    encoder: str
    model: str
    reduction: str

    @property
    def expected(self) -> dict[str, np.ndarray]:
        return dict(np.load(DATA / f"{self.name}.npz"))

    @property
    def shapes(self) -> dict[str, list[int]]:
        return json.loads((DATA / f"{self.name}.keys.json").read_text())

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(np.asarray(weight(key, tuple(shape)))) for key, shape in self.shapes.items()}

    def arguments(self) -> argparse.Namespace:
        """As the original training script saves them."""
        return argparse.Namespace(model=self.model, reduction=None if self.reduction == "none" else self.reduction,
                                  input_size=128, lr=1e-5, device="cuda")

    def save(self, path: Path) -> Path:
        """The original training checkpoint."""
        torch.save({"model": self.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3,
                    "scaler": {"scale": 1.0}, "args": self.arguments()}, path)
        return path


NANO = Case("decomp_nano-channel-128", "dcformer-nano", "decomp_nano", "channel")
CASES = (NANO, Case("decomp_naive-depth-128", "dcformer-naive", "decomp_naive", "depth"),
         Case("decomp_nano-none-128", "dcformer-nano", "decomp_nano", "none"))


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor as a function of its name in the checkpoint and its shape."""
    # c1.1 and norm.0 are one tensor, drawn under its norm.* name.
    if twin := re.fullmatch(r"(.*)\.c([123])\.1\.(\w+)", key):
        key = f"{twin[1]}.norm.{int(twin[2]) - 1}.{twin[3]}"
    leaf = key.rsplit(".", 1)[-1]
    seed_of = key.rsplit(".", 1)[0] if leaf in ("embed", "embed_avg") else key
    random = np.random.RandomState(zlib.crc32(seed_of.encode()) & 0x7FFFFFFF)
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf in ("initted", "cluster_size"):
        return np.ones(shape, np.float32)
    if leaf == "running_var":
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf in ("gamma", "scale"):
        return random.uniform(0.5, 1.0, shape).astype(np.float32)
    if len(shape) == 1 and leaf == "weight":
        return random.uniform(0.8, 1.2, shape).astype(np.float32)
    normal = random.standard_normal(shape)
    if leaf in ("embed", "embed_avg"):
        return (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)
    if len(shape) == 1:
        return (0.1 * normal).astype(np.float32)
    return (normal * max(1, int(np.prod(shape[1:]))) ** -0.5).astype(np.float32)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image [2, 1, 64, 128, 128], token ids and attention mask [4, 24]."""
    random = np.random.RandomState(7)
    image = np.clip(random.standard_normal((2, 1, 64, 128, 128)) * 0.7 - 0.2, -1, 1).astype(np.float32)
    ids = random.randint(5, 512, (4, 24))
    mask = np.ones_like(ids)
    mask[1::2, 15:] = 0
    ids[mask == 0] = 0
    return image, ids, mask


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
