"""The text towers of the published models: BERT, and DistilBERT in Med3DVLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

#: Width of an attention head in every published text encoder.
_HEAD = 64
#: Traces to MatMul-Softmax-MatMul, which every runtime fuses.
_ATTENTION = "eager"


@dataclass(frozen=True)
class TextSpec:
    """Sizes of a text encoder; DCFormer's checkpoints have no config, so they follow from tensor shapes."""

    vocab_size: int
    hidden_size: int
    layers: int
    intermediate_size: int
    max_positions: int
    token_types: int = 0  # DistilBERT has none
    architecture: Literal["bert", "distilbert"] = "bert"

    def build(self) -> BertText | DistilBertText:
        """A text tower with random weights; heads = hidden / 64."""
        if self.architecture == "distilbert":
            small = DistilBertConfig(
                vocab_size=self.vocab_size, dim=self.hidden_size, n_layers=self.layers,
                n_heads=self.hidden_size // _HEAD, hidden_dim=self.intermediate_size,
                max_position_embeddings=self.max_positions,
            )
            small._attn_implementation = _ATTENTION
            return DistilBertText(small).eval()
        config = BertConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.layers,
            num_attention_heads=self.hidden_size // _HEAD, intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_positions, type_vocab_size=self.token_types,
        )
        config._attn_implementation = _ATTENTION
        return BertText(config).eval()


def _ignored(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask ``[B, 1, 1, L]``; transformers' own mask code traces to dozens of nodes."""
    return (1 - mask[:, None, None, :]).to(dtype) * torch.finfo(dtype).min


class BertText(BertModel):
    """BERT (Devlin et al., arXiv:1810.04805)."""

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states ``[B, L, hidden]`` of token ids ``[B, L]`` with their mask (1 = token)."""
        embedded = self.embeddings(input_ids=input_ids, token_type_ids=torch.zeros_like(input_ids))
        ignored = _ignored(attention_mask, embedded.dtype)
        return self.encoder(embedded, attention_mask=ignored).last_hidden_state


class DistilBertText(DistilBertModel):
    """DistilBERT (Sanh et al., arXiv:1910.01108)."""

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See BertText."""
        embedded = self.embeddings(input_ids)
        ignored = _ignored(attention_mask, embedded.dtype)
        return self.transformer(hidden_states=embedded, attention_mask=ignored).last_hidden_state
