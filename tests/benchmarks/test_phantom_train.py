"""The training run: samples on disk, losses, resuming, and a checkpoint that the reader takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcformer_deploy.benchmarks.phantom import train, trainer
from dcformer_deploy.benchmarks.phantom.batches import Texts, TrainOptions, moved
from dcformer_deploy.benchmarks.phantom.captions import statements
from dcformer_deploy.benchmarks.phantom.dataset import DatasetOptions, make_phantom
from dcformer_deploy.benchmarks.phantom.losses import focused_mean, report_loss, statement_loss
from dcformer_deploy.benchmarks.phantom.samples import (
    BYTE_SCALE,
    LARGEST_SHIFT_DHW,
    PLACE_CELL,
    STRIDE,
    TAPS,
    VARIANTS,
    Sample,
    gather_places,
    gather_taps,
    read_samples,
    write_samples,
)
from dcformer_deploy.benchmarks.phantom.trainer import Trainer
from dcformer_deploy.benchmarks.phantom.words import Drawn
from dcformer_deploy.export.checkpoints import read_checkpoint
from dcformer_deploy.export.tokenizer import convert_tokenizer
from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.manifest import CT_RATE_CLASSES, Preprocessing
from dcformer_deploy.runtime.volume import preprocess
from dcformer_deploy.runtime.volume.types import Volume

OPTIONS = TrainOptions(patients=3, steps=4, batch_size=4, seed=0, learning_rate=1e-3, prevalence=0.3,
                       monitored_patients=1, warm_up=0.25, open_stem_after=0.75, quantize_after=0.5,
                       codebook_batches=2, tuning_steps=2, tuning_batch_size=6)


def _samples(count: int) -> list[Sample]:
    """Random voxels of the smallest volume, with findings."""
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, 255, (32, 32, 16, len(TAPS)), np.uint8),
                   {name: Drawn("left lung") for name in CT_RATE_CLASSES if rng.random() < 0.4},
                   np.packbits(rng.random((18, 16, 16, 8)) < 0.1)) for _ in range(count)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    trainer_samples = _samples(9)
    train.write_vocabulary(trainer_samples, tmp_path / "tokenizer" / "vocab.txt")
    return tmp_path


def _trainer(out: Path, monkeypatch: pytest.MonkeyPatch, options: TrainOptions = OPTIONS) -> Trainer:
    monkeypatch.setattr(trainer, "INPUT_SIZE", 128)
    monkeypatch.setattr(trainer, "CODEBOOK_SIZE", 16)
    return Trainer(out, _samples(9), _samples(3), options, "cpu")


def test_samples_are_phantoms_seen_by_the_stem(tmp_path: Path):
    options, preprocessing = DatasetOptions(2, 3, "train", 6), Preprocessing((64, 128, 128), spacing_hwd_mm=(3, 3, 4.5))
    done = []
    write_samples(tmp_path, options, preprocessing, workers=2, on_done=lambda: done.append(1))
    samples = read_samples(tmp_path, 2)
    assert (len(done), len(samples)) == (2, 2 * VARIANTS)
    assert samples[VARIANTS].present == make_phantom(options, 1).present
    assert samples[0].present != samples[1].present
    assert samples[0].taps.shape == (32, 32, 16, len(TAPS))
    before = (tmp_path / "000000.npy").stat().st_mtime_ns
    (tmp_path / "000001.json").unlink()  # as an interruption leaves it
    write_samples(tmp_path, options, preprocessing, workers=1)
    assert (tmp_path / "000000.npy").stat().st_mtime_ns == before
    np.testing.assert_array_equal(read_samples(tmp_path, 2)[VARIANTS].taps, samples[VARIANTS].taps)


def test_taps_are_the_voxels_they_say():
    volume = np.random.default_rng(0).uniform(-1, 1, (16, 24, 20)).astype(np.float32)  # D, H, W
    taps = gather_taps(volume).astype(np.float32) / BYTE_SCALE - 1
    assert taps.shape == (6, 5, 4, 19)
    for index, (axis, offset) in enumerate(TAPS):
        for position in ((0, 0, 0), (2, 3, 1), (5, 4, 3)):
            voxel = [STRIDE * p for p in position]
            voxel[axis] += offset
            inside = all(0 <= v < side for v, side in zip(voxel, (24, 20, 16), strict=True))
            expected = volume[voxel[2], voxel[0], voxel[1]] if inside else 0  # zero padding, as the convolution has it
            assert taps[(*position, index)] == pytest.approx(expected, abs=0.5 / BYTE_SCALE + 1e-6)
    assert max(LARGEST_SHIFT_DHW) < 16


def test_moved_scan_is_the_scan_of_a_moved_volume():
    """Against moving the voxels, away from the border, where what comes in is air or padding."""
    volume = np.random.default_rng(2).uniform(-1, 1, (48, 64, 64)).astype(np.float32)  # D, H, W
    places = np.random.default_rng(3).random((18, 8, 8, 6)) < 0.3
    sample = Sample(gather_taps(volume), {}, np.packbits(places))
    by = (2, -1, 1)
    taps, found = moved(sample, by)
    expected = gather_taps(np.roll(volume, (8 * by[2], 8 * by[0], 8 * by[1]), (0, 1, 2)))
    np.testing.assert_array_equal(taps[5:, : 64 // 4 - 3, 3:], expected[5:, : 64 // 4 - 3, 3:])
    np.testing.assert_array_equal(found[:, 2:, :7, 1:], np.roll(places, by, (1, 2, 3))[:, 2:, :7, 1:])
    assert not found[:, :2].any()
    assert not found[:, :, 7:].any()
    before_first = [offset < 0 and axis == 0 for axis, offset in TAPS]
    assert (taps[0, 2:-3, 2:-3][..., before_first] == BYTE_SCALE).all()  # the convolution's padding
    assert (taps[1, 2:-3, 2:-3] == 0).all()  # air


def test_cells_hold_what_findings_changed():
    """A box in the stored volume lands in the cells around the voxels where preprocessing puts it."""
    spacing, preprocessing = (2.0, 1.8, 4.0), Preprocessing((64, 128, 128), spacing_hwd_mm=(3, 3, 4.5))
    changed = np.zeros((150, 190, 70), bool)
    changed[60:80, 100:103, 30:42] = True
    shown = preprocess(Volume("box", np.where(changed, 200, -1000).astype(np.int16), (), spacing, "LPS"), preprocessing)
    starts, window = (3, 5, 2), (112, 112, 56)
    part = shown.transpose(1, 2, 0)[3 : 3 + 112, 5 : 5 + 112, 2 : 2 + 56] > 0
    found = gather_places(changed, spacing, preprocessing, starts, window)
    expected = np.zeros((14, 14, 7), bool)
    expected[tuple(((np.argwhere(part) + PLACE_CELL // 2) // PLACE_CELL).T)] = True
    assert expected.any()
    np.testing.assert_array_equal(found, expected)


def test_report_loss_is_that_of_clip():
    """Against the definition: mean of minus log of softmax, both ways, at temperature e."""
    images, texts = (F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    logits = (np.e * images @ texts.t()).numpy().astype(np.float64)
    rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    columns = np.exp(logits) / np.exp(logits).sum(axis=0, keepdims=True)
    expected = -(np.log(np.diag(rows)).mean() + np.log(np.diag(columns)).mean()) / 2
    assert float(report_loss(images, texts)) == pytest.approx(expected, rel=1e-5)


def test_statement_loss_falls_when_the_right_prompt_is_nearer():
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    prompts = torch.zeros(2, 2, 4)
    prompts[0, 0, 0], prompts[0, 1, 0], prompts[1, 0, 1], prompts[1, 1, 1] = 1, -1, 1, -1
    right = F.normalize(torch.cat([labels * 2 - 1, torch.zeros(3, 2)], dim=1), dim=-1)
    none = F.normalize(torch.ones(3, 4) * torch.tensor([0.0, 0, 1, 1]), dim=-1)
    losses = [float(statement_loss(images, prompts, labels).mean()) for images in (right, none, -right)]
    assert losses[0] < 0.1 < losses[1] < losses[2]


def test_statement_loss_is_that_of_each_finding():
    """Scans that are right about the first finding and wrong about the second."""
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    prompts = torch.zeros(2, 2, 4)
    prompts[0, 0, 0], prompts[0, 1, 0], prompts[1, 0, 1], prompts[1, 1, 1] = 1, -1, 1, -1
    images = F.normalize(torch.tensor([[1.0, 1, 0, 0], [-1, -1, 0, 0]]), dim=-1)
    losses = statement_loss(images, prompts, labels)
    assert losses.shape == (2,) and float(losses[0]) < 0.1 < float(losses[1])


def test_focus_weighs_by_the_loss():
    losses = torch.tensor([1.0, 3.0, 0.0], requires_grad=True)
    assert focused_mean(losses, focus=False).item() == pytest.approx(4 / 3)
    focused = focused_mean(losses)
    assert focused.item() == pytest.approx((1 * 0.75 + 3 * 2.25) / 3)
    focused.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.75, 2.25, 0]) / 3)
    torch.testing.assert_close(focused_mean(torch.zeros(3)), torch.zeros(()))


@pytest.mark.thorough
def test_run_saves_what_the_reader_takes(out: Path, monkeypatch: pytest.MonkeyPatch):
    found = _trainer(out, monkeypatch)
    seen = []
    found.run(lambda step, terms: seen.append((step, terms)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert "commitment" not in seen[0][1]
    assert "commitment" in seen[-1][1]
    assert all(np.isfinite(list(terms.values())).all() for _, terms in seen)
    second_layer = found.encoder.s0.get_parameter("0.1.c1.0.weight")
    assert not torch.equal(second_layer, nn.init.dirac_(second_layer.detach().clone()))  # it opened
    encoder = {name: value.clone() for name, value in found.encoder.state_dict().items()}
    before = found.model.to_visual_latent.weight.clone()
    found.tune(lambda step, terms: seen.append((step, terms)))
    assert not torch.equal(found.model.to_visual_latent.weight, before)
    assert all(torch.equal(value, encoder[name]) for name, value in found.encoder.state_dict().items())  # locked
    judged = found.monitor()
    assert set(judged) == {"zero_shot", "head"}

    found.model.eval()
    found.centre.eval()
    with torch.no_grad():
        tokens, _ = found.tokens(found.stages(found.batches(0).taps)[-1])
        codes = found.book(tokens)
    found.amp = False
    found.save_checkpoint()
    checkpoint = read_checkpoint(out / trainer.CHECKPOINT_NAME)
    assert (checkpoint.spec.encoder.name, checkpoint.spec.input_size, checkpoint.spec.codebook_size) == (
        "dcformer-nano", 128, 16)
    assert checkpoint.trained
    assert checkpoint.preprocessing["spacing_hwd_mm"] == trainer.PREPROCESSING.spacing_hwd_mm
    assert convert_tokenizer(out / "tokenizer", checkpoint.spec.text, out / "tokenizer.json").max_tokens == 384
    # The mean that training subtracts is in the checkpoint's last bias: same tokens, but for bfloat16.
    model = checkpoint.build()
    taps = found.batches(0).taps.float() / BYTE_SCALE - 1
    with torch.no_grad():
        features = trainer.run_stages(model.visual_transformer.encoder, trainer.run_stem(
            model.visual_transformer.encoder, taps))[-1]
    again = features.permute(0, 4, 2, 3, 1).flatten(1, 3)
    assert float(F.cosine_similarity(again, tokens, dim=-1).mean()) > 0.99
    assert codes.shape == again.shape[:2]


@pytest.mark.thorough
def test_resumed_run_equals_an_uninterrupted_one(out: Path, monkeypatch: pytest.MonkeyPatch):
    whole = _trainer(out, monkeypatch)
    whole.amp = False
    whole.run(lambda *_: None)

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    first = _trainer(out, monkeypatch)
    first.amp = False
    with pytest.raises(KeyboardInterrupt):
        first.run(stop, save_every_s=-1)  # saved after each step; the third is lost
    second = _trainer(out, monkeypatch)
    second.amp = False
    second.load_state()
    assert second.step == 2
    second.run(lambda *_: None)
    for (name, expected), value in zip(whole.model.state_dict().items(), second.model.state_dict().values(),
                                       strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_state_of_other_options_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch):
    _trainer(out, monkeypatch).save_state()
    other = TrainOptions(**{**OPTIONS.__dict__, "learning_rate": 2e-3})
    with pytest.raises(InputError, match=r"learning_rate 0.001, not 0.002; choose another --out"):
        _trainer(out, monkeypatch, other).load_state()


def test_vocabulary_reads_prompts_without_unknown_words(out: Path):
    texts = Texts(out / "tokenizer" / "vocab.txt")
    ids, mask = texts.encode(statements())
    unknown = (out / "tokenizer" / "vocab.txt").read_text().split("\n").index("[UNK]")
    assert not (ids == unknown).any()
    assert len({tuple(row.tolist()) for row in ids}) == 36
    assert mask.sum() > 36 * 5


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The whole command at the smallest size, with a log that can be read."""
    monkeypatch.setattr(trainer, "INPUT_SIZE", 128)
    small = Preprocessing((64, 128, 128), spacing_hwd_mm=(3, 3, 4.5))
    monkeypatch.setattr(train, "PREPROCESSING", small)
    for split, count in (("train", 2), ("valid", 1)):  # coarse ones, found there and used
        write_samples(tmp_path / "samples" / split, DatasetOptions(count, 0, split, 6), small, workers=1)
    options = TrainOptions(2, 2, 4, 0, 1e-3, 0.5, monitored_patients=1, tuning_steps=1)
    train.prepare(tmp_path, tmp_path / "samples", options, workers=1)
    train.train(tmp_path, tmp_path / "samples", options, "cpu", monitor_every=1)
    lines = [json.loads(line) for line in (tmp_path / train.LOG_NAME).read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("step", 1), ("step", 2), ("tuning step", 1)]
    assert "checkpoint.pth" in capsys.readouterr().out
