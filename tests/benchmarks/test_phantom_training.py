"""The training's shortcuts compute what the encoder computes; the codebook follows its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcformer_deploy.benchmarks.phantom.quantizer import CodebookTrainer
from dcformer_deploy.benchmarks.phantom.samples import BYTE_SCALE, gather_taps
from dcformer_deploy.benchmarks.phantom.stem import calibrate_stem, line_convolution, run_stages, run_stem
from dcformer_deploy.export.clip import Codebook
from dcformer_deploy.export.encoders.dcformer import DCFormer
from dcformer_deploy.export.registry import get_encoder


def _encoder() -> DCFormer:
    torch.manual_seed(3)
    encoder = get_encoder("dcformer-nano").build()
    assert isinstance(encoder, DCFormer)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return encoder.eval()


def _volume() -> np.ndarray:
    stored = np.random.default_rng(1).integers(0, 2 * BYTE_SCALE + 1, (64, 128, 128))
    return (stored / BYTE_SCALE - 1).astype(np.float32)


def test_merged_stem_and_stages_equal_the_encoder():
    encoder, volume = _encoder(), _volume()
    taps = torch.from_numpy(gather_taps(volume))[None].float() / BYTE_SCALE - 1
    with torch.no_grad():
        expected = encoder(torch.from_numpy(volume)[None, None])
        found = run_stages(encoder, run_stem(encoder, taps))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_weight_of_the_stem_gets_its_gradient():
    encoder, volume = _encoder(), _volume()
    taps = torch.from_numpy(gather_taps(volume))[None].float() / BYTE_SCALE - 1
    run_stages(encoder, run_stem(encoder, taps)).square().mean().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(torch.from_numpy(volume)[None, None]).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        scale = float(parameter.grad.abs().max())
        assert float((found[name] - parameter.grad).abs().max()) <= 2e-3 * scale + 1e-7, name


def test_calibration_gives_each_branch_zero_mean_and_unit_variance():
    encoder, volume = _encoder(), _volume()
    taps = torch.from_numpy(gather_taps(volume))[None].float() / BYTE_SCALE - 1
    calibrate_stem(encoder, taps)
    x = torch.from_numpy(volume).permute(1, 2, 0)[None, None]
    with torch.no_grad():
        for layer in encoder.s0.get_submodule("0").children():
            for branch in ("c1", "c2", "c3"):
                y = layer.get_submodule(branch)(x)
                norm = layer.get_submodule(f"{branch}.1")
                y = (y - norm.bias.view(-1, 1, 1, 1)) / norm.weight.view(-1, 1, 1, 1)
                assert float(y.mean(dim=(0, 2, 3, 4)).abs().max()) < 1e-3
                assert float((y.var(dim=(0, 2, 3, 4)) - 1).abs().max()) < 1e-2
            x = layer(x)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("shape", "kernel"), [((6, 5, 4), 3), ((2, 3, 2), 7), ((13, 8, 9), 13)])
def test_line_convolution(axis: int, shape: tuple[int, int, int], kernel: int):
    x, weight = torch.randn(2, 5, *shape), torch.randn(5, kernel)
    form = [kernel if i == axis else 1 for i in range(3)]
    expected = F.conv3d(x, weight.view(5, 1, *form), padding=[side // 2 for side in form], groups=5)
    torch.testing.assert_close(line_convolution(x, weight, axis), expected, rtol=1e-5, atol=1e-5)


def test_codebook_finds_clusters():
    """Tokens around four directions: codes that start on tokens end on the directions."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    codebook = Codebook(4, 16)
    trainer = CodebookTrainer(codebook, generator, decay=0.8)
    trainer.start(torch.randn(64, 16, generator=generator))
    for _ in range(60):
        labels = torch.randint(4, (2, 32), generator=generator)
        tokens = directions[labels] * 3 + 0.1 * torch.randn(2, 32, 16, generator=generator)
        found = trainer(tokens.requires_grad_())
    assert float((codebook.embed[0] @ directions.t()).max(dim=0).values.min()) > 0.99
    torch.testing.assert_close(found.tokens, F.embedding(found.codes, codebook.embed[0]), atol=0.05, rtol=0)
    found.tokens.sum().backward()
    assert tokens.grad is not None
    assert float(tokens.grad.abs().sum()) > 0
