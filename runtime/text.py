"""Texts to token ids, with the tokenizer that the bundle carries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Tokenizer

from .errors import BundleError, DcformerWarning, InputError
from .manifest import Text


class TruncationWarning(DcformerWarning):
    """A text was longer than the text tower can read."""


class Tokenizer:
    """WordPiece ids with attention masks, padded to the longest text of the call (attention masks the padding)."""

    def __init__(self, path: Path, spec: Text) -> None:
        try:
            self._tokenizer = _Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise BundleError(f"{path}: not a usable tokenizer.json ({error})") from error
        self._tokenizer.no_padding()
        self._spec = spec

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask (1 = token, 0 = padding), both ``[n, length]`` int64.

        Texts over the limit keep their beginning and the closing special token; a TruncationWarning names the count.

        Raises:
            InputError: no texts, or something that is no string.
        """
        if not texts:
            raise InputError("texts: an empty list; expected at least one text")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"texts[{index}] is {type(text).__name__}; expected str")
        limit = self._spec.max_tokens
        self._tokenizer.no_truncation()
        encodings = self._tokenizer.encode_batch(list(texts))
        too_long = {i: len(e.ids) for i, e in enumerate(encodings) if len(e.ids) > limit}
        if too_long:
            for index, count in too_long.items():
                warnings.warn(f"text {index + 1} has {count} tokens; only the first {limit} are read "
                              f"({count - limit} dropped)", TruncationWarning, stacklevel=3)
            self._tokenizer.enable_truncation(limit)
            encodings = self._tokenizer.encode_batch(list(texts))
        length = max(len(encoding.ids) for encoding in encodings)
        ids = np.full((len(texts), length), self._spec.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        return ids, mask
