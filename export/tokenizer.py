"""The tokenizer folder of a BERT text encoder, turned into the one file that the runtime reads."""

from __future__ import annotations

import warnings
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer

from ..runtime.errors import DcformerWarning, InputError
from ..runtime.manifest import Text
from .text import TextSpec

#: The published training truncates reports here.
MAX_TOKENS = 512


class TokenizerWarning(DcformerWarning):
    """The tokenizer can be used but may not be the checkpoint's."""


def convert_tokenizer(folder: Path, text: TextSpec, target: Path) -> Text:
    """Write ``target`` (tokenizer.json) from a Hugging Face tokenizer folder.

    ``vocab.txt`` comes first and is lower-cased, because the published training reads it that way whatever the
    folder's own settings say; ``tokenizer.json`` is taken as it is where there is no ``vocab.txt``.

    Raises:
        InputError: no usable tokenizer, or one whose ids the checkpoint's embedding table does not have.
    """
    tokenizer = _read(folder)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= text.vocab_size:
        raise InputError(f"{folder}: token ids go up to {largest} but the checkpoint embeds {text.vocab_size} tokens; "
                         "this is not the checkpoint's tokenizer")
    if size < text.vocab_size:
        warnings.warn(f"{folder}: {size} tokens, the checkpoint embeds {text.vocab_size}; make sure that this is the "
                      "checkpoint's tokenizer", TokenizerWarning, stacklevel=2)
    special = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]")}
    for name, token_id in special.items():
        if token_id is None:
            raise InputError(f"{folder}: no token {name}; expected a BERT WordPiece tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode("lung").ids
    if ids[:1] != [special["[CLS]"]] or ids[-1:] != [special["[SEP]"]]:
        raise InputError(f"{folder}: it encodes 'lung' as {ids}, without [CLS] first and [SEP] last, where the text "
                         "encoder expects them; use the folder with vocab.txt")
    tokenizer.save(str(target))
    return Text(file=target.name, max_tokens=min(MAX_TOKENS, text.max_positions),
                pad_token_id=int(special["[PAD]"] or 0))


def _read(folder: Path) -> Tokenizer:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such tokenizer folder; expected vocab.txt or tokenizer.json in it")
    vocabulary, fast = folder / "vocab.txt", folder / "tokenizer.json"
    try:
        if vocabulary.is_file():
            return Tokenizer.from_str(BertWordPieceTokenizer.from_file(str(vocabulary), lowercase=True).to_str())
        if fast.is_file():
            return Tokenizer.from_file(str(fast))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise InputError(f"{folder}: damaged tokenizer ({error})") from error
    raise InputError(f"{folder}: neither vocab.txt nor tokenizer.json in it")
