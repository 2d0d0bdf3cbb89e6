"""Med3DVLM's Hugging Face folder, through export to the original code's numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import DistilBertConfig, DistilBertModel

import golden
from conftest import GOLDEN_TOLERANCE
from dcformer_deploy.export.checkpoints import read_checkpoint
from dcformer_deploy.export.make_bundle import ExportOptions, export_checkpoint
from dcformer_deploy.runtime import InputError, Model, load
from dcformer_deploy.runtime.manifest import Manifest

CONFIG = {"model_type": "dec_clip", "vision_encoder": "dcformer", "loss_type": "sigmoid", "input_size": [128, 128, 64],
          "hidden_size": 512, "language_model_name_or_path": "medicalai/ClinicalBERT", "efficient_loss": True}
T_PRIME, BIAS = 2.0, -1.5
TEXT = DistilBertConfig(vocab_size=512, dim=128, n_layers=2, n_heads=2, hidden_dim=256, max_position_embeddings=512)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The golden image tower, a small text tower, and the parameters of the score."""
    keys = json.loads((golden.DATA / "med3dvlm-small-128.keys.json").read_text())
    shapes = {key: tuple(shape) for key, shape in keys.items()}
    text = DistilBertModel(TEXT).state_dict()
    shapes |= {f"language_encoder.{key}": tuple(value.shape) for key, value in text.items()}
    shapes |= {"mm_language_proj.weight": (512, 128), "mm_language_proj.bias": (512,)}
    result = {key: torch.from_numpy(np.asarray(golden.weight(key, shape))) for key, shape in shapes.items()}
    return {**result, "t_prime": torch.tensor(T_PRIME), "bias": torch.tensor(BIAS)}


