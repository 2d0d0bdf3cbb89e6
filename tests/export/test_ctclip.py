"""CT-CLIP's checkpoints: a bare state dict of its own names, through export to the original code's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import golden
from conftest import GOLDEN_TOLERANCE
from dcformer_deploy.export.checkpoints import read_checkpoint
from dcformer_deploy.export.make_bundle import ExportOptions, export_checkpoint
from dcformer_deploy.runtime import InputError, load
from dcformer_deploy.runtime.manifest import Preprocessing


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    """Golden weights: the encoder under its own names, everything else as CT-CLIP's training saves it."""
    keys = json.loads((golden.DATA / "ctvit-120.keys.json").read_text())
    tensors = {f"visual_transformer.{key}": golden.weight(key, tuple(shape)) for key, shape in keys.items()}
    for key, value in golden.NANO.state_dict().items():
        if key.startswith(("text_transformer.", "to_text_latent.")):
            tensors[key] = value.numpy()
    tensors["to_visual_latent.weight"] = golden.weight("to_visual_latent.weight", (512, 6 * 6 * 512))
    for name in ("to_visual_latent", "to_text_latent"):
        tensors[f"{name}_extra.weight"] = tensors[f"{name}.weight"]
    tensors["temperature"] = np.array(1.5, np.float32)
    return {key: torch.from_numpy(np.asarray(value)) for key, value in tensors.items()}


@pytest.mark.thorough
def test_golden_outputs_through_onnx_runtime(state_dict: dict[str, torch.Tensor], tokenizer_folder: Path,
                                             tmp_path: Path):
    torch.save(state_dict, tmp_path / "ctclip.pt")
    manifest = export_checkpoint(tmp_path / "ctclip.pt", tmp_path / "bundle", ExportOptions(tokenizer=tokenizer_folder))
    assert (manifest.encoder, manifest.input_size, manifest.reduction) == ("ctvit-ctclip", 120, "depth")
    expected = np.load(golden.DATA / "ctvit-120.npz")
    random = np.random.RandomState(int(expected["image_seed"]))
    volume = np.clip(random.standard_normal((1, 60, 120, 120)) * 0.7 - 0.2, -1, 1).astype(np.float32)
    model = load(tmp_path / "bundle")
    outputs = model.image_outputs(volume)
    np.testing.assert_array_equal(outputs["codes"], expected["codes"].reshape(1, -1))
    tokens = outputs["feature_map"].transpose(0, 4, 2, 3, 1)
    assert golden.relative_error(tokens[:, :, ::2, ::2, ::16], expected["tokens_before_vq_slice"]) < GOLDEN_TOLERANCE
    assert golden.relative_error(outputs["image_embedding"], expected["image_embedding"]) < GOLDEN_TOLERANCE
    # CT-CLIP's code: Hounsfield units by 1000, no narrower window; and the temperature is a trained parameter.
    assert manifest.preprocessing == Preprocessing((60, 120, 120), window_hu=(-1000.0, 1000.0), offset_hu=0.0,
                                                   scale_hu=1000.0)
    assert manifest.zero_shot is not None
    assert manifest.zero_shot.similarity_scale == pytest.approx(math.exp(1.5))


def test_original_size_follows_from_the_projection(state_dict: dict[str, torch.Tensor], tmp_path: Path):
    full = {**state_dict, "to_visual_latent.weight": torch.zeros(512, 294912)}
    torch.save(full, tmp_path / "ctclip.pt")
    spec = read_checkpoint(tmp_path / "ctclip.pt").spec
    assert (spec.encoder.name, spec.input_size, spec.reduction) == ("ctvit-ctclip", 480, "depth")


def test_missing_tensor_is_named_as_the_file_would(state_dict: dict[str, torch.Tensor], tmp_path: Path):
    key = "visual_transformer.enc_temporal_transformer.layers.2.1.to_q.weight"
    torch.save({name: value for name, value in state_dict.items() if name != key}, tmp_path / "ctclip.pt")
    with pytest.raises(InputError, match=rf"ctclip.pt: tensors do not fit ctvit-ctclip: 1 missing \({key}\)"):
        read_checkpoint(tmp_path / "ctclip.pt")


@pytest.mark.parametrize("temperature", [torch.tensor(float("nan")), torch.tensor(50.0), torch.ones(3)])
def test_unusable_temperature(state_dict: dict[str, torch.Tensor], temperature: torch.Tensor, tmp_path: Path):
    torch.save({**state_dict, "temperature": temperature}, tmp_path / "ctclip.pt")
    with pytest.raises(InputError, match="temperature is .*; expected one number"):
        read_checkpoint(tmp_path / "ctclip.pt")
