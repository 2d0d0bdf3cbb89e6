"""The training's shortcuts compute what the encoder computes; the codebook follows its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcformer_deploy.benchmarks.phantom.localizer import Localizer, pool_places
from dcformer_deploy.benchmarks.phantom.quantizer import CodebookTrainer
from dcformer_deploy.benchmarks.phantom.samples import BYTE_SCALE, gather_taps
from dcformer_deploy.benchmarks.phantom.stem import calibrate_stem, line_convolution, run_stages, run_stem
from dcformer_deploy.export.clip import Codebook
from dcformer_deploy.export.encoders.dcformer import DCFormer
from dcformer_deploy.export.registry import get_encoder
from dcformer_deploy.runtime.manifest import CT_RATE_CLASSES


def _encoder() -> DCFormer:
    torch.manual_seed(3)
    encoder = get_encoder("dcformer-nano").build(128)
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
        found = run_stages(encoder, run_stem(encoder, taps))[-1]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_weight_of_the_stem_gets_its_gradient():
    encoder, volume = _encoder(), _volume()
    taps = torch.from_numpy(gather_taps(volume))[None].float() / BYTE_SCALE - 1
    run_stages(encoder, run_stem(encoder, taps))[-1].square().mean().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(torch.from_numpy(volume)[None, None]).square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        scale = float(parameter.grad.abs().max())
        assert float((found[name] - parameter.grad).abs().max()) <= 2e-3 * scale + 1e-7, name


def test_calibration_gives_zero_mean_and_unit_variance_and_opens_with_the_identity():
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
            previous, x = x, layer(x)
            if x.shape == previous.shape:
                torch.testing.assert_close(x, previous, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run_stem(encoder, taps, first_only=True), x, rtol=1e-4, atol=1e-4)


def test_places_are_pooled_around_what_a_position_looks_at():
    """A finding in one cell is in the positions of each stage whose stride looks nearest."""
    places = torch.zeros(1, 2, 16, 16, 8)
    places[0, 1, 6, 9, 5] = 1  # its middle is voxel (48, 72, 40)
    for stride, position in ((8, (6, 9, 5)), (16, (3, 5, 3)), (32, (2, 2, 1))):
        grid = tuple(side * 8 // stride for side in (16, 16, 8))
        found = pool_places(places, grid)
        assert found.shape == (1, 2, *grid)
        assert found.nonzero().tolist() == [[0, 1, *position]]
    places.zero_()[0, 0, 15, 0, 0] = 1
    assert not pool_places(places, (4, 4, 2))[0, 0, :3].any()


@pytest.mark.thorough
def test_localizer_learns_where_findings_are():
    torch.manual_seed(0)
    rate = torch.linspace(0.02, 0.4, 18).view(1, 18, 1, 1, 1)
    places = (torch.rand(6, 18, 8, 8, 8) < rate).float()
    stages = [torch.einsum("cf,bfhwd->bchwd", torch.randn(24, 18), pool_places(places, (side,) * 3)) for side in (8, 4)]
    localizer = Localizer([24, 24], places)
    optimizer = torch.optim.Adam(localizer.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        loss = localizer(stages, places)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(2, rel=1e-3)  # one per stage: it begins with the rates
    assert losses[-1] < 0.1 * losses[0]
    unplaced = CT_RATE_CLASSES.index("Cardiomegaly")
    bias = localizer.readers[0].get_parameter("bias")
    assert bias.grad is not None
    assert float(bias.grad[unplaced]) == 0  # nothing is known of it, so nothing is learned
    assert (bias.grad != 0).sum() == 17


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("shape", "kernel"), [((6, 5, 4), 3), ((2, 3, 2), 7), ((13, 8, 9), 13)])
def test_line_convolution(axis: int, shape: tuple[int, int, int], kernel: int):
    x, weight = torch.randn(2, 5, *shape), torch.randn(5, kernel)
    form = [kernel if i == axis else 1 for i in range(3)]
    expected = F.conv3d(x, weight.view(5, 1, *form), padding=[side // 2 for side in form], groups=5)
    torch.testing.assert_close(line_convolution(x, weight, axis), expected, rtol=1e-5, atol=1e-5)


def test_codebook_finds_clusters_and_follows_them():
    """Tokens around four directions that turn: the codes start on them and go with them."""
    generator = torch.Generator().manual_seed(0)
    first, last = (F.normalize(torch.randn(4, 16, generator=generator), dim=-1) for _ in range(2))

    def some(directions: torch.Tensor, batch: int) -> torch.Tensor:
        labels = torch.randint(4, (batch, 32), generator=generator)
        return directions[labels] * 3 + 0.1 * torch.randn(batch, 32, 16, generator=generator)

    codebook = Codebook(8, 16)
    trainer = CodebookTrainer(codebook, generator, decay=0.8)
    trainer.start(some(first, 8).flatten(0, 1), batches=4)
    assert float((codebook.embed[0] @ first.t()).max(dim=0).values.min()) > 0.99
    assert float(codebook.get_buffer("cluster_size").sum()) == 64  # two scans of 32 tokens per batch
    for step in range(150):
        turned = F.normalize(torch.lerp(first, last, min(step / 100, 1)), dim=-1)
        tokens = some(turned, 2).requires_grad_()
        found = trainer(tokens)
    assert float((codebook.embed[0] @ last.t()).max(dim=0).values.min()) > 0.99
    torch.testing.assert_close(found.tokens, F.embedding(found.codes, codebook.embed[0]), atol=0.05, rtol=0)
    found.tokens.sum().backward()
    assert tokens.grad is not None
    assert float(tokens.grad.abs().sum()) > 0


def test_codes_that_nothing_uses_are_put_on_tokens():
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(4, 8)
    trainer = CodebookTrainer(codebook, generator, decay=0.5)
    trainer.start(torch.randn(32, 8, generator=generator))
    tokens = torch.randn(1, 32, 8, generator=generator).abs() + 1  # all in one corner
    for _ in range(40):
        trainer(tokens)
    assert float((codebook.embed[0] @ F.normalize(tokens[0], dim=-1).t()).max(dim=1).values.min()) > 0.9
