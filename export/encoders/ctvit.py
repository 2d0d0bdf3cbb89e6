"""CT-ViT: the encoder of GenerateCT (Hamamci et al., arXiv:2305.16037) and CT-CLIP (arXiv:2403.17834).

A transformer over the patches of each slab of slices, then one along the slabs, after C-ViViT (Villegas et al.,
arXiv:2210.02399). Module names are those of CT-CLIP's checkpoints below ``visual_transformer.``; what they hold for
reconstructing volumes (``to_pixels``) and for single slices (``*_first_frame``) has no part in embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import CheckpointFormat, EncoderSpec, Published, register
from ..tokens import split_heads

CHANNELS, HEADS, DEPTH = 512, 8, 4
FEED_FORWARD_WIDTH = 1365
#: Logits of unit queries and keys are multiplied by this.
COSINE_SCALE = 8.0


class GainNorm(nn.Module):
    """LayerNorm with a gain and no bias; the zero bias is a buffer of the checkpoints."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.register_buffer("beta", torch.zeros(channels))
        self.beta: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class PositionEncoding(nn.Module):
    """Depthwise convolution over the grid; in depth it looks at the slab itself and the two before.

    The published code always views the tokens as (B, D', H', W'), also in the temporal layers, whose order is
    (B, H', W', D'). Weights were trained with that, so it stays.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dsconv = nn.Conv3d(channels, channels, 3, groups=channels)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens ``[b, n, C]`` with b*n = B*D'*H'*W' to the same."""
        volume = x.reshape(-1, *grid, x.shape[-1]).permute(0, 4, 1, 2, 3)
        found = self.dsconv(F.pad(volume, (1, 1, 1, 1, 2, 0)))
        return found.permute(0, 2, 3, 4, 1).reshape(x.shape)


class Attention(nn.Module):
    """Cosine attention on ``[b, n, C]``: queries of the normed input, keys and values of the input as it is."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        inner = HEADS * head_width
        self.norm = GainNorm(channels)
        self.context_norm = GainNorm(channels)  # in the checkpoints; the published code does not call it
        self.null_kv = nn.Parameter(torch.empty(HEADS, 0, head_width))  # likewise
        self.q_scale = nn.Parameter(torch.ones(head_width))
        self.k_scale = nn.Parameter(torch.ones(head_width))
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See the class; ``bias`` ``[heads, n, n]`` is added to the logits."""
        key, value = self.to_kv(x).chunk(2, dim=-1)
        query, key, value = (split_heads(part, HEADS) for part in (self.to_q(self.norm(x)), key, value))
        query = F.normalize(query, dim=-1) * self.q_scale
        key = F.normalize(key, dim=-1) * self.k_scale
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=COSINE_SCALE)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class GatedGelu(nn.Module):
    """``first half * GELU(second half)`` of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def _feed_forward(channels: int) -> nn.Sequential:
    # Index 3 is the published code's dropout.
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 2 * FEED_FORWARD_WIDTH, bias=False), GatedGelu(),
                         nn.Dropout(0.0), nn.Linear(FEED_FORWARD_WIDTH, channels, bias=False))


class Transformer(nn.Module):
    """Layers of position encoding, attention and feed-forward, each added to its input; a norm at the end."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        # Index 2 is cross attention in the published code, which is absent here.
        self.layers = nn.ModuleList(
            nn.ModuleList((PositionEncoding(channels), Attention(channels, head_width), nn.Identity(),
                           _feed_forward(channels))) for _ in range(DEPTH))
        self.norm_out = GainNorm(channels)

    def forward(self, x: Tensor, grid: tuple[int, int, int], bias: Tensor | None = None) -> Tensor:
        """Tokens ``[b, n, C]`` to the same."""
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            position_encoding, attention, _, feed_forward = layer
            x = x + position_encoding(x, grid)
            x = x + attention(x, bias)
            x = x + feed_forward(x)
        return self.norm_out(x)


