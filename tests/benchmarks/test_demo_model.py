"""The trained model that is shipped: its size, what it says of itself, and that it still reads phantoms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import golden
from dcformer_deploy.benchmarks.evaluation.dataset import Tables, read_dataset
from dcformer_deploy.benchmarks.phantom import demo, trainer
from dcformer_deploy.benchmarks.phantom.dataset import DatasetOptions, write_dataset
from dcformer_deploy.export.checkpoints import read_checkpoint
from dcformer_deploy.export.make_bundle import ExportOptions, export_checkpoint
from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.manifest import CT_RATE_CLASSES

FOLDER = golden.REPOSITORY / "benchmarks" / "phantom" / "model"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "bundle"
    export_checkpoint(FOLDER / "checkpoint.pth", out, ExportOptions(tokenizer=FOLDER / "tokenizer"))
    return out


def test_it_is_small_and_in_the_original_format():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    checkpoint = read_checkpoint(FOLDER / "checkpoint.pth")
    assert checkpoint.trained
    assert (checkpoint.spec.encoder.name, checkpoint.spec.input_size) == ("dcformer-nano", trainer.INPUT_SIZE)
    assert checkpoint.spec.codebook_size == trainer.CODEBOOK_SIZE
    assert checkpoint.preprocessing["spacing_hwd_mm"] == trainer.PREPROCESSING.spacing_hwd_mm
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "**" in card
    assert "not for clinical use" in card


def test_demo_prints_scores_beside_the_truth(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    findings = ("Pleural effusion", "Cardiomegaly")
    write_dataset(tmp_path / "phantom", DatasetOptions(1, 77, findings=findings), workers=1)
    case, = read_dataset(tmp_path / "phantom", CT_RATE_CLASSES, Tables())
    model = load(bundle)
    demo.show(model, case, tmp_path / "phantom.png")
    lines = capsys.readouterr().out.splitlines()
    for name, score in model.zero_shot(case.path).scores.items():
        row = next(line for line in lines if line.strip(" │").startswith(name + " "))
        assert f"{score:.3f}" in row
        assert ("present" in row) == (name in findings)
    assert (tmp_path / "phantom.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_ranks_phantoms_it_was_not_trained_on(bundle: Path, tmp_path: Path):
    """A coarse guard on 32 phantoms; `make evaluate` has the figures of the model card, on 300."""
    write_dataset(tmp_path / "phantoms", DatasetOptions(32, 4321), workers=2)
    cases = read_dataset(tmp_path / "phantoms", CT_RATE_CLASSES, Tables())
    model = load(bundle)
    scores = np.array([list(model.zero_shot(case.path).scores.values()) for case in cases])
    labels = np.array([case.labels for case in cases])
    assert np.mean([roc_auc_score(labels[:, i], scores[:, i]) for i in range(len(CT_RATE_CLASSES))]) > 0.97
