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
        self._tokenizer.no_truncation()
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
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"texts[{index}] is not valid Unicode (bytes in another encoding than UTF-8?)")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        limit = self._spec.max_tokens
        for index, row in enumerate(rows):
            if len(row) > limit:
                warnings.warn(f"text {index + 1} has {len(row)} tokens; only the first {limit} are read "
                              f"({len(row) - limit} dropped)", TruncationWarning, stacklevel=3)
                # Cut here, not by the tokenizer: its truncation is a setting that all threads would share.
                rows[index] = [*row[: limit - 1], row[-1]]
        ids = np.full((len(rows), max(map(len, rows))), self._spec.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return ids, mask
