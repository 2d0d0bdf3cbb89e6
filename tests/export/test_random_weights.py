"""Every encoder becomes a graph that computes what PyTorch computes; bundles without a checkpoint say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from dcformer_deploy.export.clip import Clip
from dcformer_deploy.export.random_weights import random_checkpoint
from dcformer_deploy.export.registry import all_encoders, get_encoder
from dcformer_deploy.export.trace import trace_image_tower
from dcformer_deploy.export.verify import check_image_tower, require_agreement
from dcformer_deploy.runtime import load
from dcformer_deploy.runtime.cli.app import main

#: The smallest of each family run always; the others with `make test-all`.
QUICK = {"convnext-nano", "ctvit-ctclip", "dcformer-nano", "poolformer-nano",
         "transunet-naive", "vit-naive"}


@pytest.mark.parametrize("name", [
    pytest.param(spec.name, marks=[] if spec.name in QUICK else pytest.mark.thorough) for spec in all_encoders()])
def test_graph_computes_what_pytorch_computes(name: str, tmp_path: Path):
    size = 2 * get_encoder(name).size_step
    checkpoint = random_checkpoint(name, seed=1, input_size=size)
    model = checkpoint.build()
    assert isinstance(model, Clip)
    onnx.save(trace_image_tower(model, checkpoint.spec), tmp_path / "image.onnx")
    rng = np.random.default_rng(0)
    volumes = {f"batch of {count}": rng.uniform(-1, 1, (count, size // 2, size, size)).astype(np.float32)
               for count in (1, 3)}  # traced with 2
    found = check_image_tower(model, [tmp_path / "image.onnx"], volumes)
    require_agreement(found)
    assert {(item.output, item.input) for item in found} >= {("feature_map", "batch of 3"),
                                                            ("image_embedding", "batch of 1")}


def test_the_seed_decides():
    first, again, other = (random_checkpoint("dcformer-nano", seed, 128).state_dict for seed in (1, 1, 2))
    key = "visual_transformer.encoder.s0.0.0.c1.0.weight"
    assert (first[key] == again[key]).all() and not (first[key] == other[key]).all()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random") / "bundle"
    assert main(["export", "--encoder", "vit-naive", "--random-weights", "7", "--input-size", "64", "--out",
                 str(out)]) == 0
    return out


def test_bundle_says_that_it_is_untrained(untrained: Path, capsys: pytest.CaptureFixture[str]):
    manifest = load(untrained).manifest
    assert (manifest.encoder, manifest.input_size, manifest.source.trained) == ("vit-naive", 64, False)
    assert (manifest.source.file, manifest.source.sha256, manifest.source.random_seed) == (None, None, 7)
    assert main(["inspect", str(untrained)]) == 0
    assert "random weights, seed 7" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["zeroshot", "{}", "{ct}", "--json"], ["embed", "{}", "{ct}", "--out", "{e}"],
                                     ["embed-text", "{}", "Cardiomegaly is present.", "--json"]])
def test_commands_say_that_it_is_untrained(untrained: Path, ct: Path, tmp_path: Path, command: list[str],
                                           capsys: pytest.CaptureFixture[str]):
    filled = [part.format(untrained, ct=ct, e=tmp_path / "e.npz") for part in command]
    assert main(filled) == 0
    captured = capsys.readouterr()
    assert "untrained" in captured.err
    if "--json" in command:
        assert json.loads(captured.out)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--encoder", "vit-naive"], "pass CHECKPOINT, or --encoder NAME and --random-weights SEED"),
    (["--random-weights", "1"], "pass CHECKPOINT, or --encoder NAME and --random-weights SEED"),
    (["--encoder", "vit-nave", "--random-weights", "1"], "lists all; did you mean 'vit-naive'?"),
    (["--encoder", "vit-naive", "--random-weights", "1", "--input-size", "100"], "--input-size 100: vit-naive takes"),
    (["--encoder", "vit-naive", "--random-weights", "1", "--input-size", "0"], "--input-size 0: vit-naive takes"),
    (["--encoder", "vit-naive", "--random-weights", "1", "--no-tokenizer"], "random weights come with a text tower"),
    (["c.pth", "--encoder", "vit-naive", "--random-weights", "1"], "drop them or CHECKPOINT"),
])
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", *arguments, "--out", str(tmp_path / "b")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not (tmp_path / "b").exists()
