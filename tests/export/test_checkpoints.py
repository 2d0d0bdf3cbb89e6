"""Reading checkpoints: every published form, and refusing everything else in one clear line."""

import argparse
import dataclasses
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dcformer_deploy.export.checkpoints import read_checkpoint
from dcformer_deploy.export.clip import Detector
from dcformer_deploy.runtime import InputError
from golden import CASES, NANO, Case


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    return NANO.state_dict()


def save(path: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    """A training checkpoint whose args differ from the golden case's by ``changes``."""
    arguments = argparse.Namespace(**{**vars(NANO.arguments()), **changes})
    torch.save({"model": tensors, "args": arguments}, path)
    return path


def assert_is_nano(path: Path, **options: object) -> None:
    checkpoint = read_checkpoint(path, **options)  # type: ignore[arg-type]
    assert checkpoint.spec.encoder.name == "dcformer-nano"
    assert (checkpoint.spec.reduction, checkpoint.spec.input_size) == ("channel", 128)
    weight = checkpoint.build().state_dict()["to_visual_latent.weight"]
    assert torch.equal(weight, NANO.state_dict()["to_visual_latent.weight"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_checkpoint(case: Case, tmp_path: Path):
    spec = read_checkpoint(case.save(tmp_path / "c.pth")).spec
    assert (spec.encoder.name, spec.reduction, spec.input_size) == (case.encoder, case.reduction, 128)
    text = case.shapes["text_transformer.embeddings.word_embeddings.weight"]
    assert [spec.text.vocab_size, spec.text.hidden_size] == text
    assert (spec.text.layers, spec.text.intermediate_size, spec.codebook_size) == (1, 128, 8192)


def test_spacing_from_args(state_dict, tmp_path: Path):
    """Only this project's own training saves it; everywhere else the published spacing holds."""
    assert read_checkpoint(NANO.save(tmp_path / "published.pth")).preprocessing == {}
    own = save(tmp_path / "c.pth", state_dict, spacing_hwd_mm=[1.5, 1.5, 2.25])
    assert read_checkpoint(own).preprocessing["spacing_hwd_mm"] == (1.5, 1.5, 2.25)


@pytest.mark.parametrize("spacing", [1.5, [1.5, 1.5], [1.5, 0, 2], [1.5, float("nan"), 2], ["a", "b", "c"],
                                     [1, 1, 400]])
def test_unusable_spacing(spacing: object, state_dict, tmp_path: Path):
    with pytest.raises(InputError, match=r"args.spacing_hwd_mm is .* three distances"):
        read_checkpoint(save(tmp_path / "c.pth", state_dict, spacing_hwd_mm=spacing))


def test_legacy_serialization(tmp_path: Path):
    torch.save({"model": NANO.state_dict(), "args": NANO.arguments()}, tmp_path / "c.pth",
               _use_new_zipfile_serialization=False)
    assert_is_nano(tmp_path / "c.pth")


def test_bare_state_dict_needs_the_input_size(state_dict, tmp_path: Path):
    torch.save(state_dict, tmp_path / "c.pth")
    with pytest.raises(InputError, match="input size is neither .* pass --input-size"):
        read_checkpoint(tmp_path / "c.pth")
    assert_is_nano(tmp_path / "c.pth", input_size=128)


def test_bare_state_dict_whose_projection_fits_two_reductions(tmp_path: Path):
    """At 128, 2 x 2 tokens of a slice are as many as 1 x 2 x 2 of the volume."""
    torch.save(CASES[1].state_dict(), tmp_path / "c.pth")
    with pytest.raises(InputError, match="fits the reductions depth, none; pass --reduction"):
        read_checkpoint(tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth", reduction="depth").spec.input_size == 128


def test_input_size_follows_from_the_projection_of_reduction_depth(tmp_path: Path):
    tensors = CASES[1].state_dict()
    tensors["to_visual_latent.weight"] = torch.zeros(512, 8 * 8 * 512)
    torch.save(tensors, tmp_path / "c.pth")
    spec = read_checkpoint(tmp_path / "c.pth").spec
    assert (spec.reduction, spec.input_size) == ("depth", 512)


def test_data_parallel_prefix(state_dict, tmp_path: Path):
    assert_is_nano(save(tmp_path / "c.pth", {f"module.{key}": value for key, value in state_dict.items()}))


def test_safetensors(state_dict, tmp_path: Path):
    safetensors.torch.save_file({k: v.clone() for k, v in state_dict.items()}, tmp_path / "c.safetensors")
    assert_is_nano(tmp_path / "c.safetensors", input_size=128)


def test_safetensors_without_the_doubled_norm_names(state_dict, tmp_path: Path):
    """safetensors refuses tensors that share memory, so files made from a live model hold one of the two names."""
    single = {k: v for k, v in state_dict.items() if ".norm." not in k}
    assert len(single) < len(state_dict)
    safetensors.torch.save_file(single, tmp_path / "c.safetensors")
    assert_is_nano(tmp_path / "c.safetensors", input_size=128)


def test_half_precision_weights_become_float32(state_dict, tmp_path: Path):
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state_dict.items()}
    model = read_checkpoint(save(tmp_path / "c.pth", halved)).build()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_buffers_of_older_transformers_are_ignored(state_dict, tmp_path: Path):
    assert_is_nano(save(tmp_path / "c.pth", {
        **state_dict, "text_transformer.embeddings.position_ids": torch.arange(512)[None]}))


def test_arguments_saved_as_a_dict(state_dict, tmp_path: Path):
    torch.save({"model": state_dict, "args": vars(NANO.arguments())}, tmp_path / "c.pth")
    assert_is_nano(tmp_path / "c.pth")


@pytest.mark.parametrize(("tensor", "message"), [
    (torch.zeros(512, 256, dtype=torch.int8), "is torch.int8; expected 16, 32 or 64 bit"),
    (torch.zeros(512, 256, dtype=torch.complex64), "is torch.complex64; expected 16, 32 or 64 bit"),
    (torch.zeros(512, 256, dtype=torch.int64), "is torch.int64; expected floating point"),
    (torch.zeros(512, 256).to(torch.float8_e4m3fn), "float8|GLOBAL|damaged"),
    (torch.zeros(512, 256).to_sparse(), "sparse|GLOBAL|damaged"),
    (torch.tensor(1.0), r"has shape \[\]; expected 2 dimensions"),
    (torch.zeros(512, 0), r"has shape \[512, 0\]; expected 2 dimensions, none of them empty"),
])
def test_odd_tensors(state_dict, tmp_path: Path, tensor: torch.Tensor, message: str):
    with pytest.raises(InputError, match=message):
        read_checkpoint(save(tmp_path / "c.pth", {**state_dict, "to_visual_latent.weight": tensor}))


def test_nan_in_a_doubled_norm_is_called_nan(state_dict, tmp_path: Path):
    bad = torch.full((32,), float("nan"))
    names = [f"visual_transformer.encoder.s0.0.0.{slot}.weight" for slot in ("norm.0", "c1.1")]
    with pytest.raises(InputError, match="holds NaN"):
        read_checkpoint(save(tmp_path / "c.pth", {**state_dict, **dict.fromkeys(names, bad)}))


def test_detector(state_dict, tmp_path: Path):
    tensors = {f"trained_model.{key}": value for key, value in state_dict.items()}
    random = np.random.RandomState(1)
    tensors["classifier.weight"] = torch.from_numpy(random.standard_normal((18, 512)).astype(np.float32))
    tensors["classifier.bias"] = torch.from_numpy(random.standard_normal(18).astype(np.float32))
    checkpoint = read_checkpoint(save(tmp_path / "c.pth", tensors))
    model = checkpoint.build()
    assert isinstance(model, Detector)
    assert checkpoint.spec.class_count == 18
    embedding = torch.nn.functional.normalize(torch.randn(3, 512), dim=1)
    expected = (embedding.clamp(min=0) @ tensors["classifier.weight"].t() + tensors["classifier.bias"]).sigmoid()
    torch.testing.assert_close(model.class_scores(embedding), expected)


def test_all_problems_with_keys_are_named(state_dict, tmp_path: Path):
    tensors = dict(state_dict)
    tensors.pop("to_text_latent.weight")
    tensors["extra.weight"] = torch.zeros(1)
    tensors["text_transformer.pooler.dense.bias"] = torch.zeros(5)
    with pytest.raises(InputError) as error:
        read_checkpoint(save(tmp_path / "c.pth", tensors))
    message = str(error.value)
    assert "1 missing (to_text_latent.weight)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 misshaped (text_transformer.pooler.dense.bias is [5], expected [768])" in message


def test_missing_encoder_key_is_named_against_the_nearest_encoder(state_dict, tmp_path: Path):
    tensors = dict(state_dict)
    tensors.pop("visual_transformer.encoder.s2.0.proj.weight")
    torch.save(tensors, tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"do not fit dcformer-nano: 1 missing \(visual_transformer.*s2.0.proj"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": "decomp_naive"}, "args.model says 'decomp_naive' but the tensors are those of dcformer-nano"),
    ({"model": "decomp_nanno"}, "args.model is 'decomp_nanno', not one of .* did you mean 'decomp_nano'"),
    ({"reduction": "width"}, "args.reduction is 'width'; expected one of channel, depth, none"),
    ({"reduction": "depth"}, "reads 256 features, which no volume size gives"),
    ({"input_size": 100}, "input size 100: dcformer-nano takes positive multiples of 128"),
    ({"input_size": 128 * 10**9}, "takes positive multiples of 128 up to 2048"),
    ({"model": ["decomp_nano"]}, "args.model is .* not one of"),
    ({"input_size": "big"}, "input size 'big': dcformer-nano takes positive multiples of 128"),
])
def test_contradicting_arguments(state_dict, tmp_path: Path, changes, message: str):
    with pytest.raises(InputError, match=message):
        read_checkpoint(save(tmp_path / "c.pth", state_dict, **changes))


def test_option_that_contradicts_the_file(checkpoint: Path):
    with pytest.raises(InputError, match="input size is 128 in the file's args but --input-size says 256"):
        read_checkpoint(checkpoint, input_size=256)


def test_doubled_names_that_differ(state_dict, tmp_path: Path):
    key = "visual_transformer.encoder.s0.0.0.norm.0.weight"
    with pytest.raises(InputError, match="must be the same tensor but differ"):
        read_checkpoint(save(tmp_path / "c.pth", {**state_dict, key: state_dict[key] + 1}))


def test_weights_that_are_not_finite(state_dict, tmp_path: Path):
    weight = state_dict["to_visual_latent.weight"].clone()
    weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="to_visual_latent.weight holds NaN"):
        read_checkpoint(save(tmp_path / "c.pth", {**state_dict, "to_visual_latent.weight": weight}))


@dataclasses.dataclass
class Bomb:
    """Runs a command where it is unpickled without care."""

    command: str

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickle_bomb_is_refused_and_not_run(state_dict, tmp_path: Path, zipped: bool):
    trace = tmp_path / "ran"
    torch.save({"model": state_dict, "args": Bomb(f"touch {trace}")}, tmp_path / "c.pth",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"refused: loading it would call posix\.system"):
        read_checkpoint(tmp_path / "c.pth")
    assert not trace.exists()
    with (tmp_path / "plain.pkl").open("wb") as file:
        pickle.dump(Bomb(f"touch {trace}"), file)
    with pytest.raises(InputError):
        read_checkpoint(tmp_path / "plain.pkl")
    assert not trace.exists()


def test_damaged_weights_are_found_by_their_checksum(checkpoint: Path, tmp_path: Path):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4] = b"\0\0\0\0"
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(InputError, match="does not match its checksum: damaged"):
        read_checkpoint(tmp_path / "c.pth")