@pytest.fixture(scope="module")
def folder(tensors: dict[str, torch.Tensor], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``save_pretrained`` writes it, tokenizer included."""
    folder = tmp_path_factory.mktemp("med3dvlm") / "DCFormer-SigLIP"
    shutil.copytree(tokenizer_folder, folder)
    return write(folder, tensors, CONFIG)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Model]:
    out = tmp_path_factory.mktemp("bundles") / "siglip"
    return export_checkpoint(folder, out, ExportOptions(tokenizer=None)), load(out)


def test_golden_image_embedding_through_onnx_runtime(exported: tuple[Manifest, Model]):
    manifest, model = exported
    expected = np.load(golden.DATA / "med3dvlm-small-128.npz")
    random = np.random.RandomState(int(expected["image_seed"]))
    volume = random.uniform(0, 1, (1, 1, 64, 128, 128)).astype(np.float32)[:, 0]
    outputs = model.image_outputs(volume)
    assert set(outputs) == {"image_embedding", "feature_map"}
    tokens = outputs["feature_map"].transpose(0, 4, 2, 3, 1).reshape(expected["last_hidden"].shape)
    assert golden.relative_error(tokens, expected["last_hidden"]) < GOLDEN_TOLERANCE
    assert golden.relative_error(outputs["image_embedding"], expected["image_embedding"]) < GOLDEN_TOLERANCE
    assert (manifest.encoder, manifest.input_size, manifest.reduction) == ("dcformer-small", 128, "channel")
    assert manifest.source.file == "model.safetensors" and manifest.source.trained


def test_text_tower_is_transformers_distilbert(exported: tuple[Manifest, Model], tensors: dict[str, torch.Tensor]):
    prefix = "language_encoder."
    bert = DistilBertModel(TEXT).eval()
    bert.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    _, ids, mask = golden.inputs()
    with torch.no_grad():
        hidden = bert(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state[:, 0]
    projected = hidden @ tensors["mm_language_proj.weight"].t() + tensors["mm_language_proj.bias"]
    found = exported[1].embed_tokens(ids, mask)
    assert golden.relative_error(found, F.normalize(projected, dim=-1).numpy()) < GOLDEN_TOLERANCE


def test_score_is_the_sigmoid_of_the_positive_prompt(exported: tuple[Manifest, Model]):
    _, model = exported
    volume = np.random.default_rng(0).random((64, 128, 128), np.float32)
    scores = model.zero_shot(volume).scores
    texts = model.embed_text([f"{name} is present." for name in scores])
    logits = (texts @ model.embed_image(volume)).astype(np.float64) * math.exp(T_PRIME) + BIAS
    np.testing.assert_allclose(list(scores.values()), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    one = model.zero_shot(volume, classes=["Cardiomegaly"]).scores["Cardiomegaly"]
    assert one == pytest.approx(scores["Cardiomegaly"], rel=1e-5)
    np.testing.assert_allclose(model.score_embeddings(model.embed_image(volume)[None])[0], list(scores.values()),
                               rtol=1e-5)


def test_preprocessing_is_that_of_the_published_data(exported: tuple[Manifest, Model], ct: Path):
    """Scale to 0..1, cut to what is above 0, stretch; rows to the back, columns to the left, slices upwards."""
    import nibabel as nib

    image = nib.load(ct)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    array = np.asarray(image.dataobj).astype(np.float64)[::-1, ::-1].transpose(2, 1, 0)  # x, y, z to z, y, x
    array = np.clip(array, -1000, 1000)
    scaled = (array - array.min()) / (array.max() - array.min())
    inside = [np.flatnonzero(scaled.max(axis=tuple({0, 1, 2} - {axis})) > 0) for axis in range(3)]
    cut = scaled[tuple(slice(indices[0], indices[-1] + 1) for indices in inside)]
    expected = F.interpolate(torch.from_numpy(cut)[None, None], (64, 128, 128), mode="trilinear")[0, 0].numpy()
    found = exported[1].preprocess(ct)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.min() >= 0 and found.max() <= 1 and found.std() > 0.1


def test_values_of_any_unit_are_read(exported: tuple[Manifest, Model], tmp_path: Path):
    """The published files hold 0 to 1 and have blank headers, which other bundles refuse."""
    import nibabel as nib

    values = np.zeros((40, 30, 20), np.float32)
    values[10:30, 5:25, 2:18] = np.random.default_rng(1).random((20, 20, 16)) * 0.9 + 0.1
    nib.save(nib.Nifti1Image(values, np.diag([-1, -1, 1, 1])), tmp_path / "a.nii.gz")
    found = exported[1].preprocess(tmp_path / "a.nii.gz")
    inside = torch.from_numpy(values[10:30, 5:25, 2:18].transpose(2, 1, 0) / values.max())[None, None]
    expected = F.interpolate(inside, (64, 128, 128), mode="trilinear")[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_scan_of_one_value_is_refused(exported: tuple[Manifest, Model], tmp_path: Path):
    import nibabel as nib

    nib.save(nib.Nifti1Image(np.full((20, 20, 20), 7, np.int16), np.eye(4)), tmp_path / "flat.nii")
    with pytest.raises(InputError, match=r"flat.nii: every voxel is 7 after clipping"):
        exported[1].preprocess(tmp_path / "flat.nii")


@pytest.mark.thorough
def test_without_its_tokenizer(folder: Path, tmp_path: Path):
    manifest = export_checkpoint(folder, tmp_path / "b", ExportOptions(tokenizer=None, own_tokenizer=False))
    assert manifest.text is None and manifest.zero_shot is None


@pytest.mark.parametrize(("change", "message"), [
    ({"vision_encoder": "vit3d"}, "config.json: vision_encoder is 'vit3d'; expected 'dcformer'"),
    ({"loss_type": "nce"}, "config.json: loss_type is 'nce'; expected 'sigmoid'"),
    ({"model_type": "bert"}, "config.json: model_type is 'bert'; expected 'dec_clip'"),
    ({"input_size": [128, 128, 128]}, r"input_size is \[128, 128, 128\]; expected \[S, S, S/2\]"),
    ({"input_size": "256"}, "input_size is '256'; expected"),
])
def test_other_configurations(tensors: dict[str, torch.Tensor], change: dict[str, object], message: str,
                              tmp_path: Path):
    with pytest.raises(InputError, match=message):
        read_checkpoint(write(tmp_path, tensors, {**CONFIG, **change}))


@pytest.mark.parametrize(("change", "message"), [
    ({"bias": None}, "bias is missing; expected one number"),
    ({"t_prime": torch.ones(3)}, r"t_prime is \[1.0, 1.0, 1.0\]; expected one number"),
    ({"t_prime": torch.tensor(math.nan)}, r"t_prime is \[nan\]"),
    ({"mm_vision_proj.bias": None}, r"1 missing \(to_visual_latent.bias\)"),
    ({"language_encoder.embeddings.word_embeddings.weight": None}, "not Med3DVLM's DCFormer-SigLIP: no matrix"),
    ({"decoder.weight": torch.ones(2, 2)}, "unexpected tensor 'decoder.weight'"),
    ({"vision_encoder.encoder.s4.1.scale": torch.full((768,), math.inf)}, "holds NaN or infinity"),
])
def test_damaged_weights(tensors: dict[str, torch.Tensor], change: dict[str, torch.Tensor | None], message: str,
                         tmp_path: Path):
    changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        read_checkpoint(write(tmp_path, changed, CONFIG))


def test_options_that_contradict_the_folder(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"--input-size 256; drop|--input-size says 256; drop"):
        read_checkpoint(folder, input_size=256)
    with pytest.raises(InputError, match="--reduction depth: Med3DVLM takes the mean"):
        read_checkpoint(folder, reduction="depth")
    with pytest.raises(InputError, match=r"config.json"):
        read_checkpoint(tmp_path)


def test_weights_in_pieces(folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(folder, tmp_path / "sharded"))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="weights are in several files"):
        read_checkpoint(copy)