class ContinuousPositionBias(nn.Module):
    """Attention bias of a plane from the logarithm of relative offsets (Liu et al., Swin v2, arXiv:2111.09883)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList((
            nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.1)),
            nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.1)),
            nn.Linear(width, HEADS)))

    def forward(self, height: int, width: int) -> Tensor:
        """``[heads, n, n]`` for a plane of n = height * width positions."""
        weight = self.net[2].get_parameter("weight")
        rows, columns = (torch.arange(1 - side, side, device=weight.device) for side in (height, width))
        row, column = rows[height - 1 :], columns[width - 1 :]
        from_row = (row[:, None] - row[None, :] + height - 1)[:, None, :, None]
        from_column = (column[:, None] - column[None, :] + width - 1)[None, :, None, :]
        offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).to(weight.dtype)
        table = offsets.sign() * offsets.abs().log1p()
        # As published, and counted in the published tables, the network runs on all n * n pairs; the same numbers come
        # from each of the (2h-1)(2w-1) distinct offsets once.
        pairs = from_row, from_column
        bias = self._run(table[pairs]) if self.training else self._run(table)[pairs]
        return bias.permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)

    def _run(self, offsets: Tensor) -> Tensor:
        for layer in self.net:
            offsets = layer(offsets)
        return offsets


class CTViT(nn.Module):
    """``[B, 1, D, H, W]`` to ``[B, 512, H/p, W/p, D/q]``.

    Args:
        patch: p, side of a patch in H and W.
        temporal_patch: q, its slices.
        head_width: of attention.
    """

    def __init__(self, patch: int, temporal_patch: int, head_width: int) -> None:
        super().__init__()
        self.patch, self.temporal_patch = patch, temporal_patch
        voxels = temporal_patch * patch**2
        self.spatial_rel_pos_bias = ContinuousPositionBias(CHANNELS)
        # Index 0 cuts the patches in the published code.
        self.to_patch_emb = nn.Sequential(nn.Identity(), nn.LayerNorm(voxels), nn.Linear(voxels, CHANNELS),
                                          nn.LayerNorm(CHANNELS))
        self.enc_spatial_transformer = Transformer(CHANNELS, head_width)
        self.enc_temporal_transformer = Transformer(CHANNELS, head_width)

    def forward(self, volume: Tensor) -> Tensor:
        """See the class."""
        batch, _, *sides = volume.shape
        depth, height, width = (side // step for side, step in zip(
            sides, (self.temporal_patch, self.patch, self.patch), strict=True))
        grid = depth, height, width
        cut = volume.view(batch, depth, self.temporal_patch, height, self.patch, width, self.patch)
        tokens = self.to_patch_emb(cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3))  # [B, D', H'W', C]
        bias = self.spatial_rel_pos_bias(height, width)
        tokens = self.enc_spatial_transformer(tokens.flatten(0, 1), grid, bias)
        along = tokens.unflatten(0, (batch, depth)).transpose(1, 2).flatten(0, 1)  # [B*H'W', D', C]
        along = self.enc_temporal_transformer(along, grid)
        return along.unflatten(0, (batch, height, width)).permute(0, 4, 1, 2, 3)


register(EncoderSpec("ctvit", lambda _: CTViT(32, 16, 64), CHANNELS, (16, 32, 32), reduction="depth",
                     published=Published(101.1, 160.5, params_include_projection=True, zero_shot_f1=44.3)))
# CT-CLIP's code scales Hounsfield units to [-1, 1] without DCFormer's narrower window.
register(EncoderSpec("ctvit-ctclip", lambda _: CTViT(20, 10, 32), CHANNELS, (10, 20, 20), 480, "depth",
                     checkpoint=CheckpointFormat(
                         "visual_transformer.",
                         unused=("to_pixels", "to_patch_emb_first_frame."),
                         preprocessing={"window_hu": (-1000.0, 1000.0), "offset_hu": 0.0, "scale_hu": 1000.0})))