def test_views_that_claim_more_than_the_file_holds(state_dict, tmp_path: Path):
    huge = torch.zeros(1, 768).expand(10**9, 768)
    with pytest.raises(InputError, match="the file holds fewer numbers"):
        read_checkpoint(save(tmp_path / "c.pth", {
            **state_dict, "text_transformer.embeddings.word_embeddings.weight": huge}))


def test_compressed_records_are_refused(checkpoint: Path, tmp_path: Path):
    with zipfile.ZipFile(checkpoint) as source, \
            zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(InputError, match="is compressed, which torch.save never does"):
        read_checkpoint(tmp_path / "c.pth")


def test_truncated(checkpoint: Path, tmp_path: Path):
    (tmp_path / "c.pth").write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(InputError, match="damaged or truncated checkpoint"):
        read_checkpoint(tmp_path / "c.pth")


def test_truncated_safetensors(state_dict, tmp_path: Path):
    safetensors.torch.save_file({"a": torch.zeros(1000)}, tmp_path / "whole")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "whole").read_bytes()[:500])
    with pytest.raises(InputError, match="damaged safetensors"):
        read_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not a checkpoint"),
    (b"hello, I am a text file", "not a checkpoint"),
    (b"PK\x03\x04 and nothing more", "damaged or truncated"),
    (b"\x80\x04 and nothing more", "damaged or not a PyTorch checkpoint"),
])
def test_other_files(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "c.pth")


def test_no_such_file_and_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="expected a checkpoint, found a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "message"), [
    ({"weights": [1, 2]}, "holds no state dict"),
    ([torch.zeros(1)], "holds no state dict"),
    ({"conv.weight": torch.zeros(3)}, "not a DCFormer checkpoint"),
    ({}, "holds no state dict"),
])
def test_other_models(tmp_path: Path, content, message: str):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "c.pth")
