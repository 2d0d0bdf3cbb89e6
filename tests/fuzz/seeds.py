"""The good files that cases are made from, made once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import dicoms
import numpy as np
import safetensors.torch

import golden
import scans
from dcformer_deploy.export.make_bundle import ExportOptions, export_checkpoint
from dcformer_deploy.export.random_weights import vocabulary
from dcformer_deploy.runtime.cli.app import main


@dataclass(frozen=True)
class Seeds:
    """Paths of good files: a bundle, scans, checkpoints, and what the program makes of them."""

    bundle: Path
    nifti: Path
    dicom: Path
    checkpoint: Path
    safetensors: Path
    tokenizer: Path
    store: Path
    prepared: Path


def make_seeds(folder: Path, bundle: Path | None = None) -> Seeds:
    """Make them all in ``folder``.

    Args:
        bundle: of the golden nano checkpoint, where there is one already; exporting takes most of the time.
    """
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    words = vocabulary()
    (tokenizer / "vocab.txt").write_text(
        "\n".join([*words, *(f"[unused{i}]" for i in range(512 - len(words)))]) + "\n"
    )
    checkpoint = golden.NANO.save(folder / "nano.pth")
    state = {key: value.clone().contiguous() for key, value in golden.NANO.state_dict().items()}
    safetensors.torch.save_file(state, folder / "nano.safetensors")
    if bundle is None:
        bundle = folder / "bundle"
        export_checkpoint(checkpoint, bundle, ExportOptions(tokenizer=tokenizer))
    chest = _chest()
    nifti = scans.write(folder / "scan.nii", chest)
    dicoms.write_series(folder / "dicom", chest[:, :, :9])
    for command in (
        ["embed", str(bundle), str(nifti), "--out", str(folder / "store")],
        ["prepare", str(bundle), str(nifti), "--out", str(folder / "prepared")],
    ):
        if _quietly(command) != 0:
            raise RuntimeError(f"dcformer {' '.join(command)} failed on good files")
    return Seeds(
        bundle,
        nifti,
        folder / "dicom",
        checkpoint,
        folder / "nano.safetensors",
        tokenizer,
        folder / "store",
        folder / "prepared",
    )


def _quietly(command: list[str]) -> int:
    """In a child: a process that has run inference has threads, and can then not be forked."""
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(command))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _chest() -> np.ndarray:
    """[x, y, z] int16: air around and inside a body."""
    random = np.random.default_rng(3)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in (26, 24, 14)), indexing="ij")
    body = np.where(x**2 + y**2 < 0.8, 40, -1000) + np.where((abs(x) - 0.4) ** 2 + y**2 < 0.08, -800, 0)
    return np.clip(body + random.normal(0, 20, x.shape), -1024, 3071).astype(np.int16)
