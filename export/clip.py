"""The CLIP model around an image encoder, module for module as the published checkpoints name it.

Sources: CT-CLIP (Hamamci et al., arXiv:2403.17834), the published DCFormer code, and for the quantizer the
cosine-similarity codebook of vector_quantize_pytorch (Yu et al., arXiv:2110.04627).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.manifest import Reduction
from .registry import EMBEDDING_DIM, EncoderSpec
from .text import TextSpec


@dataclass(frozen=True)
class ClipSpec:
    """Everything that fixes the modules of one CLIP model.

    ``input_size`` S means volumes of (D, H, W) = (S/2, S, S). ``codebook_size``: None for models that read the
    encoder's tokens as they are. ``class_count``: width of the fine-tuned detector's output; None for a plain CLIP
    model. ``projection_bias``: whether the Linears to the joint space have one.
    """

    encoder: EncoderSpec
    reduction: Reduction
    input_size: int
    codebook_size: int | None
    text: TextSpec
    class_count: int | None = None
    projection_bias: bool = False

    @property
    def reduced_width(self) -> int:
        """Length of the vector that ``to_visual_latent`` reads."""
        return reduced_width(self.reduction, self.encoder.grid(self.input_size), self.encoder.channels)

    def build(self) -> Clip | Detector:
        """The model with random weights, in evaluation mode."""
        clip = Clip(self)
        model = clip if self.class_count is None else Detector(clip, self.class_count)
        return model.eval()


def reduced_width(reduction: Reduction, grid: tuple[int, int, int], channels: int) -> int:
    """Features left of a (D', H', W') grid after the reduction: C, H'W'C or D'H'W'C."""
    depth, height, width = grid
    return {"channel": 1, "depth": height * width, "none": depth * height * width}[reduction] * channels


class Codebook(nn.Module):
    """Nearest code by cosine similarity. Only ``embed`` is read; the rest is training state that checkpoints hold."""

    def __init__(self, codebook_size: int, channels: int) -> None:
        super().__init__()
        rows = F.normalize(torch.randn(1, codebook_size, channels), dim=-1)
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", rows.clone())
        self.register_buffer("embed", rows)
        self.embed: Tensor

    def similarities(self, tokens: Tensor) -> Tensor:
        """Cosine similarity ``[B, N, codes]`` of tokens ``[B, N, C]`` with unit codebook rows."""
        return F.normalize(tokens, dim=-1) @ self.embed[0].t()

    def forward(self, tokens: Tensor) -> Tensor:
        """Code indices ``[B, N]`` int64."""
        return self.similarities(tokens).argmax(dim=-1)


class VectorQuantizer(nn.Module):
    """Holds the codebook under the key ``_codebook``."""

    def __init__(self, codebook_size: int, channels: int) -> None:
        super().__init__()
        self._codebook = Codebook(codebook_size, channels)

    @property
    def codebook(self) -> Codebook:
        """The codebook, under a public name."""
        return self._codebook

    def forward(self, tokens: Tensor) -> Tensor:
        """Code indices ``[B, N]`` int64 of tokens ``[B, N, C]``."""
        return self._codebook(tokens)


class VisualTransformer(nn.Module):
    """Encoder and quantizer, if there is one; the name is the state dict's, whatever the encoder is."""

    def __init__(self, encoder: nn.Module, channels: int, codebook_size: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.vq = None if codebook_size is None else VectorQuantizer(codebook_size, channels)


class ImageOutputs(NamedTuple):
    """Outputs of the image tower.

    ``embedding`` [B, 512] unit rows; ``codes`` [B, D'H'W'] int64, tokens in (D', H', W') order, None without a
    quantizer; ``feature_map`` [B, C, H', W', D']: what the encoder computed.
    """

    embedding: Tensor
    codes: Tensor | None
    feature_map: Tensor


class Clip(nn.Module):
    """Image and text towers into one 512-wide space. State-dict keys are those of the published checkpoints."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.reduction: Reduction = spec.reduction
        self.visual_transformer = VisualTransformer(spec.encoder.build(spec.input_size), spec.encoder.channels,
                                                    spec.codebook_size)
        self.to_visual_latent = nn.Linear(spec.reduced_width, EMBEDDING_DIM, bias=spec.projection_bias)
        self.text_transformer = spec.text.build()
        self.to_text_latent = nn.Linear(spec.text.hidden_size, EMBEDDING_DIM, bias=spec.projection_bias)

    def encode_image(self, volume: Tensor) -> ImageOutputs:
        """Embed preprocessed ``[B, 1, D, H, W]`` float volumes."""
        feature_map = self.visual_transformer.encoder(volume)
        tokens = feature_map.permute(0, 4, 2, 3, 1)  # [B, D', H', W', C], the order in which codes are counted
        if self.visual_transformer.vq is None:
            return ImageOutputs(self.embed_tokens(tokens), None, feature_map)
        codes = self.visual_transformer.vq(tokens.flatten(1, 3))
        return ImageOutputs(self.embed_codes(codes, tuple(tokens.shape[1:4])), codes, feature_map)

    @property
    def codebook(self) -> Codebook:
        """The quantizer's; only for models that have one."""
        assert self.visual_transformer.vq is not None
        return self.visual_transformer.vq.codebook

    def embed_codes(self, codes: Tensor, grid: tuple[int, ...]) -> Tensor:
        """All that follows the quantizer: codes ``[B, D'H'W']`` on a (D', H', W') grid to unit rows ``[B, 512]``."""
        return self.embed_tokens(F.embedding(codes, self.codebook.embed[0]).unflatten(1, grid))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """What the projection makes of tokens ``[B, D', H', W', C]``: unit rows ``[B, 512]``."""
        return F.normalize(self.to_visual_latent(reduce_tokens(tokens, self.reduction)), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed token ids ``[B, L]`` int64 with their mask ``[B, L]`` (1 = real token) into unit rows ``[B, 512]``."""
        hidden = self.text_transformer.states(input_ids, attention_mask)
        return F.normalize(self.to_text_latent(hidden[:, 0]), dim=-1)


def reduce_tokens(tokens: Tensor, reduction: Reduction) -> Tensor:
    """``[B, D', H', W', C]`` to ``[B, n]``: mean over the grid, mean over depth, or everything in that order."""
    if reduction == "channel":
        return tokens.mean(dim=(1, 2, 3))
    if reduction == "depth":
        return tokens.mean(dim=1).flatten(1)
    return tokens.flatten(1)


class Detector(nn.Module):
    """The fine-tuned detector: Linear(512 -> classes) on ReLU of the unit image embedding; sigmoid gives scores."""

    def __init__(self, trained_model: Clip, class_count: int) -> None:
        super().__init__()
        self.trained_model = trained_model
        self.classifier = nn.Linear(EMBEDDING_DIM, class_count)

    def class_scores(self, embedding: Tensor) -> Tensor:
        """Probabilities ``[B, classes]`` of unit image embeddings ``[B, 512]``."""
        return self.classifier(F.relu(embedding)).sigmoid()
