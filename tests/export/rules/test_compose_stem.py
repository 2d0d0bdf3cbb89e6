"""The stem's first two layers as one, borders included."""

import numpy as np
import pytest
import torch
from torch import nn

from dcformer_deploy.export.encoders.dcformer import DecomposedConv3d
from graphs import EXACT, GraphBuilder, difference, only, run, volume


def _stem(width: int, channels: int = 1, second_length: int = 3):
    graph = GraphBuilder()
    first = graph.star("volume", (width, channels), 7, stride=4)
    return graph.finish(graph.star(first, (width, width), second_length), {"volume": ["batch", channels, 12, 20, 28]})


@pytest.mark.parametrize("length", [3, 5])
def test_same_numbers_everywhere(length: int):
    before = _stem(24, second_length=length)
    after, report = only(before, "compose_stem")
    assert report.matched == 1
    # 20 channels instead of 24 into the second layer; instead of the first, one-hot kernels of 8 + 6 + 6 channels.
    positions = 3 * 5 * 7
    assert report.before.multiply_adds == positions * (3 * 7 * 24 + 3 * length * 24 * 24)
    assert report.after.multiply_adds == positions * (7 * 20 + 3 * length * 20 * 24)
    x = volume(2, 1, 12, 20, 28)
    found, expected = run(after, volume=x), run(before, volume=x)
    assert difference(found, expected) < EXACT
    for axis in (2, 3, 4):  # the borders alone, where a bias that leaks into the padding would show
        for end in (0, -1):
            assert difference(found.take(end, axis), expected.take(end, axis)) < EXACT


def test_against_the_module_in_double_precision():
    torch.manual_seed(4)
    stem = nn.Sequential(DecomposedConv3d(1, 32, 7, stride=4), DecomposedConv3d(32, 32, 3)).eval()
    for module in stem.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    graph = GraphBuilder()
    y = "volume"
    for layer in stem:
        branches = []
        for branch in (layer.c1, layer.c2, layer.c3):
            conv = nn.utils.fuse_conv_bn_eval(branch[0], branch[1])
            branches.append(graph.node(
                "Conv", y, graph.constant(conv.weight.detach().numpy()), graph.constant(conv.bias.detach().numpy()),
                kernel_shape=list(conv.kernel_size), strides=list(conv.stride), pads=list(conv.padding) * 2))
        y = graph.node("Add", graph.node("Add", branches[0], branches[1]), branches[2])
    after, report = only(graph.finish(y, {"volume": ["batch", 1, 8, 16, 24]}), "compose_stem", "merge_branches")
    assert report.matched == 1
    x = volume(1, 1, 8, 16, 24)
    with torch.no_grad():
        expected = stem.double()(torch.from_numpy(x).double()).numpy()
    assert difference(run(after, volume=x), expected.astype(np.float32)) < EXACT


@pytest.mark.parametrize(("width", "channels", "reason"), [
    (20, 1, "19 voxels and a constant are no fewer than the first layer's 20 channels"),
    (32, 2, "the first layer reads 2 channels, not one")])
def test_what_would_not_help_is_left_alone(width: int, channels: int, reason: str):
    before = _stem(width, channels)
    after, report = only(before, "compose_stem")
    assert report.matched == 0
    assert reason in report.refused[0]
    assert after == before
