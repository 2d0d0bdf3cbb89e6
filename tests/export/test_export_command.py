"""``dcformer export`` as a user meets it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refuse, run
from dicoms import write_series

from dcformer_deploy.export import registry
from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.cli.app import main
from golden import NANO


def test_export_prints_error_and_cosine(capsys, checkpoint: Path, tokenizer_folder: Path, ct: Path, tmp_path: Path):
    code, out, err = run(capsys, "export", checkpoint, "--tokenizer", tokenizer_folder, "--out", tmp_path / "b",
                         "--check-scan", ct)
    assert code == 0 and err == ""
    assert "largest relative error" in out and "1 - cosine" in out and "image_embedding" in out
    assert "dcformer-nano, input size 128, reduction channel" in out


@pytest.mark.thorough
def test_compared_on_dicom(capsys, checkpoint: Path, hounsfield: np.ndarray, tmp_path: Path):
    write_series(tmp_path / "s", hounsfield)
    assert run(capsys, "export", checkpoint, "--no-tokenizer", "--out", tmp_path / "b", "--check-scan",
               tmp_path / "s" / "*", "--without-rewrite", "stream_planes")[0] == 0
    assert load(tmp_path / "b").manifest.agreement


def test_untrained_weights_are_announced(capsys, ct: Path, tokenizer_folder: Path, tmp_path: Path):
    arguments = NANO.arguments()
    arguments.untrained = True
    torch.save({"model": NANO.state_dict(), "args": arguments}, tmp_path / "c.pth")
    assert run(capsys, "export", tmp_path / "c.pth", "--tokenizer", tokenizer_folder, "--out", tmp_path / "b",
               "--target", "any", "--json")[0] == 0
    code, out, err = run(capsys, "zeroshot", tmp_path / "b", ct, "--json")
    assert code == 0 and len(json.loads(out)) == 1 and "untrained weights: its scores mean nothing" in err


def test_termination_leaves_nothing_behind(checkpoint: Path, tmp_path: Path):
    """As a container does it: SIGTERM in the middle of an export."""
    program = Path(sys.executable).parent / "dcformer"
    process = subprocess.Popen([program, "export", checkpoint, "--no-tokenizer", "--target", "any", "--out",
                                tmp_path / "new" / "b"], stderr=subprocess.PIPE)
    while not list(tmp_path.rglob("image.fp32.onnx")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_bundles_only(capsys, checkpoint: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        refuse(capsys, "is not what this would replace", "export", checkpoint, "--no-tokenizer", "--force", "--out",
               tmp_path / name)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years of work"


def test_pickle_bomb(capsys, tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": Bomb()}, tmp_path / "c.pth")
    refuse(capsys, "would call posix.system", "export", tmp_path / "c.pth", "--no-tokenizer", "--out", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_export_errors(capsys, checkpoint: Path, tokenizer_folder: Path, bundle_copy: Path, tmp_path: Path):
    out = tmp_path / "out"
    refuse(capsys, "--tokenizer DIR is needed", "export", checkpoint, "--out", out)
    refuse(capsys, "exclude each other", "export", checkpoint, "--out", out, "--tokenizer", "x", "--no-tokenizer")
    refuse(capsys, "exists already", "export", checkpoint, "--out", bundle_copy, "--no-tokenizer")
    refuse(capsys, "no such checkpoint", "export", tmp_path / "none.pth", "--out", out, "--no-tokenizer")
    refuse(capsys, "no such tokenizer folder", "export", checkpoint, "--out", out, "--tokenizer", tmp_path / "none")
    refuse(capsys, "no such scan", "export", checkpoint, "--out", out, "--no-tokenizer", "--check-scan", tmp_path / "x")
    (tmp_path / "file").write_text("")
    refuse(capsys, "cannot write here|exists already", "export", checkpoint, "--out", tmp_path / "file" / "b",
           "--no-tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file"]


def test_failed_comparison_exits_with_one(capsys, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dcformer_deploy.export import verify

    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)
    refuse(capsys, "differs from PyTorch: .* by", "export", checkpoint, "--out", tmp_path / "b", "--no-tokenizer",
           "--target", "any", code=1)
    assert list(tmp_path.iterdir()) == []


def test_rewrites_are_shown_and_can_be_left_out(capsys, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "--no-tokenizer", "--out", str(out), "--input", "volume", "--target",
                 "any", "--without-rewrite", "fold_layer_scale", "--show-rewrites"]) == 0
    shown = capsys.readouterr().out
    assert "compose_stem" in shown and "Rewrites of the image tower" in shown
    assert not {"line_input", "stream_planes", "fold_layer_scale"} & set(shown.split())
    model = load(out)
    assert [info.name for info in model.manifest.graphs[0].inputs] == ["volume"]
    assert [rewrite.rule for rewrite in model.manifest.rewrites] == [
        "mlp_to_convolutions", "fold_projection", "sink_transposes", "compose_stem", "merge_branches"]
    assert main(["inspect", str(out)]) == 0
    assert "compose_stem" in capsys.readouterr().out


class _Branching(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.project = torch.nn.AvgPool3d((16, 32, 32)), torch.nn.Conv3d(1, 64, 1)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        if volume.sum() > 0:
            volume = volume + 1
        return self.project(self.pool(volume)).permute(0, 1, 3, 4, 2)


def test_an_encoder_that_cannot_be_traced(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    registry.all_encoders()
    monkeypatch.setitem(registry._REGISTRY, "branching", registry.EncoderSpec(
        "branching", build=lambda size: _Branching(), channels=64, stride_dhw=(16, 32, 32)))
    refuse(capsys, "the image tower cannot be traced: .* line [0-9]+. Its forward must not branch on values", "export",
           "--encoder", "branching", "--random-weights", "0", "--input-size", "64", "--out", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_unknown_rewrite(capsys, checkpoint: Path, tmp_path: Path):
    refuse(capsys, "rewrite rule 'fold': unknown", "export", checkpoint, "--no-tokenizer", "--out", tmp_path / "b",
           "--without-rewrite", "fold")
